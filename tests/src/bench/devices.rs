//! The recipe of the benchmarks of devices, for one load and one system: a round to warm up, those that are timed, and one whose every
//! exit, system call and switch of threads is counted.

use super::inside::{BEGIN, END, FAILED};
use super::load::{Device, Load, ROUND_TIMEOUT_SECONDS};
use super::machine::{self, Files, Machine, Vmm};
use super::trace::{Counted, EVERYTHING, Recording, now};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::thread::JoinHandle;
use std::time::Duration;

/// Rounds that are not counted: memory is touched for the first time, caches are filled.
const WARM_UP_ROUNDS: usize = 1;
/// Those while the record begins, which is no part of one, and the one that is recorded.
const RECORDED_ROUNDS: usize = 2;
const ROUND_TIMEOUT: Duration = Duration::from_secs(ROUND_TIMEOUT_SECONDS.unsigned_abs());
/// Lines of a guest that are told when it ends too early.
const LAST_WORDS: usize = 8;
/// Longest line of a guest, in bytes; the rest is taken for another.
const LINE_MAX_BYTES: usize = 1024;

/// What one system made of a load.
struct Result {
    samples: Vec<Duration>,
    counted: Counted,
}

/// Which device is loaded how, and by whom: all that `device` has, each as the words of its load and its system.
pub fn pairs(device: Device) -> impl Iterator<Item = (&'static str, &'static str)> {
    let systems =
        move |load: &'static Load| Vmm::with(device).iter().map(|vmm| (load.name, vmm.name()));
    device.loads().iter().flat_map(systems)
}

/// Measures one of them and prints a JSON line on `out`. `tree_files` are in the shared tree.
///
/// # Errors
/// The system is absent or fails, or a round does not end; or `out` cannot be written.
pub fn device(
    (device, load, vmm): (Device, Load, Vmm),
    files: &Files,
    (samples, tree_files): (usize, usize),
    out: &mut impl Write,
) -> io::Result<()> {
    let result = measured(vmm, load, files, samples)?;
    let size = load.size(tree_files);
    writeln!(out, "{}", line(device, load, vmm, &result, size))
}

fn measured(vmm: Vmm, load: Load, files: &Files, samples: usize) -> io::Result<Result> {
    let recording = Recording::of(EVERYTHING)?;
    let timed = WARM_UP_ROUNDS + samples;
    let all = timed + RECORDED_ROUNDS;
    let mut machine = machine::start(vmm, load, all, files)?;
    let rounds = rounds(&mut machine, all, |done| match done == timed {
        true => recording.begin(),
        false => Ok(()),
    });
    for child in std::iter::once(&mut machine.vmm).chain(&mut machine.daemon) {
        // Its guest came to its end, or is to have none; it may have ended by itself.
        let _ = child.kill();
        child.wait()?;
    }
    // Kept by it until here: what the guest hears last is not that the host is gone.
    let served = machine.peer.map(JoinHandle::join);
    let rounds = rounds?;
    if let Some(served) = served {
        served.map_err(|_| io::Error::other("the host's end panicked"))??;
    }
    let recorded = rounds.last().ok_or(io::ErrorKind::UnexpectedEof)?;
    let timed = rounds.iter().take(timed).skip(WARM_UP_ROUNDS);
    Ok(Result {
        samples: timed.map(|(since, until)| *until - *since).collect(),
        counted: recording.counted(recorded.0, recorded.1)?,
    })
}

/// Beginning and end of each of the `expected` rounds; `done` is told how many there have been.
fn rounds(
    machine: &mut Machine,
    expected: usize,
    done: impl Fn(usize) -> io::Result<()>,
) -> io::Result<Vec<(Duration, Duration)>> {
    let (mut rounds, mut begun) = (Vec::new(), None);
    let (mut line, mut said) = (Vec::new(), [0; 256]);
    let mut last_words = VecDeque::new();
    let mut deadline = now() + ROUND_TIMEOUT;
    loop {
        let mut ready = [PollFd::new(machine.serial.as_fd(), PollFlags::POLLIN)];
        let left = PollTimeout::try_from(deadline.saturating_sub(now()));
        if poll(&mut ready, left.map_err(io::Error::other)?)? == 0 {
            let number = rounds.len() + 1;
            let what = format!("round {number} did not end within {ROUND_TIMEOUT:?}");
            return Err(io::Error::other(what));
        }
        let at = now();
        let length = machine.serial.read(&mut said)?;
        if length == 0 {
            let status = machine.vmm.wait()?;
            if rounds.len() == expected {
                return Ok(rounds);
            }
            let words = last_words.make_contiguous().join(" / ");
            let what = format!("{status} after {} rounds: {words}", rounds.len());
            return Err(io::Error::other(what));
        }
        for byte in said.iter().take(length) {
            if *byte != b'\n' && line.len() < LINE_MAX_BYTES {
                line.push(*byte);
                continue;
            }
            let words = String::from_utf8_lossy(&line).trim().to_owned();
            line.clear();
            match (words.as_str(), begun) {
                (BEGIN, None) => {
                    begun = Some(at);
                    deadline = at + ROUND_TIMEOUT;
                }
                (END, Some(since)) => {
                    begun = None;
                    deadline = at + ROUND_TIMEOUT;
                    rounds.push((since, at));
                    done(rounds.len())?;
                }
                // Firmware and kernel may have something to say, too.
                _ => match words.strip_prefix(FAILED) {
                    Some(why) => return Err(io::Error::other(why.to_owned())),
                    None => {
                        last_words.push_back(words);
                        if last_words.len() > LAST_WORDS {
                            last_words.pop_front();
                        }
                    }
                },
            }
        }
    }
}

fn line(device: Device, load: Load, vmm: Vmm, result: &Result, size: Value) -> Value {
    let nanos = |sample: &Duration| u64::try_from(sample.as_nanos()).unwrap_or(u64::MAX);
    let samples: Vec<u64> = result.samples.iter().map(nanos).collect();
    let counted = &result.counted;
    let mut line = json!({
        "bench": device.name(), "load": load.name, "system": vmm.name(), "unit": "ns", "samples": samples,
        "userspace_exits": counted.userspace_exits, "exits": counted.exits,
        "syscalls": counted.syscalls, "switches": counted.switches,
    });
    if let (Some(line), Value::Object(size)) = (line.as_object_mut(), size) {
        line.extend(size);
    }
    line
}
