//! The program as containerd and CRI-O call it: `start`, `delete`, `-info`, `-v`, in bundles and with sockets of the test's own.

use containerd_shim_protos::api::{ConnectRequest, DeleteResponse};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, Extension};
use containerd_shim_protos::shim::oci;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use containerd_shim_protos::{Client, TaskClient};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, getpid};
use rustix::thread::{CoreSchedulingScope, core_scheduling_cookie};
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use ttrpc::context;

const PROGRAM: &str = env!("CARGO_BIN_EXE_containerd-shim-capsid-v2");

/// Bundles and sockets of one test. Dropped, its servers are killed and all is removed.
struct Host {
    root: PathBuf,
    name: String,
}

impl Host {
    fn new() -> Host {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let unique = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("door{}x{unique}", std::process::id());
        let root = std::env::temp_dir().join(&name);
        fs::create_dir(&root).expect("a directory for the test");
        Host { root, name }
    }

    /// An id that no other test has: servers are found by it.
    fn id(&self, id: &str) -> String {
        format!("{}-{id}", self.name)
    }

    fn bundle(&self, id: &str, annotations: &[(&str, &str)]) -> PathBuf {
        let bundle = self.root.join(id);
        fs::create_dir(&bundle).expect("writable");
        let annotations: serde_json::Map<_, _> = annotations
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).into()))
            .collect();
        let spec = serde_json::json!({"ociVersion": "1.1.0", "annotations": annotations});
        fs::write(bundle.join("config.json"), spec.to_string()).expect("writable");
        bundle
    }

    fn sockets(&self) -> PathBuf {
        self.root.join("s")
    }

    fn start_command(&self, id: &str) -> Command {
        let mut command = Command::new(PROGRAM);
        command
            .args(["-namespace", "test", "-address", "/run/none.sock"])
            .args(["-publish-binary", "/bin/false", "-id", &self.id(id)])
            .arg("start")
            .current_dir(self.root.join(id))
            .env("CAPSID_SOCKET_DIR", self.sockets())
            .env("TTRPC_ADDRESS", "");
        command
    }

    fn start(&self, id: &str, stdin: &[u8]) -> Output {
        run(self.start_command(id), stdin)
    }

    /// The processes that serve the container `id` came first of.
    fn servers(&self, id: &str) -> Vec<Pid> {
        processes(&format!("\0-id\0{}\0", self.id(id)))
    }

    fn sockets_left(&self) -> usize {
        fs::read_dir(self.sockets()).map_or(0, Iterator::count)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for server in processes(&format!("\0-id\0{}-", self.name)) {
            kill(server);
        }
        if let Err(error) = fs::remove_dir_all(&self.root) {
            eprintln!("cannot remove {}: {error}", self.root.display());
        }
    }
}

/// Servers with these bytes in their command lines.
fn processes(part: &str) -> Vec<Pid> {
    let entries = fs::read_dir("/proc").expect("procfs");
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let serves = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        line.contains(part) && line.ends_with("\0serve\0")
    };
    pids.filter(serves).filter_map(Pid::from_raw).collect()
}

fn kill(server: Pid) {
    let Ok(pidfd) = rustix::process::pidfd_open(server, PidfdFlags::empty()) else {
        return; // gone
    };
    rustix::process::pidfd_send_signal(&pidfd, Signal::KILL).expect("ours");
    let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
    rustix::event::poll(&mut ended, None).expect("its end");
}

fn run(mut command: Command, stdin: &[u8]) -> Output {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program");
    let mut input = child.stdin.take().expect("a pipe");
    // What does not read its input need not.
    let _unread = input.write_all(stdin);
    drop(input);
    child.wait_with_output().expect("its output")
}

/// The standard output of a call that went well, in which not a byte is on standard error.
fn good(output: Output) -> Vec<u8> {
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.success() && error.is_empty(),
        "{}: {error}",
        output.status
    );
    output.stdout
}

