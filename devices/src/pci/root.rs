//! The root of the bus: configuration mechanism 1 (PCI 3.0 section 3.2.2.3.2) and the host bridge at 0.0.
//!
//! Port 0xCF8 takes and gives only dwords; any other width there is an access to nothing. What is selected
//! and not there (another bus, another function, an empty slot, the enable bit clear) reads as all ones.

use super::PciFunction;
use super::config::{CONFIG_BYTES, ConfigSpace, ConfigState, Identity};
use super::copy::ConfigCopy;
use crate::bus::BusDevice;
use crate::memory::{GuestMemory, NotMemory};
use crate::state::{Foreign, Version};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// First port of the mechanism: the address register; the data register follows at 0xCFC.
pub const CONFIG_PORT: u64 = 0xcf8;
/// Ports of the mechanism.
pub const CONFIG_PORT_BYTES: u64 = 8;
/// Device numbers of a bus, slot 0 being the host bridge.
pub const SLOTS: usize = 32;
/// Functions of a device.
pub const FUNCTIONS: usize = 8;

const DATA: u64 = 4;
const ENABLE: u32 = 1 << 31;
/// The header type, and its bit that says that the device has other functions (PCI 3.0 section 6.2.1).
const HEADER_TYPE: u8 = 0x0e;
const MULTI_FUNCTION: u8 = 1 << 7;
/// Bits of the address register that can be set: enable, bus, device, function, dword.
const ADDRESS_BITS: u32 = 0x80ff_fffc;

/// A vendor and device that no Linux driver binds to; the class is what makes it a host bridge, for which
/// Linux's check of mechanism 1 looks (arch/x86/pci/direct.c, pci_sanity_check).
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_00_00,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// Where a function is on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Device number, 1 to 31.
    pub slot: u8,
    /// Function number, 0 to 7. A driver looks for the others only where there is a function 0.
    pub function: u8,
}

impl Place {
    /// Its number among all of the bus.
    pub fn index(self) -> usize {
        usize::from(self.slot) * FUNCTIONS + usize::from(self.function)
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02x}.{}", self.slot, self.function)
    }
}

/// A function cannot be put where something is already, or nothing can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "PCI function {0} is taken, or not one of 1 to 31 and 0 to 7, or the slot has no function 0"
)]
pub struct PlaceError(pub Place);

/// What the guest sees of the root itself. Plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PciRootState {
    version: Version<1>,
    /// The address register.
    address: u32,
    bridge: ConfigState,
}

struct State {
    address: u32,
    /// Function 0 of this slot and of those behind it always says that there are others: a guest that has looked at a slot once
    /// believes what it was told then.
    later: usize,
    functions: [Option<Arc<dyn PciFunction>>; SLOTS * FUNCTIONS],
    copy: Option<ConfigCopy>,
}

impl State {
    /// The place that the address register names and the offset in its space, if the access stays inside the data register.
    fn addressed(&self, offset: u64, width: usize) -> Option<(Place, u8)> {
        let byte = offset.checked_sub(DATA)?;
        if byte + width as u64 > 4 {
            return None;
        }
        let [register, device_function, bus, _] = self.address.to_le_bytes();
        if self.address & ENABLE == 0 || bus != 0 {
            return None;
        }
        let place = Place {
            slot: device_function >> 3,
            function: device_function & 7,
        };
        Some((place, register | byte as u8))
    }

    /// What is at `place`; `None` if nothing is.
    fn selected(&self, place: Place) -> Option<Selected> {
        Some(Selected {
            function: self.at(place)?.clone(),
            many: place.function == 0 && self.many(place.slot),
        })
    }

    /// Has the copy say what is at `place` now.
    fn publish(&self, place: Place) {
        if let Some(copy) = &self.copy {
            let selected = self.selected(place);
            let space = selected.map_or([0xff; CONFIG_BYTES], |selected| selected.space());
            copy.put(place.index(), &space);
        }
    }

    /// The same for `place`, whose function came or left, and for what says whether its slot has several.
    fn publish_slot(&self, place: Place) {
        self.publish(place);
        self.publish(Place {
            function: 0,
            ..place
        });
    }

