//! A container's life: it runs, is looked at, is told things, ends.

use capsid_tests::command::Running;
use capsid_tests::containerd::Daemon;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Runs for ever once it has said so.
pub(crate) const UP: &str = "echo up; exec sleep 100000";
/// Says every line that it hears.
const ECHO: &str = "echo up; while read line; do echo heard $line; done";
/// For so long a container that stands still is seen to say nothing.
const SILENCE: Duration = Duration::from_secs(2);

/// A container that is up, in the foreground of its `ctr`.
fn up(daemon: &Daemon, id: &str, script: &str) -> Running {
    let mut running = daemon.run(&[], id, script).typed().start();
    running.until("up\n");
    running
}

/// Ends a container and takes it away, with its `ctr`.
#[track_caller]
fn end(daemon: &Daemon, running: Running, id: &str) {
    daemon.task(&["kill", "--signal", "SIGKILL"], id);
    running.wait().exits(137);
    daemon.ctr(["containers", "delete", id]).wait().exits(0);
}

pub(crate) fn run_prints_and_exits_with_the_code(daemon: &Daemon) {
    let script = "echo out; echo err >&2; exit 7";
    let ended = daemon.run(&["--rm"], "one", script).wait();
    ended.exits(7);
    assert_eq!(
        (ended.text().as_str(), ended.stderr.as_str()),
        ("out\n", "err\n")
    );
}

pub(crate) fn exec_in_a_running_container(daemon: &Daemon) {
    let running = up(daemon, "one", &format!("echo here > /mark; {UP}"));
    let script = "cat /mark; cat; echo err >&2; exit 5";
    let mut exec = daemon.exec("first", "one", script).typed().start();
    exec.until("here\n");
    exec.types("typed\n");
    let ended = exec.wait();
    ended.exits(5);
    assert_eq!(
        (ended.text().as_str(), ended.stderr.as_str()),
        ("typed\n", "err\n")
    );
    // A name may be used again once its process has been deleted.
    for name in ["first", "second"] {
        daemon.exec(name, "one", "exit 3").wait().exits(3);
    }
    end(daemon, running, "one");
}

pub(crate) fn kill_is_137(daemon: &Daemon) {
    let running = up(daemon, "one", UP);
    daemon.task(&["kill", "--signal", "SIGKILL"], "one");
    running.wait().exits(137);
    assert_eq!(daemon.status("one"), None);
}

pub(crate) fn a_signal_reaches_the_container(daemon: &Daemon) {
    let script = "trap 'echo got TERM; exit 33' TERM; echo up; while :; do sleep 0.1; done";
    let mut running = up(daemon, "one", script);
    daemon.task(&["kill", "--signal", "SIGTERM"], "one");
    running.until("got TERM\n");
    running.wait().exits(33);
}

/// The pid is a process (or a thread) of this host that has the container's root and network, never the host's.
pub(crate) fn task_ls_shows_the_pid_and_status(daemon: &Daemon) {
    let running = up(daemon, "one", UP);
    let other = up(daemon, "two", UP);
    let pids = ["one", "two"].map(|id| {
        let (pid, status) = daemon.status(id).expect("it is listed");
        assert_eq!(status, "RUNNING");
        let of = |name: &str| Path::new("/proc").join(pid.to_string()).join(name);
        assert_ne!(inode(&of("root")), inode(Path::new("/")), "{id}: {pid}");
        assert_ne!(
            inode(&of("ns/net")),
            inode(&PathBuf::from("/proc/self/ns/net")),
            "{id}: {pid}"
        );
        pid
    });
    assert_ne!(pids[0], pids[1]);
    end(daemon, other, "two");
    // Its pid is told as long as it is there, whatever became of it.
    let pid = pids[0];
    drop(running);
    daemon.task(&["kill", "--signal", "SIGKILL"], "one");
    daemon.reaches("one", "STOPPED");
    assert_eq!(daemon.status("one"), Some((pid, "STOPPED".to_owned())));
    // The code of the command is the container's.
    assert_eq!(daemon.delete("one"), 137);
    assert_eq!(daemon.status("one"), None);
}

pub(crate) fn task_ps_shows_the_pid(daemon: &Daemon) {
    let running = up(daemon, "one", UP);
    let (pid, _) = daemon.status("one").expect("listed");
    let table = daemon.task(&["ps"], "one");
    let listed = table
        .lines()
        .any(|line| line.split_whitespace().next() == Some(&pid.to_string()));
    assert!(listed, "{pid} in: {table}");
    end(daemon, running, "one");
}

fn inode(path: &Path) -> (u64, u64) {
    let metadata = fs::metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    (metadata.dev(), metadata.ino())
}

pub(crate) fn pause_and_resume(daemon: &Daemon) {
    let mut running = up(daemon, "one", ECHO);
    running.types("first\n");
    running.until("heard first\n");
    daemon.task(&["pause"], "one");
    assert_eq!(daemon.status("one").expect("listed").1, "PAUSED");
    running.types("second\n");
    assert_eq!(running.says_within(SILENCE), "");
    daemon.task(&["resume"], "one");
    assert_eq!(daemon.status("one").expect("listed").1, "RUNNING");
    running.until("heard second\n");
    // The end of its input is the end of the script.
    running.wait().exits(0);
}

pub(crate) fn metrics_are_there(daemon: &Daemon) {
    // Some memory of its own, and some time.
    let script =
        "dd if=/dev/zero of=/dev/shm/held bs=1M count=8 2>/dev/null; echo up; exec sleep 100000";
    let running = up(daemon, "one", script);
    let metrics = daemon.task(&["metrics"], "one");
    for (name, least) in [
        ("cpu.usage_usec", 1000),
        ("memory.usage", 8 << 20),
        ("pids.current", 1),
    ] {
        let value = metrics
            .lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
        assert!(
            value.is_some_and(|value| value >= least),
            "{name} in: {metrics}"
        );
    }
    end(daemon, running, "one");
}

pub(crate) fn attach_again(daemon: &Daemon) {
    let mut client = up(daemon, "one", ECHO);
    for line in ["first", "second", "third"] {
        client.types(format!("{line}\n"));
        client.until(&format!("heard {line}\n"));
        kill(Pid::from_raw(client.pid()), Signal::SIGKILL).expect("it runs");
        client.wait().exits(137);
        assert_eq!(daemon.status("one").expect("listed").1, "RUNNING");
        client = daemon.ctr(["tasks", "attach", "one"]).typed().start();
    }
    client.types("fourth\n");
    client.until("heard fourth\n");
    daemon.task(&["kill", "--signal", "SIGKILL"], "one");
    client.wait().exits(137);
}
