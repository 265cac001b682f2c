//! A type-0 configuration space of 256 bytes: identity, command, BARs, capabilities.
//!
//! Read-only is what the guest may not change, byte by byte with a mask of writable bits; a write to the
//! rest is dropped. BARs behave as in hardware: the bits above the size can be written, so the guest's
//! sizing probe works. But a BAR never moves: the VMM placed it and registered its notify addresses in KVM
//! before the guest ran, so [`ConfigSpace::decodes`] is true only while the BAR holds the address that it was
//! given and memory decode is on. A guest that moves a BAR has a device that answers nowhere, until it
//! writes the old address again; no other device or memory is ever shadowed.
//!
//! Linux leaves BARs where it finds them at boot, and gives those that it finds later addresses of its own choice. A function that comes
//! later therefore has no BAR but an Enhanced Allocation entry (PCIe 5.0 section 7.8.5), which says an address that cannot be
//! changed; Linux takes it as that of the BAR of the same number (drivers/pci/pci.c, pci_ea_read).

use crate::state::Foreign;
use serde::{Deserialize, Serialize};

/// Length of a conventional configuration space in bytes.
pub const CONFIG_BYTES: usize = 256;
/// BARs of a type-0 header.
pub const BARS: usize = 6;
/// Smallest BAR we place, in bytes: one page, so that BARs never share one.
const BAR_MIN_BYTES: u32 = 4096;

const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
/// Bit 10 of the command register, as bit 2 of its second byte.
const COMMAND_HIGH_INTX_DISABLE: u8 = 1 << 2;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const REVISION: usize = 0x08;
const CLASS: usize = 0x09;
const CACHE_LINE: usize = 0x0c;
const LATENCY_TIMER: usize = 0x0d;
const BAR_0: usize = 0x10;
const SUBSYSTEM: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// Enhanced Allocation.
const CAPABILITY_EA: u8 = 0x14;
/// Of the first dword of an entry: two dwords follow, plain memory, no second choice, enabled.
const EA_MEMORY: u32 = 2 | 0xff << 16 | 1 << 31;
/// Where in that dword the number of the BAR stands.
const EA_BAR_SHIFT: u32 = 4;
/// Where the capabilities begin.
const CAPABILITY_FIRST: usize = 0x40;

/// Who a function says that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision id.
    pub revision: u8,
    /// Class, subclass and programming interface, from the highest byte down: 0x060000 is a host bridge.
    pub class: u32,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// A layout that does not fit into configuration space; a defect of the device, not of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Not a power of two of at least a page, not aligned to its size, or not below 4 GiB.
    #[error("BAR {index} of {size:#x} bytes cannot be placed at {address:#x}")]
    Bar {
        /// Which BAR.
        index: usize,
        /// Where it should be.
        address: u64,
        /// How long it should be.
        size: u32,
    },
    /// The 256 bytes are full.
    #[error("capability {id:#x} of {length} bytes does not fit into configuration space")]
    Capability {
        /// Capability id.
        id: u8,
        /// Its length with the two bytes of header.
        length: usize,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Bar {
    address: u32,
    /// By an Enhanced Allocation entry: the BAR's own register reads 0 for ever.
    fixed: bool,
}

/// What a configuration space says, to be written down: all of its bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ConfigState(Vec<u8>);

/// The configuration space of one function. Plain data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    bars: [Option<Bar>; BARS],
    /// Where the pointer to the next capability belongs.
    link: usize,
    /// First byte behind the last capability.
    end: usize,
}

