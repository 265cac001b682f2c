//! Tests that need a host of their own: each suite is one static binary, run where it can do no harm, its tests counted as
//! they are printed.

use std::error::Error;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::count::{Count, Reader, SHOW_OUTPUT};
use crate::artifacts::{self, Artifacts};
use crate::command::{self, OnInterrupt, query, shown};
use crate::containerd;
use crate::place::Place;
use crate::programs::{self, BuiltTest, Profile, TestBinary};
use crate::run::choose;
use crate::testbed::machine::Mode;
use crate::testbed::saved::Context;
use crate::testbed::session::Outputs;
use crate::testbed::{self, Order};

/// The whole-system tests.
const SYSTEM: TestBinary = TestBinary {
    name: "system",
    program: Some("read-files"),
};
/// The agent's tests: real containers on the host's own kernel, so always in the testbed.
const SERVICE: TestBinary = TestBinary {
    name: "service",
    program: None,
};
/// The shim's tests: real containerds, whose places on a host are theirs alone, so always in the testbed.
const CONTAINERD: TestBinary = TestBinary {
    name: "containerd",
    program: None,
};
/// The VMM's tests: guests of a few bytes on a real KVM.
const VMM: TestBinary = TestBinary {
    name: "program",
    program: Some("capsid-vmm"),
};
/// What a run left behind is counted on the whole host, and an agent owns its host's cgroups: one test at a time. And the tests
/// that were skipped are told apart.
const HARNESS_FLAGS: [&str; 2] = ["--test-threads=1", SHOW_OUTPUT];

/// So many testbeds at once at most: each takes up to 4 GiB of memory.
const TESTBEDS_MAX: usize = 4;
/// Into so many pieces the tests of each testbed are cut: each starts from the saved state, which takes two seconds.
const SHARES_PER_TESTBED: usize = 4;
/// How the names end of tests that take a minute and more where others take seconds, the longest first. Each is a share of its own, and
/// they begin first, so that no testbed is left alone with one at the end.
const LONG: [&str; 10] = [
    "volumes::a_hundred_thousand_files_are_listed_and_read",
    "::containerd_killed_with_running_containers",
    "::containerd_restarted_with_running_containers",
    "run::thirty_two_cpus_come_up",
    "streams::a_quarter_gibibyte_goes_through_and_comes_back",
    "drill::another_thread_of_a_share_does_none_of_the_forbidden_acts",
    "drill::the_first_thread_of_a_share_does_none_of_the_forbidden_acts",
    "drill::the_main_thread_does_none_of_the_forbidden_acts",
    "drill::a_disks_thread_does_none_of_the_forbidden_acts",
    "drill::a_vcpus_thread_does_none_of_the_forbidden_acts",
];
/// A share that takes longer hangs; most take a few minutes.
const SHARE_LIMIT_S: u64 = 45 * 60;
/// A line is passed on in pieces of this size; one so long is no result of the harness's.
const LINE_MAX_BYTES: usize = 4096;

/// The whole-system tests, on the host or in testbeds.
pub(super) fn system(
    context: &Context<'_>,
    on: Option<Place>,
    filters: &[String],
) -> Result<Count, Box<dyn Error>> {
    let place = choose(context.progress, on);
    let artifacts = match place {
        Place::Host => artifacts::ensure(context, Profile::Release)?,
        Place::Testbed => testbed::prepare(context, Profile::Release, Mode::Plain)?,
    };
    let tests = Tests::build(context, SYSTEM, artifacts)?;
    run(context, &tests, place, filters)
}

/// The agent's tests, in testbeds.
pub(super) fn service(context: &Context<'_>, filters: &[String]) -> Result<Count, Box<dyn Error>> {
    let artifacts = testbed::prepare(context, Profile::Release, Mode::Plain)?;
    let tests = Tests::build(context, SERVICE, artifacts)?;
    run(context, &tests, Place::Testbed, filters)
}

/// The shim's tests, in testbeds.
pub(super) fn containerd(
    context: &Context<'_>,
    filters: &[String],
) -> Result<Count, Box<dyn Error>> {
    let mut artifacts = testbed::prepare(context, Profile::Release, Mode::Plain)?;
    artifacts.add_shim(context, Profile::Release)?;
    containerd::add(context, &mut artifacts)?;
    let tests = Tests::build(context, CONTAINERD, artifacts)?;
    run(context, &tests, Place::Testbed, filters)
}

/// The VMM's tests, where the whole-system tests run; they bring their own guests.
pub(super) fn vmm(
    context: &Context<'_>,
    on: Option<Place>,
    filters: &[String],
) -> Result<Count, Box<dyn Error>> {
    let place = choose(context.progress, on);
    let mut artifacts = Artifacts::default();
    for guest in programs::build_hostile_guest(context.progress, context.workspace)? {
        artifacts.add(Some("CAPSID_HOSTILE_GUEST"), guest, "lib/hostile-guest");
    }
    for drill in programs::build_drill(context.progress, context.workspace)? {
        artifacts.add(Some("CAPSID_VMM_DRILL"), drill, "lib/capsid-vmm-drill");
    }
    let tests = Tests::build(context, VMM, artifacts)?;
    run(context, &tests, place, filters)
}

