//! The control channel: what an owner asks of a VMM while it runs, and what it is answered.
//!
//! A `SOCK_STREAM` unix socket inherited by the VMM ([`crate::machine::MachineConfig::control_fd`]). Each message is a frame:
//! its length in bytes (u32, little-endian), then as many bytes of JSON. What a request brings along travels as `SCM_RIGHTS` with
//! the first bytes of its frame: the file of a disk, the queues of a tap device. One request at a time: the owner sends the
//! next when it has read the reply. When the owner closes its end the VM goes on; nobody asks it anything any more.
//!
//! Deadlines: a frame that was begun is whole within [`FRAME_TIMEOUT_MS`], and the VMM has answered within [`REPLY_TIMEOUT_MS`],
//! or one of the two is not what the other takes it for.
//!
//! Trust: the VMM obeys its owner, and refuses what makes no sense. The owner takes every reply for hostile: it is as long as
//! [`REPLY_MAX_BYTES`] at most, and is parsed into these types or refused.

use crate::machine::{self, ConfigError, Cpus, Mac, MemoryMib};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// Longest request, in bytes without its length.
pub const REQUEST_MAX_BYTES: usize = 4 * 1024;
/// Longest reply, in bytes without its length: the counters of a VM with all devices that it can have.
pub const REPLY_MAX_BYTES: usize = 512 * 1024;
/// Most fds that come with a request.
pub const REQUEST_FDS_MAX: usize = machine::NIC_PAIRS_MAX;
/// How long a frame may take from its first byte to its last, in ms.
pub const FRAME_TIMEOUT_MS: u64 = 1_000;
/// How long a VMM may take for a reply, in ms; the longest is that to a pause, which waits for the vCPUs.
pub const REPLY_TIMEOUT_MS: u64 = 5_000;

/// The length in front of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameLength(u32);

impl FrameLength {
    /// Bytes of the length itself.
    pub const BYTES: usize = 4;

    /// Reads it.
    ///
    /// # Errors
    /// A message of nothing, or of more than `max` bytes, is none.
    pub fn decode(bytes: [u8; Self::BYTES], max: usize) -> Result<FrameLength, BadFrame> {
        let length = u32::from_le_bytes(bytes);
        match usize::try_from(length) {
            Ok(1..) if length as usize <= max => Ok(FrameLength(length)),
            _ => Err(BadFrame { length, max }),
        }
    }

    /// The bytes that follow.
    pub fn get(self) -> usize {
        self.0 as usize
    }
}

/// A length that no message has: the sender speaks another protocol, and where the next message begins is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message of {length} bytes on the control channel, expected 1 to {max}")]
pub struct BadFrame {
    /// What was said.
    pub length: u32,
    /// The longest allowed, in bytes.
    pub max: usize,
}

/// Puts the length in front of a message.
///
/// # Errors
/// The message is empty or longer than `max` bytes.
pub fn frame(message: &[u8], max: usize) -> Result<Vec<u8>, BadFrame> {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    let bytes = length.to_le_bytes();
    FrameLength::decode(bytes, max)?;
    let mut frame = Vec::with_capacity(bytes.len() + message.len());
    frame.extend_from_slice(&bytes);
    frame.extend_from_slice(message);
    Ok(frame)
}