/// The one line of a call that failed.
fn refused(output: &Output) -> String {
    assert!(
        !output.status.success() && output.stdout.is_empty(),
        "{output:?}"
    );
    let line = String::from_utf8(output.stderr.clone()).expect("UTF-8");
    assert_eq!(
        line.find('\n'),
        Some(line.len() - 1),
        "one line, got {line:?}"
    );
    line.trim_end().to_owned()
}

fn json_address(reply: &[u8]) -> String {
    let reply: serde_json::Value = serde_json::from_slice(reply).expect("JSON");
    assert_eq!(
        (&reply["version"], &reply["protocol"]),
        (&2.into(), &"ttrpc".into())
    );
    reply["address"].as_str().expect("an address").to_owned()
}

fn connects(address: &str) -> bool {
    UnixStream::connect(address.strip_prefix("unix://").expect("a path")).is_ok()
}

fn params(host: &Host, id: &str) -> BootstrapParams {
    BootstrapParams {
        instance_id: host.id(id),
        namespace: "test".into(),
        containerd_grpc_address: "/run/none.sock".into(),
        socket_dir: Some(host.root.join("t").display().to_string()),
        ..BootstrapParams::default()
    }
}

fn bytes(message: &impl Message) -> Vec<u8> {
    message.write_to_bytes().expect("encodable")
}

fn runc_options(shim_cgroup: &str) -> Any {
    let options = oci::Options {
        shim_cgroup: shim_cgroup.into(),
        ..oci::Options::default()
    };
    Any {
        type_url: "containerd.runc.v1.Options".into(),
        value: bytes(&options),
        ..Any::default()
    }
}

#[test]
fn an_old_daemon_gets_json_and_a_server_that_answers() {
    let host = Host::new();
    let bundle = host.bundle("c", &[]);
    let address = json_address(&good(host.start("c", b"")));
    assert!(connects(&address), "{address}");
    assert_eq!(
        fs::read(bundle.join("address")).expect("there"),
        address.as_bytes()
    );
    assert_eq!(host.servers("c").len(), 1);
}

#[test]
fn a_new_daemon_gets_its_own_form_and_its_directory() {
    let host = Host::new();
    host.bundle("c", &[]);
    let mut params = params(&host, "c");
    params.extensions.push(Extension {
        value: MessageField::some(runc_options("")),
        ..Extension::default()
    });
    let reply = good(host.start("c", &bytes(&params)));
    let result = BootstrapResult::parse_from_bytes(&reply).expect("protobuf");
    assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    let directory = format!("unix://{}/", host.root.join("t").display());
    assert!(
        result.address.starts_with(&directory) && connects(&result.address),
        "{}",
        result.address
    );
}

#[test]
fn options_of_an_old_daemon_are_taken() {
    let host = Host::new();
    host.bundle("c", &[]);
    let reply = good(host.start("c", &bytes(&runc_options(""))));
    assert!(connects(&json_address(&reply)));
}

#[test]
fn a_second_start_finds_the_first_one_s_server() {
    let host = Host::new();
    host.bundle("c", &[]);
    let first = good(host.start("c", b""));
    let servers = host.servers("c");
    assert_eq!(good(host.start("c", b"")), first);
    assert_eq!(host.servers("c"), servers);
    let reply = good(host.start(
        "c",
        &bytes(&BootstrapParams {
            socket_dir: None,
            ..params(&host, "c")
        }),
    ));
    let result = BootstrapResult::parse_from_bytes(&reply).expect("protobuf");
    assert_eq!(result.address, json_address(&first));
}

#[test]
fn of_eight_starts_at_once_one_leaves_a_server() {
    let host = Host::new();
    host.bundle("c", &[]);
    let replies: Vec<Vec<u8>> = std::thread::scope(|scope| {
        let starts: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| good(host.start("c", b""))))
            .collect();
        starts
            .into_iter()
            .map(|start| start.join().expect("a reply"))
            .collect()
    });
    assert!(
        replies.iter().all(|reply| *reply == replies[0]),
        "{replies:?}"
    );
    assert_eq!(host.servers("c").len(), 1);
}

