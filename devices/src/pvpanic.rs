//! pvpanic-pci (1b36:0011): a BAR with one byte by which the guest's kernel says that it panicked or wants
//! to be powered off.
//!
//! Linux 6.12 (drivers/misc/pvpanic) reads the byte for what the device knows, writes `PVPANIC_PANICKED`
//! from its panic notifier, before anything else of the panic runs, and registers a power-off handler that
//! writes `PVPANIC_SHUTDOWN` (pvpanic_synchronize_sys_off_handler). `PVPANIC_CRASH_LOADED` is not offered:
//! a machine that ends at a panic runs no crash kernel.

use crate::bus::BusDevice;
use crate::machine::{MachineEvent, MachineEvents};
use crate::pci::{CONFIG_BYTES, ConfigSpace, ConfigState, Identity, LayoutError, PciFunction};
use crate::state::{Foreign, Version};
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Length of the BAR in bytes; the VMM aligns it to this. One page, of which one byte means something.
pub const PVPANIC_BAR_BYTES: u32 = 4096;

/// `PVPANIC_PANICKED` of include/uapi/misc/pvpanic.h.
const PANICKED: u8 = 1 << 0;
/// `PVPANIC_SHUTDOWN` of include/uapi/misc/pvpanic.h.
const SHUTDOWN: u8 = 1 << 2;
const CAPABILITY: u8 = PANICKED | SHUTDOWN;

const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0011,
    revision: 1,
    class: 0x08_80_00, // another system peripheral
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// What the guest sees of it. Plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PvPanicState {
    version: Version<1>,
    config: ConfigState,
}

/// The device: a [`PciFunction`], and on the MMIO bus the [`BusDevice`] of its BAR.
pub struct PvPanic {
    address: u64,
    config: Mutex<ConfigSpace>,
    events: MachineEvents,
}

impl PvPanic {
    /// A device with its BAR at `address`, aligned to [`PVPANIC_BAR_BYTES`] and below 4 GiB.
    ///
    /// # Errors
    /// The BAR cannot be there.
    pub fn new(address: u64, events: MachineEvents) -> Result<PvPanic, LayoutError> {
        let mut config = ConfigSpace::new(IDENTITY);
        config.add_bar(0, address, PVPANIC_BAR_BYTES)?;
        Ok(PvPanic {
            address,
            config: Mutex::new(config),
            events,
        })
    }

    /// The BAR's guest-physical address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// What the guest sees.
    pub fn state(&self) -> PvPanicState {
        PvPanicState {
            version: Version,
            config: self.config().state(),
        }
    }

    /// Takes the state of another one at the same address.
    ///
    /// # Errors
    /// It is none.
    pub fn restore(&self, state: &PvPanicState) -> Result<(), Foreign> {
        self.config().restore(&state.config)
    }

    fn config(&self) -> MutexGuard<'_, ConfigSpace> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for PvPanic {
    fn config_read(&self, offset: u8, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    fn config_space(&self) -> [u8; CONFIG_BYTES] {
        self.config().bytes()
    }

    fn config_write(&self, offset: u8, data: &[u8]) {
        self.config().write(offset, data);
    }
}

impl BusDevice for PvPanic {
    fn name(&self) -> &'static str {
        "pvpanic"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if self.config().decodes(0) {
            data.fill(0);
            if let (0, Some(first)) = (offset, data.first_mut()) {
                *first = CAPABILITY;
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset != 0 || !self.config().decodes(0) {
            return;
        }
        let event = data.first().copied().unwrap_or(0);
        // A guest that says both panicked first.
        if event & PANICKED != 0 {
            (self.events)(MachineEvent::Panicked);
        } else if event & SHUTDOWN != 0 {
            (self.events)(MachineEvent::PowerOff);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn device() -> (PvPanic, Arc<Mutex<Vec<MachineEvent>>>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let events: MachineEvents = Arc::new(move |event| log.lock().unwrap().push(event));
        let device = PvPanic::new(0xc000_0000, events).unwrap();
        device.config_write(4, &[2, 0]);
        (device, seen)
    }

    #[test]
    fn the_driver_finds_its_device_and_what_it_can() {
        let (device, _) = device();
        let mut id = [0; 4];
        device.config_read(0, &mut id);
        assert_eq!(u32::from_le_bytes(id), 0x0011_1b36);
        let mut byte = [0];
        device.read(0, &mut byte);
        assert_eq!(byte, [0b101]);
    }

    #[test]
    fn each_event_is_told_and_nothing_else_is() {
        let (device, seen) = device();
        for value in 0..=0xff {
            device.write(0, &[value]);
            let told: Vec<MachineEvent> = std::mem::take(&mut *seen.lock().unwrap());
            let expected = match (value & 1, value & 4) {
                (1, _) => vec![MachineEvent::Panicked],
                (_, 4) => vec![MachineEvent::PowerOff],
                _ => vec![],
            };
            assert_eq!(told, expected, "{value:#x}");
        }
        for offset in 1..16 {
            device.write(offset, &[1]);
        }
        assert!(seen.lock().unwrap().is_empty());
    }

    #[test]
    fn a_disabled_bar_neither_answers_nor_listens() {
        let (device, seen) = device();
        device.config_write(4, &[0, 0]);
        device.write(0, &[1]);
        let mut byte = [0];
        device.read(0, &mut byte);
        assert_eq!(byte, [0xff]);
        assert!(seen.lock().unwrap().is_empty());
    }

    #[test]
    fn what_the_guest_wrote_comes_back() {
        let (old, _) = device();
        let new = PvPanic::new(0xc000_0000, Arc::new(|_| ())).unwrap();
        let json = serde_json::to_string(&old.state()).unwrap();
        let state = serde_json::from_str(&json).unwrap();
        new.restore(&state).unwrap();
        let mut byte = [0];
        new.read(0, &mut byte);
        assert_eq!((new.state(), byte), (old.state(), [CAPABILITY]));
        let bridge = crate::pci::PciRoot::new();
        let foreign = serde_json::to_value(bridge.state()).unwrap();
        let foreign = serde_json::json!({"version": 1, "config": foreign["bridge"]});
        let foreign = serde_json::from_value(foreign).unwrap();
        assert!(new.restore(&foreign).is_err());
    }

    #[test]
    fn a_bar_that_cannot_be_is_refused() {
        assert!(PvPanic::new(0xc000_0800, Arc::new(|_| ())).is_err());
        assert!(PvPanic::new(1 << 32, Arc::new(|_| ())).is_err());
    }
}
