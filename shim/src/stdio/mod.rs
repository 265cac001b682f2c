//! The standard streams of one process of a container: what containerd names on one side, one raw stream of the guest each on the other.
//!
//! [`Stdio::open`] opens what is named (`url`): fifos and files (`open`), loggers (`logger`). [`Stdio::join`] puts the guest's streams
//! to it and copies (`pumps`) until the end. An init process and an exec are the same here.
//!
//! The names are containerd's and trusted; the guest's bytes are copied and never looked at. Each direction holds one bounded buffer, and
//! only while bytes are on their way: who does not read holds the guest's process back by the pipe, not by memory. All of it runs on the one
//! event loop, and nothing blocks it: what can only block, such as a file, is for a thread of tokio's pool.

mod logger;
mod open;
mod pumps;
#[cfg(test)]
mod tests;
mod url;

pub use logger::LoggerError;
pub use open::OpenError;
pub use pumps::{GuestEnds, Outputs, Pumps};
pub use url::BadUrl;

use logger::{Logger, Owner};
use open::Input;
use pumps::Sink;
use std::fmt;
use std::io;
use std::path::PathBuf;
use url::Target;

/// What containerd names as a process's streams. An empty name is no stream: the process gets /dev/null.
#[derive(Clone, Copy, Debug)]
pub struct Urls<'a> {
    /// A fifo that it reads.
    pub stdin: &'a str,
    /// A path, or a URL (`fifo`, `file`, `binary`, `binary-v2`).
    pub stdout: &'a str,
    /// The same; not looked at with a terminal, which has one output.
    pub stderr: &'a str,
    /// The process has a terminal.
    pub terminal: bool,
    /// What a logger is told: the container's id, or the exec's.
    pub id: &'a str,
    /// What a logger is told: containerd's namespace.
    pub namespace: &'a str,
}

/// One of the three.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Descriptor 0.
    Stdin,
    /// Descriptor 1; a terminal's output.
    Stdout,
    /// Descriptor 2.
    Stderr,
}

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stream::Stdin => "standard input",
            Stream::Stdout => "standard output",
            Stream::Stderr => "standard error",
        })
    }
}

/// Why a process has no streams.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// A name is not one of a stream.
    #[error("{stream} cannot be {url:?}")]
    Name {
        /// Which.
        stream: Stream,
        /// Its name.
        url: String,
        /// Why.
        #[source]
        cause: BadUrl,
    },
    /// It cannot be opened.
    #[error("cannot open {stream}, {path}")]
    Open {
        /// Which.
        stream: Stream,
        /// What containerd named.
        path: PathBuf,
        /// Why.
        #[source]
        cause: OpenError,
    },
    /// A logger did not start.
    #[error("logger {program} did not start")]
    Logger {
        /// The program.
        program: String,
        /// Why.
        #[source]
        cause: LoggerError,
    },
    /// A stream cannot be polled.
    #[error("cannot wait for the streams")]
    EventLoop(#[source] io::Error),
}

/// The host's ends, open; the guest's are not there yet. Dropped, they are closed and the loggers end.
#[derive(Debug)]
pub struct Stdio {
    terminal: bool,
    input: Option<Input>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    loggers: Vec<Logger>,
}

/// Which streams the guest needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Host to process; with a terminal both ways.
    pub stdin: bool,
    /// Process to host; never with a terminal.
    pub stdout: bool,
    /// Process to host; never with a terminal.
    pub stderr: bool,
}

impl Stdio {
    /// Opens what containerd names, and starts the loggers. Waits until each fifo has a reader and each logger is ready, for
    /// 30 s each at most. When it fails or is dropped half-way, all is closed, and a logger that had started ends as its pipes do.
    ///
    /// # Errors
    /// A name is wrong or cannot be opened, nobody reads, a logger is not ready.
    pub async fn open(urls: Urls<'_>) -> Result<Stdio, StdioError> {
        let Urls {
            stdin,
            stdout,
            stderr,
            terminal,
            id,
            namespace,
        } = urls;
        let input = url::input(stdin).map_err(bad_name(Stream::Stdin, stdin))?;
        let stdout = url::output(stdout).map_err(bad_name(Stream::Stdout, stdout))?;
        let stderr = match terminal {
            true => Target::Nothing,
            false => url::output(stderr).map_err(bad_name(Stream::Stderr, stderr))?,
        };
        let owner = Owner { id, namespace };
        let mut loggers = Vec::new();
        let (stdout, stderr) = match (stdout, stderr) {
            // One program for both, as containerd's client means it when it names it twice.
            (Target::Logger(command), Target::Logger(same)) if command == same => {
                let (logger, stdout, stderr) = Logger::start(&command, owner).await?;
                loggers.push(logger);
                (Some(stdout), Some(stderr))
            }
            (stdout, stderr) => (
                open_output(Stream::Stdout, stdout, owner, &mut loggers).await?,
                open_output(Stream::Stderr, stderr, owner, &mut loggers).await?,
            ),
        };
        let input = match input {
            Some(path) => open::input(&path).map_err(not_open(Stream::Stdin, path))?,
            None => None,
        };
        Ok(Stdio {
            terminal,
            input,
            stdout,
            stderr,
            loggers,
        })
    }

    /// The streams to dial: those of which containerd named the other end.
    pub fn wanted(&self) -> Wanted {
        let Stdio {
            terminal,
            input,
            stdout,
            stderr,
            ..
        } = self;
        match terminal {
            true => Wanted {
                stdin: input.is_some() || stdout.is_some(),
                stdout: false,
                stderr: false,
            },
            false => Wanted {
                stdin: input.is_some(),
                stdout: stdout.is_some(),
                stderr: stderr.is_some(),
            },
        }
    }

    /// Copies between the two sides from now on. An end whose other one is missing is closed.
    ///
    /// # Errors
    /// A stream cannot be polled. All are closed.
    pub fn join(self, guest: GuestEnds) -> Result<Pumps, StdioError> {
        Pumps::start(self, guest).map_err(StdioError::EventLoop)
    }
}

async fn open_output(
    stream: Stream,
    target: Target,
    owner: Owner<'_>,
    loggers: &mut Vec<Logger>,
) -> Result<Option<Sink>, StdioError> {
    match target {
        Target::Nothing => Ok(None),
        Target::Existing(path) => open::existing(&path).await.map_err(not_open(stream, path)),
        Target::File(path) => open::file(&path).await.map_err(not_open(stream, path)),
        Target::Logger(command) => {
            let (logger, stdout, stderr) = Logger::start(&command, owner).await?;
            loggers.push(logger);
            // The other pipe ends at once.
            Ok(Some(if stream == Stream::Stderr {
                stderr
            } else {
                stdout
            }))
        }
    }
}

fn bad_name(stream: Stream, url: &str) -> impl FnOnce(BadUrl) -> StdioError {
    move |cause| StdioError::Name {
        stream,
        url: url.to_owned(),
        cause,
    }
}

fn not_open(stream: Stream, path: PathBuf) -> impl FnOnce(OpenError) -> StdioError {
    move |cause| StdioError::Open {
        stream,
        path,
        cause,
    }
}
