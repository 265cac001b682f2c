//! The status machine in every order, and features that nobody offered (virtio 1.2 sections 2.1, 2.2, 3.1.1; catalogue B2.3, V10,
//! V11).

use super::Honest;
use crate::report::{At, Outcome, same};
use crate::virtio::{
    ACKNOWLEDGE, DRIVER, DRIVER_FEATURE, DRIVER_FEATURE_SELECT, DRIVER_OK, Device, F_VERSION_1,
    FAILED, FEATURES_OK, NEEDS_RESET, RUNNING,
};

/// The ways from a reset to a running device.
const STEPS: [u8; 5] = [
    0,
    ACKNOWLEDGE,
    ACKNOWLEDGE | DRIVER,
    ACKNOWLEDGE | DRIVER | FEATURES_OK,
    RUNNING,
];
/// Statuses worth a try from everywhere: each bit, each sum of neighbours, all.
const TRIES: [u8; 20] = [
    0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0f, 0x10, 0x1f, 0x20,
    0x40, 0x80, 0x8f, 0xff,
];

pub(super) fn play<H: Honest>(honest: &mut H) -> Outcome {
    let device = honest.device();
    features(device, honest.features())?;
    for (number, step) in (0u64..).zip(STEPS) {
        for value in TRIES {
            to(honest, step).at("the way to a status", number)?;
            device.set_status(value);
            let expected = next(step, value);
            let case = number << 8 | u64::from(value);
            same("the status", device.status(), expected).at("status and write", case)?;
            if expected & FAILED != 0 {
                device.set_status(RUNNING);
                same("the status", device.status(), expected).at("a failed driver", case)?;
            }
        }
    }
    // The bits one by one, each alone: nothing of it is a way to a running device.
    device.reset()?;
    for bit in (0..8).rev() {
        device.set_status(1 << bit);
    }
    same("running", device.status() & DRIVER_OK, 0u8).at("single bits", 0)?;
    device.reset()?;
    for _ in 0..100 {
        device.set_status(0);
    }
    same("the status", device.status(), 0u8).at("resets of nothing", 0)
}

/// What section 3.1.1 makes of a write: one step forward, giving up, or nothing. DEVICE_NEEDS_RESET is the device's own.
fn next(old: u8, value: u8) -> u8 {
    let value = value & !NEEDS_RESET;
    let step = STEPS.windows(2).any(|pair| pair == [old, value]);
    let gives_up = value == old | FAILED;
    if step || gives_up { value } else { old }
}

fn to<H: Honest>(honest: &mut H, status: u8) -> Outcome {
    let device = honest.device();
    match status {
        RUNNING => honest.up(0)?,
        // With all queues, for a write of DRIVER_OK is among the tries.
        _ if status & FEATURES_OK != 0 => honest.prepare(0)?,
        0 => device.reset()?,
        ACKNOWLEDGE => {
            device.reset()?;
            device.set_status(status);
        }
        _ => device.choose(honest.features() | F_VERSION_1)?,
    }
    same("the status", device.status(), status)
}

/// What is not offered, or is no modern driver's, is not agreed on.
fn features(device: Device, own: u64) -> Outcome {
    let offered = device.offered();
    let refused = [
        0,
        own,
        F_VERSION_1 | 1 << 63,
        F_VERSION_1 | 1 << 24,
        u64::MAX,
        (offered | 1 << 63) & !F_VERSION_1,
    ];
    for (number, features) in (0..).zip(refused) {
        device.choose(features)?;
        device.set_status(STEPS[3]);
        same("the status", device.status(), STEPS[2]).at("features", number)?;
    }
    // Beyond the 64th.
    device.choose(F_VERSION_1)?;
    device.set(DRIVER_FEATURE_SELECT, 2u32);
    device.set(DRIVER_FEATURE, 1u32);
    device.set_status(STEPS[3]);
    same("the status", device.status(), STEPS[2]).at("feature 64", 0)?;
    // After they are agreed on.
    device.negotiate(0)?;
    for select in [0u32, 1, 2, u32::MAX] {
        device.set(DRIVER_FEATURE_SELECT, select);
        device.set(DRIVER_FEATURE, u32::MAX);
        let expected = if select == 1 { 1u32 } else { 0 };
        let case = u64::from(select);
        same("the features", device.get::<u32>(DRIVER_FEATURE), expected).at("late", case)?;
    }
    Ok(())
}
