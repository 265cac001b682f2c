//! The BAR moved, measured and switched off under a device that runs, and its registers reached by the window in configuration space
//! (virtio 1.2 section 4.1.4.9; catalogue V14).

use super::Honest;
use crate::pci::{BAR_0, COMMAND, COMMAND_ON, Function};
use crate::report::{At, Outcome, same};
use crate::virtio::{Device, MSIX_TABLE, QUEUE_SIZE, RUNNING, STATUS};

/// A capability of the vendor's, and which of them the window is; where in it things are.
const VENDORS: u8 = 0x09;
const KIND: u8 = 3;
const WINDOW: u8 = 5;
const BAR: u8 = 4;
const OFFSET: u8 = 8;
const LENGTH: u8 = 12;
const DATA: u8 = 16;
/// Notifications in between.
const KICKS: u32 = 100;

pub(super) fn play<H: Honest>(honest: &mut H) -> Outcome {
    bar(honest)?;
    window(honest)
}

/// Where it is not, nothing is; back in its place it is what it was.
fn bar<H: Honest>(honest: &mut H) -> Outcome {
    /// Of other devices, of memory, of nothing.
    const ELSEWHERE: [u32; 6] = [
        0,
        0x20_0000,
        0xc000_0000,
        0xd000_0000,
        0xfee0_0000,
        u32::MAX,
    ];
    honest.up(0)?;
    let device = honest.device();
    let Device { function, .. } = device;
    let place: u32 = function.read(BAR_0);
    for (number, elsewhere) in (0..).zip(ELSEWHERE) {
        storm(honest);
        function.write(BAR_0, elsewhere);
        storm(honest);
        function.write(COMMAND, 0u16);
        same("the status of nothing", device.status(), u8::MAX).at("elsewhere", number)?;
        device.set_status(0);
        storm(honest);
        // The whole of it is the size.
        function.write(BAR_0, u32::MAX);
        let _size: u32 = function.read(BAR_0);
        function.write(COMMAND, COMMAND_ON);
        storm(honest);
        function.write(BAR_0, place);
        same("the place", function.read::<u32>(BAR_0), place).at("elsewhere", number)?;
        same("the status", device.status(), RUNNING).at("elsewhere", number)?;
        honest.ask().at("elsewhere", number)?;
    }
    Ok(())
}

fn storm<H: Honest>(honest: &mut H) {
    let device = honest.device();
    for ring in honest.rings() {
        device.kick_many(ring.number, ring.number, KICKS);
    }
}

/// Aimed at everything, in every width, at other BARs, and over the ends.
fn window<H: Honest>(honest: &mut H) -> Outcome {
    const OFFSETS: [u32; 14] = [
        0,
        1,
        2,
        QUEUE_SIZE as u32,
        0xffc,
        0xfff,
        0x1000,
        0x2000,
        0x3000,
        MSIX_TABLE as u32 + 1,
        0x7ffc,
        0x7fff,
        0x8000,
        u32::MAX,
    ];
    honest.up(0)?;
    let device = honest.device();
    let Device { function, .. } = device;
    let at = function.capability_with(VENDORS, |at| function.read::<u8>(at + KIND) == WINDOW)?;
    for bar in [0, 1, u8::MAX] {
        for offset in OFFSETS {
            for length in [0, 1, 2, 3, 4, u32::MAX] {
                aim(function, at, (bar, offset, length));
                function.write(at + DATA + 3, u8::MAX);
                let _any: u8 = function.read(at + DATA + 3);
                function.write(at + DATA, u32::MAX);
                let _any: u32 = function.read(at + DATA);
            }
        }
    }
    same("the status", device.status(), RUNNING)?;
    aim(function, at, (0, STATUS as u32, 1));
    same(
        "the status by the window",
        function.read::<u8>(at + DATA),
        RUNNING,
    )?;
    aim(function, at, (0, STATUS as u32, 4));
    let _cut: u32 = function.read(at + DATA);
    honest.ask()
}

fn aim(function: Function, window: u8, (bar, offset, length): (u8, u32, u32)) {
    function.write(window + BAR, bar);
    function.write(window + OFFSET, offset);
    function.write(window + LENGTH, length);
}
