//! The copies between the host's ends and the guest's, one task for each direction.
//!
//! ```text
//! input:   fifo --> stream         ends with the fifo's last writer, ourselves among them until CloseIO; then the stream is half-closed
//! outputs: stream --> fifo|file|logger     end with the stream
//! ```
//! What the host cannot take is dropped and said, so that a full disk or a dead logger neither ends nor blocks a container; one who just does
//! not read blocks it, as with any pipe. After the process's end [`Pumps::outputs_done`] waits for the rest, but for nobody's ever.

use super::logger::Logger;
use super::open::Input;
use super::{Stdio, Stream};
use std::fs::File;
use std::future::Future;
use std::io::{self, ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::{Notify, watch};
use tokio::task::{JoinSet, spawn_blocking, yield_now};
use tokio::time::{Instant, timeout_at};

/// Most bytes of one read, and so what one direction holds; also the capacity of a pipe (pipe(7)).
const COPY_BYTES: usize = 64 * 1024;
/// How long the guest may leave an output open and silent after its process's exit, in ms.
const GUEST_SILENT_MS: u64 = 30_000;
/// How long whoever should read an output may take nothing of it after the process's exit, in ms.
const READER_IDLE_MS: u64 = 5_000;

/// The guest's ends, each connected to the agent. With a terminal only `stdin` is used, for both directions.
#[derive(Debug, Default)]
pub struct GuestEnds {
    /// Host to process (a terminal: both ways).
    pub stdin: Option<StdUnixStream>,
    /// Process to host.
    pub stdout: Option<StdUnixStream>,
    /// Process to host.
    pub stderr: Option<StdUnixStream>,
}

/// Where an output goes.
#[derive(Debug)]
pub(super) enum Sink {
    /// A fifo or a logger's pipe.
    Pipe {
        writer: pipe::Sender,
        /// Ours, of a fifo.
        _second_reader: Option<OwnedFd>,
    },
    /// A regular file: no event tells when it can be written.
    File(Arc<File>),
    /// Nowhere: a terminal of which only the input is wanted.
    Nothing,
}

/// What an output does now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Waits for the guest's next byte, since then.
    Guest(Instant),
    /// Waits for whoever takes what came; since the last of it was taken.
    Reader(Instant),
    /// All that came is written and closed.
    Ended,
}

/// How the outputs of a process that has exited came to their end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outputs {
    /// All that the guest sent was written, or could not be and that was said; they are closed.
    Written,
    /// The guest keeps one open and sends nothing.
    GuestSilent,
    /// Nobody takes what the guest sent.
    NobodyReads,
}

/// The running copies of one process. Dropped, all is closed; its loggers end by themselves then, or are made to.
#[derive(Debug)]
pub struct Pumps {
    tasks: JoinSet<()>,
    outputs: Vec<watch::Receiver<State>>,
    close_stdin: Arc<Notify>,
    loggers: Vec<Logger>,
}

impl Pumps {
    pub(super) fn start(stdio: Stdio, guest: GuestEnds) -> io::Result<Pumps> {
        let Stdio {
            terminal,
            input,
            mut stdout,
            stderr,
            loggers,
        } = stdio;
        let polled = |end: Option<StdUnixStream>| {
            end.map(|end| {
                end.set_nonblocking(true)?;
                UnixStream::from_std(end).map(Arc::new)
            })
            .transpose()
        };
        let to_guest = polled(guest.stdin)?;
        let (from_stdout, from_stderr) = match terminal {
            true => {
                // What a terminal prints is read even if nobody wants it: its process would wait for ever.
                stdout.get_or_insert(Sink::Nothing);
                (to_guest.clone(), None)
            }
            false => (polled(guest.stdout)?, polled(guest.stderr)?),
        };
        let mut pumps = Pumps {
            tasks: JoinSet::new(),
            outputs: Vec::new(),
            close_stdin: Arc::default(),
            loggers,
        };
        if let (Some(input), Some(guest)) = (input, to_guest) {
            let close = Arc::clone(&pumps.close_stdin);
            pumps
                .tasks
                .spawn(copy_input(input, guest, !terminal, close));
        }
        pumps.output(Stream::Stdout, from_stdout, stdout);
        pumps.output(Stream::Stderr, from_stderr, stderr);
        Ok(pumps)
    }

