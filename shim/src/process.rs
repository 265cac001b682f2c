//! One process of a task, a container's init or an exec, as the shim keeps it: its state, its exit, its streams. Locks here are held for a look
//! or a move, never over anything that waits.

use crate::state::{Refusal, State, Verb};
use crate::stdio::{Outputs, Pumps, Urls};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;
use tokio::sync::watch;

/// The signal that nothing outdoes.
pub const SIGKILL: u32 = 9;

/// The end of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255; 128 and the number of the signal; 137 for one that went with its VM; 255 for an end that nobody knows.
    pub status: u8,
    /// When it was known to the host.
    pub at: SystemTime,
}

impl Exit {
    /// An exit that becomes known now.
    pub fn now(status: u8) -> Exit {
        Exit {
            status,
            at: SystemTime::now(),
        }
    }
}

/// What containerd named as its streams.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Streams {
    /// A fifo.
    pub stdin: String,
    /// A fifo, a file, a logger.
    pub stdout: String,
    /// The same.
    pub stderr: String,
    /// It has a terminal.
    pub terminal: bool,
}

impl Streams {
    /// For [`crate::stdio::Stdio::open`]; `id` and `namespace` are for loggers.
    pub fn urls<'a>(&'a self, id: &'a str, namespace: &'a str) -> Urls<'a> {
        Urls {
            stdin: &self.stdin,
            stdout: &self.stdout,
            stderr: &self.stderr,
            terminal: self.terminal,
            id,
            namespace,
        }
    }
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Where its streams go.
    pub streams: Streams,
    state: watch::Sender<State>,
    exit: watch::Sender<Option<Exit>>,
    pumps: Mutex<Option<Pumps>>,
    /// A signal that came while it was being started, to be sent then.
    noted: Mutex<Option<u32>>,
    /// CloseIO came before there were pumps.
    stdin_closed: Mutex<bool>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Process {
    /// One that is known and does not run.
    pub fn new(streams: Streams) -> Process {
        Process {
            streams,
            state: watch::Sender::new(State::Created),
            exit: watch::Sender::new(None),
            pumps: Mutex::default(),
            noted: Mutex::default(),
            stdin_closed: Mutex::default(),
        }
    }

    /// Where it is now.
    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Its exit, if it has ended.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Makes the move for `verb`; returns where it was.
    ///
    /// # Errors
    /// The table of `state.rs` says no.
    pub fn advance(&self, verb: Verb) -> Result<State, Refusal> {
        let mut moved = Err(Refusal::Gone);
        self.state.send_if_modified(|state| {
            let before = *state;
            moved = before.after(verb).map(|after| {
                *state = after;
                before
            });
            moved.is_ok_and(|before| before != *state)
        });
        moved
    }

    /// Takes a move back that could not be carried out, unless the process has ended meanwhile.
    pub fn retreat(&self, from: State, to: State) {
        self.state.send_if_modified(|state| {
            let still = *state == from;
            if still {
                *state = to;
            }
            still
        });
    }

    /// Notes a signal for when it was started; whether it is being started. The last one counts, and none more than SIGKILL.
    pub fn note_signal(&self, signal: u32) -> bool {
        let mut noted = locked(&self.noted);
        let starts = self.state() == State::Starting;
        if starts && *noted != Some(SIGKILL) {
            *noted = Some(signal);
        }
        starts
    }

    /// The signal that was noted; once. From the caller's [`Verb::Started`] on none is noted any more.
    pub fn take_noted(&self) -> Option<u32> {
        locked(&self.noted).take()
    }

    /// Waits while it is being started.
    pub async fn settled(&self) {
        let mut state = self.state.subscribe();
        // It fails only without a sender, which is ours.
        let _settled = state.wait_for(|state| *state != State::Starting).await;
    }

    /// It has ended. The first exit counts; whether this was it.
    pub fn ended(&self, exit: Exit) -> bool {
        let first = self.exit.send_if_modified(|known| {
            let first = known.is_none();
            known.get_or_insert(exit);
            first
        });
        // An end is never refused.
        let _moved = self.advance(Verb::Exit);
        first
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Option<Exit> {
        let mut exit = self.exit.subscribe();
        let known = exit.wait_for(Option::is_some).await;
        known.ok().and_then(|known| *known)
    }

    /// Its streams are connected.
    pub fn connected(&self, pumps: Pumps) {
        if *locked(&self.stdin_closed) {
            pumps.close_stdin();
        }
        *locked(&self.pumps) = Some(pumps);
    }

    /// For when it has ended: waits until all that it wrote was passed on, or it is clear that it will not be.
    pub async fn outputs_done(&self) -> Outputs {
        let done = locked(&self.pumps).as_ref().map(Pumps::outputs_done);
        match done {
            Some(done) => done.await,
            None => Outputs::Written,
        }
    }

    /// No more input: what came is delivered, then its end.
    pub fn close_stdin(&self) {
        *locked(&self.stdin_closed) = true;
        if let Some(pumps) = &*locked(&self.pumps) {
            pumps.close_stdin();
        }
    }

    /// Takes its streams, which somebody is to close then.
    pub fn take_pumps(&self) -> Option<Pumps> {
        locked(&self.pumps).take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn process() -> Process {
        Process::new(Streams::default())
    }

    #[tokio::test]
    async fn the_first_exit_is_the_exit() {
        let process = process();
        assert!(process.ended(Exit::now(7)));
        assert!(!process.ended(Exit::now(137)));
        assert_eq!(process.wait().await.map(|exit| exit.status), Some(7));
        assert_eq!(process.state(), State::Stopped);
    }

    #[tokio::test]
    async fn an_end_during_the_start_is_told_after_it() {
        let process = Arc::new(process());
        process.advance(Verb::Start).expect("created");
        let waiting = Arc::clone(&process);
        let settled = tokio::spawn(async move { waiting.settled().await });
        tokio::task::yield_now().await;
        assert!(!settled.is_finished());
        process.advance(Verb::Started).expect("starting");
        settled.await.expect("told");
    }

    #[test]
    fn a_signal_during_the_start_is_noted_and_sigkill_outdoes_all() {
        let process = process();
        assert!(!process.note_signal(15), "it is not being started");
        process.advance(Verb::Start).expect("created");
        for signal in [15, SIGKILL, 1] {
            assert!(process.note_signal(signal));
        }
        process.advance(Verb::Started).expect("starting");
        assert!(!process.note_signal(15), "it runs");
        assert_eq!(process.take_noted(), Some(SIGKILL));
        assert_eq!(process.take_noted(), None);
    }

    #[test]
    fn a_move_that_failed_is_taken_back_unless_it_has_ended() {
        let process = process();
        process.advance(Verb::Start).expect("created");
        process.advance(Verb::Started).expect("starting");
        process.advance(Verb::Pause).expect("running");
        process.retreat(State::Paused, State::Running);
        assert_eq!(process.state(), State::Running);
        process.ended(Exit::now(0));
        process.retreat(State::Running, State::Created);
        assert_eq!(process.state(), State::Stopped);
    }
}
