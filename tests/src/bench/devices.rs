//! The recipe of the benchmarks of devices: each load in turn, by each system that has the device: one round to warm up, those that are
//! timed, and one whose every exit, system call and switch of threads is counted.

use super::inside::{BEGIN, END, FAILED};
use super::load::{Device, Load};
use super::machine::{self, Files, Machine, Vmm};
use super::trace::{Counted, EVERYTHING, Recording, now};
use nix::poll::{PollFd, PollFlags, poll};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::time::Duration;

/// Rounds that are not counted: memory is touched for the first time, caches are filled.
const WARM_UP_ROUNDS: usize = 1;
/// Those while the record begins, which is no part of one, and the one that is recorded.
const RECORDED_ROUNDS: usize = 2;
/// No boot and no round takes longer, in ms.
const ROUND_TIMEOUT_MS: u16 = 60_000;
/// Lines of a guest that are told when it ends too early.
const LAST_WORDS: usize = 8;
/// Longest line of a guest, in bytes; the rest is taken for another.
const LINE_MAX_BYTES: usize = 1024;

/// What one system made of a load.
struct Result {
    samples: Vec<Duration>,
    counted: Counted,
}

/// What is run of all that could be.
pub struct Selection {
    /// The device.
    pub device: Device,
    /// This load alone.
    pub load: Option<String>,
    /// This system alone.
    pub system: Option<String>,
    /// Timed rounds.
    pub samples: usize,
    /// Files in the shared tree.
    pub tree_files: usize,
}

/// Runs what is selected and prints JSON lines on `out`. A system that is absent or fails is left out with one line on stderr.
///
/// # Errors
/// `out` cannot be written.
pub fn devices(selection: &Selection, files: &Files, out: &mut impl Write) -> io::Result<()> {
    let device = selection.device;
    let is =
        |wanted: &Option<String>, name: &str| wanted.as_ref().is_none_or(|wanted| wanted == name);
    let loads = device.loads().iter();
    for load in loads.filter(|load| is(&selection.load, load.name)) {
        let systems = Vmm::with(device).iter();
        for vmm in systems.filter(|vmm| is(&selection.system, vmm.name())) {
            match measured(*vmm, *load, files, selection.samples) {
                Ok(result) => {
                    eprintln!("bench: {}: {}", load.name, progress(*vmm, &result));
                    writeln!(out, "{}", line(selection, *load, *vmm, &result))?;
                }
                Err(error) => {
                    eprintln!("bench: {}: {} is left out: {error}", load.name, vmm.name());
                }
            }
        }
    }
    Ok(())
}

fn measured(vmm: Vmm, load: Load, files: &Files, samples: usize) -> io::Result<Result> {
    let recording = Recording::of(EVERYTHING)?;
    let timed = WARM_UP_ROUNDS + samples;
    let all = timed + RECORDED_ROUNDS;
    let mut machine = machine::start(vmm, load, all, files)?;
    let rounds = rounds(&mut machine, all, |round| match round == timed {
        true => recording.begin(),
        false => Ok(()),
    });
    for child in &mut machine.children {
        if rounds.is_err() {
            // It may have ended by itself.
            let _ = child.kill();
        }
        child.wait()?;
    }
    let rounds = rounds?;
    if let Some(peer) = machine.peer {
        let served = peer.join();
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
    loop {
        let mut ready = [PollFd::new(machine.serial.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, ROUND_TIMEOUT_MS)? == 0 {
            let what = format!("it hangs after {} rounds", rounds.len());
            return Err(io::Error::other(what));
        }
        let at = now();
        let length = machine.serial.read(&mut said)?;
        if length == 0 && rounds.len() == expected {
            return Ok(rounds);
        }
        if length == 0 {
            let words = last_words.make_contiguous().join(" / ");
            let what = format!("it ended after {} rounds: {words}", rounds.len());
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
                (BEGIN, None) => begun = Some(at),
                (END, Some(since)) => {
                    begun = None;
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

/// One result for people who wait.
fn progress(vmm: Vmm, result: &Result) -> String {
    let samples: Vec<String> = result
        .samples
        .iter()
        .map(|sample| format!("{:.2}", sample.as_secs_f64() * 1e3))
        .collect();
    format!("{}: {} ms", vmm.name(), samples.join(" "))
}

fn line(selection: &Selection, load: Load, vmm: Vmm, result: &Result) -> Value {
    let nanos = |sample: &Duration| u64::try_from(sample.as_nanos()).unwrap_or(u64::MAX);
    let samples: Vec<u64> = result.samples.iter().map(nanos).collect();
    let counted = &result.counted;
    let mut line = json!({
        "bench": selection.device.name(), "load": load.name, "system": vmm.name(), "unit": "ns", "samples": samples,
        "userspace_exits": counted.userspace_exits, "exits": counted.exits,
        "syscalls": counted.syscalls, "switches": counted.switches,
    });
    if let (Some(line), Value::Object(size)) =
        (line.as_object_mut(), load.size(selection.tree_files))
    {
        line.extend(size);
    }
    line
}
