//! The configuration of one microVM, as the owner hands it to the VMM: JSON on an inherited fd, every
//! resource an inherited fd by number. Parsed once; a [`MachineConfig`] that exists is valid.
//!
//! Unknown fields, numbers out of range and fds named twice are refused with one sentence. Nothing in
//! here names a path. The VMM opens three by itself, `/dev/kvm`, `/proc/self/fd` and `/proc/self/stat`, before its jail closes.

mod error;

pub use error::ConfigError;

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;

/// Version of this format; the VMM refuses any other.
pub const CONFIG_VERSION: u32 = 1;
/// Longest configuration that the VMM reads, in bytes.
pub const CONFIG_MAX_BYTES: usize = 64 * 1024;
/// Longest extra kernel command line, in bytes (x86 allows 2048 in all; boot needs some itself).
pub const CMDLINE_MAX_BYTES: usize = 1024;
/// Most virtio-fs shares of one VM.
pub const SHARES_MAX: usize = 8;
/// Most network cards of one VM.
pub const NICS_MAX: usize = 16;
/// Most pairs of queues of one network card.
pub const NIC_PAIRS_MAX: usize = 16;
/// Least MTU of a network card, in bytes (virtio 1.2 section 5.1.4.1).
pub const MTU_MIN: u16 = 68;
/// Most disks of one VM.
pub const DISKS_MAX: usize = 64;
/// Most request queues of one disk.
pub const DISK_QUEUES_MAX: u8 = 16;
/// Longest id of a disk, in bytes.
pub const DISK_ID_MAX_BYTES: usize = 20;
/// Most host ports that a guest may be allowed to dial.
pub const GUEST_DIAL_MAX: usize = 8;

/// A number of virtual CPUs: 1 to 32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct Cpus(u8);

impl Cpus {
    /// The most CPUs of one VM.
    pub const MAX: u8 = 32;

    /// A number that is written in a program: as a constant, one that is out of range does not compile.
    pub const fn literal(count: u8) -> Cpus {
        assert!(count >= 1 && count <= Self::MAX);
        Cpus(count)
    }

    /// The number itself.
    pub fn get(self) -> u8 {
        self.0
    }
}

impl TryFrom<u64> for Cpus {
    type Error = ConfigError;

    fn try_from(count: u64) -> Result<Self, ConfigError> {
        match u8::try_from(count) {
            Ok(count @ 1..=Self::MAX) => Ok(Cpus(count)),
            _ => Err(ConfigError::Cpus(count)),
        }
    }
}

impl From<Cpus> for u64 {
    fn from(cpus: Cpus) -> u64 {
        u64::from(cpus.0)
    }
}

/// A guest memory size in MiB: 64 MiB to 512 GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u64", into = "u64")]
pub struct MemoryMib(u64);

impl MemoryMib {
    /// The least memory with which the guest kernel, its initramfs and the agent run, in MiB.
    pub const MIN: u64 = 64;
    /// The most memory of one VM, in MiB (512 GiB).
    pub const MAX: u64 = 512 * 1024;

    /// A size in MiB that is written in a program: as a constant, one that is out of range does not compile.
    pub const fn literal(mib: u64) -> MemoryMib {
        assert!(mib >= Self::MIN && mib <= Self::MAX);
        MemoryMib(mib)
    }

    /// The size in MiB.
    pub fn get(self) -> u64 {
        self.0
    }

    /// The size in bytes.
    pub fn bytes(self) -> u64 {
        self.0 << 20
    }
}

impl TryFrom<u64> for MemoryMib {
    type Error = ConfigError;

    fn try_from(mib: u64) -> Result<Self, ConfigError> {
        if (Self::MIN..=Self::MAX).contains(&mib) {
            Ok(MemoryMib(mib))
        } else {
            Err(ConfigError::Memory(mib))
        }
    }
}

impl From<MemoryMib> for u64 {
    fn from(memory: MemoryMib) -> u64 {
        memory.0
    }
}

/// The number of an inherited file descriptor; never 0, 1 or 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "i64", into = "i64")]
pub struct FdNumber(i32);

impl FdNumber {
    /// The number as the kernel takes it.
    pub fn get(self) -> i32 {
        self.0
    }
}

