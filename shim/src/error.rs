//! What a call is refused with: one sentence with its causes, and the ttrpc code by which containerd decides what to do.
//!
//! The codes matter more than the words: CRI's StopContainer forgives NOT_FOUND from Kill and nothing else, a Delete that answers anything but
//! NOT_FOUND keeps the task, and CRI takes NOT_FOUND for "it is gone" everywhere.

use crate::agent::AgentError;
use crate::state::Refusal;
use std::error::Error;
use ttrpc::Code;

/// Longest text of an answered error, in bytes: the guest's last console lines are in some.
const TEXT_MAX_BYTES: usize = 16 * 1024;

/// A refusal.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct TaskError {
    code: Code,
    text: String,
}

/// A refusal with this code and these words.
pub fn refuse(code: Code, text: impl Into<String>) -> TaskError {
    let mut text: String = text.into();
    if text.len() > TEXT_MAX_BYTES {
        let end = (0..=TEXT_MAX_BYTES)
            .rev()
            .find(|&end| text.is_char_boundary(end));
        text.truncate(end.unwrap_or(0));
    }
    TaskError { code, text }
}

impl TaskError {
    /// The code.
    pub fn code(&self) -> Code {
        self.code
    }

    /// The same, with what was being done in front.
    pub fn during(self, phase: &str) -> TaskError {
        TaskError {
            code: self.code,
            text: format!("{phase}: {}", self.text),
        }
    }

    /// No such container.
    pub fn no_container(id: &str) -> TaskError {
        refuse(
            Code::NOT_FOUND,
            format!("container {} not found", shown(id)),
        )
    }

    /// No such exec.
    pub fn no_exec(container: &str, exec: &str) -> TaskError {
        let (container, exec) = (shown(container), shown(exec));
        refuse(
            Code::NOT_FOUND,
            format!("process {exec} of container {container} not found"),
        )
    }
}

/// An id of a stranger, fit for a line.
pub fn shown(id: &str) -> String {
    id.chars().take(80).flat_map(char::escape_default).collect()
}

/// An error and its causes on one line.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Some errors repeat their cause in their own words.
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

/// A failure of ours or of the host, with its causes.
pub fn internal(error: &(dyn Error + 'static)) -> TaskError {
    refuse(Code::INTERNAL, chain(error))
}

/// A request that cannot be obeyed as it is.
pub fn invalid(error: &(dyn Error + 'static)) -> TaskError {
    refuse(Code::INVALID_ARGUMENT, chain(error))
}

impl From<Refusal> for TaskError {
    fn from(refusal: Refusal) -> TaskError {
        let code = match refusal {
            Refusal::Gone => Code::NOT_FOUND,
            Refusal::Wrong { .. } => Code::FAILED_PRECONDITION,
        };
        refuse(code, refusal.to_string())
    }
}

impl From<AgentError> for TaskError {
    fn from(error: AgentError) -> TaskError {
        let code = match &error {
            AgentError::Refused { code, .. } => *code,
            AgentError::Exec { .. } => Code::INVALID_ARGUMENT,
            AgentError::Lost { .. } => Code::UNAVAILABLE,
        };
        refuse(code, error.to_string())
    }
}

impl From<TaskError> for ttrpc::Error {
    fn from(error: TaskError) -> ttrpc::Error {
        ttrpc::error::get_rpc_status(error.code, error.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_to_what_has_ended_is_not_found() {
        assert_eq!(TaskError::from(Refusal::Gone).code(), Code::NOT_FOUND);
    }

    #[test]
    fn a_chain_says_each_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot mount")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("no room"));
        assert_eq!(chain(&error), "cannot mount: no room");
    }

    #[test]
    fn a_long_text_is_cut_at_a_character() {
        let error = refuse(Code::INTERNAL, "ä".repeat(TEXT_MAX_BYTES));
        assert!(error.to_string().len() <= TEXT_MAX_BYTES);
    }

    #[test]
    fn an_id_of_a_stranger_is_escaped_and_cut() {
        let text = TaskError::no_container(&"\x1b[2J".repeat(100)).to_string();
        assert!(!text.contains('\x1b') && text.len() < 800, "{text}");
    }
}
