//! What only this device has to bear. Numbers in brackets are those of the catalogue.

use super::packet::{
    BYTES, CREDIT_REQUEST, CREDIT_UPDATE, Packet, REQUEST, RESPONSE, RST, RW, SHUTDOWN,
};
use super::{
    ECHOES, NEVER_READS, NEVER_STOPS, NOBODY, PAGE, PAYLOAD, PAYLOAD_MAX, RECEIVE, RECEIVED, SENT,
    SHUTDOWN_BOTH, TRANSMIT, Vsock,
};
use crate::chapters::{Honest, rings};
use crate::cpu::{Patience, peek, poke};
use crate::report::{At, Outcome, same};
use crate::ring::{readable, writable};
use crate::virtio::{RUNNING, leave};

const SHUTDOWN_RECEIVE: u32 = 1;
const SHUTDOWN_SEND: u32 = 2;
/// Looks in which all that may come has come.
const SILENCE_LOOKS: u32 = 300;

/// As what is to be sent, and the other way round.
pub(super) fn received(vsock: &mut Vsock) -> Outcome {
    vsock.victim = RECEIVE;
    let outcome = rings::direct(vsock).and_then(|()| rings::indirect(vsock));
    vsock.victim = TRANSMIT;
    outcome
}

/// Other addresses, types and operations; and what belongs to no connection (S1, S2, S4). An RST is never answered.
pub(super) fn nobody(vsock: &mut Vsock) -> Outcome {
    const OPS: [u16; 12] = [
        0,
        REQUEST,
        RESPONSE,
        SHUTDOWN,
        RW,
        CREDIT_UPDATE,
        CREDIT_REQUEST,
        8,
        0xff,
        0x100,
        0x7fff,
        u16::MAX,
    ];
    const GUEST: u64 = 3;
    const HOST: u64 = 2;
    const ADDRESSES: [(u64, u64); 11] = [
        (0, HOST),
        (1, HOST),
        (HOST, HOST),
        (4, HOST),
        (GUEST | 1 << 32, HOST),
        (u64::MAX, HOST),
        (GUEST, 0),
        (GUEST, 1),
        (GUEST, GUEST),
        (GUEST, HOST | 1 << 32),
        (GUEST, u64::MAX),
    ];
    vsock.up(0)?;
    for (number, (src_cid, dst_cid)) in (0..).zip(ADDRESSES) {
        for op in OPS {
            let packet = Packet {
                src_cid,
                dst_cid,
                ..Packet::of(op, vsock.fresh(), ECHOES)
            };
            vsock
                .breaks(packet)
                .at("an address and an operation", number << 16 | u64::from(op))?;
        }
    }
    for kind in [0, 2, 3, 0x100, u16::MAX] {
        let packet = Packet {
            kind,
            ..Packet::of(REQUEST, vsock.fresh(), ECHOES)
        };
        vsock.breaks(packet).at("a type", kind.into())?;
    }
    for op in OPS.into_iter().filter(|op| *op != REQUEST) {
        for flags in [0, 1, 0xff, u32::MAX] {
            let packet = Packet {
                flags,
                len: u32::from(op == RW),
                ..Packet::of(op, vsock.fresh(), ECHOES)
            };
            vsock.breaks(packet).at("no connection", op.into())?;
        }
    }
    resets_are_not_answered(vsock)?;
    vsock.ask()
}

/// Of whatever they are.
fn resets_are_not_answered(vsock: &mut Vsock) -> Outcome {
    const HOST: u64 = 2;
    for (port, kind, dst_cid) in [(ECHOES, 1, HOST), (NOBODY, 0xff, HOST), (0, 1, 0)] {
        let packet = Packet {
            kind,
            dst_cid,
            ..Packet::of(RST, vsock.fresh(), port)
        };
        vsock.send(packet)?;
        vsock.silence().at("an RST", port.into())?;
    }
    Ok(())
}

