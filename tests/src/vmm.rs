//! `capsid-vmm` as its owner starts it: a configuration and resources as inherited fds; and guests of a test's own, whose init
//! is a script.

use crate::bundle::image_layers;
use crate::capsid::kernel;
use capsid_protocol::machine::{
    CONFIG_VERSION, Cpus, DiskConfig, FdNumber, JailConfig, Mac, MachineConfig, MemoryMib,
    NicConfig, SerialConfig,
};
use capsid_protocol::vsock::OwnerMessage;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use std::fs::File;
use std::io::{self, BufRead, BufReader, IoSliceMut, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};

/// Whom the VMM becomes in its jail.
pub const JAIL_ID: u32 = 64_000;
/// Memory of a guest that runs a script, in MiB.
const MEMORY_MIB: u64 = 128;
/// What a script's guest is told: its own lines on the serial port and nothing of the kernel's.
const CMDLINE: &str = "loglevel=0 8250.nr_uarts=1";
/// What a script says begins with this, so that it is told apart from a kernel that has something to say all the same.
const MARK: &str = "> ";

/// An unnamed file in memory.
///
/// # Errors
/// The kernel gave none.
pub fn memfd(name: &str) -> io::Result<File> {
    Ok(File::from(nix::sys::memfd::memfd_create(
        name,
        nix::sys::memfd::MFdFlags::MFD_CLOEXEC,
    )?))
}

/// Lets a child inherit `fd`, and names it for the configuration.
///
/// # Errors
/// It is not open, or one of the first three.
pub fn inherited(fd: &impl AsFd) -> io::Result<FdNumber> {
    let fd = fd.as_fd();
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    FdNumber::try_from(i64::from(fd.as_raw_fd())).map_err(io::Error::other)
}

/// A command for `capsid-vmm` with this configuration; the file is to live until it was spawned.
///
/// # Errors
/// The configuration is refused, or no file could be made for it.
pub fn command(config: &MachineConfig) -> io::Result<(Command, File)> {
    let mut json = memfd("config")?;
    json.write_all(&config.to_json().map_err(io::Error::other)?)?;
    json.rewind()?;
    let mut command = Command::new("capsid-vmm");
    command
        .arg("--config-fd")
        .arg(inherited(&json)?.to_string())
        .stdin(Stdio::null());
    Ok((command, json))
}

/// Starts it as the first process of a PID namespace, without which a VMM refuses to start.
///
/// # Errors
/// There is no such program, or we are not root.
pub fn spawn(command: &mut Command) -> io::Result<Child> {
    let own = File::open("/proc/thread-self/ns/pid")?;
    unshare(CloneFlags::CLONE_NEWPID)?;
    let child = command.spawn();
    // Until then this thread can start no other.
    setns(own, CloneFlags::CLONE_NEWPID)?;
    child
}

/// Waits for a connection of the guest, which is what comes over the owner channel first.
///
/// # Errors
/// The VMM ended before, or sent something else.
#[allow(unsafe_code)] // nix gives received descriptors as numbers
pub fn accept(owner: &OwnedFd) -> io::Result<OwnedFd> {
    let mut packet = [0; OwnerMessage::BYTES];
    let mut space = nix::cmsg_space!([i32; 1]);
    let mut buffers = [IoSliceMut::new(&mut packet)];
    let message = recvmsg::<()>(
        owner.as_raw_fd(),
        &mut buffers,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    if message.bytes == 0 {
        return Err(io::Error::other("the VMM ended before its guest dialled"));
    }
    let fds: Vec<i32> = message
        .cmsgs()?
        .filter_map(|message| match message {
            ControlMessageOwned::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    let [fd] = fds[..] else {
        let what = format!("one fd comes with a connection, not {fds:?}");
        return Err(io::Error::other(what));
    };
    // SAFETY: the kernel has just made this descriptor for us (SCM_RIGHTS), and nobody else knows its number.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A disk for a guest.
pub struct Disk<'a> {
    /// What the guest knows it by.
    pub id: &'a str,
    /// What is in it.
    pub file: &'a File,
    /// The guest may not change it.
    pub read_only: bool,
    /// Request queues.
    pub queues: u8,
}

/// A network card for a guest.
pub struct Nic {
    /// The queues of a tap device.
    pub taps: Vec<OwnedFd>,
    /// Hardware address.
    pub mac: String,
    /// Largest packet.
    pub mtu: u16,
}

/// A guest of a test's own.
pub struct Guest<'a> {
    /// What its init does, see [`Guest::start`].
    pub script: &'a str,
    /// Virtual CPUs.
    pub cpus: u64,
    /// Memory, MiB.
    pub memory_mib: u64,
    /// What of it the balloon asks for, MiB.
    pub balloon_mib: u64,
    /// What it is asked to plug besides, MiB.
    pub plug_mib: u64,
    /// Disks.
    pub disks: &'a [Disk<'a>],
    /// Network cards.
    pub nics: &'a [Nic],
    /// The VMM's end of a control channel.
    pub control: Option<&'a OwnedFd>,
}

impl Default for Guest<'_> {
    fn default() -> Self {
        Guest {
            script: "",
            cpus: 1,
            memory_mib: MEMORY_MIB,
            balloon_mib: 0,
            plug_mib: 0,
            disks: &[],
            nics: &[],
            control: None,
        }
    }
}

