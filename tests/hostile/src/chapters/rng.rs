//! The entropy device (virtio 1.2 section 5.4): one queue of buffers to be filled.

use super::{COMMON_COUNT, Honest, Named, QUEUE_SIZE, chapters_of, impossible, queues};
use crate::cpu::{peek, poke};
use crate::report::{At, Outcome, same};
use crate::ring::{Ring, readable, writable};
use crate::virtio::{Device, F_INDIRECT};

const TYPE: u16 = 4;
const BUFFER: u64 = 0x60_0000;
/// The most that one request gets, in bytes: the device's own bound.
const ANSWER_MAX_BYTES: u32 = 64 * 1024;

pub(crate) struct Rng {
    device: Device,
    rings: [Ring; 1],
}

pub(super) const CHAPTERS: [Named<Rng>; COMMON_COUNT + 2] = chapters_of!(
    Rng,
    &[
        ("buffers without end", length_bombs),
        ("buffers that cannot be filled", not_fillable),
    ]
);

impl Rng {
    pub(super) fn new() -> Outcome<Rng> {
        Ok(Rng {
            device: Device::find(TYPE)?,
            rings: queues(),
        })
    }

    /// With its queue in another place, beside another device.
    pub(super) fn placed(place: u16) -> Outcome<Rng> {
        Ok(Rng {
            device: Device::find(TYPE)?,
            rings: [Ring::placed(place, 0, QUEUE_SIZE)],
        })
    }

    fn fill(&mut self) -> Outcome<u32> {
        self.rings[0].offer(0);
        self.device.kick(0);
        let (head, bytes) = self.device.answer(&mut self.rings[0])?;
        same("the head of an answer", head, 0u32)?;
        Ok(bytes)
    }
}

impl Honest for Rng {
    fn device(&self) -> Device {
        self.device
    }

    fn rings(&mut self) -> &mut [Ring] {
        &mut self.rings
    }

    fn ask(&mut self) -> Outcome {
        const WORDS: u64 = 4;
        for word in 0..WORDS {
            poke::<u64>(BUFFER + 8 * word, 0);
        }
        self.rings[0].chain(0, &[writable(BUFFER, 8 * WORDS as u32)]);
        same("random bytes", self.fill()?, 8 * WORDS as u32)?;
        // Four words of zeroes come once in 2^256 answers.
        match (0..WORDS).any(|word| peek::<u64>(BUFFER + 8 * word) != 0) {
            true => Ok(()),
            false => impossible("no random bytes came"),
        }
    }
}

/// Hundreds of MiB in one chain, and the same bytes over and over (FC 4392a8d19).
fn length_bombs(rng: &mut Rng) -> Outcome {
    const HUGE: u32 = 32 << 20;
    let size = rng.rings[0].size;
    rng.up(F_INDIRECT)?;
    rng.rings[0].chain(0, &[writable(BUFFER, HUGE)]);
    same("bytes", rng.fill()?, ANSWER_MAX_BYTES).at("one huge buffer", 0)?;
    let huge = [writable(BUFFER, HUGE); 8];
    rng.rings[0].chain(0, &huge[..usize::from(size)]);
    same("bytes", rng.fill()?, ANSWER_MAX_BYTES).at("a chain of huge buffers", 0)?;
    // All entries are that chain.
    const ROUNDS: u64 = 4;
    for round in 0..ROUNDS {
        for _ in 0..size {
            rng.rings[0].offer(0);
        }
        rng.device.kick(0);
        for _ in 0..size {
            let (_, bytes) = rng.device.answer(&mut rng.rings[0])?;
            same("bytes", bytes, ANSWER_MAX_BYTES).at("the same chain many times", round)?;
        }
    }
    rng.rings[0].chain(0, &[writable(BUFFER, 1)]);
    same("bytes", rng.fill()?, 1u32).at("one byte", 0)
}

/// Only readable buffers, and readable ones before the writable ones.
fn not_fillable(rng: &mut Rng) -> Outcome {
    rng.up(0)?;
    rng.rings[0].chain(0, &[readable(BUFFER, 64)]);
    same("bytes", rng.fill()?, 0u32).at("nothing to write to", 0)?;
    rng.rings[0].chain(0, &[readable(BUFFER, 64), writable(BUFFER, 16)]);
    same("bytes", rng.fill()?, 16u32).at("some to write to", 0)
}
