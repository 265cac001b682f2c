//! What is no virtio device: configuration space, pvpanic, the keyboard controller, ports of nobody (catalogue B2.8). The
//! entropy device is asked whether the machine still works.

use super::Named;
use super::rng::Rng;
use crate::cpu::{self, Number, inp, out};
use crate::pci::{BAR_0, COMMAND, COMMAND_ON, Function, ID};
use crate::report::{At, Outcome, same};

pub(super) const CHAPTERS: [Named<Rng>; 3] = [
    ("configuration space of any width and offset", configuration),
    ("pvpanic of any width and offset", pvpanic),
    ("ports of nobody", ports),
];

const SLOTS: u8 = 32;
const ADDRESS: u16 = 0xcf8;
const DATA: u16 = 0xcfc;

/// Every register of every slot, written with ones in every width; identities and BARs' low bits stay.
fn configuration(_rng: &mut Rng) -> Outcome {
    for slot in 0..SLOTS {
        let function = Function { slot };
        let id: u32 = function.read(ID);
        let bar: u32 = function.read(BAR_0);
        for offset in 0..=u8::MAX {
            function.write(offset, u8::MAX);
            let _any: u8 = function.read(offset);
            if offset % 2 == 0 {
                function.write(offset, u16::MAX);
                let _any: u16 = function.read(offset);
            }
            if offset % 4 == 0 {
                function.write(offset, u32::MAX);
                let _any: u32 = function.read(offset);
            }
        }
        same("the identity", function.read::<u32>(ID), id).at("slot", slot.into())?;
        function.write(BAR_0, bar);
        function.write(COMMAND, COMMAND_ON);
        same("the BAR", function.read::<u32>(BAR_0), bar).at("slot", slot.into())?;
    }
    // Other functions, other buses, no enable bit; and accesses over the ends of the data port.
    for address in [0x8000_0100u32, 0x80ff_ff00, 0x8001_0000, 0x0000_0800] {
        out(ADDRESS, address);
        same("nothing", inp::<u32>(DATA), u32::MAX).at("address", address.into())?;
        for port in ADDRESS..=DATA + 3 {
            if port != ADDRESS {
                out(port, u32::MAX);
                out(port, u16::MAX);
            }
            out(port, u8::MAX);
            let _any: (u32, u16, u8) = (inp(port), inp(port), inp(port));
        }
    }
    Ok(())
}

/// All of the BAR but what ends the machine.
fn pvpanic(_rng: &mut Rng) -> Outcome {
    const BYTES: u64 = 0x1000;
    /// Neither panicked nor shut down.
    const HARMLESS: u8 = !5;
    let bar = Function::find(0x1b36, 0x0011)?.bar();
    same("what it knows", cpu::load::<u8>(bar), 5u8)?;
    cpu::store(bar, HARMLESS);
    let places = (1..0x20).chain(BYTES - 0x10..BYTES);
    for at in places {
        everything::<u8>(bar, at, BYTES)?;
        everything::<u16>(bar, at, BYTES)?;
        everything::<u32>(bar, at, BYTES)?;
        everything::<u64>(bar, at, BYTES)?;
    }
    same("what it knows", cpu::load::<u64>(bar), 5u64)
}

fn everything<T: Number>(bar: u64, at: u64, end: u64) -> Outcome {
    if at + size_of::<T>() as u64 > end {
        return Ok(());
    }
    cpu::store(bar + at, T::narrow(u64::MAX));
    same("nothing", cpu::load::<T>(bar + at).wide(), 0u64).at("offset", at)
}

/// The keyboard controller with all but its reset, and ports at which there is nothing.
fn ports(_rng: &mut Rng) -> Outcome {
    const COMMAND_PORT: u16 = 0x64;
    const RESET: u8 = 0xfe;
    for value in (0..=u8::MAX).filter(|value| *value != RESET) {
        out(COMMAND_PORT, value);
    }
    out(COMMAND_PORT, u16::from(RESET));
    out(COMMAND_PORT, u32::from(RESET));
    same("the status", inp::<u8>(COMMAND_PORT), 0x15u8)?;
    same("the status", inp::<u16>(COMMAND_PORT), u16::MAX)?;
    for port in [0x80, 0x2f8, 0x3f0, 0x604, 0xcf7, 0x1234, 0xfffc] {
        out(port, u8::MAX);
        out(port, u16::MAX);
        out(port, u32::MAX);
        same("nothing", inp::<u32>(port), u32::MAX).at("port", port.into())?;
    }
    Ok(())
}
