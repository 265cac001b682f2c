//! The header of a vsock packet (virtio 1.2 section 5.10.6), read once into a [`Packet`] that cannot be
//! wrong.
//!
//! Trusts nothing: the 44 bytes were copied out of guest memory before they come here, so a guest that
//! rewrites them changes nothing any more. Refuses other addresses than guest to host, other socket types
//! than stream, unknown operations and flags, and lengths that the descriptor chain does not back.

/// Context id of the host (virtio 1.2 section 5.10.4).
pub const HOST_CID: u64 = 2;
/// Length of a packet's header in bytes.
pub const HEADER_BYTES: usize = 44;
/// Longest payload of one packet, both ways, in bytes (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE` of
/// include/linux/virtio_vsock.h; the driver never sends more, and need not take more).
pub const PAYLOAD_MAX_BYTES: u32 = 64 * 1024;

/// Socket type "stream", the only one that this device offers.
const TYPE_STREAM: u16 = 1;
const OP_REQUEST: u16 = 1;
const OP_RESPONSE: u16 = 2;
const OP_RST: u16 = 3;
const OP_SHUTDOWN: u16 = 4;
const OP_RW: u16 = 5;
const OP_CREDIT_UPDATE: u16 = 6;
const OP_CREDIT_REQUEST: u16 = 7;
const SHUTDOWN_RECEIVE: u32 = 1;
const SHUTDOWN_SEND: u32 = 2;

/// What names a connection. The context ids are the same for all connections of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ports {
    /// Port on the host.
    pub host: u32,
    /// Port in the guest.
    pub guest: u32,
}

/// Which directions a side has closed, as its SHUTDOWN says: bit 0 "I will receive no more", bit 1 "I will
/// send no more" (section 5.10.6.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shutdown {
    /// Will receive no more.
    pub receive: bool,
    /// Will send no more.
    pub send: bool,
}

impl Shutdown {
    /// Both directions: the side is done with the connection.
    pub const BOTH: Shutdown = Shutdown {
        receive: true,
        send: true,
    };

    /// What either of two says; a closed direction never opens again.
    pub fn union(self, other: Shutdown) -> Shutdown {
        Shutdown {
            receive: self.receive || other.receive,
            send: self.send || other.send,
        }
    }

    fn from_flags(flags: u32) -> Option<Shutdown> {
        let known = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
        (flags & !known == 0 && flags != 0).then_some(Shutdown {
            receive: flags & SHUTDOWN_RECEIVE != 0,
            send: flags & SHUTDOWN_SEND != 0,
        })
    }

    fn flags(self) -> u32 {
        let receive = if self.receive { SHUTDOWN_RECEIVE } else { 0 };
        receive | if self.send { SHUTDOWN_SEND } else { 0 }
    }
}

/// What a side says of its receive buffer in each packet (section 5.10.6.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Size of the whole receive buffer in bytes.
    pub buf_alloc: u32,
    /// Bytes taken out of it since the connection began, modulo 2^32.
    pub fwd_cnt: u32,
}

/// The operation of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Asks for a connection.
    Request,
    /// Grants it.
    Response,
    /// Refuses or ends it at once.
    Reset,
    /// Closes directions; the flags of all SHUTDOWNs add up.
    Shutdown(Shutdown),
    /// Carries this many bytes of payload: 1 to [`PAYLOAD_MAX_BYTES`].
    Data(u32),
    /// Tells the sender's [`Window`], as each packet does, and nothing more.
    CreditUpdate,
    /// Asks for the receiver's [`Window`].
    CreditRequest,
}

/// A packet between guest and host whose header makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Its connection.
    pub ports: Ports,
    /// What it wants.
    pub op: Op,
    /// Its sender's receive buffer.
    pub window: Window,
}

/// The answer to a packet that belongs to no connection or makes no sense: RST with the addresses turned
/// round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResetReply {
    src_cid: u64,
    dst_cid: u64,
    src_port: u32,
    dst_port: u32,
    kind: u16,
}

