//! A containerd of a test's own: its directories, its socket, its log, its `ctr`.
//!
//! Nothing of it is shared with the host's or with another test's, but for what every containerd keeps at one place:
//! `/run/containerd/s` and `/run/containerd/fifo`.

use crate::bundle::Scratch;
use crate::capsid::image;
use crate::command::{RUN_TIMEOUT_S, Run, eventually, kill_those, works_in};
use crate::ledger::{self, Ledger};
use nix::mount::{MntFlags, umount2};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The name that containerd gives the test image when it imports it.
pub const IMAGE: &str = "docker.io/capsid/busybox:latest";
/// The namespace that `ctr` uses when it is told none.
pub const NAMESPACE: &str = "default";
/// Where each containerd puts the sockets of its shims, unless it is told another place.
pub const SHIM_SOCKETS: &str = "/run/containerd/s";

/// How much of a containerd's log a test that failed shows.
const LOG_TAIL_LINES: usize = 60;
/// One message of `sd_notify` is a few words.
const NOTIFY_MAX_BYTES: usize = 4096;

/// The containerds that the shim is for, one for each way in which they speak to a shim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Release {
    /// 1.7: Debian 13's, as a person installs it. Task v2 alone.
    V1_7,
    /// 2.1: Debian sid's, unpacked. Task v3, started without BootstrapParams.
    V2_1,
    /// 2.3: Go's. Task v3, started with BootstrapParams.
    V2_3,
}

impl Release {
    /// Where its programs are.
    ///
    /// # Panics
    /// The variable that says so is not set.
    pub fn programs(self) -> PathBuf {
        let variable = match self {
            Release::V1_7 => return PathBuf::from("/usr/bin"),
            Release::V2_1 => "CAPSID_CONTAINERD_V2_1",
            Release::V2_3 => "CAPSID_CONTAINERD_V2_3",
        };
        std::env::var_os(variable)
            .map(PathBuf::from)
            .unwrap_or_else(|| {
                panic!(
                    "{variable} names no directory; `cargo xtask test --suite containerd` sets it"
                )
            })
    }

    fn name(self) -> &'static str {
        match self {
            Release::V1_7 => "v1_7",
            Release::V2_1 => "v2_1",
            Release::V2_3 => "v2_3",
        }
    }
}

/// What containers are run with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// containerd's own shim and runc.
    Runc,
    /// Ours.
    Capsid,
}

impl Runtime {
    /// Its name in containerd.
    pub fn name(self) -> &'static str {
        match self {
            Runtime::Runc => "io.containerd.runc.v2",
            Runtime::Capsid => "io.containerd.capsid.v2",
        }
    }

    /// Its shim's program; that of containerd 1.7 for runc, which is the one that CRI-O is built with.
    pub fn shim(self) -> &'static str {
        match self {
            Runtime::Runc => "/usr/bin/containerd-shim-runc-v2",
            Runtime::Capsid => "containerd-shim-capsid-v2",
        }
    }
}

/// A containerd that runs, with the test image. Killed when dropped, with every shim that it started.
pub struct Daemon {
    release: Release,
    runtime: Runtime,
    child: Option<Child>,
    scratch: Scratch,
}

impl Daemon {
    /// Starts one with nothing in it but the test image.
    ///
    /// # Panics
    /// It does not start; its log says why.
    pub fn start(release: Release, runtime: Runtime) -> Daemon {
        let mut daemon = Daemon {
            release,
            runtime,
            child: None,
            scratch: Scratch::new(release.name()),
        };
        let root = daemon.scratch.join("root");
        let state = daemon.state();
        let text = format!(
            "version = 2\nroot = {root:?}\nstate = {state:?}\n\
             [grpc]\naddress = {:?}\n[debug]\nlevel = \"debug\"\n",
            daemon.socket()
        );
        fs::write(daemon.scratch.join("config.toml"), text).expect("a directory of ours");
        daemon.start_again();
        let image = image();
        daemon
            .ctr([
                OsStr::new("images"),
                OsStr::new("import"),
                image.as_os_str(),
            ])
            .wait()
            .exits(0);
        daemon
    }

