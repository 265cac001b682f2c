//! What of a configuration is refused, in one sentence each.

use super::*;

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, an unknown or missing field, or a value of the wrong type or range.
    #[error("machine config is not valid")]
    Json(#[source] serde_json::Error),
    /// Longer than [`CONFIG_MAX_BYTES`].
    #[error("machine config is {0} bytes long, at most {CONFIG_MAX_BYTES} are read")]
    TooLong(usize),
    /// Another version.
    #[error("machine config has version {0}, this VMM reads version {CONFIG_VERSION}")]
    Version(u32),
    /// Id outside its alphabet or length.
    #[error("id {0:?} is not 1 to 64 characters of [A-Za-z0-9_.-]")]
    Id(String),
    /// CPUs out of range.
    #[error("{0} cpus: a VM has 1 to {max}", max = Cpus::MAX)]
    Cpus(u64),
    /// Fewer CPUs in the machine than are to come up.
    #[error("cpus_max is {max}, and {cpus} cpus come up at boot")]
    CpusMax {
        /// CPUs of the machine.
        max: u64,
        /// CPUs at boot.
        cpus: u64,
    },
    /// Memory out of range.
    #[error("{0} MiB of memory: a VM has {min} to {max} MiB", min = MemoryMib::MIN, max = MemoryMib::MAX)]
    Memory(u64),
    /// A balloon that leaves too little.
    #[error("a balloon of {balloon} MiB leaves less than {min} of {memory} MiB of memory", min = MemoryMib::MIN)]
    Balloon {
        /// Size of the balloon, in MiB.
        balloon: u64,
        /// Memory, in MiB.
        memory: u64,
    },
    /// At most less than at the start, or more plugged than that.
    #[error("{memory} MiB of memory and {plug} MiB to plug: this VM has {max} MiB at most")]
    MemoryMax {
        /// Memory at the start, in MiB.
        memory: u64,
        /// To plug, in MiB.
        plug: u64,
        /// The most, in MiB.
        max: u64,
    },
    /// Not an inheritable fd number.
    #[error("fd {0} cannot be an inherited resource, expected 3 or more")]
    Fd(i64),
    /// Two resources name the same fd.
    #[error("fd {0} is named twice")]
    FdTwice(FdNumber),
    /// Command line too long or with control characters.
    #[error("kernel command line is longer than {CMDLINE_MAX_BYTES} bytes or not printable ASCII")]
    Cmdline,
    /// Tag empty, too long or used twice.
    #[error("share tag {0:?} is empty, longer than 36 bytes or used twice")]
    Tag(String),
    /// Disk id outside its alphabet or length, or used twice.
    #[error(
        "disk id {0:?} is not 1 to {DISK_ID_MAX_BYTES} characters of [A-Za-z0-9_.-], or used twice"
    )]
    DiskId(String),
    /// Queues out of range.
    #[error("{0} queues: a disk has 1 to {DISK_QUEUES_MAX}")]
    DiskQueues(u8),
    /// Not the hardware address of one station.
    #[error("{0:?} is not the hardware address of one station, such as 02:00:00:00:00:01")]
    Mac(String),
    /// A hardware address used twice.
    #[error("two network cards have the hardware address {0}")]
    MacTwice(String),
    /// Queues out of range.
    #[error("a network card has 1 to {NIC_PAIRS_MAX} tap_fds, not {0}")]
    NicQueues(usize),
    /// MTU out of range.
    #[error("a network card has an MTU of at least {MTU_MIN}, not {0}")]
    Mtu(u16),
    /// Too many shares, disks, network cards or ports.
    #[error("{what}: {count} entries, at most {max}")]
    TooMany {
        /// The field.
        what: &'static str,
        /// Entries given.
        count: usize,
        /// Entries allowed.
        max: usize,
    },
    /// A port named twice.
    #[error("guest_may_dial names port {0} twice")]
    PortTwice(u32),
    /// The jail would keep root.
    #[error("jail uid and gid must not be 0")]
    JailRoot,
}
