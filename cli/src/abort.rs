//! The wish to stop, raised by a signal before the container runs and seen by every long piece of work on the way there.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

/// A shared flag: 0, or the number of the signal that asked to stop.
#[derive(Clone, Debug, Default)]
pub(crate) struct Abort(Arc<AtomicI32>);

/// Somebody asked to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stopped by signal {signal}")]
pub(crate) struct Aborted {
    /// The signal's number.
    pub(crate) signal: i32,
}

impl Abort {
    /// Raises the flag; the first signal stays.
    pub(crate) fn raise(&self, signal: i32) {
        let _already = self
            .0
            .compare_exchange(0, signal, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// Whether to go on.
    ///
    /// # Errors
    /// The flag is raised.
    pub(crate) fn check(&self) -> Result<(), Aborted> {
        match self.0.load(Ordering::Relaxed) {
            0 => Ok(()),
            signal => Err(Aborted { signal }),
        }
    }
}
