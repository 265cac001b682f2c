//! The JSON lines of a device's benchmark as a table for people. Pure.

use std::fmt::Write;

use super::table::{self, Counts, Line, NoResult, Samples, figure};

/// What one system made of one load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    load: String,
    system: String,
    samples: Samples,
    /// Operations of a round.
    operations: u64,
    /// Bytes that a round moves, where it is about bytes.
    bytes: Option<u64>,
    /// What was counted in one round, of each of [`KINDS`].
    counted: Vec<Counts>,
}

/// What is counted, as the lines name it, and as the table does.
const KINDS: [(&str, &str); 4] = [
    ("userspace_exits", "to the VMM"),
    ("exits", "exits"),
    ("syscalls", "syscalls"),
    ("switches", "switches"),
];
/// Load, system, median, smallest, largest, ratio, each, rate, and the counts.
const WIDTHS: [usize; 12] = [16, 11, 10, 10, 10, 6, 10, 10, 10, 8, 8, 8];

/// Reads JSON lines.
///
/// # Errors
/// A line is not a result.
pub fn parse(text: &str) -> Result<Vec<Row>, NoResult> {
    table::lines(text, row)
}

fn row(line: &Line) -> Option<Row> {
    let counted = KINDS.iter().map(|(name, _)| line.counts(name));
    Some(Row {
        load: line.text("load")?.to_owned(),
        system: line.text("system")?.to_owned(),
        samples: line.samples()?,
        operations: line.number("operations")?,
        bytes: line.number("bytes"),
        counted: counted.collect::<Option<_>>()?,
    })
}

/// The table: each load's times with the ratio to the first system's and what was counted, then that by name.
pub fn table(rows: &[Row]) -> String {
    let mut out = String::new();
    let [a, b, c, d] = KINDS.map(|(_, title)| title);
    let titles = [
        "load", "system", "median", "min", "max", "ratio", "each", "rate", a, b, c, d,
    ];
    table::line(&mut out, WIDTHS, titles);
    for row in rows {
        let base = rows.iter().find(|base| base.load == row.load);
        let [median, min, max, ratio] = row.samples.cells(base.map(|base| &base.samples));
        let (each, rate) = (each(row), rate(row));
        let mut totals = row.counted.iter().map(|counts| counts.total().to_string());
        let [a, b, c, d] = KINDS.map(|_| totals.next().unwrap_or_default());
        let cells = [
            &row.load,
            &row.system,
            &median,
            &min,
            &max,
            &ratio,
            &each,
            &rate,
            &a,
            &b,
            &c,
            &d,
        ];
        table::line(&mut out, WIDTHS, cells.map(String::as_str));
    }
    out.push_str("\nin one round, by name:\n");
    for row in rows {
        for ((kind, _), counts) in KINDS.iter().zip(&row.counted) {
            let (load, system, counts) = (&row.load, &row.system, counts.words());
            let _infallible = writeln!(out, "{load:<16} {system:<11} {kind:<15} {counts}");
        }
    }
    out
}

/// What one operation of many took.
fn each(row: &Row) -> String {
    let ns = row.samples.median().filter(|_| row.operations > 1);
    figure(ns, |ns| {
        format!("{:.1} us", ns as f64 / 1e3 / row.operations as f64)
    })
}

fn rate(row: &Row) -> String {
    let ns = row.samples.median().filter(|ns| *ns > 0);
    figure(ns.zip(row.bytes), |(ns, bytes)| {
        format!("{:.0} MB/s", bytes as f64 * 1e3 / ns as f64)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = r#"{"bench":"blk","load":"read","system":"capsid-vmm","unit":"ns","samples":[3000000,1000000,2000000],"operations":100,"bytes":400000,"userspace_exits":{},"exits":{"hlt":5,"msr":7},"syscalls":{"read":9},"switches":{"vcpu":1}}
{"bench":"blk","load":"read","system":"qemu","unit":"ns","samples":[4000000],"operations":100,"userspace_exits":{"io":2},"exits":{},"syscalls":{},"switches":{}}
"#;

    #[test]
    fn a_table_has_medians_ratios_and_counts() {
        let table = table(&parse(LINES).expect("results"));
        let words: Vec<Vec<&str>> = table
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(
            words[1].join(" "),
            "read capsid-vmm 2.00 ms 1.00 ms 3.00 ms 1.00 20.0 us 200 MB/s 0 12 9 1"
        );
        assert_eq!(
            words[2].join(" "),
            "read qemu 4.00 ms 4.00 ms 4.00 ms 2.00 40.0 us - 2 0 0 0"
        );
        assert!(
            words.contains(&vec![
                "read",
                "capsid-vmm",
                "exits",
                "msr",
                "7,",
                "hlt",
                "5"
            ]),
            "{table}"
        );
    }
}
