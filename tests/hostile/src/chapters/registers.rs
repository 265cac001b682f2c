//! Every register at every width and offset, in a device that runs: what may not be written keeps its value, what is nothing
//! reads as nothing, and the device goes on (catalogue B2.7 to B2.9, V12, V13).

use super::Honest;
use crate::cpu::Number;
use crate::report::{At, Outcome, same};
use crate::virtio::{
    BAR_BYTES, COMMON_BYTES, CONFIG, CONFIG_VECTOR, DEVICE_FEATURE_SELECT, DRIVER_FEATURE_SELECT,
    Device, ISR, MSIX_PENDING, MSIX_TABLE, NUM_QUEUES, QUEUE_AVAILABLE, QUEUE_DESCRIPTORS,
    QUEUE_ENABLE, QUEUE_SELECT, QUEUE_SIZE, QUEUE_USED, QUEUE_VECTOR, RUNNING, STATUS,
};

/// Queues that are asked for, besides those that are there.
const SELECTS: [u16; 6] = [0x40, 0xff, 0x7fff, 0x8000, 0xfffe, 0xffff];
/// Bytes at the beginning of each page that are looked at one by one; nothing of a device is longer.
const PAGE_HEAD_BYTES: u64 = 0x48;
const PAGE_BYTES: u64 = 0x1000;

pub(super) fn play<H: Honest>(honest: &mut H) -> Outcome {
    honest.up(0)?;
    let device = honest.device();
    selects(device)?;
    let before = Settings::of(honest);
    // Ends and beginnings of pages, and accesses over them.
    for page in 0..BAR_BYTES / PAGE_BYTES {
        for at in 0..PAGE_HEAD_BYTES {
            everything(device, page * PAGE_BYTES + at);
        }
        for at in PAGE_BYTES - 9..PAGE_BYTES {
            everything(device, page * PAGE_BYTES + at);
        }
    }
    same("the status", device.status(), RUNNING)?;
    before.unchanged(honest)?;
    // Kicks were among it; nothing waits in the queues, so nothing came of them.
    honest.ask()
}

/// Writes and reads one offset in each width. Left out is what would end the chapter: the status, which has one of its own.
fn everything(device: Device, offset: u64) {
    widths(device, offset, u8::MAX);
    widths(device, offset, u16::MAX);
    widths(device, offset, u32::MAX);
    widths(device, offset, u64::MAX);
}

fn widths<T: Number>(device: Device, offset: u64, value: T) {
    let last = offset + size_of::<T>() as u64;
    if last > BAR_BYTES {
        // The next device's.
        return;
    }
    if (offset, size_of::<T>()) != (STATUS, 1) {
        device.set(offset, value);
    }
    let _anything: T = device.get(offset);
}

/// A queue that is not there has no size, no vector, and takes nothing.
fn selects(device: Device) -> Outcome {
    let queues: u16 = device.get(NUM_QUEUES);
    for select in SELECTS.into_iter().chain([queues, queues + 1]) {
        device.set(QUEUE_SELECT, select);
        for (offset, value) in [(QUEUE_SIZE, 8u16), (QUEUE_VECTOR, 0), (QUEUE_ENABLE, 1)] {
            device.set(offset, value);
        }
        for offset in [QUEUE_DESCRIPTORS, QUEUE_AVAILABLE, QUEUE_USED] {
            device.set(offset, u64::MAX);
            same("an address", device.get::<u64>(offset), 0u64).at("no queue", select.into())?;
        }
        let number = u64::from(select);
        same("the size", device.get::<u16>(QUEUE_SIZE), 0u16).at("no queue", number)?;
        same("the vector", device.get::<u16>(QUEUE_VECTOR), 0xffffu16).at("no queue", number)?;
        same("enabled", device.get::<u16>(QUEUE_ENABLE), 0u16).at("no queue", number)?;
    }
    Ok(())
}

/// What must not change.
struct Settings {
    queues: u16,
    config: [u8; 64],
}

impl Settings {
    fn of<H: Honest>(honest: &H) -> Settings {
        let device = honest.device();
        let mut config = [0; 64];
        for (at, byte) in (CONFIG..).zip(&mut config) {
            *byte = device.get(at);
        }
        Settings {
            queues: device.get(NUM_QUEUES),
            config,
        }
    }

    fn unchanged<H: Honest>(&self, honest: &mut H) -> Outcome {
        let device = honest.device();
        same(
            "the number of queues",
            device.get::<u16>(NUM_QUEUES),
            self.queues,
        )?;
        let drivers = honest.writable_config();
        let config = (0..).zip(self.config);
        for (at, byte) in config.filter(|(at, _)| !drivers.contains(at)) {
            let at = CONFIG + at;
            same("a byte of the configuration", device.get::<u8>(at), byte).at("offset", at)?;
        }
        for ring in honest.rings() {
            let number = u64::from(ring.number);
            device.set(QUEUE_SELECT, ring.number);
            same("the size", device.get::<u16>(QUEUE_SIZE), ring.size).at("queue", number)?;
            same("enabled", device.get::<u16>(QUEUE_ENABLE), 1u16).at("queue", number)?;
            for (offset, address) in [
                (QUEUE_DESCRIPTORS, ring.descriptors),
                (QUEUE_AVAILABLE, ring.available),
                (QUEUE_USED, ring.used),
            ] {
                same("an address", device.get::<u64>(offset), address).at("queue", number)?;
            }
        }
        // Vectors are no settings of a queue and may change; those that there are not read as none.
        device.set(CONFIG_VECTOR, 0xfffeu16);
        same("the vector", device.get::<u16>(CONFIG_VECTOR), 0xffffu16)?;
        // What is beyond the registers, and what has no bits.
        same("nothing", device.get::<u64>(COMMON_BYTES), 0u64)?;
        same("nothing", device.get::<u64>(ISR + 8), 0u64)?;
        same("nothing", device.get::<u64>(BAR_BYTES - 8), 0u64)?;
        same("nothing", device.get::<u64>(MSIX_PENDING + 0x800), 0u64)?;
        same("nothing", device.get::<u64>(MSIX_TABLE + 0xff0), 0u64)?;
        same(
            "nothing",
            device.get::<u64>(DEVICE_FEATURE_SELECT + 0x38),
            0u64,
        )?;
        device.set(DRIVER_FEATURE_SELECT, 2u32);
        same(
            "nothing",
            device.get::<u32>(DRIVER_FEATURE_SELECT + 4),
            0u32,
        )
    }
}
