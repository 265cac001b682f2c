//! Hotplugged memory (virtio 1.2 section 5.15) of some blocks, of which the guest may have the first half.

use super::{COMMON_COUNT, Honest, Named, chapters_of, queues};
use crate::cpu::{peek, poke};
use crate::report::{At, Outcome, same};
use crate::ring::{Descriptor, Ring, readable, writable};
use crate::virtio::{CONFIG, Device};

const TYPE: u16 = 24;
const REQUEST: u64 = 0x60_0000;
const RESPONSE: u64 = 0x60_0100;
const REQUEST_BYTES: u32 = 24;
const RESPONSE_BYTES: u32 = 10;

/// Requests.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
/// Answers.
const ACK: u16 = 0;
const NACK: u16 = 1;
const ERROR: u16 = 3;
/// States.
const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;
const NOTHING: u64 = 0x5555_aaaa_5555_aaaa;

const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

pub(crate) struct Mem {
    device: Device,
    rings: [Ring; 1],
    /// Of the region, in bytes.
    block: u64,
    start: u64,
    size: u64,
    /// What the guest may have.
    requested: u64,
}

pub(super) const CHAPTERS: [Named<Mem>; COMMON_COUNT + 5] = chapters_of!(
    Mem,
    &[
        ("requests that are none", requests),
        ("blocks that are not there or not plugged", blocks),
        ("memory that is not plugged", unplugged),
        ("plugged and unplugged without end", again),
        ("resets in the middle of a request", interrupted),
    ]
);

impl Mem {
    pub(super) fn new() -> Outcome<Mem> {
        let device = Device::find(TYPE)?;
        Ok(Mem {
            device,
            rings: queues(),
            block: device.get(CONFIG),
            start: device.get(CONFIG + 16),
            size: device.get(CONFIG + 24),
            requested: device.get(CONFIG + 48),
        })
    }

    fn put(kind: u16, address: u64, blocks: u16) {
        poke(REQUEST, u64::from(kind));
        poke(REQUEST + 8, address);
        poke(REQUEST + 16, u64::from(blocks));
    }

    /// Sends a chain; the bytes of its answer.
    fn send(&mut self, chain: &[Descriptor]) -> Outcome<u32> {
        poke(RESPONSE, NOTHING);
        poke(RESPONSE + 8, NOTHING);
        self.rings[0].chain(0, chain);
        self.rings[0].offer(0);
        self.device.kick(0);
        let (head, bytes) = self.device.answer(&mut self.rings[0])?;
        same("the head of an answer", head, 0u32)?;
        Ok(bytes)
    }

    /// A request and its answer.
    fn request(&mut self, kind: u16, address: u64, blocks: u16) -> Outcome<u16> {
        Mem::put(kind, address, blocks);
        let chain = [
            readable(REQUEST, REQUEST_BYTES),
            writable(RESPONSE, RESPONSE_BYTES),
        ];
        let bytes = self.send(&chain)?;
        same("bytes written", bytes, RESPONSE_BYTES)?;
        Ok(peek(RESPONSE))
    }

    fn wants(&mut self, kind: u16, first: u64, blocks: u16, answer: u16) -> Outcome {
        let address = self.start.wrapping_add(first.wrapping_mul(self.block));
        same("the answer", self.request(kind, address, blocks)?, answer)
            .at("a request", u64::from(kind) << 32 | first)
    }

    fn state(&mut self, first: u64, blocks: u16, state: u16) -> Outcome {
        self.wants(STATE, first, blocks, ACK)?;
        same("the state", peek::<u16>(RESPONSE + 8), state).at("blocks from", first)
    }

    fn plugged(&self, bytes: u64) -> Outcome {
        same("plugged", self.device.get::<u64>(CONFIG + 40), bytes)
    }

    /// Blocks that there are, and that it may have.
    fn counts(&self) -> (u64, u64) {
        (self.size / self.block, self.requested / self.block)
    }
}

impl Honest for Mem {
    fn device(&self) -> Device {
        self.device
    }

