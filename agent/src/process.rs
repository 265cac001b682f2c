//! One process of a container, from its birth to the last byte of its output: the init or an exec.
//!
//! Two ends are told apart: *exited* (the kernel reaped it: signals are refused from here on) and
//! *finished* (its outputs were sent and closed as well: this is what Wait answers).

use crate::cgroup::Cgroup;
use crate::last_words;
use crate::launch::Launched;
use crate::reaper::Exit;
use crate::runtime::message::{Report, TEXT_MAX_BYTES, reports};
use crate::state::Refusal;
use crate::stdio::{Copies, HostStreams, StdinCloser};
use crate::stream::Stream;
use rustix::process::{Signal, pidfd_send_signal};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::io::Interest;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// How long a process may take from being let go to the execution of its program; startContainer hooks
/// run in between.
const EXECUTE_TIMEOUT_MS: u64 = 60_000;

/// A process that the agent watches.
#[derive(Debug)]
pub struct Process {
    /// In the guest's pid namespace.
    pub pid: u32,
    /// Means this process and no other.
    pub pidfd: OwnedFd,
    exited: watch::Receiver<Option<Exit>>,
    finished: watch::Receiver<Option<Exit>>,
    stdin: StdinCloser,
    terminal: Weak<Stream>,
    supervisor: JoinHandle<()>,
}

/// What the agent's side of the new process's stdio is, before the process exists.
#[derive(Debug)]
pub enum Stdio {
    /// Pipes, made already.
    Pipes(crate::stdio::AgentEnds),
    /// A terminal; its master comes with the process.
    Terminal {
        /// The host's stream for both directions.
        stream: Option<Stream>,
        /// Columns and rows at start.
        size: Option<(u16, u16)>,
        /// Owner of the terminal.
        owner: (u32, u32),
    },
}

impl Stdio {
    /// For a process with a terminal: of the host's streams only stdin counts.
    pub fn terminal(streams: HostStreams, size: Option<(u16, u16)>, owner: (u32, u32)) -> Stdio {
        Stdio::Terminal {
            stream: streams.stdin,
            size,
            owner,
        }
    }

    fn start(self, master: Option<OwnedFd>) -> io::Result<Copies> {
        match self {
            Stdio::Pipes(ends) => Copies::of_pipes(ends),
            Stdio::Terminal {
                stream,
                size,
                owner,
            } => {
                let missing = || io::Error::other("the process was made without its terminal");
                let master = master.ok_or_else(missing)?;
                own_terminal(&master, owner)?;
                if let Some((columns, rows)) = size {
                    set_size(&master, columns, rows)?;
                }
                Ok(Copies::of_terminal(Arc::new(Stream::new(master)?), stream))
            }
        }
    }
}

/// Lets the process's user open its terminal again (/dev/tty, /dev/pts/0).
fn own_terminal(master: &OwnedFd, (uid, gid): (u32, u32)) -> io::Result<()> {
    use rustix::fs::{Gid, Uid};
    let flags = rustix::pty::OpenptFlags::RDWR
        | rustix::pty::OpenptFlags::NOCTTY
        | rustix::pty::OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(master, flags)?;
    // The group stays devpts's "tty" for root, as login(1) leaves it.
    let group = (gid != 0).then(|| Gid::from_raw(gid));
    Ok(rustix::fs::fchown(&slave, Some(Uid::from_raw(uid)), group)?)
}