#[test]
fn a_killed_server_is_followed_by_another() {
    let host = Host::new();
    host.bundle("c", &[]);
    let first = good(host.start("c", b""));
    let servers = host.servers("c");
    servers.iter().copied().for_each(kill);
    assert!(!connects(&json_address(&first)));
    assert_eq!(good(host.start("c", b"")), first);
    assert!(connects(&json_address(&first)));
    assert_ne!(host.servers("c"), servers);
}

#[test]
fn containers_of_a_pod_share_the_server_of_its_sandbox() {
    for (id, kind) in [
        (
            "io.kubernetes.cri.sandbox-id",
            "io.kubernetes.cri.container-type",
        ),
        (
            "io.kubernetes.cri-o.SandboxID",
            "io.kubernetes.cri-o.ContainerType",
        ),
    ] {
        let host = Host::new();
        let sandbox = host.id("sandbox");
        host.bundle("sandbox", &[(id, &sandbox), (kind, "sandbox")]);
        let address = json_address(&good(host.start("sandbox", b"")));
        for container in ["a", "b"] {
            let bundle = host.bundle(container, &[(id, &sandbox), (kind, "container")]);
            assert_eq!(json_address(&good(host.start(container, b""))), address);
            assert_eq!(
                fs::read(bundle.join("address")).expect("there"),
                address.as_bytes()
            );
            assert_eq!(host.servers(container), []);
        }
        assert_eq!(host.servers("sandbox").len(), 1);
    }
}

#[test]
fn a_container_of_a_pod_that_is_gone_is_refused() {
    let host = Host::new();
    let annotations = [
        ("io.kubernetes.cri.sandbox-id", "gone"),
        ("io.kubernetes.cri.container-type", "container"),
    ];
    host.bundle("c", &annotations);
    let line = refused(&host.start("c", b""));
    assert!(
        line.contains("the pod is gone: the shim of its sandbox gone"),
        "{line}"
    );
    assert_eq!(host.servers("c"), []);
}

#[test]
fn garbage_is_refused_in_one_line_and_leaves_nothing() {
    let host = Host::new();
    host.bundle("c", &[]);
    let line = refused(&host.start("c", b"garbage"));
    assert!(
        line.starts_with("containerd-shim-capsid-v2: the 7 bytes on standard input are neither"),
        "{line}"
    );
    let cgroup = refused(&host.start("c", &bytes(&runc_options("/no-such-cgroup-of-capsid"))));
    let no_cgroup = ["no-such-cgroup-of-capsid", "is not cgroup v2"];
    assert!(
        no_cgroup.iter().any(|reason| cgroup.contains(reason)),
        "{cgroup}"
    );
    assert_eq!((host.servers("c"), host.sockets_left()), (vec![], 0));
}

#[test]
fn a_bundle_without_a_spec_is_refused_by_name() {
    let host = Host::new();
    let bundle = host.bundle("c", &[]);
    fs::remove_file(bundle.join("config.json")).expect("ours");
    let line = refused(&host.start("c", b""));
    assert!(
        line.contains("c/config.json: No such file or directory"),
        "{line}"
    );
}

#[test]
fn a_directory_that_is_too_long_for_sockets_is_refused() {
    let host = Host::new();
    host.bundle("c", &[]);
    let mut command = host.start_command("c");
    command.env("CAPSID_SOCKET_DIR", Path::new("/tmp").join("x".repeat(64)));
    let line = refused(&run(command, b""));
    assert!(
        line.ends_with("is longer than 106 bytes; a shorter directory is needed"),
        "{line}"
    );
}

#[test]
fn a_standard_input_that_does_not_end_is_given_up() {
    let host = Host::new();
    host.bundle("c", &[]);
    let mut command = host.start_command("c");
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program");
    let _held = child.stdin.take();
    let begun = Instant::now();
    let line = refused(&child.wait_with_output().expect("its output"));
    assert!(
        line.ends_with("standard input did not end within 5 s"),
        "{line}"
    );
    assert!(begun.elapsed() >= Duration::from_secs(5));
}

