//! A program that takes the outputs of one process: descriptor 3 is its standard output, 4 its standard error, 5 a pipe by which it says that it
//! is ready (containerd's core/runtime/v2/README.md, "Logging", and logging/logging_unix.go).
//!
//! Its user chose it; it is trusted with the output and with nothing else: it gets no other descriptor and an environment of its own. Its end
//! is not the container's. It ends when its pipes do; one that does not is told to, and then killed.

use super::StdioError;
use super::pumps::Sink;
use super::url::LoggerCommand;
use crate::child::Child;
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags, posix_spawn};
use nix::sys::signal::SigSet;
use nix::unistd::Pid as NixPid;
use rustix::fs::{Mode, OFlags, open};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitIdStatus};
use std::ffi::CString;
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// How long a logger may take until it is ready, in ms.
const READY_TIMEOUT_MS: u64 = 30_000;
/// How long it may take to end once its pipes have, in ms.
const END_TIMEOUT_MS: u64 = 10_000;
/// How long it may take to end once it was sent SIGTERM, in ms; then it is sent SIGKILL. The sum is that of containerd's own shim.
const TERM_TIMEOUT_MS: u64 = 2_000;

/// Why a logger did not start.
#[derive(Debug, thiserror::Error)]
pub enum LoggerError {
    /// It cannot be executed, or there are no descriptors for it.
    #[error(transparent)]
    Failed(#[from] io::Error),
    /// It closed the pipe and had not written to it, as `binary-v2` asks.
    #[error("it did not say that it is ready")]
    Unready,
    /// It said nothing.
    #[error("it was not ready within {READY_TIMEOUT_MS} ms")]
    Late,
}

/// Whose output a logger takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Owner<'a> {
    pub(super) id: &'a str,
    pub(super) namespace: &'a str,
}

/// A running logger. Dropped, it is expected to end, as its pipes do then.
#[derive(Debug)]
pub(super) struct Logger {
    watch: JoinHandle<()>,
    /// Something sent is that it is not wanted any more.
    expected: oneshot::Sender<()>,
}

impl Logger {
    /// Starts one and waits until it is ready. Gives the pipes of standard output and standard error with it.
    ///
    /// # Errors
    /// It cannot be executed, ends first, or is not ready in time; it is killed then.
    pub(super) async fn start(
        command: &LoggerCommand,
        owner: Owner<'_>,
    ) -> Result<(Logger, Sink, Sink), StdioError> {
        let program = command.program.to_string_lossy().into_owned();
        let started = Logger::start_ready(command, owner, program.clone()).await;
        started.map_err(|cause| StdioError::Logger { program, cause })
    }

    async fn start_ready(
        command: &LoggerCommand,
        owner: Owner<'_>,
        program: String,
    ) -> Result<(Logger, Sink, Sink), LoggerError> {
        let (stdout, stdout_sink) = sink()?;
        let (stderr, stderr_sink) = sink()?;
        let (said, ready) = pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from)?;
        let said = pipe::Receiver::from_owned_fd(said)?;
        let process = spawn(command, owner, [stdout, stderr, ready])?;
        let (expected, told) = oneshot::channel();
        let watch = tokio::spawn(watch(process, told, program));
        let logger = Logger { watch, expected };
        let limit = Duration::from_millis(READY_TIMEOUT_MS);
        let cause = match timeout(limit, is_ready(said, command.strict)).await {
            Ok(Ok(())) => return Ok((logger, stdout_sink, stderr_sink)),
            Ok(Err(cause)) => cause,
            Err(_elapsed) => LoggerError::Late,
        };
        logger.kill().await;
        Err(cause)
    }

    /// Its end, which comes by itself or is made to. Its pipes must be closed.
    pub(super) fn expect_end(self) -> JoinHandle<()> {
        self.watch
    }

    async fn kill(self) {
        // Fails only where it has ended already.
        let _told = self.expected.send(());
        let _ended = self.watch.await;
    }
}

