//! The header of a vsock packet (virtio 1.2 section 5.10.6), with nothing that keeps it from being none.

use crate::cpu::{peek, poke};

/// Its length.
pub(super) const BYTES: u32 = 44;
/// Operations.
pub(super) const REQUEST: u16 = 1;
pub(super) const RESPONSE: u16 = 2;
pub(super) const RST: u16 = 3;
pub(super) const SHUTDOWN: u16 = 4;
pub(super) const RW: u16 = 5;
pub(super) const CREDIT_UPDATE: u16 = 6;
pub(super) const CREDIT_REQUEST: u16 = 7;

const STREAM: u16 = 1;
const HOST: u64 = 2;
const GUEST: u64 = 3;

#[derive(Clone, Copy, Debug)]
pub(super) struct Packet {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of payload.
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// The sender's window.
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Packet {
    /// A packet of the guest as it should be.
    pub(super) fn of(op: u16, src_port: u32, dst_port: u32) -> Packet {
        Packet {
            src_cid: GUEST,
            dst_cid: HOST,
            src_port,
            dst_port,
            len: 0,
            kind: STREAM,
            op,
            flags: 0,
            buf_alloc: 0x1_0000,
            fwd_cnt: 0,
        }
    }

    /// The same with another operation.
    pub(super) fn with(self, op: u16) -> Packet {
        Packet { op, ..self }
    }

    /// What answers it, if that is an RST.
    pub(super) fn reset(self) -> Packet {
        Packet {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            op: RST,
            ..self
        }
    }

    /// Writes it.
    pub(super) fn put(self, at: u64) {
        poke(at, self.src_cid);
        poke(at + 8, self.dst_cid);
        poke(at + 16, self.src_port);
        poke(at + 20, self.dst_port);
        poke(at + 24, self.len);
        poke(at + 28, self.kind);
        poke(at + 30, self.op);
        poke(at + 32, self.flags);
        poke(at + 36, self.buf_alloc);
        poke(at + 40, self.fwd_cnt);
    }

    /// Reads it.
    pub(super) fn get(at: u64) -> Packet {
        Packet {
            src_cid: peek(at),
            dst_cid: peek(at + 8),
            src_port: peek(at + 16),
            dst_port: peek(at + 20),
            len: peek(at + 24),
            kind: peek(at + 28),
            op: peek(at + 30),
            flags: peek(at + 32),
            buf_alloc: peek(at + 36),
            fwd_cnt: peek(at + 40),
        }
    }
}
