//! The boot benchmark's JSON lines as a table for people. Pure.

use std::fmt::Write;

use serde_json::Value;

/// The samples of one phase of one system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// System and kernel, as `capsid-vmm (own)`.
    pub system: String,
    /// `init`, `exit`, or `vmm:…`.
    pub phase: String,
    /// In ns, sorted.
    pub samples: Vec<u64>,
    /// Exits to userspace over the run.
    pub exits: Vec<(String, u64)>,
}

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
pub fn lines<T>(text: &str, read: impl Fn(&str) -> Option<T>) -> Result<Vec<T>, NoResult> {
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    lines
        .map(|line| {
            read(line).ok_or_else(|| NoResult {
                line: line.to_owned(),
            })
        })
        .collect()
}

/// Reads the boot benchmark's lines.
///
/// # Errors
/// A line is not a result.
pub fn parse(text: &str) -> Result<Vec<Row>, NoResult> {
    lines(text, row)
}

fn row(line: &str) -> Option<Row> {
    let value: Value = serde_json::from_str(line).ok()?;
    let text = |name: &str| Some(value.get(name)?.as_str()?.to_owned());
    let numbers = value.get("samples")?.as_array()?;
    let mut samples: Vec<u64> = numbers.iter().map(Value::as_u64).collect::<Option<_>>()?;
    samples.sort_unstable();
    let exits = value.get("userspace_exits")?.as_object()?;
    Some(Row {
        system: match text("kernel")?.as_str() {
            "none" => text("system")?,
            kernel => format!("{} ({kernel})", text("system")?),
        },
        phase: text("phase")?,
        samples,
        exits: exits
            .iter()
            .filter_map(|(reason, count)| Some((reason.clone(), count.as_u64()?)))
            .collect(),
    })
}

/// The table: each system's times with the ratio to the first system's, then where our own time goes, then exits.
pub fn table(rows: &[Row]) -> String {
    let mut out = String::new();
    let (ours, whole): (Vec<&Row>, Vec<&Row>) =
        rows.iter().partition(|row| row.phase.starts_with("vmm:"));
    line(
        &mut out,
        ["system", "phase", "median", "min", "max", "ratio", "exits"],
    );
    for row in &whole {
        let base = whole
            .iter()
            .find(|other| other.phase == row.phase)
            .and_then(|base| median(base));
        let ratio = match (median(row), base) {
            (Some(this), Some(base)) if base > 0 => format!("{:.2}", this as f64 / base as f64),
            _ => "-".to_owned(),
        };
        let exits: u64 = row.exits.iter().map(|(_, count)| count).sum();
        let exits = if row.exits.is_empty() {
            "-".to_owned()
        } else {
            exits.to_string()
        };
        let times = [
            milliseconds(median(row)),
            milliseconds(row.samples.first().copied()),
            milliseconds(row.samples.last().copied()),
        ];
        line(
            &mut out,
            [
                &row.system,
                &row.phase,
                &times[0],
                &times[1],
                &times[2],
                &ratio,
                &exits,
            ],
        );
    }
    profile(&mut out, &ours);
    reasons(&mut out, &whole);
    out
}

/// Where the time of our own VMM goes.
fn profile(out: &mut String, rows: &[&Row]) {
    if rows.is_empty() {
        return;
    }
    out.push_str("\nwithin capsid-vmm, each phase from the end of the one before:\n");
    for row in rows {
        let phase = row.phase.trim_start_matches("vmm:");
        line(
            out,
            [
                &row.system,
                phase,
                &milliseconds(median(row)),
                "",
                "",
                "",
                "",
            ],
        );
    }
}

fn reasons(out: &mut String, rows: &[&Row]) {
    out.push_str("\nexits to userspace in one run, by reason:\n");
    for row in rows
        .iter()
        .filter(|row| row.phase == "exit" && !row.exits.is_empty())
    {
        let reasons: Vec<String> = row
            .exits
            .iter()
            .map(|(reason, count)| format!("{reason} {count}"))
            .collect();
        let _infallible = writeln!(out, "{:<20} {}", row.system, reasons.join(", "));
    }
}

fn line(out: &mut String, [system, phase, median, min, max, ratio, exits]: [&str; 7]) {
    let text =
        format!("{system:<20} {phase:<8} {median:>10} {min:>10} {max:>10} {ratio:>6} {exits:>6}");
    out.push_str(text.trim_end());
    out.push('\n');
}

fn median(row: &Row) -> Option<u64> {
    row.samples.get(row.samples.len() / 2).copied()
}

fn milliseconds(ns: Option<u64>) -> String {
    ns.map_or_else(|| "-".to_owned(), |ns| format!("{:.2} ms", ns as f64 / 1e6))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = r#"{"bench":"boot","system":"capsid-vmm","kernel":"same","phase":"init","unit":"ns","samples":[3000000,1000000,2000000],"userspace_exits":{"io":5,"mmio":2}}
{"bench":"boot","system":"runc","kernel":"none","phase":"init","unit":"ns","samples":[4000000],"userspace_exits":{}}
{"bench":"boot","system":"capsid-vmm","kernel":"same","phase":"vmm:kvm","unit":"ns","samples":[500000],"userspace_exits":{}}
"#;

    #[test]
    fn a_table_has_medians_ratios_and_exits() {
        let table = table(&parse(LINES).expect("results"));
        let words: Vec<Vec<&str>> = table
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(
            words[1],
            [
                "capsid-vmm",
                "(same)",
                "init",
                "2.00",
                "ms",
                "1.00",
                "ms",
                "3.00",
                "ms",
                "1.00",
                "7"
            ]
        );
        assert_eq!(
            words[2],
            [
                "runc", "init", "4.00", "ms", "4.00", "ms", "4.00", "ms", "2.00", "-"
            ]
        );
        assert!(
            words.contains(&vec!["capsid-vmm", "(same)", "kvm", "0.50", "ms"]),
            "{table}"
        );
    }

    #[test]
    fn what_is_no_result_is_refused_by_its_text() {
        let error = parse("Kernel panic").expect_err("no JSON");
        assert!(error.to_string().contains("Kernel panic"));
    }
}
