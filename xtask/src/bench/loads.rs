//! The JSON lines of a device's benchmark as a table for people. Pure.

use std::fmt::Write;

use serde_json::Value;

use super::table::{NoResult, lines};

/// What one system made of one load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// The load.
    pub load: String,
    /// The system.
    pub system: String,
    /// What a round took, in ns, sorted.
    pub samples: Vec<u64>,
    /// Operations of a round.
    pub operations: u64,
    /// Bytes that a round moves, where it is about bytes.
    pub bytes: Option<u64>,
    /// What was counted in one round: the kind, and how many by name.
    pub counted: Vec<(&'static str, Vec<(String, u64)>)>,
}

/// What is counted, as the lines name it, and as the table does.
const KINDS: [(&str, &str); 4] = [
    ("userspace_exits", "to the VMM"),
    ("exits", "exits"),
    ("syscalls", "syscalls"),
    ("switches", "switches"),
];

/// Reads JSON lines.
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
    let counts = |name: &str| -> Option<Vec<(String, u64)>> {
        let counts = value.get(name)?.as_object()?.iter();
        let mut counts: Vec<_> = counts
            .map(|(name, count)| Some((name.clone(), count.as_u64()?)))
            .collect::<Option<_>>()?;
        counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        Some(counts)
    };
    let counted = KINDS.iter().map(|(name, _)| Some((*name, counts(name)?)));
    Some(Row {
        load: text("load")?,
        system: text("system")?,
        samples,
        operations: value.get("operations")?.as_u64()?,
        bytes: value.get("bytes").and_then(Value::as_u64),
        counted: counted.collect::<Option<_>>()?,
    })
}

/// The table: each load's times with the ratio to the first system's and what was counted, then that by name.
pub fn table(rows: &[Row]) -> String {
    let mut out = String::new();
    let [a, b, c, d] = KINDS.map(|(_, title)| title);
    line(
        &mut out,
        [
            "load", "system", "median", "min", "max", "ratio", "each", "rate", a, b, c, d,
        ],
    );
    for row in rows {
        let base = rows.iter().find(|base| base.load == row.load);
        let ratio = match (median(row), base.and_then(median)) {
            (Some(this), Some(base)) if base > 0 => format!("{:.2}", this as f64 / base as f64),
            _ => "-".to_owned(),
        };
        let [a, b, c, d] = KINDS.map(|(name, _)| {
            let counts = row.counted.iter().find(|(kind, _)| *kind == name);
            let count: u64 = counts
                .iter()
                .flat_map(|(_, counts)| counts)
                .map(|(_, count)| count)
                .sum();
            count.to_string()
        });
        line(
            &mut out,
            [
                &row.load,
                &row.system,
                &milliseconds(median(row)),
                &milliseconds(row.samples.first().copied()),
                &milliseconds(row.samples.last().copied()),
                &ratio,
                &each(row),
                &rate(row),
                &a,
                &b,
                &c,
                &d,
            ],
        );
    }
    out.push_str("\nin one round, by name:\n");
    for row in rows {
        for (kind, counts) in &row.counted {
            let counts: Vec<String> = counts
                .iter()
                .map(|(name, count)| format!("{name} {count}"))
                .collect();
            let (load, system, counts) = (&row.load, &row.system, counts.join(", "));
            let _infallible = writeln!(out, "{load:<16} {system:<11} {kind:<15} {counts}");
        }
    }
    out
}

fn line(out: &mut String, words: [&str; 12]) {
    let [
        load,
        system,
        median,
        min,
        max,
        ratio,
        each,
        rate,
        a,
        b,
        c,
        d,
    ] = words;
    let text = format!(
        "{load:<16} {system:<11} {median:>10} {min:>10} {max:>10} {ratio:>6} {each:>10} {rate:>10} {a:>10} {b:>8} {c:>8} {d:>8}"
    );
    out.push_str(text.trim_end());
    out.push('\n');
}

fn median(row: &Row) -> Option<u64> {
    row.samples.get(row.samples.len() / 2).copied()
}

fn milliseconds(ns: Option<u64>) -> String {
    ns.map_or_else(|| "-".to_owned(), |ns| format!("{:.2} ms", ns as f64 / 1e6))
}

/// What one operation of many took.
fn each(row: &Row) -> String {
    match median(row) {
        Some(ns) if row.operations > 1 => {
            format!("{:.1} us", ns as f64 / 1e3 / row.operations as f64)
        }
        _ => "-".to_owned(),
    }
}

fn rate(row: &Row) -> String {
    match (median(row), row.bytes) {
        (Some(ns), Some(bytes)) if ns > 0 => {
            format!("{:.0} MB/s", bytes as f64 * 1e3 / ns as f64)
        }
        _ => "-".to_owned(),
    }
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

    #[test]
    fn what_is_no_result_is_refused_by_its_text() {
        let error = parse("Kernel panic").expect_err("no JSON");
        assert!(error.to_string().contains("Kernel panic"));
    }
}
