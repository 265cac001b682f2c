//! The ledger is tested itself: a leak of each class turns it red, and its end turns it green again.

use capsid_tests::bundle::Scratch;
use capsid_tests::ledger::{Daemon, Ledger};
use nix::sched::{CloneFlags, unshare};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;

/// The name of whatever is leaked.
const NAME: &str = "capsid-leak";

/// A leak; its end when dropped, so that a test that fails leaves none.
enum Leak {
    Process {
        child: Child,
        _program: Option<Scratch>,
    },
    /// A thread of ours, which goes when its channel does.
    Thread(Option<(mpsc::Sender<()>, JoinHandle<()>)>),
    /// An open file of ours.
    Open {
        _file: File,
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
    fn process() -> Leak {
        let mut leak = Leak::named("/bin/cat", &[]);
        if let Leak::Process { child, .. } = &mut leak {
            answers(child);
        }
        leak
    }

    /// A program under a name that is ours: the kernel takes it from the path that was executed.
    fn named(program: &str, args: &[&str]) -> Leak {
        let scratch = Scratch::new("leak");
        let path = scratch.path().join(NAME);
        symlink(program, &path).expect("a link");
        let child = on_pipes(Command::new(path).args(args));
        Leak::Process {
            child,
            _program: Some(scratch),
        }
    }

    /// A process whose name is not ours, in new namespaces.
    fn unshared(flags: &str) -> Leak {
        let mut command = Command::new("unshare");
        let mut child = on_pipes(command.args(words(flags)).arg("cat"));
        answers(&mut child);
        Leak::Process {
            child,
            _program: None,
        }
    }

    /// A thread of this process, in new namespaces; it waits until it is in them.
    fn thread(flags: CloneFlags) -> Leak {
        let (end, until) = mpsc::channel::<()>();
        let (ready, is_ready) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            unshare(flags).expect("root");
            ready.send(()).expect("waited for");
            // The end of the channel.
            let _ended = until.recv();
        });
        is_ready.recv().expect("the thread runs");
        Leak::Thread(Some((end, thread)))
    }

    /// The descriptor of a namespace in which nobody is.
    fn held_namespace() -> Leak {
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("root");
            File::open("/proc/thread-self/ns/net").expect("/proc")
        });
        Leak::Open {
            _file: thread.join().expect("the thread runs"),
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

    fn directory(parent: &Path) -> Leak {
        let path = parent.join(NAME);
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
            Leak::Thread(thread) => {
                let (end, thread) = thread.take().expect("dropped once");
                drop(end);
                thread.join().expect("the thread runs");
            }
            Leak::File(path) => fs::remove_file(path).expect("there"),
            Leak::Directory(path) => fs::remove_dir(path).expect("there"),
            Leak::Open { .. } | Leak::Socket { .. } => {}
            Leak::Made(undo) => command(undo),
        }
    }
}