fn run(
    context: &Context<'_>,
    tests: &Tests,
    place: Place,
    filters: &[String],
) -> Result<Count, Box<dyn Error>> {
    let (tally, code) = match place {
        Place::Host => here(tests, filters)?,
        Place::Testbed => inside(context, tests, filters)?,
    };
    Ok(tests.counted(&tally, code))
}

/// A built suite and everything it needs.
struct Tests {
    artifacts: Artifacts,
    /// What goes from the programs' drive to where the tests look for it.
    copies: Vec<(PathBuf, PathBuf)>,
    binary: PathBuf,
    /// What the binary is called where it runs.
    name: String,
}

impl Tests {
    fn build(
        context: &Context<'_>,
        test: TestBinary,
        mut artifacts: Artifacts,
    ) -> Result<Self, Box<dyn Error>> {
        let BuiltTest { binary, program } =
            programs::build_test(context.progress, context.workspace, test)?;
        let name = format!("capsid-{}-tests", test.name);
        artifacts.add(None, binary.clone(), &format!("bin/{name}"));
        let mut copies = Vec::new();
        if let Some(program) = program {
            let place = "lib/program-under-test";
            artifacts.add(None, program.clone(), place);
            copies.push((place.into(), program));
        }
        Ok(Self {
            artifacts,
            copies,
            binary,
            name,
        })
    }

    fn counted(&self, tally: &Tally, code: i32) -> Count {
        let mut count = tally.take();
        if code != 0 && count.failed == 0 {
            eprintln!("{} ended with {code} and named no failed test", self.name);
            count.failed += 1;
        }
        count
    }
}

/// Runs them in as many testbeds at once as there are processors. Each takes the next share when it has done one, so that
/// none has nothing to do while another has the long tests.
fn inside(
    context: &Context<'_>,
    tests: &Tests,
    filters: &[String],
) -> Result<(Tally, i32), Box<dyn Error>> {
    let names = names(&tests.binary, filters)?;
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let testbeds = processors.min(TESTBEDS_MAX);
    let tally = Tally::default();
    let queue = Mutex::new(shares(&names, testbeds * SHARES_PER_TESTBED).into_iter());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let worker = || {
        let mut worst = 0;
        while let Some(share) = next() {
            let outputs = Outputs {
                out: Box::new(tally.line_by_line(io::stdout())),
                err: Box::new(io::stderr()),
            };
            match one_share(context, tests, &share, outputs) {
                Ok(code) => worst = worst.max(i32::from(code)),
                Err(why) => {
                    eprintln!("{} of {}: {why}", tests.name, share.join(" "));
                    tally.add(Count::failed_one());
                }
            }
        }
        worst
    };
    let codes: Vec<i32> = std::thread::scope(|scope| {
        let running: Vec<_> = (0..testbeds).map(|_| scope.spawn(worker)).collect();
        running
            .into_iter()
            .map(|one| one.join().unwrap_or(-1))
            .collect()
    });
    let worst = codes.into_iter().find(|code| *code != 0).unwrap_or(0);
    Ok((tally, worst))
}

fn one_share(
    context: &Context<'_>,
    tests: &Tests,
    names: &[String],
    outputs: Outputs,
) -> Result<u8, String> {
    let mut words = vec![tests.name.as_str().into(), "--exact".into()];
    words.extend(HARNESS_FLAGS.map(Into::into));
    words.extend(names.iter().map(Into::into));
    let order = Order {
        items: tests.artifacts.items(),
        copies: tests.copies.clone(),
        variables: tests.artifacts.variables_inside(),
        words,
        limit: Some(Duration::from_secs(SHARE_LIMIT_S)),
        ..Order::new(Mode::Plain)
    };
    testbed::execute_into(context, order, outputs).map_err(|error| crate::chain(error.as_ref()))
}

/// The names of the tests that the filters leave; the harness itself knows.
fn names(binary: &Path, filters: &[String]) -> Result<Vec<String>, Box<dyn Error>> {
    let mut command = Command::new(binary);
    let (status, list) = query(command.args(["--list", "--format", "terse"]).args(filters))?;
    if !status.success() {
        return Err(format!("`{}` ended with {}", shown(&command), command::end(status)).into());
    }
    Ok(listed(&String::from_utf8_lossy(&list)))
}

/// One `name: test` a line.
fn listed(list: &str) -> Vec<String> {
    list.lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .map(str::to_owned)
        .collect()
}

/// The long ones first, each alone; the others dealt out in turn, so that neighbours, which mostly take about as long, go to
/// different testbeds.
fn shares(names: &[String], count: usize) -> Vec<Vec<String>> {
    let ending = |end: &'static str| {
        names
            .iter()
            .filter(move |name| name.ends_with(end))
            .cloned()
    };
    let long: Vec<String> = LONG.into_iter().flat_map(ending).collect();
    let others: Vec<String> = names
        .iter()
        .filter(|name| !long.contains(name))
        .cloned()
        .collect();
    let mut dealt = vec![Vec::new(); count.clamp(1, others.len().max(1))];
    let places = (0..dealt.len()).cycle();
    for (name, place) in others.into_iter().zip(places) {
        if let Some(share) = dealt.get_mut(place) {
            share.push(name);
        }
    }
    let mut shares: Vec<Vec<String>> = long.into_iter().map(|name| vec![name]).collect();
    shares.extend(dealt.into_iter().filter(|share| !share.is_empty()));
    shares
}

