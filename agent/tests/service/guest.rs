//! An agent as an ordinary root process, driven over unix sockets as its host drives it over vsock.
//!
//! It needs root, cgroup v2 and a static busybox (`CAPSID_BUSYBOX`, else /bin/busybox); a test without them
//! fails and says so. `CAPSID_AGENT` names the program; else it is the one that cargo built, or, on
//! another machine, the one on PATH.

use capsid_protocol::agent::{
    AgentClient, ContainerRequest, CreateContainerRequest, ExecRequest, ProcessRequest,
    SignalRequest, StartContainerRequest, Stdio,
};
use capsid_protocol::vsock::StreamHeader;
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::IntoRawFd;
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use ttrpc::context::{Context, with_timeout};

/// No call of these tests takes longer, but for a hang.
const CALL_TIMEOUT_NS: i64 = 60_000_000_000;
/// How long an agent may take to end after its host hung up.
const END_TIMEOUT_MS: u64 = 10_000;

static NUMBER: AtomicU64 = AtomicU64::new(1);
/// An agent that ends kills every container below /sys/fs/cgroup/capsid: one guest at a time.
static ONE_GUEST: Mutex<()> = Mutex::new(());

pub(crate) fn context() -> Context {
    with_timeout(CALL_TIMEOUT_NS)
}

pub(crate) struct Guest {
    pub(crate) client: Option<AgentClient>,
    pub(crate) agent: Child,
    pub(crate) directory: PathBuf,
    _only: MutexGuard<'static, ()>,
}

/// What a finished process left.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Output {
    pub(crate) status: u32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A process whose streams are open.
pub(crate) struct Running {
    pub(crate) container: String,
    pub(crate) exec: String,
    pub(crate) stdin: Option<UnixStream>,
    pub(crate) stdout: JoinHandle<Vec<u8>>,
    pub(crate) stderr: JoinHandle<Vec<u8>>,
}

fn busybox() -> PathBuf {
    std::env::var_os("CAPSID_BUSYBOX").map_or_else(|| "/bin/busybox".into(), PathBuf::from)
}

/// The agent under test: the named one, else where cargo built it, else the installed one.
fn program() -> PathBuf {
    let built = Path::new(env!("CARGO_BIN_EXE_capsid-agent"));
    match std::env::var_os("CAPSID_AGENT") {
        Some(named) => named.into(),
        None if built.exists() => built.into(),
        None => "capsid-agent".into(),
    }
}

fn missing() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("root");
    }
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        return Some("cgroup v2 on /sys/fs/cgroup");
    }
    if !busybox().exists() {
        return Some("a static busybox (CAPSID_BUSYBOX)");
    }
    None
}

impl Guest {
    /// An agent with nothing in it.
    pub(crate) fn start() -> Guest {
        if let Some(what) = missing() {
            panic!("the agent's tests need {what}; `cargo xtask test --suite service` has it");
        }
        let only = ONE_GUEST.lock().unwrap_or_else(PoisonError::into_inner);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("capsid-agent-{}-{number}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        fs::create_dir_all(directory.join("run")).expect("a directory");
        make_rootfs(&directory.join("rootfs"));
        let rpc = UnixListener::bind(directory.join("rpc")).expect("a listener");
        let agent = Command::new(program())
            .arg("serve")
            .args(["rpc", "streams", "run"].map(|name| directory.join(name)))
            .spawn()
            .expect("the agent starts");
        let (channel, _) = rpc.accept().expect("the agent dials");
        let client = ttrpc::Client::new(channel.into_raw_fd()).expect("a client");
        Guest {
            client: Some(AgentClient::new(client)),
            agent,
            directory,
            _only: only,
        }
    }

    pub(crate) fn client(&self) -> &AgentClient {
        self.client.as_ref().expect("connected")
    }

    /// A config.json in docker's manner for `args`.
    pub(crate) fn spec(&self, args: &[&str]) -> Value {
        let capabilities = json!([
            "CAP_CHOWN",
            "CAP_DAC_OVERRIDE",
            "CAP_FSETID",
            "CAP_FOWNER",
            "CAP_MKNOD",
            "CAP_NET_RAW",
            "CAP_SETGID",
            "CAP_SETUID",
            "CAP_SETFCAP",
            "CAP_SETPCAP",
            "CAP_NET_BIND_SERVICE",
            "CAP_SYS_CHROOT",
            "CAP_KILL",
            "CAP_AUDIT_WRITE"
        ]);
        json!({
            "ociVersion": "1.2.0",
            "root": {"path": self.directory.join("rootfs"), "readonly": false},
            "hostname": "box",
            "process": {
                "user": {"uid": 0, "gid": 0}, "args": args, "cwd": "/",
                "env": ["PATH=/usr/bin:/bin"],
                "capabilities": {
                    "bounding": capabilities, "effective": capabilities, "permitted": capabilities
                },
                "noNewPrivileges": false
            },
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc",
                 "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                 "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
                {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                 "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
                {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                 "options": ["nosuid", "noexec", "nodev"]},
                {"destination": "/sys", "type": "sysfs", "source": "sysfs",
                 "options": ["nosuid", "noexec", "nodev", "ro"]},
                {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                 "options": ["ro", "nosuid", "noexec", "nodev"]}
            ],
            "linux": {
                "namespaces": [
                    {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
                    {"type": "mount"}, {"type": "cgroup"}
                ],
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"],
                "seccomp": {
                    "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"],
                    "syscalls": [
                        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}
                    ]
                }
            }
        })
    }

