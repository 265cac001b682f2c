//! What a run's end is worth: the exit code and the words. Pure.
//!
//! The truth about a VM is its process. A command whose exit the agent told has that exit. A VMM that was killed takes
//! the command with it: 137. Any other end of the machine leaves the command's exit unknown: 255. What fails before the
//! command ran is ours: 125, or 126 and 127 as a shell has them. Never 0 by default.

use crate::vm::agent::AgentError;
use crate::vm::{Ended, How};
use capsid_protocol::exit::VmmExit;
use std::time::Duration;

/// An error of ours, as docker's.
pub(crate) const OURS: u8 = 125;
/// A command whose exit nobody knows.
const UNKNOWN: u8 = 255;
/// A command killed together with its VMM.
const KILLED: u8 = 137;
/// Most lines of a VMM's last words that are shown.
const WORDS_MAX_LINES: usize = 40;

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
    let code = match (is_running, ended.how) {
        (false, _) => OURS,
        (true, How::Signal(_) | How::Exit(VmmExit::Stopped)) => KILLED,
        (true, _) => UNKNOWN,
    };
    Verdict {
        code,
        reason: Some(describe(ended, is_running)),
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
    let mut reason = unreached(limit);
    reason.extend(console(ended));
    Verdict::ours(reason)
}

/// The words for it.
pub(crate) fn unreached(limit: Duration) -> String {
    format!("agent not reachable in {} s", limit.as_secs())
}

/// The reason in the VMM's words, where it had any, and in ours.
fn describe(ended: &Ended, is_running: bool) -> String {
    let first = lines(ended)
        .next()
        .map(|line| line.trim_start_matches("capsid-vmm: "));
    let mut text = match (ended.how, first) {
        (How::Signal(signal), _) => format!("the VMM was killed by signal {signal}"),
        (How::Exit(VmmExit::PowerOff), _) => "the guest powered off by itself".to_owned(),
        (How::Exit(_), Some(line)) => line.to_owned(),
        (How::Exit(exit), None) => exit.describe().to_owned(),
        (How::Code(code), Some(line)) => format!("the VMM ended with code {code}: {line}"),
        (How::Code(code), None) => format!("the VMM ended with code {code}"),
    };
    if is_running {
        text.push_str("; the command's own exit is not known");
    }
    // A refused kernel is told in one line; of a guest that went down, the console says more.
    if is_of_the_guest(ended.how) {
        text.extend(console(ended));
    }
    text
}

fn lines(ended: &Ended) -> impl Iterator<Item = &str> {
    ended.words.lines().filter(|line| !line.trim().is_empty())
}

/// What follows the VMM's one line, each line on one of its own.
fn console(ended: &Ended) -> impl Iterator<Item = String> {
    let lines = lines(ended).skip(1).take(WORDS_MAX_LINES);
    lines.map(|line| format!("\n{line}"))
}

fn is_of_the_guest(how: How) -> bool {
    matches!(
        how,
        How::Exit(
            VmmExit::Reset
                | VmmExit::GuestPanic
                | VmmExit::TripleFault
                | VmmExit::KvmError
                | VmmExit::VcpuLost
                | VmmExit::Stopped
        )
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use capsid_protocol::exec_error::ExecError;

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