    fn output(&mut self, stream: Stream, guest: Option<Arc<UnixStream>>, sink: Option<Sink>) {
        if let (Some(guest), Some(sink)) = (guest, sink) {
            let (told, state) = watch::channel(State::Guest(Instant::now()));
            self.outputs.push(state);
            self.tasks.spawn(copy_output(stream, guest, sink, told));
        }
    }

    /// For when the process has exited: ends as soon as all that the guest sent was written, or as it is clear that it will not be. The copies
    /// go on all the same, until the pumps are dropped.
    pub fn outputs_done(&self) -> impl Future<Output = Outputs> + Send + 'static {
        let outputs = self.outputs.clone();
        let called = Instant::now();
        async move {
            let mut all = Outputs::Written;
            for output in outputs {
                let end = end_of(output, called).await;
                if end != Outputs::Written {
                    all = end;
                }
            }
            all
        }
    }

    /// CloseIO: the input ends behind what was written into its fifo, once nobody else has it open for writing.
    pub fn close_stdin(&self) {
        self.close_stdin.notify_one();
    }

    /// Closes everything and waits for the loggers' end, which is forced after 12 s (`logger`).
    pub async fn close(self) {
        let Pumps {
            mut tasks, loggers, ..
        } = self;
        tasks.shutdown().await;
        // All of them are told before one is waited for.
        let ends: Vec<_> = loggers.into_iter().map(Logger::expect_end).collect();
        for end in ends {
            // Fails only where the event loop ends, and it ends the logger as well.
            let _ended = end.await;
        }
    }
}

/// Waits for one output, of a process that had exited at `called`.
async fn end_of(mut output: watch::Receiver<State>, called: Instant) -> Outputs {
    loop {
        let (since, limit_ms, given_up) = match *output.borrow_and_update() {
            State::Guest(since) => (since, GUEST_SILENT_MS, Outputs::GuestSilent),
            State::Reader(since) => (since, READER_IDLE_MS, Outputs::NobodyReads),
            State::Ended => return Outputs::Written,
        };
        let limit = since.max(called) + Duration::from_millis(limit_ms);
        match timeout_at(limit, output.changed()).await {
            Ok(Ok(())) => {}
            // Whoever has the pumps has dropped them.
            Ok(Err(_)) => return Outputs::NobodyReads,
            Err(_elapsed) => return given_up,
        }
    }
}

