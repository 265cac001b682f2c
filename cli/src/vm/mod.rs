//! One VMM process and the guest in it, watched by threads: killed and reaped whatever happens, its last words and its report
//! collected with bounds. What it sends is hostile.

pub(crate) mod agent;

use capsid_owner::Owner;
use capsid_owner::end::Ended;
use capsid_owner::machine::{self, Parts, STDERR_MAX_BYTES, StartError, Started};
use capsid_protocol::report::REPORT_MAX_BYTES;
use capsid_protocol::vsock::AGENT_RPC_PORT;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::escape;

/// How long the pipes of a VMM that is gone may stay open, in ms.
const LAST_WORDS_TIMEOUT_MS: u64 = 2_000;
/// How long a VMM may take to die of SIGKILL, in ms.
const KILL_TIMEOUT_MS: u64 = 30_000;

/// News of a machine.
#[derive(Debug)]
pub(crate) enum News {
    /// The agent has dialled: the fd is its channel.
    AgentDialled(OwnedFd),
    /// The VMM is gone and reaped.
    Ended(Ended),
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
        Ok(Machine::watch(machine::start(parts)?, tell))
    }

    /// Takes over a VMM just started; from here on it cannot be lost.
    fn watch(started: Started, tell: impl Fn(News) + Clone + Send + 'static) -> Machine {
        let Started {
            mut child,
            pidfd,
            owner,
            report,
            stderr,
            console,
        } = started;
        let (reaper, reaped) = mpsc::channel();
        let machine = Machine {
            pidfd,
            reaped,
            owner: owner.clone(),
        };
        let words = stderr.map(|stderr| collect(stderr, STDERR_MAX_BYTES));
        let report = collect(report, REPORT_MAX_BYTES);
        if let Some(console) = console {
            thread::spawn(move || show_console(console));
        }
        let tell_connections = tell.clone();
        thread::spawn(move || accept(&owner, &tell_connections));
        thread::spawn(move || {
            let how = machine::reap(&mut child);
            let words = words.as_ref().and_then(last_words).unwrap_or_default();
            let ended = Ended {
                how,
                words: escape::console(&words),
                report: last_words(&report).and_then(|json| machine::read_report(&json)),
            };
            // Whoever is no longer interested has dropped the other ends.
            let _nobody_waits = reaper.send(());
            tell(News::Ended(ended));
        });
        machine
    }

    /// The way to open streams to the guest.
    pub(crate) fn owner(&self) -> &Owner {
        &self.owner
    }

    /// Tells the VMM to end by itself, within its grace, and to say what its guest said last; its end comes as news.
    pub(crate) fn stop(&self) {
        machine::stop(&self.pidfd);
    }

    /// Kills the VMM; its end comes as news.
    pub(crate) fn kill(&self) {
        machine::kill(&self.pidfd);
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
