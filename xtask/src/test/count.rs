//! Counting tests by what the test harness of Rust prints.
//!
//! A test that cannot run where it is prints a line `SKIPPED …: why` and returns, and the harness takes that for a success. It
//! shows what successful tests print only when it is told to ([`SHOW_OUTPUT`]); then those with that line are taken out of the
//! passed ones, and all else that successful tests print is left out. It is the one way to skip a test in every room.

use std::fmt;

/// What the harness is told so that it shows what successful tests print.
pub(super) const SHOW_OUTPUT: &str = "--show-output";
/// How the line of a test begins that cannot run where it is.
const SKIPPED: &str = "SKIPPED";

/// How many tests there were.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Count {
    /// Did what they should.
    pub(crate) passed: u64,
    /// Did not.
    pub(crate) failed: u64,
    /// Were not run.
    pub(crate) skipped: u64,
    /// Those that were not run, by name, with the reason where one was given.
    pub(crate) names: Vec<String>,
}

impl Count {
    /// One check.
    pub(crate) fn one(passed: bool) -> Self {
        Self {
            passed: u64::from(passed),
            failed: u64::from(!passed),
            ..Self::default()
        }
    }

    /// One that could not run.
    pub(crate) fn failed_one() -> Self {
        Self::one(false)
    }

    /// One that is not run here.
    pub(crate) fn skipped_one(name: &str, why: &str) -> Self {
        Self {
            skipped: 1,
            names: vec![format!("{name}: {why}")],
            ..Self::default()
        }
    }

    /// Adds another count.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.names.extend(other.names);
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.skipped
        )
    }
}

/// Reads what one harness after the other prints.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    /// Whether these lines are what successful tests printed.
    in_successes: bool,
    /// The test that printed them.
    test: Option<String>,
    /// Of this run: successes that were none.
    skipped: u64,
    names: Vec<String>,
}

impl Reader {
    /// Reads a line and adds what it says to the count; returns what of it a person should see.
    pub(crate) fn read_line(&mut self, line: &[u8], count: &mut Count) -> Option<Vec<u8>> {
        let text = String::from_utf8_lossy(line);
        let text = text.trim_end();
        if let Some(result) = result(text) {
            let run = std::mem::take(self);
            count.add(Count {
                passed: result.passed.saturating_sub(run.skipped),
                skipped: result.skipped + run.skipped,
                names: run.names,
                ..result
            });
            return Some(line.to_vec());
        }
        match text {
            "successes:" => self.in_successes = true,
            "failures:" => self.in_successes = false,
            _ if self.in_successes => return self.read_output(text),
            _ => {
                self.names.extend(ignored(text));
                return Some(line.to_vec());
            }
        }
        (!self.in_successes).then(|| line.to_vec())
    }

    /// A line of what a successful test printed.
    fn read_output(&mut self, text: &str) -> Option<Vec<u8>> {
        if let Some(name) = header(text) {
            self.test = Some(name.to_owned());
        } else if text.starts_with(SKIPPED) {
            // It may say so twice, and is skipped once.
            let name = self.test.take()?;
            let why = text.rsplit_once(": ").map_or(text, |(_, why)| why);
            self.skipped += 1;
            self.names.push(format!("{name}: {why}"));
            return Some(format!("{SKIPPED} {name}: {why}\n").into_bytes());
        }
        None
    }
}

/// `---- a::b stdout ----`
fn header(line: &str) -> Option<&str> {
    line.strip_prefix("---- ")?.strip_suffix(" stdout ----")
}

/// `test a::b ... ignored, why`
fn ignored(line: &str) -> Option<String> {
    let (name, why) = line.strip_prefix("test ")?.split_once(" ... ignored")?;
    let why = why.strip_prefix(", ").unwrap_or("ignored");
    Some(format!("{name}: {why}"))
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s`
fn result(line: &str) -> Option<Count> {
    let (_, figures) = line
        .trim()
        .strip_prefix("test result: ")?
        .split_once(". ")?;
    let figure = |name: &str| -> Option<u64> {
        figures
            .split("; ")
            .find_map(|part| part.strip_suffix(name)?.trim().parse().ok())
    };
    Some(Count {
        passed: figure("passed")?,
        failed: figure("failed")?,
        skipped: figure("ignored")?,
        names: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is counted, and what is shown.
    fn read(lines: &[&str]) -> (Count, Vec<String>) {
        let (mut reader, mut count) = (Reader::default(), Count::default());
        let shown = lines
            .iter()
            .filter_map(|line| reader.read_line(line.as_bytes(), &mut count))
            .map(|line| String::from_utf8_lossy(&line).into_owned())
            .collect();
        (count, shown)
    }

    #[test]
    fn results_add_up_whatever_the_verdict() {
        let (count, _) = read(&[
            "test result: ok. 24 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.06s",
            "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s",
        ]);
        assert_eq!((count.passed, count.failed, count.skipped), (27, 2, 1));
    }

    #[test]
    fn other_lines_count_nothing() {
        let lines = [
            "test x ... ok",
            "test result: ",
            "5 passed",
            "test result: ok. many passed; 0 failed; 0 ignored",
        ];
        let (count, shown) = read(&lines);
        assert_eq!(count, Count::default());
        assert_eq!(shown, lines);
    }

    #[test]
    fn a_test_that_says_it_was_skipped_did_not_pass() {
        let (count, shown) = read(&[
            "test a::b ... ok",
            "test c ... ok",
            "",
            "successes:",
            "---- a::b stdout ----",
            "chatter",
            "SKIPPED b: needs /dev/kvm and root",
            "SKIPPED b: again",
            "---- c stdout ----",
            "it is not SKIPPED: at all",
            "",
            "successes:",
            "    a::b",
            "    c",
            "",
            "test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured",
        ]);
        assert_eq!((count.passed, count.failed, count.skipped), (1, 0, 1));
        assert_eq!(count.names, ["a::b: needs /dev/kvm and root"]);
        assert_eq!(
            shown[3..],
            [
                "SKIPPED a::b: needs /dev/kvm and root\n",
                "test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured"
            ]
        );
    }

    #[test]
    fn what_a_failed_test_printed_is_shown_and_is_a_failure() {
        let lines = [
            "failures:",
            "---- c stdout ----",
            "SKIPPED: not a word of it",
            "test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured",
        ];
        let (count, shown) = read(&[&["successes:", "    a", ""], &lines[..]].concat());
        assert_eq!((count.failed, count.skipped), (1, 0));
        assert_eq!(shown, lines);
    }

    #[test]
    fn an_ignored_test_is_named() {
        let (count, _) = read(&[
            "test a ... ignored, takes an hour",
            "test b ... ignored",
            "test result: ok. 0 passed; 0 failed; 2 ignored; 0 measured",
        ]);
        assert_eq!(count.names, ["a: takes an hour", "b: ignored"]);
        assert_eq!(count.skipped, 2);
    }
}