/// Lengths that the chain does not back, and headers that are not whole or not in one piece (S3).
pub(super) fn lengths(vsock: &mut Vsock) -> Outcome {
    vsock.up(0)?;
    for (len, there) in [
        (0, 0),
        (0, 64),
        (65, 64),
        (PAYLOAD_MAX, 64),
        (PAYLOAD_MAX + 1, PAYLOAD_MAX + 1),
        (1 << 24, 1 << 24),
        (0x8000_0000, 64),
        (u32::MAX, 64),
    ] {
        let connection = vsock.connect(ECHOES, PAYLOAD_MAX)?;
        let packet = Packet {
            len,
            ..connection.with(RW)
        };
        packet.put(SENT);
        let chain = [readable(SENT, BYTES), readable(PAYLOAD, there.max(1))];
        vsock.send_chain(&chain[..if there == 0 { 1 } else { 2 }])?;
        vsock.reset_of(packet).at("a length", len.into())?;
    }
    for op in [REQUEST, RESPONSE, SHUTDOWN, CREDIT_UPDATE, CREDIT_REQUEST] {
        let connection = vsock.connect(ECHOES, PAYLOAD_MAX)?;
        let packet = Packet {
            len: 1,
            flags: SHUTDOWN_BOTH,
            ..connection.with(op)
        };
        vsock
            .breaks(packet)
            .at("a payload where none belongs", op.into())?;
    }
    Packet::of(REQUEST, vsock.fresh(), ECHOES).put(SENT);
    for bytes in [1, 4, BYTES - 1] {
        vsock.send_chain(&[readable(SENT, bytes)])?;
        vsock.silence().at("a part of a header", bytes.into())?;
    }
    vsock.send_chain(&[writable(SENT, BYTES)])?;
    vsock.silence().at("a header to be written", 0)?;
    // In pieces it is one all the same.
    let request = Packet::of(REQUEST, vsock.fresh(), NOBODY);
    request.put(SENT);
    let pieces = [(0, 1), (1, 20), (21, 3), (24, 20)];
    vsock.send_chain(&pieces.map(|(at, length)| readable(SENT + at, length)))?;
    vsock.reset_of(request).at("a header in pieces", 0)
}

/// What ends a connection, and what closes half of it, in any order (S4, S8).
pub(super) fn order(vsock: &mut Vsock) -> Outcome {
    vsock.up(0)?;
    for (op, flags) in [
        (REQUEST, 0),
        (RESPONSE, 0),
        (SHUTDOWN, 0),
        (SHUTDOWN, 4),
        (SHUTDOWN, 0xff),
        (SHUTDOWN, u32::MAX),
        (SHUTDOWN, SHUTDOWN_BOTH),
        (0, 0),
        (8, 0),
    ] {
        let connection = vsock.connect(ECHOES, PAYLOAD_MAX)?;
        let packet = Packet {
            flags,
            ..connection.with(op)
        };
        vsock.breaks(packet).at("operation", op.into())?;
    }
    for (first, second) in [
        (SHUTDOWN_RECEIVE, SHUTDOWN_SEND),
        (SHUTDOWN_SEND, SHUTDOWN_RECEIVE),
    ] {
        let connection = vsock.connect(NEVER_READS, PAYLOAD_MAX)?;
        let half = |flags| Packet {
            flags,
            ..connection.with(SHUTDOWN)
        };
        vsock.send(half(first))?;
        vsock.send(half(first))?;
        vsock.silence().at("half closed", first.into())?;
        vsock
            .breaks(half(second))
            .at("closed behind", first.into())?;
    }
    let connection = vsock.connect(NEVER_READS, PAYLOAD_MAX)?;
    vsock.send(Packet {
        flags: SHUTDOWN_SEND,
        ..connection.with(SHUTDOWN)
    })?;
    let more = Packet {
        len: 1,
        ..connection.with(RW)
    };
    vsock.breaks(more).at("data behind the end of data", 0)?;
    // Who resets is not answered, however often.
    let connection = vsock.connect(ECHOES, PAYLOAD_MAX)?;
    for _ in 0..3 {
        vsock.send(connection.with(RST))?;
    }
    vsock.silence()
}