/// What the owner asks. Every one is answered by one [`Reply`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// What the VM is and does: [`Reply::State`].
    State,
    /// How often what happened: [`Reply::Counters`].
    Counters,
    /// Puts a disk on the bus; comes with its one fd (see [`machine::DiskConfig::fd`]). [`Reply::Attached`] says where the guest
    /// finds it once it looks, to which its agent has to be told.
    AttachDisk(NewDisk),
    /// Takes a disk off the bus. The guest has let go of it before, as its agent is told first.
    DetachDisk {
        /// Its id.
        id: String,
    },
    /// Puts a network card on the bus; comes with the queues of its tap device, 1 to 16 (see [`machine::NicConfig::tap_fds`]).
    AttachNic(NewNic),
    /// Takes a network card off the bus, as with disks.
    DetachNic {
        /// Its hardware address.
        mac: Mac,
    },
    /// Plugs or pulls the cable of a network card.
    SetLink {
        /// Its hardware address.
        mac: Mac,
        /// Whether it is plugged.
        up: bool,
    },
    /// Asks the guest to have so much memory from now on: more than at the start is plugged, up to the configuration's
    /// `memory_max_mib`; of less the rest goes into the balloon. The guest does it in its own time; [`Reply::State`] says how far it is.
    Resize {
        /// All of it.
        memory_mib: MemoryMib,
    },
    /// Halts all vCPUs, then all devices. Answered when no vCPU runs, what the devices had begun is done, and nothing touches the guest's memory.
    /// Refused, and everything runs on, if that takes too long.
    Pause,
    /// Lets them go on.
    Resume,
    /// Ends the VM at once, without a word to the guest. The reply is the last.
    Stop,
}

/// A disk that is attached while the VM runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewDisk {
    /// As in [`machine::DiskConfig::id`].
    pub id: String,
    /// As in [`machine::DiskConfig::read_only`].
    #[serde(default)]
    pub read_only: bool,
    /// As in [`machine::DiskConfig::queues`].
    #[serde(default = "machine::one_queue")]
    pub queues: u8,
}

/// A network card that is attached while the VM runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewNic {
    /// As in [`machine::NicConfig::mac`].
    pub mac: Mac,
    /// As in [`machine::NicConfig::mtu`].
    pub mtu: u16,
}

/// Why a request is none.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Not JSON, not a request, or a value of the wrong type.
    #[error("control request is not valid")]
    Json(#[source] serde_json::Error),
    /// A value that a configuration could not have either.
    #[error(transparent)]
    Value(#[from] ConfigError),
    /// Too few or too many fds.
    #[error("control request came with {got} fds, expected {expected}")]
    Fds {
        /// How many came.
        got: usize,
        /// How many belong to it, in words.
        expected: &'static str,
    },
}

impl Request {
    /// Reads and checks a request that came with so many fds.
    ///
    /// # Errors
    /// [`RequestError`] names the first thing wrong.
    pub fn from_json(json: &[u8], fds: usize) -> Result<Request, RequestError> {
        let request: Request = serde_json::from_slice(json).map_err(RequestError::Json)?;
        request.check()?;
        let (fits, expected) = match &request {
            Request::AttachDisk(_) => (fds == 1, "1, the file"),
            Request::AttachNic(_) => {
                let queues = 1..=machine::NIC_PAIRS_MAX;
                (
                    queues.contains(&fds),
                    "1 to 16, the queues of the tap device",
                )
            }
            _ => (fds == 0, "none"),
        };
        match fits {
            true => Ok(request),
            false => Err(RequestError::Fds { got: fds, expected }),
        }
    }

    /// The frame of this request.
    ///
    /// # Errors
    /// A request that the VMM would refuse is refused here already.
    pub fn to_frame(&self) -> Result<Vec<u8>, RequestError> {
        self.check()?;
        let json = serde_json::to_vec(self).map_err(RequestError::Json)?;
        frame(&json, REQUEST_MAX_BYTES)
            .map_err(|bad| RequestError::Json(serde::ser::Error::custom(bad)))
    }

    fn check(&self) -> Result<(), ConfigError> {
        match self {
            Request::AttachDisk(disk) => machine::check_disk(&disk.id, disk.queues),
            Request::DetachDisk { id } => machine::check_disk(id, 1),
            Request::AttachNic(nic) => machine::check_mtu(nic.mtu),
            _ => Ok(()),
        }
    }
}

/// The answer to a request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Reply {
    /// It is done.
    Done,
    /// To [`Request::State`].
    State(MachineState),
    /// To [`Request::Counters`].
    Counters(MachineCounters),
    /// The device is on the bus.
    Attached {
        /// Where.
        pci: PciAddress,
    },
    /// It was not done, and nothing has changed.
    Refused {
        /// One sentence that names the cause.
        why: String,
    },
}

