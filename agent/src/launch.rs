//! The agent's side of the runtime process: starts it, gives it one order, and has the new process's pid
//! registered with the reaper before the runtime process lets go of it. Blocking, with a deadline; runs on
//! blocking threads.

use crate::reaper::{Exit, Reaper};
use crate::runtime;
use crate::runtime::message::{self, Answer, Order, Report};
use crate::stdio::ProcessEnds;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use tokio::sync::oneshot;

/// How long the runtime process may take between two answers; createContainer hooks run in it.
const RUNTIME_TIMEOUT_S: i64 = 60;

/// Why there is no new process.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The runtime process could not be started or spoken to.
    #[error("{what}")]
    Runtime {
        /// In which step.
        what: &'static str,
        /// errno.
        #[source]
        cause: io::Error,
    },
    /// It refused, saying why.
    #[error("{0}")]
    Refused(String),
}

fn failed(what: &'static str) -> impl Fn(io::Error) -> LaunchError {
    move |cause| LaunchError::Runtime { what, cause }
}

/// Starts runtime processes.
#[derive(Debug)]
pub struct Launcher {
    program: PathBuf,
    reaper: Arc<Reaper>,
}

/// A new process, registered: its exit will be told.
#[derive(Debug)]
pub struct Launched {
    /// In the guest's pid namespace.
    pub pid: i32,
    /// Means this process and no other, ever.
    pub pidfd: OwnedFd,
    /// Its exit.
    pub exit: oneshot::Receiver<Exit>,
    /// The terminal's master, if it has a terminal.
    pub master: Option<OwnedFd>,
    /// Reports until its program is executed, then end of file.
    pub report: OwnedFd,
}

impl Launcher {
    /// Runtime processes are `program`, the agent's own binary.
    pub fn new(program: PathBuf, reaper: Arc<Reaper>) -> Launcher {
        Launcher { program, reaper }
    }

    /// Has `order` done with these descriptors.
    ///
    /// # Errors
    /// No process was made; what the failed process reported comes with the error.
    pub fn launch(
        &self,
        order: &Order,
        ends: &ProcessEnds,
        more: &[&OwnedFd],
    ) -> Result<Launched, (LaunchError, Vec<Report>)> {
        let pipe = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
        let (report, report_end) =
            pipe.map_err(|e| (failed("making the report pipe")(e.into()), vec![]))?;
        match self.converse(order, ends, report_end, more) {
            Ok((pid, pidfd, exit, master)) => Ok(Launched {
                pid,
                pidfd,
                exit,
                master,
                report,
            }),
            Err(error) => Err((error, read_reports_now(&report))),
        }
    }

    #[allow(clippy::type_complexity)] // a private step of `launch`, taken apart there at once
    fn converse(
        &self,
        order: &Order,
        ends: &ProcessEnds,
        report_end: OwnedFd,
        more: &[&OwnedFd],
    ) -> Result<(i32, OwnedFd, oneshot::Receiver<Exit>, Option<OwnedFd>), LaunchError> {
        let runtime = self.start()?;
        let mut fds = vec![
            ends.stdin.as_raw_fd(),
            ends.stdout.as_raw_fd(),
            ends.stderr.as_raw_fd(),
            report_end.as_raw_fd(),
        ];
        fds.extend(more.iter().map(|fd| fd.as_raw_fd()));
        message::send(&runtime.socket, order, &fds)
            .map_err(failed("giving the runtime process its order"))?;
        drop(report_end);
        let mut master = None;
        loop {
            let (answer, fds) = message::receive::<Answer>(&runtime.socket)
                .map_err(failed("waiting for the runtime process's answer"))?;
            match answer {
                Answer::Terminal => master = fds.into_iter().next(),
                Answer::Failed(text) => return Err(LaunchError::Refused(text)),
                Answer::Pid(pid) => {
                    let (pidfd, exit) = self.register(pid)?;
                    // If the runtime process is gone it has let go of the process already.
                    let _ = message::send(&runtime.socket, &(), &[]);
                    runtime.release();
                    return Ok((pid, pidfd, exit, master));
                }
            }
        }
    }

    /// The runtime process is still the process's parent, so this pid is this process, alive or not.
    fn register(&self, pid: i32) -> Result<(OwnedFd, oneshot::Receiver<Exit>), LaunchError> {
        let named = Pid::from_raw(pid).ok_or(rustix::io::Errno::SRCH);
        let exit = self.reaper.watch(pid);
        match named.and_then(|named| pidfd_open(named, PidfdFlags::empty())) {
            Ok(pidfd) => Ok((pidfd, exit)),
            Err(e) => {
                self.reaper.forget(pid);
                Err(failed("opening the new process's pidfd")(e.into()))
            }
        }
    }

    fn start(&self) -> Result<RuntimeProcess, LaunchError> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags);
        let (socket, theirs) =
            pair.map_err(|e| failed("making the runtime process's socket")(e.into()))?;
        let limit = TimeVal::seconds(RUNTIME_TIMEOUT_S);
        setsockopt(&socket, sockopt::ReceiveTimeout, &limit)
            .map_err(|e| failed("limiting the runtime process's time")(e.into()))?;
        let child = Command::new(&self.program)
            .arg(runtime::ARGUMENT)
            .env_clear()
            .current_dir("/")
            .stdin(theirs)
            .stdout(Stdio::null())
            .stderr(errors_to_kernel_log())
            .spawn()
            .map_err(failed("starting the runtime process"))?;
        // The reaper reaps it. Until it has its order it cannot end but by a fault.
        let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pidfd = id.and_then(|id| pidfd_open(id, PidfdFlags::empty()).ok());
        Ok(RuntimeProcess { socket, pidfd })
    }
}

/// A runtime process at work; dropped without its answer, it is killed.
struct RuntimeProcess {
    socket: OwnedFd,
    pidfd: Option<OwnedFd>,
}

impl RuntimeProcess {
    fn release(mut self) {
        self.pidfd = None;
    }
}

impl Drop for RuntimeProcess {
    fn drop(&mut self) {
        if let Some(pidfd) = &self.pidfd {
            // ESRCH: it has ended by itself, which is what is wanted.
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
    }
}

/// What a faulty runtime process prints belongs to the agent's log, never to a container's output.
fn errors_to_kernel_log() -> Stdio {
    if std::process::id() != 1 {
        return Stdio::inherit();
    }
    let kmsg = std::fs::OpenOptions::new().write(true).open("/dev/kmsg");
    kmsg.map_or_else(|_| Stdio::null(), Stdio::from)
}

/// What is in the report pipe of a process that was not made: all writers are gone or about to be
/// killed, so nothing is waited for.
fn read_reports_now(report: &OwnedFd) -> Vec<Report> {
    let mut bytes = vec![0; 2 * message::TEXT_MAX_BYTES];
    if rustix::io::ioctl_fionbio(report, true).is_err() {
        return vec![];
    }
    let length = rustix::io::read(report, &mut bytes[..]).unwrap_or(0);
    message::reports(bytes.get(..length).unwrap_or_default())
}
