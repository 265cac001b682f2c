//! Runs a program with a deadline and gives back everything it said.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsStr;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Longest run of one program in a test that sets no limit of its own, in seconds. An emulated host is some
/// thirty times slower than a real one; a test that needs this long is hung.
pub const RUN_TIMEOUT_S: u64 = 240;

/// How often something of another process is looked at. An emulated host has one processor for the look and for what is looked
/// at, and a look costs it milliseconds.
const LOOK_STEP: Duration = Duration::from_millis(20);

/// Waits until `condition` holds, about something that tells nobody when it changes.
///
/// # Panics
/// It does not hold within [`RUN_TIMEOUT_S`].
#[track_caller]
pub fn eventually(what: &str, condition: impl Fn() -> bool) {
    let limit = Duration::from_secs(RUN_TIMEOUT_S);
    assert!(
        holds_by(Instant::now() + limit, condition),
        "not within {limit:?}: {what}"
    );
}

fn holds_by(deadline: Instant, condition: impl Fn() -> bool) -> bool {
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(LOOK_STEP);
    }
    true
}

/// Kills the processes that `picked` says, each told by its directory in /proc.
///
/// # Panics
/// There is no /proc.
pub fn kill_those(picked: impl Fn(&Path) -> bool) {
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
            continue;
        };
        if picked(&entry.path()) {
            // It may end by itself meanwhile.
            let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// Whether a process works in a directory or below it.
pub fn works_in(process: &Path, directory: &Path) -> bool {
    fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd.starts_with(directory))
}

/// A command in the making.
pub struct Run {
    command: Command,
    stdin: Input,
    stdout: Option<Stdio>,
    limit: Duration,
}

/// What a program gets on standard input.
enum Input {
    /// Its end at once.
    Nothing,
    /// These bytes, and its end.
    Bytes(Vec<u8>),
    /// What [`Running::types`] writes.
    Typed,
}

/// How a run ended.
#[derive(Debug)]
pub struct Ended {
    /// The exit code; 128 + n if a signal ended it.
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

    /// Asserts that it gave up with this code and said so in one line that has each of `words`.
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

impl Run {
    /// A program with its arguments.
    pub fn of(command: Command) -> Run {
        Run {
            command,
            stdin: Input::Nothing,
            stdout: None,
            limit: Duration::from_secs(RUN_TIMEOUT_S),
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Run {
        self.command.args(args);
        self
    }

    /// Gives it these bytes on standard input.
    #[must_use]
    pub fn stdin(mut self, bytes: Vec<u8>) -> Run {
        self.stdin = Input::Bytes(bytes);
        self
    }

    /// Keeps its standard input open for [`Running::types`].
    #[must_use]
    pub fn typed(mut self) -> Run {
        self.stdin = Input::Typed;
        self
    }

    /// Gives it more time than [`RUN_TIMEOUT_S`].
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Run {
        self.limit = limit;
        self
    }

    /// Sets an environment variable of the program itself.
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
    /// The program is not on PATH.
    pub fn start(mut self) -> Running {
        self.command
            .stdin(match self.stdin {
                Input::Nothing => Stdio::null(),
                Input::Bytes(_) | Input::Typed => Stdio::piped(),
            })
            .stdout(self.stdout.unwrap_or_else(Stdio::piped))
            .stderr(Stdio::piped());
        let name = self.command.get_program().to_string_lossy().into_owned();
        let mut child = self
            .command
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut stdin = None;
        match (self.stdin, child.stdin.take()) {
            (Input::Bytes(bytes), Some(mut pipe)) => {
                // A container that does not read its input closes the pipe; that is its right.
                thread::spawn(move || drop(pipe.write_all(&bytes)));
            }
            (_, pipe) => stdin = pipe,
        }
        // The command holds its ends of the streams; a pipe ends when all are closed.
        drop(self.command);
        let stdout = match child.stdout.take() {
            Some(pipe) => collect(pipe),
            None => mpsc::channel().1,
        };
        let stderr = collect(child.stderr.take().expect("piped"));
        Running {
            name,
            child,
            stdin,
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

/// A program that runs; killed when dropped, so that a test that fails leaves none.
pub struct Running {
    name: String,
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: mpsc::Receiver<Vec<u8>>,
    stderr: mpsc::Receiver<Vec<u8>>,
    since: Instant,
    limit: Duration,
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid is positive")
    }

    /// Writes to its standard input, which was to be [`Run::typed`].
    ///
    /// # Panics
    /// It was not, or is closed.
    #[track_caller]
    pub fn types(&mut self, keys: impl AsRef<[u8]>) {
        let pipe = self.stdin.as_mut().expect("its input is typed");
        pipe.write_all(keys.as_ref()).expect("it reads its input");
    }

    /// Closes its standard input.
    pub fn close_input(&mut self) {
        self.stdin = None;
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
        if !holds_by(self.since + self.limit, condition) {
            let said: Vec<u8> = self.stderr.try_iter().flatten().collect();
            let said = String::from_utf8_lossy(&said);
            panic!("{} does not reach {what}; stderr: {said:?}", self.name);
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

    /// What comes on standard output within this time.
    pub fn says_within(&mut self, time: Duration) -> String {
        let deadline = Instant::now() + time;
        let left = || deadline.saturating_duration_since(Instant::now());
        let pieces = std::iter::from_fn(|| self.stdout.recv_timeout(left()).ok());
        let said: Vec<u8> = pieces.flatten().collect();
        String::from_utf8_lossy(&said).into_owned()
    }

    /// Closes its standard input and waits for its end; the output is what `until` has not taken.
    ///
    /// # Panics
    /// It does not end within its limit.
    #[track_caller]
    pub fn wait(mut self) -> Ended {
        self.close_input();
        let (done, ended) = mpsc::channel();
        let (pid, limit) = (self.pid(), self.limit);
        let watch = thread::spawn(move || {
            if ended.recv_timeout(limit).is_err() {
                let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
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
            "{} did not end within {limit:?}; stderr: {stderr}",
            self.name
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

impl Drop for Running {
    fn drop(&mut self) {
        // After `wait` both do nothing.
        self.child.kill().expect("our child");
        self.child.wait().expect("our child");
    }
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
