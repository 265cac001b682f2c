//! Runs `capsid` with a deadline and gives back everything it said.

use crate::ledger::Ledger;
use nix::unistd::Pid;
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Longest run of one `capsid` in a test that sets no limit of its own, in seconds. An emulated host is some
/// thirty times slower than a real one; a test that needs this long is hung.
pub const RUN_TIMEOUT_S: u64 = 240;

/// How often something of another process is looked at. An emulated host has one processor for the look and for what is looked
/// at, and a look costs it milliseconds.
const LOOK_STEP: Duration = Duration::from_millis(20);

/// The code of `capsid` for what it refuses itself, as docker's.
pub const REFUSED: i32 = 125;

/// The busybox image, a docker-archive.
///
/// # Panics
/// `CAPSID_TEST_IMAGE` is not set or names no file.
pub fn image() -> PathBuf {
    let path = std::env::var_os("CAPSID_TEST_IMAGE")
        .map(PathBuf::from)
        .expect("CAPSID_TEST_IMAGE names the busybox image; `cargo xtask test` sets it");
    assert!(
        path.exists(),
        "CAPSID_TEST_IMAGE: {} does not exist",
        path.display()
    );
    path
}

/// The guest kernel.
///
/// # Panics
/// `CAPSID_KERNEL` is not set.
pub fn kernel() -> PathBuf {
    std::env::var_os("CAPSID_KERNEL")
        .map(PathBuf::from)
        .expect("CAPSID_KERNEL names the guest kernel; `cargo xtask test` sets it")
}

/// A `capsid` command in the making.
pub struct Run {
    command: Command,
    stdin: Option<Vec<u8>>,
    stdout: Option<Stdio>,
    limit: Duration,
}

/// How a run ended.
#[derive(Debug)]
pub struct Ended {
    /// The exit code of `capsid`; 128 + n if a signal ended it.
    pub code: i32,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error, as text.
    pub stderr: String,
    /// Wall time.
    pub took: Duration,
}

impl Ended {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Asserts the exit code, showing everything else if it is another.
    ///
    /// # Panics
    /// The code is another.
    #[track_caller]
    pub fn exits(&self, code: i32) -> &Ended {
        assert_eq!(
            self.code,
            code,
            "after {:?}\nstdout: {}\nstderr: {}",
            self.took,
            self.text(),
            self.stderr
        );
        self
    }

    /// Asserts that `capsid` gave up with its own code and said so in one line that has each of `words`.
    ///
    /// # Panics
    /// It did not.
    #[track_caller]
    pub fn refuses(&self, code: i32, words: &[&str]) {
        self.exits(code);
        let lines: Vec<&str> = self
            .stderr
            .lines()
            .filter(|line| !line.is_empty())
            .collect();
        assert_eq!(lines.len(), 1, "expected one line, got: {}", self.stderr);
        for word in words {
            assert!(
                self.stderr.contains(word),
                "expected {word:?} in: {}",
                self.stderr
            );
        }
    }
}

/// `capsid` with arguments as given.
pub fn capsid<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Run {
    let mut command = Command::new("capsid");
    command.args(args);
    Run {
        command,
        stdin: None,
        stdout: None,
        limit: Duration::from_secs(RUN_TIMEOUT_S),
    }
}

/// `capsid run --image <busybox> FLAGS -- COMMAND`.
pub fn run(flags: &[&str], command: &[&str]) -> Run {
    let image = image();
    let mut run = capsid([OsStr::new("run"), OsStr::new("--image"), image.as_os_str()]);
    run.command.args(flags).arg("--").args(command);
    run
}

/// `capsid run FLAGS -- sh -c SCRIPT`.
pub fn sh(flags: &[&str], script: &str) -> Run {
    run(flags, &["sh", "-c", script])
}

/// Asserts that `capsid` refuses this run in one line that has each of `words`, and leaves nothing.
///
/// # Panics
/// It does not.
#[track_caller]
pub fn refused(run: Run, words: &[&str]) {
    let before = Ledger::now();
    run.wait().refuses(REFUSED, words);
    before.balances();
}

impl Run {
    /// Gives it these bytes on standard input.
    #[must_use]
    pub fn stdin(mut self, bytes: Vec<u8>) -> Run {
        self.stdin = Some(bytes);
        self
    }

    /// Gives it more time than [`RUN_TIMEOUT_S`].
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Run {
        self.limit = limit;
        self
    }

