//! System call filters, one for each kind of thread, always on: what a thread does not need kills the process.
//!
//! The rules are data, in [`rules`]. A violation is not reported to the guest or handled: SIGSYS with its
//! default action is the one thing that a compromised thread cannot catch.

mod rules;

use capsid_devices::blk::DISK_SYSCALLS;
use capsid_devices::fs::FS_SYSCALLS;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, sock_filter,
};
use std::collections::BTreeMap;
use vmm_sys_util::signal::SIGRTMIN;

type Calls = BTreeMap<i64, Vec<SeccompRule>>;

/// The most system calls that a filter compares one after the other.
const LEAF_CALLS_MAX: usize = 4;
/// Loads the word at this offset of `struct seccomp_data`; the number of the system call is at 0.
const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const NUMBER_OFFSET: u32 = 0;
/// Skips the next instruction where what was loaded is not less.
const UNLESS_LESS: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
/// Skips so many instructions.
const SKIP: u16 = (libc::BPF_JMP | libc::BPF_JA) as u16;

/// A compiled filter.
pub struct Filter(BpfProgram);

/// The kinds of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Event loop: vsock, rng, balloon, memory that is plugged, disks, network cards, owner channel, signals, the end.
    Main,
    /// One vCPU: `KVM_RUN` and the registers of devices.
    Vcpu,
    /// One thread of a share: [`capsid_devices::fs::FS_SYSCALLS`].
    FileSystem,
    /// One thread that makes the calls of disks: [`capsid_devices::blk::DISK_SYSCALLS`].
    Disk,
}

