//! Signals as events: all that are for the container or for the start are blocked in every thread and taken by one.

use crate::abort::Abort;
use nix::sys::signal::{SigSet, Signal};
use std::io;
use std::thread;

/// Before the container runs, one of these ends the start.
pub(crate) const ENDING: [Signal; 4] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
];
/// These are passed on as well once it runs: what docker passes on, but for three kinds. A fault or a limit is about
/// this process and not the container's; TSTP, TTIN and TTOU are the shell's way to stop us; real-time signals have no
/// name in the crate that takes them. A blocked CONT still continues us.
const FORWARDED: [Signal; 9] = [
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGSTKFLT,
    Signal::SIGCONT,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGIO,
    Signal::SIGPWR,
];

/// The blocked set. To be made first of all, while the process has one thread: threads inherit the mask.
pub(crate) struct Signals(SigSet);

impl Signals {
    /// Blocks the signals.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) fn block() -> io::Result<Signals> {
        let mut set = SigSet::empty();
        for signal in ENDING.into_iter().chain(FORWARDED) {
            set.add(signal);
        }
        set.add(Signal::SIGWINCH);
        let mut blocked = set;
        // A shell may have put us into the background: restoring the terminal must not stop us.
        blocked.add(Signal::SIGTTOU);
        blocked.thread_block()?;
        Ok(Signals(set))
    }

    /// Takes signals for the rest of the process's life: those that end a start raise `abort`, all go to `tell`.
    ///
    /// # Errors
    /// The thread could not be started.
    pub(crate) fn serve(
        self,
        abort: Abort,
        tell: impl Fn(Signal) + Send + 'static,
    ) -> io::Result<()> {
        let serve = move || {
            while let Ok(signal) = self.0.wait() {
                if ENDING.contains(&signal) {
                    abort.raise(signal as i32);
                }
                tell(signal);
            }
        };
        thread::Builder::new()
            .name("signals".into())
            .spawn(serve)
            .map(drop)
    }
}
