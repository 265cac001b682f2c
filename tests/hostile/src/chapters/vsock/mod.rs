//! The vsock device (virtio 1.2 section 5.10), whose host side answers on three ports: one echoes, one never reads, one never
//! stops to write.

mod chapters;
mod packet;

use super::{COMMON_COUNT, Honest, Named, QUEUE_SIZE, chapters_of};
use crate::cpu::{peek, poke};
use crate::report::{At, Outcome, Why, same};
use crate::ring::{Descriptor, Ring, readable, writable};
use crate::virtio::{Device, leave};
use packet::{BYTES, CREDIT_REQUEST, CREDIT_UPDATE, Packet, REQUEST, RESPONSE, RST, RW, SHUTDOWN};

const TYPE: u16 = 19;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Where packets come to, a page each; where they go from; and what they carry.
const RECEIVED: u64 = 0x60_0000;
const SENT: u64 = 0x65_0000;
const PAYLOAD: u64 = 0x66_0000;
const PAGE: u32 = 0x1000;
/// Entries of the queues that packets go by, so that many are under way at once.
const PACKETS: u16 = 64;

/// Ports of the host.
const ECHOES: u32 = 1024;
const NEVER_READS: u32 = 1025;
const NEVER_STOPS: u32 = 1026;
const NOBODY: u32 = 7;
/// The longest payload of a packet.
const PAYLOAD_MAX: u32 = 64 * 1024;
const SHUTDOWN_BOTH: u32 = 3;
/// How often a connection is asked for, when the host has too many.
const TRIES: u32 = 1_000;

pub(crate) struct Vsock {
    device: Device,
    rings: [Ring; 3],
    victim: usize,
    /// The port that the next connection is from.
    port: u32,
}

/// A packet that came, and where its payload was; the buffer is the device's again.
struct Came {
    packet: Packet,
    first: u64,
}

pub(in crate::chapters) const CHAPTERS: [Named<Vsock>; COMMON_COUNT + 8] = chapters_of!(
    Vsock,
    &[
        ("no chain to receive to", chapters::received),
        ("packets of nobody", chapters::nobody),
        ("lengths that are none", chapters::lengths),
        ("packets out of order", chapters::order),
        ("credit that lies", chapters::credit),
        ("more than was granted", chapters::overrun),
        ("connections without end", chapters::connections),
        ("resets while data flows", chapters::resets),
    ]
);

impl Vsock {
    pub(in crate::chapters) fn new() -> Outcome<Vsock> {
        Ok(Vsock {
            device: Device::find(TYPE)?,
            rings: [
                Ring::new(0, PACKETS),
                Ring::new(1, PACKETS),
                Ring::new(2, QUEUE_SIZE),
            ],
            victim: TRANSMIT,
            port: 0x1_0000,
        })
    }

    /// Lends all receive buffers, if none is lent yet.
    fn lend(&mut self) {
        let ring = &mut self.rings[RECEIVE];
        if ring.offered == 0 {
            for head in 0..ring.size {
                let page = RECEIVED + u64::from(PAGE) * u64::from(head);
                ring.chain(head, &[writable(page, PAGE)]);
                ring.offer(head);
            }
            self.device.kick(RECEIVE as u16);
        }
    }

    /// Offers a chain to be sent and does not wait.
    fn offer(&mut self, chain: &[Descriptor]) {
        let ring = &mut self.rings[TRANSMIT];
        ring.chain(0, chain);
        ring.offer(0);
        self.device.kick(TRANSMIT as u16);
    }

    /// Sends a chain.
    fn send_chain(&mut self, chain: &[Descriptor]) -> Outcome {
        self.offer(chain);
        let (_, written) = self.device.answer(&mut self.rings[TRANSMIT])?;
        same("bytes written of what is sent", written, 0u32)
    }

    /// Sends a packet with as much payload as it says.
    fn send(&mut self, packet: Packet) -> Outcome {
        packet.put(SENT);
        match packet.len {
            0 => self.send_chain(&[readable(SENT, BYTES)]),
            len => self.send_chain(&[readable(SENT, BYTES), readable(PAYLOAD, len)]),
        }
    }

    /// Sends as many packets as the queue holds by one notification.
    fn send_all(&mut self, packet: impl Fn(u32) -> Packet) -> Outcome {
        let ring = &mut self.rings[TRANSMIT];
        for head in 0..ring.size {
            let at = SENT + 64 * u64::from(head);
            packet(head.into()).put(at);
            ring.chain(head, &[readable(at, BYTES)]);
            ring.offer(head);
        }
        self.device.kick(TRANSMIT as u16);
        for _ in 0..self.rings[TRANSMIT].size {
            self.device.answer(&mut self.rings[TRANSMIT])?;
        }
        Ok(())
    }

