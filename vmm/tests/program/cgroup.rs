//! A VMM that its owner lets be born in a cgroup (docs/decisions/0013): all of it is in there, and stays within its limits.
//!
//! `unsafe`: `clone3` into a cgroup and a PID namespace at once.
#![allow(unsafe_code)]

use crate::harness::{Code, Prepared, RUN_TIMEOUT_S, Vmm, block_signals, can_run, contents, named};
use crate::jail::share;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, pidfd_send_signal, waitpid};
use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{File, read_dir, read_to_string};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// include/uapi/linux/sched.h; libc's constant of that name is cut to 32 bits.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// What a VMM of these tests may take, guest memory and all, in MiB.
const MEMORY_MAX_MIB: u64 = 48;
/// What its guest takes, if it can.
const GUEST_MIB: u64 = 256;

/// A cgroup of the test's own, below that of the tests; goes when dropped, when nobody is in it any more.
struct Cgroup(PathBuf);

impl Cgroup {
    /// One with this controller, if one is named; says so loudly if there is none.
    fn new(test: &str, controller: Option<&str>) -> Option<Cgroup> {
        if !can_run(test) {
            return None;
        }
        let name = format!("capsid-test-{}", std::process::id());
        let made = own_cgroup().and_then(|own| {
            let cgroup = Cgroup(own.join(name));
            std::fs::create_dir(&cgroup.0).ok().map(|()| cgroup)
        });
        let has = |cgroup: &Cgroup| {
            let controllers = cgroup.read("cgroup.controllers");
            controller.is_none_or(|wanted| controllers.split_whitespace().any(|one| one == wanted))
        };
        let cgroup = made.filter(has);
        if cgroup.is_none() {
            let with = controller.map(|one| format!(" with the controller {one}"));
            let with = with.unwrap_or_default();
            eprintln!("SKIPPED {test}: needs a cgroup v2 of its own{with}");
        }
        cgroup
    }

    fn read(&self, file: &str) -> String {
        read_to_string(self.0.join(file)).unwrap()
    }

    fn limit(&self, file: &str, value: u64) {
        std::fs::write(self.0.join(file), value.to_string()).unwrap();
    }

    fn threads(&self) -> BTreeSet<String> {
        self.read("cgroup.threads")
            .lines()
            .map(str::to_owned)
            .collect()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

/// The directory of the calling process's cgroup.
fn own_cgroup() -> Option<PathBuf> {
    let mounts = read_to_string("/proc/self/mountinfo").unwrap();
    let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "))?;
    let mount = mount.split(' ').nth(4)?;
    let own = read_to_string("/proc/self/cgroup").unwrap();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new(mount).join(own))
}

/// A VMM that was born in a cgroup; killed when dropped.
struct Born {
    pid: Pid,
    pidfd: OwnedFd,
    serial: File,
    stderr: File,
    ended: bool,
}

impl Born {
    /// As an owner does it: one call makes the PID namespace and the cgroup those of the child.
    fn start(vmm: Vmm, cgroup: &Cgroup) -> Born {
        let Prepared {
            command, serial, ..
        } = &vmm.prepare();
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let words: Vec<CString> = words
            .map(|word| CString::new(word.as_bytes()).unwrap())
            .collect();
        let mut arguments: Vec<_> = words.iter().map(|word| word.as_ptr()).collect();
        arguments.push(std::ptr::null());
        let stderr = named(c"stderr", b"");
        let directory = File::open(&cgroup.0).unwrap();
        let mut pidfd = -1;
        // SAFETY: all zeroes are a value of this plain structure, and mean "as fork(2)".
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        args.flags = CLONE_INTO_CGROUP | (libc::CLONE_NEWPID | libc::CLONE_PIDFD) as u64;
        args.exit_signal = libc::SIGCHLD as u64;
        args.cgroup = directory.as_raw_fd() as u64;
        args.pidfd = (&raw mut pidfd) as u64;
        let before = block_signals();
        // SAFETY: no CLONE_VM and no stack: like fork(2), the child goes on here on a copy of everything.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
        if pid == 0 {
            // SAFETY: other threads may have held locks, so the child allocates nothing and takes none: three system calls on what
            // was made ready before, of which the list ends with a null pointer.
            unsafe {
                libc::dup2(stderr.as_raw_fd(), libc::STDERR_FILENO);
                libc::execve(
                    words[0].as_ptr(),
                    arguments.as_ptr(),
                    [std::ptr::null()].as_ptr(),
                );
                libc::_exit(libc::EXIT_FAILURE);
            }
        }
        before.thread_set_mask().unwrap();
        assert!(pid > 0, "{}", std::io::Error::last_os_error());
        Born {
            pid: Pid::from_raw(pid as i32).unwrap(),
            // SAFETY: the kernel has just made it, for nobody else.
            pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) },
            serial: serial.try_clone().unwrap(),
            stderr,
            ended: false,
        }
    }

    fn printed(&self, text: &str) {
        let deadline = Instant::now() + Duration::from_secs(RUN_TIMEOUT_S as u64);
        while !contents(&self.serial).contains(text) {
            assert!(
                Instant::now() < deadline && !self.ends_within(0),
                "{}",
                contents(&self.stderr)
            );
            std::thread::yield_now();
        }
    }

    fn ends_within(&self, seconds: i64) -> bool {
        let timeout = Timespec {
            tv_sec: seconds,
            tv_nsec: 0,
        };
        poll(
            &mut [PollFd::new(&self.pidfd, PollFlags::IN)],
            Some(&timeout),
        )
        .unwrap()
            == 1
    }

    fn wait(&mut self) -> WaitStatus {
        assert!(self.ends_within(RUN_TIMEOUT_S), "the VMM did not end");
        let (_, status) = waitpid(Some(self.pid), WaitOptions::empty())
            .unwrap()
            .unwrap();
        self.ended = true;
        status
    }
}

