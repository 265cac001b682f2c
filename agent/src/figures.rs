//! The figures of a container: its cgroup's files, each read once, as the protocol carries them. The texts are the
//! kernel's, yet a line that does not look as documented counts nothing and breaks nothing.
//! File formats: Documentation/admin-guide/cgroup-v2.rst.

use crate::cgroup::{Cgroup, CgroupError};
use capsid_protocol::agent as api;
use std::collections::HashMap;

/// Most devices of io.stat that are told; a guest with more tells of the first ones.
const IO_DEVICES_MAX_COUNT: usize = 64;

/// A flat keyed file: "key value" a line.
#[derive(Debug, Default)]
pub(crate) struct Keyed<'a>(HashMap<&'a str, u64>);

impl<'a> Keyed<'a> {
    /// Takes the lines that are such.
    pub(crate) fn parse(text: &'a str) -> Keyed<'a> {
        let entry = |line: &'a str| {
            let (key, value) = line.split_once(' ')?;
            Some((key, value.trim().parse().ok()?))
        };
        Keyed(text.lines().filter_map(entry).collect())
    }

    /// The value of `key`; 0 if it is not there.
    pub(crate) fn get(&self, key: &str) -> u64 {
        self.0.get(key).copied().unwrap_or(0)
    }

    /// The values of `key` for anonymous and for file pages together: how Linux 5.9 split some keys of memory.stat.
    fn both(&self, key: &str) -> u64 {
        let one = |kind| self.get(&format!("{key}_{kind}"));
        self.get(key)
            .saturating_add(one("anon"))
            .saturating_add(one("file"))
    }
}

/// Reads all figures. A controller that is not there counts 0; no limit is `u64::MAX`.
///
/// # Errors
/// The cgroup is gone.
pub fn read(cgroup: &Cgroup) -> Result<api::StatsResponse, CgroupError> {
    let text = |name| Ok(cgroup.optional(name)?.unwrap_or_default());
    let one = |name| Ok(cgroup.optional(name)?.map_or(0, |text| number(&text)));
    let max = |name| Ok(cgroup.optional(name)?.map_or(u64::MAX, |text| limit(&text)));
    let stat = text("memory.stat")?;
    let memory = api::MemoryStats {
        usage_bytes: one("memory.current")?,
        limit_bytes: max("memory.max")?,
        max_usage_bytes: one("memory.peak")?,
        swap_usage_bytes: one("memory.swap.current")?,
        swap_limit_bytes: max("memory.swap.max")?,
        ..memory_stat(&Keyed::parse(&stat))
    };
    let pids = api::PidsStats {
        current: one("pids.current")?,
        limit: max("pids.max")?,
        ..Default::default()
    };
    Ok(api::StatsResponse {
        cpu: Some(cpu(&Keyed::parse(&cgroup.read("cpu.stat")?))).into(),
        memory: Some(memory).into(),
        memory_events: Some(memory_events(&Keyed::parse(&text("memory.events")?))).into(),
        pids: Some(pids).into(),
        io: io(&text("io.stat")?),
        ..Default::default()
    })
}

fn cpu(stat: &Keyed<'_>) -> api::CpuStats {
    api::CpuStats {
        usage_usec: stat.get("usage_usec"),
        user_usec: stat.get("user_usec"),
        system_usec: stat.get("system_usec"),
        nr_periods: stat.get("nr_periods"),
        nr_throttled: stat.get("nr_throttled"),
        throttled_usec: stat.get("throttled_usec"),
        ..Default::default()
    }
}