impl ResetReply {
    /// The RST of a connection of this device.
    pub fn of_connection(ports: Ports, guest_cid: u64) -> ResetReply {
        ResetReply {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: TYPE_STREAM,
        }
    }

    /// The header to send.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        Raw {
            src_cid: self.src_cid,
            dst_cid: self.dst_cid,
            src_port: self.src_port,
            dst_port: self.dst_port,
            len: 0,
            kind: self.kind,
            op: OP_RST,
            flags: 0,
            window: Window::default(),
        }
        .encode()
    }
}

/// A packet that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The answer it gets. None for an RST: those are never answered, so that two sides cannot reset each
    /// other for ever.
    pub reply: Option<ResetReply>,
    /// The connection that it broke, if there is one of that name.
    pub breaks: Option<Ports>,
}

impl Packet {
    /// Reads the header of a packet that the guest sent. `payload_bytes` is how much the descriptor chain
    /// holds behind the header; more than the packet needs is allowed.
    ///
    /// # Errors
    /// Wrong addresses or type (section 5.10.6: RST, no connection is touched); an unknown operation or
    /// flag, a payload where none belongs, an empty, too long or missing one (RST and the connection ends).
    pub fn parse(
        header: &[u8; HEADER_BYTES],
        payload_bytes: usize,
        guest_cid: u64,
    ) -> Result<Packet, Refused> {
        let raw = Raw::decode(header);
        let ports = Ports {
            host: raw.dst_port,
            guest: raw.src_port,
        };
        let addressed = raw.src_cid == guest_cid && raw.dst_cid == HOST_CID;
        if !addressed || raw.kind != TYPE_STREAM {
            return Err(raw.refused(None));
        }
        match raw.operation(payload_bytes) {
            Some(op) => Ok(Packet {
                ports,
                op,
                window: raw.window,
            }),
            None => Err(raw.refused(Some(ports))),
        }
    }

    /// Length of its payload in bytes.
    pub fn payload_bytes(&self) -> usize {
        match self.op {
            Op::Data(len) => len as usize,
            _ => 0,
        }
    }

    /// The header of this packet when the host sends it.
    pub fn encode(&self, guest_cid: u64) -> [u8; HEADER_BYTES] {
        let (op, flags, len) = match self.op {
            Op::Request => (OP_REQUEST, 0, 0),
            Op::Response => (OP_RESPONSE, 0, 0),
            Op::Reset => (OP_RST, 0, 0),
            Op::Shutdown(closed) => (OP_SHUTDOWN, closed.flags(), 0),
            Op::Data(len) => (OP_RW, 0, len),
            Op::CreditUpdate => (OP_CREDIT_UPDATE, 0, 0),
            Op::CreditRequest => (OP_CREDIT_REQUEST, 0, 0),
        };
        Raw {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len,
            kind: TYPE_STREAM,
            op,
            flags,
            window: self.window,
        }
        .encode()
    }
}

/// The fields as they lie in memory.
struct Raw {
    src_cid: u64,
    dst_cid: u64,
    src_port: u32,
    dst_port: u32,
    len: u32,
    kind: u16,
    op: u16,
    flags: u32,
    window: Window,
}