impl TryFrom<i64> for FdNumber {
    type Error = ConfigError;

    fn try_from(fd: i64) -> Result<Self, ConfigError> {
        match i32::try_from(fd) {
            Ok(fd) if fd > 2 => Ok(FdNumber(fd)),
            _ => Err(ConfigError::Fd(fd)),
        }
    }
}

impl From<FdNumber> for i64 {
    fn from(fd: FdNumber) -> i64 {
        i64::from(fd.0)
    }
}

impl fmt::Display for FdNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One microVM. See the module text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// [`CONFIG_VERSION`].
    pub version: u32,
    /// Name of the VM for messages and thread names: 1 to 64 of `[A-Za-z0-9_.-]`.
    pub id: String,
    /// Virtual CPUs that the guest brings up at boot.
    pub cpus: Cpus,
    /// Virtual CPUs that the machine has; what is beyond `cpus` waits until the agent is told to bring it up. Absent: as many.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus_max: Option<Cpus>,
    /// Guest memory.
    pub memory_mib: MemoryMib,
    /// How much of it, in MiB, the balloon asks the guest to give back from the start.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub balloon_mib: u64,
    /// The most memory that the guest may ever have; absent: what it has at the start. The rest is plugged and unplugged while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_max_mib: Option<MemoryMib>,
    /// How much of that rest, in MiB, the guest is asked to plug from the start.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub plug_mib: u64,
    /// The guest kernel: ELF with a PVH note, or bzImage.
    pub kernel_fd: FdNumber,
    /// The initramfs, mapped or copied as it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs_fd: Option<FdNumber>,
    /// Kernel parameters added behind the VMM's own.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub cmdline: String,
    /// The vsock device; absent: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// The VMM's end of the control channel ([`crate::control`]); absent: what the VM has at its start is what it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control_fd: Option<FdNumber>,
    /// The virtio-fs devices.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<ShareConfig>,
    /// The block devices, in the order in which the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// The network cards, in the order in which the guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<NicConfig>,
    /// Where the guest's serial port writes; absent: only into the VMM's ring. With it the guest gets a
    /// console on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<SerialConfig>,
    /// Where one JSON [`crate::report::MachineReport`] is written when the VM ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report_fd: Option<FdNumber>,
    /// Whom the VMM becomes.
    pub jail: JailConfig,
}

/// The vsock device and its owner channel ([`crate::vsock`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The VMM's end of the owner channel.
    pub owner_fd: FdNumber,
    /// The host ports that the guest may dial; every other connect is reset.
    #[serde(default)]
    pub guest_may_dial: Vec<GuestDial>,
}

/// One host port that the guest may dial.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestDial {
    /// Host port.
    pub port: u32,
    /// How many connections it may make over the life of the VM; later ones are reset.
    pub connections: u32,
}

/// One virtio-fs device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// Mount tag, 1 to 36 bytes of UTF-8 (virtio 1.2 section 5.11.4).
    pub tag: String,
    /// A detached mount tree (`open_tree(2)` with `OPEN_TREE_CLONE`): the root of the share. Mounts of it that the owner left shared or
    /// made slaves receive what he mounts in theirs once the VM runs, if that has `nosuid,nodev,noexec,nosymfollow`; nothing goes
    /// back. The first mount is for mount points alone: the guest asks for its names each time.
    pub tree_fd: FdNumber,
}

/// One block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// A regular file or a block device, open for reading, and for writing unless `read_only`. Raw: nobody looks at what is
    /// in it. The owner sees to it that no other VM writes it.
    pub fd: FdNumber,
    /// What the guest knows the disk by: 1 to 20 of `[A-Za-z0-9_.-]`, each only once.
    pub id: String,
    /// The guest may not change it.
    #[serde(default)]
    pub read_only: bool,
    /// Request queues, 1 to 16.
    #[serde(default = "one_queue")]
    pub queues: u8,
}

/// One network card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicConfig {
    /// The queues of one tap device made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, 1 to 16; more than one with
    /// IFF_MULTI_QUEUE. The card has as many pairs of queues.
    pub tap_fds: Vec<FdNumber>,
    /// Hardware address.
    pub mac: Mac,
    /// Largest packet of the link without its Ethernet header, in bytes: 68 to 65535.
    pub mtu: u16,
}

