//! What the agent says when it cannot go on: one line at emergency level, which reaches every console
//! whatever its loglevel, and then the end of PID 1. The kernel panics, the VMM sees it, and the host
//! reads the line in the last console output. Nothing here waits.

use std::fs::OpenOptions;
use std::io::Write;

/// Longest line in bytes; the kernel cuts a record at about 1 KiB (LOG_LINE_MAX, kernel/printk).
const LINE_MAX_BYTES: usize = 900;

/// printk level "emergency" (include/linux/kern_levels.h).
const EMERGENCY: u8 = 0;
/// printk level "warning": into the ring, not on the console of a quiet boot.
const WARNING: u8 = 4;

/// Says why and ends the process, which for PID 1 is a kernel panic: the wanted truth.
pub fn die(why: &dyn std::error::Error) -> ! {
    die_saying(&chain(why))
}

/// As [`die`], for a text.
pub fn die_saying(why: &str) -> ! {
    say(EMERGENCY, why);
    std::process::exit(1)
}

/// Leaves a line in the kernel's log for whoever looks later.
pub fn warn(what: &str) {
    say(WARNING, what);
}

/// Makes a panic of the agent say its reason on the console, too.
pub fn on_panic() {
    std::panic::set_hook(Box::new(|info| say(EMERGENCY, &info.to_string())));
}

/// The error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

fn say(level: u8, text: &str) {
    let line = line(level, text);
    let kmsg = OpenOptions::new().write(true).open("/dev/kmsg");
    // Not PID 1 of a guest (a test): stderr is the console.
    if std::process::id() != 1 || kmsg.and_then(|mut k| k.write_all(line.as_bytes())).is_err() {
        eprint!("{}", line.trim_start_matches(['<', '0', '4', '>']));
    }
}

/// One record: no control characters, bounded, cut between characters.
fn line(level: u8, text: &str) -> String {
    let mut line = format!("<{level}>capsid-agent: ");
    for c in text.chars() {
        if line.len() + c.len_utf8() > LINE_MAX_BYTES {
            break;
        }
        line.push(if c.is_control() { ' ' } else { c });
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_stays_one_line() {
        assert_eq!(line(0, "a\nb\x1b[1m"), "<0>capsid-agent: a b [1m\n");
    }

    #[test]
    fn a_long_line_is_cut_between_characters() {
        let line = line(0, &"ä".repeat(LINE_MAX_BYTES));
        assert!(line.len() <= LINE_MAX_BYTES + 1);
        assert!(line.ends_with("ä\n"));
    }

    #[test]
    fn causes_follow_their_error() {
        #[derive(Debug, thiserror::Error)]
        #[error("mounting /proc")]
        struct Mounting(#[source] std::io::Error);
        let text = chain(&Mounting(std::io::ErrorKind::NotFound.into()));
        assert_eq!(text, "mounting /proc: entity not found");
    }
}
