//! PID 1 of the testbed: mounts, modules, limits, loopback, containerd; then the door, then reaping for ever.
//!
//! Everything here happens once, before the machine is saved; each run starts after it. A step that fails powers the machine
//! off, with the reason on its console, where `cargo xtask testbed` shows it.

use std::fs::File;
use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::mount::{MountFlags, mount};
use rustix::process::{Resource, Rlimit, WaitOptions, setrlimit, wait};
use rustix::system::{RebootCommand, reboot, sethostname};

/// Search path of every command inside; the programs under test come first.
pub(crate) const PATH: &str =
    "/capsid/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What systemd gives the services of a Debian host, so that containerd and runtimes see what they are used to.
const FILES_SOFT: u64 = 1024;
const FILES_HARD: u64 = 524_288;

/// Loaded before the save. The rest the kernel asks for by itself when it is needed.
const MODULES: [&str; 9] = [
    "virtio_console",
    "kvm_amd",
    "tun",
    "loop",
    "overlay",
    "fuse",
    "vhost_vsock",
    "br_netfilter",
    "virtio_rng",
];

/// Read once before the save, so that no run waits for the disk, or (metered) sees its clock jump over such a wait.
const WARM: [&str; 12] = [
    "/usr/bin/bash",
    "/usr/bin/busybox",
    "/usr/bin/cat",
    "/usr/bin/containerd-shim-runc-v2",
    "/usr/bin/cp",
    "/usr/bin/crun",
    "/usr/bin/ctr",
    "/usr/bin/ls",
    "/usr/bin/mount",
    "/usr/bin/ps",
    "/usr/bin/setsid",
    "/usr/sbin/runc",
];

const NOTIFY_SOCKET: &str = "/run/testbed-notify";
/// A notification is a few words.
const NOTIFY_MAX_BYTES: usize = 4096;

/// Why the machine is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InitError {
    #[error("{doing} {what}: {cause}")]
    Io {
        doing: &'static str,
        what: String,
        cause: io::Error,
    },
    #[error("`{command}` ended with {status}")]
    Failed {
        command: String,
        status: std::process::ExitStatus,
    },
    #[error("containerd ended before it was ready: see the lines above")]
    Containerd,
}

type Outcome<T = ()> = Result<T, InitError>;

/// Sets the machine up, starts the door and reaps what is orphaned; returns only on failure.
pub(crate) fn run() -> Outcome {
    mounts()?;
    for module in MODULES {
        plain("modprobe", &[module])?;
    }
    io_of(
        "naming",
        "the host",
        sethostname(b"testbed").map_err(Into::into),
    )?;
    limits()?;
    plain("ip", &["link", "set", "lo", "up"])?;
    write("/proc/sys/net/ipv4/ip_forward", "1")?;
    cgroup_controllers()?;
    containerd()?;
    for file in WARM {
        io_of(
            "reading",
            file,
            File::open(file).and_then(|mut file| io::copy(&mut file, &mut io::sink())),
        )?;
    }
    let door = spawn(
        Command::new("/proc/self/exe")
            .arg("serve")
            .env("PATH", PATH),
    )?;
    drop(door);
    reap()
}

/// PID 1 must not return: the kernel would panic over a failure that the console already names.
pub(crate) fn power_off_if_first() {
    if std::process::id() == 1 {
        rustix::fs::sync();
        // Nothing is left to tell a failure to; the kernel panics then, which ends the machine as well.
        let _ = reboot(RebootCommand::PowerOff);
    }
}

fn mounts() -> Outcome {
    let none = MountFlags::empty();
    let quiet = MountFlags::NOSUID | MountFlags::NODEV;
    let table = [
        ("proc", "/proc", quiet | MountFlags::NOEXEC, None),
        ("sysfs", "/sys", quiet | MountFlags::NOEXEC, None),
        ("devtmpfs", "/dev", MountFlags::NOSUID, None),
        (
            "devpts",
            "/dev/pts",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            Some(c"gid=5,mode=620,ptmxmode=666"),
        ),
        ("tmpfs", "/dev/shm", quiet, None),
        ("mqueue", "/dev/mqueue", quiet, None),
        ("tmpfs", "/run", quiet, Some(c"mode=755")),
        ("tmpfs", "/tmp", quiet, Some(c"mode=1777")),
        (
            "cgroup2",
            "/sys/fs/cgroup",
            quiet | MountFlags::NOEXEC,
            Some(c"nsdelegate"),
        ),
        ("securityfs", "/sys/kernel/security", none, None),
        ("tracefs", "/sys/kernel/tracing", none, None),
        ("debugfs", "/sys/kernel/debug", none, None),
        ("bpf", "/sys/fs/bpf", none, None),
    ];
    for (kind, target, flags, data) in table {
        // The initial ramdisk hands some of them over.
        if is_mounted(target) {
            continue;
        }
        io_of("making", target, std::fs::create_dir_all(target))?;
        io_of(
            "mounting",
            target,
            mount(kind, target, kind, flags, data).map_err(Into::into),
        )?;
    }
    for dir in ["/run/lock", "/capsid"] {
        io_of("making", dir, std::fs::create_dir_all(dir))?;
    }
    // As systemd leaves it: containers' mounts propagate the way they do on a real host.
    let shared = rustix::mount::mount_change(
        "/",
        rustix::mount::MountPropagationFlags::SHARED | rustix::mount::MountPropagationFlags::REC,
    );
    io_of("sharing", "/", shared.map_err(Into::into))
}