impl Drop for Born {
    fn drop(&mut self) {
        if !self.ended {
            let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
            let _ = waitpid(Some(self.pid), WaitOptions::empty());
        }
    }
}

#[test]
fn every_thread_of_a_vmm_is_in_the_cgroup_that_it_was_born_in() {
    let test = "every_thread_of_a_vmm_is_in_the_cgroup_that_it_was_born_in";
    let Some(cgroup) = Cgroup::new(test, None) else {
        return;
    };
    let share = share();
    let mut vmm = Vmm::of(&Code::default().print("up").halt());
    vmm.cpus = 2;
    let fd = share.as_raw_fd();
    vmm.more = format!(r#","shares":[{{"tag":"share","tree_fd":{fd}}}]"#);
    let born = Born::start(vmm, &cgroup);
    born.printed("up");
    let tasks = read_dir(format!("/proc/{}/task", born.pid.as_raw_pid())).unwrap();
    let tasks: BTreeSet<String> = tasks
        .map(|task| task.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(tasks.len() >= 1 + 2 + 4, "{tasks:?}");
    assert_eq!(cgroup.threads(), tasks);
}

#[test]
fn a_vm_takes_no_more_memory_than_its_cgroup_has() {
    let test = "a_vm_takes_no_more_memory_than_its_cgroup_has";
    let Some(cgroup) = Cgroup::new(test, Some("memory")) else {
        return;
    };
    cgroup.limit("memory.max", MEMORY_MAX_MIB << 20);
    if cgroup.0.join("memory.swap.max").exists() {
        cgroup.limit("memory.swap.max", 0);
    }
    let mut vmm = Vmm::of(&Code::default().print("up").touch_from(16 << 20));
    vmm.memory_mib = GUEST_MIB;
    let mut born = Born::start(vmm, &cgroup);
    let status = born.wait();
    assert_eq!(
        status.terminating_signal(),
        Some(libc::SIGKILL),
        "{status:?}"
    );
    assert_eq!(contents(&born.serial), "up");
    let events = cgroup.read("memory.events");
    assert!(events.lines().any(|line| line == "oom_kill 1"), "{events}");
}

#[test]
fn a_vmm_whose_cgroup_has_no_room_for_its_threads_runs_no_guest() {
    let test = "a_vmm_whose_cgroup_has_no_room_for_its_threads_runs_no_guest";
    let Some(cgroup) = Cgroup::new(test, Some("pids")) else {
        return;
    };
    cgroup.limit("pids.max", 1);
    let mut born = Born::start(Vmm::of(&Code::default().print("ran").power_off()), &cgroup);
    let status = born.wait();
    assert!(
        status.exit_status().is_some_and(|code| code != 0),
        "{status:?}"
    );
    let said = contents(&born.stderr);
    assert_eq!(said.lines().count(), 1, "{said}");
    assert_eq!(contents(&born.serial), "");
}
