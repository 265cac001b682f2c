//! One command as a process: on three pipes, or on a terminal of its own. The door's ends do not block.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, waitid,
};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::frame::{Run, Size};
use crate::init::PATH;

/// Docker's codes for a command that could not be started.
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;

/// A running command.
pub(crate) struct Task {
    pid: Pid,
    /// Readable when the command has ended.
    pub(crate) pidfd: OwnedFd,
    terminal: Option<OwnedFd>,
}

/// The door's ends of the command's streams.
pub(crate) struct Streams {
    pub(crate) stdin: OwnedFd,
    pub(crate) stdout: OwnedFd,
    /// Absent on a terminal.
    pub(crate) stderr: Option<OwnedFd>,
}

/// Why it does not run, with the exit code that says so.
pub(crate) type Refusal = (u8, String);

impl Task {
    /// Starts the command.
    pub(crate) fn start(run: &Run) -> Result<(Self, Streams), Refusal> {
        match run.terminal {
            None => Self::on_pipes(run),
            Some(size) => Self::on_terminal(run, size),
        }
    }

    fn on_pipes(run: &Run) -> Result<(Self, Streams), Refusal> {
        let mut words = run.words.iter().map(|word| OsStr::from_bytes(word));
        let program = words
            .next()
            .ok_or_else(|| (NOT_FOUND, "no command was given".to_owned()))?;
        let mut command = Command::new(program);
        command
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = spawn(&mut command, run, program)?;
        let failed = |cause| broken("opening the streams", &cause);
        let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err((NOT_EXECUTABLE, "the streams are missing".to_owned()));
        };
        let streams = Streams {
            stdin: unblocked(stdin.into()).map_err(failed)?,
            stdout: unblocked(stdout.into()).map_err(failed)?,
            stderr: Some(unblocked(stderr.into()).map_err(failed)?),
        };
        Ok((
            Self {
                pid: pid_of(&child)?,
                pidfd: pidfd_of(&child)?,
                terminal: None,
            },
            streams,
        ))
    }

    /// `setsid --ctty` makes the terminal the command's own and then becomes the command.
    fn on_terminal(run: &Run, size: Size) -> Result<(Self, Streams), Refusal> {
        let failed = |cause: io::Error| broken("opening a terminal", &cause);
        let (ours, theirs) = terminal(size).map_err(failed)?;
        let mut command = Command::new("setsid");
        command
            .args(["--ctty", "--"])
            .args(run.words.iter().map(|word| OsStr::from_bytes(word)));
        command
            .stdin(theirs.try_clone().map_err(failed)?)
            .stdout(theirs.try_clone().map_err(failed)?)
            .stderr(theirs);
        let child = spawn_plain(&mut command, run, OsStr::new("setsid"))?;
        // Our copies of the command's side must go, or the terminal never ends.
        drop(command);
        let streams = Streams {
            stdin: unblocked(ours.try_clone().map_err(failed)?).map_err(failed)?,
            stdout: ours.try_clone().map_err(failed)?,
            stderr: None,
        };
        Ok((
            Self {
                pid: pid_of(&child)?,
                pidfd: pidfd_of(&child)?,
                terminal: Some(ours),
            },
            streams,
        ))
    }

    /// Sends a signal to the command and what it started in its group. One that ended meanwhile gets none.
    pub(crate) fn signal(&self, number: u8) {
        if let Some(signal) = Signal::from_named_raw(i32::from(number)) {
            let _ = kill_process_group(self.pid, signal);
        }
    }

    /// The terminal's size changed outside.
    pub(crate) fn resize(&self, size: Size) -> io::Result<()> {
        match &self.terminal {
            Some(terminal) => Ok(tcsetwinsize(terminal, winsize(size))?),
            None => Ok(()),
        }
    }

    /// The exit code of the command, which has ended: its own, or 128+n for signal n.
    pub(crate) fn reap(&self) -> io::Result<u8> {
        let status = waitid(WaitId::PidFd(self.pidfd.as_fd()), WaitIdOptions::EXITED)?;
        let code = status.and_then(|status| {
            status
                .exit_status()
                .or_else(|| status.terminating_signal().map(|n| 128 + n))
        });
        Ok(code
            .and_then(|code| u8::try_from(code).ok())
            .unwrap_or(u8::MAX))
    }
}

fn spawn(
    command: &mut Command,
    run: &Run,
    program: &OsStr,
) -> Result<std::process::Child, Refusal> {
    command.process_group(0);
    spawn_plain(command, run, program)
}

fn spawn_plain(
    command: &mut Command,
    run: &Run,
    program: &OsStr,
) -> Result<std::process::Child, Refusal> {
    command
        .env_clear()
        .env("PATH", PATH)
        .env("HOME", "/root")
        .env("LANG", "C.UTF-8")
        .current_dir("/root");
    for variable in &run.variables {
        let mut halves = variable.splitn(2, |byte| *byte == b'=');
        let (name, value) = (
            halves.next().unwrap_or_default(),
            halves.next().unwrap_or_default(),
        );
        command.env(
            std::ffi::OsString::from_vec(name.to_vec()),
            OsStr::from_bytes(value),
        );
    }
    command.spawn().map_err(|error| {
        let code = if error.kind() == io::ErrorKind::NotFound {
            NOT_FOUND
        } else {
            NOT_EXECUTABLE
        };
        (code, format!("{}: {error}", program.to_string_lossy()))
    })
}

fn terminal(size: Size) -> io::Result<(OwnedFd, OwnedFd)> {
    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&ours)?;
    unlockpt(&ours)?;
    let name = ptsname(&ours, Vec::new())?;
    let theirs = rustix::fs::open(
        name.as_c_str(),
        OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    tcsetwinsize(&theirs, winsize(size))?;
    Ok((ours, theirs))
}

fn winsize(size: Size) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

fn unblocked(fd: OwnedFd) -> io::Result<OwnedFd> {
    fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
    Ok(fd)
}

fn pid_of(child: &std::process::Child) -> Result<Pid, Refusal> {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    pid.ok_or_else(|| (NOT_EXECUTABLE, "the process has no pid".to_owned()))
}

fn pidfd_of(child: &std::process::Child) -> Result<OwnedFd, Refusal> {
    pidfd_open(pid_of(child)?, PidfdFlags::empty())
        .map_err(|errno| broken("watching the command", &errno.into()))
}

fn broken(doing: &str, cause: &io::Error) -> Refusal {
    (NOT_EXECUTABLE, format!("{doing}: {cause}"))
}
