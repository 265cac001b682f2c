//! The drill: in a VM that runs, each kind of thread does what no thread may do, one thing after the other, as if the guest had
//! taken it over. What comes of it is seen from outside: the whole VMM ends by SIGSYS, or a thread of a share, whose filter lets
//! it open files, is told that there is no such thing.
//!
//! The program is `capsid-vmm-drill`, whose threads make the calls that they are told to (`vmm/src/drill.rs`); it is the same in
//! everything else. The list is [`acts`].
//!
//! `unsafe`: a signal to one thread; the version of Landlock.
#![allow(unsafe_code)]

mod acts;
mod neighbour;

use crate::harness::{Call, Code, Running, Vmm, can_run, named, refused, spawn};
use crate::jail::{IN_THE_SHARE, kind, share};
use acts::{Act, Argument, acts};
use neighbour::Neighbour;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{File, read_dir, read_to_string};
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, Stdio};

/// Where the program is; `cargo xtask test --suite vmm` builds it and says so.
const PROGRAM: &str = "CAPSID_VMM_DRILL";
/// The page of orders, in bytes, and where in it is what arguments point to.
const PAGE_BYTES: u64 = 4096;
const DATA_OFFSET: u64 = 64;
/// How long a thread may take to do what it is told.
const ANSWER_TIMEOUT_S: i64 = 60;
/// The first version of Landlock that knows of sockets outside its domain.
const SCOPED: i64 = 6;
/// A disk that the guest may not change.
const DISK: &[u8] = &[7; 4096];

/// The kinds of threads, by the name of one of each. The first thread of a share makes the others and gave up other things.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Main,
    Vcpu,
    Disk,
    ShareLead,
    Share,
}

impl Kind {
    const ALL: [Kind; 5] = [
        Kind::Main,
        Kind::Vcpu,
        Kind::Disk,
        Kind::ShareLead,
        Kind::Share,
    ];

    /// Does something where there are such threads; those of disks are there where no ring can be had.
    fn where_it_is<T: Send>(self, what: impl FnOnce() -> T + Send) -> T {
        match self {
            Kind::Disk => refused(Call::any(libc::SYS_io_uring_setup), Errno::PERM, what),
            _ => what(),
        }
    }

    fn thread(self) -> &'static str {
        match self {
            // The first 15 bytes of the file's name.
            Kind::Main => "capsid-vmm-dril",
            Kind::Vcpu => "vcpu0",
            Kind::Disk => "disk0",
            Kind::ShareLead => "fs0",
            Kind::Share => "fs1",
        }
    }

    fn opens_files(self) -> bool {
        matches!(self, Kind::ShareLead | Kind::Share)
    }
}

/// How an act ended.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// The VMM was ended by this signal.
    Killed(i32),
    Refused(Errno),
    /// It was done, and returned this.
    Done(i64),
}

/// A VM that runs, with one thread of the tester's choice that obeys.
struct Drilled {
    running: Running,
    process: PathBuf,
    thread: i32,
    page: File,
    answers: ChildStdout,
}

impl Drilled {
    fn start(program: &Path, kind: Kind) -> Drilled {
        Drilled::start_with(program, kind, |_| {})
    }

    fn start_with(program: &Path, kind: Kind, change: impl Fn(&mut Command)) -> Drilled {
        let page = named(c"orders", &[]);
        page.set_len(PAGE_BYTES).unwrap();
        let (disk, share) = (named(c"disk", DISK), share());
        let mut vmm = Vmm::of(&Code::default().print("up").halt());
        vmm.program = program.to_owned();
        vmm.more = format!(
            r#","disks":[{{"fd":{},"id":"disk","read_only":true}}],"shares":[{{"tag":"share","tree_fd":{}}}]"#,
            disk.as_raw_fd(),
            share.as_raw_fd(),
        );
        let mut running = vmm.start_by(|command| {
            command.stdin(page.try_clone().unwrap());
            change(command.stdout(Stdio::piped()));
            spawn(command)
        });
        running.printed("up");
        let process = PathBuf::from(format!("/proc/{}", running.child.id()));
        Drilled {
            thread: thread(&process, kind.thread()),
            answers: running.child.stdout.take().unwrap(),
            running,
            process,
            page,
        }
    }

    /// Has the thread make a call; `None` if it never came back from it.
    fn call(&mut self, number: i64, arguments: &[Argument<'_>]) -> Option<i64> {
        let mut data = Vec::new();
        let arguments: Vec<u64> = arguments
            .iter()
            .map(|argument| self.argument(argument, &mut data))
            .collect();
        self.page.write_all_at(&data, DATA_OFFSET).unwrap();
        self.page.write_all_at(&number.to_ne_bytes(), 8).unwrap();
        for (offset, argument) in (16..).step_by(8).zip(&arguments) {
            self.page
                .write_all_at(&argument.to_ne_bytes(), offset)
                .unwrap();
        }
        let (process, thread) = (self.running.child.id() as i32, self.thread);
        // SAFETY: it takes no address.
        let sent =
            unsafe { libc::syscall(libc::SYS_tgkill, process, thread, libc::SIGRTMIN() + 1) };
        assert_eq!(sent, 0, "{}", std::io::Error::last_os_error());
        let timeout = Timespec {
            tv_sec: ANSWER_TIMEOUT_S,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::new(&self.answers, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&timeout)), Ok(1), "no answer");
        let mut answer = [0; 8];
        let answered = self.answers.read_exact(&mut answer);
        answered.ok().map(|()| i64::from_ne_bytes(answer))
    }

