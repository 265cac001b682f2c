//! A terminal for tests: a program on one end, the test's keyboard and eyes on the other.

use crate::command::RUN_TIMEOUT_S;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{OpenptyResult, Winsize, openpty};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A program on a terminal.
pub struct Session {
    child: Child,
    master: File,
    seen: String,
}

impl Session {
    /// Starts a program with its arguments on a new terminal of the given size, as its controlling terminal.
    ///
    /// # Panics
    /// There is no terminal or no `setsid`.
    pub fn start(words: &[&str], rows: u16, columns: u16) -> Session {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let OpenptyResult { master, slave } = openpty(Some(&size), None).expect("a pty");
        let stdio = || Stdio::from(slave.try_clone().expect("a clone of the slave"));
        // setsid --ctty makes the terminal the controlling one, so that the kernel sends SIGWINCH and SIGHUP.
        let child = Command::new("setsid")
            .arg("--ctty")
            .arg("--wait")
            .args(words)
            .stdin(stdio())
            .stdout(stdio())
            .stderr(stdio())
            .spawn()
            .expect("setsid is on PATH");
        Session {
            child,
            master: File::from(master),
            seen: String::new(),
        }
    }

    /// Process id of the program: `setsid` of a child that leads no group does not fork.
    ///
    /// # Panics
    /// It is beyond what a pid can be.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid is positive")
    }

    /// Types.
    ///
    /// # Panics
    /// The terminal is gone.
    pub fn types(&mut self, text: &str) {
        self.master
            .write_all(text.as_bytes())
            .expect("the terminal takes keys");
    }

    /// Changes the size, as a window would.
    ///
    /// # Panics
    /// `stty` is absent.
    pub fn resize(&mut self, rows: u16, columns: u16) {
        let status = Command::new("stty")
            .args(["rows", &rows.to_string(), "columns", &columns.to_string()])
            .stdin(Stdio::from(
                self.master.try_clone().expect("a clone of the master"),
            ))
            .status()
            .expect("stty");
        assert!(status.success(), "stty: {status}");
    }

    /// Reads until `mark` shows, and forgets everything up to it.
    ///
    /// # Panics
    /// It does not show in time.
    #[track_caller]
    pub fn sees(&mut self, mark: &str) {
        let deadline = Instant::now() + Duration::from_secs(RUN_TIMEOUT_S);
        while !self.seen.contains(mark) {
            let left = deadline
                .saturating_duration_since(Instant::now())
                .as_millis();
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut fds = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
            let ready = poll(&mut fds, timeout).expect("poll");
            assert!(
                ready > 0,
                "{mark:?} did not show; the screen has: {}",
                self.seen
            );
            let mut buffer = [0; 4096];
            match self.master.read(&mut buffer) {
                Ok(count @ 1..) => self
                    .seen
                    .push_str(&String::from_utf8_lossy(&buffer[..count])),
                _ => panic!("the terminal ended before {mark:?}; it had: {}", self.seen),
            }
        }
        let end = self.seen.find(mark).expect("just seen") + mark.len();
        self.seen.drain(..end);
    }

    /// What `stty -a` says of the terminal's modes.
    ///
    /// # Panics
    /// `stty` is absent.
    pub fn modes(&self) -> String {
        let out = Command::new("stty")
            .arg("-a")
            .stdin(Stdio::from(
                self.master.try_clone().expect("a clone of the master"),
            ))
            .output()
            .expect("stty");
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// Waits for the end, asserts that the terminal then has `mode`, and gives the exit code.
    ///
    /// # Panics
    /// It does not have it.
    #[track_caller]
    pub fn ends_with_modes(mut self, mode: &str) -> i32 {
        // The master keeps the terminal alive after the last slave closed, so its modes can still be read.
        let status = self.child.wait().expect("our own child");
        let modes = self.modes();
        assert!(
            modes.split_whitespace().any(|found| found == mode),
            "{mode} in: {modes}"
        );
        status.code().unwrap_or(-1)
    }

    /// Waits for the end and gives the exit code.
    ///
    /// # Panics
    /// The child is not ours.
    pub fn ends(mut self) -> i32 {
        // Drain until the last slave is closed, or a child with much output would never end.
        let mut sink = [0; 4096];
        while let Ok(1..) = self.master.read(&mut sink) {}
        let status = self.child.wait().expect("our own child");
        status
            .code()
            .unwrap_or_else(|| 128 + status.signal().expect("a code or a signal"))
    }
}
