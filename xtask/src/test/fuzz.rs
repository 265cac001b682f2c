//! `--suite fuzz`: each fuzz target for a while, from its seeds and from what earlier runs have found.
//!
//! Rust's stable compiler has what libFuzzer needs to be told, as passes of LLVM; it has no sanitizers, for which there would
//! have to be another compiler. The targets count their results themselves.

use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;

use super::count::Count;
use crate::command::{self, OnInterrupt, shown};
use crate::packages::{self, Package, any};
use crate::programs;
use crate::testbed::saved::Context;

/// How long a target runs where nobody says: what tells that it works, and finds what is new and near.
pub(super) const SECONDS: u32 = 30;
/// What libFuzzer is built with.
const PACKAGES: [Package; 1] = [any("g++")];
const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Counters at each edge and what is compared with what (clang's SanitizerCoverage documentation). One unit of code, because
/// the counters of several are not always kept together.
const FLAGS: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1";
/// One input that takes longer is a fault, in seconds.
const INPUT_LIMIT_S: u32 = 10;
/// A target that takes more memory is a fault, in MiB.
const MEMORY_LIMIT_MIB: u32 = 512;
/// Most targets at once, each of which is one busy thread.
const AT_ONCE: usize = 2;

/// Runs each target whose name has one of `filters` in it, or all.
pub(super) fn run(
    context: &Context<'_>,
    seconds: u32,
    filters: &[String],
) -> Result<Count, Box<dyn Error>> {
    packages::ensure(context.progress, "building the fuzz targets", &PACKAGES)?;
    let home = programs::target_dir(context.workspace).join("fuzz");
    let mut build = Command::new("cargo");
    build
        .args(["build", "--locked", "--package", "capsid-fuzz"])
        .args(["--features", "libfuzzer", "--profile", "fuzz"])
        .args(["--target", TARGET, "--target-dir"])
        .arg(&home)
        .env("RUSTFLAGS", FLAGS)
        .current_dir(context.workspace);
    context.progress.step("fuzz targets", |step| {
        Ok::<_, programs::ProgramsError>(step.run(&mut build)?)
    })?;
    let room = context.workspace.join("fuzz");
    let (faults, logs) = (home.join("artifacts"), home.join("logs"));
    fs::create_dir_all(&faults)?;
    fs::create_dir_all(&logs)?;
    let mut runs = Vec::new();
    for target in names(&room)? {
        if !filters.is_empty() && !filters.iter().any(|filter| target.contains(filter)) {
            continue;
        }
        let found = home.join("corpus").join(&target);
        fs::create_dir_all(&found)?;
        let mut command = Command::new(home.join(TARGET).join("fuzz").join(&target));
        command
            .arg(&found)
            .arg(room.join("seeds").join(&target))
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-timeout={INPUT_LIMIT_S}"))
            .arg(format!("-rss_limit_mb={MEMORY_LIMIT_MIB}"))
            .arg(format!("-artifact_prefix={}/{target}-", faults.display()))
            .arg("-print_final_stats=1")
            .current_dir(context.workspace);
        let log = logs.join(&target);
        runs.push(Run {
            target,
            command,
            log,
        });
    }
    let cores = thread::available_parallelism()?.get();
    all(runs, cores.min(AT_ONCE))
}

/// One target that is to run.
struct Run {
    target: String,
    command: Command,
    /// Where its output goes.
    log: PathBuf,
}

/// Runs all, so many at once.
fn all(runs: Vec<Run>, at_once: usize) -> Result<Count, Box<dyn Error>> {
    let left = Mutex::new(runs.into_iter());
    let lane = || -> io::Result<Count> {
        let mut count = Count::default();
        loop {
            let next = left.lock().unwrap_or_else(PoisonError::into_inner).next();
            match next {
                Some(run) => count.add(fuzz(run)?),
                None => return Ok(count),
            }
        }
    };
    thread::scope(|scope| {
        let lanes: Vec<_> = (0..at_once).map(|_| scope.spawn(lane)).collect();
        let mut count = Count::default();
        for lane in lanes {
            count.add(lane.join().map_err(|_| "a thread panicked")??);
        }
        Ok(count)
    })
}

/// The names of the targets, in order.
fn names(room: &Path) -> std::io::Result<Vec<String>> {
    let mut names = Vec::new();
    for file in fs::read_dir(room.join("fuzz_targets"))? {
        let path = file?.path();
        names.extend(
            path.file_stem()
                .map(|name| name.to_string_lossy().into_owned()),
        );
    }
    names.sort();
    Ok(names)
}

fn fuzz(mut run: Run) -> io::Result<Count> {
    let Run {
        target,
        command,
        log,
    } = &mut run;
    eprintln!("           $ {}", shown(command));
    let output = File::create(&*log)?;
    command.stdin(Stdio::null());
    command.stdout(output.try_clone()?).stderr(output);
    let mut running = command::spawn(command, OnInterrupt::Kill)?;
    let status = running.child.wait()?;
    let end = command::end(status);
    if status.success() {
        let printed = fs::read(&*log)?;
        let figures = figures(&String::from_utf8_lossy(&printed));
        println!("fuzz {target} ended with {end}: {figures}");
    } else {
        let tail = command::tail_of(&mut File::open(&*log)?);
        println!(
            "fuzz {target} ended with {end}; the whole log is {}\n{tail}",
            log.display()
        );
    }
    Ok(Count::one(status.success()))
}

/// What libFuzzer says of a run: how many inputs there were, and how many places in the code they came to.
fn figures(printed: &str) -> String {
    let word_behind = |words: &str| {
        let last = printed
            .lines()
            .rev()
            .find_map(|line| line.split_once(words));
        last.and_then(|(_, rest)| rest.split_whitespace().next())
    };
    let inputs = word_behind("stat::number_of_executed_units:").unwrap_or("?");
    let places = word_behind(" cov: ").unwrap_or("?");
    format!("{inputs} inputs, {places} places")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figures_are_the_last_ones() {
        let printed = "#2\tINITED cov: 10 ft: 11\n#9\tDONE   cov: 12 ft: 30 corp: 4/9b\n\
                       stat::number_of_executed_units: 9\n";
        assert_eq!(figures(printed), "9 inputs, 12 places");
        assert_eq!(figures(""), "? inputs, ? places");
    }

    #[test]
    fn each_target_has_seeds_and_is_in_the_manifest() {
        let room = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz");
        let manifest = fs::read_to_string(room.join("Cargo.toml")).expect("the manifest");
        let names = names(&room).expect("targets");
        assert!(!names.is_empty());
        for name in &names {
            assert!(
                room.join("seeds").join(name).is_dir(),
                "{name} has no seeds"
            );
            assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
        }
        assert_eq!(manifest.matches("[[bin]]").count(), names.len());
    }
}
