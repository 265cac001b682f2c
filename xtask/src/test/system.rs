//! The whole-system tests: one static binary, run where microVMs run, its tests counted as they are printed.

use std::error::Error;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use super::count::Count;
use crate::artifacts::{self, Artifacts};
use crate::command::{self, OnInterrupt, shown};
use crate::place::Place;
use crate::programs::{self, Profile, TestBinary};
use crate::run::choose;
use crate::testbed::machine::Mode;
use crate::testbed::saved::Context;
use crate::testbed::session::Outputs;
use crate::testbed::{self, Order};

/// The tests, as a cargo target.
const TESTS: TestBinary = TestBinary {
    package: "capsid-tests",
    name: "system",
};
/// Their name where they run.
const NAME: &str = "capsid-system-tests";
/// The ledger of what a run left behind counts the whole host, so tests run one at a time.
const HARNESS_FLAG: &str = "--test-threads=1";

/// Builds and runs them.
pub(super) fn run(
    context: &Context<'_>,
    on: Option<Place>,
    filters: &[String],
) -> Result<Count, Box<dyn Error>> {
    let place = choose(context.progress, on);
    let mut artifacts = artifacts::ensure(context, Profile::Release)?;
    let binary = programs::build_test(context.progress, context.workspace, TESTS)?;
    artifacts.add(None, binary.clone(), &format!("bin/{NAME}"));
    let (tally, code) = match place {
        Place::Host => here(&artifacts, &binary, filters)?,
        Place::Testbed => inside(context, &artifacts, filters)?,
    };
    let mut count = tally.take();
    if code != 0 && count.failed == 0 {
        eprintln!("{NAME} ended with {code} and named no failed test");
        count.failed += 1;
    }
    Ok(count)
}

fn inside(
    context: &Context<'_>,
    artifacts: &Artifacts,
    filters: &[String],
) -> Result<(Tally, i32), Box<dyn Error>> {
    let tally = Tally::default();
    let mut words = vec![NAME.into(), HARNESS_FLAG.into()];
    words.extend(filters.iter().map(Into::into));
    let order = Order {
        items: artifacts.items(),
        variables: artifacts.variables_inside(),
        words,
        ..Order::new(Mode::Plain)
    };
    let outputs = Outputs {
        out: Box::new(tally.clone()),
        err: Box::new(io::stderr()),
    };
    let code = testbed::execute_into(context, order, None, outputs)?;
    Ok((tally, i32::from(code)))
}

fn here(
    artifacts: &Artifacts,
    binary: &Path,
    filters: &[String],
) -> Result<(Tally, i32), Box<dyn Error>> {
    let mut tally = Tally::default();
    let mut command = Command::new(binary);
    command
        .arg(HARNESS_FLAG)
        .args(filters)
        .envs(artifacts.variables_here());
    if let Some(bin) = artifacts.here("capsid").and_then(Path::parent) {
        command.env("PATH", search_path(bin));
    }
    eprintln!("           $ {}", shown(&command));
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut running = command::spawn(&mut command, OnInterrupt::Kill)?;
    if let Some(mut stdout) = running.child.stdout.take() {
        io::copy(&mut stdout, &mut tally)?;
    }
    let status = running.child.wait()?;
    Ok((tally, status.code().unwrap_or(-1)))
}

fn search_path(first: &Path) -> std::ffi::OsString {
    let rest = std::env::var_os("PATH").unwrap_or_default();
    let all = std::iter::once(PathBuf::from(first)).chain(std::env::split_paths(&rest));
    // A directory with a colon in its name cannot be on the path; then the old path has to do.
    std::env::join_paths(all).unwrap_or(rest)
}

/// Passes output on and counts the tests in it.
#[derive(Debug, Default, Clone)]
struct Tally {
    state: Arc<Mutex<(Vec<u8>, Count)>>,
}

/// A line longer than this is no result of the harness's.
const LINE_MAX_BYTES: usize = 4096;

impl Tally {
    fn take(&self) -> Count {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1
    }
}

impl Write for Tally {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        io::stdout().write_all(bytes)?;
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (line, count) = &mut *state;
        for byte in bytes {
            if *byte == b'\n' {
                count.read_line(line);
                line.clear();
            } else if line.len() < LINE_MAX_BYTES {
                line.push(*byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_counted_however_it_is_cut() {
        let mut tally = Tally::default();
        for piece in [
            "\ntest resu",
            "lt: ok. 2 passed; 0 fai",
            "led; 0 ignored; 0 measured\n",
        ] {
            tally.write_all(piece.as_bytes()).expect("written");
        }
        assert_eq!(
            tally.take(),
            Count {
                passed: 2,
                failed: 0,
                skipped: 0
            }
        );
    }
}
