//! A network card (virtio 1.2 section 5.1) with two pairs of queues, on a link whose other end answers ARP.

use super::{COMMON_COUNT, Honest, Named, chapters_of, queues, rings};
use crate::cpu::{Patience, peek, poke};
use crate::report::{At, Outcome, Why, same, say};
use crate::ring::{Descriptor, Ring, readable, writable};
use crate::virtio::{Device, RUNNING, leave};

const TYPE: u16 = 1;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const CONTROL: usize = 4;
/// Where packets come to, a page each, where one goes from, and a command with its answer.
const RECEIVED: u64 = 0x60_0000;
const SENT: u64 = 0x62_0000;
const COMMAND: u64 = 0x60_f000;
const ACK: u64 = 0x60_f800;

const F_MRG_RXBUF: u64 = 1 << 15;
const F_CTRL_VQ: u64 = 1 << 17;
const F_MQ: u64 = 1 << 22;

/// `struct virtio_net_hdr_v1`, and where in it things are.
const HEADER: u64 = 12;
const NUM_BUFFERS: u64 = 10;
/// Ethernet and ARP.
const FRAME: [u8; 42] = [
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 7, 8, 6, // to all, from us
    0, 1, 8, 0, 6, 4, 0, 1, // who has?
    2, 0, 0, 0, 0, 7, 10, 9, 0, 2, // we
    0, 0, 0, 0, 0, 0, 10, 9, 0, 1, // the host
];
const PACKET_BYTES: u32 = HEADER as u32 + FRAME.len() as u32;
/// What makes an answer of a frame, from its type on: ARP, a reply, from the host.
const ANSWER: [(u64, u16); 4] = [(12, 0x0608), (20, 0x0200), (28, 0x090a), (30, 0x0100)];
const BUFFER_BYTES: u32 = 2048;
/// The host may lose a packet when it has too many.
const TRIES: u32 = 20;
const TRY_LOOKS: u32 = 20_000;
/// Looks until nothing comes of what nothing can come of.
const SILENCE_LOOKS: u32 = 500;

pub(crate) struct Net {
    device: Device,
    rings: [Ring; 5],
    victim: usize,
}

pub(super) const CHAPTERS: [Named<Net>; COMMON_COUNT + 6] = chapters_of!(
    Net,
    &[
        ("no chain to receive to", received),
        ("packets that are none", packets),
        ("headers of no sense", headers),
        ("buffers too small to receive to", buffers),
        ("commands that are none", commands),
        ("a flood that nobody takes", flood),
    ]
);

impl Net {
    pub(super) fn new() -> Outcome<Net> {
        Ok(Net {
            device: Device::find(TYPE)?,
            rings: queues(),
            victim: TRANSMIT,
        })
    }

    /// Writes a packet that asks who the host is, behind a header of these six words.
    fn question(header: [u16; 6]) {
        for (at, word) in (SENT..).step_by(2).zip(header) {
            poke(at, word);
        }
        for (at, byte) in (SENT + HEADER..).zip(FRAME) {
            poke(at, byte);
        }
    }

    /// Sends a chain; its answer has to come, whatever comes of it.
    fn send(&mut self, chain: &[Descriptor]) -> Outcome {
        let ring = &mut self.rings[TRANSMIT];
        ring.chain(0, chain);
        ring.offer(0);
        self.device.kick(TRANSMIT as u16);
        let (head, written) = self.device.answer(&mut self.rings[TRANSMIT])?;
        same("the head of an answer", head, 0u32)?;
        same("bytes written of what is sent", written, 0u32)
    }

    /// Lends buffers of this size to the device, as many as there are entries.
    fn lend(&mut self, bytes: u32) {
        let ring = &mut self.rings[RECEIVE];
        for head in 0..ring.size {
            let page = RECEIVED + 0x1000 * u64::from(head);
            ring.chain(head, &[writable(page, bytes)]);
            ring.offer(head);
        }
        self.device.kick(RECEIVE as u16);
    }

