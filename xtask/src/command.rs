//! Runs one plain command: shows it as a person would type it, sends what it prints to the step's log, and turns a bad end
//! into an error that carries the exit status and the tail of the log.
//!
//! A child dies with us, even when we are killed by SIGKILL (parent-death signal); on Ctrl-C all that it started is killed.
#![allow(unsafe_code)] // `Command::pre_exec`, the only way to set the parent-death signal of a child.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, getpid, getppid, set_parent_process_death_signal};

use crate::interrupt::{self, Undone};

pub use crate::interrupt::OnInterrupt;
use crate::progress::Step;

/// How much of a log an error shows.
const TAIL_MAX_LINES: usize = 25;
/// The tail is looked for in this much of the log's end.
const TAIL_MAX_BYTES: u64 = 16 << 10;
/// What a query such as `cargo metadata` may print.
const OUTPUT_MAX_BYTES: u64 = 64 << 20;

/// Why a command did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It is not installed, or not executable.
    #[error("starting `{command}`")]
    Start {
        /// As a person would type it.
        command: String,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// Talking to it failed.
    #[error("running `{command}`")]
    Io {
        /// As a person would type it.
        command: String,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// It ran and said no.
    #[error("`{command}` ended with {}; the whole log is {}\n{tail}", end(*status), log.display())]
    Failed {
        /// As a person would type it.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// Its whole output.
        log: PathBuf,
        /// The last lines of the output.
        tail: String,
    },
    /// It ran and said no, in few words.
    #[error("`{command}` ended with {}: {words}", end(*status))]
    Said {
        /// As a person would type it.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to its standard error.
        words: String,
    },
    /// It printed more than anyone expects of it.
    #[error("`{command}` printed more than {OUTPUT_MAX_BYTES} bytes")]
    TooLong {
        /// As a person would type it.
        command: String,
    },
}

/// A child with what makes it die with us.
#[derive(Debug)]
pub struct Running {
    /// The process, a leader of its own process group.
    pub child: Child,
    _undone: Undone,
}

/// Starts a command in a process group of its own.
///
/// # Errors
/// It could not be started.
pub fn spawn(command: &mut Command, on_interrupt: OnInterrupt) -> io::Result<Running> {
    let parent = getpid();
    command.process_group(0);
    if on_interrupt == OnInterrupt::Kill {
        // SAFETY: the closure runs in the child between fork and exec and makes two system calls and no allocation, so it
        // is async-signal-safe; it touches no memory of the parent but a copied pid.
        unsafe { command.pre_exec(move || die_with(parent)) };
    }
    let (child, undone) = interrupt::start(on_interrupt, || command.spawn())?;
    Ok(Running {
        child,
        _undone: undone,
    })
}

fn die_with(parent: Pid) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have died before the line above.
    if getppid() == Some(parent) {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(
            rustix::io::Errno::SRCH.raw_os_error(),
        ))
    }
}

impl Step {
    /// Prints the command and runs it to its end, output into the log.
    ///
    /// # Errors
    /// It could not be started, or did not end with 0.
    pub fn run(&self, command: &mut Command) -> Result<(), CommandError> {
        self.say(format!("           $ {}", shown(command)));
        self.run_quietly(command, OnInterrupt::Kill)
    }

    /// As `run`, for a command that an interruption asks to end and must not stop half-way.
    ///
    /// # Errors
    /// As `run`.
    pub fn run_to_the_end(&self, command: &mut Command) -> Result<(), CommandError> {
        self.say(format!("           $ {}", shown(command)));
        self.run_quietly(command, OnInterrupt::Ask)
    }

    fn run_quietly(
        &self,
        command: &mut Command,
        on_interrupt: OnInterrupt,
    ) -> Result<(), CommandError> {
        let text = shown(command);
        let log = || {
            self.log().try_clone().map_err(|cause| CommandError::Io {
                command: text.clone(),
                cause,
            })
        };
        command.stdin(Stdio::null()).stdout(log()?).stderr(log()?);
        let mut running = spawn(command, on_interrupt).map_err(|cause| CommandError::Start {
            command: text.clone(),
            cause,
        })?;
        let status = running.child.wait().map_err(|cause| CommandError::Io {
            command: text.clone(),
            cause,
        })?;
        if status.success() {
            return Ok(());
        }
        Err(CommandError::Failed {
            command: text,
            status,
            log: self.log_path().to_owned(),
            tail: self.tail(),
        })
    }

    /// The last lines of the log, indented.
    pub fn tail(&self) -> String {
        File::open(self.log_path()).map_or_else(|_| String::new(), |mut log| tail_of(&mut log))
    }
}

