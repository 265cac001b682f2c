//! Notifications without end: of queues that are there and not, of a device that runs and one that does not (catalogue B2.11, V9).
//! Whether the VMM answers its owner meanwhile, the host looks at.

use super::Honest;
use super::balloon::Balloon;
use super::rng::Rng;
use crate::report::{At, Outcome, same, say};
use crate::ring::writable;
use crate::virtio::{ACKNOWLEDGE, DRIVER, Device, FEATURES_OK, RUNNING};

/// Notifications of the queues of a device that runs, in all.
const KICKS: u32 = 10_000;
/// The same of each queue in each state in which it does not run.
const KICKS_OF_NOTHING: u32 = 200;
/// Notifications in a row before the driver asks something.
const BURST: u32 = 1_000;
/// Queues that the page of notifications has a place for.
const PLACES: u16 = 1024;

pub(super) fn play<H: Honest>(honest: &mut H) -> Outcome {
    running(honest)?;
    elsewhere(honest)?;
    not_running(honest)
}

/// Each burst is of all queues in turn, and after each the device still answers.
fn running<H: Honest>(honest: &mut H) -> Outcome {
    honest.up(0)?;
    for round in 0..KICKS / BURST {
        burst(honest, BURST);
        honest.ask().at("a burst", round.into())?;
    }
    Ok(())
}

fn burst<H: Honest>(honest: &mut H, kicks: u32) {
    let device = honest.device();
    let rings = honest.rings();
    let each = kicks / rings.len() as u32;
    for ring in rings {
        device.kick_many(ring.number, ring.number, each);
    }
}

/// Places of queues that are not there, and numbers that are not the place's. Each is an exit to the VMM.
fn elsewhere<H: Honest>(honest: &mut H) -> Outcome {
    let device = honest.device();
    for place in (0..64).chain((64..PLACES).step_by(60)) {
        device.kick(place);
    }
    for says in [1, 0x40, 0x7fff, 0xfffe, u16::MAX] {
        device.kick_many(0, says, KICKS_OF_NOTHING);
        device.kick_many(PLACES - 1, says, KICKS_OF_NOTHING / 10);
    }
    same("the status", device.status(), RUNNING)?;
    honest.ask()
}

/// From a reset up to the moment before it runs; what was notified then is nothing to it.
fn not_running<H: Honest>(honest: &mut H) -> Outcome {
    let (device, features) = (honest.device(), honest.features());
    device.reset()?;
    storm(honest, device);
    device.set_status(ACKNOWLEDGE);
    device.set_status(ACKNOWLEDGE | DRIVER);
    storm(honest, device);
    device.negotiate(features)?;
    storm(honest, device);
    honest.prepare(0)?;
    storm(honest, device);
    let agreed = ACKNOWLEDGE | DRIVER | FEATURES_OK;
    same("the status", device.status(), agreed)?;
    device.go()?;
    honest.ask()?;
    // One queue enabled, the others not: whether that is enough is the device's to say, and the storm is nothing to it.
    device.negotiate(features)?;
    let victim = honest.victim();
    victim.renew();
    device.queue(victim);
    device.set_status(RUNNING);
    storm(honest, device);
    device.reset()
}

fn storm<H: Honest>(honest: &mut H, device: Device) {
    for ring in honest.rings() {
        device.kick_many(ring.number, ring.number, KICKS_OF_NOTHING);
    }
}

/// Two devices of one event loop until the host ends it: one has all the work that it can have, the other is asked something now and then.
pub(super) fn for_ever() -> Outcome {
    const BUFFER: u64 = 0x3c0_0000;
    const BUFFER_BYTES: u32 = 64 * 1024;
    /// A place that no queue of the balloon has.
    const PLACE: u16 = 8;
    const KICKS: u32 = 500;
    /// After so many rounds, which are 100,000 notifications, the host is told.
    const ROUNDS: u32 = 100;
    let (mut rng, mut balloon) = (Rng::placed(PLACE)?, Balloon::new()?);
    rng.up(0)?;
    balloon.up(0)?;
    let device = rng.device();
    let work = rng.victim();
    for head in 0..work.size {
        work.chain(head, &[writable(BUFFER, BUFFER_BYTES)]);
        work.offer(head);
    }
    say(format_args!("ready"));
    let mut round = 0;
    loop {
        device.kick_many(0, 0, KICKS);
        // So that it never runs dry.
        for _ in 0..work.size {
            if let Some((head, _)) = work.take() {
                work.offer(head as u16);
            }
        }
        burst(&mut balloon, KICKS);
        device.kick(PLACES - 1);
        balloon.ask()?;
        round = ROUNDS.min(round) + 1;
        if round == ROUNDS {
            say(format_args!("stormed"));
        }
    }
}
