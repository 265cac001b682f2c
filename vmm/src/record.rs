//! What is counted and timed during a run, for the [`MachineReport`] at its end.

use capsid_protocol::report::{MachineReport, Phase};
use rustix::time::{ClockId, clock_gettime};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The phases that have ended so far. Clones are the same log; any thread may add to it.
#[derive(Clone, Default)]
pub struct Phases(Arc<Mutex<Vec<Phase>>>);

impl Phases {
    /// The phase `name` ends now; a name that is there already is not recorded again.
    pub fn ended(&self, name: &str) {
        let now = clock_gettime(ClockId::Monotonic);
        // Both are positive on a monotonic clock, and 64 bits of ns last 580 years.
        let monotonic_ns = now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64;
        let mut phases = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if phases.iter().all(|phase| phase.name != name) {
            phases.push(Phase {
                name: name.to_owned(),
                monotonic_ns,
            });
        }
    }

    fn list(&self) -> Vec<Phase> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

/// Exits to userspace of one vCPU, by reason. Written by its thread, read at the end by another.
#[derive(Clone, Default)]
pub struct ExitCounts(Arc<Mutex<Vec<Count>>>);

struct Count {
    kind: &'static str,
    device: &'static str,
    times: u64,
}

impl ExitCounts {
    /// One more exit of `kind` (`io`, `mmio`, or a reason of KVM), served by `device` ("" where none is).
    pub fn add(&self, kind: &'static str, device: &'static str) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A handful of constants: their addresses tell them apart faster than their letters.
        let found = counts
            .iter_mut()
            .find(|count| std::ptr::eq(count.kind, kind) && std::ptr::eq(count.device, device));
        match found {
            Some(count) => count.times += 1,
            None => counts.push(Count {
                kind,
                device,
                times: 1,
            }),
        }
    }
}

/// The exits of one vCPU, by the names that the report gives them.
pub fn by_reason(counts: &ExitCounts) -> BTreeMap<String, u64> {
    let counts = counts.0.lock().unwrap_or_else(PoisonError::into_inner);
    let named = counts.iter().map(|count| match count.device {
        "" => (count.kind.to_owned(), count.times),
        device => (format!("{}:{device}", count.kind), count.times),
    });
    named.collect()
}

/// Puts the report together.
pub fn report(phases: &Phases, counts: &[ExitCounts]) -> MachineReport {
    let mut userspace_exits = BTreeMap::new();
    for (name, times) in counts.iter().flat_map(by_reason) {
        *userspace_exits.entry(name).or_insert(0) += times;
    }
    MachineReport {
        phases: phases.list(),
        userspace_exits,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exits_are_summed_over_vcpus_by_kind_and_device() {
        let (a, b) = (ExitCounts::default(), ExitCounts::default());
        a.add("io", "serial");
        a.add("io", "serial");
        a.add("interrupted", "");
        b.add("io", "serial");
        let report = report(&Phases::default(), &[a, b]);
        let counts: Vec<_> = report.userspace_exits.into_iter().collect();
        assert_eq!(
            counts,
            [("interrupted".to_owned(), 1), ("io:serial".to_owned(), 3)]
        );
    }

    #[test]
    fn phases_keep_their_order_and_end_once() {
        let phases = Phases::default();
        phases.ended("a");
        phases.ended("b");
        phases.ended("a");
        let list = phases.list();
        let names: Vec<_> = list.iter().map(|phase| phase.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert!(list[0].monotonic_ns <= list[1].monotonic_ns);
    }
}