    /// Dials a stdio stream.
    pub(crate) fn dial(&self) -> (u64, UnixStream) {
        let id = NUMBER.fetch_add(1, Ordering::Relaxed);
        let mut stream = UnixStream::connect(self.directory.join("streams")).expect("dialled");
        let header = StreamHeader::Stdio { stream_id: id }.encode();
        stream.write_all(&header).expect("a header");
        (id, stream)
    }

    fn streams(&self) -> (Stdio, UnixStream, UnixStream, UnixStream) {
        let (stdin, to) = self.dial();
        let (stdout, from) = self.dial();
        let (stderr, errors) = self.dial();
        let stdio = Stdio {
            stdin,
            stdout,
            stderr,
            ..Default::default()
        };
        (stdio, to, from, errors)
    }

    /// Creates a container with pipes.
    pub(crate) fn create(&self, id: &str, spec: &Value) -> ttrpc::Result<Running> {
        self.create_with(id, spec, |_| {})
    }

    /// The same, with what `change` makes of the request.
    pub(crate) fn create_with(
        &self,
        id: &str,
        spec: &Value,
        change: impl FnOnce(&mut CreateContainerRequest),
    ) -> ttrpc::Result<Running> {
        let (stdio, stdin, stdout, stderr) = self.streams();
        let mut request = CreateContainerRequest {
            container_id: id.into(),
            spec_json: spec.to_string().into_bytes(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        change(&mut request);
        self.client().create_container(context(), &request)?;
        Ok(Running::new(id, "", stdin, stdout, stderr))
    }

    /// Starts a created container.
    pub(crate) fn start_container(&self, id: &str) -> ttrpc::Result<()> {
        let request = StartContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client()
            .start_container(context(), &request)
            .map(|_| ())
    }

    /// Creates and starts.
    pub(crate) fn run(&self, id: &str, spec: &Value) -> Running {
        let running = self.create(id, spec).expect("created");
        self.start_container(id).expect("started");
        running
    }

    /// Runs a shell line to its end in a container of its own, and deletes that.
    pub(crate) fn shell(&self, id: &str, line: &str) -> Output {
        let spec = self.spec(&["sh", "-c", line]);
        self.to_end(id, &spec)
    }

    /// Runs `spec` to its end and deletes the container.
    pub(crate) fn to_end(&self, id: &str, spec: &Value) -> Output {
        let output = self.run(id, spec).finish(self);
        self.delete(id, "").expect("deleted");
        output
    }

    /// Adds a process with pipes.
    pub(crate) fn exec(&self, id: &str, exec: &str, process: &Value) -> ttrpc::Result<Running> {
        let (stdio, stdin, stdout, stderr) = self.streams();
        let request = ExecRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            process_json: process.to_string().into_bytes(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        self.client().exec(context(), &request)?;
        Ok(Running::new(id, exec, stdin, stdout, stderr))
    }

    /// The `process` object for a shell line, as the container's own but for its arguments.
    pub(crate) fn process(&self, line: &str) -> Value {
        self.spec(&["sh", "-c", line])["process"].clone()
    }

    /// A container that only sleeps.
    pub(crate) fn sleeper(&self, id: &str) -> Running {
        self.run(id, &self.spec(&["sleep", "1000"]))
    }

    pub(crate) fn wait(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = process_request(id, exec);
        self.client()
            .wait(context(), &request)
            .map(|answer| answer.exit_status)
    }

    pub(crate) fn delete(&self, id: &str, exec: &str) -> ttrpc::Result<u32> {
        let request = process_request(id, exec);
        self.client()
            .delete(context(), &request)
            .map(|answer| answer.exit_status)
    }

    pub(crate) fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> ttrpc::Result<()> {
        let request = SignalRequest {
            container_id: id.into(),
            exec_id: exec.into(),
            signal,
            all,
            ..Default::default()
        };
        self.client().signal(context(), &request).map(|_| ())
    }

    /// Kills a container and deletes it.
    pub(crate) fn end(&self, running: Running) {
        let id = running.container.clone();
        self.kill(&id, "", 9, true).expect("killed");
        running.finish(self);
        self.delete(&id, "").expect("deleted");
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.client = None;
        let until = Instant::now() + Duration::from_millis(END_TIMEOUT_MS);
        while Instant::now() < until {
            if self.agent.try_wait().is_ok_and(|ended| ended.is_some()) {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = self.agent.kill();
        let _ = self.agent.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Running {
    fn new(
        container: &str,
        exec: &str,
        stdin: UnixStream,
        stdout: UnixStream,
        stderr: UnixStream,
    ) -> Running {
        Running {
            container: container.into(),
            exec: exec.into(),
            stdin: Some(stdin),
            stdout: read_all(stdout),
            stderr: read_all(stderr),
        }
    }

    /// Waits for the end and takes the output.
    pub(crate) fn finish(self, guest: &Guest) -> Output {
        let status = guest.wait(&self.container, &self.exec).expect("it ends");
        self.output(status)
    }

    /// Half-closes stdin, waits and takes the output.
    pub(crate) fn finish_after_stdin(mut self, guest: &Guest) -> Output {
        let stdin = self.stdin.take().expect("open");
        stdin.shutdown(Shutdown::Write).expect("half closed");
        self.stdin = Some(stdin);
        self.finish(guest)
    }

    fn output(self, status: u32) -> Output {
        let text = |bytes: JoinHandle<Vec<u8>>| {
            let bytes = bytes.join().expect("read");
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Output {
            status,
            stdout: text(self.stdout),
            stderr: text(self.stderr),
        }
    }
}

fn read_all(mut stream: UnixStream) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // A reset after the last byte is an end, too.
        let _ = stream.read_to_end(&mut bytes);
        bytes
    })
}

pub(crate) fn process_request(id: &str, exec: &str) -> ProcessRequest {
    ProcessRequest {
        container_id: id.into(),
        exec_id: exec.into(),
        ..Default::default()
    }
}

pub(crate) fn container_request(id: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: id.into(),
        ..Default::default()
    }
}

/// The code and the text of a refusal.
pub(crate) fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match result {
        Err(ttrpc::Error::RpcStatus(status)) => (status.code(), status.message),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "process {}/{}", self.container, self.exec)
    }
}

/// Lines of a file of the guest's kernel; empty if it is gone.
pub(crate) fn lines(path: impl AsRef<Path>) -> Vec<String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn make_rootfs(root: &Path) {
    for directory in ["bin", "etc", "proc", "sys", "dev", "tmp", "home", "hooks"] {
        fs::create_dir_all(root.join(directory)).expect("made");
    }
    fs::copy(busybox(), root.join("bin/busybox")).expect("copied");
    for applet in [
        "sh", "cat", "sleep", "id", "echo", "ls", "env", "true", "false", "kill", "dd", "md5sum",
        "stty", "tty", "ps", "mkdir", "ip", "ulimit", "touch", "grep", "head", "wc", "readlink",
        "hostname", "umask", "tail", "mount", "seq",
    ] {
        symlink("busybox", root.join("bin").join(applet)).expect("linked");
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:1000:1000::/home:/bin/sh\n";
    fs::write(root.join("etc/passwd"), passwd).expect("written");
    fs::write(root.join("etc/not-a-program"), "text").expect("written");
}
