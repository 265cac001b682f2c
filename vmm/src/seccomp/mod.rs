//! System call filters, one for each kind of thread, always on: what a thread does not need kills the process.
//!
//! The rules are data, in [`rules`]. A violation is not reported to the guest or handled: SIGSYS with its
//! default action is the one thing that a compromised thread cannot catch.

mod rules;

use capsid_devices::blk::DISK_SYSCALLS;
use capsid_devices::fs::FS_SYSCALLS;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::collections::BTreeMap;

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
    Compile(ThreadKind, #[source] seccompiler::BackendError),
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
    /// None of these bits is set.
    Lacks(u32),
    /// The process itself, for signals.
    IsOwnPid,
}

/// Compiles the filter of one kind of thread.
///
/// # Errors
/// A rule makes no sense.
pub fn compile(kind: ThreadKind) -> Result<Filter, FilterError> {
    let failed = |cause| FilterError::Compile(kind, cause);
    let (rules, more) = match kind {
        ThreadKind::Main => (rules::MAIN, &[] as &[i64]),
        ThreadKind::Vcpu => (rules::VCPU, &[] as &[i64]),
        ThreadKind::FileSystem => (&[] as &[Rule], FS_SYSCALLS),
        ThreadKind::Disk => (&[] as &[Rule], DISK_SYSCALLS),
    };
    let mut calls: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for rule in rules::EVERY_THREAD.iter().chain(rules) {
        let alternatives = calls.entry(rule.call).or_default();
        if !rule.when.is_empty() {
            let conditions = rule.when.iter().map(condition);
            let conditions = conditions.collect::<Result<Vec<_>, _>>().map_err(failed)?;
            alternatives.push(SeccompRule::new(conditions).map_err(failed)?);
        }
    }
    for call in more {
        // What every thread may do only with some arguments stays so.
        calls.entry(*call).or_default();
    }
    let filter = SeccompFilter::new(
        calls,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        TargetArch::x86_64,
    );
    let program = filter.and_then(BpfProgram::try_from).map_err(failed)?;
    Ok(Filter(program))
}

fn condition(when: &When) -> Result<SeccompCondition, seccompiler::BackendError> {
    let (operator, value) = match when.test {
        Test::Is(value) => (SeccompCmpOp::Eq, value),
        Test::Lacks(bits) => (SeccompCmpOp::MaskedEq(u64::from(bits)), 0),
        Test::IsOwnPid => (SeccompCmpOp::Eq, std::process::id()),
    };
    let length = SeccompCmpArgLen::Dword;
    SeccompCondition::new(when.argument, length, operator, u64::from(value))
}

/// Puts the filter on the calling thread, for good; threads that it starts have it too.
///
/// # Errors
/// The kernel has no seccomp.
pub fn confine(filter: &Filter) -> Result<(), FilterError> {
    seccompiler::apply_filter(&filter.0).map_err(FilterError::Apply)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_filters_compile_to_bounded_programs() {
        use ThreadKind::{Disk, FileSystem, Main, Vcpu};
        for kind in [Main, Vcpu, FileSystem, Disk] {
            let filter = compile(kind).unwrap();
            assert!(filter.0.len() > 50, "{kind:?}");
            assert!(filter.0.len() < 1000, "{kind:?}");
        }
    }

    #[test]
    fn no_rule_of_a_call_is_both_always_and_sometimes() {
        for rules in [rules::MAIN, rules::VCPU] {
            let all: Vec<&Rule> = rules::EVERY_THREAD.iter().chain(rules).collect();
            for always in all.iter().filter(|rule| rule.when.is_empty()) {
                let same = all.iter().filter(|rule| rule.call == always.call).count();
                assert_eq!(same, 1, "system call {}", always.call);
            }
        }
    }
}