    fn features(&self) -> u64 {
        F_UNPLUGGED_INACCESSIBLE
    }

    fn rings(&mut self) -> &mut [Ring] {
        &mut self.rings
    }

    /// A block is plugged, and then it is not.
    fn ask(&mut self) -> Outcome {
        self.state(0, 1, UNPLUGGED)?;
        self.wants(PLUG, 0, 1, ACK)?;
        self.state(0, 1, PLUGGED)?;
        self.plugged(self.block)?;
        self.wants(UNPLUG, 0, 1, ACK)?;
        self.state(0, 1, UNPLUGGED)?;
        self.plugged(0)
    }
}

/// Types that nobody knows, requests that are not whole, and no room for the answer.
fn requests(mem: &mut Mem) -> Outcome {
    mem.recovers()?;
    for kind in [4, 5, 0xff, 0x100, 0x8000, u16::MAX] {
        mem.wants(kind, 0, 1, ERROR)?;
    }
    Mem::put(PLUG, mem.start, 1);
    for bytes in [1, 8, REQUEST_BYTES - 1] {
        let chain = [readable(REQUEST, bytes), writable(RESPONSE, RESPONSE_BYTES)];
        same("bytes written", mem.send(&chain)?, RESPONSE_BYTES)?;
        same("the answer", peek::<u16>(RESPONSE), ERROR).at("bytes", bytes.into())?;
    }
    let bytes = mem.send(&[writable(RESPONSE, RESPONSE_BYTES)])?;
    same("bytes written", bytes, RESPONSE_BYTES)?;
    same("the answer", peek::<u16>(RESPONSE), ERROR).at("no request", 0)?;
    for room in [1, 2, RESPONSE_BYTES - 1] {
        let chain = [readable(REQUEST, REQUEST_BYTES), writable(RESPONSE, room)];
        same("bytes written", mem.send(&chain)?, 0u32).at("room", room.into())?;
        same("the answer", peek::<u64>(RESPONSE), NOTHING).at("room", room.into())?;
    }
    let bytes = mem.send(&[readable(REQUEST, REQUEST_BYTES)])?;
    same("bytes written", bytes, 0u32).at("no room", 0)?;
    // Nothing of it was done, for the driver would not know.
    mem.state(0, 1, UNPLUGGED)?;
    let chain = [
        readable(REQUEST, 16 << 20),
        writable(RESPONSE, RESPONSE_BYTES),
    ];
    Mem::put(STATE, mem.start, 1);
    same("bytes written", mem.send(&chain)?, RESPONSE_BYTES).at("a long one", 0)
}

/// Beyond the region on either side, between blocks, plugged twice, more than the guest was asked to have (V17).
fn blocks(mem: &mut Mem) -> Outcome {
    mem.recovers()?;
    let (all, may) = mem.counts();
    let (start, end) = (mem.start, mem.start + mem.size);
    for kind in [PLUG, UNPLUG, STATE] {
        for (number, (address, blocks)) in (0..).zip([
            (0, 1),
            (start - mem.block, 1),
            (start - mem.block, 2),
            (start - 1, 1),
            (start + 1, 1),
            (start + mem.block / 2, 1),
            (start, 0),
            (start, all as u16 + 1),
            (start, u16::MAX),
            (end - mem.block, 2),
            (end, 1),
            (end, 0),
            (1 << 63, 1),
            (u64::MAX, 1),
            (!(mem.block - 1), u16::MAX),
        ]) {
            let answer = mem.request(kind, address, blocks)?;
            let case = u64::from(kind) << 32 | number;
            same("the answer", answer, ERROR).at("no blocks", case)?;
        }
    }
    for first in 0..all {
        mem.wants(UNPLUG, first, 1, ERROR)?;
    }
    mem.wants(PLUG, 0, all as u16, NACK)?;
    mem.wants(PLUG, 0, may as u16 + 1, NACK)?;
    mem.wants(PLUG, all - may, may as u16, ACK)?;
    mem.wants(PLUG, 0, 1, NACK)?;
    mem.plugged(mem.requested)?;
    mem.wants(PLUG, all - 1, 1, ERROR)?;
    mem.wants(PLUG, all - may - 1, 2, ERROR)?;
    mem.wants(UNPLUG, all - may - 1, 2, ERROR)?;
    mem.state(0, all as u16, MIXED)?;
    mem.wants(UNPLUG_ALL, u64::MAX / 2, u16::MAX, ACK)?;
    mem.state(0, all as u16, UNPLUGGED)?;
    mem.wants(UNPLUG_ALL, 0, 0, ACK)?;
    mem.plugged(0)
}

