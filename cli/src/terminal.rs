//! The person's terminal: put into raw mode for a container with a terminal of its own, and restored whatever happens.
//! What was saved is kept in one place, so that the panic hook can restore it too (a release build aborts on panic and
//! runs no destructor).

use rustix::termios::{OptionalActions, Termios};
use std::io;
use std::sync::{Mutex, PoisonError};

static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Raw mode; restored when dropped.
pub(crate) struct Raw(());

impl Raw {
    /// Puts the terminal on stdin into raw mode.
    ///
    /// # Errors
    /// stdin is no terminal.
    pub(crate) fn enter() -> io::Result<Raw> {
        let stdin = rustix::stdio::stdin();
        let modes = rustix::termios::tcgetattr(stdin)?;
        let mut raw = modes.clone();
        raw.make_raw();
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(modes);
        let guard = Raw(());
        rustix::termios::tcsetattr(stdin, OptionalActions::Now, &raw)?;
        Ok(guard)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Restores the modes that [`Raw::enter`] found, once.
pub(crate) fn restore() {
    // A panic elsewhere must not be stopped by a lock that the panicking thread holds.
    let Ok(mut saved) = SAVED.try_lock() else {
        return;
    };
    if let Some(modes) = saved.take() {
        // The terminal may be gone; then there is nothing to restore.
        let _gone =
            rustix::termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &modes);
    }
}

/// Whether stdin is a terminal.
pub(crate) fn is_stdin() -> bool {
    rustix::termios::isatty(rustix::stdio::stdin())
}

/// Columns and rows of the terminal on stdout or stdin.
pub(crate) fn size() -> Option<(u16, u16)> {
    let sizes = [rustix::stdio::stdout(), rustix::stdio::stdin()];
    sizes
        .into_iter()
        .find_map(|fd| rustix::termios::tcgetwinsize(fd).ok())
        .map(|size| (size.ws_col, size.ws_row))
        .filter(|(columns, rows)| *columns > 0 && *rows > 0)
}
