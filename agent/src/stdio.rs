//! Between a process and the host: pipes or a terminal on one side, one raw stream each on the other.
//!
//! The process always gets real pipes or a pty, never the socket, so that /dev/stdout can be opened
//! again. Buffers are bounded (one per direction); a host that does not read holds the process back by
//! the pipe, not by memory. Nothing is lost at exit: an output ends when its pipe reached end of file,
//! or, if another process keeps the pipe open (a daemon started by an exec), when all that was written
//! before the exit was sent and [`OUTPUT_HOLD_MS`] passed. What such a daemon writes later is read and
//! dropped, so that it neither blocks nor dies of SIGPIPE.

use crate::stream::Stream;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::io::Interest;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

/// Bytes copied at a time; also the capacity of a pipe (pipe(7)).
const COPY_BYTES: usize = 64 * 1024;
/// How long an output that another process holds open is followed after the process ended.
pub const OUTPUT_HOLD_MS: u64 = 500;
/// CloseStdin may overtake bytes already sent on the stream; a stream silent for so long has none.
const STDIN_QUIET_MS: u64 = 50;

/// The host's ends. With a terminal only `stdin` is used, for both directions.
#[derive(Debug, Default)]
pub struct HostStreams {
    /// Host to process (a terminal: both ways).
    pub stdin: Option<Stream>,
    /// Process to host.
    pub stdout: Option<Stream>,
    /// Process to host.
    pub stderr: Option<Stream>,
}

impl HostStreams {
    /// Closes them, for a process that has none: the host reads end of file.
    pub fn end(self) {
        for output in self.stdout.iter().chain(&self.stderr) {
            output.end_writing();
        }
    }
}

/// The process's ends: what becomes its descriptors 0, 1 and 2.
#[derive(Debug)]
pub struct ProcessEnds {
    /// Descriptor 0.
    pub stdin: OwnedFd,
    /// Descriptor 1.
    pub stdout: OwnedFd,
    /// Descriptor 2.
    pub stderr: OwnedFd,
}

/// The agent's ends of the pipes, each beside its stream.
#[derive(Debug, Default)]
pub struct AgentEnds {
    stdin: Option<(Stream, OwnedFd)>,
    outputs: Vec<(OwnedFd, Stream)>,
}

/// Makes the pipes (or /dev/null where the host gave no stream), owned by the process's user: a process
/// that opens /dev/stdout again is asked for permission on the pipe.
///
/// # Errors
/// No descriptors left.
pub fn pipes(streams: HostStreams, uid: u32, gid: u32) -> io::Result<(ProcessEnds, AgentEnds)> {
    let mut agent = AgentEnds::default();
    let stdin = match streams.stdin {
        Some(stream) => {
            let (read, write) = owned_pipe(uid, gid)?;
            agent.stdin = Some((stream, write));
            read
        }
        None => null(rustix::fs::OFlags::RDONLY)?,
    };
    let mut output = |stream: Option<Stream>| match stream {
        Some(stream) => {
            let (read, write) = owned_pipe(uid, gid)?;
            agent.outputs.push((read, stream));
            Ok(write)
        }
        None => null(rustix::fs::OFlags::WRONLY),
    };
    let stdout = output(streams.stdout)?;
    let stderr = output(streams.stderr)?;
    let ends = ProcessEnds {
        stdin,
        stdout,
        stderr,
    };
    Ok((ends, agent))
}

fn owned_pipe(uid: u32, gid: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    let (uid, gid) = (
        rustix::fs::Uid::from_raw(uid),
        rustix::fs::Gid::from_raw(gid),
    );
    rustix::fs::fchown(&read, Some(uid), Some(gid))?;
    Ok((read, write))
}

fn null(flags: rustix::fs::OFlags) -> io::Result<OwnedFd> {
    let flags = flags | rustix::fs::OFlags::CLOEXEC;
    Ok(rustix::fs::open(
        "/dev/null",
        flags,
        rustix::fs::Mode::empty(),
    )?)
}