async fn copy_output(
    stream: Stream,
    guest: Arc<UnixStream>,
    sink: Sink,
    state: watch::Sender<State>,
) {
    let mut lost_bytes = 0;
    let mut buffer = Vec::new();
    loop {
        buffer.clear();
        buffer.reserve_exact(COPY_BYTES);
        match guest.try_read_buf(&mut buffer) {
            Ok(0) => break,
            Ok(_) => {
                let moved = || {
                    state.send_replace(State::Reader(Instant::now()));
                };
                moved();
                let (taken, rest) = sink.take(buffer, moved).await;
                buffer = taken;
                if let Err(Refused { bytes, cause }) = rest {
                    if lost_bytes == 0 {
                        tracing::warn!(
                            "{stream} cannot be written, and what cannot is dropped: {cause}"
                        );
                    }
                    lost_bytes += bytes;
                }
                state.send_replace(State::Guest(Instant::now()));
                // However much comes: everybody else's turn.
                yield_now().await;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                buffer = Vec::new(); // an idle stream costs no buffer
                if guest.readable().await.is_err() {
                    break; // the event loop is gone
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // The VMM is gone or the guest has reset the stream: the end all the same.
            Err(_) => break,
        }
    }
    if lost_bytes > 0 {
        tracing::warn!("{lost_bytes} bytes of {stream} could not be written");
    }
    // Its reader finds the end before the exit is told.
    drop(sink);
    state.send_replace(State::Ended);
}

async fn copy_input(input: Input, guest: Arc<UnixStream>, half_close: bool, close: Arc<Notify>) {
    let Input { reader, own_writer } = input;
    let mut own_writer = Some(own_writer);
    let mut buffer = Vec::new();
    loop {
        buffer.clear();
        buffer.reserve_exact(COPY_BYTES);
        match reader.try_read_buf(&mut buffer) {
            Ok(0) => break,
            Ok(_) => {
                if write_all(&*guest, &buffer, || {}).await.is_err() {
                    return; // the process reads no more, and the fifo's writer is told so
                }
                yield_now().await;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                buffer = Vec::new(); // an idle stream costs no buffer
                tokio::select! {
                    ready = reader.readable() => if ready.is_err() { break },
                    () = close.notified() => own_writer = None,
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    drop(own_writer);
    if half_close {
        // Fails only where it is closed already.
        let _closed = rustix::net::shutdown(&*guest, rustix::net::Shutdown::Write);
    }
}

/// What could not be written.
struct Refused {
    bytes: u64,
    cause: io::Error,
}

impl Sink {
    /// Writes all of `buffer` and gives it back; `moved` is called whenever some of it was taken.
    async fn take(&self, buffer: Vec<u8>, moved: impl Fn()) -> (Vec<u8>, Result<(), Refused>) {
        match self {
            Sink::Pipe { writer, .. } => {
                let written = write_all(writer, &buffer, moved).await;
                (buffer, written)
            }
            Sink::File(file) => append(Arc::clone(file), buffer).await,
            Sink::Nothing => (buffer, Ok(())),
        }
    }
}

/// Appends on a thread of the pool: a disk may be slow, and the file system of another machine gone.
async fn append(file: Arc<File>, buffer: Vec<u8>) -> (Vec<u8>, Result<(), Refused>) {
    let appended = spawn_blocking(move || {
        let mut left = buffer.as_slice();
        let mut refused = None;
        while !left.is_empty() && refused.is_none() {
            match (&*file).write(left) {
                Ok(0) => refused = Some(ErrorKind::WriteZero.into()),
                Ok(count) => left = left.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => refused = Some(error),
            }
        }
        let bytes = left.len() as u64;
        let appended = match refused {
            None => Ok(()),
            Some(cause) => Err(Refused { bytes, cause }),
        };
        (buffer, appended)
    });
    appended.await.unwrap_or_else(|ended| {
        // The pool ends with the event loop, and this task with it.
        let cause = ended.into();
        (Vec::new(), Err(Refused { bytes: 0, cause }))
    })
}

/// What can be written when the event loop says so.
trait Writable {
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize>;
    fn writable(&self) -> impl Future<Output = io::Result<()>> + Send;
}

impl Writable for UnixStream {
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        UnixStream::try_write(self, bytes)
    }
    fn writable(&self) -> impl Future<Output = io::Result<()>> + Send {
        UnixStream::writable(self)
    }
}

impl Writable for pipe::Sender {
    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        pipe::Sender::try_write(self, bytes)
    }
    fn writable(&self) -> impl Future<Output = io::Result<()>> + Send {
        pipe::Sender::writable(self)
    }
}

async fn write_all(to: &impl Writable, mut bytes: &[u8], moved: impl Fn()) -> Result<(), Refused> {
    while !bytes.is_empty() {
        let cause = match to.try_write(bytes) {
            Ok(count) => {
                bytes = bytes.get(count..).unwrap_or_default();
                moved();
                continue;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == ErrorKind::WouldBlock => match to.writable().await {
                Ok(()) => continue,
                Err(error) => error, // the event loop is gone
            },
            Err(error) => error,
        };
        return Err(Refused {
            bytes: bytes.len() as u64,
            cause,
        });
    }
    Ok(())
}