/// Runs a query and returns what it printed; its exit status is the caller's to judge.
///
/// # Errors
/// It could not be started, or printed without end.
pub fn query(command: &mut Command) -> Result<(ExitStatus, Vec<u8>), CommandError> {
    let text = shown(command);
    let io = |cause| CommandError::Io {
        command: text.clone(),
        cause,
    };
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut running = spawn(command, OnInterrupt::Kill).map_err(|cause| CommandError::Start {
        command: text.clone(),
        cause,
    })?;
    let mut output = Vec::new();
    if let Some(stdout) = running.child.stdout.take() {
        stdout
            .take(OUTPUT_MAX_BYTES + 1)
            .read_to_end(&mut output)
            .map_err(io)?;
    }
    let status = running.child.wait().map_err(io)?;
    if output.len() as u64 > OUTPUT_MAX_BYTES {
        return Err(CommandError::TooLong { command: text });
    }
    Ok((status, output))
}

/// Runs a small command that is not worth a line unless it fails.
///
/// # Errors
/// It could not be started, or did not end with 0.
pub fn quiet(command: &mut Command) -> Result<(), CommandError> {
    let text = shown(command);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let mut running = spawn(command, OnInterrupt::Kill).map_err(|cause| CommandError::Start {
        command: text.clone(),
        cause,
    })?;
    let io = |cause| CommandError::Io {
        command: text.clone(),
        cause,
    };
    let mut words = Vec::new();
    if let Some(mut stderr) = running.child.stderr.take() {
        (&mut stderr)
            .take(TAIL_MAX_BYTES)
            .read_to_end(&mut words)
            .map_err(io)?;
        // Whatever else it has to say must not stop it.
        io::copy(&mut stderr, &mut io::sink()).map_err(io)?;
    }
    let status = running.child.wait().map_err(io)?;
    if status.success() {
        return Ok(());
    }
    let words = printable(String::from_utf8_lossy(&words).trim_end());
    Err(CommandError::Said {
        command: text,
        status,
        words,
    })
}

/// The command as a person would type it, with the variables set for it in front.
pub fn shown(command: &Command) -> String {
    let variables = command.get_envs().filter_map(|(name, value)| {
        value.map(|value| format!("{}={}", name.to_string_lossy(), quoted(value)))
    });
    let words = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(quoted);
    let text = variables.chain(words).collect::<Vec<_>>().join(" ");
    match command.get_current_dir() {
        Some(dir) => format!("cd {} && {text}", quoted(dir.as_os_str())),
        None => text,
    }
}

fn quoted(word: &OsStr) -> String {
    let text = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+./:,@%".contains(c);
    if !text.is_empty() && text.chars().all(plain) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// How a process ended, in words.
pub fn end(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "an unknown end".to_owned(),
    }
}

pub(crate) fn tail_of(log: &mut (impl Read + Seek)) -> String {
    let mut bytes = Vec::new();
    let read = log.seek(SeekFrom::End(0)).and_then(|length| {
        log.seek(SeekFrom::Start(length.saturating_sub(TAIL_MAX_BYTES)))?;
        log.take(TAIL_MAX_BYTES).read_to_end(&mut bytes)
    });
    if let Err(error) = read {
        return format!("    (reading the log failed: {error})");
    }
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let skipped = lines.len().saturating_sub(TAIL_MAX_LINES);
    lines
        .iter()
        .skip(skipped)
        .map(|line| format!("    {}", printable(line)))
        .collect::<Vec<_>>()
        .join("\n")
}

/// A log line must not move the cursor of the person reading it.
pub fn printable(line: &str) -> String {
    line.chars()
        .filter(|c| !c.is_control() || *c == '\t')
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_shown_as_it_would_be_typed() {
        let mut command = Command::new("echo");
        command
            .args(["a b", "it's", "", "--x=1"])
            .env("K", "v w")
            .current_dir("/tmp");
        assert_eq!(
            shown(&command),
            r"cd /tmp && K='v w' echo 'a b' 'it'\''s' '' --x=1"
        );
    }

    #[test]
    fn the_tail_is_the_last_lines_without_control_bytes() {
        let mut log = io::Cursor::new(
            (0..40)
                .map(|n| format!("line {n}\u{1b}[2J\n"))
                .collect::<String>(),
        );
        let tail = tail_of(&mut log);
        assert_eq!(tail.lines().count(), TAIL_MAX_LINES);
        assert!(tail.ends_with("    line 39[2J"), "{tail}");
    }

    #[test]
    fn a_query_returns_output_and_status() {
        let (status, output) =
            query(Command::new("sh").args(["-c", "echo hi; exit 3"])).expect("sh runs");
        assert_eq!((status.code(), output.as_slice()), (Some(3), &b"hi\n"[..]));
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = query(&mut Command::new("no-such-program-at-all")).expect_err("cannot start");
        assert_eq!(error.to_string(), "starting `no-such-program-at-all`");
    }
}