fn set_size(terminal: impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = rustix::termios::Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

impl Process {
    /// Starts watching a new process: its exit, then the end of its outputs. With its exit, but before that is told, `ends` is
    /// killed.
    ///
    /// # Errors
    /// Its stdio cannot be polled; the process is killed then.
    pub fn adopt(
        launched: Launched,
        stdio: Stdio,
        ends: Option<Cgroup>,
    ) -> io::Result<(Process, OwnedFd)> {
        let started = stdio.start(launched.master).inspect_err(|_| {
            // ESRCH: it has ended by itself.
            let _ = pidfd_send_signal(&launched.pidfd, Signal::KILL);
        });
        let mut copies = started?;
        let (tell_exited, exited) = watch::channel(None);
        let (tell_finished, finished) = watch::channel(None);
        let (stdin, terminal) = (copies.stdin_closer(), copies.terminal());
        let exit = launched.exit;
        let supervisor = tokio::spawn(async move {
            // The reaper never drops a registration untold; if it did, nobody knows the status.
            let exit = exit.await.unwrap_or_else(|_| Exit::unknown());
            if let Some(cgroup) = ends {
                kill_rest(cgroup).await;
            }
            tell_exited.send_replace(Some(exit));
            copies.finish().await;
            tell_finished.send_replace(Some(exit));
        });
        let process = Process {
            pid: u32::try_from(launched.pid).unwrap_or(0),
            pidfd: launched.pidfd,
            exited,
            finished,
            stdin,
            terminal,
            supervisor,
        };
        Ok((process, launched.report))
    }

    /// Waits until it has executed its program.
    ///
    /// # Errors
    /// What it reported instead; or that it ended, or took too long, before.
    pub async fn executed(&self, report: OwnedFd) -> Result<(), Report> {
        let limit = Duration::from_millis(EXECUTE_TIMEOUT_MS);
        let told = async {
            let bytes = read_report(report).await;
            let bytes =
                bytes.map_err(|e| Report::Failed(format!("reading the process's report: {e}")))?;
            match outcome(&reports(&bytes)) {
                Some(outcome) => outcome,
                None => Err(Report::Failed(format!(
                    "the process ended with status {} before its program was executed (it was \
                     killed, or a startContainer hook failed)",
                    self.wait_exited().await.status
                ))),
            }
        };
        tokio::time::timeout(limit, told).await.unwrap_or_else(|_| {
            let text = format!("the program was not executed within {EXECUTE_TIMEOUT_MS} ms");
            Err(Report::Failed(text))
        })
    }

    /// Whether it has not ended, as the kernel says it now.
    pub fn runs(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        loop {
            match poll(&mut fds, Some(&now)) {
                Err(rustix::io::Errno::INTR) => {}
                ready => return ready == Ok(0),
            }
        }
    }

    /// How it ended, if the kernel has reaped it.
    pub fn exited(&self) -> Option<Exit> {
        *self.exited.borrow()
    }

    /// Waits for its end, whatever becomes of its outputs.
    pub async fn wait_exited(&self) -> Exit {
        told(self.exited.clone()).await
    }

    /// Waits for its end and for its outputs to be sent and closed.
    pub async fn wait_finished(&self) -> Exit {
        told(self.finished.clone()).await
    }

    /// Sends it a signal (1 to 64).
    ///
    /// # Errors
    /// [`Refusal::Gone`]: it has ended.
    pub fn signal(&self, signal: Signal) -> Result<(), Refusal> {
        if self.exited().is_some() {
            return Err(Refusal::Gone);
        }
        // ESRCH: ended, not reaped yet. Nothing else can go wrong for root with a valid signal.
        pidfd_send_signal(&self.pidfd, signal).map_err(|_| Refusal::Gone)
    }

    /// Delivers end of file on its stdin once what was already sent has been read.
    pub fn close_stdin(&self) {
        self.stdin.close();
    }

    /// Sets the size of its terminal; false if it has none (any more).
    ///
    /// # Errors
    /// The terminal refuses.
    pub fn resize(&self, columns: u16, rows: u16) -> io::Result<bool> {
        match self.terminal.upgrade() {
            Some(terminal) => set_size(&*terminal, columns, rows).map(|()| true),
            None => Ok(false),
        }
    }
}

/// Kills what a container's init leaves behind, where no pid namespace ends with it.
async fn kill_rest(cgroup: Cgroup) {
    let killed = tokio::task::spawn_blocking(move || cgroup.kill()).await;
    if let Ok(Err(e)) = killed {
        last_words::warn(&last_words::chain(&e));
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.supervisor.abort();
    }
}

async fn told(mut end: watch::Receiver<Option<Exit>>) -> Exit {
    match end.wait_for(Option::is_some).await {
        Ok(exit) => exit.unwrap_or_else(Exit::unknown),
        // The supervisor was stopped with its process: deleted while somebody waited.
        Err(_) => Exit::unknown(),
    }
}

/// A failure wins; else the execution must have been announced before the pipe closed. Nothing at all
/// means that the process ended before it could say why.
fn outcome(reports: &[Report]) -> Option<Result<(), Report>> {
    match reports.iter().find(|report| **report != Report::Executing) {
        Some(failure) => Some(Err(failure.clone())),
        None if reports.is_empty() => None,
        None => Some(Ok(())),
    }
}

async fn read_report(report: OwnedFd) -> io::Result<Vec<u8>> {
    let report = Stream::one_way(report, Interest::READABLE)?;
    let mut bytes = Vec::new();
    let mut buffer = [0; TEXT_MAX_BYTES];
    while bytes.len() < 4 * TEXT_MAX_BYTES {
        match report.read(&mut buffer).await? {
            0 => break,
            read => bytes.extend_from_slice(buffer.get(..read).unwrap_or_default()),
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_announced_execution_that_closed_the_pipe_succeeded() {
        assert_eq!(outcome(&[Report::Executing]), Some(Ok(())));
    }

    #[test]
    fn a_failed_execution_is_told() {
        let failure = Report::NotExecutable("sh".into());
        let outcome = outcome(&[Report::Executing, failure.clone()]);
        assert_eq!(outcome, Some(Err(failure)));
    }

    #[test]
    fn a_pipe_that_closed_unannounced_tells_no_success() {
        assert_eq!(outcome(&[]), None);
    }
}
