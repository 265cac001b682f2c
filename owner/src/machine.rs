//! One VMM process as its owner starts it: with exactly the fds that its configuration names, and with nothing else of ours.

use crate::channel::Owner;
use crate::end::How;
use crate::spawn;
use capsid_protocol::exit::VmmExit;
use capsid_protocol::machine::{
    CONFIG_VERSION, ConfigError, Cpus, FdNumber, GuestDial, JailConfig, MachineConfig, MemoryMib,
    SerialConfig, ShareConfig, VsockConfig,
};
use capsid_protocol::report::MachineReport;
use capsid_protocol::vsock::AGENT_RPC_PORT;
use rustix::fs::{MemfdFlags, SeekFrom};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags, Signal};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr};

/// User and group of every VMM: a number beyond those that distributions and subordinate id ranges hand out, so that
/// nothing on the host belongs to it.
pub const JAIL_ID: u32 = 0x7ca5_1d00;
/// Most bytes of a VMM's stderr that an owner keeps: one line, and the guest's last console lines.
pub const STDERR_MAX_BYTES: usize = 16 * 1024;

/// What a machine is made of.
#[derive(Debug)]
pub struct Parts {
    /// Its name ([`capsid_protocol::machine::is_id`]).
    pub id: String,
    /// The VMM program.
    pub vmm: PathBuf,
    /// The guest kernel.
    pub kernel: File,
    /// The guest's initramfs.
    pub initramfs: File,
    /// The detached tree for the guest, if it has one.
    pub share: Option<OwnedFd>,
    /// Virtual CPUs.
    pub cpus: Cpus,
    /// Guest memory.
    pub memory: MemoryMib,
    /// Hand the guest's console out.
    pub console: bool,
    /// `cgroup.procs` of the cgroup (v2) that the VMM is to begin in, open for writing; absent: ours.
    pub cgroup: Option<File>,
}

