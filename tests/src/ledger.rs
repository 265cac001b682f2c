//! The leak ledger: everything on the host that a run could leave behind, counted before and after.
//!
//! A ledger is only worth its trust if it turns red: `tests/tests/system/ledger.rs` seeds a leak of each class and
//! sees it.

mod network;
mod processes;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

/// How long the kernel may take to let go of what a dead process held, in ms.
const SETTLE_TIMEOUT_MS: u64 = 5_000;
/// How often the host is looked at while it settles, in ms: the kernel gives no event for most classes.
const SETTLE_STEP_MS: u64 = 50;

/// Each directory whose entries are a class.
const PLACES: [(&str, &str); 8] = [
    ("tmp", "/tmp"),
    ("run", "/run/capsid"),
    ("shm", "/dev/shm"),
    ("netns", "/run/netns"),
    ("cache temporary", "/var/cache/capsid/tmp"),
    ("shim socket", "/run/containerd/s"),
    ("fifo", "/run/containerd/fifo"),
    ("runc", "/run/containerd/runc/default"),
];

/// What is there now, each entry as `class: name`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ledger {
    entries: BTreeSet<String>,
    daemon: Option<Daemon>,
}

/// A process that goes on, such as a containerd: what it has open is counted too.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Daemon {
    /// Its pid.
    pub pid: u32,
    /// Where it keeps a directory for each container.
    pub bundles: PathBuf,
}

/// What the ledger gathers.
struct Entries(BTreeSet<String>);

impl Entries {
    fn add(&mut self, class: &str, name: impl std::fmt::Display) {
        self.0.insert(format!("{class}: {name}"));
    }

    /// One that may be there several times under the same name: the second is another entry than the first.
    fn add_one_more(&mut self, class: &str, name: impl std::fmt::Display) {
        let numbered = (1..).map(|number| format!("{class}: {name} #{number}"));
        let free = numbered.into_iter().find(|entry| !self.0.contains(entry));
        self.0.extend(free);
    }

    fn add_names(&mut self, class: &str, directory: &Path) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            self.add(class, entry.path().display());
        }
    }
}

impl Ledger {
    /// Looks at the host.
    pub fn now() -> Ledger {
        Ledger::look(None)
    }

    /// Looks at the host and at a process that goes on.
    pub fn with(daemon: Daemon) -> Ledger {
        Ledger::look(Some(daemon))
    }

    fn look(daemon: Option<Daemon>) -> Ledger {
        let mut entries = Entries(BTreeSet::new());
        processes::look(&mut entries, daemon.as_ref().map(|daemon| daemon.pid));
        network::look(&mut entries);
        for (class, directory) in PLACES {
            entries.add_names(class, Path::new(directory));
        }
        cgroups(&mut entries, Path::new("/sys/fs/cgroup"));
        block_devices(&mut entries);
        if let Some(daemon) = &daemon {
            entries.add_names("bundle", &daemon.bundles);
        }
        Ledger {
            entries: entries.0,
            daemon,
        }
    }

    /// What is there now and was not then.
    pub fn added(&self) -> Vec<String> {
        let now = Ledger::look(self.daemon.clone());
        now.entries.difference(&self.entries).cloned().collect()
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

/// All of them, however deep.
fn cgroups(entries: &mut Entries, directory: &Path) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            entries.add("cgroup", entry.path().display());
            cgroups(entries, &entry.path());
        }
    }
}

/// Loop devices that have a file, and what device mapper made.
fn block_devices(entries: &mut Entries) {
    let attributes = [("loop", "loop/backing_file"), ("device mapper", "dm/name")];
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        for (class, attribute) in attributes {
            if let Ok(value) = fs::read_to_string(entry.path().join(attribute)) {
                let device = entry.file_name();
                entries.add(
                    class,
                    format!("{} {}", device.to_string_lossy(), value.trim()),
                );
            }
        }
    }
}