/// A pipe to a logger: its end and ours.
fn sink() -> io::Result<(OwnedFd, Sink)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    let writer = pipe::Sender::from_owned_fd(writer)?;
    Ok((
        reader,
        Sink::Pipe {
            writer,
            _second_reader: None,
        },
    ))
}

/// Starts the program with these as its descriptors 3, 4 and 5, no other of ours, and a process group of its own.
fn spawn(command: &LoggerCommand, owner: Owner<'_>, pipes: [OwnedFd; 3]) -> io::Result<Child> {
    let null = open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let [stdout, stderr, ready] = pipes;
    let by_number = [&null, &null, &null, &stdout, &stderr, &ready];
    let mut files = PosixSpawnFileActions::init()?;
    let mut originals = Vec::with_capacity(by_number.len());
    for (number, fd) in (0..).zip(by_number) {
        // Beyond the numbers of the copies.
        let original = fcntl_dupfd_cloexec(fd, 6)?;
        files.add_dup2(original.as_raw_fd(), number)?;
        originals.push(original);
    }
    let mut attributes = PosixSpawnAttr::init()?;
    let flags = PosixSpawnFlags::POSIX_SPAWN_SETPGROUP
        | PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF
        | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK;
    attributes.set_flags(flags)?;
    attributes.set_pgroup(NixPid::from_raw(0))?;
    attributes.set_sigdefault(&SigSet::all())?;
    attributes.set_sigmask(&SigSet::empty())?;
    let LoggerCommand {
        program,
        arguments,
        environment,
        ..
    } = command;
    let arguments: Vec<&CString> = std::iter::once(program).chain(arguments).collect();
    let told =
        |name: &str, value: &str| CString::new(format!("{name}={value}")).map_err(io::Error::from);
    let own = [
        told("CONTAINER_ID", owner.id)?,
        told("CONTAINER_NAMESPACE", owner.namespace)?,
    ];
    let environment: Vec<&CString> = own.iter().chain(environment).collect();
    let pid = posix_spawn(
        program.as_c_str(),
        &files,
        &attributes,
        &arguments,
        &environment,
    )?;
    let pid = Pid::from_raw(pid.as_raw()).ok_or(ErrorKind::InvalidData)?;
    Child::adopt(pid)
}

/// Waits until it is ready: says so by a byte or, unless that is asked of it, by the end alone.
async fn is_ready(said: pipe::Receiver, strict: bool) -> Result<(), LoggerError> {
    loop {
        match said.try_read(&mut [0]) {
            Ok(0) if strict => return Err(LoggerError::Unready),
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::WouldBlock => said.readable().await?,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Reaps a logger whenever it ends, and ends it when it is expected to and does not.
async fn watch(mut process: Child, expected: oneshot::Receiver<()>, program: String) {
    let is_unwanted = tokio::select! {
        end = process.end() => return judge(&program, end),
        told = expected => told.is_ok(),
    };
    if is_unwanted {
        process.signal(Signal::KILL);
        // It is our child, and how it ends is our doing.
        let _killed = process.end().await;
        return;
    }
    let steps = [
        (END_TIMEOUT_MS, Signal::TERM),
        (TERM_TIMEOUT_MS, Signal::KILL),
    ];
    for (limit_ms, signal) in steps {
        match timeout(Duration::from_millis(limit_ms), process.end()).await {
            Ok(end) => return judge(&program, end),
            Err(_elapsed) => {
                tracing::warn!("logger {program} did not end within {limit_ms} ms: {signal:?}");
                process.signal(signal);
            }
        }
    }
    judge(&program, process.end().await);
}

fn judge(program: &str, end: io::Result<WaitIdStatus>) {
    match end {
        Ok(status) if status.exit_status() == Some(0) => {}
        Ok(status) => match status.exit_status() {
            Some(code) => tracing::warn!("logger {program} exited with {code}"),
            None => tracing::warn!(
                "logger {program} was killed by signal {:?}",
                status.terminating_signal()
            ),
        },
        Err(cause) => tracing::warn!("logger {program} cannot be waited for: {cause}"),
    }
}
