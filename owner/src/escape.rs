//! Bytes of a stranger (an image, the guest, its agent, the VMM's console) made fit for a terminal or a log: capped,
//! and with every control character shown instead of sent.

use std::fmt;

/// Most characters of a name or a message of a stranger that are shown.
pub const SHOWN_MAX_CHARS: usize = 512;

/// Shows bytes on one line: control characters as `\n`, `\u{1b}` and so on, at most [`SHOWN_MAX_CHARS`].
pub struct Line<'a>(pub &'a [u8]);

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = String::from_utf8_lossy(self.0);
        let mut chars = text.chars();
        for c in chars.by_ref().take(SHOWN_MAX_CHARS) {
            if is_unprintable(c) {
                write!(f, "{}", c.escape_default())?;
            } else {
                write!(f, "{c}")?;
            }
        }
        if chars.next().is_some() {
            write!(f, "…")?;
        }
        Ok(())
    }
}

/// Bytes of a console: lines stay lines and tabs stay tabs, carriage returns go, every other control character is shown
/// as `\u{..}`. The caller bounds the length.
pub fn console(bytes: &[u8]) -> String {
    let mut shown = String::with_capacity(bytes.len());
    for c in String::from_utf8_lossy(bytes).chars() {
        match c {
            '\n' | '\t' => shown.push(c),
            '\r' => {}
            c if is_unprintable(c) => shown.extend(c.escape_default()),
            c => shown.push(c),
        }
    }
    shown
}

/// Control characters, and the bidirectional overrides that make a text read as another.
fn is_unprintable(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_escape_sequence_is_shown_and_not_sent() {
        assert_eq!(Line(b"\x1b[2Jhi\n").to_string(), "\\u{1b}[2Jhi\\n");
    }

    #[test]
    fn a_long_text_is_cut() {
        let shown = Line(&[b'x'; 10_000]).to_string();
        assert_eq!(shown.chars().count(), SHOWN_MAX_CHARS + 1);
    }

    #[test]
    fn a_console_keeps_its_lines() {
        assert_eq!(console(b"a\r\n\tb\x07\n"), "a\n\tb\\u{7}\n");
    }

    proptest! {
        #[test]
        fn no_control_character_gets_through(bytes: Vec<u8>) {
            prop_assert!(!Line(&bytes).to_string().chars().any(char::is_control));
            prop_assert!(!console(&bytes).chars().any(|c| c.is_control() && c != '\n' && c != '\t'));
        }
    }
}
