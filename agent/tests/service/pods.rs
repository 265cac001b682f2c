//! What the containers of a pod share: the pause container, its pid namespace, memory.

use crate::guest::{Guest, Running, container_request, context, lines, refusal};
use capsid_protocol::agent::{CreateContainerRequest, Stdio};
use serde_json::{Value, json};
use std::io::Read;
use std::time::{Duration, Instant};
use ttrpc::Code;

/// Memory of the pause process that is no file's, in KiB. The files are the initramfs, which is in memory anyway.
const PAUSE_MAX_KIB: u64 = 300;
/// No wait of these tests takes longer, but for a hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// Creates and starts the pause container of a pod; its pid.
fn pause(guest: &Guest, id: &str) -> u32 {
    let request = CreateContainerRequest {
        container_id: id.into(),
        pause: true,
        ..Default::default()
    };
    let created = guest.client().create_container(context(), &request);
    guest.start_container(id).expect("started");
    created.expect("created").guest_pid
}

fn create_in(guest: &Guest, pod: &str, id: &str, spec: &Value) -> ttrpc::Result<Running> {
    guest.create_with(id, spec, |request| request.pid_namespace_of = pod.into())
}

/// Creates and starts a container in the pid namespace of another one.
fn run_in(guest: &Guest, pod: &str, id: &str, line: &str) -> Running {
    let spec = guest.spec(&["sh", "-c", line]);
    let running = create_in(guest, pod, id, &spec).expect("created");
    guest.start_container(id).expect("started");
    running
}

fn pids(guest: &Guest, id: &str) -> Vec<u32> {
    let request = container_request(id);
    let told = guest.client().pids(context(), &request);
    told.expect("told").guest_pids
}