    fn at(&self, place: Place) -> Option<&Arc<dyn PciFunction>> {
        self.functions.get(place.index())?.as_ref()
    }

    /// Whether there is more than function 0.
    fn many(&self, slot: u8) -> bool {
        usize::from(slot) >= self.later
            || (1..FUNCTIONS as u8).any(|function| self.at(Place { slot, function }).is_some())
    }
}

/// The bus with its functions, as a device on the port bus at [`CONFIG_PORT`].
pub struct PciRoot {
    state: Mutex<State>,
    bridge: Arc<HostBridge>,
}

impl PciRoot {
    /// A bus with a host bridge and nothing else.
    pub fn new() -> PciRoot {
        let bridge = Arc::new(HostBridge(Mutex::new(ConfigSpace::new(HOST_BRIDGE))));
        let mut functions = [const { None }; SLOTS * FUNCTIONS];
        if let Some(first) = functions.first_mut() {
            *first = Some(bridge.clone() as Arc<dyn PciFunction>);
        }
        PciRoot {
            state: Mutex::new(State {
                address: 0,
                later: SLOTS,
                functions,
                copy: None,
            }),
            bridge,
        }
    }

    /// What the guest sees of it, without its functions.
    pub fn state(&self) -> PciRootState {
        PciRootState {
            version: Version,
            address: self.lock().address,
            bridge: self.bridge.lock().state(),
        }
    }

    /// Takes the state of another one.
    ///
    /// # Errors
    /// It is none.
    pub fn restore(&self, state: &PciRootState) -> Result<(), Foreign> {
        if state.address & !ADDRESS_BITS != 0 {
            return Err(Foreign("PCI address register"));
        }
        self.bridge.lock().restore(&state.bridge)?;
        self.lock().address = state.address;
        Ok(())
    }

    /// Puts a function at `place`.
    ///
    /// # Errors
    /// The place is taken or does not exist, or a driver would not find it.
    pub fn insert(&self, place: Place, function: Arc<dyn PciFunction>) -> Result<(), PlaceError> {
        let mut state = self.lock();
        let first = Place {
            function: 0,
            ..place
        };
        let exists = place.slot > 0 && usize::from(place.function) < FUNCTIONS;
        let found = place == first || state.at(first).is_some();
        match state.functions.get_mut(place.index()) {
            Some(free @ None) if exists && found => *free = Some(function),
            _ => return Err(PlaceError(place)),
        }
        state.publish_slot(place);
        Ok(())
    }

    /// Takes the function at `place` away; what the guest has of it are all ones from now on. `None` if there is none.
    pub fn remove(&self, place: Place) -> Option<Arc<dyn PciFunction>> {
        let mut state = self.lock();
        // The host bridge stays.
        let removable = place.slot > 0 && usize::from(place.function) < FUNCTIONS;
        let function = state
            .functions
            .get_mut(place.index())
            .filter(|_| removable)?
            .take();
        state.publish_slot(place);
        function
    }

    /// Keeps a copy of what all functions say in guest memory ([`super::copy`]).
    ///
    /// # Errors
    /// Its place is not in guest memory.
    pub fn keep_copy(&self, memory: GuestMemory) -> Result<(), NotMemory> {
        let mut state = self.lock();
        state.copy = Some(ConfigCopy::new(memory)?);
        for slot in 0..SLOTS as u8 {
            for function in 0..FUNCTIONS as u8 {
                let place = Place { slot, function };
                if state.at(place).is_some() {
                    state.publish(place);
                }
            }
        }
        Ok(())
    }

