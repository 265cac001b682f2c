//! The last bytes that the guest wrote, for the message that says why it failed. Bounded, and hostile: what
//! is printed of it is escaped, so that no guest moves a cursor or forges a line.

use std::collections::VecDeque;

/// How much is kept, in bytes.
pub const CONSOLE_RING_BYTES: usize = 64 * 1024;
/// Longest line that is given out, in characters.
pub const CONSOLE_LINE_MAX_CHARS: usize = 512;

/// Grows as the guest writes, so a silent guest costs nothing.
#[derive(Default)]
pub(super) struct Ring {
    bytes: VecDeque<u8>,
}

impl Ring {
    pub(super) fn push(&mut self, byte: u8) {
        if self.bytes.len() >= CONSOLE_RING_BYTES {
            self.bytes.pop_front();
        }
        self.bytes.push_back(byte);
    }

    /// The last `lines` lines that are not empty, oldest first. The first byte of the ring may be in the
    /// middle of a line or of a character; both are shown as they are.
    pub(super) fn last_lines(&self, lines: usize) -> Vec<String> {
        let (front, back) = self.bytes.as_slices();
        let bytes = [front, back].concat();
        let mut found: Vec<String> = bytes
            .rsplit(|byte| *byte == b'\n')
            .map(|line| line.strip_suffix(b"\r").unwrap_or(line))
            .filter(|line| !line.is_empty())
            .take(lines)
            .map(printable)
            .collect();
        found.reverse();
        found
    }
}

fn printable(line: &[u8]) -> String {
    let mut text = String::new();
    // A character is at most 4 bytes long, so this is enough of the line.
    let head = line.get(..4 * CONSOLE_LINE_MAX_CHARS).unwrap_or(line);
    let mut count = 0;
    for chunk in head.utf8_chunks() {
        for char in chunk.valid().chars() {
            if count == CONSOLE_LINE_MAX_CHARS {
                text.push('…');
                return text;
            }
            // Tabs are plain; other control and format characters (bidi, line separators) are not.
            if char == '\t' {
                text.push(' ');
            } else if char.is_control() || is_format(char) {
                text.extend(char.escape_unicode());
            } else {
                text.push(char);
            }
            count += 1;
        }
        for byte in chunk.invalid() {
            if count == CONSOLE_LINE_MAX_CHARS {
                text.push('…');
                return text;
            }
            text.push_str(&format!("\\x{byte:02x}"));
            count += 1;
        }
    }
    if head.len() < line.len() {
        text.push('…');
    }
    text
}

/// Characters without a shape that change how others are shown: zero-width, bidi controls, separators.
fn is_format(char: char) -> bool {
    matches!(char,
        '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ring(bytes: &[u8]) -> Ring {
        let mut ring = Ring::default();
        bytes.iter().for_each(|byte| ring.push(*byte));
        ring
    }

    #[test]
    fn the_last_lines_come_oldest_first_without_empty_ones() {
        let ring = ring(b"one\r\ntwo\n\r\n\nthree");
        assert_eq!(ring.last_lines(2), ["two", "three"]);
        assert_eq!(ring.last_lines(9), ["one", "two", "three"]);
        assert!(ring.last_lines(0).is_empty());
    }

    #[test]
    fn what_could_move_a_cursor_is_escaped() {
        // V18.
        let ring = ring(b"\x1b[2J\x07red\tdone\xff\xc3\xa4\xe2\x80\xae");
        assert_eq!(
            ring.last_lines(1),
            ["\\u{1b}[2J\\u{7}red done\\xff\u{e4}\\u{202e}"]
        );
    }

    #[test]
    fn a_long_line_is_cut() {
        let line = ring(&[b'x'; 5000]).last_lines(1).remove(0);
        assert_eq!(line.chars().count(), CONSOLE_LINE_MAX_CHARS + 1);
        assert!(line.ends_with('…'));
    }

    #[test]
    fn a_gigabyte_leaves_the_last_64_kib() {
        let mut ring = Ring::default();
        for _ in 0..3 {
            for at in 0..CONSOLE_RING_BYTES {
                ring.push(b'a' + (at % 26) as u8);
            }
        }
        assert_eq!(ring.bytes.len(), CONSOLE_RING_BYTES);
        assert!(ring.bytes.capacity() <= 2 * CONSOLE_RING_BYTES);
    }

    proptest! {
        #[test]
        fn whatever_the_guest_wrote_prints_as_short_harmless_lines(
            bytes in proptest::collection::vec(any::<u8>(), 0..4000)
        ) {
            for line in ring(&bytes).last_lines(50) {
                prop_assert!(line.chars().all(|char| !char.is_control() && !is_format(char)));
                prop_assert!(line.len() <= 12 * (CONSOLE_LINE_MAX_CHARS + 1));
            }
        }
    }
}
