//! `cargo xtask test`: every check and test, one suite after the other, and the counts of all of them as the last line.
//!
//! A check (format, lints, arrows, licences) counts as one. A suite that fails does not keep the next from running. What
//! cannot be done here is said loudly, counted as skipped, never as passed, and named at the end (`count`).

mod count;
mod deny;
mod fuzz;
mod hosted;
mod tools;

use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use clap::ValueEnum;

use crate::cache::Cache;
use crate::command::{self, OnInterrupt, shown};
use crate::packages;
use crate::place::Place;
use crate::programs;
use crate::progress::Progress;
use crate::testbed::saved::Context;
use crate::toolchain;
use count::{Count, Reader, SHOW_OUTPUT};

/// `cargo xtask test`
#[derive(Debug, clap::Args)]
pub struct Test {
    /// Only these suites; may be given several times
    #[arg(long, value_enum)]
    pub suite: Vec<Suite>,
    /// Where the VMM's and the whole-system tests run; by default as `cargo xtask run` does
    #[arg(long, value_enum)]
    pub on: Option<Place>,
    /// How long each fuzz target runs
    #[arg(long, value_name = "SECONDS", default_value_t = fuzz::SECONDS)]
    pub fuzz_seconds: u32,
    /// Only tests whose name contains one of these words
    #[arg(last = true, value_name = "FILTER")]
    pub filters: Vec<String>,
}

/// A part of all there is to test, in the order in which they run: what fails fast comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    /// rustfmt
    Fmt,
    /// The arrows between the rooms
    Deps,
    /// Licences, sources, bans, and advisories where their database can be had
    Deny,
    /// Clippy, warnings denied
    Clippy,
    /// Unit and property tests
    Unit,
    /// Each fuzz target for a while
    Fuzz,
    /// The VMM with small guests, on a real KVM
    Vmm,
    /// The agent's service on real containers, in the testbed
    Service,
    /// The shim under each containerd, in the testbed
    Containerd,
    /// The whole system on a real KVM
    System,
}

/// Runs the suites.
///
/// # Errors
/// Something that is no test went wrong.
pub fn run(test: &Test, workspace: &Path) -> Result<ExitCode, Box<dyn Error>> {
    let cache = Cache::open()?;
    let progress = Progress::new(cache.root().join("logs"));
    let context = Context {
        progress: &progress,
        cache: &cache,
        workspace,
    };
    packages::ensure(&progress, "building and testing", &programs::PACKAGES)?;
    let suites: Vec<Suite> = Suite::value_variants()
        .iter()
        .copied()
        .filter(|suite| test.suite.is_empty() || test.suite.contains(suite))
        .collect();
    toolchain::ensure(&progress)?;
    tools::ensure(&progress, &suites)?;
    let mut count = Count::default();
    for suite in suites {
        let name = suite
            .to_possible_value()
            .map(|value| value.get_name().to_owned())
            .unwrap_or_default();
        progress.say(&format!("suite {name} ..."));
        let part = run_suite(&context, test, suite).unwrap_or_else(|error| {
            // It could not even run: one failure, with its reason, and on to the next.
            eprintln!("suite {name}: {}", crate::chain(error.as_ref()));
            Count::failed_one()
        });
        progress.say(&format!("suite {name} ... {part}"));
        count.add(part);
    }
    finish(&count)
}

/// The last line is the counts and nothing else.
fn finish(count: &Count) -> Result<ExitCode, Box<dyn Error>> {
    let mut stdout = std::io::stdout();
    if count.skipped > 0 {
        writeln!(
            stdout,
            "SKIPPED, neither passed nor failed: {}",
            count.skipped
        )?;
    }
    for name in &count.names {
        writeln!(stdout, "    {name}")?;
    }
    writeln!(stdout, "{} passed, {} failed", count.passed, count.failed)?;
    Ok(if count.failed == 0 && count.passed > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn run_suite(context: &Context<'_>, test: &Test, suite: Suite) -> Result<Count, Box<dyn Error>> {
    let cargo = |words: &[&str]| {
        let mut command = Command::new("cargo");
        command.args(words).current_dir(context.workspace);
        command
    };
    match suite {
        Suite::Fmt => check(&mut cargo(&["fmt", "--all", "--check"])),
        Suite::Deps => Ok(Count::one(
            crate::deps::run(context.workspace)? == ExitCode::SUCCESS,
        )),
        Suite::Deny => deny::run(context),
        Suite::Clippy => {
            let mut count = clippy(&cargo, &["--all-targets"])?;
            // Not among "all": the tests whose manifest says that a plain `cargo test` does not run them.
            count.add(clippy(&cargo, &["--test", "*"])?);
            // Nor what only the drill's program has.
            let drill = [
                "--features",
                "capsid-vmm/drill",
                "--bin",
                "capsid-vmm-drill",
            ];
            count.add(clippy(&cargo, &drill)?);
            Ok(count)
        }
        Suite::Unit => tests(programs::cargo(context.workspace, "test"), &test.filters),
        Suite::Fuzz => fuzz::run(context, test.fuzz_seconds, &test.filters),
        Suite::Vmm => hosted::vmm(context, test.on, &test.filters),
        Suite::Service => hosted::service(context, &test.filters),
        Suite::Containerd => hosted::containerd(context, &test.filters),
        Suite::System => hosted::system(context, test.on, &test.filters),
    }
}

/// The lints of some targets, each warning an error.
fn clippy(cargo: &impl Fn(&[&str]) -> Command, targets: &[&str]) -> Result<Count, Box<dyn Error>> {
    let mut command = cargo(&["clippy", "--locked", "--workspace"]);
    check(command.args(targets).args(["--", "-D", "warnings"]))
}

/// A command that is one check: it passes by ending with 0.
fn check(command: &mut Command) -> Result<Count, Box<dyn Error>> {
    eprintln!("           $ {}", shown(command));
    command.stdin(Stdio::null());
    let mut running = command::spawn(command, OnInterrupt::Kill)?;
    Ok(Count::one(running.child.wait()?.success()))
}

/// A run of `cargo test`, its tests counted as they are printed.
fn tests(mut command: Command, filters: &[String]) -> Result<Count, Box<dyn Error>> {
    command
        .args(["--workspace", "--no-fail-fast", "--", SHOW_OUTPUT])
        .args(filters);
    eprintln!("           $ {}", shown(&command));
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut running = command::spawn(&mut command, OnInterrupt::Kill)?;
    let (mut reader, mut count) = (Reader::default(), Count::default());
    if let Some(stdout) = running.child.stdout.take() {
        let mut ours = std::io::stdout();
        for line in BufReader::new(stdout).split(b'\n') {
            let line = [line?.as_slice(), b"\n"].concat();
            if let Some(shown) = reader.read_line(&line, &mut count) {
                ours.write_all(&shown)?;
            }
        }
    }
    let status = running.child.wait()?;
    if !status.success() && count.failed == 0 {
        // It does not compile, or a test took the process with it.
        eprintln!("`{}` ended with {}", shown(&command), command::end(status));
        count.failed += 1;
    }
    Ok(count)
}
