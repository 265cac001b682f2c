//! What travels beside the agent's ttrpc channel: port numbers, the owner channel of the VMM, and the
//! header of a stream to the agent. Fixed-size little-endian records, parsed in one step.
//!
//! The owner channel is a `SOCK_SEQPACKET` unix socket inherited by the VMM; one message is one packet
//! of [`OwnerMessage::BYTES`] bytes with exactly one fd in `SCM_RIGHTS`, the host side of the
//! connection (a stream socket). The VMM therefore opens and listens on nothing. When the owner's end
//! closes, the VMM ends.
//!
//! Trust: the VMM trusts its owner; the owner takes each packet of the VMM for hostile and closes what
//! it did not expect.

/// Context id of the host (virtio 1.2 section 5.10.4).
pub const HOST_CID: u64 = 2;
/// Context id of every Capsid guest: each VM has a vsock device of its own, so one number serves all.
pub const GUEST_CID: u64 = 3;

/// Host port that the agent dials once; the stream is the ttrpc channel (the agent serves).
pub const AGENT_RPC_PORT: u32 = 1024;
/// Guest port on which the agent takes streams from the host (peer CID 2 only).
pub const AGENT_STREAM_PORT: u32 = 1025;

/// A message on the owner channel. Each carries exactly one fd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwnerMessage {
    /// Owner to VMM: connect the fd that comes with this to `port` of the guest. If the guest refuses,
    /// the VMM closes the fd: the owner reads end of file before any byte.
    Connect {
        /// Guest port.
        port: u32,
    },
    /// VMM to owner: the guest connected to `port`, one of the listed ones; the fd is the host's side.
    Accepted {
        /// Host port.
        port: u32,
    },
}

/// Why an owner message was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadOwnerMessage {
    /// The packet is not [`OwnerMessage::BYTES`] long.
    #[error("owner message is {0} bytes long, expected {expected}", expected = OwnerMessage::BYTES)]
    Length(usize),
    /// Unknown kind.
    #[error("owner message has unknown kind {0}")]
    Kind(u32),
}

impl OwnerMessage {
    /// Length of a packet in bytes: kind and port, two little-endian u32.
    pub const BYTES: usize = 8;

    /// The packet of this message.
    pub fn encode(self) -> [u8; Self::BYTES] {
        let (kind, port) = match self {
            OwnerMessage::Connect { port } => (1u32, port),
            OwnerMessage::Accepted { port } => (2u32, port),
        };
        let (kind, port) = (kind.to_le_bytes(), port.to_le_bytes());
        [
            kind[0], kind[1], kind[2], kind[3], port[0], port[1], port[2], port[3],
        ]
    }

    /// Reads a packet.
    ///
    /// # Errors
    /// A packet of another length or kind is refused.
    pub fn decode(packet: &[u8]) -> Result<OwnerMessage, BadOwnerMessage> {
        let [a, b, c, d, e, f, g, h] = *packet else {
            return Err(BadOwnerMessage::Length(packet.len()));
        };
        let port = u32::from_le_bytes([e, f, g, h]);
        match u32::from_le_bytes([a, b, c, d]) {
            1 => Ok(OwnerMessage::Connect { port }),
            2 => Ok(OwnerMessage::Accepted { port }),
            kind => Err(BadOwnerMessage::Kind(kind)),
        }
    }
}

/// The first bytes on every stream that the host opens to [`AGENT_STREAM_PORT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamHeader {
    /// A stdio stream, to be named by a later CreateContainer or Exec. Never 0.
    Stdio {
        /// The id that the host chose; unique among the streams not yet taken.
        stream_id: u64,
    },
    /// Power the machine off in good order; nothing follows. Sent by the VMM on SIGTERM.
    PowerOff,
}

/// Why a stream header was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadStreamHeader {
    /// The first four bytes are not `CPSD`.
    #[error("stream header lacks the CPSD mark")]
    Mark,
    /// Unknown kind.
    #[error("stream header has unknown kind {0}")]
    Kind(u32),
    /// Stream id 0 means "none" and cannot be dialled.
    #[error("stream id 0 is reserved")]
    ZeroId,
}

impl StreamHeader {
    /// Length of the header in bytes: mark, kind (u32 LE), stream id (u64 LE).
    pub const BYTES: usize = 16;
    const MARK: [u8; 4] = *b"CPSD";

    /// The header's bytes.
    pub fn encode(self) -> [u8; Self::BYTES] {
        let (kind, id) = match self {
            StreamHeader::Stdio { stream_id } => (1u32, stream_id),
            StreamHeader::PowerOff => (2u32, 0),
        };
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&Self::MARK);
        bytes[4..8].copy_from_slice(&kind.to_le_bytes());
        bytes[8..].copy_from_slice(&id.to_le_bytes());
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// A header without the mark, of unknown kind or with stream id 0 is refused.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<StreamHeader, BadStreamHeader> {
        let [m0, m1, m2, m3, k0, k1, k2, k3, id @ ..] = *bytes;
        if [m0, m1, m2, m3] != Self::MARK {
            return Err(BadStreamHeader::Mark);
        }
        match (u32::from_le_bytes([k0, k1, k2, k3]), u64::from_le_bytes(id)) {
            (1, 0) => Err(BadStreamHeader::ZeroId),
            (1, stream_id) => Ok(StreamHeader::Stdio { stream_id }),
            (2, _) => Ok(StreamHeader::PowerOff),
            (kind, _) => Err(BadStreamHeader::Kind(kind)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn owner_messages_read_back(port: u32, connect: bool) {
            let message = if connect {
                OwnerMessage::Connect { port }
            } else {
                OwnerMessage::Accepted { port }
            };
            prop_assert_eq!(OwnerMessage::decode(&message.encode()), Ok(message));
        }

        #[test]
        fn any_packet_is_parsed_or_refused(packet: Vec<u8>) {
            if let Ok(message) = OwnerMessage::decode(&packet) {
                prop_assert_eq!(&message.encode()[..], &packet[..]);
            }
        }

        #[test]
        fn any_header_is_parsed_or_refused(bytes: [u8; StreamHeader::BYTES]) {
            if let Ok(StreamHeader::Stdio { stream_id }) = StreamHeader::decode(&bytes) {
                prop_assert_eq!(StreamHeader::Stdio { stream_id }.encode(), bytes);
            }
        }

        #[test]
        fn stdio_headers_read_back(stream_id in 1u64..) {
            let header = StreamHeader::Stdio { stream_id };
            prop_assert_eq!(StreamHeader::decode(&header.encode()), Ok(header));
        }
    }

    #[test]
    fn stream_id_zero_is_refused() {
        let bytes = StreamHeader::Stdio { stream_id: 0 }.encode();
        assert_eq!(StreamHeader::decode(&bytes), Err(BadStreamHeader::ZeroId));
    }
}