/// The hardware address of one station, as text `02:00:00:00:00:01`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

impl Mac {
    /// Its bytes in the order of transmission.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl TryFrom<String> for Mac {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        let mut bytes = [0; 6];
        let mut digits = text.split(':');
        let two = |pair: &str| {
            // `from_str_radix` takes a sign as well.
            let digits = pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit());
            u8::from_str_radix(pair, 16).ok().filter(|_| digits)
        };
        let whole = bytes.iter_mut().all(|byte| {
            let value = digits.next().and_then(two);
            value.inspect(|value| *byte = *value).is_some()
        });
        let [first, ..] = bytes;
        // The lowest bit is that of a group; nobody has the address of zeroes.
        if !whole || digits.next().is_some() || first & 1 != 0 || bytes == [0; 6] {
            return Err(ConfigError::Mac(text));
        }
        Ok(Mac(bytes))
    }
}

impl From<Mac> for String {
    fn from(Mac([a, b, c, d, e, f]): Mac) -> String {
        format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

pub(crate) fn one_queue() -> u8 {
    1
}

/// Where the serial port writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialConfig {
    /// A file, pipe or terminal open for writing.
    pub fd: FdNumber,
}

/// Whom the VMM becomes before the guest runs. Never root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailConfig {
    /// User id, not 0.
    pub uid: u32,
    /// Group id, not 0.
    pub gid: u32,
}

impl MachineConfig {
    /// Reads and checks a configuration.
    ///
    /// # Errors
    /// [`ConfigError`] names the first thing wrong.
    pub fn from_json(json: &[u8]) -> Result<MachineConfig, ConfigError> {
        if json.len() > CONFIG_MAX_BYTES {
            return Err(ConfigError::TooLong(json.len()));
        }
        let config: MachineConfig = serde_json::from_slice(json).map_err(ConfigError::Json)?;
        config.check()?;
        Ok(config)
    }

    /// The JSON that [`MachineConfig::from_json`] reads back.
    ///
    /// # Errors
    /// A configuration that the VMM would refuse is refused here already.
    pub fn to_json(&self) -> Result<Vec<u8>, ConfigError> {
        self.check()?;
        let json = serde_json::to_vec(self).map_err(ConfigError::Json)?;
        if json.len() > CONFIG_MAX_BYTES {
            return Err(ConfigError::TooLong(json.len()));
        }
        Ok(json)
    }

    /// The CPUs of the machine, those that come up at boot and those that wait.
    pub fn cpus_present(&self) -> Cpus {
        self.cpus_max.unwrap_or(self.cpus)
    }

    /// Every inherited fd that the configuration names, in no particular order.
    pub fn fds(&self) -> Vec<FdNumber> {
        let mut fds = vec![self.kernel_fd];
        fds.extend(self.initramfs_fd);
        fds.extend(self.vsock.as_ref().map(|vsock| vsock.owner_fd));
        fds.extend(self.control_fd);
        fds.extend(self.shares.iter().map(|share| share.tree_fd));
        fds.extend(self.disks.iter().map(|disk| disk.fd));
        fds.extend(self.nics.iter().flat_map(|nic| &nic.tap_fds));
        fds.extend(self.serial.map(|serial| serial.fd));
        fds.extend(self.report_fd);
        fds
    }

    fn check(&self) -> Result<(), ConfigError> {
        if self.version != CONFIG_VERSION {
            return Err(ConfigError::Version(self.version));
        }
        if !is_id(&self.id) {
            return Err(ConfigError::Id(self.id.clone()));
        }
        self.check_memory()?;
        if self.cmdline.len() > CMDLINE_MAX_BYTES
            || !self.cmdline.bytes().all(|b| (b' '..=b'~').contains(&b))
        {
            return Err(ConfigError::Cmdline);
        }
        if self.cpus_present() < self.cpus {
            let (max, cpus) = (self.cpus_present().into(), self.cpus.into());
            return Err(ConfigError::CpusMax { max, cpus });
        }
        self.check_vsock()?;
        self.check_shares()?;
        self.check_disks()?;
        self.check_nics()?;
        if self.jail.uid == 0 || self.jail.gid == 0 {
            return Err(ConfigError::JailRoot);
        }
        let mut seen = BTreeSet::new();
        match self.fds().into_iter().find(|fd| !seen.insert(*fd)) {
            Some(fd) => Err(ConfigError::FdTwice(fd)),
            None => Ok(()),
        }
    }

