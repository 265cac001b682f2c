//! The person's terminal: its size, and raw mode that is always undone.

use std::io::{self, IsTerminal};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::testbed::frame::Size;

/// A terminal in raw mode: every key goes inside. Dropping it brings the old mode back.
#[derive(Debug)]
pub struct Raw {
    before: Termios,
}

impl Raw {
    /// Puts the terminal of our standard input into raw mode.
    ///
    /// # Errors
    /// It is no terminal.
    pub fn enter() -> io::Result<Self> {
        let before = tcgetattr(rustix::stdio::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone needs no mode.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &self.before);
    }
}

/// The size of the person's terminal, if standard input is one.
pub(crate) fn size() -> Option<Size> {
    if !io::stdin().is_terminal() {
        return None;
    }
    let size = tcgetwinsize(rustix::stdio::stdin()).ok()?;
    Some(Size {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}
