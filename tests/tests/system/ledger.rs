//! The ledger is tested itself: a leak of each class turns it red, and its end turns it green again.

use capsid_tests::bundle::Scratch;
use capsid_tests::ledger::Ledger;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The name of whatever is leaked.
const NAME: &str = "capsid-leak";

/// A leak; its end when dropped, so that a test that fails leaves none.
enum Leak {
    Process {
        child: Child,
        _program: Scratch,
    },
    File(PathBuf),
    Directory(PathBuf),
    Socket {
        _bound: UnixListener,
        _at: Scratch,
    },
    /// By a command, and the words of the command that undoes it.
    Made(Vec<String>),
}

impl Leak {
    /// A process with a name that is ours: the kernel takes it from the path that was executed. It does so after it has let
    /// the parent go on, so this waits until the program itself answers.
    fn process() -> Leak {
        let scratch = Scratch::new("leak");
        let program = scratch.path().join(NAME);
        symlink("/bin/cat", &program).expect("a link");
        let mut child = Command::new(&program)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("cat");
        let (question, answer) = (child.stdin.as_mut(), child.stdout.as_mut());
        question.expect("piped").write_all(b"?").expect("it reads");
        let mut byte = [0];
        answer
            .expect("piped")
            .read_exact(&mut byte)
            .expect("it writes");
        Leak::Process {
            child,
            _program: scratch,
        }
    }

    fn socket() -> Leak {
        let scratch = Scratch::new("leak");
        let socket = UnixListener::bind(scratch.join("socket")).expect("bind");
        Leak::Socket {
            _bound: socket,
            _at: scratch,
        }
    }

    fn file(directory: &str) -> Leak {
        fs::create_dir_all(directory).expect("root");
        let path = Path::new(directory).join(NAME);
        fs::write(&path, "").expect("root");
        Leak::File(path)
    }

    fn directory(parent: &str) -> Leak {
        let path = Path::new(parent).join(NAME);
        fs::create_dir_all(&path).expect("root");
        Leak::Directory(path)
    }

    /// A network namespace with a name; `ip netns add` would leave a mount of its own behind.
    fn netns() -> Leak {
        let at = "/run/netns";
        fs::create_dir_all(at).expect("root");
        fs::write(Path::new(at).join(NAME), "").expect("root");
        Leak::made(
            &format!("unshare --net={at}/{NAME} true"),
            &format!("ip netns del {NAME}"),
        )
    }

    fn made(make: &str, undo: &str) -> Leak {
        command(&words(make));
        Leak::Made(words(undo))
    }
}

impl Drop for Leak {
    fn drop(&mut self) {
        match self {
            Leak::Process { child, .. } => {
                child.kill().expect("our child");
                child.wait().expect("our child");
            }
            Leak::File(path) => fs::remove_file(path).expect("there"),
            Leak::Directory(path) => fs::remove_dir(path).expect("there"),
            Leak::Socket { .. } => {}
            Leak::Made(undo) => command(undo),
        }
    }
}

fn words(line: &str) -> Vec<String> {
    line.split(' ').map(str::to_owned).collect()
}

#[track_caller]
fn command(words: &[String]) {
    let status = Command::new(&words[0]).args(&words[1..]).status();
    let status = status.unwrap_or_else(|error| panic!("{words:?}: {error}"));
    assert!(status.success(), "{words:?}: {status}");
}

/// Asserts that the ledger shows this leak as of `class`, and nothing once it is gone.
#[track_caller]
fn seen(class: &str, leak: impl FnOnce() -> Leak) {
    let before = Ledger::now();
    let leak = leak();
    let left = before.added();
    drop(leak);
    assert!(
        left.iter()
            .any(|entry| entry.starts_with(&format!("{class}: "))),
        "a leak of class {class} shows as {left:?}"
    );
    before.balances();
}

#[test]
fn the_ledger_sees_a_seeded_leak_of_each_class() {
    // The directory is made first: the mount is to be the only leak.
    let mounted = Scratch::new("leak-mount");
    let at = mounted.path().display();
    seen("process", Leak::process);
    seen("mount", || {
        Leak::made(
            &format!("mount -t tmpfs {NAME} {at}"),
            &format!("umount {at}"),
        )
    });
    seen("unix socket", Leak::socket);
    seen("link", || {
        // A name of an interface has 15 bytes at most.
        Leak::made(
            &format!("ip link add {NAME} type dummy"),
            &format!("ip link del {NAME}"),
        )
    });
    seen("netns", Leak::netns);
    seen("tmp", || Leak::file("/tmp"));
    seen("shm", || Leak::file("/dev/shm"));
    seen("run", || Leak::file("/run/capsid"));
    seen("cgroup", || Leak::directory("/sys/fs/cgroup"));
    seen("cache temporary", || {
        Leak::directory("/var/cache/capsid/tmp")
    });
}

#[test]
fn the_ledger_does_not_count_the_processes_of_others() {
    let before = Ledger::now();
    let mut other = Command::new("sleep").arg("1000").spawn().expect("sleep");
    let added = before.added();
    other.kill().expect("our child");
    other.wait().expect("our child");
    assert!(added.is_empty(), "{added:?}");
}
