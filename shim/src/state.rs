//! The life of a task's process, as one table: which verb may come when, and what it leaves behind. Pure. `docs/lifecycle.md` draws it.
//!
//! A container's init and an exec have the same life; an exec is never paused by itself, it is when its container is.

use std::fmt;

/// Where a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It is known and does not run.
    Created,
    /// A Start is under way.
    Starting,
    /// It runs.
    Running,
    /// Its container is frozen.
    Paused,
    /// It ended; its exit is known.
    Stopped,
    /// A Delete is under way; the process is as good as gone.
    Deleting,
}

/// What is asked of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// Begin to start it.
    Start,
    /// It was started.
    Started,
    /// It could not be started, and may be tried again.
    NotStarted,
    /// Send a signal. It only asks: the process ends by `Exit`.
    Kill,
    /// Add an exec to it.
    Exec,
    /// Freeze it.
    Pause,
    /// Let it go on.
    Resume,
    /// Change its limits.
    Update,
    /// It has ended.
    Exit,
    /// Forget it.
    Delete,
}

/// Why a verb was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It has ended: the one answer that a caller who wants it dead forgives.
    #[error("process already finished")]
    Gone,
    /// The verb does not fit the state.
    #[error("cannot {verb} a task that is {at}")]
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
    /// [`Refusal::Gone`] for a signal or new limits to what has ended, else [`Refusal::Wrong`].
    pub fn after(self, verb: Verb) -> Result<State, Refusal> {
        use State::{Created, Deleting, Paused, Running, Starting, Stopped};
        match (self, verb) {
            (Created, Verb::Start) => Ok(Starting),
            (Starting, Verb::Started) => Ok(Running),
            (Starting, Verb::NotStarted) => Ok(Created),
            (Running, Verb::Exec) => Ok(Running),
            (Running, Verb::Pause) => Ok(Paused),
            (Paused, Verb::Resume) => Ok(Running),
            (Created | Starting | Running | Paused, Verb::Kill | Verb::Update) => Ok(self),
            (Stopped | Deleting, Verb::Kill | Verb::Update) => Err(Refusal::Gone),
            (Created | Starting | Running | Paused, Verb::Exit) => Ok(Stopped),
            // It ended while it was being started or frozen: that stays the truth.
            (Stopped, Verb::Started | Verb::NotStarted | Verb::Exit) => Ok(Stopped),
            (Deleting, Verb::Exit) => Ok(Deleting),
            (Created | Stopped, Verb::Delete) => Ok(Deleting),
            (at, verb) => Err(Refusal::Wrong { at, verb }),
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Created => "created",
            State::Starting => "being started",
            State::Running => "running",
            State::Paused => "paused",
            State::Stopped => "stopped",
            State::Deleting => "being deleted",
        })
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verb::Start | Verb::Started | Verb::NotStarted => "start",
            Verb::Kill => "kill",
            Verb::Exec => "exec in",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::Update => "update",
            Verb::Exit => "end",
            Verb::Delete => "delete",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [State; 6] = [
        State::Created,
        State::Starting,
        State::Running,
        State::Paused,
        State::Stopped,
        State::Deleting,
    ];

    #[test]
    fn kill_after_exit_is_gone() {
        for at in [State::Stopped, State::Deleting] {
            assert_eq!(at.after(Verb::Kill), Err(Refusal::Gone));
        }
    }

    #[test]
    fn whatever_lives_can_be_killed_and_can_end() {
        for at in [
            State::Created,
            State::Starting,
            State::Running,
            State::Paused,
        ] {
            assert_eq!(at.after(Verb::Kill), Ok(at));
            assert_eq!(at.after(Verb::Exit), Ok(State::Stopped));
        }
    }

    #[test]
    fn an_end_is_never_refused_and_never_undone() {
        for at in ALL {
            let after = at.after(Verb::Exit).expect("the kernel asks nobody");
            for verb in [Verb::Started, Verb::NotStarted, Verb::Resume, Verb::Start] {
                let later = after.after(verb).unwrap_or(after);
                assert_eq!(later, after, "{verb:?} after the end of one that was {at}");
            }
        }
    }

    #[test]
    fn what_runs_is_not_deleted() {
        for at in [State::Starting, State::Running, State::Paused] {
            assert!(at.after(Verb::Delete).is_err());
        }
        for at in [State::Created, State::Stopped] {
            assert_eq!(at.after(Verb::Delete), Ok(State::Deleting));
        }
    }

    #[test]
    fn a_second_start_is_wrong() {
        for at in [State::Starting, State::Running, State::Stopped] {
            assert!(matches!(at.after(Verb::Start), Err(Refusal::Wrong { .. })));
        }
    }

    #[test]
    fn a_refusal_reads_as_a_sentence() {
        let refusal = State::Paused.after(Verb::Exec).expect_err("frozen");
        assert_eq!(refusal.to_string(), "cannot exec in a task that is paused");
    }
}