    /// Keeps the slots from `first` on for functions that come while the guest runs.
    pub fn keep_for_later(&self, first: usize) {
        self.lock().later = first;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A function that was named.
struct Selected {
    function: Arc<dyn PciFunction>,
    /// It is function 0 of several.
    many: bool,
}

impl Selected {
    fn read(&self, register: u8, data: &mut [u8]) {
        self.function.config_read(register, data);
        self.say_many(register, data);
    }

    fn space(&self) -> [u8; CONFIG_BYTES] {
        let mut space = self.function.config_space();
        self.say_many(0, &mut space);
        space
    }

    fn say_many(&self, register: u8, data: &mut [u8]) {
        let header_type = HEADER_TYPE.checked_sub(register);
        let header_type = header_type.and_then(|at| data.get_mut(usize::from(at)));
        if let (Some(byte), true) = (header_type, self.many) {
            *byte |= MULTI_FUNCTION;
        }
    }
}

impl Default for PciRoot {
    fn default() -> Self {
        PciRoot::new()
    }
}

impl BusDevice for PciRoot {
    fn name(&self) -> &'static str {
        "pci"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let state = self.lock();
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&state.address.to_le_bytes());
        } else if let Some((place, register)) = state.addressed(offset, data.len()) {
            let selected = state.selected(place);
            drop(state);
            if let Some(selected) = selected {
                selected.read(register, data);
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        if let (0, Ok(address)) = (offset, <[u8; 4]>::try_from(data)) {
            state.address = u32::from_le_bytes(address) & ADDRESS_BITS;
        } else if let Some((place, register)) = state.addressed(offset, data.len()) {
            // The write may be one to the device behind it, which is not to hold up the bus.
            let function = state.at(place).cloned();
            drop(state);
            if let Some(function) = function {
                function.config_write(register, data);
                self.lock().publish(place);
            }
        }
    }
}

struct HostBridge(Mutex<ConfigSpace>);

impl HostBridge {
    fn lock(&self) -> MutexGuard<'_, ConfigSpace> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u8, data: &mut [u8]) {
        self.lock().read(offset, data);
    }

    fn config_space(&self) -> [u8; CONFIG_BYTES] {
        self.lock().bytes()
    }

