//! Queue settings: such as are no queue, and such as come after activation (catalogue B2.2, B2.10, V1, V2; CVE-2026-5747).

use super::Honest;
use crate::cpu::RAM;
use crate::report::{At, Outcome, same};
use crate::ring::Ring;
use crate::virtio::{
    DRIVER_FEATURE, DRIVER_FEATURE_SELECT, Device, FAILED, NEEDS_RESET, QUEUE_AVAILABLE,
    QUEUE_DESCRIPTORS, QUEUE_ENABLE, QUEUE_SELECT, QUEUE_SIZE, QUEUE_USED, RUNNING,
};

/// Where a part of a queue cannot be.
const PLACES: [u64; 10] = [
    0,
    RAM.end,
    RAM.end - 2,
    0xc000_0000 - 4, // the hole
    0xc000_8000,     // a BAR
    0xfee0_0000,     // the local APIC
    0x1_0000_0000,   // above the hole, where this machine has nothing
    1 << 52,
    u64::MAX - 1,
    !0xfff,
];

type Set = fn(&mut Ring, u64);

/// Settings that are no queue: the device asks for a reset as soon as it is to run, and is as new behind it.
pub(super) fn bad<H: Honest>(honest: &mut H) -> Outcome {
    let parts: [Set; 3] = [
        |ring, place| ring.descriptors = place,
        |ring, place| ring.available = place,
        |ring, place| ring.used = place,
    ];
    for (part, set) in (0u64..).zip(parts) {
        for (number, place) in (0u64..).zip(PLACES) {
            refused(honest, |ring| set(ring, place))
                .at("a part out of place", part << 8 | number)?;
        }
        refused(honest, |ring| {
            let odd = [ring.descriptors + 8, ring.available + 1, ring.used + 2];
            set(ring, odd[part as usize]);
        })
        .at("a part out of line", part)?;
    }
    let overlaps: [fn(&mut Ring); 4] = [
        |ring| ring.available = ring.descriptors,
        |ring| ring.used = ring.descriptors + 16,
        |ring| ring.used = ring.available + 4,
        |ring| ring.available = ring.descriptors + 16 * u64::from(ring.size) - 2,
    ];
    for (number, overlap) in (0..).zip(overlaps) {
        refused(honest, overlap).at("parts that overlap", number)?;
    }
    no_queue(honest)
}

/// One queue as `change` makes it, the others as they should be.
fn refused<H: Honest>(honest: &mut H, change: impl Fn(&mut Ring)) -> Outcome {
    let (device, features) = (honest.device(), honest.features());
    device.negotiate(features)?;
    let (first, others) = honest.rings().split_at_mut(1);
    let mut broken = first[0].clone();
    change(&mut broken);
    device.queue(&broken);
    for ring in others {
        device.queue(ring);
    }
    device.set_status(RUNNING);
    same("the status", device.status(), RUNNING | NEEDS_RESET)?;
    device.kick(0);
    // Nothing but a reset mends it.
    device.set_status(RUNNING);
    device.set_status(RUNNING | NEEDS_RESET);
    same("the status", device.status(), RUNNING | NEEDS_RESET)?;
    device.reset()
}

/// Without any queue no device of ours can work.
fn no_queue<H: Honest>(honest: &mut H) -> Outcome {
    let (device, features) = (honest.device(), honest.features());
    device.negotiate(features)?;
    device.set_status(RUNNING);
    same("the status", device.status(), RUNNING | NEEDS_RESET).at("no queue", 0)?;
    // Enabled too late.
    for ring in honest.rings() {
        device.queue(ring);
        device.kick(ring.number);
    }
    device.set_status(RUNNING | FAILED);
    device.reset()
}

/// Sizes that are none before a queue is enabled; and behind DRIVER_OK any setting at all.
pub(super) fn late<H: Honest>(honest: &mut H) -> Outcome {
    let (device, features) = (honest.device(), honest.features());
    let max = {
        device.reset()?;
        device.queue_max(0)
    };
    // Before FEATURES_OK there are no settings.
    device.choose(features)?;
    device.set(QUEUE_SIZE, 2u16);
    device.set(QUEUE_DESCRIPTORS, 0x1000u64);
    device.set(QUEUE_ENABLE, 1u16);
    same("the size", device.get::<u16>(QUEUE_SIZE), max).at("too early", 0)?;
    same("enabled", device.get::<u16>(QUEUE_ENABLE), 0u16).at("too early", 0)?;
    same("an address", device.get::<u64>(QUEUE_DESCRIPTORS), 0u64).at("too early", 0)?;
    device.negotiate(features)?;
    device.set(QUEUE_SELECT, 0u16);
    for size in [0, 3, max - 1, max + 1, 2 * max, 0x8001, u16::MAX] {
        device.set(QUEUE_SIZE, size);
        same("the size", device.get::<u16>(QUEUE_SIZE), max).at("no size", size.into())?;
    }
    for enable in [0, 2, u16::MAX] {
        device.set(QUEUE_ENABLE, enable);
        same("enabled", device.get::<u16>(QUEUE_ENABLE), 0u16).at("no enable", enable.into())?;
    }
    honest.up(0)?;
    attack(honest, device)?;
    honest.ask()?;
    attack(honest, device)
}

fn attack<H: Honest>(honest: &mut H, device: Device) -> Outcome {
    for ring in honest.rings() {
        device.set(QUEUE_SELECT, ring.number);
        let number = u64::from(ring.number);
        for size in [0u16, 1, 2, 0x8000, u16::MAX] {
            device.set(QUEUE_SIZE, size);
        }
        for enable in [0u16, 1, 2] {
            device.set(QUEUE_ENABLE, enable);
        }
        for (offset, address) in [
            (QUEUE_DESCRIPTORS, ring.descriptors),
            (QUEUE_AVAILABLE, ring.available),
            (QUEUE_USED, ring.used),
        ] {
            device.set(offset, 0u32);
            device.set(offset + 4, u32::MAX);
            device.set(offset, u64::MAX);
            same("an address", device.get::<u64>(offset), address).at("queue", number)?;
        }
        same("the size", device.get::<u16>(QUEUE_SIZE), ring.size).at("queue", number)?;
        same("enabled", device.get::<u16>(QUEUE_ENABLE), 1u16).at("queue", number)?;
    }
    for select in [0u32, 1] {
        device.set(DRIVER_FEATURE_SELECT, select);
        let before: u32 = device.get(DRIVER_FEATURE);
        device.set(DRIVER_FEATURE, !before);
        same("the features", device.get::<u32>(DRIVER_FEATURE), before)?;
    }
    same("the status", device.status(), RUNNING)
}