impl ConfigSpace {
    /// A function without BARs and capabilities.
    pub fn new(identity: Identity) -> ConfigSpace {
        let mut space = ConfigSpace {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            bars: [None; BARS],
            link: CAPABILITIES,
            end: CAPABILITY_FIRST,
        };
        space.put(0, &identity.vendor.to_le_bytes());
        space.put(2, &identity.device.to_le_bytes());
        space.put(REVISION, &[identity.revision]);
        let [interface, subclass, class, _] = identity.class.to_le_bytes();
        space.put(CLASS, &[interface, subclass, class]);
        space.put(SUBSYSTEM, &identity.subsystem_vendor.to_le_bytes());
        space.put(SUBSYSTEM + 2, &identity.subsystem.to_le_bytes());
        // Bus mastering is remembered for the guest and not enforced: a virtio driver that has set
        // DRIVER_OK has said more clearly that the device may write to its memory.
        space.allow(
            COMMAND,
            &[
                COMMAND_MEMORY | COMMAND_BUS_MASTER,
                COMMAND_HIGH_INTX_DISABLE,
            ],
        );
        // Of no meaning here, but drivers write them and read them back (pcibios_set_master).
        space.allow(CACHE_LINE, &[0xff]);
        space.allow(LATENCY_TIMER, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Places a 32-bit, non-prefetchable memory BAR.
    ///
    /// # Errors
    /// See [`LayoutError::Bar`]; also if the BAR is there already.
    pub fn add_bar(&mut self, index: usize, address: u64, size: u32) -> Result<(), LayoutError> {
        let base = self.claim(index, address, size, false)?;
        self.put(BAR_0 + 4 * index, &base.to_le_bytes());
        self.allow(BAR_0 + 4 * index, &(!(size - 1)).to_le_bytes());
        Ok(())
    }

    /// Places 32-bit, non-prefetchable memory that takes the place of a BAR and cannot be moved.
    ///
    /// # Errors
    /// As of [`ConfigSpace::add_bar`], and [`LayoutError::Capability`].
    pub fn add_fixed(&mut self, index: usize, address: u64, size: u32) -> Result<(), LayoutError> {
        let base = self.claim(index, address, size, true)?;
        // At most BARS.
        let entry = EA_MEMORY | (index as u32) << EA_BAR_SHIFT;
        let mut body = vec![1, 0];
        // The offset of the last byte, as that of its dword: the lowest two bits are flags.
        for dword in [entry, base, (size - 1) & !3] {
            body.extend_from_slice(&dword.to_le_bytes());
        }
        self.add_capability(CAPABILITY_EA, &body, &[])?;
        Ok(())
    }

    fn claim(
        &mut self,
        index: usize,
        address: u64,
        size: u32,
        fixed: bool,
    ) -> Result<u32, LayoutError> {
        let refused = LayoutError::Bar {
            index,
            address,
            size,
        };
        let base = u32::try_from(address).map_err(|_| refused)?;
        let fits = size.is_power_of_two()
            && size >= BAR_MIN_BYTES
            && base & (size - 1) == 0
            && base.checked_add(size - 1).is_some()
            && base != 0;
        match self.bars.get_mut(index) {
            Some(bar @ None) if fits => {
                *bar = Some(Bar {
                    address: base,
                    fixed,
                });
                Ok(base)
            }
            _ => Err(refused),
        }
    }

    /// Appends a capability: `body` is what follows id and next pointer, `writable` the bits of it that the
    /// guest may change (missing bytes: none). Returns the offset of the capability's id.
    ///
    /// # Errors
    /// See [`LayoutError::Capability`].
    pub fn add_capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u8, LayoutError> {
        let length = body.len() + 2;
        let full = LayoutError::Capability { id, length };
        let at = self.end;
        if at + length > CONFIG_BYTES || writable.len() > body.len() {
            return Err(full);
        }
        let offset = u8::try_from(at).map_err(|_| full)?;
        self.put(self.link, &[offset]);
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.put(STATUS, &[STATUS_CAPABILITIES]);
        self.link = at + 1;
        // Capabilities begin at dwords (PCI 3.0 section 6.7).
        self.end = (at + length).next_multiple_of(4);
        Ok(offset)
    }

    /// All of it.
    pub fn bytes(&self) -> [u8; CONFIG_BYTES] {
        self.bytes
    }

    /// Fills `data` from `offset`; zero beyond the end.
    pub fn read(&self, offset: u8, data: &mut [u8]) {
        data.fill(0);
        let bytes = self.bytes.iter().skip(usize::from(offset));
        for (to, from) in data.iter_mut().zip(bytes) {
            *to = *from;
        }
    }

    /// Takes the guest's write at `offset` as far as it is writable.
    pub fn write(&mut self, offset: u8, data: &[u8]) {
        let at = usize::from(offset);
        let bytes = self.bytes.iter_mut().skip(at);
        for ((byte, mask), new) in bytes.zip(self.writable.iter().skip(at)).zip(data) {
            *byte = (*byte & !mask) | (new & mask);
        }
    }

    /// What it says.
    pub fn state(&self) -> ConfigState {
        ConfigState(self.bytes.to_vec())
    }

    /// Says again what another one of the same layout said.
    ///
    /// # Errors
    /// That was of another layout.
    pub fn restore(&mut self, state: &ConfigState) -> Result<(), Foreign> {
        let ConfigState(bytes) = state;
        let mut pairs = bytes.iter().zip(self.bytes.iter().zip(&self.writable));
        let alike = pairs.all(|(new, (byte, mask))| (new ^ byte) & !mask == 0);
        if bytes.len() != CONFIG_BYTES || !alike {
            return Err(Foreign("configuration space"));
        }
        self.put(0, bytes);
        Ok(())
    }

    /// Whether BAR `index` answers at the address that it was given: see the module text.
    pub fn decodes(&self, index: usize) -> bool {
        let mut command = [0];
        self.read(COMMAND as u8, &mut command);
        let [command] = command;
        match self.bars.get(index) {
            Some(Some(bar)) => {
                let there = bar.fixed || self.dword(BAR_0 + 4 * index) == bar.address;
                command & COMMAND_MEMORY != 0 && there
            }
            _ => false,
        }
    }

    /// The dword at `offset`; zero beyond the end.
    pub fn dword(&self, offset: usize) -> u32 {
        let mut data = [0; 4];
        if let Ok(offset) = u8::try_from(offset) {
            self.read(offset, &mut data);
        }
        u32::from_le_bytes(data)
    }

    fn put(&mut self, at: usize, data: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(at).zip(data) {
            *to = *from;
        }
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(at).zip(mask) {
            *to = *from;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1044,
            revision: 1,
            class: 0x00ff_0102,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        })
    }

    #[test]
    fn the_identity_is_where_pci_wants_it_and_read_only() {
        let mut space = space();
        let before = space.clone();
        assert_eq!(space.dword(0), 0x1044_1af4);
        assert_eq!(space.dword(8), 0xff01_0201);
        assert_eq!(space.dword(0x2c), 0x0040_1af4);
        for offset in [0u8, 8, 0x2c, 0x0e, 0x34, 0x3d] {
            space.write(offset, &[0xff]);
        }
        assert_eq!(space, before);
    }

    #[test]
    fn the_sizing_probe_tells_the_size_and_the_old_address_comes_back() {
        let mut space = space();
        space.add_bar(0, 0xc000_8000, 0x8000).unwrap();
        space.write(0x10, &[0xff; 4]);
        assert_eq!(space.dword(0x10), 0xffff_8000);
        space.write(0x10, &0xc000_8000u32.to_le_bytes());
        assert_eq!(space.dword(0x10), 0xc000_8000);
        space.write(0x14, &[0xff; 4]);
        assert_eq!(space.dword(0x14), 0);
    }

    #[test]
    fn a_bar_decodes_only_with_memory_enabled_and_at_its_own_address() {
        let mut space = space();
        space.add_bar(0, 0xc000_8000, 0x8000).unwrap();
        assert!(!space.decodes(0));
        space.write(4, &[2]);
        assert!(space.decodes(0));
        assert!(!space.decodes(1) && !space.decodes(6));
        space.write(0x10, &0xd000_0000u32.to_le_bytes());
        assert!(!space.decodes(0));
        space.write(0x10, &0xc000_8000u32.to_le_bytes());
        assert!(space.decodes(0));
    }

    #[test]
    fn a_bar_that_cannot_be_is_refused() {
        let mut space = space();
        for (index, address, size) in [
            (0, 0xc000_0000u64, 0x800u32),
            (0, 0xc000_0000, 0x3000),
            (0, 0xc000_1000, 0x2000),
            (0, 0x1_0000_0000, 0x1000),
            (0, 0, 0x1000),
            (6, 0xc000_0000, 0x1000),
        ] {
            assert!(space.add_bar(index, address, size).is_err(), "{address:#x}");
        }
        space.add_bar(0, 0xc000_0000, 0x1000).unwrap();
        assert!(space.add_bar(0, 0xc000_1000, 0x1000).is_err());
    }

    #[test]
    fn fixed_memory_is_said_by_an_entry_that_nobody_can_change() {
        let mut space = space();
        space.add_fixed(0, 0xc001_0000, 0x8000).unwrap();
        assert!(space.add_bar(0, 0xc001_0000, 0x8000).is_err());
        let at = (space.dword(0x34) & 0xff) as usize;
        let dwords: Vec<u32> = (0..4).map(|dword| space.dword(at + 4 * dword)).collect();
        assert_eq!(dwords, [0x0001_0014, 0x80ff_0002, 0xc001_0000, 0x7ffc]);
        for offset in 0..=255 {
            space.write(offset, &[0xff]);
        }
        assert_eq!(space.dword(0x10), 0, "the BAR's own register");
        assert_eq!(space.dword(at + 8), 0xc001_0000);
        assert!(space.decodes(0));
        space.write(COMMAND as u8, &[0]);
        assert!(!space.decodes(0));
    }

    #[test]
    fn what_the_guest_wrote_comes_back_and_nothing_else_can() {
        let mut old = space();
        old.add_bar(0, 0xc000_8000, 0x8000).unwrap();
        let fresh = old.clone();
        old.write(4, &[6, 4]);
        old.write(0x3c, &[9]);
        let mut new = fresh.clone();
        new.restore(&old.state()).unwrap();
        assert_eq!(new, old);
        for at in 0..CONFIG_BYTES {
            let mut state = old.state();
            state.0[at] ^= !old.writable[at];
            let changed = state != old.state();
            assert_eq!(fresh.clone().restore(&state).is_err(), changed, "{at:#x}");
        }
        let short = ConfigState(old.state().0[..255].to_vec());
        assert!(new.restore(&short).is_err());
        assert_eq!(new, old);
    }

    #[test]
    fn capabilities_form_a_list_that_ends() {
        let mut space = space();
        assert_eq!(space.dword(4) >> 16, 0);
        let first = space.add_capability(9, &[1, 2, 3], &[0, 0xff]).unwrap();
        let second = space.add_capability(0x11, &[0; 10], &[]).unwrap();
        assert_eq!(space.dword(4) >> 16, 0x10);
        assert_eq!(space.dword(0x34) & 0xff, u32::from(first));
        assert_eq!(second % 4, 0);
        assert_eq!(
            space.dword(usize::from(first)) & 0xffff,
            9 | u32::from(second) << 8
        );
        assert_eq!(space.dword(usize::from(second)) & 0xffff, 0x11);
        space.write(first + 2, &[0xee, 0xee]);
        assert_eq!(space.dword(usize::from(first)) >> 16, 0xee01);
        assert!(space.add_capability(9, &[0; 200], &[]).is_err());
    }

    proptest! {
        #[test]
        fn no_access_panics_or_changes_what_is_read_only(
            writes in proptest::collection::vec((any::<u8>(), proptest::collection::vec(any::<u8>(), 0..9)), 0..64)
        ) {
            let mut space = space();
            space.add_bar(0, 0xc000_8000, 0x8000).unwrap();
            space.add_capability(9, &[7; 14], &[0xff]).unwrap();
            let before = space.clone();
            for (offset, data) in writes {
                space.write(offset, &data);
                let mut back = data.clone();
                space.read(offset, &mut back);
            }
            for at in 0..CONFIG_BYTES {
                prop_assert_eq!((space.bytes[at] ^ before.bytes[at]) & !before.writable[at], 0);
            }
        }
    }
}