impl Reply {
    /// The frame of this reply.
    ///
    /// # Errors
    /// It is longer than [`REPLY_MAX_BYTES`].
    pub fn to_frame(&self) -> Result<Vec<u8>, BadFrame> {
        // Strings, numbers and maps with strings as keys always have a JSON; without one there would be nothing to send.
        let json = serde_json::to_vec(self).unwrap_or_default();
        frame(&json, REPLY_MAX_BYTES)
    }

    /// Reads a reply.
    ///
    /// # Errors
    /// It is none.
    pub fn from_json(json: &[u8]) -> Result<Reply, serde_json::Error> {
        serde_json::from_slice(json)
    }
}

/// Where a function is on the guest's one PCI bus, as text `0000:00:05.0`, which is its name in the guest's sysfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PciAddress {
    slot: u8,
    function: u8,
}

/// Not the address of a device on that bus.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not a PCI address such as 0000:00:05.0, with a slot of 01 to 1f and a function of 0 to 7"
)]
pub struct BadPciAddress(String);

impl PciAddress {
    /// The function `function`, 0 to 7, in slot `slot`, 1 to 31; slot 0 is the host bridge's.
    ///
    /// # Errors
    /// There is no such place.
    pub fn new(slot: u8, function: u8) -> Result<PciAddress, BadPciAddress> {
        let address = PciAddress { slot, function };
        match (1..=31).contains(&slot) && function <= 7 {
            true => Ok(address),
            false => Err(BadPciAddress(address.to_string())),
        }
    }

    /// Device number.
    pub fn slot(self) -> u8 {
        self.slot
    }

    /// Function number.
    pub fn function(self) -> u8 {
        self.function
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0000:00:{:02x}.{}", self.slot, self.function)
    }
}

impl TryFrom<String> for PciAddress {
    type Error = BadPciAddress;

    fn try_from(text: String) -> Result<Self, BadPciAddress> {
        let parts = text.strip_prefix("0000:00:").and_then(|rest| {
            let (slot, function) = rest.split_once('.')?;
            let slot = u8::from_str_radix(slot, 16).ok()?;
            PciAddress::new(slot, function.parse().ok()?).ok()
        });
        // One way to write each: what is read is what would be written.
        match parts {
            Some(address) if address.to_string() == text => Ok(address),
            _ => Err(BadPciAddress(text)),
        }
    }
}

impl From<PciAddress> for String {
    fn from(address: PciAddress) -> String {
        address.to_string()
    }
}

/// What a VM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// Its vCPUs and devices work.
    Running,
    /// They do not, until [`Request::Resume`].
    Paused,
}

/// A VM, as it is now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// Its id.
    pub id: String,
    /// What it does.
    pub run: RunState,
    /// Virtual CPUs.
    pub cpus: Cpus,
    /// Memory.
    pub memory: MemoryState,
    /// Its virtio devices, in the order in which the guest finds them.
    pub devices: Vec<DeviceState>,
}

/// The memory of a VM, in MiB: it may use `boot_mib` and `plugged_mib` less `balloon_mib`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryState {
    /// At the start.
    pub boot_mib: u64,
    /// What the guest has plugged since.
    pub plugged_mib: u64,
    /// What the guest has put into the balloon.
    pub balloon_mib: u64,
}

/// One virtio device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    /// Its kind, for instance `virtio-blk`.
    pub kind: String,
    /// What tells it from others of its kind: a disk's id, a card's hardware address, a share's tag; empty where there is one.
    pub id: String,
    /// Where the guest finds it.
    pub pci: PciAddress,
    /// A driver of the guest works with it.
    pub in_use: bool,
    /// The device waits for the guest to reset it (DEVICE_NEEDS_RESET) or cannot be used again (FAILED).
    pub broken: bool,
}

/// What was counted since the VM began. Numbers only grow.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineCounters {
    /// Exits to userspace of each vCPU, named as in [`crate::report::MachineReport::userspace_exits`].
    pub vcpus: Vec<BTreeMap<String, u64>>,
    /// By device: its kind, and behind a slash its id if it has one, for instance `virtio-blk/data`.
    pub devices: BTreeMap<String, BTreeMap<String, u64>>,
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
