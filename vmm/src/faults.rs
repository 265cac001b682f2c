//! What goes wrong on the host while a VM runs, as lines on stderr: few, however often it happens.
//!
//! Trusts that nobody else writes much to the same stderr: between the look whether there is room and the line another writer may take
//! it. A line for which there is no room is lost; the devices' counters have all of it.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::fmt::Display;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Least time between two lines of a VM, in s.
pub const LINE_INTERVAL_S: u64 = 10;

/// The lines of one VM.
#[derive(Debug, Default)]
pub struct FaultLines(Mutex<Told>);

#[derive(Debug, Default)]
struct Told {
    last: Option<Instant>,
    /// Faults since, of which nothing was said.
    unsaid: u64,
}

impl FaultLines {
    /// Says `fault` if it is time for a line.
    pub fn note(&self, fault: &dyn Display) {
        let mut told = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(line) = told.line(fault, Instant::now()) {
            say(&line);
        }
    }
}

impl Told {
    fn line(&mut self, fault: &dyn Display, now: Instant) -> Option<String> {
        let interval = Duration::from_secs(LINE_INTERVAL_S);
        if self.last.is_some_and(|last| now < last + interval) {
            self.unsaid += 1;
            return None;
        }
        self.last = Some(now);
        Some(match std::mem::take(&mut self.unsaid) {
            0 => format!("capsid-vmm: {fault}; the guest was told of an I/O error\n"),
            more => format!(
                "capsid-vmm: {fault}; the guest was told of an I/O error, and of {more} since the last such line\n"
            ),
        })
    }
}

/// Writes one line if it does not have to wait for it.
fn say(line: &str) {
    let stderr = rustix::stdio::stderr();
    let mut fds = [PollFd::from_borrowed_fd(stderr, PollFlags::OUT)];
    let at_once = Timespec::default();
    if matches!(poll(&mut fds, Some(&at_once)), Ok(1..)) {
        // Without a reader there is nobody to tell.
        let _ = rustix::io::write(stderr, line.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thousand_faults_are_two_lines_of_which_the_second_counts_them() {
        let mut told = Told::default();
        let begin = Instant::now();
        let mut lines = Vec::new();
        for number in 0..1000 {
            let now = begin + Duration::from_millis(15 * number);
            lines.extend(told.line(&"disk \"a\": gone", now));
        }
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(lines[0].ends_with("an I/O error\n") && lines[1].contains("of 666 since"));
    }
}