/// A guest that runs. Killed when dropped.
pub struct Running {
    child: Child,
    serial: BufReader<File>,
    said: Vec<String>,
    beside: String,
}

/// How a guest ended.
#[derive(Debug)]
pub struct Ended {
    /// The exit code of the VMM, [`capsid_protocol::exit::VmmExit`].
    pub code: i32,
    /// What the script said, by lines.
    pub said: Vec<String>,
    /// What else came out of the serial port: commands that complained, a kernel that had to.
    pub beside: String,
    /// What the VMM said.
    pub stderr: String,
}

/// Runs `script` as [`Guest::start`] does, until the guest powers off.
///
/// # Panics
/// The VMM cannot be started.
pub fn run_script(script: &str, cpus: u64, disks: &[Disk<'_>], nics: &[Nic]) -> Ended {
    let guest = Guest {
        script,
        cpus,
        disks,
        nics,
        ..Guest::default()
    };
    guest.start().end()
}

impl Guest<'_> {
    /// Starts `script` as a guest's init, with busybox's commands, `/dev`, `/proc` and `/sys`; at the end of the script the guest
    /// powers off. What it says with `say WORDS` comes back.
    ///
    /// # Panics
    /// The VMM cannot be started.
    pub fn start(&self) -> Running {
        let kernel = File::open(kernel()).expect("the guest kernel");
        let mut initramfs = memfd("initramfs").expect("memory");
        initramfs.write_all(&archive(self.script)).expect("memory");
        initramfs.rewind().expect("memory");
        let (said, serial) = nix::unistd::pipe().expect("a pipe");
        let config = self.config(&kernel, &initramfs, &serial);
        let (mut command, _config) = command(&config).expect("a configuration");
        let child = spawn(command.stderr(Stdio::piped()));
        Running {
            child: child.expect("capsid-vmm is on the PATH"),
            serial: BufReader::new(File::from(said)),
            said: Vec::new(),
            beside: String::new(),
        }
    }

    fn config(&self, kernel: &File, initramfs: &File, serial: &OwnedFd) -> MachineConfig {
        let number = |fd: &dyn AsFd| inherited(&fd.as_fd()).expect("an fd for the VMM");
        MachineConfig {
            version: CONFIG_VERSION,
            id: "script".to_owned(),
            cpus: Cpus::try_from(self.cpus).expect("cpus"),
            cpus_max: None,
            memory_mib: MemoryMib::try_from(self.memory_mib).expect("memory"),
            balloon_mib: self.balloon_mib,
            memory_max_mib: (self.plug_mib > 0)
                .then(|| MemoryMib::try_from(self.memory_mib + self.plug_mib).expect("memory")),
            plug_mib: self.plug_mib,
            kernel_fd: number(kernel),
            initramfs_fd: Some(number(initramfs)),
            cmdline: CMDLINE.to_owned(),
            control_fd: self.control.map(|fd| number(fd)),
            vsock: None,
            shares: Vec::new(),
            disks: self
                .disks
                .iter()
                .map(|disk| DiskConfig {
                    fd: number(disk.file),
                    id: disk.id.to_owned(),
                    read_only: disk.read_only,
                    queues: disk.queues,
                })
                .collect(),
            nics: self
                .nics
                .iter()
                .map(|nic| NicConfig {
                    tap_fds: nic.taps.iter().map(|tap| number(tap)).collect(),
                    mac: Mac::try_from(nic.mac.clone()).expect("a hardware address"),
                    mtu: nic.mtu,
                })
                .collect(),
            serial: Some(SerialConfig { fd: number(serial) }),
            report_fd: None,
            jail: JailConfig {
                uid: JAIL_ID,
                gid: JAIL_ID,
            },
        }
    }
}

