//! The recipe of the boot benchmark: warm up, then the systems in turn, round after round, then one traced run of each.

use super::launch::{self, Sample};
use super::systems::{Files, System};
use super::trace::{Counts, Recording, USERSPACE_EXITS};
use serde_json::{Value, json};
use std::io::{self, Write};
use std::time::Duration;

/// Rounds that are not counted: the first reads come from disk, where an emulated clock jumps.
const WARM_UP_ROUNDS: usize = 1;

/// Runs the benchmark and prints JSON lines on `out`, and each sample on stderr as it comes. A system that is absent or
/// fails is left out with one line there.
///
/// # Errors
/// `out` cannot be written.
pub fn boot(
    systems: &[System],
    files: &Files,
    samples: usize,
    out: &mut impl Write,
) -> io::Result<()> {
    let mut taken: Vec<(&System, Vec<Sample>)> =
        systems.iter().map(|system| (system, Vec::new())).collect();
    for round in 0..WARM_UP_ROUNDS + samples {
        taken.retain_mut(|(system, samples)| match launch::sample(system, files) {
            Ok(sample) => {
                eprintln!("{}", progress(round, system, &sample));
                if round >= WARM_UP_ROUNDS {
                    samples.push(sample);
                }
                true
            }
            Err(error) => {
                eprintln!("bench: {} is left out: {error}", system.name());
                false
            }
        });
    }
    for (system, samples) in taken {
        let exits = match system {
            System::Runtime(_) => Counts::new(),
            _ => userspace_exits(system, files).unwrap_or_else(|error| {
                eprintln!("bench: exits of {} are not counted: {error}", system.name());
                Counts::new()
            }),
        };
        for line in lines(system, &samples, &exits) {
            writeln!(out, "{line}")?;
        }
    }
    Ok(())
}

/// The exits of one run.
fn userspace_exits(system: &System, files: &Files) -> io::Result<Counts> {
    let recording = Recording::of(USERSPACE_EXITS)?;
    recording.begin()?;
    launch::sample(system, files)?;
    let counted = recording.counted(Duration::ZERO, Duration::MAX)?;
    Ok(counted.userspace_exits)
}

/// One sample for people who wait: a round takes minutes where an instruction counts as a nanosecond.
fn progress(round: usize, system: &System, sample: &Sample) -> String {
    let round = match round {
        0 => "warm-up".to_owned(),
        counted => format!("round {counted}"),
    };
    format!(
        "bench: {round}: {} ({} kernel): init {:.2} ms, exit {:.2} ms",
        system.name(),
        system.kernel(),
        sample.init.as_secs_f64() * 1e3,
        sample.exit.as_secs_f64() * 1e3,
    )
}

fn lines(system: &System, samples: &[Sample], exits: &Counts) -> Vec<Value> {
    let nanos = |pick: fn(&Sample) -> u128| samples.iter().map(pick).collect::<Vec<u128>>();
    let line = |phase: &str, samples: Vec<u128>| {
        json!({"bench": "boot", "system": system.name(), "kernel": system.kernel(), "phase": phase,
               "unit": "ns", "samples": samples.iter().map(|ns| json!(u64::try_from(*ns).unwrap_or(u64::MAX))).collect::<Vec<_>>(),
               "userspace_exits": exits})
    };
    let mut lines = vec![
        line("init", nanos(|sample| sample.init.as_nanos())),
        line("exit", nanos(|sample| sample.exit.as_nanos())),
    ];
    // Where the time of our own VMM goes: each phase by its end, from the first that it names.
    let reports: Vec<_> = samples
        .iter()
        .filter_map(|sample| sample.report.as_ref())
        .collect();
    if let Some(first) = reports.first() {
        for (index, phase) in first.phases.iter().enumerate().skip(1) {
            let spent = reports
                .iter()
                .filter_map(|report| {
                    let (before, this) = (report.phases.get(index - 1)?, report.phases.get(index)?);
                    Some(u128::from(
                        this.monotonic_ns.saturating_sub(before.monotonic_ns),
                    ))
                })
                .collect();
            lines.push(line(&format!("vmm:{}", phase.name), spent));
        }
    }
    lines
}