    /// An argument as the thread passes it; what it points to goes into the page.
    fn argument(&self, argument: &Argument<'_>, data: &mut Vec<u8>) -> u64 {
        let mut address = [0; 8];
        self.page.read_exact_at(&mut address, 0).unwrap();
        let page = u64::from_ne_bytes(address);
        let mut stored = |bytes: &[u8]| {
            let place = page + DATA_OFFSET + data.len() as u64;
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(8), 0);
            place
        };
        match argument {
            Argument::Number(number) => *number as u64,
            Argument::Text(text) => stored(text.to_bytes_with_nul()),
            Argument::Bytes(bytes) => stored(bytes),
            Argument::Page => page,
            Argument::ShareRoot => {
                let share = thread(&self.process, Kind::ShareLead.thread());
                fd(&fds(&self.task(share)), "root of a share")
            }
            Argument::HostFile => self.host_file(),
            Argument::HostFileName => stored(format!("{}\0", self.host_file()).as_bytes()),
        }
    }

    fn task(&self, thread: i32) -> PathBuf {
        self.process.join("task").join(thread.to_string())
    }

    /// The number of the serial port's file.
    fn host_file(&self) -> u64 {
        fd(&fds(&self.process), "/memfd:test (deleted)")
    }

    fn end(mut self) -> Option<i32> {
        self.running.child.wait().unwrap().signal()
    }

    fn does(mut self, number: i64, arguments: &[Argument<'_>]) -> Outcome {
        match self.call(number, arguments) {
            Some(result @ -4095..0) => Outcome::Refused(Errno::from_raw_os_error(-result as i32)),
            Some(result) => Outcome::Done(result),
            None => Outcome::Killed(self.end().expect("a signal")),
        }
    }
}

/// What descriptors a process or a thread holds, by their numbers.
fn fds(place: &Path) -> BTreeMap<u64, String> {
    let fds = read_dir(place.join("fd")).unwrap();
    let fds = fds.map(|fd| fd.unwrap().path());
    fds.map(|fd| {
        let number = fd.file_name().unwrap().to_str().unwrap();
        (number.parse().unwrap(), kind(&fd))
    })
    .collect()
}

/// The number of the first descriptor of this kind.
fn fd(fds: &BTreeMap<u64, String>, wanted: &str) -> u64 {
    let found = fds.iter().find(|(_, kind)| *kind == wanted);
    *found.expect(wanted).0
}

/// The number of the thread of this name.
fn thread(process: &Path, name: &str) -> i32 {
    let named = |task: &PathBuf| read_to_string(task.join("comm")).unwrap().trim_end() == name;
    let tasks = read_dir(process.join("task")).unwrap();
    let mut tasks = tasks.map(|task| task.unwrap().path());
    let task = tasks.find(named).expect(name);
    task.file_name().unwrap().to_str().unwrap().parse().unwrap()
}

/// The drill's program, or a loud word that the test cannot run.
fn program(test: &str) -> Option<PathBuf> {
    if !can_run(test) {
        return None;
    }
    let program = std::env::var_os(PROGRAM);
    if program.is_none() {
        eprintln!("SKIPPED {test}: needs {PROGRAM}, which `cargo xtask test --suite vmm` sets");
    }
    program.map(PathBuf::from)
}

/// Has a thread of this kind try everything, each thing in a VM of its own, beside another VM.
fn drill(test: &str, kind: Kind) {
    let Some(program) = program(test) else {
        return;
    };
    // It obeys, so that what follows is no silence.
    let idle = Drilled::start(&program, kind).does(libc::SYS_sched_yield, &[]);
    assert_eq!(idle, Outcome::Done(0));
    if kind.opens_files() {
        let own = [
            Argument::Number(i64::from(libc::AT_FDCWD)),
            Argument::Text(IN_THE_SHARE),
            Argument::Number(i64::from(libc::O_RDONLY)),
        ];
        let opened = Drilled::start(&program, kind).does(libc::SYS_openat, &own);
        assert!(matches!(opened, Outcome::Done(_)), "{opened:?}");
    }
    let mut neighbour = Neighbour::start();
    for Act {
        what,
        call,
        arguments,
        share,
    } in acts(&neighbour)
    {
        let outcome = Drilled::start(&program, kind).does(call, &arguments);
        let expected = match share {
            Some(errno) if kind.opens_files() => Outcome::Refused(errno),
            _ => Outcome::Killed(libc::SIGSYS),
        };
        assert_eq!(outcome, expected, "{kind:?}: {what}");
    }
    neighbour.is_unharmed();
}

#[test]
fn the_main_thread_does_none_of_the_forbidden_acts() {
    drill(
        "the_main_thread_does_none_of_the_forbidden_acts",
        Kind::Main,
    );
}