    /// A command and its answer.
    fn command(&mut self, chain: &[Descriptor]) -> Outcome<u8> {
        poke(ACK, 0xffu8);
        let ring = &mut self.rings[CONTROL];
        ring.chain(0, chain);
        ring.offer(0);
        self.device.kick(CONTROL as u16);
        self.device.answer(&mut self.rings[CONTROL])?;
        Ok(peek(ACK))
    }
}

impl Honest for Net {
    fn device(&self) -> Device {
        self.device
    }

    fn features(&self) -> u64 {
        F_MRG_RXBUF | F_CTRL_VQ | F_MQ
    }

    fn rings(&mut self) -> &mut [Ring] {
        &mut self.rings
    }

    fn victim(&mut self) -> &mut Ring {
        &mut self.rings[self.victim]
    }

    /// Who has the host's address?
    fn ask(&mut self) -> Outcome {
        if self.rings[RECEIVE].offered == 0 {
            self.lend(BUFFER_BYTES);
        }
        Net::question([0; 6]);
        for _ in 0..TRIES {
            self.send(&[readable(SENT, PACKET_BYTES)])?;
            let mut patience = Patience::looks(TRY_LOOKS);
            while patience.lasts() {
                let Some((head, bytes)) = self.rings[RECEIVE].take() else {
                    leave();
                    continue;
                };
                let head = head as u16 % self.rings[RECEIVE].size;
                let packet = RECEIVED + 0x1000 * u64::from(head);
                let frame = packet + HEADER;
                let is_it = ANSWER
                    .iter()
                    .all(|(at, value)| peek::<u16>(frame + at) == *value);
                // So that the next is told from this one.
                poke(frame + 12, 0u16);
                self.rings[RECEIVE].offer(head);
                self.device.kick(RECEIVE as u16);
                if is_it && bytes >= PACKET_BYTES {
                    return same("buffers", peek::<u16>(packet + NUM_BUFFERS), 1u16);
                }
            }
        }
        same("the status", self.device.status(), RUNNING)?;
        Err(Why::new("nobody answers"))
    }
}

/// As what is to be sent, and the other way round.
fn received(net: &mut Net) -> Outcome {
    net.victim = RECEIVE;
    let outcome = rings::direct(net).and_then(|()| rings::indirect(net));
    net.victim = TRANSMIT;
    outcome
}

/// No header, no frame, too much of everything, and to be written where nothing is.
fn packets(net: &mut Net) -> Outcome {
    const LARGEST: u32 = 65_535 + 18 + HEADER as u32;
    net.up(0)?;
    Net::question([0; 6]);
    for bytes in [
        1,
        HEADER as u32 - 1,
        HEADER as u32,
        HEADER as u32 + 1,
        HEADER as u32 + 13,
        HEADER as u32 + 14,
        0x1_0000,
        LARGEST,
        LARGEST + 1,
        16 << 20,
    ] {
        net.send(&[readable(SENT, bytes)])
            .at("bytes", bytes.into())?;
    }
    let size = usize::from(net.rings[TRANSMIT].size);
    let huge = [readable(SENT, 16 << 20); 8];
    net.send(&huge[..size]).at("as much as there can be", 0)?;
    let crumbs = [readable(SENT, 1); 8];
    net.send(&crumbs[..size]).at("crumbs", 0)?;
    net.send(&[writable(RECEIVED, 64)])
        .at("nothing to send", 0)?;
    let mixed = [readable(SENT, PACKET_BYTES), writable(RECEIVED, 64)];
    net.send(&mixed).at("something to write to", 0)?;
    net.ask()
}

/// Offloads that were not agreed on, at places that are not there.
fn headers(net: &mut Net) -> Outcome {
    const FLAGS_AND_TYPES: [u16; 10] = [
        0x0001, 0x0101, 0x0301, 0x0401, 0x0501, 0x8101, 0x0002, 0x0004, 0xff00, 0xffff,
    ];
    const LENGTHS: [u16; 4] = [0, 1, 0x8000, u16::MAX];
    const FRAME_BYTES: u32 = 1_200;
    net.up(0)?;
    for kind in FLAGS_AND_TYPES {
        for length in LENGTHS {
            for size in LENGTHS {
                let case = u64::from(kind) << 32 | u64::from(length) << 16 | u64::from(size);
                // Header length, segment size, checksum's start and place, number of buffers.
                Net::question([kind, length, size, length, size, length]);
                net.send(&[readable(SENT, HEADER as u32 + FRAME_BYTES)])
                    .at("a header", case)?;
            }
        }
    }
    net.ask()
}