fn is_mounted(target: &str) -> bool {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table
        .lines()
        .any(|line| line.split(' ').nth(4) == Some(target))
}

fn limits() -> Outcome {
    let files = Rlimit {
        current: Some(FILES_SOFT),
        maximum: Some(FILES_HARD),
    };
    io_of(
        "limiting",
        "open files",
        setrlimit(Resource::Nofile, files).map_err(Into::into),
    )?;
    let endless = Rlimit {
        current: None,
        maximum: None,
    };
    io_of(
        "limiting",
        "locked memory",
        setrlimit(Resource::Memlock, endless).map_err(Into::into),
    )?;
    io_of(
        "limiting",
        "core dumps",
        setrlimit(
            Resource::Core,
            Rlimit {
                current: Some(0),
                maximum: None,
            },
        )
        .map_err(Into::into),
    )
}

fn cgroup_controllers() -> Outcome {
    let path = "/sys/fs/cgroup/cgroup.controllers";
    let controllers = io_of("reading", path, std::fs::read_to_string(path))?;
    let all: Vec<String> = controllers
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    write("/sys/fs/cgroup/cgroup.subtree_control", &all.join(" "))
}

/// Starts containerd and waits until it says, as to systemd, that it is ready.
fn containerd() -> Outcome {
    let socket = io_of("binding", NOTIFY_SOCKET, UnixDatagram::bind(NOTIFY_SOCKET))?;
    let log_path = "/var/log/containerd.log";
    let log = io_of("making", log_path, File::create(log_path))?;
    let errors = io_of("copying", log_path, log.try_clone())?;
    let mut command = Command::new("containerd");
    command
        .stdout(log)
        .stderr(errors)
        .env("PATH", PATH)
        .env("NOTIFY_SOCKET", NOTIFY_SOCKET);
    let mut containerd = spawn(&mut command)?;
    let watch = io_of("watching", "containerd", socket.try_clone())?;
    // If containerd ends instead, this thread says so in containerd's place.
    std::thread::spawn(move || {
        let _ = containerd.wait();
        let _ = watch.send_to(b"ENDED=1", NOTIFY_SOCKET);
    });
    let mut message = [0; NOTIFY_MAX_BYTES];
    loop {
        let length = io_of("reading", NOTIFY_SOCKET, socket.recv(&mut message))?;
        let text = String::from_utf8_lossy(message.get(..length).unwrap_or_default()).into_owned();
        if text.lines().any(|line| line == "READY=1") {
            break;
        }
        if text == "ENDED=1" {
            eprint!("{}", std::fs::read_to_string(log_path).unwrap_or_default());
            return Err(InitError::Containerd);
        }
    }
    io_of(
        "removing",
        NOTIFY_SOCKET,
        std::fs::remove_file(NOTIFY_SOCKET),
    )
}

fn reap() -> Outcome {
    loop {
        match wait(WaitOptions::empty()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => io_of("waiting for", "children", Err(errno.into()))?,
        }
    }
}

fn plain(program: &str, arguments: &[&str]) -> Outcome {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("PATH", PATH)
        .stdin(Stdio::null());
    let status = io_of("running", program, command.status())?;
    if status.success() {
        return Ok(());
    }
    Err(InitError::Failed {
        command: format!("{program} {}", arguments.join(" ")),
        status,
    })
}

fn spawn(command: &mut Command) -> Outcome<std::process::Child> {
    let name = command.get_program().to_string_lossy().into_owned();
    io_of("starting", &name, command.stdin(Stdio::null()).spawn())
}

fn write(path: &str, text: &str) -> Outcome {
    io_of("writing", path, std::fs::write(Path::new(path), text))
}

fn io_of<T>(doing: &'static str, what: &str, result: io::Result<T>) -> Outcome<T> {
    result.map_err(|cause| InitError::Io {
        doing,
        what: what.to_owned(),
        cause,
    })
}