#[test]
fn the_server_starts_with_what_it_needs_and_nothing_else() {
    let host = Host::new();
    let bundle = host.bundle("c", &[]);
    // With a descriptor that is not ours, a umask, and SIGPIPE as a shell has it.
    let mut shell = Command::new("sh");
    let start = host.start_command("c");
    shell
        .args([
            "-c",
            "umask 077; exec 9</dev/zero; exec \"$@\"",
            "sh",
            PROGRAM,
        ])
        .args(start.get_args());
    shell
        .current_dir(&bundle)
        .env("CAPSID_SOCKET_DIR", host.sockets())
        .env("TTRPC_ADDRESS", "");
    await_answer(&json_address(&good(run(shell, b""))));
    let [server] = host.servers("c")[..] else {
        panic!("one server");
    };
    let server = server.as_raw_nonzero().get();
    let proc = PathBuf::from(format!("/proc/{server}"));
    let link = |name: &str| fs::read_link(proc.join(name)).expect("ours");
    for fd in ["fd/0", "fd/1", "fd/2"] {
        assert_eq!(link(fd), Path::new("/dev/null"), "{fd}");
    }
    assert!(link("fd/3").to_string_lossy().starts_with("socket:"));
    let fds = fs::read_dir(proc.join("fd")).expect("ours");
    let links = fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    assert!(!links.into_iter().any(|to| to == Path::new("/dev/zero")));
    assert_eq!(link("cwd"), bundle);
    let stat = fs::read_to_string(proc.join("stat")).expect("ours");
    let after_name = stat.rsplit(')').next().expect("a state");
    let session = after_name.split_whitespace().nth(3).expect("a session");
    assert_eq!(session, server.to_string());
    let status = fs::read_to_string(proc.join("status")).expect("ours");
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .expect("a field")
            .trim()
    };
    assert_eq!(field("Umask:"), "0000");
    let ignored = u64::from_str_radix(field("SigIgn:"), 16).expect("a mask");
    assert_ne!(ignored & 1 << (Signal::PIPE.as_raw() - 1), 0);
    let score =
        |pid: &str| fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).expect("a score");
    let score = |pid: &str| score(pid).trim().parse::<i32>().expect("a number");
    assert_eq!(score(&server.to_string()), (score("self") + 1).min(1000));
}

/// Waits until the server answers a call, whatever it says: by then it has taken all that it was given.
fn await_answer(address: &str) {
    let client = Client::connect(address).expect("a server");
    let limit = context::with_duration(Duration::from_secs(60));
    match TaskClient::new(client).connect(limit, &ConnectRequest::new()) {
        Ok(_) | Err(ttrpc::Error::RpcStatus(_)) => {}
        Err(error) => panic!("no answer: {error}"),
    }
}

#[test]
fn info_needs_no_environment_and_no_input() {
    for stdin in [&b""[..], &bytes(&runc_options("/x"))] {
        let mut command = Command::new(PROGRAM);
        command.arg("-info").env_clear().current_dir("/");
        let info = RuntimeInfo::parse_from_bytes(&good(run(command, stdin))).expect("protobuf");
        assert_eq!(info.name, "io.containerd.capsid.v2");
        assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
        let features: serde_json::Value =
            serde_json::from_slice(&info.features.value).expect("JSON");
        assert_eq!(features["linux"]["cgroup"]["v2"], true);
    }
}

#[test]
fn the_version_is_one_line() {
    for flag in ["-v", "-version"] {
        let mut command = Command::new(PROGRAM);
        command.arg(flag).env_clear();
        let line = String::from_utf8(good(run(command, b""))).expect("UTF-8");
        assert_eq!(
            line,
            format!("containerd-shim-capsid-v2 {}\n", env!("CARGO_PKG_VERSION"))
        );
    }
}

