//! The guest's console in the shim's log, for who looks for a fault in a guest: only where the configuration asks for it (`debug_console`).
//!
//! The guest writes what it wants and as much. It is read to its end, so that the VMM never waits; what reaches the log is bounded.

use capsid_owner::escape::Line;
use std::fs::File;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;

/// Longest line in the log, in bytes; a longer one is cut into several.
const LINE_MAX_BYTES: usize = 512;
/// Most bytes of one guest's console that reach the log.
const COPIED_MAX_BYTES: usize = 1 << 20;
/// How much is read at once, in bytes.
const READ_BYTES: usize = 4096;

/// Copies a console to the log until its VMM is gone.
pub(crate) async fn copy(pod: String, console: File) {
    let mut console = match Receiver::from_file(console) {
        Ok(console) => console,
        Err(error) => {
            tracing::warn!(pod, %error, "the guest's console cannot be read");
            return;
        }
    };
    let mut lines = Lines::default();
    let mut bytes = [0; READ_BYTES];
    while let Ok(count @ 1..) = console.read(&mut bytes).await {
        lines.take(bytes.get(..count).unwrap_or_default(), |line| {
            tracing::info!(pod, "console: {line}");
        });
    }
}

/// What was copied, and a line that has not ended yet.
#[derive(Default)]
struct Lines {
    line: Vec<u8>,
    copied: usize,
}

impl Lines {
    fn take(&mut self, bytes: &[u8], mut say: impl FnMut(&str)) {
        for byte in bytes {
            if self.copied >= COPIED_MAX_BYTES {
                return;
            }
            self.copied += 1;
            match byte {
                b'\n' => self.end(&mut say),
                b'\r' => {}
                byte => self.line.push(*byte),
            }
            if self.line.len() >= LINE_MAX_BYTES {
                self.end(&mut say);
            }
            if self.copied == COPIED_MAX_BYTES {
                self.end(&mut say);
                say("(the guest says more, which is not copied)");
            }
        }
    }

    fn end(&mut self, say: &mut impl FnMut(&str)) {
        if !self.line.is_empty() {
            say(&Line(&self.line).to_string());
        }
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(pieces: &[&[u8]]) -> Vec<String> {
        let mut lines = Lines::default();
        let mut said = Vec::new();
        for piece in pieces {
            lines.take(piece, |line| said.push(line.to_owned()));
        }
        said
    }

    #[test]
    fn lines_are_said_when_they_end() {
        let pieces: [&[u8]; 3] = [b"[0.1] Linux\r\n\n[0.2] Co", b"mmand line\n", b"unfinished"];
        assert_eq!(said(&pieces), ["[0.1] Linux", "[0.2] Command line"]);
    }

    #[test]
    fn what_a_terminal_would_obey_is_shown() {
        assert_eq!(said(&[b"\x1b[2J\xff\n"]), ["\\u{1b}[2J\u{fffd}"]);
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let said = said(&[&[b'x'; 2 * LINE_MAX_BYTES + 1]]);
        assert_eq!(said.len(), 2);
        assert!(said.iter().all(|line| line.len() == LINE_MAX_BYTES));
    }

    #[test]
    fn a_guest_that_floods_its_console_does_not_flood_the_log() {
        let flood = [b"all work and no play\n".repeat(1000)];
        let pieces: Vec<&[u8]> = flood.iter().cycle().take(100).map(Vec::as_slice).collect();
        let said = said(&pieces);
        let bytes: usize = said.iter().map(|line| line.len() + 1).sum();
        assert!(bytes <= COPIED_MAX_BYTES + LINE_MAX_BYTES, "{bytes}");
        assert_eq!(
            said.last().map(String::as_str),
            Some("(the guest says more, which is not copied)")
        );
    }

    #[tokio::test]
    async fn a_console_is_read_to_its_end() {
        let (ours, theirs) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("a pipe");
        let guest = std::thread::spawn(move || {
            // Blocks unless somebody reads on.
            std::io::Write::write_all(&mut File::from(theirs), &vec![b'\n'; 2 * COPIED_MAX_BYTES])
        });
        copy("p1".to_owned(), File::from(ours)).await;
        guest.join().expect("a thread").expect("written");
    }
}
