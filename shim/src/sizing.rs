//! How much memory and how many CPUs a VM gets. Pure, but for [`Host::read`].
//!
//! A pod's limits are those of the CRI's annotations on its pause container; where there are none (CRI-O writes none), those that the kubelet gave
//! the pod's cgroup; for a container alone those of its spec. Without a limit the configuration's default counts.
//!
//! The guest gets its limit and what its kernel and agent need beside it, so that a container that uses all of its limit meets the limit and not the
//! end of the VM's memory; each container's own limit is set in the guest. Whatever is asked for, the VM fits in what the pod's cgroups leave
//! and in the host: a guest that could be OOM-killed from outside by using what it was told it has, would be.

use crate::cgroup::Room;
use crate::config::Config;
use crate::spec::Role;
use capsid_owner::escape::Line;
use capsid_owner::host;
use capsid_protocol::machine::{Cpus, MemoryMib};
use oci_spec::runtime::Spec;

/// The guest's kernel, its initramfs and the agent with a pod's containers, in MiB, without what grows with memory. An upper bound, not a
/// measured figure: three quarters of the least memory in which a guest boots ([`MemoryMib::MIN`]).
pub const GUEST_OVERHEAD_MIB: u64 = 48;
/// The VMM and the shim on the host, in MiB: the bound that both hold to together (PSS, idle). What file access through the VMM adds is page cache, which
/// the kernel takes back.
pub const VMM_OVERHEAD_MIB: u64 = 8;
/// The guest's kernel keeps a `struct page` of 64 bytes for each page of 4096: one byte of each so many is not for containers.
const PAGE_DESCRIPTORS: u64 = 64;
const MIB: u64 = 1 << 20;
/// The period of a quota that comes without one, in µs (Documentation/admin-guide/cgroup-v2.rst, cpu.max).
const DEFAULT_PERIOD_US: u64 = 100_000;

/// Annotations of the CRI on a pod's pause container (containerd, `internal/cri/annotations`): bytes; µs; µs.
const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const SANDBOX_CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const SANDBOX_CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";

/// What the host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// MemTotal, in bytes.
    pub memory_bytes: u64,
    /// CPUs that are online.
    pub cpus: u64,
}

/// What a VM gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Guest memory.
    pub memory: MemoryMib,
    /// Virtual CPUs.
    pub cpus: Cpus,
}

/// Why no VM can be had in this size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// An annotation that is no number.
    #[error("annotation {name} is {value}, which is no number")]
    Annotation {
        /// Which.
        name: &'static str,
        /// Its value, fit to be shown.
        value: String,
    },
    /// The cgroups leave too little.
    #[error(
        "a memory limit of {limit_mib} MiB leaves {left_mib} MiB for the guest after {VMM_OVERHEAD_MIB} MiB for its VMM, and a guest needs {least}: give \
         the pod at least {all} MiB, by its limits or by overhead.podFixed of its RuntimeClass, of which {cost} MiB are the cost of a VM",
        least = MemoryMib::MIN, all = VMM_OVERHEAD_MIB + MemoryMib::MIN, cost = VMM_OVERHEAD_MIB + GUEST_OVERHEAD_MIB
    )]
    TooLittle {
        /// The tightest memory.max above the VM.
        limit_mib: u64,
        /// What is left of it.
        left_mib: u64,
    },
    /// The host is too small.
    #[error(
        "this host has {host_mib} MiB of memory, and a guest needs {}",
        MemoryMib::MIN
    )]
    Host {
        /// Its memory.
        host_mib: u64,
    },
}

impl Host {
    /// This host.
    pub fn read() -> Host {
        let cpus = std::thread::available_parallelism();
        Host {
            memory_bytes: host::memory().0,
            cpus: cpus.map_or(1, |cpus| cpus.get() as u64),
        }
    }
}

/// The size of the VM whose first container has this spec: the only one, or a pod's pause container.
///
/// # Errors
/// There is no room for a guest.
pub fn size(
    spec: &Spec,
    role: Role<'_>,
    room: &Room,
    host: &Host,
    config: &Config,
) -> Result<Size, SizeError> {
    let asked = match role {
        Role::Alone => of_container(spec),
        Role::Pause | Role::Member { .. } => of_pod(spec, room)?,
    };
    Ok(Size {
        memory: memory(asked.memory, room, host, config)?,
        cpus: cpus(asked.cpu, host, config),
    })
}