fn delete(host: &Host, bundle: &Path) -> Output {
    let mut command = Command::new(PROGRAM);
    command
        .args(["-namespace", "test", "-address", "", "-id"])
        .args([&host.id("c"), "-bundle"])
        .arg(bundle)
        .arg("delete")
        .current_dir(&host.root);
    run(command, b"")
}

fn deleted(reply: &[u8]) -> DeleteResponse {
    DeleteResponse::parse_from_bytes(reply).expect("protobuf")
}

#[test]
fn delete_answers_with_the_message_alone_also_twice_and_for_a_bundle_that_is_gone() {
    let host = Host::new();
    let bundle = host.bundle("c", &[]);
    for bundle in [&bundle, &bundle, &host.root.join("gone")] {
        let response = deleted(&good(delete(&host, bundle)));
        assert_eq!(response.exit_status, 137);
        assert!(response.exited_at.seconds > 0);
    }
}

#[test]
fn delete_removes_the_socket_of_a_server_that_was_killed() {
    let host = Host::new();
    let bundle = host.bundle("c", &[]);
    good(host.start("c", b""));
    host.servers("c").into_iter().for_each(kill);
    assert_eq!(host.sockets_left(), 1);
    good(delete(&host, &bundle));
    assert_eq!(host.sockets_left(), 0);
}

#[test]
fn what_goes_wrong_in_a_delete_that_goes_well_is_a_warning() {
    let host = Host::new();
    let bundle = host.bundle("c", &[]);
    let hook = serde_json::json!({"path": "/no/such/hook"});
    let spec = serde_json::json!({"ociVersion": "1.1.0", "hooks": {"poststop": [hook]}});
    fs::write(bundle.join("config.json"), spec.to_string()).expect("writable");
    fs::write(bundle.join("capsid-task.json"), r#"{"pid":4711}"#).expect("writable");
    let output = delete(&host, &bundle);
    assert!(output.status.success());
    assert_eq!(deleted(&output.stdout).pid, 4711);
    let warning = String::from_utf8(output.stderr).expect("UTF-8");
    let right =
        warning.contains(" level=warning msg=poststop ") && warning.contains("/no/such/hook");
    assert!(right && warning.lines().count() == 1, "{warning}");
}

#[test]
fn a_pod_s_core_is_its_own_where_sched_core_asks_for_it() {
    let host = Host::new();
    host.bundle("c", &[]);
    let mut command = host.start_command("c");
    command.env("SCHED_CORE", "1");
    let output = run(command, b"");
    // What the kernel can do, it says of us as well.
    match core_scheduling_cookie(getpid(), CoreSchedulingScope::Thread) {
        Ok(ours) => {
            good(output);
            let server = host.servers("c")[0];
            let its = core_scheduling_cookie(server, CoreSchedulingScope::Thread);
            assert!(its.is_ok_and(|its| its != 0 && its != ours), "{its:?}");
        }
        Err(Errno::NODEV) => drop(good(output)), // no core with two threads
        Err(_) => {
            let line = refused(&output);
            assert!(line.contains("as SCHED_CORE asks"), "{line}");
            assert_eq!((host.servers("c"), host.sockets_left()), (vec![], 0));
        }
    }
}

#[test]
fn a_call_that_means_nothing_is_refused_in_one_line() {
    for (args, reason) in [
        (&["delete"][..], "delete needs -id"),
        (&["-id", "c", "delete"], "delete needs -namespace"),
        (
            &["-id", "c", "start"],
            "no namespace, neither by -namespace nor on standard input",
        ),
        (
            &["stop"],
            "unknown action \"stop\", expected start or delete",
        ),
        (
            &["-id", "c", "-namespace", "n", "serve"],
            "fd 3 is no listening socket; only `start` starts a server: Bad file descriptor (os error 9)",
        ),
    ] {
        let mut command = Command::new(PROGRAM);
        command.args(args);
        let line = refused(&run(command, b""));
        assert_eq!(line, format!("containerd-shim-capsid-v2: {reason}"));
    }
}
