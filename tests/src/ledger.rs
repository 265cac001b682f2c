//! The leak ledger: everything on the host that a run could leave behind, counted before and after.
//!
//! A ledger is only worth its trust if it turns red: `tests/tests/system/ledger.rs` seeds a leak of each class and
//! sees it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

/// How long the kernel may take to let go of what a dead process held, in ms.
const SETTLE_TIMEOUT_MS: u64 = 5_000;
/// How often the host is looked at while it settles, in ms: the kernel gives no event for most classes.
const SETTLE_STEP_MS: u64 = 50;

/// What is there now, each entry as `class: name`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ledger(BTreeSet<String>);

impl Ledger {
    /// Looks at the host.
    pub fn now() -> Ledger {
        let mut entries = BTreeSet::new();
        processes(&mut entries);
        lines(
            "/proc/self/mountinfo",
            "mount",
            |line| {
                // Fields: id, parent, device, root, mount point: the ids of a remount differ, the rest must not.
                line.split(' ')
                    .skip(2)
                    .take(3)
                    .collect::<Vec<_>>()
                    .join(" ")
                    .into()
            },
            &mut entries,
        );
        lines(
            "/proc/net/unix",
            "unix socket",
            |line| line.split_whitespace().nth(7).map(str::to_owned),
            &mut entries,
        );
        lines(
            "/proc/net/dev",
            "link",
            |line| line.split_once(':').map(|(name, _)| name.trim().to_owned()),
            &mut entries,
        );
        for (class, directory) in [
            ("tmp", "/tmp"),
            ("run", "/run/capsid"),
            ("shm", "/dev/shm"),
            ("netns", "/run/netns"),
            ("cgroup", "/sys/fs/cgroup"),
            ("cache temporary", "/var/cache/capsid/tmp"),
        ] {
            names(class, Path::new(directory), &mut entries);
        }
        Ledger(entries)
    }

    /// What is there now and was not then.
    pub fn added(&self) -> Vec<String> {
        Ledger::now().0.difference(&self.0).cloned().collect()
    }

    /// What is there now and was not then, after the kernel had time to settle.
    pub fn left_behind(&self) -> Vec<String> {
        let deadline = Instant::now() + Duration::from_millis(SETTLE_TIMEOUT_MS);
        loop {
            let new = self.added();
            if new.is_empty() || Instant::now() > deadline {
                return new;
            }
            thread::sleep(Duration::from_millis(SETTLE_STEP_MS));
        }
    }

    /// Asserts that nothing was left behind.
    ///
    /// # Panics
    /// Something was.
    #[track_caller]
    pub fn balances(&self) {
        let left = self.left_behind();
        assert!(left.is_empty(), "left behind: {left:#?}");
    }
}

fn processes(entries: &mut BTreeSet<String>) {
    let Ok(proc) = fs::read_dir("/proc") else {
        return;
    };
    for entry in proc.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.bytes().all(|b| b.is_ascii_digit()) {
            continue;
        }
        let comm = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        if comm.starts_with("capsid")
            && !comm.starts_with("capsid-system")
            && !comm.starts_with("capsid-tests")
        {
            entries.insert(format!("process: {} {}", name, comm.trim()));
        }
    }
}

fn lines(
    file: &str,
    class: &str,
    pick: impl Fn(&str) -> Option<String>,
    entries: &mut BTreeSet<String>,
) {
    for line in fs::read_to_string(file).unwrap_or_default().lines() {
        if let Some(found) = pick(line) {
            entries.insert(format!("{class}: {found}"));
        }
    }
}

fn names(class: &str, directory: &Path, entries: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        entries.insert(format!("{class}: {}", entry.path().display()));
    }
}
