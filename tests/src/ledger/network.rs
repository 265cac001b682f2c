//! Links, what traffic control does to them, and sockets: of the host's network namespace and of those with a name.

use super::Entries;
use std::fs;
use std::process::Command;

pub(super) fn look(entries: &mut Entries) {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    for path in table
        .lines()
        .filter_map(|line| line.split_whitespace().nth(7))
    {
        entries.add("unix socket", path);
    }
    links(entries, None);
    for entry in fs::read_dir("/run/netns").into_iter().flatten().flatten() {
        links(entries, Some(&entry.file_name().to_string_lossy()));
    }
}

/// The links of one namespace, their queueing disciplines and the filters of those.
fn links(entries: &mut Entries, namespace: Option<&str>) {
    let place = namespace.map_or_else(String::new, |name| format!("in {name}: "));
    let shown = |program: &str, words: &[&str]| -> Vec<String> {
        let mut command = Command::new(program);
        if let Some(name) = namespace {
            command.args(["-n", name]);
        }
        let output = command
            .args(words)
            .output()
            .unwrap_or_else(|error| panic!("{program}: {error}"));
        // A namespace that goes meanwhile has no links.
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines().map(without_count).collect()
    };
    let names: Vec<String> = shown("ip", &["-o", "link", "show"])
        .iter()
        .filter_map(|line| Some(line.split(": ").nth(1)?.to_owned()))
        .collect();
    for name in names {
        entries.add("link", format!("{place}{name}"));
    }
    for discipline in shown("tc", &["qdisc", "show"]) {
        // `qdisc clsact ffff: dev NAME parent ffff:fff1`; only these two have filters of ours.
        let device = discipline.split(' ').nth(4).unwrap_or_default().to_owned();
        let sides: &[&str] = match discipline.split(' ').nth(1) {
            Some("clsact") => &["ingress", "egress"],
            Some("ingress") => &["ingress"],
            _ => &[],
        };
        for side in sides {
            for filter in shown("tc", &["filter", "show", "dev", &device, side]) {
                entries.add("filter", format!("{place}{device} {side} {filter}"));
            }
        }
        entries.add("queueing discipline", format!("{place}{discipline}"));
    }
}

/// A line without the count of those who use what it names.
fn without_count(line: &str) -> String {
    let mut words: Vec<&str> = line.split_whitespace().collect();
    if let Some(at) = words.iter().position(|word| *word == "refcnt") {
        words.truncate(at);
    }
    words.join(" ")
}