    fn check_memory(&self) -> Result<(), ConfigError> {
        let memory = self.memory_mib.get();
        if self.balloon_mib > memory - MemoryMib::MIN {
            return Err(ConfigError::Balloon {
                balloon: self.balloon_mib,
                memory,
            });
        }
        let max = self.memory_max_mib.map_or(memory, MemoryMib::get);
        if max
            .checked_sub(memory)
            .is_none_or(|rest| self.plug_mib > rest)
        {
            return Err(ConfigError::MemoryMax {
                memory,
                plug: self.plug_mib,
                max,
            });
        }
        Ok(())
    }

    fn check_vsock(&self) -> Result<(), ConfigError> {
        let Some(vsock) = &self.vsock else {
            return Ok(());
        };
        at_most("guest_may_dial", vsock.guest_may_dial.len(), GUEST_DIAL_MAX)?;
        let mut ports = BTreeSet::new();
        match vsock
            .guest_may_dial
            .iter()
            .find(|dial| !ports.insert(dial.port))
        {
            Some(dial) => Err(ConfigError::PortTwice(dial.port)),
            None => Ok(()),
        }
    }

    fn check_shares(&self) -> Result<(), ConfigError> {
        at_most("shares", self.shares.len(), SHARES_MAX)?;
        let mut tags = BTreeSet::new();
        for share in &self.shares {
            let tag = share.tag.as_str();
            if tag.is_empty() || tag.len() > 36 || tag.contains('\0') || !tags.insert(tag) {
                return Err(ConfigError::Tag(share.tag.clone()));
            }
        }
        Ok(())
    }

    fn check_disks(&self) -> Result<(), ConfigError> {
        at_most("disks", self.disks.len(), DISKS_MAX)?;
        let mut ids = BTreeSet::new();
        for disk in &self.disks {
            check_disk(&disk.id, disk.queues)?;
            if !ids.insert(&disk.id) {
                return Err(ConfigError::DiskId(disk.id.clone()));
            }
        }
        Ok(())
    }

    fn check_nics(&self) -> Result<(), ConfigError> {
        at_most("nics", self.nics.len(), NICS_MAX)?;
        let mut macs = BTreeSet::new();
        for nic in &self.nics {
            if !(1..=NIC_PAIRS_MAX).contains(&nic.tap_fds.len()) {
                return Err(ConfigError::NicQueues(nic.tap_fds.len()));
            }
            check_mtu(nic.mtu)?;
            if !macs.insert(nic.mac) {
                return Err(ConfigError::MacTwice(nic.mac.into()));
            }
        }
        Ok(())
    }
}

/// Checks what a disk is called and how many queues it has.
pub(crate) fn check_disk(id: &str, queues: u8) -> Result<(), ConfigError> {
    if !is_disk_id(id) {
        return Err(ConfigError::DiskId(id.to_owned()));
    }
    if !(1..=DISK_QUEUES_MAX).contains(&queues) {
        return Err(ConfigError::DiskQueues(queues));
    }
    Ok(())
}

/// Checks the MTU of a network card.
pub(crate) fn check_mtu(mtu: u16) -> Result<(), ConfigError> {
    match mtu {
        MTU_MIN.. => Ok(()),
        _ => Err(ConfigError::Mtu(mtu)),
    }
}

fn at_most(what: &'static str, count: usize, max: usize) -> Result<(), ConfigError> {
    if count > max {
        return Err(ConfigError::TooMany { what, count, max });
    }
    Ok(())
}

/// The ids of disks: as [`is_id`], and at most [`DISK_ID_MAX_BYTES`] long.
pub fn is_disk_id(id: &str) -> bool {
    is_id(id) && id.len() <= DISK_ID_MAX_BYTES
}

/// The alphabet of VM, container and exec ids: 1 to 64 characters of `[A-Za-z0-9_.-]`, not `.` or `..`
/// (ids become file names on both sides).
pub fn is_id(id: &str) -> bool {
    (1..=64).contains(&id.len())
        && id != "."
        && id != ".."
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
