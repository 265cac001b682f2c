//! Bytes between our standard streams and the container's, on a thread for each direction. Nothing is buffered beyond
//! one read, so that what was read is written before the end is told.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Most bytes of one read.
const COPY_BYTES: usize = 256 * 1024;

/// What a pump waits for, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waits {
    /// The guest's next byte.
    Guest(Instant),
    /// Our reader, who has not taken all that came; since he last took some of it.
    Reader(Instant),
}

/// What a pump does now.
#[derive(Debug)]
pub(crate) struct Progress(Mutex<Waits>);

impl Default for Progress {
    fn default() -> Progress {
        Progress(Mutex::new(Waits::Guest(Instant::now())))
    }
}

impl Progress {
    /// What it waits for.
    pub(crate) fn waits(&self) -> Waits {
        *self.state()
    }

    fn reader_s_turn(&self) {
        *self.state() = Waits::Reader(Instant::now());
    }

    fn guest_s_turn(&self) {
        *self.state() = Waits::Guest(Instant::now());
    }

    fn state(&self) -> MutexGuard<'_, Waits> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
        progress.reader_s_turn();
        let bytes = buffer.get(..count).unwrap_or_default();
        let written = write_all(to, bytes, || progress.reader_s_turn());
        progress.guest_s_turn();
        match written {
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
    loop {
        match read(from, &mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(count) => {
                let bytes = buffer.get(..count).unwrap_or_default();
                if write_all(to.as_fd(), bytes, || {}).is_err() {
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

/// Writes all of `bytes`; `moved` is called whenever some of them were taken.
fn write_all(to: BorrowedFd<'_>, mut bytes: &[u8], moved: impl Fn()) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(count) => {
                bytes = bytes.get(count..).unwrap_or_default();
                moved();
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
    Ok(write_all(to.as_fd(), bytes, || {})?)
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
        let end = output(&ours, write.as_fd(), &progress(), || {});
        assert_eq!(end, OutputEnd::Whole);
        drop(write);
        assert!(reader.join().expect("the reader") == expected);
    }

    #[test]
    fn while_our_reader_is_slow_it_is_he_who_is_waited_for() {
        let (ours, mut theirs) = UnixStream::pair().expect("sockets");
        let (mut read, write) = io::pipe().expect("a pipe");
        let whole = rustix::pipe::fcntl_getpipe_size(&write).expect("a pipe");
        rustix::pipe::fcntl_setpipe_size(&write, 4096).expect("a smaller pipe");
        let size = rustix::pipe::fcntl_getpipe_size(&write).expect("a pipe");
        assert!(size < whole);
        let progress = progress();
        assert!(matches!(progress.waits(), Waits::Guest(_)));
        let (of_pump, sent) = (Arc::clone(&progress), size * 3);
        let pump = thread::spawn(move || output(&ours, write.as_fd(), &of_pump, || {}));
        theirs.write_all(&vec![7; sent]).expect("buffered");
        // The pipe is full when its size can be read of it, and the pump has more in hand.
        let mut byte = [0];
        read.read_exact(&mut byte).expect("the first byte");
        while rustix::io::ioctl_fionread(&read).expect("a pipe") < size as u64 - 1 {
            thread::yield_now();
        }
        assert!(matches!(progress.waits(), Waits::Reader(_)));
        let mut rest = vec![0; sent - 1];
        read.read_exact(&mut rest).expect("the rest");
        drop(theirs);
        assert_eq!(pump.join().expect("the pump"), OutputEnd::Whole);
        assert!(matches!(progress.waits(), Waits::Guest(_)));
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