fn here(tests: &Tests, filters: &[String]) -> Result<(Tally, i32), Box<dyn Error>> {
    let tally = Tally::default();
    let artifacts = &tests.artifacts;
    let mut command = Command::new(&tests.binary);
    command
        .args(HARNESS_FLAGS)
        .args(filters)
        .envs(artifacts.variables_here());
    if let Some(bin) = artifacts.here("capsid").and_then(Path::parent) {
        command.env("PATH", search_path(bin));
    }
    eprintln!("           $ {}", shown(&command));
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut running = command::spawn(&mut command, OnInterrupt::Kill)?;
    if let Some(mut stdout) = running.child.stdout.take() {
        io::copy(&mut stdout, &mut tally.line_by_line(io::stdout()))?;
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

/// Counts the tests in what several runs print, and passes their output on in whole lines.
#[derive(Debug, Default, Clone)]
struct Tally {
    count: Arc<Mutex<Count>>,
}

/// The output of one run, on its way to a person.
#[derive(Debug)]
struct Lines<W: Write> {
    tally: Tally,
    person: W,
    reader: Reader,
    line: Vec<u8>,
    /// When the last line ended. The tests of a run come one after the other, so this is when the one it prints next began.
    since: Instant,
}

impl Tally {
    fn take(&self) -> Count {
        let mut sum = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *sum)
    }

    fn add(&self, count: Count) {
        let mut sum = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        sum.add(count);
    }

    fn line_by_line<W: Write>(&self, person: W) -> Lines<W> {
        Lines {
            tally: self.clone(),
            person,
            reader: Reader::default(),
            line: Vec::new(),
            since: Instant::now(),
        }
    }
}

impl<W: Write> Lines<W> {
    fn pass_on(&mut self) -> io::Result<()> {
        let line = std::mem::take(&mut self.line);
        let took = std::mem::replace(&mut self.since, Instant::now()).elapsed();
        let mut count = Count::default();
        let shown = self.reader.read_line(&line, &mut count);
        self.tally.add(count);
        shown.map_or(Ok(()), |shown| self.person.write_all(&timed(&shown, took)))
    }
}

/// The line of a test that passed, with how long it took; any other line as it is.
fn timed(line: &[u8], took: Duration) -> Vec<u8> {
    match line.strip_suffix(b" ... ok\n") {
        Some(test) if test.starts_with(b"test ") => {
            let seconds = format!(" ... ok in {:.1} s\n", took.as_secs_f64());
            [test, seconds.as_bytes()].concat()
        }
        _ => line.to_vec(),
    }
}

impl<W: Write> Write for Lines<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            self.line.push(*byte);
            if *byte == b'\n' || self.line.len() >= LINE_MAX_BYTES {
                self.pass_on()?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.person.flush()
    }
}

impl<W: Write> Drop for Lines<W> {
    fn drop(&mut self) {
        // A last line without an end; a standard output that is gone was noticed before.
        let _ = self.pass_on();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_is_counted_however_it_is_cut() {
        let tally = Tally::default();
        // Not to standard output: whoever counts our own tests would count these as well.
        let mut lines = tally.line_by_line(io::sink());
        for piece in [
            "\ntest resu",
            "lt: ok. 2 passed; 0 fai",
            "led; 0 ignored; 0 measured\n",
        ] {
            lines.write_all(piece.as_bytes()).expect("written");
        }
        let count = tally.take();
        assert_eq!((count.passed, count.failed, count.skipped), (2, 0, 0));
    }

    #[test]
    fn a_test_that_passed_says_how_long_it_took() {
        let took = Duration::from_millis(1234);
        assert_eq!(
            timed(b"test a::b ... ok\n", took),
            b"test a::b ... ok in 1.2 s\n"
        );
        for other in ["test a ... FAILED\n", "test a ... ok", "x ... ok\n", "\n"] {
            assert_eq!(timed(other.as_bytes(), took), other.as_bytes());
        }
    }

    #[test]
    fn every_test_is_in_one_share() {
        let names: Vec<String> = listed("a::b: test\nc: test\nd: benchmark\n\ne: test\n");
        assert_eq!(names, ["a::b", "c", "e"]);
        assert_eq!(
            shares(&names, 2),
            [
                vec!["a::b".to_owned(), "e".to_owned()],
                vec!["c".to_owned()]
            ]
        );
        assert_eq!(shares(&names, 9).len(), 3);
        assert!(shares(&[], 2).is_empty());
        let long = LONG[0].to_owned();
        let names = [&names[..], std::slice::from_ref(&long)].concat();
        assert_eq!(shares(&names, 1), [vec![long], names[..3].to_vec()]);
    }
}
