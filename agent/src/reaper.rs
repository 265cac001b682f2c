//! PID 1 reaps every child of the guest, its own and the orphans. Who waits for a process registers its
//! pid *before* that process can become a child of the agent (see `launch.rs`), so no exit is stolen and
//! none is missed: what is not registered is an orphan and is forgotten.

use rustix::process::{WaitOptions, WaitStatus, wait};
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// Zombies reaped before other tasks get the thread again.
const REAP_BATCH_COUNT: usize = 64;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0..255 of exit(2), or 128 + the signal that killed it.
    pub status: u8,
    /// CLOCK_REALTIME when it was reaped, in ns.
    pub at_ns: u64,
}

impl Exit {
    /// An exit whose status nobody learned: 255, never 0.
    pub fn unknown() -> Exit {
        Exit {
            status: 255,
            at_ns: realtime_ns(),
        }
    }
}

/// The pids somebody waits for.
#[derive(Debug, Default)]
pub struct Reaper {
    waiting: Mutex<HashMap<i32, oneshot::Sender<Exit>>>,
}

impl Reaper {
    /// Registers `pid`. The answer comes when it was reaped.
    pub fn watch(&self, pid: i32) -> oneshot::Receiver<Exit> {
        let (tell, told) = oneshot::channel();
        self.table().insert(pid, tell);
        told
    }

    /// Takes the registration back (the process was never there).
    pub fn forget(&self, pid: i32) {
        self.table().remove(&pid);
    }

    /// Starts listening for SIGCHLD; from here on `run` must be polled.
    ///
    /// # Errors
    /// The handler cannot be installed.
    pub fn listen() -> io::Result<Signal> {
        signal(SignalKind::child())
    }

    /// Reaps for ever.
    pub async fn run(self: Arc<Self>, mut children: Signal) {
        loop {
            while self.reap_batch() {
                tokio::task::yield_now().await;
            }
            if children.recv().await.is_none() {
                return;
            }
        }
    }

    /// Reaps at most [`REAP_BATCH_COUNT`]; true if there may be more.
    fn reap_batch(&self) -> bool {
        for _ in 0..REAP_BATCH_COUNT {
            // None: no zombie. ECHILD: no child. Nothing else is asked for.
            let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) else {
                return false;
            };
            self.tell(pid.as_raw_nonzero().get(), status_of(status));
        }
        true
    }

    fn tell(&self, pid: i32, status: u8) {
        if let Some(waiter) = self.table().remove(&pid) {
            let at_ns = realtime_ns();
            // Nobody is left to be told: the process was forgotten in between.
            let _ = waiter.send(Exit { status, at_ns });
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<i32, oneshot::Sender<Exit>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn status_of(status: WaitStatus) -> u8 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => exit_status(code),
        (None, Some(signal)) => signal_status(signal),
        (None, None) => Exit::unknown().status,
    }
}

/// exit(2) keeps eight bits.
fn exit_status(code: i32) -> u8 {
    u8::try_from(code & 0xff).unwrap_or(255)
}

/// 128 + n, as every shell says it; the kernel has 64 signals.
fn signal_status(signal: i32) -> u8 {
    u8::try_from(signal.saturating_add(128)).unwrap_or(255)
}

fn realtime_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    u64::try_from(since.unwrap_or(Duration::ZERO).as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[allow(clippy::zombie_processes)] // it is reaped by its pid, as the reaper does
    fn an_end_by_any_signal_of_the_kernel_is_told() {
        // 64 is a real-time signal, which has no name.
        for signal in [9, 15, 34, 64] {
            let script = format!("kill -{signal} $$");
            let mut shell = std::process::Command::new("sh");
            let child = shell.args(["-c", &script]).spawn().expect("sh");
            let pid = rustix::process::Pid::from_child(&child);
            let ended = rustix::process::waitpid(Some(pid), WaitOptions::empty()).expect("wait");
            let (_, status) = ended.expect("it has ended");
            assert_eq!(i32::from(status_of(status)), 128 + signal);
        }
    }

    #[test]
    fn exit_7_is_7() {
        assert_eq!(exit_status(7), 7);
    }

    #[test]
    fn exit_256_is_0_as_the_kernel_says() {
        assert_eq!(exit_status(256), 0);
    }

    #[test]
    fn sigkill_is_137() {
        assert_eq!(signal_status(libc::SIGKILL), 137);
    }

    #[test]
    fn the_last_real_time_signal_is_192() {
        assert_eq!(signal_status(64), 192);
    }
}
