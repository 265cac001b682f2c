//! The program, interrupted while a child of it works: it ends soon and with 128+n, nothing of the child's is left, and the next
//! run is as good as the first. The children are scripts that say through a pipe who they are, then sleep.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};

/// A test that waits longer has failed.
const PATIENCE_S: i64 = 60;
/// It ends within a second; the rest is for a busy machine.
const SOON: Duration = Duration::from_secs(5);

/// A source, programs, a cache and a pipe of the test's own.
struct Bed {
    dir: PathBuf,
    signs: File,
}

/// The program, killed when the test fails.
struct Xtask(Child);

impl Drop for Xtask {
    fn drop(&mut self) {
        // It has mostly ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Bed {
    fn new(name: &str) -> Self {
        let dir =
            std::env::temp_dir().join(format!("xtask-interrupt-{}-{name}", std::process::id()));
        for below in ["bin", "source"] {
            std::fs::create_dir_all(dir.join(below)).expect("a directory");
        }
        for file in ["Kconfig", "Makefile"] {
            std::fs::write(dir.join("source").join(file), "").expect("a source");
        }
        let pipe = dir.join("signs");
        mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a pipe");
        // For both, so that neither opening nor reading ends before a child has come.
        let signs = OpenOptions::new().read(true).write(true).open(&pipe);
        let bed = Self {
            dir,
            signs: signs.expect("the pipe"),
        };
        for compiler in ["gcc", "ld"] {
            bed.program(compiler, "echo 1");
        }
        bed
    }

    /// Puts a script in front of the search path.
    fn program(&self, name: &str, script: &str) {
        let path = self.dir.join("bin").join(name);
        let signs = self.dir.join("signs");
        let text = format!(
            "#!/bin/sh\nsign() {{ echo $$ > '{}'; }}\n{script}\n",
            signs.display()
        );
        std::fs::write(&path, text).expect("a script");
        let mode = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&path, mode).expect("executable");
    }

    /// A make that has a child in a session of its own.
    fn endless_make(&self) {
        self.program(
            "dpkg-query",
            r#"for name; do echo "$name installed 1"; done"#,
        );
        self.program("detached", "sign; exec sleep 1000");
        self.program("make", "setsid detached & sign; wait");
    }

    fn start(&self) -> Xtask {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let first = self.dir.join("bin");
        let all = std::iter::once(first).chain(std::env::split_paths(&path));
        let child = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .args(["kernel", "--source"])
            .arg(self.dir.join("source"))
            .env("PATH", std::env::join_paths(all).expect("a search path"))
            .env("CAPSID_CACHE", self.cache())
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        Xtask(child.expect("it starts"))
    }

    fn cache(&self) -> PathBuf {
        self.dir.join("cache")
    }

    /// The next child that has come.
    fn child(&mut self) -> OwnedFd {
        assert!(readable(&self.signs, PATIENCE_S), "no child came");
        let mut line = Vec::new();
        let mut byte = [0];
        while self.signs.read(&mut byte).expect("a sign") == 1 && byte != *b"\n" {
            line.extend(byte);
        }
        let pid = String::from_utf8_lossy(&line).parse().expect("a number");
        let pid = Pid::from_raw(pid).expect("a process");
        pidfd_open(pid, PidfdFlags::empty()).expect("it runs")
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.dir).expect("removed");
    }
}

/// Whether there is something to read, or the process has ended.
fn readable(what: impl AsFd, seconds: i64) -> bool {
    let patience = Timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    poll(&mut [PollFd::new(&what, PollFlags::IN)], Some(&patience)).expect("polled") > 0
}

/// Interrupts it; returns its exit code and what it said.
fn interrupted(xtask: &mut Xtask, signal: Signal) -> (Option<i32>, String) {
    let pid = Pid::from_child(&xtask.0);
    let process = pidfd_open(pid, PidfdFlags::empty()).expect("it runs");
    let before = Instant::now();
    kill_process(pid, signal).expect("signalled");
    assert!(readable(&process, PATIENCE_S), "it does not end");
    assert!(before.elapsed() < SOON, "it took {:?}", before.elapsed());
    let status = xtask.0.wait().expect("ended");
    let mut text = String::new();
    let mut stderr = xtask.0.stderr.take().expect("piped");
    stderr.read_to_string(&mut text).expect("text");
    (status.code(), text)
}

fn temporaries(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.extension().is_some_and(|end| end == "tmp") {
            found.push(path);
        } else if path.is_dir() {
            found.extend(temporaries(&path));
        }
    }
    found
}

#[test]
fn an_interrupted_build_leaves_no_process_and_no_file() {
    let mut bed = Bed::new("build");
    bed.endless_make();
    // The second run finds the cache as the first found it.
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let mut xtask = bed.start();
        let children = [bed.child(), bed.child()];
        assert!(
            !temporaries(&bed.cache()).is_empty(),
            "nothing is being built"
        );
        let (ended, text) = interrupted(&mut xtask, signal);
        assert_eq!(ended, Some(code), "{text}");
        for child in &children {
            assert!(readable(child, 0), "a child is left");
        }
        assert_eq!(temporaries(&bed.cache()), Vec::<PathBuf>::new());
        // What the interruption itself did to a child is no failure of that.
        assert!(!text.contains("FAILED"), "{text}");
    }
}

/// Whether packages can be installed, if only for show.
fn can_install(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED {test}: needs root");
    }
    root
}

/// Nothing is installed, and apt does this when it is to work.
fn apt(bed: &Bed, work: &str) {
    bed.program("dpkg-query", "exit 0");
    bed.program("apt-get", &format!("[ $1 = --version ] && exit 0\n{work}"));
}

#[test]
fn an_interrupted_installation_is_asked_to_end() {
    if !can_install("an_interrupted_installation_is_asked_to_end") {
        return;
    }
    let mut bed = Bed::new("asked");
    apt(&bed, "sign; exec sleep 1000");
    let mut xtask = bed.start();
    let child = bed.child();
    let (code, text) = interrupted(&mut xtask, Signal::TERM);
    assert_eq!(code, Some(143), "{text}");
    assert!(readable(&child, 0), "apt is left");
}

#[test]
fn an_installation_that_must_not_be_stopped_is_left_to_finish() {
    if !can_install("an_installation_that_must_not_be_stopped_is_left_to_finish") {
        return;
    }
    let mut bed = Bed::new("finishes");
    apt(&bed, "trap '' INT; sign; exec sleep 1000");
    let mut xtask = bed.start();
    let child = bed.child();
    let (code, text) = interrupted(&mut xtask, Signal::INT);
    assert_eq!(code, Some(130), "{text}");
    assert!(
        text.contains("is installing packages and goes on"),
        "{text}"
    );
    assert!(!readable(&child, 0), "apt was killed");
    pidfd_send_signal(&child, Signal::KILL).expect("it is ours");
}