/// Never is more sent than the guest has room for, whatever it says of that (S5).
pub(super) fn credit(vsock: &mut Vsock) -> Outcome {
    const QUESTIONS: u32 = 4;
    vsock.up(0)?;
    let connection = vsock.connect(NEVER_STOPS, 0)?;
    let mut got = 0u32;
    // Window and counter, and how many bytes may have come after it.
    for (number, (buf_alloc, fwd_cnt, most)) in (0..).zip([
        (0, 0, 0u32),
        (0, u32::MAX, 0),
        (1, 0, 1),
        (100, 0, 100),
        (100, 50, 150),
        // Shrinking, backwards, and ahead of what was sent.
        (10, 50, 150),
        (0, 50, 150),
        (100, 0, 150),
        (100, 0x8000_0000, 150),
        (1000, 1000, 150),
        (u32::MAX - 1, 151, 150),
        (200, 150, 350),
    ]) {
        let window = Packet {
            buf_alloc,
            fwd_cnt,
            ..connection.with(CREDIT_UPDATE)
        };
        vsock.send(window)?;
        // Data may still be on its way to buffers that are there.
        let mut patience = Patience::looks(SILENCE_LOOKS);
        while got < most || patience.lasts() {
            if vsock.rings[RECEIVE].is_answered() {
                let came = vsock.next()?.packet;
                let may = matches!(came.op, RW | CREDIT_REQUEST);
                same("data or a question", may, true).at("operation", came.op.into())?;
                got += came.len;
                same("no more than was granted", got <= most, true).at("window", number)?;
            } else {
                leave();
            }
            same("the status", vsock.device.status(), RUNNING)?;
        }
    }
    for _ in 0..QUESTIONS {
        vsock.send_all(|_| Packet {
            fwd_cnt: got,
            ..connection.with(CREDIT_REQUEST)
        })?;
    }
    vsock.until(CREDIT_UPDATE)?;
    // The guest ends it; data that was under way came before its RST.
    vsock.send(Packet {
        flags: SHUTDOWN_BOTH,
        ..connection.with(SHUTDOWN)
    })?;
    vsock.until(RST)?;
    Ok(())
}

/// A host that does not read: what the VMM keeps for it is bounded, and what is sent beyond ends the connection (S5, S8).
pub(super) fn overrun(vsock: &mut Vsock) -> Outcome {
    const CONNECTIONS: u32 = 10;
    /// More than a connection's buffer and the socket hold.
    const PACKETS: u32 = 64;
    vsock.up(0)?;
    for number in 0..CONNECTIONS {
        let connection = vsock.connect(NEVER_READS, PAYLOAD_MAX)?;
        let mut ended = false;
        for _ in 0..PACKETS {
            vsock.send(Packet {
                len: PAYLOAD_MAX,
                ..connection.with(RW)
            })?;
            while !ended && vsock.rings[RECEIVE].is_answered() {
                ended = vsock.next()?.packet.op == RST;
            }
            if ended {
                break;
            }
        }
        if !ended {
            vsock.until(RST).at("connection", number.into())?;
        }
        // Packets of the same call that came behind the end.
        vsock.send(connection.with(RST))?;
    }
    Ok(())
}