/// How much memory a pod may use.
#[derive(Clone, Copy)]
enum Limit {
    None,
    /// Bytes for containers.
    Containers(u64),
    /// Bytes for all of the VM.
    Whole(u64),
}

struct Asked {
    memory: Limit,
    /// Quota and period.
    cpu: Option<(u64, u64)>,
}

fn of_container(spec: &Spec) -> Asked {
    let resources = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.resources().as_ref());
    let memory = resources.and_then(|resources| resources.memory().as_ref()?.limit());
    let memory = memory
        .and_then(|bytes| u64::try_from(bytes).ok())
        .filter(|bytes| *bytes > 0);
    let cpu = resources.and_then(|resources| resources.cpu().as_ref());
    let quota = cpu.and_then(|cpu| u64::try_from(cpu.quota()?).ok());
    let period = cpu.and_then(|cpu| cpu.period());
    Asked {
        memory: memory.map_or(Limit::None, Limit::Containers),
        cpu: quota.map(|quota| (quota, period.unwrap_or(DEFAULT_PERIOD_US))),
    }
}

fn of_pod(spec: &Spec, room: &Room) -> Result<Asked, SizeError> {
    let number =
        |name: &'static str| match spec.annotations().as_ref().and_then(|all| all.get(name)) {
            None => Ok(None),
            // 0 and -1 are no limit.
            Some(text) => match text.parse::<i64>() {
                Ok(number) => Ok(u64::try_from(number).ok().filter(|number| *number > 0)),
                Err(_) => Err(SizeError::Annotation {
                    name,
                    value: Line(text.as_bytes()).to_string(),
                }),
            },
        };
    let memory = match (number(SANDBOX_MEMORY)?, room.memory_pod) {
        (Some(bytes), _) => Limit::Containers(bytes),
        (None, Some(bytes)) => Limit::Whole(bytes),
        (None, None) => Limit::None,
    };
    let period = number(SANDBOX_CPU_PERIOD)?.unwrap_or(DEFAULT_PERIOD_US);
    let quota = number(SANDBOX_CPU_QUOTA)?;
    Ok(Asked {
        memory,
        cpu: quota.map(|quota| (quota, period)).or(room.cpu_pod),
    })
}

fn memory(limit: Limit, room: &Room, host: &Host, config: &Config) -> Result<MemoryMib, SizeError> {
    let wanted = match limit {
        Limit::None => config.memory.get(),
        Limit::Containers(bytes) => with_guest_overhead(bytes.div_ceil(MIB)),
        Limit::Whole(bytes) => (bytes / MIB).saturating_sub(VMM_OVERHEAD_MIB),
    };
    let host_mib = host.memory_bytes / MIB;
    if host_mib < MemoryMib::MIN {
        return Err(SizeError::Host { host_mib });
    }
    let mut mib = wanted.max(MemoryMib::MIN).min(host_mib).min(MemoryMib::MAX);
    if let Some(limit) = room.memory {
        let limit_mib = limit / MIB;
        let left_mib = limit_mib.saturating_sub(VMM_OVERHEAD_MIB);
        if left_mib < MemoryMib::MIN {
            return Err(SizeError::TooLittle {
                limit_mib,
                left_mib,
            });
        }
        mib = mib.min(left_mib);
    }
    // Between the least and the most, each of the bounds above being so.
    MemoryMib::try_from(mib).map_err(|_| SizeError::Host { host_mib })
}

/// The guest memory in which containers can use so much.
fn with_guest_overhead(containers_mib: u64) -> u64 {
    let used = containers_mib.saturating_add(GUEST_OVERHEAD_MIB);
    used.saturating_add(used.div_ceil(PAGE_DESCRIPTORS - 1))
}

fn cpus(limit: Option<(u64, u64)>, host: &Host, config: &Config) -> Cpus {
    let wanted = match limit {
        Some((quota, period)) if period > 0 => quota.div_ceil(period),
        _ => u64::from(config.cpus),
    };
    let most = host.cpus.min(u64::from(Cpus::MAX)).max(1);
    // From 1 to the most that a VM can have.
    Cpus::try_from(wanted.clamp(1, most)).unwrap_or(config.cpus)
}

#[cfg(test)]
#[path = "sizing_tests.rs"]
mod tests;