/// A device reaches a block while it is plugged, and only then; a reset changes nothing of that.
fn unplugged(mem: &mut Mem) -> Outcome {
    mem.recovers()?;
    let answer_in = |at| {
        [
            readable(REQUEST, REQUEST_BYTES),
            writable(at, RESPONSE_BYTES),
        ]
    };
    mem.wants(PLUG, 0, 1, ACK)?;
    mem.up(0)?;
    mem.state(0, 1, PLUGGED)?;
    let last = mem.start + mem.block - u64::from(RESPONSE_BYTES);
    for at in [mem.start, last] {
        same("bytes written", mem.send(&answer_in(at))?, RESPONSE_BYTES)?;
    }
    let (start, block) = (mem.start, mem.block);
    for (number, at) in (0..).zip([last + 1, start + block, start + block - 1]) {
        mem.up(0)?;
        Mem::put(UNPLUG, start, 1);
        mem.rings[0].chain(0, &answer_in(at));
        mem.rings[0].offer(0);
        mem.device.kick(0);
        mem.device.gave_up().at("beyond the block", number)?;
    }
    mem.up(0)?;
    mem.state(0, 1, PLUGGED)?;
    // The block that the answer is to be in goes by the same request.
    Mem::put(UNPLUG, start, 1);
    mem.rings[0].chain(0, &answer_in(start));
    mem.rings[0].offer(0);
    mem.device.kick(0);
    let _either = mem.device.answer(&mut mem.rings[0]);
    mem.up(0)?;
    mem.wants(UNPLUG_ALL, 0, 0, ACK)?;
    mem.rings[0].chain(0, &answer_in(start));
    mem.rings[0].offer(0);
    mem.device.kick(0);
    mem.device.gave_up().at("a block that is gone", 0)
}

/// Slots and pages come and go.
fn again(mem: &mut Mem) -> Outcome {
    const ROUNDS: u64 = 20;
    mem.recovers()?;
    let (all, may) = mem.counts();
    for round in 0..ROUNDS {
        let first = round % (all - may + 1);
        mem.wants(PLUG, first, may as u16, ACK).at("round", round)?;
        match round % 2 {
            0 => mem.wants(UNPLUG, first, may as u16, ACK)?,
            _ => mem.wants(UNPLUG_ALL, 0, 0, ACK)?,
        }
    }
    mem.plugged(0)
}

/// What was asked for is done or not, and done as a whole.
fn interrupted(mem: &mut Mem) -> Outcome {
    const ROUNDS: u64 = 100;
    let (_, may) = mem.counts();
    mem.recovers()?;
    for round in 0..ROUNDS {
        let kind = if round % 2 == 0 { PLUG } else { UNPLUG_ALL };
        Mem::put(kind, mem.start, may as u16);
        let chain = [
            readable(REQUEST, REQUEST_BYTES),
            writable(RESPONSE, RESPONSE_BYTES),
        ];
        mem.rings[0].chain(0, &chain);
        mem.rings[0].offer(0);
        mem.device.kick(0);
        mem.device.reset().at("round", round)?;
        mem.up(0)?;
        let plugged: u64 = mem.device.get(CONFIG + 40);
        let whole = plugged == 0 || plugged == may * mem.block;
        same("plugged as a whole", whole, true).at("round", round)?;
    }
    mem.wants(UNPLUG_ALL, 0, 0, ACK)?;
    mem.recovers()
}
