//! Processes and what they hold: threads, descriptors, namespaces, mounts.
//!
//! A process that ends while it is looked at has nothing; what it left is seen elsewhere.

use super::Entries;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// How the names begin of what a run starts; the kernel keeps 15 bytes of a name.
const OURS: [&str; 4] = ["capsid", "containerd-shim", "runc", "crun"];
/// The namespaces that a thread may be in alone, and the class of each.
const NAMESPACES: [(&str, &str); 5] = [
    ("net", "network namespace"),
    ("mnt", "mount namespace"),
    ("pid", "namespace"),
    ("ipc", "namespace"),
    ("uts", "namespace"),
];

pub(super) fn look(entries: &mut Entries, daemon: Option<u32>) {
    let mut mounts = BTreeMap::new();
    for (pid, directory) in numbered(Path::new("/proc")) {
        let name = fs::read_to_string(directory.join("comm")).unwrap_or_default();
        let name = name.trim();
        // The tests have such a name too.
        let ours = OURS.iter().any(|start| name.starts_with(start)) && pid != std::process::id();
        if ours {
            entries.add("process", format!("{pid} {name}"));
        }
        if is_zombie(&directory) {
            entries.add("zombie", format!("{pid} {name}"));
        }
        for (_, thread) in numbered(&directory.join("task")) {
            // A daemon written in Go has as many as it likes.
            if ours {
                entries.add_one_more("thread", format!("of {pid} {name}"));
            }
            namespaces(entries, &thread, &mut mounts);
        }
        let watched = ours || daemon == Some(pid);
        descriptors(entries, &directory, watched.then_some((pid, name)));
    }
    for (namespace, thread) in mounts {
        mounted(entries, &namespace, &thread);
    }
}

/// The entries of a directory whose names are numbers.
fn numbered(directory: &Path) -> impl Iterator<Item = (u32, PathBuf)> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| {
        let number = entry.file_name().to_string_lossy().parse().ok()?;
        Some((number, entry.path()))
    })
}

/// proc(5), /proc/PID/stat: the state is the first letter behind the name, which may hold anything.
fn is_zombie(process: &Path) -> bool {
    let stat = fs::read_to_string(process.join("stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('Z'))
}

/// The namespaces of a thread, and who may be asked for the mounts of each.
fn namespaces(entries: &mut Entries, thread: &Path, mounts: &mut BTreeMap<String, PathBuf>) {
    for (kind, class) in NAMESPACES {
        let Ok(link) = fs::read_link(thread.join("ns").join(kind)) else {
            continue;
        };
        let link = link.to_string_lossy().into_owned();
        entries.add(class, &link);
        if kind == "mnt" {
            mounts.insert(link, thread.to_owned());
        }
    }
}

/// What a process has open: counted by kind where it is watched, and namespaces that it holds so, whoever it is.
fn descriptors(entries: &mut Entries, process: &Path, watched: Option<(u32, &str)>) {
    for entry in fs::read_dir(process.join("fd"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let Ok(target) = fs::read_link(entry.path()) else {
            continue;
        };
        let target = target.to_string_lossy().into_owned();
        let class = NAMESPACES
            .iter()
            .find(|(kind, _)| target.starts_with(&format!("{kind}:[")));
        if let Some((_, class)) = class {
            entries.add(class, &target);
        }
        if let Some((pid, name)) = watched {
            // `socket:[9]`: each has a number of its own.
            let kind = match target.split_once(":[") {
                Some((kind, number)) if number.starts_with(|c: char| c.is_ascii_digit()) => kind,
                _ => &target,
            };
            entries.add_one_more("descriptor", format!("of {pid} {name}: {kind}"));
        }
    }
}

/// The mounts of one namespace, in ours and elsewhere.
fn mounted(entries: &mut Entries, namespace: &str, thread: &Path) {
    let own = fs::read_link("/proc/self/ns/mnt").unwrap_or_default();
    let is_ours = own.to_string_lossy() == namespace;
    let table = fs::read_to_string(thread.join("mountinfo")).unwrap_or_default();
    for line in table.lines() {
        // Fields: id, parent, device, root, mount point: the ids of a remount differ, the rest must not.
        let what: Vec<&str> = line.split(' ').skip(2).take(3).collect();
        if is_ours {
            entries.add("mount", what.join(" "));
        } else {
            entries.add("mount elsewhere", format!("{namespace} {}", what.join(" ")));
        }
    }
}