    fn config_write(&self, offset: u8, data: &[u8]) {
        self.lock().write(offset, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(root: &PciRoot, address: u32, byte: u64, width: usize) -> Vec<u8> {
        root.write(0, &address.to_le_bytes());
        let mut data = vec![0; width];
        root.read(DATA + byte, &mut data);
        data
    }

    #[test]
    fn linux_finds_mechanism_1_and_a_host_bridge() {
        // pci_check_type1 and pci_sanity_check of Linux, in their order.
        let root = PciRoot::new();
        root.write(3, &[1]);
        let mut old = [0; 4];
        root.read(0, &mut old);
        root.write(0, &0x8000_0000u32.to_le_bytes());
        let mut back = [0; 4];
        root.read(0, &mut back);
        assert_eq!(u32::from_le_bytes(back), 0x8000_0000);
        assert_eq!(read(&root, 0x8000_0008, 2, 2), [0x00, 0x06]);
        assert_eq!(old, [0; 4]);
    }

    #[test]
    fn what_is_not_there_reads_as_all_ones() {
        let root = PciRoot::new();
        for address in [
            0x0000_0000u32, // enable bit clear
            0x8000_0800,    // empty slot
            0x8000_0100,    // function 1 of the bridge
            0x8001_0000,    // bus 1
            0x80ff_fffc,
        ] {
            assert_eq!(read(&root, address, 0, 4), [0xff; 4], "{address:#x}");
            root.write(DATA, &[0; 4]);
        }
        assert_eq!(read(&root, 0x8000_0000, 0, 4), [0x36, 0x1b, 0x08, 0x00]);
    }

    #[test]
    fn the_address_register_is_a_dword_and_nothing_else() {
        let root = PciRoot::new();
        root.write(0, &0x8000_0004u32.to_le_bytes());
        for (offset, width) in [(0, 1), (0, 2), (1, 1), (2, 2), (3, 1), (2, 4), (0, 8)] {
            let mut data = vec![0; width];
            root.read(offset, &mut data);
            assert!(data.iter().all(|byte| *byte == 0xff), "{offset} {width}");
            root.write(offset, &data);
        }
        let mut back = [0; 4];
        root.read(0, &mut back);
        assert_eq!(u32::from_le_bytes(back), 0x8000_0004);
    }

    #[test]
    fn what_was_selected_and_written_comes_back() {
        let (old, new) = (PciRoot::new(), PciRoot::new());
        read(&old, 0x8000_0004, 0, 2);
        old.write(DATA, &[6, 0]);
        let json = serde_json::to_string(&old.state()).unwrap();
        let state = serde_json::from_str(&json).unwrap();
        new.restore(&state).unwrap();
        assert_eq!(new.state(), old.state());
        let mut command = [0; 2];
        new.read(DATA, &mut command);
        assert_eq!(command, [6, 0]);
        let impossible = PciRootState {
            address: 1,
            ..state
        };
        assert!(new.restore(&impossible).is_err());
    }

    fn function() -> Arc<HostBridge> {
        Arc::new(HostBridge(Mutex::new(ConfigSpace::new(HOST_BRIDGE))))
    }

    fn place(slot: u8, function: u8) -> Place {
        Place { slot, function }
    }

    #[test]
    fn a_place_is_given_once() {
        let root = PciRoot::new();
        root.insert(place(31, 0), function()).unwrap();
        root.insert(place(31, 7), function()).unwrap();
        for taken_or_none in [
            place(0, 0),
            place(0, 1),
            place(31, 0),
            place(31, 7),
            place(31, 8),
            place(32, 0),
            place(30, 1), // without a function 0 nobody would find it
        ] {
            let refused = Err(PlaceError(taken_or_none));
            assert_eq!(root.insert(taken_or_none, function()), refused);
        }
        assert_eq!(read(&root, 0x8000_f800, 0, 2), [0x36, 0x1b]);
        assert_eq!(read(&root, 0x8000_ff00, 0, 2), [0x36, 0x1b]);
        assert_eq!(read(&root, 0x8000_f900, 0, 2), [0xff, 0xff]);
    }

    #[test]
    fn function_0_says_whether_there_are_others() {
        let root = PciRoot::new();
        root.insert(place(5, 0), function()).unwrap();
        let header = |byte, width| read(&root, 0x8000_280c, byte, width);
        assert_eq!(header(2, 1), [0]);
        root.insert(place(5, 1), function()).unwrap();
        assert_eq!(header(2, 1), [0x80]);
        assert_eq!(header(2, 2), [0x80, 0]);
        assert_eq!(header(0, 4), [0, 0, 0x80, 0]);
        assert_eq!((header(3, 1), header(0, 2)), (vec![0], vec![0, 0]));
        // Function 1 itself says nothing.
        assert_eq!(read(&root, 0x8000_290c, 2, 1), [0]);
    }

    #[test]
    fn what_was_removed_is_not_there_and_its_place_is_free() {
        let root = PciRoot::new();
        root.insert(place(5, 0), function()).unwrap();
        root.insert(place(5, 1), function()).unwrap();
        assert!(root.remove(place(5, 0)).is_some());
        assert_eq!(read(&root, 0x8000_2800, 0, 2), [0xff, 0xff]);
        assert_eq!(read(&root, 0x8000_2900, 0, 2), [0x36, 0x1b]);
        assert!(root.remove(place(5, 0)).is_none());
        assert!(root.remove(place(0, 0)).is_none(), "the host bridge");
        root.insert(place(5, 0), function()).unwrap();
    }

    #[test]
    fn a_slot_kept_for_later_says_that_it_has_functions_before_they_come() {
        let root = PciRoot::new();
        root.keep_for_later(5);
        root.insert(place(4, 0), function()).unwrap();
        root.insert(place(5, 0), function()).unwrap();
        assert_eq!(read(&root, 0x8000_200c, 2, 1), [0]);
        assert_eq!(read(&root, 0x8000_280c, 2, 1), [0x80]);
    }

    proptest! {
        #[test]
        fn no_access_panics(
            accesses in proptest::collection::vec((0u64..9, any::<u32>(), 0usize..9, any::<bool>()), 0..64)
        ) {
            let root = PciRoot::new();
            for (offset, value, width, write) in accesses {
                let mut data = vec![value as u8; width];
                if write {
                    root.write(0, &value.to_le_bytes());
                    root.write(offset, &data);
                } else {
                    root.read(offset, &mut data);
                }
            }
            prop_assert_eq!(read(&root, 0x8000_0000, 0, 4), [0x36, 0x1b, 0x08, 0x00]);
        }
    }
}