impl Raw {
    fn decode(header: &[u8; HEADER_BYTES]) -> Raw {
        let mut fields = Fields(header);
        Raw {
            src_cid: u64::from_le_bytes(fields.take()),
            dst_cid: u64::from_le_bytes(fields.take()),
            src_port: u32::from_le_bytes(fields.take()),
            dst_port: u32::from_le_bytes(fields.take()),
            len: u32::from_le_bytes(fields.take()),
            kind: u16::from_le_bytes(fields.take()),
            op: u16::from_le_bytes(fields.take()),
            flags: u32::from_le_bytes(fields.take()),
            window: Window {
                buf_alloc: u32::from_le_bytes(fields.take()),
                fwd_cnt: u32::from_le_bytes(fields.take()),
            },
        }
    }

    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.window.buf_alloc.to_le_bytes(),
            &self.window.fwd_cnt.to_le_bytes(),
        ];
        for (byte, value) in header.iter_mut().zip(fields.into_iter().flatten()) {
            *byte = *value;
        }
        header
    }

    fn operation(&self, payload_bytes: usize) -> Option<Op> {
        if self.op == OP_RST {
            return Some(Op::Reset);
        }
        if self.op == OP_RW {
            let backed = usize::try_from(self.len).is_ok_and(|len| len <= payload_bytes);
            let fits = (1..=PAYLOAD_MAX_BYTES).contains(&self.len);
            return (backed && fits).then_some(Op::Data(self.len));
        }
        if self.len != 0 {
            return None;
        }
        match self.op {
            OP_REQUEST => Some(Op::Request),
            OP_RESPONSE => Some(Op::Response),
            OP_SHUTDOWN => Shutdown::from_flags(self.flags).map(Op::Shutdown),
            OP_CREDIT_UPDATE => Some(Op::CreditUpdate),
            OP_CREDIT_REQUEST => Some(Op::CreditRequest),
            _ => None,
        }
    }

    fn refused(&self, breaks: Option<Ports>) -> Refused {
        let reply = (self.op != OP_RST).then_some(ResetReply {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
        });
        Refused { reply, breaks }
    }
}

