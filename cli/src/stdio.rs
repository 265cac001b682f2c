//! Bytes between our standard streams and the container's, on a thread for each direction. Nothing is buffered beyond
//! one read, so that what was read is written before the end is told.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Most bytes of one read.
const COPY_BYTES: usize = 256 * 1024;

/// What a pump has done so far.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    bytes: AtomicU64,
}

impl Progress {
    /// Bytes written.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }
}

/// How an output ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum OutputEnd {
    /// All of it was written.
    Whole,
    /// Our reader is gone, and the container was told so.
    NobodyReads,
    /// Our output cannot be written.
    Failed(Errno),
}

/// Copies the container's output to `to` until its end; `first` is called at the first byte. When nobody reads any
/// more, the stream is closed, so that the container's writer gets its SIGPIPE as it would in a pipeline.
pub(crate) fn output(
    from: &UnixStream,
    to: BorrowedFd<'_>,
    progress: &Arc<Progress>,
    first: impl FnOnce(),
) -> OutputEnd {
    let mut buffer = vec![0u8; COPY_BYTES];
    let mut first = Some(first);
    loop {
        let count = match read(from.as_fd(), &mut buffer) {
            // The VMM is gone or the guest has reset the stream: the end all the same.
            Ok(0) | Err(_) => return OutputEnd::Whole,
            Ok(count) => count,
        };
        if let Some(first) = first.take() {
            first();
        }
        match write_all(to, buffer.get(..count).unwrap_or_default(), progress) {
            Ok(()) => {}
            Err(error) => {
                // Fails only where it is closed already.
                let _closed = from.shutdown(Shutdown::Both);
                return match error {
                    Errno::PIPE => OutputEnd::NobodyReads,
                    error => OutputEnd::Failed(error),
                };
            }
        }
    }
}

/// Copies our input to the container until its end, and then closes the container's (unless it is a terminal, which has
/// no end of its own).
pub(crate) fn input(from: BorrowedFd<'_>, to: &UnixStream, half_close: bool) {
    let mut buffer = vec![0u8; COPY_BYTES];
    let progress = Arc::new(Progress::default());
    loop {
        match read(from, &mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(count) => {
                let bytes = buffer.get(..count).unwrap_or_default();
                if write_all(to.as_fd(), bytes, &progress).is_err() {
                    return; // the container reads no more
                }
            }
        }
    }
    if half_close {
        // Fails only where it is closed already.
        let _closed = to.shutdown(Shutdown::Write);
    }
}

/// Reads; waits where somebody made the descriptor non-blocking.
fn read(from: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize, Errno> {
    loop {
        match rustix::io::read(from, &mut *buffer) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(from, PollFlags::IN)?,
            result => return result,
        }
    }
}

fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8], progress: &Progress) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(count) => {
                bytes = bytes.get(count..).unwrap_or_default();
                progress.bytes.fetch_add(count as u64, Ordering::Relaxed);
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(to, PollFlags::OUT)?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn wait(fd: BorrowedFd<'_>, flags: PollFlags) -> Result<(), Errno> {
    match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Writes a short message whole; for headers.
///
/// # Errors
/// The other end is gone.
pub(crate) fn send(to: &UnixStream, bytes: &[u8]) -> io::Result<()> {
    Ok(write_all(to.as_fd(), bytes, &Progress::default())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::thread;

    fn progress() -> Arc<Progress> {
        Arc::default()
    }

    #[test]
    fn every_byte_of_the_output_is_written_before_its_end_is_told() {
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        let (mut read, write) = io::pipe().expect("a pipe");
        let sent: Vec<u8> = (0..4_000_003u32).map(|n| (n % 251) as u8).collect();
        let expected = sent.clone();
        thread::spawn(move || theirs.write_all(&sent).expect("read by the pump"));
        let reader = thread::spawn(move || {
            let mut got = Vec::new();
            read.read_to_end(&mut got).expect("a pipe");
            got
        });
        let progress = progress();
        assert_eq!(
            output(&ours, write.as_fd(), &progress, || {}),
            OutputEnd::Whole
        );
        drop(write);
        assert!(reader.join().expect("the reader") == expected);
        assert_eq!(progress.bytes(), 4_000_003);
    }

    #[test]
    fn an_output_that_nobody_reads_closes_the_container_s_stream() {
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        let (read, write) = io::pipe().expect("a pipe");
        drop(read);
        theirs.write_all(b"x").expect("buffered");
        let end = output(&ours, write.as_fd(), &progress(), || {});
        assert_eq!(end, OutputEnd::NobodyReads);
        assert!(theirs.write_all(b"y").is_err());
    }

    #[test]
    fn a_full_disk_is_told() {
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        let full = std::fs::File::options()
            .write(true)
            .open("/dev/full")
            .expect("/dev/full");
        theirs.write_all(b"x").expect("buffered");
        let end = output(&ours, full.as_fd(), &progress(), || {});
        assert_eq!(end, OutputEnd::Failed(Errno::NOSPC));
    }

    #[test]
    fn the_end_of_the_input_is_the_end_of_the_container_s() {
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        let (read, mut write) = io::pipe().expect("a pipe");
        write.write_all(b"twelve bytes").expect("buffered");
        drop(write);
        input(read.as_fd(), &ours, true);
        let mut got = String::new();
        theirs.read_to_string(&mut got).expect("half closed");
        assert_eq!(got, "twelve bytes");
    }
}
