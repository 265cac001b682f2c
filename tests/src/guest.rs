//! A VM with our agent in it and the test as its owner: the test starts `capsid-vmm`, takes the agent's one connection and
//! calls it as `capsid` does. Containers live in the guest's initramfs, so nothing is shared with the host but a share that a test brings.
//!
//! Every wait has a deadline, and the VMM is killed when the guest is dropped.

use crate::control::Control;
use crate::vmm::{self, Disk, JAIL_ID, accept, busybox, command, inherited, memfd};
use capsid_protocol::agent::{
    AgentClient, CreateContainerRequest, ExecRequest, ProcessRequest, StartContainerRequest,
    StartSandboxRequest, StartSandboxResponse, Stdio as StreamIds,
};
use capsid_protocol::machine::{
    CONFIG_VERSION, Cpus, DiskConfig, FdNumber, GuestDial, JailConfig, MachineConfig, MemoryMib,
    ShareConfig, VsockConfig,
};
use capsid_protocol::vsock::{AGENT_RPC_PORT, AGENT_STREAM_PORT, OwnerMessage, StreamHeader};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, setsockopt, socketpair,
    sockopt,
};
use nix::sys::time::TimeVal;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{IoSlice, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Stdio};
use ttrpc::context::{Context, with_timeout};

/// How long a guest may take until its agent dials, in seconds; an emulated host is some thirty times slower than a real one.
const DIAL_TIMEOUT_S: i64 = 240;
/// No call takes longer, but for a hang.
const CALL_TIMEOUT_NS: i64 = 120_000_000_000;
/// Memory of the guest, in MiB.
const MEMORY_MIB: u64 = 192;
/// What it can be given more, in MiB.
const PLUGGABLE_MIB: u64 = 256;
/// Where the containers' files are in the guest.
const ROOTFS: &str = "/box";

/// A guest that runs.
pub struct Guest {
    /// The calls to its agent.
    pub agent: AgentClient,
    /// What it said first.
    pub hello: StartSandboxResponse,
    /// Its control channel.
    pub control: Control,
    /// The VMM's end of it.
    vmm_control: OwnedFd,
    owner: OwnedFd,
    vmm: Child,
    streams: u64,
}

/// The deadline of one call.
pub fn context() -> Context {
    with_timeout(CALL_TIMEOUT_NS)
}

/// Whether the VMM has taken all that was sent to it on the control channel of which this is its end.
///
/// # Panics
/// The kernel does not say.
pub fn has_heard(vmm_control: &OwnedFd) -> bool {
    rustix::io::ioctl_fionread(vmm_control).expect("a socket") == 0
}

