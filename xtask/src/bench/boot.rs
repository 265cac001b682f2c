//! The boot benchmark's JSON lines as a table for people. Pure.

use std::fmt::Write;

use super::table::{self, Counts, Line, NoResult, Samples, figure, milliseconds};

/// System, phase, median, smallest, largest, ratio, exits.
const WIDTHS: [usize; 7] = [20, 8, 10, 10, 10, 6, 6];

/// The samples of one phase of one system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// System and kernel, as `capsid-vmm (own)`.
    system: String,
    /// `init`, `exit`, or `vmm:…`.
    phase: String,
    samples: Samples,
    /// Exits to userspace over the run.
    exits: Counts,
}

/// Reads the boot benchmark's lines.
///
/// # Errors
/// A line is not a result.
pub fn parse(text: &str) -> Result<Vec<Row>, NoResult> {
    table::lines(text, row)
}

fn row(line: &Line) -> Option<Row> {
    let system = line.text("system")?;
    Some(Row {
        system: match line.text("kernel")? {
            "none" => system.to_owned(),
            kernel => format!("{system} ({kernel})"),
        },
        phase: line.text("phase")?.to_owned(),
        samples: line.samples()?,
        exits: line.counts("userspace_exits")?,
    })
}

/// The table: each system's times with the ratio to the first system's, then where our own time goes, then exits.
pub fn table(rows: &[Row]) -> String {
    let mut out = String::new();
    let (ours, whole): (Vec<&Row>, Vec<&Row>) =
        rows.iter().partition(|row| row.phase.starts_with("vmm:"));
    let titles = ["system", "phase", "median", "min", "max", "ratio", "exits"];
    table::line(&mut out, WIDTHS, titles);
    for row in &whole {
        let base = whole.iter().find(|other| other.phase == row.phase);
        let [median, min, max, ratio] = row.samples.cells(base.map(|base| &base.samples));
        let exits = (!row.exits.is_empty()).then(|| row.exits.total());
        let exits = figure(exits, |total| total.to_string());
        let cells = [&row.system, &row.phase, &median, &min, &max, &ratio, &exits];
        table::line(&mut out, WIDTHS, cells.map(String::as_str));
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
        let median = milliseconds(row.samples.median());
        table::line(out, WIDTHS, [&row.system, phase, &median, "", "", "", ""]);
    }
}

fn reasons(out: &mut String, rows: &[&Row]) {
    out.push_str("\nexits to userspace in one run, by reason:\n");
    for row in rows
        .iter()
        .filter(|row| row.phase == "exit" && !row.exits.is_empty())
    {
        let _infallible = writeln!(out, "{:<20} {}", row.system, row.exits.words());
    }
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
}
