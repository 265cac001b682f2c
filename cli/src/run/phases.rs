//! The phases of a run with their times, by the host's monotonic clock, which the VMM's report uses too; as a table
//! for a person (`--timing`) and as JSON (`--json`).

use crate::host;
use crate::vm::agent::AgentError;
use capsid_protocol::agent::StartSandboxResponse;
use capsid_protocol::report::MachineReport;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, PoisonError};

use super::Verdict;
use crate::escape::Line;

/// Most phases of a VMM's report that are shown.
const REPORTED_PHASES_MAX: usize = 64;

/// Marks the ends of phases. Clones share the marks.
#[derive(Clone, Debug)]
pub(crate) struct Clock {
    started_ns: u64,
    marks: Arc<Mutex<Vec<(String, u64)>>>,
}

impl Clock {
    /// Begins now.
    pub(crate) fn start() -> Clock {
        Clock {
            started_ns: now_ns(),
            marks: Arc::default(),
        }
    }

    /// Ends a phase now.
    pub(crate) fn mark(&self, name: &str) {
        self.mark_at(name, now_ns());
    }

    fn mark_at(&self, name: &str, at_ns: u64) {
        let mut marks = self.marks.lock().unwrap_or_else(PoisonError::into_inner);
        marks.push((name.to_owned(), at_ns));
    }

    /// Every phase in the order of its end, with the VMM's own among them.
    fn phases(&self, report: Option<&MachineReport>) -> Vec<Phase> {
        let mut ends = self
            .marks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        for phase in report
            .iter()
            .flat_map(|report| &report.phases)
            .take(REPORTED_PHASES_MAX)
        {
            let name = format!("vmm {}", Line(phase.name.as_bytes()));
            ends.push((name, phase.monotonic_ns));
        }
        ends.sort_by_key(|(_, at)| *at);
        let mut before = self.started_ns;
        ends.into_iter()
            .map(|(name, at)| {
                let phase = Phase {
                    name,
                    took_ns: at.saturating_sub(before),
                    ended_ns: at.saturating_sub(self.started_ns),
                };
                before = before.max(at);
                phase
            })
            .collect()
    }
}

/// One phase.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Phase {
    name: String,
    took_ns: u64,
    ended_ns: u64,
}

/// What became known in a run, for `--json` and `--timing`.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(crate) id: String,
    pub(crate) cpus: u8,
    pub(crate) memory_mib: u64,
    /// What the agent said of its guest.
    pub(crate) guest: Option<StartSandboxResponse>,
    pub(crate) report: Option<MachineReport>,
    /// What went wrong with the end of a run whose exit is known.
    pub(crate) power_off: Option<AgentError>,
}

impl Told {
    /// The table for `--timing`.
    pub(crate) fn table(&self, clock: &Clock) -> String {
        let mut table = format!("{:<16} {:>12} {:>12}\n", "phase", "ms", "at ms");
        for phase in clock.phases(self.report.as_ref()) {
            let milliseconds = |ns: u64| ns as f64 / 1e6;
            // Writing to a string does not fail.
            let _infallible = writeln!(
                table,
                "{:<16} {:>12.3} {:>12.3}",
                phase.name,
                milliseconds(phase.took_ns),
                milliseconds(phase.ended_ns)
            );
        }
        table
    }

    /// The object for `--json`.
    pub(crate) fn json(&self, verdict: &Verdict, clock: &Clock) -> Value {
        let phases: Vec<Value> = clock
            .phases(self.report.as_ref())
            .into_iter()
            .map(|p| json!({"name": p.name, "took_ns": p.took_ns, "ended_ns": p.ended_ns}))
            .collect();
        let guest = self.guest.as_ref().map(|guest| {
            json!({
                "kernel": Line(guest.kernel_release.as_bytes()).to_string(),
                "agent": Line(guest.agent_version.as_bytes()).to_string(),
                "cpus": guest.online_cpus,
                "memory_bytes": guest.memory_total_bytes,
            })
        });
        let report = self.report.as_ref();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "id": self.id,
            "exit_code": verdict.code,
            "reason": verdict.reason,
            "cpus": self.cpus,
            "memory_mib": self.memory_mib,
            "host_kernel": host::kernel_release(),
            "guest": guest,
            "phases": phases,
            "userspace_exits": report.map(|report| &report.userspace_exits),
        })
    }
}

fn now_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds.saturating_mul(1_000_000_000) + u64::try_from(now.tv_nsec).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use capsid_protocol::report::Phase as Reported;

    #[test]
    fn the_vmm_s_phases_stand_among_ours_in_the_order_of_their_ends() {
        let clock = Clock {
            started_ns: 100,
            marks: Arc::default(),
        };
        clock.mark_at("image", 150);
        clock.mark_at("agent", 400);
        let report = MachineReport {
            phases: vec![Reported {
                name: "kvm".into(),
                monotonic_ns: 250,
            }],
            ..Default::default()
        };
        let phases = clock.phases(Some(&report));
        let names: Vec<&str> = phases.iter().map(|phase| phase.name.as_str()).collect();
        assert_eq!(names, ["image", "vmm kvm", "agent"]);
        let took: Vec<u64> = phases.iter().map(|phase| phase.took_ns).collect();
        assert_eq!(took, [50, 100, 150]);
    }

    #[test]
    fn a_report_from_before_the_beginning_is_no_negative_time() {
        let clock = Clock::start();
        let report = MachineReport {
            phases: vec![Reported {
                name: "\x1b[2J".into(),
                monotonic_ns: 1,
            }],
            ..Default::default()
        };
        let table = Told {
            report: Some(report),
            ..Default::default()
        }
        .table(&clock);
        assert!(
            table.contains("0.000") && !table.contains('\x1b'),
            "{table}"
        );
    }
}
