//! Counting tests by what the test harness of Rust prints.

use std::fmt;

/// How many tests there were.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Count {
    /// Did what they should.
    pub(crate) passed: u64,
    /// Did not.
    pub(crate) failed: u64,
    /// Were not run.
    pub(crate) skipped: u64,
}

impl Count {
    /// One check.
    pub(crate) fn one(passed: bool) -> Self {
        Self {
            passed: u64::from(passed),
            failed: u64::from(!passed),
            skipped: 0,
        }
    }

    /// One that could not run.
    pub(crate) fn failed_one() -> Self {
        Self::one(false)
    }

    /// Adds another count.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }

    /// Adds what a line of output says, if it is the harness's result.
    pub(crate) fn read_line(&mut self, line: &[u8]) {
        if let Some(result) = result(&String::from_utf8_lossy(line)) {
            self.add(result);
        }
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

/// `test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s`
fn result(line: &str) -> Option<Count> {
    let (_, figures) = line
        .trim()
        .strip_prefix("test result: ")?
        .split_once(". ")?;
    let figure = |name: &str| {
        figures
            .split("; ")
            .find_map(|part| part.strip_suffix(name)?.trim_end().parse::<u64>().ok())
    };
    Some(Count {
        passed: figure("passed")?,
        failed: figure("failed")?,
        skipped: figure("ignored")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_harness_result_is_counted() {
        let mut count = Count::default();
        count.read_line(b"test result: ok. 24 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.06s");
        count.read_line(b"test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s");
        assert_eq!(
            count,
            Count {
                passed: 27,
                failed: 2,
                skipped: 1
            }
        );
    }

    #[test]
    fn other_lines_count_nothing() {
        let mut count = Count::default();
        for line in [
            "test x ... ok",
            "test result: ",
            "5 passed",
            "test result: ok. many passed; 0 failed; 0 ignored",
        ] {
            count.read_line(line.as_bytes());
        }
        assert_eq!(count, Count::default());
    }
}
