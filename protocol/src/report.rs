//! What a VMM tells its owner about the run when it ends: phases with their times, and how often the
//! guest left to userspace and why. Written once, as one JSON object, to the fd the config named.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Longest report that an owner reads, in bytes.
pub const REPORT_MAX_BYTES: usize = 64 * 1024;

/// The run of one VMM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineReport {
    /// Phases in the order in which they ended.
    pub phases: Vec<Phase>,
    /// Exits to userspace by reason, over all vCPUs, named by the KVM API and, for I/O, by the device:
    /// for instance `io:serial`, `io:pci`, `mmio:virtio`, `hlt`.
    pub userspace_exits: BTreeMap<String, u64>,
}

/// The end of one phase of the run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Phase {
    /// `exec` (main began), `config`, `memory`, `kvm`, `devices`, `load`, `jail`, `run` (first KVM_RUN),
    /// `agent` (the guest dialled the owner), `end`.
    pub name: String,
    /// CLOCK_MONOTONIC of the host when the phase ended, in ns.
    pub monotonic_ns: u64,
}