/// Many more than there may be, to a port that is listed and one that is not, with and without taking the answers (S6).
pub(super) fn connections(vsock: &mut Vsock) -> Outcome {
    const UNLISTED: u32 = 2_560;
    const LISTED: u32 = 1_344;
    const MAX: u32 = 1_023;
    /// More than answers wait in the device.
    const UNHEARD: u32 = 300;
    let mut resets = 0;
    storm(vsock, NOBODY, UNLISTED, |op| resets += u32::from(op == RST))?;
    same("refused", resets, UNLISTED)?;
    let mut granted = 0;
    storm(vsock, NEVER_READS, LISTED, |op| {
        granted += u32::from(op == RESPONSE);
    })?;
    same("connections", granted <= MAX, true).at("listed", granted.into())?;
    same("any connection", granted > 0, true)?;
    // Nobody takes the answers: the device takes no more packets, and goes on when they are taken.
    vsock.up(0)?;
    let mut sent = 0;
    let mut patience = Patience::looks(SILENCE_LOOKS);
    let request = Packet::of(REQUEST, 1, NOBODY);
    request.put(SENT);
    vsock.offer(&[readable(SENT, BYTES)]);
    while sent < UNHEARD && patience.lasts() {
        if vsock.rings[TRANSMIT].take().is_some() {
            sent += 1;
            patience = Patience::looks(SILENCE_LOOKS);
            vsock.offer(&[readable(SENT, BYTES)]);
        }
        leave();
    }
    same("fewer taken than sent", sent < UNHEARD, true)?;
    for _ in 0..=sent {
        vsock.reset_of(request)?;
    }
    vsock.device.answer(&mut vsock.rings[TRANSMIT])?;
    vsock.ask()
}

/// Requests from as many ports, whose answers go to `came`; with few instructions for each, for they are what takes time.
fn storm(vsock: &mut Vsock, port: u32, requests: u32, mut came: impl FnMut(u16)) -> Outcome {
    /// Where in a header these are.
    const SRC_PORT: u64 = 16;
    const OP: u64 = 30;
    const PLACE: usize = 64;
    vsock.up(0)?;
    vsock.lend();
    let size = vsock.rings[TRANSMIT].size;
    for head in 0..size {
        let at = SENT + PLACE as u64 * u64::from(head);
        Packet::of(REQUEST, 0, port).put(at);
        let ring = &mut vsock.rings[TRANSMIT];
        ring.chain(head, &[readable(at, BYTES)]);
        ring.make_available(head, head);
    }
    for first in (0..requests).step_by(size.into()) {
        for (number, at) in (first..first + u32::from(size)).zip((SENT..).step_by(PLACE)) {
            poke(at + SRC_PORT, number);
        }
        // The entries of both rings stay what they are, and their indices alone move on.
        let ring = &mut vsock.rings[TRANSMIT];
        ring.offer_up_to(ring.offered.wrapping_add(size));
        vsock.device.kick(TRANSMIT as u16);
        vsock.device.all_answers(&mut vsock.rings[TRANSMIT])?;
        vsock.device.all_answers(&mut vsock.rings[RECEIVE])?;
        for at in (RECEIVED..).step_by(PAGE as usize).take(size.into()) {
            came(peek(at + OP));
        }
        let ring = &mut vsock.rings[RECEIVE];
        ring.offer_up_to(ring.offered.wrapping_add(size));
        vsock.device.kick(RECEIVE as u16);
    }
    Ok(())
}

/// When a reset is done, nothing writes the driver's memory any more (S8).
pub(super) fn resets(vsock: &mut Vsock) -> Outcome {
    const ROUNDS: u64 = 20;
    const MARK: u64 = 0x5555_aaaa_5555_aaaa;
    const LOOKS: u32 = 100;
    for round in 0..ROUNDS {
        vsock.up(0)?;
        vsock.connect(NEVER_STOPS, u32::MAX)?;
        for _ in 0..round {
            vsock.next().at("round", round)?;
        }
        vsock.device.reset().at("round", round)?;
        let pages = || (0..8).map(|page| RECEIVED + u64::from(PAGE) * page + u64::from(BYTES));
        pages().for_each(|at| poke(at, MARK));
        for _ in 0..LOOKS {
            for at in pages() {
                same("memory after a reset", peek::<u64>(at), MARK).at("round", round)?;
            }
        }
    }
    Ok(())
}
