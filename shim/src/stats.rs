//! A guest's figures as containerd's clients read them: `io.containerd.cgroups.v2.Metrics` (containerd/cgroups, cgroup2/stats/metrics.proto).

use capsid_protocol::agent::{IoStats, StatsResponse};
use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use protobuf::Message;
use protobuf::well_known_types::any::Any;

/// The name that containerd's typeurl has for it.
const TYPE_URL: &str = "io.containerd.cgroups.v2.Metrics";

/// The figures, packed.
///
/// # Errors
/// They cannot be encoded, which for numbers does not happen.
pub fn pack(figures: StatsResponse) -> protobuf::Result<Any> {
    Ok(Any {
        type_url: TYPE_URL.to_owned(),
        value: metrics(figures).write_to_bytes()?,
        ..Default::default()
    })
}

fn metrics(figures: StatsResponse) -> Metrics {
    let memory = figures.memory.unwrap_or_default();
    let events = figures.memory_events.unwrap_or_default();
    let cpu = figures.cpu.unwrap_or_default();
    let pids = figures.pids.unwrap_or_default();
    Metrics {
        pids: Some(PidsStat {
            current: pids.current,
            limit: pids.limit,
            ..Default::default()
        })
        .into(),
        cpu: Some(CPUStat {
            usage_usec: cpu.usage_usec,
            user_usec: cpu.user_usec,
            system_usec: cpu.system_usec,
            nr_periods: cpu.nr_periods,
            nr_throttled: cpu.nr_throttled,
            throttled_usec: cpu.throttled_usec,
            ..Default::default()
        })
        .into(),
        memory: Some(MemoryStat {
            usage: memory.usage_bytes,
            usage_limit: memory.limit_bytes,
            max_usage: memory.max_usage_bytes,
            swap_usage: memory.swap_usage_bytes,
            swap_limit: memory.swap_limit_bytes,
            anon: memory.anon,
            file: memory.file,
            kernel_stack: memory.kernel_stack,
            slab: memory.slab,
            sock: memory.sock,
            shmem: memory.shmem,
            file_mapped: memory.file_mapped,
            file_dirty: memory.file_dirty,
            file_writeback: memory.file_writeback,
            anon_thp: memory.anon_thp,
            inactive_anon: memory.inactive_anon,
            active_anon: memory.active_anon,
            inactive_file: memory.inactive_file,
            active_file: memory.active_file,
            unevictable: memory.unevictable,
            slab_reclaimable: memory.slab_reclaimable,
            slab_unreclaimable: memory.slab_unreclaimable,
            pgfault: memory.pgfault,
            pgmajfault: memory.pgmajfault,
            workingset_refault: memory.workingset_refault,
            workingset_activate: memory.workingset_activate,
            workingset_nodereclaim: memory.workingset_nodereclaim,
            pgrefill: memory.pgrefill,
            pgscan: memory.pgscan,
            pgsteal: memory.pgsteal,
            pgactivate: memory.pgactivate,
            pgdeactivate: memory.pgdeactivate,
            pglazyfree: memory.pglazyfree,
            pglazyfreed: memory.pglazyfreed,
            thp_fault_alloc: memory.thp_fault_alloc,
            thp_collapse_alloc: memory.thp_collapse_alloc,
            ..Default::default()
        })
        .into(),
        io: Some(IOStat {
            usage: figures.io.iter().map(entry).collect(),
            ..Default::default()
        })
        .into(),
        memory_events: Some(MemoryEvents {
            low: events.low,
            high: events.high,
            max: events.max,
            oom: events.oom,
            oom_kill: events.oom_kill,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    }
}

fn entry(io: &IoStats) -> IOEntry {
    IOEntry {
        major: io.major.into(),
        minor: io.minor.into(),
        rbytes: io.rbytes,
        wbytes: io.wbytes,
        rios: io.rios,
        wios: io.wios,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use capsid_protocol::agent::{MemoryStats, PidsStats};

    #[test]
    fn what_the_guest_counts_is_what_containerd_reads() {
        let figures = StatsResponse {
            memory: Some(MemoryStats {
                usage_bytes: 4096,
                limit_bytes: u64::MAX,
                ..Default::default()
            })
            .into(),
            pids: Some(PidsStats {
                current: 3,
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let packed = pack(figures).expect("numbers");
        assert_eq!(packed.type_url, TYPE_URL);
        let metrics = Metrics::parse_from_bytes(&packed.value).expect("encoded");
        assert_eq!(metrics.memory.usage, 4096);
        assert_eq!(metrics.memory.usage_limit, u64::MAX);
        assert_eq!(metrics.pids.current, 3);
        assert!(metrics.io.usage.is_empty());
    }
}
