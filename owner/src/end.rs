//! What the end of a VMM is worth. The truth about a VM is its process: what `waitpid(2)` said beats every message. Pure.

use capsid_protocol::exit::VmmExit;
use capsid_protocol::report::MachineReport;

/// The exit of a command that nobody knows.
pub const UNKNOWN: u8 = 255;
/// The exit of a command that was killed together with its VMM.
pub const KILLED: u8 = 137;
/// Most lines of a VMM's last words that are shown.
const WORDS_MAX_LINES: usize = 40;

/// How a VMM ended.
#[derive(Debug)]
pub struct Ended {
    /// What `waitpid` said.
    pub how: How,
    /// Its stderr, printable: one line that says why, then console lines.
    pub words: String,
    /// Its report, if it wrote a good one.
    pub report: Option<MachineReport>,
}

/// The end of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// With one of the documented codes.
    Exit(VmmExit),
    /// With a code of nobody.
    Code(i32),
    /// Killed.
    Signal(i32),
}

impl How {
    /// The exit of a command that ran when its VM ended, of which nothing else is known. Never 0.
    pub fn command_exit(self) -> u8 {
        match self {
            How::Signal(_) | How::Exit(VmmExit::Stopped) => KILLED,
            How::Exit(_) | How::Code(_) => UNKNOWN,
        }
    }

    fn is_of_the_guest(self) -> bool {
        matches!(
            self,
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
}

impl Ended {
    /// The reason in the VMM's words, where it had any, and in ours: a line, maybe followed by the guest's console.
    pub fn reason(&self) -> String {
        let mut text = self.reason_in_one_line();
        // A refused kernel is told in one line; of a guest that went down, the console says more.
        if self.how.is_of_the_guest() {
            text.push_str(&self.console());
        }
        text
    }

    /// The reason without the console.
    pub fn reason_in_one_line(&self) -> String {
        let first = self.lines().next();
        let first = first.map(|line| line.trim_start_matches("capsid-vmm: "));
        match (self.how, first) {
            (How::Signal(signal), _) => format!("the VMM was killed by signal {signal}"),
            (How::Exit(VmmExit::PowerOff), _) => "the guest powered off by itself".to_owned(),
            (How::Exit(_), Some(line)) => line.to_owned(),
            (How::Exit(exit), None) => exit.describe().to_owned(),
            (How::Code(code), Some(line)) => format!("the VMM ended with code {code}: {line}"),
            (How::Code(code), None) => format!("the VMM ended with code {code}"),
        }
    }

    /// What follows the VMM's one line, each line behind a line feed.
    pub fn console(&self) -> String {
        let lines = self.lines().skip(1).take(WORDS_MAX_LINES);
        lines.map(|line| format!("\n{line}")).collect()
    }

    fn lines(&self) -> impl Iterator<Item = &str> {
        let lines = self.words.lines();
        lines.filter(|line| !line.trim().is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_end_of_a_vm_is_a_success_of_the_command_in_it() {
        for exit in VmmExit::ALL {
            assert_ne!(How::Exit(exit).command_exit(), 0, "{exit:?}");
        }
        for code in [0, 1, 255] {
            assert_eq!(How::Code(code).command_exit(), UNKNOWN);
        }
        assert_eq!(How::Signal(9).command_exit(), KILLED);
    }

    #[test]
    fn of_a_long_console_some_lines_are_shown() {
        let ended = Ended {
            how: How::Exit(VmmExit::GuestPanic),
            words: "capsid-vmm: panic\n".to_owned() + &"line\n".repeat(1000),
            report: None,
        };
        assert_eq!(ended.reason().lines().count(), 1 + WORDS_MAX_LINES);
        assert_eq!(ended.reason_in_one_line(), "panic");
    }
}
