//! What the guest says, line by line, by the serial port. The test on the host reads it.

use crate::cpu;
use core::fmt::{self, Write};

const SERIAL: u16 = 0x3f8;

/// What came of a chapter, or of a part of it.
pub(crate) type Outcome<T = ()> = Result<T, Why>;

/// What was not as it should be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Why {
    /// What was looked at.
    what: &'static str,
    got: u64,
    wanted: u64,
    /// Which case of a chapter, with a number that tells it from its likes.
    case: Option<(&'static str, u64)>,
}

impl Why {
    /// Something that has no number.
    pub(crate) fn new(what: &'static str) -> Why {
        Why {
            what,
            got: 0,
            wanted: 0,
            case: None,
        }
    }
}

/// Adds the case to what went wrong in it.
pub(crate) trait At<T> {
    /// `case`, the `number`th of its kind.
    fn at(self, case: &'static str, number: u64) -> Outcome<T>;
}

impl<T> At<T> for Outcome<T> {
    fn at(self, case: &'static str, number: u64) -> Outcome<T> {
        self.map_err(|why| Why {
            case: why.case.or(Some((case, number))),
            ..why
        })
    }
}

/// Compares.
pub(crate) fn same(what: &'static str, got: impl Into<u64>, wanted: impl Into<u64>) -> Outcome {
    let (got, wanted) = (got.into(), wanted.into());
    if got == wanted {
        return Ok(());
    }
    Err(Why {
        what,
        got,
        wanted,
        case: None,
    })
}

/// Tells how a chapter ended.
pub(crate) fn chapter(name: &str, outcome: Outcome) {
    let _never = match outcome {
        Ok(()) => writeln!(Serial, "{name}: ok"),
        Err(Why {
            what,
            got,
            wanted,
            case,
        }) => {
            let (case, number) = case.unwrap_or(("", 0));
            writeln!(
                Serial,
                "{name}: {case} {number:#x}: {what} is {got:#x}, not {wanted:#x}"
            )
        }
    };
}

/// Says one line.
pub(crate) fn say(line: fmt::Arguments<'_>) {
    let _never = writeln!(Serial, "{line}");
}

struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        cpu::out_many(SERIAL, text.as_bytes());
        Ok(())
    }
}