    /// Sets an environment variable of `capsid` itself.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Run {
        self.command.env(name, value);
        self
    }

    /// Lets it write its standard output there; then `until` and the output of its end have nothing.
    #[must_use]
    pub fn output_to(mut self, output: impl Into<Stdio>) -> Run {
        self.stdout = Some(output.into());
        self
    }

    /// Starts it with all three streams as pipes.
    ///
    /// # Panics
    /// `capsid` is not on PATH.
    pub fn start(mut self) -> Running {
        self.command
            .stdin(if self.stdin.is_some() {
                Stdio::piped()
            } else {
                Stdio::null()
            })
            .stdout(self.stdout.unwrap_or_else(Stdio::piped))
            .stderr(Stdio::piped());
        let mut child = self.command.spawn().expect("capsid is on PATH");
        if let (Some(bytes), Some(mut pipe)) = (self.stdin, child.stdin.take()) {
            // A container that does not read its input closes the pipe; that is its right.
            thread::spawn(move || drop(pipe.write_all(&bytes)));
        }
        // The command holds its ends of the streams; a pipe ends when all are closed.
        drop(self.command);
        let stdout = match child.stdout.take() {
            Some(pipe) => collect(pipe),
            None => mpsc::channel().1,
        };
        let stderr = collect(child.stderr.take().expect("piped"));
        Running {
            child,
            stdout,
            stderr,
            since: Instant::now(),
            limit: self.limit,
        }
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// It does not end within its limit.
    pub fn wait(self) -> Ended {
        self.start().wait()
    }
}

/// A `capsid` that runs.
pub struct Running {
    child: Child,
    stdout: mpsc::Receiver<Vec<u8>>,
    stderr: mpsc::Receiver<Vec<u8>>,
    since: Instant,
    limit: Duration,
}

impl Running {
    /// Process id of `capsid`.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid is positive")
    }

    /// Its VMM: its child by that name, once there is one.
    pub fn vmm(&self) -> Option<Pid> {
        vmm_of(self.pid())
    }

    /// How many threads it has; none once it is gone.
    pub fn threads(&self) -> usize {
        fs::read_dir(format!("/proc/{}/task", self.pid())).map_or(0, Iterator::count)
    }

    /// Waits until `condition` holds. It is looked at again and again, because it is about other processes and the kernel
    /// tells nobody.
    ///
    /// # Panics
    /// It does not hold within its limit.
    #[track_caller]
    pub fn reaches(&self, what: &str, condition: impl Fn() -> bool) {
        let deadline = self.since + self.limit;
        while !condition() {
            if Instant::now() > deadline {
                let said: Vec<u8> = self.stderr.try_iter().flatten().collect();
                let said = String::from_utf8_lossy(&said);
                panic!("capsid does not reach {what}; stderr: {said:?}");
            }
            thread::sleep(LOOK_STEP);
        }
    }

    /// Closes our end of its standard output; gives back what had come and was not taken.
    pub fn close_output(&mut self) -> Vec<u8> {
        let (_none, closed) = mpsc::channel();
        std::mem::replace(&mut self.stdout, closed)
            .try_iter()
            .flatten()
            .collect()
    }

    /// Waits until the bytes `mark` have come on standard output.
    ///
    /// # Panics
    /// They do not come within its limit, or output ends first.
    #[track_caller]
    pub fn until(&mut self, mark: &str) -> Vec<u8> {
        let deadline = self.since + self.limit;
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains(mark) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.stdout.recv_timeout(left) {
                Ok(bytes) => seen.extend(bytes),
                Err(_) => panic!(
                    "{mark:?} did not come; stdout: {:?}, stderr: {:?}",
                    String::from_utf8_lossy(&seen),
                    String::from_utf8_lossy(&self.stderr.try_iter().flatten().collect::<Vec<u8>>())
                ),
            }
        }
        seen
    }

    /// Waits for the end; the output is what `until` has not taken.
    ///
    /// # Panics
    /// It does not end within its limit.
    #[track_caller]
    pub fn wait(mut self) -> Ended {
        let (done, ended) = mpsc::channel();
        let (pid, limit) = (self.pid(), self.limit);
        let watch = thread::spawn(move || {
            if ended.recv_timeout(limit).is_err() {
                let _gone =
                    nix::sys::signal::kill(Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
                true
            } else {
                false
            }
        });
        let stdout: Vec<u8> = self.stdout.iter().flatten().collect();
        let stderr: Vec<u8> = self.stderr.iter().flatten().collect();
        let status = self.child.wait().expect("our own child");
        done.send(()).ok();
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        assert!(
            !watch.join().expect("the watch does not panic"),
            "capsid did not end within {limit:?}; stderr: {stderr}"
        );
        Ended {
            code: status
                .code()
                .unwrap_or_else(|| 128 + status.signal().expect("a code or a signal")),
            stdout,
            stderr,
            took: self.since.elapsed(),
        }
    }
}

/// The VMM of the `capsid` with this process id: the child by that name of one of its threads (proc(5),
/// /proc/PID/task/TID/children).
pub fn vmm_of(capsid: i32) -> Option<Pid> {
    let threads = fs::read_dir(format!("/proc/{capsid}/task")).ok()?;
    let children: Vec<String> = threads
        .flatten()
        .filter_map(|thread| fs::read_to_string(thread.path().join("children")).ok())
        .collect();
    children
        .iter()
        .flat_map(|line| line.split_whitespace())
        .filter_map(|child| child.parse().ok())
        .find(|child: &i32| {
            fs::read_to_string(format!("/proc/{child}/comm"))
                .is_ok_and(|name| name == "capsid-vmm\n")
        })
        .map(Pid::from_raw)
}

fn collect(mut pipe: impl Read + Send + 'static) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = pipe.read(&mut buffer) {
            if sender.send(buffer[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}
