//! Requests of the driver (section 5.15.6): their bytes, checked once against the region that they are about.

use std::ops::Range;

/// `struct virtio_mem_req`, in bytes.
pub(super) const REQUEST_BYTES: usize = 24;
/// `struct virtio_mem_resp`, in bytes.
pub(super) const RESPONSE_BYTES: usize = 10;

// Types of requests, VIRTIO_MEM_REQ_*.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// What blocks there are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Extent {
    /// Guest-physical address of the first.
    pub(super) start: u64,
    /// How many.
    pub(super) count: u64,
    /// Size of each, in bytes.
    pub(super) block_bytes: u64,
}

/// A request. Ranges are of block numbers, not empty, and of blocks that there are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    Plug(Range<u64>),
    Unplug(Range<u64>),
    UnplugAll,
    State(Range<u64>),
}

/// Not a request about this region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadRequest;

/// What the driver is answered, VIRTIO_MEM_RESP_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Response {
    /// It is done.
    Ack,
    /// More than the guest was asked to have.
    Nack,
    /// The host cannot do it now.
    Busy,
    /// The request makes no sense.
    Error,
    /// The state of blocks.
    State(State),
}

/// VIRTIO_MEM_STATE_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Plugged,
    Unplugged,
    Mixed,
}

impl Request {
    pub(super) fn parse(bytes: [u8; REQUEST_BYTES], extent: Extent) -> Result<Request, BadRequest> {
        // Type, padding to 8 bytes, address, number of blocks, padding.
        let [
            kind_0,
            kind_1,
            _,
            _,
            _,
            _,
            _,
            _,
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            blocks_0,
            blocks_1,
            ..,
        ] = bytes;
        let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let blocks = u16::from_le_bytes([blocks_0, blocks_1]);
        let range = || extent.range(address, blocks).ok_or(BadRequest);
        match u16::from_le_bytes([kind_0, kind_1]) {
            PLUG => Ok(Request::Plug(range()?)),
            UNPLUG => Ok(Request::Unplug(range()?)),
            UNPLUG_ALL => Ok(Request::UnplugAll),
            STATE => Ok(Request::State(range()?)),
            _ => Err(BadRequest),
        }
    }
}

impl Extent {
    /// Size of all blocks together.
    pub(super) fn bytes(self) -> u64 {
        self.count * self.block_bytes
    }

    fn range(self, address: u64, blocks: u16) -> Option<Range<u64>> {
        let offset = address.checked_sub(self.start)?;
        let first = offset / self.block_bytes;
        let end = first.checked_add(u64::from(blocks))?;
        let sound = offset % self.block_bytes == 0 && blocks > 0 && end <= self.count;
        sound.then_some(first..end)
    }
}

impl Response {
    pub(super) fn bytes(self) -> [u8; RESPONSE_BYTES] {
        let (kind, state) = match self {
            Response::Ack => (0, 0),
            Response::Nack => (1, 0),
            Response::Busy => (2, 0),
            Response::Error => (3, 0),
            Response::State(State::Plugged) => (0, 0),
            Response::State(State::Unplugged) => (0, 1),
            Response::State(State::Mixed) => (0, 2),
        };
        // Both are small: little-endian, with zeroes above.
        [kind, 0, 0, 0, 0, 0, 0, 0, state, 0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EXTENT: Extent = Extent {
        start: 4 << 30,
        count: 64,
        block_bytes: 2 << 20,
    };

    fn parsed(kind: u16, address: u64, blocks: u16) -> Result<Request, BadRequest> {
        let mut bytes = [0xff; REQUEST_BYTES];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&address.to_le_bytes());
        bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
        Request::parse(bytes, EXTENT)
    }

    #[test]
    fn requests_name_blocks_by_their_addresses() {
        let third = EXTENT.start + 2 * EXTENT.block_bytes;
        assert_eq!(parsed(0, third, 3), Ok(Request::Plug(2..5)));
        assert_eq!(parsed(1, EXTENT.start, 64), Ok(Request::Unplug(0..64)));
        assert_eq!(parsed(2, 1, 0), Ok(Request::UnplugAll));
        assert_eq!(parsed(3, third, 1), Ok(Request::State(2..3)));
        for kind in [4, 0x100, u16::MAX] {
            assert_eq!(parsed(kind, third, 1), Err(BadRequest));
        }
    }

    #[test]
    fn ranges_that_are_empty_misaligned_or_outside_are_refused() {
        let end = EXTENT.start + 64 * EXTENT.block_bytes;
        for (address, blocks) in [
            (EXTENT.start, 0),
            (EXTENT.start + 4096, 1),
            (EXTENT.start - EXTENT.block_bytes, 1),
            (EXTENT.start, 65),
            (end, 1),
            (end - EXTENT.block_bytes, 2),
            (0, u16::MAX),
            (u64::MAX, u16::MAX),
            (!(EXTENT.block_bytes - 1), 1),
        ] {
            assert_eq!(
                parsed(0, address, blocks),
                Err(BadRequest),
                "{address:#x} {blocks}"
            );
        }
    }

    proptest! {
        #[test]
        fn whatever_is_asked_for_is_of_blocks_that_there_are(bytes in any::<[u8; REQUEST_BYTES]>(), near in any::<bool>(), at in 0u64..80) {
            let mut bytes = bytes;
            bytes[0] %= 5;
            bytes[1] = 0;
            if near {
                let address = EXTENT.start + at * EXTENT.block_bytes;
                bytes[8..16].copy_from_slice(&address.to_le_bytes());
                bytes[17] = 0;
            }
            if let Ok(Request::Plug(range) | Request::Unplug(range) | Request::State(range)) = Request::parse(bytes, EXTENT) {
                prop_assert!(range.start < range.end && range.end <= EXTENT.count);
            }
        }
    }
}