fn memory_stat(stat: &Keyed<'_>) -> api::MemoryStats {
    api::MemoryStats {
        anon: stat.get("anon"),
        file: stat.get("file"),
        kernel_stack: stat.get("kernel_stack"),
        slab: stat.get("slab"),
        sock: stat.get("sock"),
        shmem: stat.get("shmem"),
        file_mapped: stat.get("file_mapped"),
        file_dirty: stat.get("file_dirty"),
        file_writeback: stat.get("file_writeback"),
        anon_thp: stat.get("anon_thp"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        slab_reclaimable: stat.get("slab_reclaimable"),
        slab_unreclaimable: stat.get("slab_unreclaimable"),
        pgfault: stat.get("pgfault"),
        pgmajfault: stat.get("pgmajfault"),
        workingset_refault: stat.both("workingset_refault"),
        workingset_activate: stat.both("workingset_activate"),
        workingset_nodereclaim: stat.get("workingset_nodereclaim"),
        pgrefill: stat.get("pgrefill"),
        pgscan: stat.get("pgscan"),
        pgsteal: stat.get("pgsteal"),
        pgactivate: stat.get("pgactivate"),
        pgdeactivate: stat.get("pgdeactivate"),
        pglazyfree: stat.get("pglazyfree"),
        pglazyfreed: stat.get("pglazyfreed"),
        thp_fault_alloc: stat.get("thp_fault_alloc"),
        thp_collapse_alloc: stat.get("thp_collapse_alloc"),
        ..Default::default()
    }
}

fn memory_events(events: &Keyed<'_>) -> api::MemoryEvents {
    api::MemoryEvents {
        low: events.get("low"),
        high: events.get("high"),
        max: events.get("max"),
        oom: events.get("oom"),
        oom_kill: events.get("oom_kill"),
        ..Default::default()
    }
}

/// io.stat: "major:minor key=value …" a line, the first devices of it.
fn io(text: &str) -> Vec<api::IoStats> {
    let lines = text.lines().filter_map(io_line);
    lines.take(IO_DEVICES_MAX_COUNT).collect()
}

fn io_line(line: &str) -> Option<api::IoStats> {
    let (device, rest) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let value = |key: &str| {
        let pairs = rest
            .split_whitespace()
            .filter_map(|pair| pair.split_once('='));
        let mut named = pairs.filter(|(name, _)| *name == key);
        named.next().map_or(0, |(_, value)| number(value))
    };
    Some(api::IoStats {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        rbytes: value("rbytes"),
        wbytes: value("wbytes"),
        rios: value("rios"),
        wios: value("wios"),
        ..Default::default()
    })
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or(0)
}

/// A limit file: a number, or "max".
fn limit(text: &str) -> u64 {
    text.trim().parse().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;
    use std::path::Path;

    const CPU: &str = "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 7\n";

    #[test]
    fn a_key_is_found_by_its_whole_name() {
        let stat = Keyed::parse(CPU);
        assert_eq!(stat.get("usage_usec"), 1500);
        assert_eq!(stat.get("usec"), 0);
    }

    #[test]
    fn a_missing_key_counts_zero() {
        assert_eq!(Keyed::parse(CPU).get("throttled_usec"), 0);
    }

    #[test]
    fn max_is_no_limit() {
        assert_eq!(limit("max\n"), u64::MAX);
        assert_eq!(limit("1048576\n"), 1 << 20);
    }

    #[test]
    fn keys_split_by_the_kind_of_page_are_told_together() {
        let new = "workingset_refault_anon 3\nworkingset_refault_file 4\n";
        assert_eq!(memory_stat(&Keyed::parse(new)).workingset_refault, 7);
        let old = "workingset_refault 5\n";
        assert_eq!(memory_stat(&Keyed::parse(old)).workingset_refault, 5);
    }

    #[test]
    fn io_is_told_by_device() {
        let text = "254:0 rbytes=4096 wbytes=512 rios=1 wios=2 dbytes=0 dios=0\n\
                    254:16 \n\
                    7:1 rios=9\nnonsense\n";
        let told: Vec<_> = io(text)
            .iter()
            .map(|io| (io.major, io.minor, io.rbytes, io.wbytes, io.rios, io.wios))
            .collect();
        let expected = [
            (254, 0, 4096, 512, 1, 2),
            (254, 16, 0, 0, 0, 0),
            (7, 1, 0, 0, 9, 0),
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn no_more_than_64_devices_are_told() {
        let text: String = (0..100).map(|n| format!("8:{n} rbytes=1\n")).collect();
        assert_eq!(io(&text).len(), IO_DEVICES_MAX_COUNT);
    }

    #[test]
    fn figures_come_from_the_files() {
        let root = std::env::temp_dir().join(format!("capsid-cgroup-{}", std::process::id()));
        let directory = root.join("capsid/c1");
        fs::create_dir_all(&directory).expect("made");
        for (name, text) in [
            ("cpu.stat", CPU),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.peak", "8192\n"),
            ("memory.swap.max", "0\n"),
            ("memory.stat", "anon 1\nfile 2\ninactive_file 3\n"),
            ("memory.events", "low 0\noom_kill 2\n"),
            ("pids.current", "7\n"),
            ("pids.max", "100\n"),
        ] {
            fs::write(directory.join(name), text).expect("written");
        }
        let told = read(&Cgroup::of(&root, "c1")).expect("read");
        fs::remove_dir_all(&root).expect("removed");
        assert_eq!((told.cpu.usage_usec, told.cpu.nr_periods), (1500, 7));
        assert_eq!(
            (told.memory.usage_bytes, told.memory.max_usage_bytes),
            (4096, 8192)
        );
        assert_eq!(
            (told.memory.limit_bytes, told.memory.swap_limit_bytes),
            (u64::MAX, 0)
        );
        assert_eq!((told.memory.anon, told.memory.inactive_file), (1, 3));
        assert_eq!(told.memory_events.oom_kill, 2);
        assert_eq!((told.pids.current, told.pids.limit), (7, 100));
        assert!(told.io.is_empty());
    }

    #[test]
    fn a_cgroup_that_is_gone_is_an_error() {
        assert!(read(&Cgroup::of(Path::new("/nowhere"), "c1")).is_err());
    }

    proptest! {
        #[test]
        fn any_text_is_read(text: String) {
            let stat = Keyed::parse(&text);
            let _ = (cpu(&stat), memory_stat(&stat), memory_events(&stat));
            prop_assert!(io(&text).len() <= IO_DEVICES_MAX_COUNT);
            let _ = (limit(&text), number(&text));
        }

        #[test]
        fn every_device_is_told_as_it_is_written(
            devices in proptest::collection::vec(any::<(u32, u32, u64, u64, u64, u64)>(), 0..64)
        ) {
            let line = |(major, minor, rbytes, wbytes, rios, wios): &(u32, u32, u64, u64, u64, u64)| {
                format!("{major}:{minor} rbytes={rbytes} wbytes={wbytes} rios={rios} wios={wios} dbytes=0 dios=0\n")
            };
            let text: String = devices.iter().map(line).collect();
            let told: Vec<_> = io(&text)
                .iter()
                .map(|io| (io.major, io.minor, io.rbytes, io.wbytes, io.rios, io.wios))
                .collect();
            prop_assert_eq!(told, devices);
        }
    }
}