/// Buffers of a byte, of a part of a packet, and such as cannot be written.
fn buffers(net: &mut Net) -> Outcome {
    net.up(0)?;
    let question = [readable(SENT, PACKET_BYTES)];
    net.lend(1);
    Net::question([0; 6]);
    net.send(&question)?;
    for _ in 0..SILENCE_LOOKS {
        same(
            "packets that do not fit",
            net.rings[RECEIVE].used_index(),
            0u16,
        )?;
        leave();
    }
    // In parts, of which the first says how many they are.
    net.up(0)?;
    const PART: u32 = 20;
    net.lend(PART);
    Net::question([0; 6]);
    net.send(&question)?;
    let mut left = PACKET_BYTES;
    while left > 0 {
        let (_, bytes) = net.device.answer(&mut net.rings[RECEIVE])?;
        same("bytes of a part", bytes, left.min(PART)).at("left", left.into())?;
        left -= bytes;
    }
    let parts = peek::<u16>(RECEIVED + NUM_BUFFERS);
    same("parts", parts, PACKET_BYTES.div_ceil(PART) as u16)?;
    net.up(0)?;
    let ring = &mut net.rings[RECEIVE];
    ring.chain(0, &[readable(RECEIVED, BUFFER_BYTES)]);
    ring.offer(0);
    net.device.kick(RECEIVE as u16);
    let (_, bytes) = net.device.answer(&mut net.rings[RECEIVE])?;
    same("bytes of what cannot be written", bytes, 0u32)?;
    net.lend(BUFFER_BYTES);
    net.ask()
}

/// Classes and commands that nobody knows, of any length, and numbers of pairs that are not there.
fn commands(net: &mut Net) -> Outcome {
    const MQ: u16 = 4;
    const OK: u8 = 0;
    const ERROR: u8 = 1;
    const NONE: u8 = 0xff;
    net.up(0)?;
    for (class, pairs, expected) in [
        (MQ, 0u16, ERROR),
        (MQ, 3, ERROR),
        (MQ, 0x8000, ERROR),
        (MQ, u16::MAX, ERROR),
        (MQ, 2, OK),
        (MQ | 1 << 8, 1, ERROR),
        (MQ | 0xff << 8, 1, ERROR),
        (0, 1, ERROR),
        (1, 1, ERROR),
        (2, 1, ERROR),
        (5, 1, ERROR),
        (0xff, 1, ERROR),
        (u16::MAX, u16::MAX, ERROR),
        (MQ, 1, OK),
    ] {
        poke(COMMAND, class);
        poke(COMMAND + 2, pairs);
        let ack = net.command(&[readable(COMMAND, 4), writable(ACK, 1)])?;
        let case = u64::from(class) << 16 | u64::from(pairs);
        same("the answer", ack, expected).at("class and pairs", case)?;
    }
    poke(COMMAND, MQ);
    for bytes in [1, 2, 3, 5, 0x1_0000, 16 << 20] {
        let ack = net.command(&[readable(COMMAND, bytes), writable(ACK, 1)])?;
        same("the answer", ack, ERROR).at("bytes", bytes.into())?;
    }
    let ack = net.command(&[writable(ACK, 1)])?;
    same("the answer", ack, ERROR).at("no command", 0)?;
    let ack = net.command(&[readable(COMMAND, 4)])?;
    same("the answer", ack, NONE).at("no place for it", 0)?;
    net.ask()
}

/// The host sends as fast as it can to a driver that lends nothing, and that then wants one packet of all these.
fn flood(net: &mut Net) -> Outcome {
    const LOOKS: u32 = 50_000;
    net.up(0)?;
    say(format_args!("flood"));
    for _ in 0..LOOKS {
        same("packets", net.rings[RECEIVE].used_index(), 0u16)?;
        leave();
    }
    net.ask()
}
