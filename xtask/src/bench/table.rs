//! What the benchmarks' JSON lines and the tables made of them have in common. Pure.

use serde_json::Value;

/// Columns of names, which come first and stand to the left; the others are numbers.
const NAMES: usize = 2;
/// What stands where there is no figure.
const NONE: &str = "-";

/// A line that is no result.
#[derive(Debug, thiserror::Error)]
#[error("this is no result of the benchmark: {line}")]
pub struct NoResult {
    line: String,
}

/// Reads JSON lines, each by `read`.
///
/// # Errors
/// A line is not a result.
pub fn lines<T>(text: &str, read: impl Fn(&Line) -> Option<T>) -> Result<Vec<T>, NoResult> {
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    lines
        .map(|line| {
            let value = serde_json::from_str(line).ok().map(Line);
            value
                .and_then(|value| read(&value))
                .ok_or_else(|| NoResult {
                    line: line.to_owned(),
                })
        })
        .collect()
}

/// One result.
pub struct Line(Value);

impl Line {
    /// A word.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name)?.as_str()
    }

    /// A number.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.0.get(name)?.as_u64()
    }

    /// Its times.
    pub fn samples(&self) -> Option<Samples> {
        let numbers = self.0.get("samples")?.as_array()?;
        let mut samples: Vec<u64> = numbers.iter().map(Value::as_u64).collect::<Option<_>>()?;
        samples.sort_unstable();
        Some(Samples(samples))
    }

    /// What was counted, the most first.
    pub fn counts(&self, name: &str) -> Option<Counts> {
        let counts = self.0.get(name)?.as_object()?.iter();
        let mut counts: Vec<_> = counts
            .map(|(name, count)| Some((name.clone(), count.as_u64()?)))
            .collect::<Option<_>>()?;
        counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        Some(Counts(counts))
    }
}

/// What one thing took each time, in ns, sorted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Samples(Vec<u64>);

impl Samples {
    /// The one in the middle.
    pub fn median(&self) -> Option<u64> {
        self.0.get(self.0.len() / 2).copied()
    }

    /// Median, smallest, largest, and the median's ratio to that of `base`.
    pub fn cells(&self, base: Option<&Samples>) -> [String; 4] {
        let ratio = match (self.median(), base.and_then(Samples::median)) {
            (Some(this), Some(base)) if base > 0 => format!("{:.2}", this as f64 / base as f64),
            _ => NONE.to_owned(),
        };
        let [median, min, max] = [
            self.median(),
            self.0.first().copied(),
            self.0.last().copied(),
        ]
        .map(milliseconds);
        [median, min, max, ratio]
    }
}

/// How many, by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counts(Vec<(String, u64)>);

impl Counts {
    /// Whether nothing was counted.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All together.
    pub fn total(&self) -> u64 {
        self.0.iter().map(|(_, count)| count).sum()
    }

    /// As `this 3, that 2`.
    pub fn words(&self) -> String {
        let words: Vec<String> = self
            .0
            .iter()
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        words.join(", ")
    }
}

/// A time for people.
pub fn milliseconds(ns: Option<u64>) -> String {
    figure(ns, |ns| format!("{:.2} ms", ns as f64 / 1e6))
}

/// A figure for people, where there is one.
pub fn figure<T>(value: Option<T>, show: impl FnOnce(T) -> String) -> String {
    value.map_or_else(|| NONE.to_owned(), show)
}

/// Adds a line of a table whose columns are so wide.
pub fn line<const N: usize>(out: &mut String, widths: [usize; N], cells: [&str; N]) {
    let cells = cells.iter().zip(widths).enumerate();
    let padded: Vec<String> = cells
        .map(|(column, (cell, width))| match column < NAMES {
            true => format!("{cell:<width$}"),
            false => format!("{cell:>width$}"),
        })
        .collect();
    out.push_str(padded.join(" ").trim_end());
    out.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_result_is_refused_by_its_text() {
        for text in ["Kernel panic", "{}", r#"{"samples":[-1]}"#] {
            let error = lines(text, Line::samples).expect_err("no result");
            assert!(error.to_string().contains(text));
        }
    }

    #[test]
    fn the_middle_of_the_samples_is_compared_with_that_of_the_base() {
        let text =
            "{\"samples\":[4000000,1000000,3000000]}\n\n{\"samples\":[2000000]}\n{\"samples\":[]}";
        let samples = lines(text, Line::samples).expect("results");
        let [many, one, none] = samples.as_slice() else {
            panic!("three lines");
        };
        assert_eq!(
            many.cells(Some(one)),
            ["3.00 ms", "1.00 ms", "4.00 ms", "1.50"]
        );
        assert_eq!(none.cells(Some(one)), ["-", "-", "-", "-"]);
        assert_eq!(one.cells(Some(none))[3], "-");
    }

    #[test]
    fn a_table_has_names_to_the_left_and_numbers_to_the_right() {
        let mut out = String::new();
        line(&mut out, [4, 3, 3], ["a", "b", "1"]);
        line(&mut out, [4, 3, 3], ["a", "b", ""]);
        assert_eq!(out, "a    b     1\na    b\n");
    }
}