impl Guest {
    /// Boots a guest in which `cpus` CPUs come up and which has `cpus_max`, with `disks`, and waits for its agent.
    ///
    /// # Panics
    /// It does not come up.
    pub fn start(cpus: u64, cpus_max: u64, disks: &[Disk<'_>]) -> Guest {
        Guest::boot(cpus, cpus_max, disks, None)
    }

    /// Boots a guest with one CPU that has `tree` as its share.
    ///
    /// # Panics
    /// It does not come up.
    pub fn with_share(tree: &OwnedFd) -> Guest {
        Guest::boot(1, 1, &[], Some(tree))
    }

    fn boot(cpus: u64, cpus_max: u64, disks: &[Disk<'_>], share: Option<&OwnedFd>) -> Guest {
        let kernel = File::open(crate::capsid::kernel()).expect("the guest kernel");
        let mut initramfs = memfd("initramfs").expect("memory");
        initramfs.write_all(&initramfs_with_box()).expect("memory");
        initramfs.rewind().expect("memory");
        let (owner, vmm_end) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .expect("sockets");
        let limit = TimeVal::new(DIAL_TIMEOUT_S, 0);
        setsockopt(&owner, sockopt::ReceiveTimeout, &limit).expect("a deadline");
        let number =
            |fd: &dyn AsFd| -> FdNumber { inherited(&fd.as_fd()).expect("an fd for the VMM") };
        let (control, vmm_control) = Control::pair();
        let mib = |mib| MemoryMib::try_from(mib).expect("memory");
        let count = |count| Cpus::try_from(count).expect("cpus");
        let config = MachineConfig {
            version: CONFIG_VERSION,
            id: "guest".to_owned(),
            cpus: count(cpus),
            cpus_max: Some(count(cpus_max)),
            memory_mib: mib(MEMORY_MIB),
            balloon_mib: 0,
            memory_max_mib: Some(mib(MEMORY_MIB + PLUGGABLE_MIB)),
            plug_mib: 0,
            control_fd: Some(number(&vmm_control)),
            kernel_fd: number(&kernel),
            initramfs_fd: Some(number(&initramfs)),
            cmdline: String::new(),
            vsock: Some(VsockConfig {
                owner_fd: number(&vmm_end),
                guest_may_dial: vec![GuestDial {
                    port: AGENT_RPC_PORT,
                    connections: 1,
                }],
            }),
            shares: share
                .map(|tree| share_config(number(tree)))
                .into_iter()
                .collect(),
            disks: disks.iter().map(disk_config).collect(),
            nics: Vec::new(),
            serial: None,
            report_fd: None,
            jail: JailConfig {
                uid: JAIL_ID,
                gid: JAIL_ID,
            },
        };
        let (mut command, _config) = command(&config).expect("a configuration");
        let vmm = crate::vmm::spawn(command.stdout(Stdio::null()).stderr(Stdio::piped()));
        let vmm = vmm.expect("capsid-vmm is on the PATH");
        drop(vmm_end);
        let channel = accept(&owner).expect("the agent dials");
        let client = ttrpc::Client::new(channel.into_raw_fd()).expect("a client");
        let agent = AgentClient::new(client);
        let hello = agent.start_sandbox(context(), &StartSandboxRequest::default());
        Guest {
            hello: hello.expect("an agent"),
            agent,
            control,
            vmm_control,
            owner,
            vmm,
            streams: 0,
        }
    }

    /// Process id of the VMM.
    pub fn vmm(&self) -> u32 {
        self.vmm.id()
    }

    /// Whether the VMM has taken all that was sent to it on the control channel.
    pub fn has_heard(&self) -> bool {
        has_heard(&self.vmm_control)
    }

    /// Waits until the VMM ends by itself: its exit code, and what it said.
    ///
    /// # Panics
    /// It is none of our children.
    pub fn end(mut self) -> (Option<i32>, String) {
        let said = self.said();
        (self.vmm.wait().expect("our child").code(), said)
    }

    /// What the VMM said, at its end.
    fn said(&mut self) -> String {
        let mut said = String::new();
        if let Some(mut stderr) = self.vmm.stderr.take() {
            stderr.read_to_string(&mut said).expect("its messages");
        }
        said
    }

    /// A container that only sleeps, for [`Guest::exec`].
    ///
    /// # Panics
    /// It does not start.
    pub fn sleeper(&mut self, id: &str) {
        self.create(id, &spec(), 0).expect("created");
        self.start_created(id);
    }

    /// Creates a container whose output goes to a stream, or with 0 nowhere.
    ///
    /// # Errors
    /// The agent refuses.
    pub fn create(&self, id: &str, spec: &Value, stdout: u64) -> ttrpc::Result<()> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            spec_json: spec.to_string().into_bytes(),
            stdio: Some(StreamIds {
                stdout,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        self.agent.create_container(context(), &request).map(drop)
    }

    /// Runs a container from its creation to its deletion; its exit status and its output.
    ///
    /// # Panics
    /// A call is refused.
    pub fn run(&mut self, id: &str, spec: &Value) -> (u32, String) {
        let (stdout, mut output) = self.dial();
        self.create(id, spec, stdout).expect("created");
        self.start_created(id);
        let mut text = String::new();
        output.read_to_string(&mut text).expect("its output");
        let request = ProcessRequest {
            container_id: id.into(),
            ..Default::default()
        };
        let ended = self.agent.wait(context(), &request).expect("ended");
        self.agent.delete(context(), &request).expect("deleted");
        (ended.exit_status, text)
    }

    fn start_created(&self, id: &str) {
        let request = StartContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        let started = self.agent.start_container(context(), &request);
        started.expect("started");
    }

    /// Runs a shell line in a container; its output, without the last line's end.
    ///
    /// # Panics
    /// It does not end with 0.
    pub fn exec(&mut self, id: &str, line: &str) -> String {
        let (stdout, mut output) = self.dial();
        let mut process = spec()["process"].clone();
        process["args"] = json!(["sh", "-c", line]);
        let exec_id = format!("exec-{stdout}");
        let request = ExecRequest {
            container_id: id.into(),
            exec_id: exec_id.clone(),
            process_json: process.to_string().into_bytes(),
            stdio: Some(StreamIds {
                stdout,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        self.agent.exec(context(), &request).expect("executed");
        let mut text = String::new();
        output.read_to_string(&mut text).expect("its output");
        let request = ProcessRequest {
            container_id: id.into(),
            exec_id,
            ..Default::default()
        };
        let ended = self.agent.wait(context(), &request).expect("ended");
        assert_eq!(ended.exit_status, 0, "{line}: {text}");
        text.trim_end().to_owned()
    }

    /// A stream to the agent.
    fn dial(&mut self) -> (u64, UnixStream) {
        let (mut ours, theirs) = UnixStream::pair().expect("sockets");
        let packet = OwnerMessage::Connect {
            port: AGENT_STREAM_PORT,
        };
        let fds = [theirs.as_raw_fd()];
        sendmsg::<()>(
            self.owner.as_raw_fd(),
            &[IoSlice::new(&packet.encode())],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .expect("the VMM takes packets");
        self.streams += 1;
        let stream_id = self.streams;
        let header = StreamHeader::Stdio { stream_id };
        ours.write_all(&header.encode()).expect("a header");
        (stream_id, ours)
    }
}

fn share_config(tree_fd: FdNumber) -> ShareConfig {
    ShareConfig {
        tag: "capsid".to_owned(),
        tree_fd,
    }
}

fn disk_config(disk: &Disk<'_>) -> DiskConfig {
    DiskConfig {
        fd: inherited(&disk.file.as_fd()).expect("an fd for the VMM"),
        id: disk.id.to_owned(),
        read_only: disk.read_only,
        queues: disk.queues,
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Fails only when it has ended already.
        let _ended = self.vmm.kill();
        let _reaped = self.vmm.wait();
        eprint!("{}", self.said());
    }
}

/// Our initramfs, followed by an archive with busybox in [`ROOTFS`]: the kernel unpacks one behind the other.
fn initramfs_with_box() -> Vec<u8> {
    let path = std::env::var_os("CAPSID_INITRAMFS")
        .expect("CAPSID_INITRAMFS names our initramfs; `cargo xtask test` sets it");
    let mut bytes = fs::read(path).expect("the initramfs");
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    let root = ROOTFS.trim_start_matches('/');
    let mut entries: Vec<(String, u32, Vec<u8>)> = ["", "/bin", "/dev", "/proc", "/sys"]
        .iter()
        .map(|name| (format!("{root}{name}"), 0o040_755, Vec::new()))
        .collect();
    entries.push((format!("{root}/bin/busybox"), 0o100_755, busybox()));
    for applet in ["sh", "sleep", "nproc", "cat", "ls", "grep"] {
        entries.push((
            format!("{root}/bin/{applet}"),
            0o120_777,
            b"busybox".to_vec(),
        ));
    }
    for (name, mode, content) in entries {
        vmm::entry(&mut bytes, &name, mode, &content);
    }
    vmm::entry(&mut bytes, "TRAILER!!!", 0, &[]);
    bytes
}

/// A config.json of a container that only sleeps, in the initramfs.
pub fn spec() -> Value {
    // For the nodes of disks that come and go.
    let mknod = json!(["CAP_MKNOD"]);
    json!({
        "ociVersion": "1.0.2",
        "process": {"terminal": false, "user": {"uid": 0, "gid": 0}, "args": ["sleep", "100000"],
                    "env": ["PATH=/bin"], "cwd": "/",
                    "capabilities": {"bounding": mknod, "effective": mknod, "permitted": mknod}},
        "root": {"path": ROOTFS, "readonly": true},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
                   {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
                   {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"]}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]}
    })
}