/// Three times /dev/null, for a process whose terminal comes from elsewhere.
///
/// # Errors
/// No descriptors left.
pub fn nulls() -> io::Result<ProcessEnds> {
    Ok(ProcessEnds {
        stdin: null(rustix::fs::OFlags::RDONLY)?,
        stdout: null(rustix::fs::OFlags::WRONLY)?,
        stderr: null(rustix::fs::OFlags::WRONLY)?,
    })
}

/// Closes the stdin of one process.
#[derive(Clone, Debug)]
pub struct StdinCloser(Arc<Notify>);

impl StdinCloser {
    /// Delivers end of file once what was already sent has been read.
    pub fn close(&self) {
        self.0.notify_one();
    }
}

/// The running copies of one process.
#[derive(Debug)]
pub struct Copies {
    outputs: Vec<JoinHandle<()>>,
    input: Option<JoinHandle<()>>,
    exited: watch::Sender<bool>,
    close_stdin: Arc<Notify>,
    terminal: Weak<Stream>,
}

impl Copies {
    /// Starts copying between pipes and streams.
    ///
    /// # Errors
    /// A pipe cannot be polled.
    pub fn of_pipes(ends: AgentEnds) -> io::Result<Copies> {
        let (exited, told) = watch::channel(false);
        let close_stdin = Arc::new(Notify::new());
        let mut outputs = Vec::new();
        for (pipe, stream) in ends.outputs {
            let pipe = Stream::one_way(pipe, Interest::READABLE)?;
            outputs.push(tokio::spawn(copy_output(pipe, stream, told.clone())));
        }
        let input = match ends.stdin {
            Some((stream, pipe)) => {
                let pipe = Stream::one_way(pipe, Interest::WRITABLE)?;
                let close = Arc::clone(&close_stdin);
                Some(tokio::spawn(copy_input(stream, pipe, close)))
            }
            None => None,
        };
        Ok(Copies {
            outputs,
            input,
            exited,
            close_stdin,
            terminal: Weak::new(),
        })
    }

    /// Starts copying between a terminal and its one stream; without a stream the output is dropped.
    pub fn of_terminal(master: Arc<Stream>, stream: Option<Stream>) -> Copies {
        let (exited, told) = watch::channel(false);
        let close_stdin = Arc::new(Notify::new());
        let hang_up = Arc::new(Notify::new());
        let stream = stream.map(Arc::new);
        let input = stream.clone().map(|stream| {
            let (master, close) = (Arc::clone(&master), Arc::clone(&close_stdin));
            let hang_up = Arc::clone(&hang_up);
            tokio::spawn(async move {
                pour(&stream, &master, &close).await;
                if stream.is_hung_up() {
                    hang_up.notify_one();
                }
            })
        });
        let terminal = Arc::downgrade(&master);
        let output = tokio::spawn(async move {
            let end = tokio::select! {
                end = follow(&master, stream.as_deref(), told) => end,
                () = hang_up.notified() => End::Unheard,
            };
            if let (Some(stream), End::Finished | End::Held) = (&stream, end) {
                stream.end_writing();
            }
            // The last handle of the master goes here: whatever still runs on the terminal is hung up.
        });
        Copies {
            outputs: vec![output],
            input,
            exited,
            close_stdin,
            terminal,
        }
    }

    /// The terminal's master, while it is open; nothing for pipes.
    pub fn terminal(&self) -> Weak<Stream> {
        Weak::clone(&self.terminal)
    }

    /// What closes stdin later.
    pub fn stdin_closer(&self) -> StdinCloser {
        StdinCloser(Arc::clone(&self.close_stdin))
    }

    /// The process has ended: waits until its outputs were sent and closed.
    pub async fn finish(&mut self) {
        self.exited.send_replace(true);
        for output in &mut self.outputs {
            // A copy that was cancelled or panicked has closed its stream as well.
            let _ = output.await;
        }
        if let Some(input) = self.input.take() {
            input.abort();
        }
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        for task in self.outputs.iter().chain(&self.input) {
            task.abort();
        }
    }
}