/// Why a filter could not be made or put on.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The rules cannot be compiled; a defect.
    #[error("cannot compile the system call filter of {0:?} threads")]
    Compile(ThreadKind, #[source] BackendError),
    /// The kernel refused.
    #[error("cannot put on a system call filter; a kernel with CONFIG_SECCOMP_FILTER is needed")]
    Apply(#[source] seccompiler::Error),
}

/// One allowed system call; several rules for one call are alternatives.
struct Rule {
    call: i64,
    /// All of them must hold; none means always.
    when: &'static [When],
}

/// A condition on the lower 32 bits of one argument.
struct When {
    argument: u8,
    test: Test,
}

enum Test {
    Is(u32),
    /// The first, whatever the bits of the second are.
    IsApartFrom(u32, u32),
    /// None of these bits is set.
    Lacks(u32),
    /// The process itself, for signals.
    IsOwnPid,
    /// The signal that stops vCPUs; its number is the C library's to say.
    IsWakeUp,
}

/// Compiles the filter of one kind of thread.
///
/// # Errors
/// A rule makes no sense.
pub fn compile(kind: ThreadKind) -> Result<Filter, FilterError> {
    compile_with(kind, &SeccompAction::KillProcess)
}

fn compile_with(kind: ThreadKind, otherwise: &SeccompAction) -> Result<Filter, FilterError> {
    let failed = |cause| FilterError::Compile(kind, cause);
    let program = calls(kind).and_then(|calls| search(calls, otherwise));
    Ok(Filter(program.map_err(failed)?))
}

/// A program that finds the system call by halves: each leaf is a whole filter, which refuses all but its own calls. Linux runs a
/// filter for each of its 460 numbers when it is put on, to know those that are always allowed; one by one that is a millisecond.
fn search(mut calls: Calls, otherwise: &SeccompAction) -> Result<BpfProgram, BackendError> {
    let middle = calls.keys().nth(calls.len() / 2).copied();
    let Some(middle) = middle.filter(|_| calls.len() > LEAF_CALLS_MAX) else {
        let allow = SeccompAction::Allow;
        let filter = SeccompFilter::new(calls, otherwise.clone(), allow, TargetArch::x86_64)?;
        return BpfProgram::try_from(filter);
    };
    let from_middle = search(calls.split_off(&middle), otherwise)?;
    let below = search(calls, otherwise)?;
    let instruction = |code, jt, k| sock_filter { code, jt, jf: 0, k };
    // The numbers are those of system calls and the lengths those of programs, which Linux bounds by 4096.
    let mut program = vec![
        instruction(LOAD, 0, NUMBER_OFFSET),
        instruction(UNLESS_LESS, 1, middle as u32),
        instruction(SKIP, 0, from_middle.len() as u32),
    ];
    program.extend(from_middle);
    program.extend(below);
    Ok(program)
}

/// The rules of one kind of thread, and the calls that it may make with any argument but where a rule says otherwise.
fn rules(kind: ThreadKind) -> (impl Iterator<Item = &'static Rule>, &'static [i64]) {
    let (rules, calls): (&[&[Rule]], &[i64]) = match kind {
        ThreadKind::Main => (&[rules::MAIN_AND_VCPU, rules::MAIN], &[]),
        ThreadKind::Vcpu => (&[rules::MAIN_AND_VCPU, rules::VCPU], &[]),
        ThreadKind::FileSystem => (&[rules::FILE_SYSTEM], FS_SYSCALLS),
        ThreadKind::Disk => (&[], DISK_SYSCALLS),
    };
    let rules = rules.iter().copied().flatten();
    (rules::EVERY_THREAD.iter().chain(rules), calls)
}

/// All that one kind of thread may call, each with its alternatives; none means always.
fn calls(kind: ThreadKind) -> Result<Calls, BackendError> {
    let (rules, more) = rules(kind);
    let mut calls = Calls::new();
    for rule in rules {
        let alternatives = calls.entry(rule.call).or_default();
        if !rule.when.is_empty() {
            let conditions = rule.when.iter().map(condition);
            alternatives.push(SeccompRule::new(conditions.collect::<Result<_, _>>()?)?);
        }
    }
    for call in more {
        calls.entry(*call).or_default();
    }
    Ok(calls)
}

fn condition(when: &When) -> Result<SeccompCondition, BackendError> {
    let (operator, value) = match when.test {
        Test::Is(value) => (SeccompCmpOp::Eq, value),
        Test::IsApartFrom(value, bits) => (SeccompCmpOp::MaskedEq(u64::from(!bits)), value),
        Test::Lacks(bits) => (SeccompCmpOp::MaskedEq(u64::from(bits)), 0),
        Test::IsOwnPid => (SeccompCmpOp::Eq, std::process::id()),
        Test::IsWakeUp => (SeccompCmpOp::Eq, SIGRTMIN() as u32),
    };
    let length = SeccompCmpArgLen::Dword;
    SeccompCondition::new(when.argument, length, operator, u64::from(value))
}

/// Puts the filter on the calling thread, for good; threads that it starts have it too.
///
/// # Errors
/// The kernel has no seccomp.
pub fn confine(filter: &Filter) -> Result<(), FilterError> {
    #[cfg(feature = "drill")]
    crate::drill::stand_by();
    seccompiler::apply_filter(&filter.0).map_err(FilterError::Apply)
}

#[cfg(test)]
mod tests {
    use super::ThreadKind::{Disk, FileSystem, Main, Vcpu};
    use super::*;
    use rustix::io::Errno;
    use rustix::net::{self, AddressFamily, SocketFlags, SocketType};
    use rustix::process::Pid;
    use std::collections::BTreeSet;
    use std::io;

    #[test]
    fn all_filters_compile_to_bounded_programs() {
        for kind in [Main, Vcpu, FileSystem, Disk] {
            let filter = compile(kind).unwrap();
            assert!(filter.0.len() > 50, "{kind:?}");
            assert!(filter.0.len() < 1000, "{kind:?}");
        }
    }

    /// What a program says of a system call without arguments: as Linux would run it, bounded by its length.
    fn verdict(program: &[sock_filter], arch: u32, number: u32) -> u32 {
        let (mut at, mut loaded) = (0, 0);
        for _ in 0..program.len() {
            let sock_filter { code, jt, jf, k } = program[at];
            let branch = |taken: bool| usize::from(if taken { jt } else { jf });
            at += 1 + match code {
                LOAD => {
                    loaded = *[number, arch].get(k as usize / 4).unwrap_or(&0);
                    0
                }
                SKIP => k as usize,
                UNLESS_LESS => branch(loaded >= k),
                // BPF_JMP | BPF_JEQ and BPF_ALU | BPF_AND, by a constant
                0x15 => branch(loaded == k),
                0x54 => {
                    loaded &= k;
                    0
                }
                // BPF_RET
                0x06 => return k,
                other => panic!("instruction {other:#x}"),
            };
        }
        panic!("no verdict")
    }

    #[test]
    fn the_search_says_of_each_call_what_the_rules_say_one_by_one() {
        for kind in [Main, Vcpu, FileSystem, Disk] {
            let kill = SeccompAction::KillProcess;
            let calls = calls(kind).unwrap();
            let plain = SeccompFilter::new(
                calls.clone(),
                kill.clone(),
                SeccompAction::Allow,
                TargetArch::x86_64,
            );
            let plain = BpfProgram::try_from(plain.unwrap()).unwrap();
            let program = search(calls, &kill).unwrap();
            for arch in [0xc000_003e, 0x4000_0003] {
                for number in (0..600).chain([1 << 30, (1 << 30) + 16, u32::MAX]) {
                    assert_eq!(
                        verdict(&program, arch, number),
                        verdict(&plain, arch, number),
                        "{kind:?} {arch:#x} {number}"
                    );
                }
            }
        }
    }

    #[test]
    fn no_rule_of_a_call_is_both_always_and_sometimes() {
        for kind in [Main, Vcpu, FileSystem, Disk] {
            let all: Vec<&Rule> = rules(kind).0.collect();
            for always in all.iter().filter(|rule| rule.when.is_empty()) {
                let same = all.iter().filter(|rule| rule.call == always.call).count();
                assert_eq!(same, 1, "system call {}", always.call);
            }
        }
    }

    #[test]
    fn threads_of_devices_get_what_they_list_and_little_more() {
        let beyond = |kind, list: &[i64]| {
            let calls: BTreeSet<i64> = calls(kind).unwrap().into_keys().collect();
            let listed: BTreeSet<i64> = list.iter().copied().collect();
            assert!(calls.is_superset(&listed), "{kind:?}");
            calls.difference(&listed).copied().collect::<Vec<_>>()
        };
        let ending = libc::SYS_exit_group;
        assert_eq!(beyond(FileSystem, FS_SYSCALLS), [libc::SYS_ioctl, ending]);
        assert_eq!(beyond(Disk, DISK_SYSCALLS), [ending]);
    }

    #[test]
    fn socket_pairs_are_of_unix_streams_alone() {
        let calls = calls(Main).unwrap();
        let [pair] = calls[&libc::SYS_socketpair].as_slice() else {
            panic!("one rule");
        };
        let is = |argument, value: i32| {
            let value = u64::from(value as u32);
            let length = SeccompCmpArgLen::Dword;
            SeccompCondition::new(argument, length, SeccompCmpOp::Eq, value).unwrap()
        };
        let stream = is(1, libc::SOCK_STREAM | libc::SOCK_CLOEXEC);
        let wanted = SeccompRule::new(vec![is(0, libc::AF_UNIX), stream]).unwrap();
        assert_eq!(*pair, wanted);
    }

    type Act = (&'static str, fn() -> io::Result<()>);

    /// What no thread of ours may do, each in a way that harms nobody where it is not refused.
    const FORBIDDEN: [Act; 8] = [
        ("open a socket", || {
            let socket = net::socket(AddressFamily::INET, SocketType::STREAM, None);
            Ok(socket.map(drop)?)
        }),
        ("make a pair of datagram sockets", || {
            let flags = SocketFlags::CLOEXEC;
            let pair = net::socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None);
            Ok(pair.map(drop)?)
        }),
        ("start a process", || {
            std::process::Command::new("true").status().map(drop)
        }),
        ("unmount", || {
            let flags = rustix::mount::UnmountFlags::empty();
            Ok(rustix::mount::unmount("/dev/null", flags)?)
        }),
        ("enter a namespace", || {
            let uts = nix::sched::CloneFlags::CLONE_NEWUTS;
            Ok(nix::sched::unshare(uts)?)
        }),
        ("reach another process", || {
            Ok(rustix::process::test_kill_process(Pid::INIT)?)
        }),
        ("change its user", || {
            let root = rustix::thread::Uid::ROOT;
            Ok(rustix::thread::set_thread_res_uid(root, root, root)?)
        }),
        ("change what it is allowed", || {
            Ok(rustix::thread::set_no_new_privs(true)?)
        }),
    ];
    /// What only the threads of shares may do.
    const OPEN: Act = ("open a path", || {
        std::fs::File::open("/proc/self/status").map(drop)
    });

    #[test]
    fn each_kind_of_thread_is_refused_each_forbidden_act() {
        // The real filters end the process, which would be this one.
        const REFUSED: Errno = Errno::UCLEAN;
        for kind in [Main, Vcpu, FileSystem, Disk] {
            let refusal = SeccompAction::Errno(REFUSED.raw_os_error() as u32);
            let filter = compile_with(kind, &refusal).unwrap();
            let acts = || FORBIDDEN.into_iter().chain([OPEN]);
            let confined = std::thread::spawn(move || {
                confine(&filter).unwrap();
                acts().map(|(what, act)| (what, act())).collect::<Vec<_>>()
            });
            for (what, result) in confined.join().unwrap() {
                let error = result.err().and_then(|error| error.raw_os_error());
                let refused = error == Some(REFUSED.raw_os_error());
                let may = kind == FileSystem && what == OPEN.0;
                assert_eq!(refused, !may, "{kind:?}: {what}: {error:?}");
            }
        }
    }
}
