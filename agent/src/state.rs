//! The life of a container and of an exec, as one table: which verb may come when, and what it leaves
//! behind. Pure; the owners are `container.rs` and `process.rs`.
//!
//! ```text
//!            Start              Pause
//! Created ──────────▶ Running ◀──────▶ Paused
//!    │                   │     Resume    │
//!    └────── Exit ───────┴───── Exit ────┘
//!                        ▼
//!                     Stopped ── Delete ──▶ Deleted        (Created may be deleted too)
//! ```

/// Where a container (or, without the paused part, an exec) is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The init process exists and waits for Start.
    Created,
    /// The user's program runs.
    Running,
    /// Frozen by cgroup.freeze.
    Paused,
    /// The process ended; its status is known.
    Stopped,
    /// Gone; only a racing caller sees this.
    Deleted,
}

/// What is asked of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Let the init process run the user's program.
    Start,
    /// Send a signal. It only asks: the process ends by `Exit`.
    Signal,
    /// Add a process.
    Exec,
    /// Freeze.
    Pause,
    /// Thaw.
    Resume,
    /// Change resources.
    Update,
    /// The process ended (the kernel says so).
    Exit,
    /// Forget it and what it holds.
    Delete,
}

/// Why a verb was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The process has ended: the one answer that a caller who wants it dead forgives.
    #[error("process already finished")]
    Gone,
    /// The verb does not fit the state.
    #[error("cannot {verb:?} a container that is {at:?}")]
    Wrong {
        /// Where it is.
        at: State,
        /// What was asked.
        verb: Verb,
    },
}

impl State {
    /// The state after `verb`.
    ///
    /// # Errors
    /// [`Refusal::Gone`] for a signal or an update to something that ended, else [`Refusal::Wrong`].
    pub fn after(self, verb: Verb) -> Result<State, Refusal> {
        use State::{Created, Deleted, Paused, Running, Stopped};
        match (self, verb) {
            (Created, Verb::Start) => Ok(Running),
            (Running, Verb::Exec) => Ok(Running),
            (Running, Verb::Pause) => Ok(Paused),
            (Paused, Verb::Resume) => Ok(Running),
            (Created | Running | Paused, Verb::Signal | Verb::Update) => Ok(self),
            (Stopped | Deleted, Verb::Signal | Verb::Update) => Err(Refusal::Gone),
            (Created | Running | Paused, Verb::Exit) => Ok(Stopped),
            (Created | Stopped, Verb::Delete) => Ok(Deleted),
            (at, verb) => Err(Refusal::Wrong { at, verb }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_makes_a_created_container_run() {
        assert_eq!(State::Created.after(Verb::Start), Ok(State::Running));
    }

    #[test]
    fn a_second_start_is_wrong() {
        let refusal = Refusal::Wrong {
            at: State::Running,
            verb: Verb::Start,
        };
        assert_eq!(State::Running.after(Verb::Start), Err(refusal));
    }

    #[test]
    fn a_signal_only_asks() {
        assert_eq!(State::Running.after(Verb::Signal), Ok(State::Running));
    }

    #[test]
    fn signal_after_exit_is_gone() {
        assert_eq!(State::Stopped.after(Verb::Signal), Err(Refusal::Gone));
    }

    #[test]
    fn a_created_container_can_be_signalled() {
        assert_eq!(State::Created.after(Verb::Signal), Ok(State::Created));
    }

    #[test]
    fn exec_needs_a_running_container() {
        assert!(State::Created.after(Verb::Exec).is_err());
        assert!(State::Paused.after(Verb::Exec).is_err());
        assert_eq!(State::Running.after(Verb::Exec), Ok(State::Running));
    }

    #[test]
    fn a_running_container_cannot_be_deleted() {
        assert!(State::Running.after(Verb::Delete).is_err());
        assert!(State::Paused.after(Verb::Delete).is_err());
    }

    #[test]
    fn a_created_or_stopped_container_can_be_deleted() {
        assert_eq!(State::Created.after(Verb::Delete), Ok(State::Deleted));
        assert_eq!(State::Stopped.after(Verb::Delete), Ok(State::Deleted));
    }

    #[test]
    fn a_paused_container_can_end() {
        assert_eq!(State::Paused.after(Verb::Exit), Ok(State::Stopped));
    }

    #[test]
    fn nothing_ends_twice() {
        assert!(State::Stopped.after(Verb::Exit).is_err());
    }
}
