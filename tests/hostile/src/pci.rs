//! Configuration space by mechanism 1, and which device is where.

use crate::cpu;
use crate::report::{Outcome, Why};

const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;

/// Offset of vendor and device id.
pub(crate) const ID: u8 = 0x00;
/// Offset of the command register.
pub(crate) const COMMAND: u8 = 0x04;
/// Decodes memory, may be the master of the bus.
pub(crate) const COMMAND_ON: u16 = 0x6;
/// Offset of the first BAR.
pub(crate) const BAR_0: u8 = 0x10;
/// Offset of the first capability's offset.
const CAPABILITIES: u8 = 0x34;
/// A list of more is a ring.
const CAPABILITIES_MAX: usize = 48;

/// Function 0 of a slot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function {
    /// Its slot.
    pub(crate) slot: u8,
}

impl Function {
    /// Names a register's dword; the bytes of it are then at [`DATA`] and the ports behind it.
    fn select(self, offset: u8) -> u16 {
        let address = 1 << 31 | u32::from(self.slot) << 11 | u32::from(offset & !3);
        cpu::out(ADDRESS, address);
        DATA + u16::from(offset & 3)
    }

    /// Reads a register.
    pub(crate) fn read<T: cpu::Number>(self, offset: u8) -> T {
        cpu::inp(self.select(offset))
    }

    /// Writes a register.
    pub(crate) fn write<T: cpu::Number>(self, offset: u8, value: T) {
        cpu::out(self.select(offset), value);
    }

    /// The address of its first BAR.
    pub(crate) fn bar(self) -> u64 {
        u64::from(self.read::<u32>(BAR_0) & !0xf)
    }

    /// Where its first capability with this id is.
    pub(crate) fn capability(self, id: u8) -> Outcome<u8> {
        self.capability_with(id, |_| true)
    }

    /// Where the first one is of which that holds as well.
    pub(crate) fn capability_with(self, id: u8, is_it: impl Fn(u8) -> bool) -> Outcome<u8> {
        let mut at: u8 = self.read(CAPABILITIES);
        for _ in 0..CAPABILITIES_MAX {
            match at {
                0 => break,
                _ if self.read::<u8>(at) == id && is_it(at) => return Ok(at),
                _ => at = self.read(at + 1),
            }
        }
        Err(Why::new("the capability is not there"))
    }

    /// The function with this vendor and device, switched on.
    pub(crate) fn find(vendor: u16, device: u16) -> Outcome<Function> {
        let id = u32::from(device) << 16 | u32::from(vendor);
        (1..32)
            .map(|slot| Function { slot })
            .find(|function| function.read::<u32>(ID) == id)
            .inspect(|function| function.write(COMMAND, COMMAND_ON))
            .ok_or(Why::new("the device is not there"))
    }
}
