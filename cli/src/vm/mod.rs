//! One VMM process and the guest in it, as their owner sees them: started with exactly its fds, killed and reaped
//! whatever happens, its last words and its report collected with bounds. What it sends is hostile.

pub(crate) mod agent;
pub(crate) mod files;
mod owner;
mod spawn;

pub(crate) use owner::Owner;

use capsid_protocol::exit::VmmExit;
use capsid_protocol::machine::{
    CONFIG_VERSION, ConfigError, Cpus, FdNumber, GuestDial, JailConfig, MachineConfig, MemoryMib,
    SerialConfig, ShareConfig, VsockConfig,
};
use capsid_protocol::report::{MachineReport, REPORT_MAX_BYTES};
use capsid_protocol::vsock::AGENT_RPC_PORT;
use rustix::fs::{MemfdFlags, SeekFrom};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags, Signal};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::escape;

/// User and group of every VMM: a number beyond those that distributions and subordinate id ranges hand out, so that
/// nothing on the host belongs to it.
pub(crate) const JAIL_ID: u32 = 0x7ca5_1d00;
/// Most bytes of a VMM's stderr that are kept: one line, and the guest's last console lines.
const STDERR_MAX_BYTES: usize = 16 * 1024;
/// How long the pipes of a VMM that is gone may stay open, in ms.
const LAST_WORDS_TIMEOUT_MS: u64 = 2_000;
/// How long a VMM may take to die of SIGKILL, in ms.
const KILL_TIMEOUT_MS: u64 = 30_000;

/// What a machine is made of.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) id: String,
    pub(crate) vmm: PathBuf,
    pub(crate) kernel: File,
    pub(crate) initramfs: File,
    /// The detached tree for the guest, if it has one.
    pub(crate) share: Option<OwnedFd>,
    pub(crate) cpus: Cpus,
    pub(crate) memory: MemoryMib,
    /// Copy the guest's console to our stderr.
    pub(crate) console: bool,
}

/// Why no machine could be started.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
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

/// News of a machine.
#[derive(Debug)]
pub(crate) enum News {
    /// The agent has dialled: the fd is its channel.
    AgentDialled(OwnedFd),
    /// The VMM is gone and reaped.
    Ended(Ended),
}

/// How a VMM ended.
#[derive(Debug)]
pub(crate) struct Ended {
    /// What `waitpid` said; the truth.
    pub(crate) how: How,
    /// Its stderr, printable: one line that says why, then console lines.
    pub(crate) words: String,
    /// Its report, if it wrote a good one.
    pub(crate) report: Option<MachineReport>,
}

/// The end of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    /// With one of the documented codes.
    Exit(VmmExit),
    /// With a code of nobody.
    Code(i32),
    /// Killed.
    Signal(i32),
}

/// A running VMM. Dropping it kills it and waits for its end.
pub(crate) struct Machine {
    pidfd: OwnedFd,
    reaped: mpsc::Receiver<()>,
    owner: Owner,
}

impl Machine {
    /// Starts a VMM; `tell` is called with its news from threads of this machine.
    ///
    /// # Errors
    /// Nothing was started.
    pub(crate) fn start(
        parts: Parts,
        tell: impl Fn(News) + Clone + Send + 'static,
    ) -> Result<Machine, StartError> {
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
        let child = spawn::spawn(&parts.vmm, config_fd, fds).map_err(|cause| StartError::Exec {
            path: parts.vmm.clone(),
            cause,
        })?;
        Machine::watch(child, owner, report, console, tell)
    }

