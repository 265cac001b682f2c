//! Starts one system and waits for its first sign and its end.

use super::systems::{CMDLINE, Files, MEMORY_MIB, System};
use crate::vmm::{JAIL_ID, command, inherited, memfd, spawn};
use capsid_protocol::machine::{
    CONFIG_VERSION, Cpus, GuestDial, JailConfig, MachineConfig, MemoryMib, SerialConfig,
    VsockConfig,
};
use capsid_protocol::report::MachineReport;
use capsid_protocol::vsock::AGENT_RPC_PORT;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// What one start took.
#[derive(Clone, Debug)]
pub struct Sample {
    /// From the start of the process to the first byte of the guest's init (or its first dial).
    pub init: Duration,
    /// From the start of the process to its end.
    pub exit: Duration,
    /// What our VMM says of itself; None for others.
    pub report: Option<MachineReport>,
}

/// Starts `system` once.
///
/// # Errors
/// It cannot be started, or ends without a sign of its guest.
pub fn sample(system: &System, files: &Files) -> io::Result<Sample> {
    match system.command(files)? {
        Some(words) => plain(&words),
        None => capsid(*system == System::CapsidOwn, files),
    }
}

fn plain(words: &[String]) -> io::Result<Sample> {
    let (program, args) = words.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = Command::new(program);
    command.args(args);
    let since = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|cause| io::Error::new(cause.kind(), format!("{program}: {cause}")))?;
    let stdout = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    let init = first_byte(stdout, since)?;
    child.wait()?;
    Ok(Sample {
        init,
        exit: since.elapsed(),
        report: None,
    })
}

fn first_byte(mut stream: impl Read, since: Instant) -> io::Result<Duration> {
    let mut buffer = [0; 4096];
    let init = match stream.read(&mut buffer)? {
        0 => {
            let took = since.elapsed();
            let what = format!("it ended after {took:?} before its guest said anything");
            return Err(io::Error::other(what));
        }
        _ => since.elapsed(),
    };
    // Drained to its end, so that a talkative system is not blocked.
    while stream.read(&mut buffer)? > 0 {}
    Ok(init)
}

fn capsid(own: bool, files: &Files) -> io::Result<Sample> {
    let kernel = File::open(&files.kernel)?;
    let initramfs = File::open(if own { &files.initramfs } else { &files.tiny })?;
    let (serial_read, serial_write) = nix::unistd::pipe()?;
    let (owner, vmm_end) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    let mut report = memfd("report")?;
    let config = MachineConfig {
        cmdline: if own {
            String::new()
        } else {
            CMDLINE.to_owned()
        },
        vsock: own.then(|| vsock(&vmm_end, AGENT_RPC_PORT)).transpose()?,
        serial: if own {
            None
        } else {
            Some(SerialConfig {
                fd: inherited(&serial_write)?,
            })
        },
        report_fd: Some(inherited(&report)?),
        cpus_max: Some(files.cpus_max),
        ..plain_machine(&kernel, &initramfs)?
    };
    let (mut command, _config) = command(&config)?;
    let since = Instant::now();
    let child = spawn(&mut command)?;
    drop((vmm_end, serial_write));
    let init = if own {
        dialled(&owner, since)
    } else {
        first_byte(File::from(serial_read), since)
    };
    drop(owner); // ends a VM whose agent waits for us
    let exit = reap(child, since)?;
    let mut text = Vec::new();
    report.rewind()?;
    report.read_to_end(&mut text)?;
    Ok(Sample {
        init: init?,
        exit,
        report: serde_json::from_slice(&text).ok(),
    })
}

/// What every VM of a benchmark has: one vCPU, its memory, a kernel and an initramfs.
///
/// # Errors
/// The kernel gave no fd.
pub(super) fn plain_machine(kernel: &File, initramfs: &File) -> io::Result<MachineConfig> {
    Ok(MachineConfig {
        version: CONFIG_VERSION,
        id: "bench".to_owned(),
        cpus: Cpus::try_from(1).map_err(io::Error::other)?,
        cpus_max: None,
        memory_mib: MemoryMib::try_from(MEMORY_MIB).map_err(io::Error::other)?,
        balloon_mib: 0,
        memory_max_mib: None,
        plug_mib: 0,
        kernel_fd: inherited(kernel)?,
        initramfs_fd: Some(inherited(initramfs)?),
        cmdline: String::new(),
        control_fd: None,
        vsock: None,
        shares: Vec::new(),
        disks: Vec::new(),
        nics: Vec::new(),
        serial: None,
        report_fd: None,
        jail: JailConfig {
            uid: JAIL_ID,
            gid: JAIL_ID,
        },
    })
}

/// A vsock device whose guest may dial `port` once.
///
/// # Errors
/// The kernel gave no fd.
pub(super) fn vsock(vmm_end: &OwnedFd, port: u32) -> io::Result<VsockConfig> {
    Ok(VsockConfig {
        owner_fd: inherited(vmm_end)?,
        guest_may_dial: vec![GuestDial {
            port,
            connections: 1,
        }],
    })
}

/// Waits for the first packet on the owner channel: the agent's dial.
fn dialled(owner: &OwnedFd, since: Instant) -> io::Result<Duration> {
    let mut packet = [0; 64];
    match nix::sys::socket::recv(
        owner.as_raw_fd(),
        &mut packet,
        nix::sys::socket::MsgFlags::empty(),
    )? {
        0 => Err(io::Error::other("the VMM ended before its agent dialled")),
        _ => Ok(since.elapsed()),
    }
}

fn reap(mut child: Child, since: Instant) -> io::Result<Duration> {
    child.wait()?;
    Ok(since.elapsed())
}
