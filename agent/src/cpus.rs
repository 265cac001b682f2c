//! CPUs that are there and down until the host wants them: `/sys/devices/system/cpu` (Documentation/core-api/cpu_hotplug.rst).
//! Containers see them at once: the kernel gives a cgroup without a cpuset of its own every CPU that is up.

use crate::error::Result;
use crate::sandbox::blocking;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;

/// Where the kernel shows its CPUs.
pub const CPUS: &str = "/sys/devices/system/cpu";
/// How long all CPUs of one call may take to come up or to go down, in ms.
const ONLINE_TIMEOUT_MS: u64 = 60_000;
/// No CPU has a higher number (CONFIG_NR_CPUS of our kernel is less).
const CPU_MAX: u32 = 4095;

/// Why the CPUs are not what the host wants.
#[derive(Debug, thiserror::Error)]
pub enum CpusError {
    /// More than there are, or none.
    #[error("{wanted} CPUs are to be online: 1 to {present} can be")]
    Count {
        /// What the host said.
        wanted: u32,
        /// CPUs that are there.
        present: usize,
    },
    /// A list of CPUs that is none.
    #[error("{path} is no list of CPUs: {text:?}")]
    List {
        /// Which.
        path: PathBuf,
        /// What is in it.
        text: String,
    },
    /// A file of the kernel; for a CPU's own, it did not come up or go down.
    #[error("{doing} {path}")]
    File {
        /// "reading", "writing 1 to", "writing 0 to".
        doing: &'static str,
        /// Which.
        path: PathBuf,
        /// errno.
        #[source]
        cause: io::Error,
    },
    /// They still come or go.
    #[error("{wanted} CPUs were not online within {limit_ms} ms")]
    Timeout {
        /// What the host said.
        wanted: u32,
        /// For how long was waited, in ms.
        limit_ms: u64,
    },
}

/// The guest's CPUs.
#[derive(Debug)]
pub struct Cpus {
    sysfs: PathBuf,
    /// Two calls must not undo each other.
    turn: Arc<Mutex<()>>,
}

impl Cpus {
    /// The CPUs that the kernel shows at `sysfs`.
    pub fn at(sysfs: &Path) -> Cpus {
        Cpus {
            sysfs: sysfs.into(),
            turn: Arc::default(),
        }
    }

    /// Brings CPUs up, the lowest first, or takes them down, the highest first, until `wanted` are online. How many are.
    ///
    /// # Errors
    /// A number that cannot be, or a CPU that does not come up; those before it have.
    pub async fn online(&self, wanted: u32) -> Result<u32> {
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let sysfs = self.sysfs.clone();
        let work = blocking(move || {
            // Its turn lasts as long as the work, even if nobody waits for it any more.
            let _turn = turn;
            Ok(bring(&sysfs, wanted)?)
        });
        let limit = Duration::from_millis(ONLINE_TIMEOUT_MS);
        tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
            let limit_ms = ONLINE_TIMEOUT_MS;
            Err(CpusError::Timeout { wanted, limit_ms }.into())
        })
    }
}

fn bring(sysfs: &Path, wanted: u32) -> std::result::Result<u32, CpusError> {
    let list = |name| read_list(sysfs.join(name));
    let changes = changes(&list("present")?, &list("online")?, wanted)?;
    for (cpu, up) in changes {
        let path = sysfs.join(format!("cpu{cpu}/online"));
        let (value, doing) = if up {
            ("1", "writing 1 to")
        } else {
            ("0", "writing 0 to")
        };
        fs::write(&path, value).map_err(|cause| CpusError::File { doing, path, cause })?;
    }
    let online = list("online")?.len();
    Ok(u32::try_from(online).unwrap_or(u32::MAX))
}

/// What to do with which CPU, in order. The first stays up: nobody can take it down.
fn changes(
    present: &[u32],
    online: &[u32],
    wanted: u32,
) -> std::result::Result<Vec<(u32, bool)>, CpusError> {
    let count = usize::try_from(wanted).unwrap_or(usize::MAX);
    if !(1..=present.len()).contains(&count) {
        let present = present.len();
        return Err(CpusError::Count { wanted, present });
    }
    let (missing, surplus) = (
        count.saturating_sub(online.len()),
        online.len().saturating_sub(count),
    );
    let waiting = present.iter().filter(|cpu| !online.contains(cpu));
    let up = waiting.take(missing).map(|cpu| (*cpu, true));
    let down = online.iter().rev().take(surplus).map(|cpu| (*cpu, false));
    Ok(up.chain(down).collect())
}

fn read_list(path: PathBuf) -> std::result::Result<Vec<u32>, CpusError> {
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(cause) => {
            let doing = "reading";
            return Err(CpusError::File { doing, path, cause });
        }
    };
    parse_list(text.trim_end()).ok_or(CpusError::List { path, text })
}

/// `0-3,5`, ascending (Documentation/admin-guide/cputopology.rst).
fn parse_list(text: &str) -> Option<Vec<u32>> {
    let mut cpus: Vec<u32> = Vec::new();
    for part in text.split(',').filter(|part| !part.is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last > CPU_MAX || cpus.last().is_some_and(|before| *before >= first) {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_lowest_that_wait_come_up_first() {
        let changes = changes(&[0, 1, 2, 3], &[0, 2], 3);
        assert_eq!(changes.expect("possible"), [(1, true)]);
    }

    #[test]
    fn the_highest_go_down_first_and_the_first_never() {
        let changes = changes(&[0, 1, 2], &[0, 1, 2], 1);
        assert_eq!(changes.expect("possible"), [(2, false), (1, false)]);
    }

    #[test]
    fn as_many_as_are_up_change_nothing() {
        assert_eq!(changes(&[0, 1], &[0, 1], 2).expect("possible"), []);
    }

    #[test]
    fn none_or_more_than_there_are_is_refused_with_the_limits() {
        for wanted in [0, 3, u32::MAX] {
            let why = changes(&[0, 1], &[0], wanted).expect_err("refused");
            let text = format!("{wanted} CPUs are to be online: 1 to 2 can be");
            assert_eq!(why.to_string(), text);
        }
    }

    #[test]
    fn lists_of_the_kernel_are_read() {
        assert_eq!(parse_list("0-2,5,7-8"), Some(vec![0, 1, 2, 5, 7, 8]));
        assert_eq!(parse_list(""), Some(vec![]));
        for bad in ["x", "3-1", "0-99999", "1,0", "1,1", "-"] {
            assert_eq!(parse_list(bad), None, "{bad}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_an_ascending_list_or_none(text in "[0-9,x-]{0,40}") {
            if let Some(cpus) = parse_list(&text) {
                prop_assert!(cpus.windows(2).all(|pair| pair[0] < pair[1]));
                prop_assert!(cpus.len() <= CPU_MAX as usize + 1);
            }
        }
    }
}