    /// Starts it after [`Daemon::stop`], with what it had.
    ///
    /// # Panics
    /// It does not start; its log says why.
    pub fn start_again(&mut self) {
        assert!(self.child.is_none(), "it runs");
        let notify = self.scratch.join("notify");
        let ready = UnixDatagram::bind(&notify).expect("a directory of ours");
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log())
            .expect("a directory of ours");
        let mut command = Command::new(self.release.programs().join("containerd"));
        command
            .args(["--config", &self.scratch.join("config.toml")])
            .env("PATH", search_path(&self.release.programs()))
            .env("NOTIFY_SOCKET", &notify)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.child = Some(command.spawn().expect("containerd is there"));
        self.wait_until_ready(&ready);
        fs::remove_file(&notify).expect("bound above");
    }

    /// Waits until it says, as to systemd, that it is ready.
    fn wait_until_ready(&self, ready: &UnixDatagram) {
        let pid = rustix::process::Pid::from_raw(self.pid().as_raw()).expect("a child's");
        let end = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
            .expect("our child");
        let timeout = u32::try_from(RUN_TIMEOUT_S * 1000).expect("some minutes");
        loop {
            let mut fds = [
                PollFd::new(ready.as_fd(), PollFlags::POLLIN),
                PollFd::new(end.as_fd(), PollFlags::POLLIN),
            ];
            let timeout = PollTimeout::try_from(timeout).expect("some minutes");
            let count = poll(&mut fds, timeout).expect("poll");
            assert!(count > 0, "containerd is not ready in {RUN_TIMEOUT_S} s");
            assert!(
                !fds[1].any().unwrap_or_default(),
                "containerd ended before it was ready"
            );
            let mut message = [0; NOTIFY_MAX_BYTES];
            let length = ready.recv(&mut message).expect("a message");
            let text = String::from_utf8_lossy(&message[..length]).into_owned();
            if text.lines().any(|line| line == "READY=1") {
                return;
            }
        }
    }

    /// Ends it by a signal and waits for its end; shims and containers go on.
    ///
    /// # Panics
    /// It does not run.
    pub fn stop(&mut self, signal: Signal) {
        kill(self.pid(), signal).expect("it runs");
        let mut child = self.child.take().expect("it runs");
        child.wait().expect("our child");
    }

    /// Its process.
    ///
    /// # Panics
    /// It does not run.
    pub fn pid(&self) -> Pid {
        let child = self.child.as_ref().expect("it runs");
        Pid::from_raw(i32::try_from(child.id()).expect("a pid is positive"))
    }

    /// What its containers are run with.
    pub fn runtime(&self) -> Runtime {
        self.runtime
    }

    /// Its directory for what a reboot may take away.
    pub fn state(&self) -> String {
        self.scratch.join("state")
    }

    /// The ledger of the host and of this containerd, which is to go on.
    pub fn ledger(&self) -> Ledger {
        Ledger::with(ledger::Daemon {
            pid: u32::try_from(self.pid().as_raw()).expect("a pid is positive"),
            bundles: self.bundle(""),
        })
    }

    /// The bundle of a container.
    pub fn bundle(&self, id: &str) -> PathBuf {
        Path::new(&self.state())
            .join("io.containerd.runtime.v2.task")
            .join(NAMESPACE)
            .join(id)
    }

    /// A path for a file of a test, removed with the daemon.
    pub fn file(&self, name: &str) -> String {
        self.scratch.join(&format!("test-{name}"))
    }

    fn socket(&self) -> String {
        self.scratch.join("containerd.sock")
    }

    fn log(&self) -> String {
        self.scratch.join("log")
    }

    /// Its `ctr`, and how it is told which containerd is meant.
    pub fn client(&self) -> [String; 3] {
        let ctr = self.release.programs().join("ctr");
        [
            ctr.to_string_lossy().into_owned(),
            "--address".to_owned(),
            self.socket(),
        ]
    }

    /// `ctr` with arguments as given.
    pub fn ctr<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Run {
        let [ctr, words @ ..] = self.client();
        Run::of(Command::new(ctr)).args(words).args(args)
    }

    /// The words of `ctr run FLAGS IMAGE ID sh -c SCRIPT` behind those of [`Daemon::client`].
    pub fn words<'a>(&self, flags: &[&'a str], id: &'a str, script: &'a str) -> Vec<&'a str> {
        let mut words = vec!["run", "--runtime", self.runtime.name()];
        words.extend(flags);
        words.extend([IMAGE, id, "sh", "-c", script]);
        words
    }

    /// `ctr run FLAGS IMAGE ID sh -c SCRIPT`, with the runtime under test.
    pub fn run(&self, flags: &[&str], id: &str, script: &str) -> Run {
        self.ctr(self.words(flags, id, script))
    }

    /// `ctr tasks exec ID sh -c SCRIPT`.
    pub fn exec(&self, exec_id: &str, id: &str, script: &str) -> Run {
        self.ctr([
            "tasks",
            "exec",
            "--exec-id",
            exec_id,
            id,
            "sh",
            "-c",
            script,
        ])
    }

    /// `ctr tasks VERB ID`, which is to succeed.
    ///
    /// # Panics
    /// It does not.
    #[track_caller]
    pub fn task(&self, verb: &[&str], id: &str) -> String {
        let ended = self.ctr(["tasks"]).args(verb).args([id]).wait();
        ended.exits(0).text()
    }

    /// `ctr tasks delete ID`; the exit code that the container had.
    ///
    /// # Panics
    /// It does not go.
    #[track_caller]
    pub fn delete(&self, id: &str) -> i32 {
        let ended = self.ctr(["tasks", "delete", id]).wait();
        ended.exits(0);
        // `ctr` itself exits with 0 and says it only if it is another.
        let Some((_, code)) = ended.stderr.split_once("exit with non-zero exit code ") else {
            return 0;
        };
        let digits = code.split(|c: char| !c.is_ascii_digit()).next();
        digits
            .and_then(|digits| digits.parse().ok())
            .unwrap_or_else(|| panic!("a code in {:?}", ended.stderr))
    }

    /// The pid and the status of a task by `ctr tasks ls`; none if it does not list it.
    ///
    /// # Panics
    /// What it lists is not what it used to be.
    #[track_caller]
    pub fn status(&self, id: &str) -> Option<(i32, String)> {
        let list = self.ctr(["tasks", "ls"]).wait().exits(0).text();
        let line = list
            .lines()
            .find(|line| line.split_whitespace().next() == Some(id))?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, pid, status] = words[..] else {
            panic!("a task is listed as {line:?}");
        };
        Some((pid.parse().expect("a pid"), status.to_owned()))
    }

    /// Waits until a task has a status: `ctr` has no way to be told.
    ///
    /// # Panics
    /// It does not get it.
    #[track_caller]
    pub fn reaches(&self, id: &str, status: &str) {
        eventually(&format!("{id} is {status}"), || {
            self.status(id).is_some_and(|(_, now)| now == status)
        });
    }

    /// Everything that it knows of containers, as `ctr` lists it.
    ///
    /// # Panics
    /// A list cannot be had.
    #[track_caller]
    pub fn objects(&self) -> String {
        let kinds = ["tasks", "containers", "snapshots", "leases"];
        let lists = kinds.map(|kind| {
            let list = self.ctr([kind, "ls"]).wait().exits(0).text();
            format!("{kind}:\n{list}")
        });
        lists.concat()
    }

    /// Prints the end of its log, for whoever looks at a test that failed.
    fn show_log(&self) {
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let skipped = lines.len().saturating_sub(LOG_TAIL_LINES);
        println!("the last lines of containerd's log:");
        for line in &lines[skipped..] {
            println!("    {line}");
        }
    }

    /// Kills what it started and did not end: what works in its directories, or was told its socket.
    fn kill_shims(&self) {
        let socket = self.socket();
        kill_those(|process| {
            let command = fs::read(process.join("cmdline")).unwrap_or_default();
            let mut words = command.split(|byte| *byte == 0);
            works_in(process, self.scratch.path()) || words.any(|word| word == socket.as_bytes())
        });
    }

    /// Takes away what is mounted in its directories, the last first.
    fn unmount(&self) {
        let table = fs::read_to_string("/proc/self/mountinfo").expect("/proc");
        let points = table.lines().filter_map(|line| line.split(' ').nth(4));
        let ours = points.filter(|point| Path::new(point).starts_with(self.scratch.path()));
        for point in ours.collect::<Vec<_>>().into_iter().rev() {
            // A shim may have done it meanwhile; one that stays is told by the removal of the directory.
            let _gone = umount2(point, MntFlags::MNT_DETACH);
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.show_log();
        }
        if self.child.is_some() {
            self.stop(Signal::SIGKILL);
        }
        self.kill_shims();
        self.unmount();
    }
}

fn search_path(first: &Path) -> OsString {
    let rest = std::env::var_os("PATH").unwrap_or_default();
    let all = std::iter::once(first.to_owned()).chain(std::env::split_paths(&rest));
    std::env::join_paths(all).expect("no directory of ours has a colon in its name")
}