fn on_pipes(command: &mut Command) -> Child {
    let command = command.stdin(Stdio::piped()).stdout(Stdio::piped());
    let child = command.spawn();
    child.unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// Waits until `cat` says what it is told: until then its name and its namespaces may still be those of whoever started it.
fn answers(child: &mut Child) {
    let (question, answer) = (child.stdin.as_mut(), child.stdout.as_mut());
    question.expect("piped").write_all(b"?").expect("it reads");
    let mut byte = [0];
    answer
        .expect("piped")
        .read_exact(&mut byte)
        .expect("it writes");
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
    seen_by(&Ledger::now(), class, leak);
}

#[track_caller]
fn seen_by(before: &Ledger, class: &str, leak: impl FnOnce() -> Leak) {
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
    seen("process", Leak::process);
    seen("unix socket", Leak::socket);
    seen("netns", Leak::netns);
    for (class, directory) in [
        ("tmp", "/tmp"),
        ("shm", "/dev/shm"),
        ("run", "/run/capsid"),
        ("shim socket", "/run/containerd/s"),
        ("fifo", "/run/containerd/fifo"),
        ("runc", "/run/containerd/runc/default"),
    ] {
        seen(class, || Leak::file(directory));
    }
    seen("cache temporary", || {
        Leak::directory(Path::new("/var/cache/capsid/tmp"))
    });
    // However deep: a leak below a cgroup that stays.
    let parent = Leak::directory(Path::new("/sys/fs/cgroup"));
    let Leak::Directory(path) = &parent else {
        unreachable!("made so")
    };
    seen("cgroup", || Leak::directory(path));
}

#[test]
fn the_ledger_sees_a_seeded_mount_here_and_elsewhere() {
    // The directory is made first: the mount is to be the only leak.
    let mounted = Scratch::new("leak-mount");
    let at = mounted.path().display();
    let (make, undo) = (
        format!("mount -t tmpfs {NAME} {at}"),
        format!("umount {at}"),
    );
    seen("mount", || Leak::made(&make, &undo));
    let elsewhere = Leak::unshared("--mount --propagation private");
    let Leak::Process { child, .. } = &elsewhere else {
        unreachable!("made so")
    };
    let enter = format!("nsenter --target {} --mount", child.id());
    seen("mount elsewhere", || {
        Leak::made(&format!("{enter} {make}"), &format!("{enter} {undo}"))
    });
}

#[test]
fn the_ledger_sees_namespaces_whoever_holds_them() {
    let net = "network namespace";
    seen(net, || Leak::unshared("--net"));
    seen(net, || Leak::thread(CloneFlags::CLONE_NEWNET));
    seen(net, Leak::held_namespace);
    seen("mount namespace", || Leak::unshared("--mount"));
    for flags in ["--uts", "--ipc", "--pid --fork --kill-child"] {
        seen("namespace", || Leak::unshared(flags));
    }
}

#[test]
fn the_ledger_sees_links_and_what_is_done_to_them() {
    // A name of an interface has 15 bytes at most.
    seen("link", || {
        Leak::made(
            &format!("ip tuntap add {NAME} mode tap"),
            &format!("ip link del {NAME}"),
        )
    });
    let link = format!("ip link add {NAME} type dummy");
    let _link = Leak::made(&link, &format!("ip link del {NAME}"));
    let clsact = |verb| format!("tc qdisc {verb} dev {NAME} clsact");
    seen("queueing discipline", || {
        Leak::made(&clsact("add"), &clsact("del"))
    });
    let _clsact = Leak::made(&clsact("add"), &clsact("del"));
    let filter = |verb| format!("tc filter {verb} dev {NAME} ingress");
    seen("filter", || {
        Leak::made(
            &format!("{} matchall action ok", filter("add")),
            &filter("del"),
        )
    });
    // The same in a namespace that stays.
    let _netns = Leak::netns();
    seen("link", || {
        Leak::made(
            &format!("ip -n {NAME} {}", &link[3..]),
            &format!("ip -n {NAME} link del {NAME}"),
        )
    });
}

#[test]
fn the_ledger_sees_block_devices() {
    let scratch = Scratch::new("leak-block");
    let disk = scratch.join("disk");
    fs::write(&disk, [0; 4096]).expect("a directory of ours");
    let device = "/dev/loop77";
    seen("loop", || {
        Leak::made(
            &format!("losetup {device} {disk}"),
            &format!("losetup -d {device}"),
        )
    });
    seen("device mapper", || {
        let create = [
            "dmsetup",
            "create",
            "--noudevsync",
            NAME,
            "--table",
            "0 8 error",
        ];
        command(&create.map(str::to_owned));
        Leak::Made(words(&format!("dmsetup remove --noudevsync {NAME}")))
    });
}

#[test]
fn the_ledger_sees_what_a_daemon_keeps() {
    let bundles = Scratch::new("leak-bundles");
    let watched = || {
        Ledger::with(Daemon {
            pid: std::process::id(),
            bundles: bundles.path().to_owned(),
        })
    };
    seen_by(&watched(), "bundle", || Leak::directory(bundles.path()));
    seen_by(&watched(), "descriptor", || Leak::Open {
        _file: File::open("/dev/null").expect("/dev/null"),
    });
    // A zombie is one of somebody who goes on.
    seen_by(&watched(), "zombie", || {
        let mut child = Command::new("cat")
            .stdin(Stdio::piped())
            .spawn()
            .expect("cat");
        drop(child.stdin.take());
        let stat = format!("/proc/{}/stat", child.id());
        let zombie = || {
            fs::read_to_string(&stat)
                .expect("not reaped")
                .contains(") Z ")
        };
        capsid_tests::command::eventually("it ends", zombie);
        Leak::Process {
            child,
            _program: None,
        }
    });
}

/// Starts a thread for a `+`, ends it for a `-`, and says so.
const THREADS: &str = "import sys, _thread
lock = _thread.allocate_lock()
lock.acquire()
for line in sys.stdin:
    if line == '+\\n':
        _thread.start_new_thread(lock.acquire, ())
    if line == '-\\n':
        lock.release()
    print(line, end='', flush=True)
";

#[test]
fn the_ledger_sees_a_thread_more_of_a_process_that_goes_on() {
    let mut leak = Leak::named("/usr/bin/python3", &["-u", "-c", THREADS]);
    let Leak::Process { child, .. } = &mut leak else {
        unreachable!("made so")
    };
    let mut keys = child.stdin.take().expect("piped");
    let mut answers = BufReader::new(child.stdout.take().expect("piped")).lines();
    let mut told = |line: &str| {
        writeln!(keys, "{line}").expect("it reads");
        let answer = answers.next().expect("it answers").expect("text");
        assert_eq!(answer, line);
    };
    told("here");
    let before = Ledger::now();
    told("+");
    let added = before.added();
    told("-");
    before.balances();
    assert!(
        matches!(&added[..], [one] if one.starts_with("thread: ")),
        "{added:?}"
    );
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
