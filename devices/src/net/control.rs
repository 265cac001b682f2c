//! The control queue (virtio 1.2 section 5.1.6.5): what a driver may change while the card runs, which is how many pairs of queues
//! it uses. Pure.
//!
//! Offloads are not changed by it (VIRTIO_NET_F_CTRL_GUEST_OFFLOADS): each change takes a lock that the whole host has but once.

use crate::virtio::chain::Readable;
use std::io::Read;

/// VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.
const SET_PAIRS: [u8; 2] = [4, 0];

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Ack {
    Ok = 0,
    Error = 1,
}

/// The pairs of queues that the driver uses from now on, of at most `most`; `None` refuses the command.
pub(super) fn parse(readable: &mut Readable<'_>, most: u16) -> Option<u16> {
    let mut command = [0; 2];
    readable.read_exact(&mut command).ok()?;
    if command != SET_PAIRS || readable.remaining() != 2 {
        return None;
    }
    let mut pairs = [0; 2];
    readable.read_exact(&mut pairs).ok()?;
    let pairs = u16::from_le_bytes(pairs);
    (1..=most).contains(&pairs).then_some(pairs)
}