fn until(what: &str, there: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !there() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The value of a line of /proc/PID/status or /proc/PID/smaps_rollup.
fn value(pid: u32, file: &str, key: &str) -> String {
    let all = lines(format!("/proc/{pid}/{file}"));
    let found = all.iter().find_map(|line| line.strip_prefix(key));
    found
        .unwrap_or_else(|| panic!("{key} {all:?}"))
        .trim()
        .to_owned()
}

#[test]
fn the_pause_container_ends_with_0_when_it_is_asked_to() {
    let guest = Guest::start();
    for signal in [15, 2] {
        pause(&guest, "pod");
        guest.kill("pod", "", signal, false).expect("signalled");
        assert_eq!(guest.wait("pod", "").expect("ended"), 0, "{signal}");
        guest.delete("pod", "").expect("deleted");
    }
}

#[test]
fn the_pause_container_dies_of_sigkill_alone_or_with_all() {
    let guest = Guest::start();
    for all in [false, true] {
        pause(&guest, "pod");
        guest.kill("pod", "", 9, all).expect("killed");
        assert_eq!(guest.wait("pod", "").expect("ended"), 137);
        assert_eq!(refusal(guest.kill("pod", "", 9, false)).0, Code::NOT_FOUND);
        guest.delete("pod", "").expect("deleted");
    }
}

#[test]
fn the_pause_container_is_started_once_and_can_be_deleted_before() {
    let guest = Guest::start();
    pause(&guest, "pod");
    let again = refusal(guest.start_container("pod"));
    assert_eq!(again.0, Code::FAILED_PRECONDITION);
    assert_eq!(
        refusal(guest.delete("pod", "")).0,
        Code::FAILED_PRECONDITION
    );
    guest.kill("pod", "", 15, false).expect("signalled");
    guest.wait("pod", "").expect("ended");
    guest.delete("pod", "").expect("deleted");
    let request = CreateContainerRequest {
        container_id: "pod".into(),
        pause: true,
        ..Default::default()
    };
    let created = guest.client().create_container(context(), &request);
    created.expect("created");
    assert_eq!(guest.delete("pod", "").expect("deleted"), 137);
    assert!(!std::path::Path::new("/sys/fs/cgroup/capsid/pod").exists());
}

#[test]
fn the_pause_container_has_no_programs() {
    let guest = Guest::start();
    pause(&guest, "pod");
    let (code, text) = refusal(guest.exec("pod", "e1", &guest.process("true")));
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert_eq!(text, "the pause container has no programs to execute");
    end_pod(&guest, "pod");
}

#[test]
fn the_pause_process_has_nothing_and_may_nothing() {
    let guest = Guest::start();
    let pid = pause(&guest, "pod");
    for (key, expected) in [
        ("Name:", "pause"),
        ("Uid:", "65535\t65535\t65535\t65535"),
        ("Gid:", "65535\t65535\t65535\t65535"),
        ("Groups:", ""),
        ("CapPrm:", "0000000000000000"),
        ("CapEff:", "0000000000000000"),
        ("CapBnd:", "0000000000000000"),
        ("CapAmb:", "0000000000000000"),
        ("NoNewPrivs:", "1"),
        ("Seccomp:", "2"),
        ("Threads:", "1"),
    ] {
        assert_eq!(value(pid, "status", key), expected, "{key}");
    }
    assert!(value(pid, "status", "NSpid:").ends_with("\t1"));
    assert_eq!(lines(format!("/proc/{pid}/oom_score_adj")), ["-998"]);
    assert_eq!(lines(format!("/proc/{pid}/cgroup")), ["0::/capsid/pod"]);
    assert_eq!(lines(format!("/proc/{pid}/mountinfo")).len(), 1);
    let root = std::fs::read_dir(format!("/proc/{pid}/root")).expect("a directory");
    assert_eq!(root.count(), 0);
    for fd in std::fs::read_dir(format!("/proc/{pid}/fd")).expect("listed") {
        let path = std::fs::read_link(fd.expect("an entry").path()).expect("open");
        assert_eq!(path, std::path::Path::new("/dev/null"));
    }
    end_pod(&guest, "pod");
}

#[test]
fn the_pause_process_is_small() {
    let guest = Guest::start();
    let pid = pause(&guest, "pod");
    let anonymous = value(pid, "smaps_rollup", "Anonymous:");
    let kib = anonymous.trim_end_matches(" kB").parse::<u64>();
    let kib = kib.expect("a number");
    println!("the pause process has {kib} KiB");
    assert!(kib < PAUSE_MAX_KIB, "{kib} KiB");
    let stats = guest.client().stats(context(), &container_request("pod"));
    assert_eq!(stats.expect("told").pids.current, 1);
    end_pod(&guest, "pod");
}

#[test]
fn streams_of_a_pause_container_end_at_once() {
    let guest = Guest::start();
    let (stdin, _to) = guest.dial();
    let (stdout, mut from) = guest.dial();
    let request = CreateContainerRequest {
        container_id: "pod".into(),
        pause: true,
        stdio: Some(Stdio {
            stdin,
            stdout,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    let created = guest.client().create_container(context(), &request);
    created.expect("created");
    let mut nothing = Vec::new();
    from.read_to_end(&mut nothing).expect("end of file");
    assert!(nothing.is_empty());
    guest.delete("pod", "").expect("deleted");
}

#[test]
fn a_pause_container_can_be_frozen() {
    let guest = Guest::start();
    pause(&guest, "pod");
    let request = container_request("pod");
    guest.client().pause(context(), &request).expect("paused");
    guest.kill("pod", "", 15, false).expect("signalled");
    guest.client().resume(context(), &request).expect("resumed");
    assert_eq!(guest.wait("pod", "").expect("ended"), 0);
    guest.delete("pod", "").expect("deleted");
}

#[test]
fn containers_of_one_pid_namespace_see_each_other_and_pause_as_pid_1() {
    let guest = Guest::start();
    pause(&guest, "pod");
    let one = run_in(&guest, "pod", "c1", "exec sleep 1000");
    let exec = guest.exec("c1", "e1", &guest.process("ps -o pid,comm,args"));
    let seen = exec.expect("started").finish(&guest).stdout;
    assert!(seen.contains("1 pause"), "{seen}");
    let two = run_in(
        &guest,
        "pod",
        "c2",
        "echo $$; kill -9 $(ps -o pid,args | grep '[s]leep 1000' | head -n1)",
    );
    let two = two.finish(&guest);
    assert_ne!(two.stdout, "1\n");
    assert_eq!(one.finish(&guest).status, 137);
    for id in ["c1", "c2"] {
        guest.delete(id, "").expect("deleted");
    }
    end_pod(&guest, "pod");
}

#[test]
fn the_pause_process_reaps_orphans() {
    let guest = Guest::start();
    let pid = pause(&guest, "pod");
    let line = "for i in 1 2 3 4 5 6 7 8; do (sleep 999 &); done; exec sleep 1000";
    let running = run_in(&guest, "pod", "c1", line);
    let children = || {
        let file = lines(format!("/proc/{pid}/task/{pid}/children")).concat();
        file.split_whitespace().count()
    };
    until("eight orphans", || children() == 8);
    let line = "ps -o pid,args | grep '[s]leep 999' | while read pid rest; do kill -9 $pid; done";
    let exec = guest.exec("c1", "e1", &guest.process(line));
    assert_eq!(exec.expect("started").finish(&guest).status, 0);
    // A zombie is a child still.
    until("orphans reaped", || children() == 0);
    assert_eq!(pids(&guest, "c1").len(), 1);
    guest.end(running);
    end_pod(&guest, "pod");
}

#[test]
fn all_in_a_pid_namespace_end_with_its_pid_1() {
    let guest = Guest::start();
    pause(&guest, "pod");
    let inits = ["c1", "c2"].map(|id| run_in(&guest, "pod", id, "trap '' TERM; sleep 1000"));
    let exec = guest.exec("c1", "e1", &guest.process("sleep 1000"));
    let exec = exec.expect("started");
    guest.kill("pod", "", 15, false).expect("signalled");
    for running in inits.into_iter().chain([exec]) {
        assert_eq!(running.finish(&guest).status, 137);
    }
    assert_eq!(guest.wait("pod", "").expect("ended"), 0);
    for id in ["c1", "c2", "pod"] {
        guest.delete(id, "").expect("deleted");
    }
}

#[test]
fn what_an_init_in_a_shared_pid_namespace_leaves_behind_ends_with_it() {
    let guest = Guest::start();
    pause(&guest, "pod");
    let line = "trap '' TERM; sleep 1000 & echo $!; read go; exit 3";
    let running = run_in(&guest, "pod", "c1", line);
    let exec = guest.exec("c1", "e1", &guest.process("sleep 1000"));
    let exec = exec.expect("started");
    let ended = running.finish_after_stdin(&guest);
    assert_eq!(ended.status, 3);
    assert_eq!(exec.finish(&guest).status, 137);
    assert!(pids(&guest, "c1").is_empty());
    guest.delete("c1", "").expect("deleted");
    guest.end(run_in(&guest, "pod", "c1", "sleep 1000"));
    end_pod(&guest, "pod");
}

#[test]
fn a_container_may_share_the_pid_namespace_of_any_other() {
    let guest = Guest::start();
    let target = guest.sleeper("c1");
    let seen = run_in(&guest, "c1", "debug", "ps -o pid,args").finish(&guest);
    assert!(seen.stdout.contains("1 sleep 1000"), "{}", seen.stdout);
    guest.delete("debug", "").expect("deleted");
    guest.end(target);
}

#[test]
fn a_pid_namespace_of_nobody_is_a_failed_precondition() {
    let guest = Guest::start();
    let spec = guest.spec(&["true"]);
    let (code, text) = refusal(create_in(&guest, "nobody", "c1", &spec));
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert_eq!(text, "pid_namespace_of: there is no container nobody");
    pause(&guest, "pod");
    guest.kill("pod", "", 9, false).expect("killed");
    guest.wait("pod", "").expect("ended");
    let (code, text) = refusal(create_in(&guest, "pod", "c1", &spec));
    assert_eq!(code, Code::FAILED_PRECONDITION);
    assert_eq!(text, "pid_namespace_of: container pod has ended");
    guest.delete("pod", "").expect("deleted");
    assert!(!std::path::Path::new("/sys/fs/cgroup/capsid/c1").exists());
}

#[test]
fn the_pods_memory_is_shared_by_who_binds_it() {
    let guest = Guest::start();
    let shm = guest.directory.join("run/pod/shm");
    assert!(!shm.exists());
    let spec = |line: &str| {
        let mut spec = guest.spec(&["sh", "-c", line]);
        for mount in spec["mounts"].as_array_mut().expect("mounts") {
            if mount["destination"] == "/dev/shm" {
                *mount = json!({"destination": "/dev/shm", "type": "bind", "source": shm, "options": ["rbind", "rw"]});
            }
        }
        spec
    };
    let written = guest.to_end(
        "c1",
        &spec("echo shared >/dev/shm/x; grep ' /dev/shm ' /proc/self/mounts"),
    );
    assert_eq!(written.status, 0, "{written:?}");
    for word in ["tmpfs", "nosuid", "nodev", "noexec", "size=65536k"] {
        assert!(written.stdout.contains(word), "{}", written.stdout);
    }
    let mut other = spec("cat /dev/shm/x; echo own >/dev/shm/y");
    other["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let read = guest.to_end("c2", &other);
    assert_eq!(
        (read.status, read.stdout.as_str()),
        (0, "shared\n"),
        "{read:?}"
    );
}

#[test]
fn the_agent_has_no_socket_that_a_container_can_name() {
    let guest = Guest::start();
    let running = guest.sleeper("c1");
    let fds = std::fs::read_dir(format!("/proc/{}/fd", guest.agent.id())).expect("listed");
    let ours: Vec<String> = fds
        .filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok())
        .filter_map(|path| {
            let name = path.to_string_lossy().into_owned();
            Some(name.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
        })
        .collect();
    assert!(!ours.is_empty());
    for line in lines("/proc/net/unix") {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let inode = fields.get(6).copied().unwrap_or_default();
        let name = fields.get(7).copied().unwrap_or_default();
        let abstract_name = name.starts_with('@');
        assert!(
            !(abstract_name && ours.iter().any(|ours| ours == inode)),
            "{line}"
        );
    }
    guest.end(running);
}

fn end_pod(guest: &Guest, id: &str) {
    guest.kill(id, "", 9, false).expect("killed");
    assert_eq!(guest.wait(id, "").expect("ended"), 137);
    guest.delete(id, "").expect("deleted");
}