/// Why no machine could be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The VMM program cannot be executed.
    #[error("cannot execute the VMM {path}")]
    Exec {
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// A pipe, a socket or a thread.
    #[error("cannot prepare the VMM's {what}")]
    Prepare {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// Our own configuration is refused; a defect.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// A VMM that was just started. The owner kills and reaps it; dropping this does neither.
#[derive(Debug)]
pub struct Started {
    /// The process, not reaped yet.
    pub child: Child,
    /// Means this process and no other, ever.
    pub pidfd: OwnedFd,
    /// Our end of the owner channel.
    pub owner: Owner,
    /// Its report, to its end.
    pub report: File,
    /// Its last words, to their end.
    pub stderr: Option<ChildStderr>,
    /// The guest's console, if [`Parts::console`] asked for it.
    pub console: Option<File>,
}

/// Starts a VMM.
///
/// # Errors
/// Nothing was started.
pub fn start(parts: Parts) -> Result<Started, StartError> {
    let (owner, their_owner) = Owner::pair().map_err(prepare("owner channel"))?;
    let (report, their_report) = pipe("report")?;
    let (console, their_console) = match parts.console {
        true => pipe("console").map(|(read, write)| (Some(read), Some(write)))?,
        false => (None, None),
    };
    let inherited = Inherited {
        kernel: parts.kernel.into(),
        initramfs: parts.initramfs.into(),
        owner: their_owner,
        share: parts.share,
        report: their_report,
        console: their_console,
    };
    let config = inherited.config(&parts.id, parts.cpus, parts.memory)?;
    let config = config_file(&config.to_json()?).map_err(prepare("configuration"))?;
    let config_fd = config.as_raw_fd();
    let fds = inherited.into_fds(config);
    let mut child = spawn::spawn(&parts.vmm, config_fd, fds, parts.cgroup).map_err(|cause| {
        StartError::Exec {
            path: parts.vmm.clone(),
            cause,
        }
    })?;
    let pidfd = match pidfd_of(&child) {
        Ok(pidfd) => pidfd,
        Err(cause) => {
            // It is our child, so killing and reaping it fail only if it has ended already.
            let _ended = child.kill();
            let _reaped = child.wait();
            return Err(prepare("pidfd")(cause));
        }
    };
    Ok(Started {
        stderr: child.stderr.take(),
        child,
        pidfd,
        owner,
        report,
        console,
    })
}

/// It is not reaped yet, so the pid is the child's.
fn pidfd_of(child: &Child) -> io::Result<OwnedFd> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(rustix::io::Errno::SRCH)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// Tells a VMM to end by itself, within its grace, and to say what its guest said last.
pub fn stop(pidfd: &OwnedFd) {
    // Fails only when it has ended already.
    let _ended = rustix::process::pidfd_send_signal(pidfd, Signal::TERM);
}

/// Kills a VMM.
pub fn kill(pidfd: &OwnedFd) {
    // Fails only when it has ended already.
    let _ended = rustix::process::pidfd_send_signal(pidfd, Signal::KILL);
}

/// Waits for the end of a VMM, and reaps it.
pub fn reap(child: &mut Child) -> How {
    match child.wait() {
        Ok(status) => match (status.code(), status.signal()) {
            (Some(code), _) => VmmExit::from_code(code).map_or(How::Code(code), How::Exit),
            (None, Some(signal)) => How::Signal(signal),
            (None, None) => How::Code(-1),
        },
        // It is our child and nobody else waits for it.
        Err(_) => How::Code(-1),
    }
}

/// A VMM's report, if this is one.
pub fn read_report(json: &[u8]) -> Option<MachineReport> {
    // A VMM that was killed wrote none, and a report that cannot be read is as good as none.
    serde_json::from_slice(json).ok()
}

/// Whether this can be executed; for a clear line before anything is started.
///
/// # Errors
/// It is not there, or not executable.
pub fn is_executable(path: &Path) -> Result<(), StartError> {
    rustix::fs::access(path, rustix::fs::Access::EXEC_OK).map_err(|error| StartError::Exec {
        path: path.to_owned(),
        cause: error.into(),
    })
}

/// The fds of one VMM, by what they are.
struct Inherited {
    kernel: OwnedFd,
    initramfs: OwnedFd,
    owner: OwnedFd,
    share: Option<OwnedFd>,
    report: OwnedFd,
    console: Option<OwnedFd>,
}

impl Inherited {
    fn config(
        &self,
        id: &str,
        cpus: Cpus,
        memory: MemoryMib,
    ) -> Result<MachineConfig, ConfigError> {
        let number = |fd: &OwnedFd| FdNumber::try_from(i64::from(fd.as_raw_fd()));
        let share = self.share.as_ref().map(|tree| {
            Ok::<_, ConfigError>(ShareConfig {
                tag: "capsid".to_owned(),
                tree_fd: number(tree)?,
            })
        });
        let console = self.console.as_ref().map(number).transpose()?;
        Ok(MachineConfig {
            version: CONFIG_VERSION,
            id: id.to_owned(),
            cpus,
            cpus_max: None,
            memory_mib: memory,
            balloon_mib: 0,
            memory_max_mib: None,
            plug_mib: 0,
            kernel_fd: number(&self.kernel)?,
            initramfs_fd: Some(number(&self.initramfs)?),
            cmdline: String::new(),
            control_fd: None,
            vsock: Some(VsockConfig {
                owner_fd: number(&self.owner)?,
                guest_may_dial: vec![GuestDial {
                    port: AGENT_RPC_PORT,
                    connections: 1,
                }],
            }),
            shares: share.transpose()?.into_iter().collect(),
            disks: Vec::new(),
            nics: Vec::new(),
            serial: console.map(|fd| SerialConfig { fd }),
            report_fd: Some(number(&self.report)?),
            jail: JailConfig {
                uid: JAIL_ID,
                gid: JAIL_ID,
            },
        })
    }

    fn into_fds(self, config: OwnedFd) -> Vec<OwnedFd> {
        let mut fds = vec![config, self.kernel, self.initramfs, self.owner, self.report];
        fds.extend(self.share);
        fds.extend(self.console);
        fds
    }
}

/// For a step that was to prepare a VMM's start.
pub fn prepare(what: &'static str) -> impl Fn(io::Error) -> StartError {
    move |cause| StartError::Prepare { what, cause }
}

fn pipe(what: &'static str) -> Result<(File, OwnedFd), StartError> {
    let (read, write) =
        rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(|e| prepare(what)(e.into()))?;
    Ok((read.into(), write))
}

/// An unnamed file with the configuration, to be read from its beginning.
fn config_file(json: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(rustix::fs::memfd_create(
        "capsid-config",
        MemfdFlags::CLOEXEC,
    )?);
    file.write_all(json)?;
    rustix::fs::seek(&file, SeekFrom::Start(0))?;
    Ok(file.into())
}
