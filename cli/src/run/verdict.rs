//! What a run's end is worth: the exit code and the words. Pure.
//!
//! The truth about a VM is its process. A command whose exit the agent told has that exit. A VMM that was killed takes
//! the command with it: 137. Any other end of the machine leaves the command's exit unknown: 255. What fails before the
//! command ran is ours: 125, or 126 and 127 as a shell has them. Never 0 by default.

use crate::vm::agent::AgentError;
use capsid_owner::end::{Ended, UNKNOWN};
use std::time::Duration;

/// An error of ours, as docker's.
pub(crate) const OURS: u8 = 125;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Our exit code.
    pub(crate) code: u8,
    /// What to say, if it is not just the command's exit: a line, maybe followed by the guest's console.
    pub(crate) reason: Option<String>,
}

impl Verdict {
    /// The command's own exit.
    pub(crate) fn exited(code: u8) -> Verdict {
        Verdict { code, reason: None }
    }

    /// The end by a signal to ourselves.
    pub(crate) fn signalled(signal: i32, reason: Option<String>) -> Verdict {
        let code = u8::try_from(signal.saturating_add(128)).unwrap_or(UNKNOWN);
        Verdict { code, reason }
    }

    /// An end with our own code and words.
    pub(crate) fn ours(reason: String) -> Verdict {
        Verdict {
            code: OURS,
            reason: Some(reason),
        }
    }
}

/// The machine ended before the command's exit was known.
pub(crate) fn machine_ended(ended: &Ended, is_running: bool) -> Verdict {
    if !is_running {
        return Verdict::ours(ended.reason());
    }
    let line = ended.reason_in_one_line();
    let reason = ended.reason();
    let console = reason.strip_prefix(&line).unwrap_or_default();
    Verdict {
        code: ended.how.command_exit(),
        reason: Some(format!(
            "{line}; the command's own exit is not known{console}"
        )),
    }
}

/// The agent refused or was lost, and the machine goes on.
pub(crate) fn agent_failed(error: &AgentError, is_running: bool) -> Verdict {
    let code = match error {
        AgentError::Exec { kind, .. } => kind.exit_code(),
        _ if is_running => UNKNOWN,
        _ => OURS,
    };
    Verdict {
        code,
        reason: Some(error.to_string()),
    }
}

/// The agent did not dial in time, whatever kept it, and the machine was told to end.
pub(crate) fn agent_unreached(limit: Duration, ended: &Ended) -> Verdict {
    Verdict::ours(unreached(limit) + &ended.console())
}

/// The words for it.
pub(crate) fn unreached(limit: Duration) -> String {
    format!("agent not reachable in {} s", limit.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use capsid_owner::end::How;
    use capsid_protocol::exec_error::ExecError;
    use capsid_protocol::exit::VmmExit;

    fn ended(how: How, words: &str) -> Ended {
        Ended {
            how,
            words: words.to_owned(),
            report: None,
        }
    }

    #[test]
    fn a_killed_vmm_is_137_in_one_line() {
        let verdict = machine_ended(&ended(How::Signal(9), ""), true);
        assert_eq!(verdict.code, 137);
        let reason = verdict.reason.expect("a reason");
        assert!(reason.contains("VMM was killed by signal 9") && !reason.contains('\n'));
    }

    #[test]
    fn a_guest_panic_is_255_with_the_console() {
        let words = "capsid-vmm: the guest kernel panicked: pvpanic\n  console: sysrq: crash\n";
        let verdict = machine_ended(&ended(How::Exit(VmmExit::GuestPanic), words), true);
        assert_eq!(verdict.code, 255);
        let reason = verdict.reason.expect("a reason");
        assert!(reason.starts_with("the guest kernel panicked"), "{reason}");
        assert!(reason.contains("sysrq: crash"), "{reason}");
    }

    #[test]
    fn a_vmm_that_was_told_to_stop_says_so() {
        let words = "capsid-vmm: the VM was stopped: SIGTERM, and the guest powered off\n";
        let verdict = machine_ended(&ended(How::Exit(VmmExit::Stopped), words), true);
        assert_eq!(verdict.code, 137);
        let reason = verdict.reason.expect("a reason");
        assert!(
            reason.starts_with("the VM was stopped: SIGTERM"),
            "{reason}"
        );
    }

    #[test]
    fn an_agent_that_is_not_reached_is_ours_with_the_console() {
        let words = "capsid-vmm: the VM was stopped: SIGTERM\n  console: no agent here\n";
        let ended = ended(How::Exit(VmmExit::Stopped), words);
        let verdict = agent_unreached(Duration::from_secs(7), &ended);
        assert_eq!(verdict.code, 125);
        let reason = "agent not reachable in 7 s\n  console: no agent here";
        assert_eq!(verdict.reason.as_deref(), Some(reason));
    }

    #[test]
    fn a_refused_kernel_is_ours_in_one_line() {
        let words = "capsid-vmm: the guest kernel or initramfs was refused: no PVH note\n";
        let verdict = machine_ended(&ended(How::Exit(VmmExit::BadKernel), words), false);
        assert_eq!(verdict.code, 125);
        assert_eq!(
            verdict.reason.as_deref(),
            Some("the guest kernel or initramfs was refused: no PVH note")
        );
    }

    #[test]
    fn no_end_of_a_machine_is_a_success() {
        for exit in VmmExit::ALL {
            for is_running in [false, true] {
                let verdict = machine_ended(&ended(How::Exit(exit), ""), is_running);
                assert_ne!(verdict.code, 0, "{exit:?}");
                assert!(verdict.reason.is_some_and(|reason| !reason.is_empty()));
            }
        }
        for code in [0, 1, 255] {
            assert_ne!(machine_ended(&ended(How::Code(code), ""), true).code, 0);
        }
    }

    #[test]
    fn a_command_that_cannot_be_executed_is_127_or_126() {
        for kind in [ExecError::NotFound, ExecError::NotExecutable] {
            let error = AgentError::Exec {
                kind,
                text: "x".into(),
            };
            assert_eq!(agent_failed(&error, false).code, kind.exit_code());
        }
    }

    #[test]
    fn a_signal_to_us_is_128_and_its_number() {
        assert_eq!(Verdict::signalled(2, None).code, 130);
        assert_eq!(Verdict::signalled(15, None).code, 143);
        assert_eq!(Verdict::signalled(i32::MAX, None).code, 255);
    }
}