    /// Takes over a child just started; from here on it cannot be lost.
    fn watch(
        mut child: Child,
        owner: Owner,
        report: File,
        console: Option<File>,
        tell: impl Fn(News) + Clone + Send + 'static,
    ) -> Result<Machine, StartError> {
        // Not reaped yet, so the pid is the child's.
        let opened = i32::try_from(child.id())
            .ok()
            .and_then(Pid::from_raw)
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()));
        let pidfd = match opened {
            Ok(pidfd) => pidfd,
            Err(error) => {
                // It is our child, so killing and reaping it fail only if it has ended already.
                let _ended = child.kill();
                let _reaped = child.wait();
                return Err(prepare("pidfd")(error.into()));
            }
        };
        let (reaper, reaped) = mpsc::channel();
        let machine = Machine {
            pidfd,
            reaped,
            owner: owner.clone(),
        };
        let words = child
            .stderr
            .take()
            .map(|stderr| collect(stderr, STDERR_MAX_BYTES));
        let report = collect(report, REPORT_MAX_BYTES);
        if let Some(console) = console {
            thread::spawn(move || show_console(console));
        }
        let tell_connections = tell.clone();
        thread::spawn(move || accept(&owner, &tell_connections));
        thread::spawn(move || {
            let how = reap(&mut child);
            let words = words.as_ref().and_then(last_words).unwrap_or_default();
            let ended = Ended {
                how,
                words: escape::console(&words),
                report: last_words(&report).and_then(|json| read_report(&json)),
            };
            // Whoever is no longer interested has dropped the other ends.
            let _nobody_waits = reaper.send(());
            tell(News::Ended(ended));
        });
        Ok(machine)
    }

    /// The way to open streams to the guest.
    pub(crate) fn owner(&self) -> &Owner {
        &self.owner
    }

    /// Tells the VMM to end by itself, within its grace, and to say what its guest said last; its end comes as news.
    pub(crate) fn stop(&self) {
        // Fails only when it has ended already.
        let _ended = rustix::process::pidfd_send_signal(&self.pidfd, Signal::TERM);
    }

    /// Kills the VMM; its end comes as news.
    pub(crate) fn kill(&self) {
        // Fails only when it has ended already.
        let _ended = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.kill();
        let limit = Duration::from_millis(KILL_TIMEOUT_MS);
        if let Err(mpsc::RecvTimeoutError::Timeout) = self.reaped.recv_timeout(limit) {
            eprintln!("capsid: the VMM does not die of SIGKILL; the kernel holds it");
        }
    }
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

fn prepare(what: &'static str) -> impl Fn(io::Error) -> StartError {
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

/// Reads a stream to its end on a thread of its own and keeps the first `max_bytes`.
fn collect(mut stream: impl Read + Send + 'static, max_bytes: usize) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut kept = Vec::new();
        let mut buffer = [0u8; 4096];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    let room = max_bytes.saturating_sub(kept.len()).min(count);
                    kept.extend(buffer.iter().take(room));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break, // what came is what there is
            }
        }
        // The machine may have been dropped.
        let _nobody_waits = sender.send(kept);
    });
    receiver
}

fn last_words(collected: &mpsc::Receiver<Vec<u8>>) -> Option<Vec<u8>> {
    collected
        .recv_timeout(Duration::from_millis(LAST_WORDS_TIMEOUT_MS))
        .ok()
}

fn read_report(json: &[u8]) -> Option<MachineReport> {
    // A VMM that was killed wrote none, and a report that cannot be read is as good as none.
    serde_json::from_slice(json).ok()
}

/// Copies the guest's console to our stderr, fit for a terminal.
fn show_console(mut console: File) {
    let mut buffer = [0u8; 4096];
    while let Ok(count @ 1..) = console.read(&mut buffer) {
        let text = escape::console(buffer.get(..count).unwrap_or_default());
        // Without stderr there is nobody to show it to, but the pipe must not fill up.
        let _nobody_looks = io::stderr().write_all(text.as_bytes());
    }
}

/// Hands over the one connection of the agent and closes every other.
fn accept(owner: &Owner, tell: &impl Fn(News)) {
    let mut dialled = false;
    while let Ok(Some((port, fd))) = owner.accept() {
        if port == AGENT_RPC_PORT && !dialled {
            dialled = true;
            tell(News::AgentDialled(fd));
        }
    }
}

fn reap(child: &mut Child) -> How {
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

/// Whether this can be executed; for a clear line before anything is started.
///
/// # Errors
/// It is not there, or not executable.
pub(crate) fn is_executable(path: &Path) -> Result<(), StartError> {
    rustix::fs::access(path, rustix::fs::Access::EXEC_OK).map_err(|error| StartError::Exec {
        path: path.to_owned(),
        cause: error.into(),
    })
}