    /// The next packet of the device.
    fn next(&mut self) -> Outcome<Came> {
        self.lend();
        let (head, bytes) = self.device.answer(&mut self.rings[RECEIVE])?;
        let head = head as u16 % self.rings[RECEIVE].size;
        let at = RECEIVED + u64::from(PAGE) * u64::from(head);
        let came = Came {
            packet: Packet::get(at),
            first: peek(at + u64::from(BYTES)),
        };
        same("bytes of a packet", bytes, BYTES + came.packet.len)?;
        self.rings[RECEIVE].offer(head);
        self.device.kick(RECEIVE as u16);
        Ok(came)
    }

    /// The next packet for this port of the guest; of others, the ends may still come.
    fn next_for(&mut self, port: u32) -> Outcome<Came> {
        loop {
            let came = self.next()?;
            if came.packet.dst_port == port {
                return Ok(came);
            }
            same("the operation", came.packet.op, RST).at("port", came.packet.dst_port.into())?;
        }
    }

    /// The next packet has to be an RST that answers this one.
    fn reset_of(&mut self, packet: Packet) -> Outcome {
        let came = self.next()?.packet;
        let expected = packet.reset();
        same("the operation", came.op, expected.op)?;
        same("its type", came.kind, expected.kind)?;
        same("from", came.src_cid, expected.src_cid)?;
        same("to", came.dst_cid, expected.dst_cid)?;
        same("from port", came.src_port, expected.src_port)?;
        same("to port", came.dst_port, expected.dst_port)
    }

    /// Nothing came of what was sent: the answer to another question is the next packet.
    fn silence(&mut self) -> Outcome {
        let question = Packet::of(REQUEST, self.fresh(), NOBODY);
        self.send(question)?;
        self.reset_of(question)
    }

    fn fresh(&mut self) -> u32 {
        self.port += 1;
        self.port
    }

    /// A connection to a port of the host, from a port that was none before; the window is the guest's.
    fn connect(&mut self, port: u32, buf_alloc: u32) -> Outcome<Packet> {
        for _ in 0..TRIES {
            let request = Packet {
                buf_alloc,
                ..Packet::of(REQUEST, self.fresh(), port)
            };
            self.send(request)?;
            let came = self.next_for(request.src_port)?.packet;
            if came.op == RESPONSE {
                return Ok(request);
            }
            // The host has too many at once.
            same("the operation", came.op, RST)?;
            leave();
        }
        Err(Why::new("no connection"))
    }

    /// Sends what breaks a connection, and takes its end.
    fn breaks(&mut self, packet: Packet) -> Outcome {
        self.send(packet)?;
        self.reset_of(packet)
    }

    /// Waits for the next packet of this operation; of what else may come, only data and windows.
    fn until(&mut self, op: u16) -> Outcome<Packet> {
        const OTHERS_MAX: u32 = 10_000;
        for _ in 0..OTHERS_MAX {
            let came = self.next()?.packet;
            if came.op == op {
                return Ok(came);
            }
            let may = matches!(came.op, RW | CREDIT_UPDATE | CREDIT_REQUEST);
            same("data or a window", may, true).at("operation", came.op.into())?;
        }
        Err(Why::new("never the awaited packet"))
    }
}

impl Honest for Vsock {
    fn device(&self) -> Device {
        self.device
    }

    fn rings(&mut self) -> &mut [Ring] {
        &mut self.rings
    }

    fn victim(&mut self) -> &mut Ring {
        &mut self.rings[self.victim]
    }

    /// An answer waits for a buffer that the driver may then break.
    fn provoke(&mut self) -> Outcome {
        match self.victim {
            RECEIVE => {
                let port = self.fresh();
                self.send(Packet::of(REQUEST, port, NOBODY))
            }
            _ => Ok(()),
        }
    }

    /// Says something to whom echoes it, and hangs up.
    fn ask(&mut self) -> Outcome {
        let connection = self.connect(ECHOES, PAYLOAD_MAX)?;
        let word = 0x0123_4567_89ab_cdef ^ u64::from(connection.src_port);
        poke(PAYLOAD, word);
        self.send(Packet {
            len: 8,
            ..connection.with(RW)
        })?;
        let came = self.next_for(connection.src_port)?;
        same("the operation", came.packet.op, RW)?;
        same("bytes", came.packet.len, 8u32)?;
        same("the echo", came.first, word)?;
        let end = Packet {
            flags: SHUTDOWN_BOTH,
            fwd_cnt: 8,
            ..connection.with(SHUTDOWN)
        };
        self.breaks(end)
    }
}