/// Takes one field after the other from the front of a header.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut field = [0; N];
        let (front, rest) = self.0.split_at(N.min(self.0.len()));
        for (byte, value) in field.iter_mut().zip(front) {
            *byte = *value;
        }
        self.0 = rest;
        field
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const GUEST: u64 = 3;

    /// A header as the guest writes it.
    fn header(op: u16, len: u32, flags: u32) -> [u8; HEADER_BYTES] {
        raw(op, len, flags).encode()
    }

    fn raw(op: u16, len: u32, flags: u32) -> Raw {
        Raw {
            src_cid: GUEST,
            dst_cid: HOST_CID,
            src_port: 7,
            dst_port: 1024,
            len,
            kind: TYPE_STREAM,
            op,
            flags,
            window: Window {
                buf_alloc: 0x0102_0304,
                fwd_cnt: 0x0506_0708,
            },
        }
    }

    #[test]
    fn fields_lie_where_the_specification_puts_them() {
        let bytes = header(OP_RW, 0x1122, 0);
        assert_eq!(bytes[0..8], [3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[8..16], [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..20], [7, 0, 0, 0]);
        assert_eq!(bytes[20..24], [0, 4, 0, 0]);
        assert_eq!(bytes[24..28], [0x22, 0x11, 0, 0]);
        assert_eq!(bytes[28..30], [1, 0]);
        assert_eq!(bytes[30..32], [5, 0]);
        assert_eq!(bytes[32..36], [0; 4]);
        assert_eq!(bytes[36..40], [4, 3, 2, 1]);
        assert_eq!(bytes[40..44], [8, 7, 6, 5]);
    }

    #[test]
    fn a_packet_names_its_connection_from_the_hosts_view() {
        let packet = Packet::parse(&header(OP_RW, 10, 0), 10, GUEST).unwrap();
        assert_eq!(
            packet.ports,
            Ports {
                host: 1024,
                guest: 7
            }
        );
        assert_eq!(packet.op, Op::Data(10));
        assert_eq!(packet.window.fwd_cnt, 0x0506_0708);
    }

    #[test]
    fn a_payload_that_the_chain_does_not_hold_breaks_its_connection() {
        for (len, held) in [
            (10, 9),
            (1, 0),
            (0, 0),
            (PAYLOAD_MAX_BYTES + 1, usize::MAX),
            (u32::MAX, usize::MAX),
        ] {
            let refused = Packet::parse(&header(OP_RW, len, 0), held, GUEST).unwrap_err();
            assert!(
                refused.reply.is_some() && refused.breaks.is_some(),
                "{len} of {held}"
            );
        }
    }

    #[test]
    fn operations_and_flags_that_nobody_defined_break_their_connection() {
        for (op, len, flags) in [
            (0, 0, 0),
            (8, 0, 0),
            (255, 0, 0),
            (OP_SHUTDOWN, 0, 0),
            (OP_SHUTDOWN, 0, 0xff),
            (OP_REQUEST, 1, 0),
            (OP_CREDIT_UPDATE, 4, 0),
        ] {
            let refused = Packet::parse(&header(op, len, flags), 64, GUEST).unwrap_err();
            assert!(
                refused.reply.is_some() && refused.breaks.is_some(),
                "op {op}"
            );
        }
    }

    #[test]
    fn wrong_addresses_and_types_are_reset_without_touching_a_connection() {
        let mut wrong = Vec::new();
        for cid in [0, 1, 2, 4, u64::from(u32::MAX), (1 << 32) + GUEST] {
            wrong.push(Raw {
                src_cid: cid,
                ..raw(OP_REQUEST, 0, 0)
            });
        }
        for cid in [0, 1, 3, (1 << 32) + HOST_CID] {
            wrong.push(Raw {
                dst_cid: cid,
                ..raw(OP_REQUEST, 0, 0)
            });
        }
        for kind in [0, 2, 3] {
            wrong.push(Raw {
                kind,
                ..raw(OP_REQUEST, 0, 0)
            });
        }
        for raw in wrong {
            let refused = Packet::parse(&raw.encode(), 0, GUEST).unwrap_err();
            assert_eq!(refused.breaks, None);
            let reply = Raw::decode(&refused.reply.expect("is answered").encode());
            assert_eq!((reply.op, reply.kind), (OP_RST, raw.kind));
            assert_eq!((reply.src_cid, reply.dst_cid), (raw.dst_cid, raw.src_cid));
            assert_eq!(
                (reply.src_port, reply.dst_port),
                (raw.dst_port, raw.src_port)
            );
        }
    }

    #[test]
    fn a_reset_is_never_answered() {
        let stray = Raw {
            src_cid: 99,
            ..raw(OP_RST, 0, 0)
        };
        let refused = Packet::parse(&stray.encode(), 0, GUEST).unwrap_err();
        assert_eq!(refused.reply, None);
        // A reset is one whatever else its header says.
        let odd = Packet::parse(&header(OP_RST, 77, 9), 0, GUEST).unwrap();
        assert_eq!(odd.op, Op::Reset);
    }

    proptest! {
        #[test]
        fn any_header_is_a_packet_within_bounds_or_refused(
            bytes in proptest::collection::vec(any::<u8>(), HEADER_BYTES),
            plausible: bool,
            op in 0u16..10,
            len in 0u32..100,
            held in 0usize..100,
        ) {
            let mut bytes: [u8; HEADER_BYTES] = bytes.try_into().unwrap();
            if plausible {
                bytes = header(op, len, u32::from(bytes[0]));
            }
            match Packet::parse(&bytes, held, GUEST) {
                Ok(Packet { op: Op::Data(len), .. }) => {
                    prop_assert!((1..=PAYLOAD_MAX_BYTES).contains(&len) && len as usize <= held);
                }
                Ok(_) => {}
                Err(refused) => {
                    prop_assert_eq!(refused.reply.is_none(), bytes[30..32] == [3, 0]);
                }
            }
        }

        #[test]
        fn a_header_survives_the_way_out(host: u32, guest: u32, buf_alloc: u32, fwd_cnt: u32, len in 1..=PAYLOAD_MAX_BYTES, which in 0usize..7) {
            let ops = [
                Op::Request, Op::Response, Op::Reset, Op::Shutdown(Shutdown::BOTH), Op::Data(len),
                Op::CreditUpdate, Op::CreditRequest,
            ];
            let packet = Packet { ports: Ports { host, guest }, op: ops[which], window: Window { buf_alloc, fwd_cnt } };
            // What the host sends, with the addresses turned round, is what the guest could have sent.
            let mut out = Raw::decode(&packet.encode(GUEST));
            std::mem::swap(&mut out.src_cid, &mut out.dst_cid);
            std::mem::swap(&mut out.src_port, &mut out.dst_port);
            prop_assert_eq!(Packet::parse(&out.encode(), 64 * 1024, GUEST), Ok(packet));
        }
    }
}
