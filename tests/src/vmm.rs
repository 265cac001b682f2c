//! `capsid-vmm` as its owner starts it: a configuration and resources as inherited fds; and guests of a test's own, whose init
//! is a script.

use crate::bundle::image_layers;
use crate::capsid::kernel;
use capsid_protocol::machine::{
    CONFIG_VERSION, Cpus, DiskConfig, FdNumber, JailConfig, Mac, MachineConfig, MemoryMib,
    NicConfig, SerialConfig,
};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
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

/// How a guest ended.
#[derive(Debug)]
pub struct Ended {
    /// The exit code of the VMM, [`capsid_protocol::exit::VmmExit`].
    pub code: i32,
    /// What the script said, by lines.
    pub said: Vec<String>,
    /// What the VMM said.
    pub stderr: String,
}

/// Runs `script` as a guest's init, with busybox's commands, `/dev`, `/proc` and `/sys`, until it powers off, which it does at
/// the end of the script. What it says with `say WORDS` comes back.
///
/// # Panics
/// The VMM cannot be started.
pub fn run_script(script: &str, cpus: u64, disks: &[Disk<'_>], nics: &[Nic]) -> Ended {
    let kernel = File::open(kernel()).expect("the guest kernel");
    let mut initramfs = memfd("initramfs").expect("memory");
    initramfs.write_all(&archive(script)).expect("memory");
    initramfs.rewind().expect("memory");
    let (said, serial) = nix::unistd::pipe().expect("a pipe");
    let number = |fd: &dyn AsFd| inherited(&fd.as_fd()).expect("an fd for the VMM");
    let config = MachineConfig {
        version: CONFIG_VERSION,
        id: "script".to_owned(),
        cpus: Cpus::try_from(cpus).expect("cpus"),
        memory_mib: MemoryMib::try_from(MEMORY_MIB).expect("memory"),
        kernel_fd: number(&kernel),
        initramfs_fd: Some(number(&initramfs)),
        cmdline: CMDLINE.to_owned(),
        vsock: None,
        shares: Vec::new(),
        disks: disks
            .iter()
            .map(|disk| DiskConfig {
                fd: number(disk.file),
                id: disk.id.to_owned(),
                read_only: disk.read_only,
                queues: disk.queues,
            })
            .collect(),
        nics: nics
            .iter()
            .map(|nic| NicConfig {
                tap_fds: nic.taps.iter().map(|tap| number(tap)).collect(),
                mac: Mac::try_from(nic.mac.clone()).expect("a hardware address"),
                mtu: nic.mtu,
            })
            .collect(),
        serial: Some(SerialConfig {
            fd: number(&serial),
        }),
        report_fd: None,
        jail: JailConfig {
            uid: JAIL_ID,
            gid: JAIL_ID,
        },
    };
    let (mut command, _config) = command(&config).expect("a configuration");
    let child = command.stderr(Stdio::piped()).spawn();
    let child: Child = child.expect("capsid-vmm is on the PATH");
    drop(serial);
    let mut text = Vec::new();
    let mut said = File::from(said);
    said.read_to_end(&mut text).expect("the serial port");
    let output = child.wait_with_output().expect("our child");
    Ended {
        code: output.status.code().unwrap_or(-1),
        said: String::from_utf8_lossy(&text)
            .lines()
            .filter_map(|line| Some(line.trim_end().strip_prefix(MARK)?.to_owned()))
            .collect(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// The initramfs: busybox, and `script` as its init.
fn archive(script: &str) -> Vec<u8> {
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
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
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
fn busybox() -> Vec<u8> {
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
