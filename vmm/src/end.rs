//! How a run ends: the first reason wins, and the main thread is woken to act on it.

use capsid_protocol::exit::VmmExit;
use std::fmt::Display;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Why a run ended: the exit code, and the line that says more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// The reason as the owner reads it.
    pub exit: VmmExit,
    /// One line for the person.
    pub why: String,
}

impl End {
    /// An end with a line of its own.
    pub fn new(exit: VmmExit, why: impl Display) -> End {
        End {
            exit,
            why: why.to_string(),
        }
    }

    /// An end whose reason is an error: its chain of causes joined by ": ".
    pub fn from_error(exit: VmmExit, error: &dyn std::error::Error) -> End {
        End {
            exit,
            why: in_full(error),
        }
    }
}

/// An error with its causes, joined by ": ".
pub fn in_full(error: &dyn std::error::Error) -> String {
    let mut why = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        why.push_str(": ");
        why.push_str(&error.to_string());
        cause = error.source();
    }
    why
}

/// Where any thread reports an end. Cheap, never blocks, and keeps only the first.
#[derive(Clone)]
pub struct Ends(Arc<Shared>);

struct Shared {
    first: Mutex<Option<End>>,
    wake: EventFd,
}

impl Ends {
    /// Nothing has ended yet.
    ///
    /// # Errors
    /// The kernel gave no eventfd.
    pub fn new() -> io::Result<Ends> {
        Ok(Ends(Arc::new(Shared {
            first: Mutex::new(None),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })))
    }

    /// Reports an end and wakes the main thread; later reports are dropped.
    pub fn report(&self, end: End) {
        let mut first = self.0.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            *first = Some(end);
            // Fails only when the counter is full, and then the main thread is awake anyway.
            let _ = self.0.wake.write(1);
        }
    }

    /// The end, if one was reported.
    pub fn get(&self) -> Option<End> {
        self.0
            .first
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl AsRawFd for Ends {
    fn as_raw_fd(&self) -> RawFd {
        self.0.wake.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] io::Error);

    #[test]
    fn the_first_end_wins_and_wakes_once() {
        let ends = Ends::new().unwrap();
        assert_eq!(ends.get(), None);
        ends.report(End::new(VmmExit::Reset, "first"));
        ends.report(End::new(VmmExit::GuestPanic, "second"));
        assert_eq!(ends.get().unwrap().why, "first");
        assert_eq!(ends.0.wake.read().unwrap(), 1);
    }

    #[test]
    fn an_error_becomes_one_line_with_its_causes() {
        let error = Outer(io::Error::other("inner"));
        assert_eq!(End::from_error(VmmExit::Device, &error).why, "outer: inner");
    }
}