#[test]
fn a_vcpus_thread_does_none_of_the_forbidden_acts() {
    drill("a_vcpus_thread_does_none_of_the_forbidden_acts", Kind::Vcpu);
}

#[test]
fn a_disks_thread_does_none_of_the_forbidden_acts() {
    let test = "a_disks_thread_does_none_of_the_forbidden_acts";
    Kind::Disk.where_it_is(|| drill(test, Kind::Disk));
}

#[test]
fn the_first_thread_of_a_share_does_none_of_the_forbidden_acts() {
    let test = "the_first_thread_of_a_share_does_none_of_the_forbidden_acts";
    drill(test, Kind::ShareLead);
}

#[test]
fn another_thread_of_a_share_does_none_of_the_forbidden_acts() {
    let test = "another_thread_of_a_share_does_none_of_the_forbidden_acts";
    drill(test, Kind::Share);
}

#[test]
fn a_thread_of_a_share_has_no_descriptor_of_the_vmm_and_finds_none_by_name() {
    let test = "a_thread_of_a_share_has_no_descriptor_of_the_vmm_and_finds_none_by_name";
    let Some(program) = program(test) else {
        return;
    };
    for kind in [Kind::ShareLead, Kind::Share] {
        // Where no ring can be had, the VMM holds disks by descriptors.
        Kind::Disk.where_it_is(|| {
            let mut vm = Drilled::start(&program, kind);
            let (process, own) = (fds(&vm.process), fds(&vm.task(vm.thread)));
            for held in [
                "/memfd:disk (deleted)",
                "/memfd:test (deleted)",
                "eventpoll",
            ] {
                fd(&process, held);
                assert!(!own.values().any(|kind| kind == held), "{own:?}");
            }
            // What goes by one of the other numbers is its own, or was kept for it.
            let numbers = process
                .iter()
                .filter(|(number, _)| !own.contains_key(number));
            for (number, what) in numbers {
                let number = *number as i64;
                let copied = vm.call(libc::SYS_dup, &[Argument::Number(number)]);
                assert_eq!(copied, Some(-i64::from(libc::EBADF)), "{what}");
                let name = CString::new(number.to_string()).unwrap();
                let by_name = [
                    Argument::Number(i64::from(libc::AT_FDCWD)),
                    Argument::Text(&name),
                    Argument::Number(i64::from(libc::O_RDONLY)),
                ];
                let opened = vm.call(libc::SYS_openat, &by_name);
                assert_eq!(opened, Some(-i64::from(libc::ENOENT)), "{what}");
            }
        });
    }
}

#[test]
fn no_thread_makes_a_call_of_i386() {
    /// `I386` of the drill, and getpid in that table.
    const CALL: i64 = (1 << 32) + 20;
    let Some(program) = program("no_thread_makes_a_call_of_i386") else {
        return;
    };
    for kind in Kind::ALL {
        let outcome = kind.where_it_is(|| Drilled::start(&program, kind).does(CALL, &[]));
        // A kernel without that table answers the instruction itself.
        let ends = [libc::SIGSYS, libc::SIGSEGV].map(Outcome::Killed);
        assert!(ends.contains(&outcome), "{kind:?}: {outcome:?}");
    }
}

#[test]
fn what_the_filter_lets_through_landlock_refuses() {
    let test = "what_the_filter_lets_through_landlock_refuses";
    let Some(program) = program(test) else {
        return;
    };
    if landlock() < SCOPED {
        eprintln!("SKIPPED {test}: needs a kernel whose Landlock knows scopes (Linux 6.12)");
        return;
    }
    // The main thread may send on any socket that it was given, and this one is of the host's network.
    let name = format!("capsid-drill-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(&name).unwrap();
    let receiver = UnixDatagram::bind_addr(&address).unwrap();
    let sender = UnixDatagram::unbound().unwrap();
    sender.send_to_addr(b"ours", &address).unwrap();
    let mut received = [0; 8];
    assert_eq!(receiver.recv(&mut received).unwrap(), 4);
    receiver.set_nonblocking(true).unwrap();

    let vm = Drilled::start_with(&program, Kind::Main, |command| {
        command.stderr(OwnedFd::from(sender.try_clone().unwrap()));
    });
    // struct sockaddr_un.
    let family = (libc::AF_UNIX as u16).to_ne_bytes();
    let address = [&family, &b"\0"[..], name.as_bytes()].concat();
    let outcome = vm.does(
        libc::SYS_sendto,
        &[
            Argument::Number(2),
            Argument::Text(c"theirs"),
            Argument::Number(6),
            Argument::Number(0),
            Argument::Bytes(&address),
            Argument::Number(address.len() as i64),
        ],
    );
    assert_eq!(outcome, Outcome::Refused(Errno::PERM));
    let nothing = receiver.recv(&mut received).unwrap_err();
    assert_eq!(nothing.kind(), std::io::ErrorKind::WouldBlock);
}

/// The version of this kernel's Landlock; below 0 if it has none.
fn landlock() -> i64 {
    // SAFETY: with this flag the kernel takes no address.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) }
}