impl Running {
    /// Reads what the guest says until it says `words`.
    ///
    /// # Panics
    /// It ends without.
    pub fn until_it_says(&mut self, words: &str) {
        while self.said.last().is_none_or(|last| last != words) {
            let more = self.listen();
            assert!(more, "no {words:?} in {:?}: {}", self.said, self.beside);
        }
    }

    /// The memory that the VMM holds for itself alone, in MiB: above all the guest's.
    ///
    /// # Panics
    /// It has ended.
    pub fn resident_mib(&self) -> u64 {
        let status = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(status).expect("the VMM runs");
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.and_then(|line| line.split_whitespace().next());
        let kib: u64 = kib.and_then(|kib| kib.parse().ok()).expect("its RssAnon");
        kib / 1024
    }

    /// Waits until the guest has ended.
    ///
    /// # Panics
    /// The VMM is none of our children.
    pub fn end(mut self) -> Ended {
        while self.listen() {}
        let mut stderr = Vec::new();
        let mut pipe = self.child.stderr.take().expect("a pipe");
        pipe.read_to_end(&mut stderr).expect("its messages");
        let status = self.child.wait().expect("our child");
        Ended {
            code: status.code().unwrap_or(-1),
            said: std::mem::take(&mut self.said),
            beside: std::mem::take(&mut self.beside),
            stderr: String::from_utf8_lossy(&stderr).into_owned(),
        }
    }

    /// Reads one line of the serial port; false at its end.
    fn listen(&mut self) -> bool {
        let mut line = Vec::new();
        let bytes = self.serial.read_until(b'\n', &mut line);
        if bytes.expect("the serial port") == 0 {
            return false;
        }
        let line = String::from_utf8_lossy(&line);
        match line.strip_prefix(MARK) {
            Some(said) => self.said.push(said.trim_end().to_owned()),
            None => self.beside.push_str(&line),
        }
        true
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// An initramfs of busybox alone, with `script` as its init.
///
/// # Panics
/// The test image cannot be read.
pub fn archive(script: &str) -> Vec<u8> {
    let init = format!(
        "#!/bin/busybox sh\n\
         /bin/busybox --install -s /bin\n\
         export PATH=/bin\n\
         mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys\n\
         exec >/dev/ttyS0 2>&1\n\
         say() {{ echo \"{MARK}$*\"; }}\n\
         {script}\n\
         poweroff -f\n"
    );
    let mut archive = Vec::new();
    for directory in ["bin", "dev", "proc", "sys", "mnt"] {
        entry(&mut archive, directory, 0o040_755, &[]);
    }
    entry(&mut archive, "bin/busybox", 0o100_755, &busybox());
    entry(&mut archive, "init", 0o100_755, init.as_bytes());
    entry(&mut archive, "TRAILER!!!", 0, &[]);
    archive
}

/// One entry of a cpio archive in the kernel's format (Documentation/driver-api/early-userspace/buffer-format.rst).
pub(crate) fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    let size = u32::try_from(content.len()).expect("a small file");
    let name_size = u32::try_from(name.len() + 1).expect("a short name");
    archive.extend_from_slice(b"070701");
    // Inode, mode, owner, group, links, time, size, device, its own device, length of the name, no sum.
    for field in [0, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// The one program of the test image.
pub(crate) fn busybox() -> Vec<u8> {
    for layer in image_layers() {
        let mut layer = tar::Archive::new(layer.as_slice());
        for entry in layer.entries().expect("a layer") {
            let mut entry = entry.expect("an entry");
            if entry.path().expect("a path").ends_with("bin/busybox") {
                let mut program = Vec::new();
                entry.read_to_end(&mut program).expect("a file");
                if !program.is_empty() {
                    return program;
                }
            }
        }
    }
    panic!("the test image has no bin/busybox");
}
