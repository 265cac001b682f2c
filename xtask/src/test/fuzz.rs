//! `--suite fuzz`: each fuzz target for a while, from its seeds and from what earlier runs have found.
//!
//! Rust's stable compiler has what libFuzzer needs to be told, as passes of LLVM; it has no sanitizers, for which there would
//! have to be another compiler. The targets count their results themselves.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

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
    let mut count = Count::default();
    for target in names(&room)? {
        if !filters.is_empty() && !filters.iter().any(|filter| target.contains(filter)) {
            continue;
        }
        let program = home.join(TARGET).join("fuzz").join(&target);
        let (found, faults) = (home.join("corpus").join(&target), home.join("artifacts"));
        fs::create_dir_all(&found)?;
        fs::create_dir_all(&faults)?;
        let mut command = Command::new(program);
        command
            .arg(&found)
            .arg(room.join("seeds").join(&target))
            .arg(format!("-max_total_time={seconds}"))
            .arg(format!("-timeout={INPUT_LIMIT_S}"))
            .arg(format!("-rss_limit_mb={MEMORY_LIMIT_MIB}"))
            .arg(format!("-artifact_prefix={}/{target}-", faults.display()))
            .arg("-print_final_stats=1")
            .current_dir(context.workspace);
        count.add(fuzz(&target, &mut command)?);
    }
    Ok(count)
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

fn fuzz(target: &str, command: &mut Command) -> Result<Count, Box<dyn Error>> {
    eprintln!("           $ {}", shown(command));
    command.stdin(Stdio::null());
    let mut running = command::spawn(command, OnInterrupt::Kill)?;
    let status = running.child.wait()?;
    println!("fuzz {target} ended with {}", command::end(status));
    Ok(Count::one(status.success()))
}

#[cfg(test)]
mod tests {
    use super::*;

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