/// How following an output ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The last writer closed it.
    Finished,
    /// The process has ended, another one still has it open.
    Held,
    /// The host reads no more.
    Unheard,
}

async fn copy_output(pipe: Stream, stream: Stream, exited: watch::Receiver<bool>) {
    match follow(&pipe, Some(&stream), exited).await {
        End::Finished => stream.end_writing(),
        End::Held => {
            stream.end_writing();
            tokio::spawn(drain(pipe));
        }
        // Dropping the pipe gives the process SIGPIPE, as a reader that went away does anywhere.
        End::Unheard => {}
    }
}

async fn follow(from: &Stream, to: Option<&Stream>, mut exited: watch::Receiver<bool>) -> End {
    let mut buffer = Vec::new();
    let mut held_until = None;
    loop {
        // Read before the look at the pipe: what is empty after the exit holds nothing of the process.
        let was_exited = *exited.borrow_and_update();
        if buffer.is_empty() {
            buffer = vec![0; COPY_BYTES];
        }
        match from.try_read(&mut buffer) {
            Ok(0) => return End::Finished,
            Ok(read) => {
                let bytes = buffer.get(..read).unwrap_or_default();
                if let Some(to) = to {
                    if to.write_all(bytes).await.is_err() {
                        return End::Unheard;
                    }
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                buffer = Vec::new(); // an idle process costs no buffer
                let until = was_exited.then(|| {
                    let hold = Duration::from_millis(OUTPUT_HOLD_MS);
                    *held_until.get_or_insert_with(|| tokio::time::Instant::now() + hold)
                });
                if wait_for_more(from, until, &mut exited).await == More::No {
                    return End::Held;
                }
            }
            // EIO: every slave side of the terminal is closed (pty(7)).
            Err(_) => return End::Finished,
        }
    }
}

#[derive(PartialEq, Eq)]
enum More {
    Maybe,
    No,
}

async fn wait_for_more(
    from: &Stream,
    held_until: Option<tokio::time::Instant>,
    exited: &mut watch::Receiver<bool>,
) -> More {
    match held_until {
        Some(until) => match tokio::time::timeout_at(until, from.readable()).await {
            Ok(_) => More::Maybe,
            Err(_) => More::No,
        },
        None => {
            tokio::select! {
                _ = from.readable() => {}
                _ = exited.changed() => {}
            }
            More::Maybe
        }
    }
}

/// Reads and drops what a process left behind still writes.
async fn drain(pipe: Stream) {
    let mut buffer = vec![0; 4096];
    while matches!(pipe.read(&mut buffer).await, Ok(1..)) {}
}

async fn copy_input(stream: Stream, pipe: Stream, close: Arc<Notify>) {
    pour(&stream, &pipe, &close).await;
    stream.end_reading();
}

/// Copies until the host's end, a broken pipe, or `close`. Never stopped between a read and its write.
async fn pour(from: &Stream, to: &Stream, close: &Notify) {
    let mut buffer = Vec::new();
    let mut closing = false;
    loop {
        if buffer.is_empty() {
            buffer = vec![0; COPY_BYTES];
        }
        match from.try_read(&mut buffer) {
            Ok(0) => return,
            Ok(read) => {
                let bytes = buffer.get(..read).unwrap_or_default();
                if to.write_all(bytes).await.is_err() {
                    return;
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                buffer = Vec::new(); // an idle stream costs no buffer
                if closing {
                    // What was sent before CloseStdin may still be on its way to this stream.
                    let quiet = Duration::from_millis(STDIN_QUIET_MS);
                    if tokio::time::timeout(quiet, from.readable()).await.is_err() {
                        return;
                    }
                } else {
                    tokio::select! {
                        _ = from.readable() => {}
                        () = close.notified() => closing = true,
                    }
                }
            }
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn stream() -> (UnixStream, Stream) {
        let (host, guest) = UnixStream::pair().expect("a socket pair");
        host.set_nonblocking(false).expect("blocking");
        (host, Stream::new(guest.into()).expect("a stream"))
    }

    fn me() -> (u32, u32) {
        let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
        (uid.as_raw(), gid.as_raw())
    }

    fn output_only() -> (UnixStream, ProcessEnds, Copies) {
        let (host, guest) = stream();
        let streams = HostStreams {
            stdout: Some(guest),
            ..HostStreams::default()
        };
        let (process, agent) = pipes(streams, me().0, me().1).expect("pipes");
        (host, process, Copies::of_pipes(agent).expect("copies"))
    }

    async fn read_to_end(mut host: UnixStream) -> Vec<u8> {
        let read = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            host.read_to_end(&mut all).map(|_| all)
        });
        read.await.expect("joins").expect("reads")
    }

    #[tokio::test]
    async fn every_byte_written_before_the_exit_arrives() {
        let (host, process, mut copies) = output_only();
        let sent: Vec<u8> = (0..1_000_000u32).map(|n| n as u8).collect();
        let mut stdout = std::fs::File::from(process.stdout);
        let bytes = sent.clone();
        let writer = tokio::task::spawn_blocking(move || stdout.write_all(&bytes));
        let reader = tokio::spawn(read_to_end(host));
        writer.await.expect("joins").expect("writes");
        copies.finish().await;
        assert!(reader.await.expect("joins") == sent);
    }

    #[tokio::test]
    async fn an_output_held_by_another_process_ends_after_the_hold() {
        let (host, process, mut copies) = output_only();
        let held = process.stdout.try_clone().expect("a second writer");
        let mut stdout = std::fs::File::from(process.stdout);
        stdout.write_all(b"last words").expect("room");
        drop(stdout);
        let begun = std::time::Instant::now();
        copies.finish().await;
        assert!(begun.elapsed() >= Duration::from_millis(OUTPUT_HOLD_MS));
        assert_eq!(read_to_end(host).await, b"last words");
        // The daemon that kept it may go on writing.
        std::fs::File::from(held)
            .write_all(b"dropped")
            .expect("no SIGPIPE");
    }

    #[tokio::test]
    async fn half_close_of_the_stream_is_the_end_of_stdin() {
        let (mut host, guest) = stream();
        let streams = HostStreams {
            stdin: Some(guest),
            ..HostStreams::default()
        };
        let (process, agent) = pipes(streams, me().0, me().1).expect("pipes");
        let _copies = Copies::of_pipes(agent).expect("copies");
        host.write_all(b"hello").expect("room");
        host.shutdown(std::net::Shutdown::Write)
            .expect("half close");
        let stdin = std::fs::File::from(process.stdin);
        let read = tokio::task::spawn_blocking(move || std::io::read_to_string(stdin));
        assert_eq!(read.await.expect("joins").expect("reads"), "hello");
    }

    #[tokio::test]
    async fn close_stdin_delivers_what_was_sent_first() {
        let (mut host, guest) = stream();
        let streams = HostStreams {
            stdin: Some(guest),
            ..HostStreams::default()
        };
        let (process, agent) = pipes(streams, me().0, me().1).expect("pipes");
        let copies = Copies::of_pipes(agent).expect("copies");
        host.write_all(b"hello").expect("room");
        copies.stdin_closer().close();
        let stdin = std::fs::File::from(process.stdin);
        let read = tokio::task::spawn_blocking(move || std::io::read_to_string(stdin));
        assert_eq!(read.await.expect("joins").expect("reads"), "hello");
    }

    #[tokio::test]
    async fn a_host_that_hangs_up_breaks_the_pipe() {
        let (host, process, mut copies) = output_only();
        drop(host);
        let mut stdout = std::fs::File::from(process.stdout);
        let write = tokio::task::spawn_blocking(move || {
            (0..1000).find_map(|_| stdout.write_all(&[0; COPY_BYTES]).err())
        });
        let error = write.await.expect("joins").expect("the pipe breaks");
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        copies.finish().await;
    }
}
