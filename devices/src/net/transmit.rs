//! A transmit queue: packets of the driver into a tap.

use super::receive::PACKET_MAX_BYTES;
use super::server::NetCounters;
use super::tap::{HEADER_BYTES, Tap};
use crate::GuestMemory;
use crate::syscall::VECTORS_MAX;
use crate::virtio::queue::{ActiveQueue, Broken, QueuePosition};
use rustix::io::Errno;
use std::sync::Arc;
use vm_memory::VolatileSlice;

/// Least bytes of a packet: its header and that of Ethernet.
const PACKET_MIN_BYTES: usize = HEADER_BYTES + 14;

/// How a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Nothing is left to send, or so much that it is others' turn, and the queue kicks itself.
    Over,
    /// The tap has no room.
    Blocked,
}

/// A transmit queue.
pub(super) struct Transmit {
    queue: ActiveQueue,
    counters: Arc<NetCounters>,
}

impl Transmit {
    pub(super) fn new(queue: ActiveQueue, counters: Arc<NetCounters>) -> Transmit {
        Transmit { queue, counters }
    }

    /// Number of the queue.
    pub(super) fn index(&self) -> u16 {
        self.queue.index
    }

    /// Where it stands.
    pub(super) fn position(&self) -> QueuePosition {
        self.queue.position()
    }

    /// Sends what there is, as many packets as the queue is long, or without a tap throws it away; whether the driver is to be told, and how it ended.
    ///
    /// # Errors
    /// The driver broke the queue.
    pub(super) fn turn(
        &mut self,
        tap: Option<&Tap>,
        memory: &GuestMemory,
    ) -> Result<(bool, Turn), Broken> {
        let mut left = self.queue.size();
        let mut turn = Turn::Over;
        self.queue.disable_kicks(memory)?;
        'sent: loop {
            while left > 0 {
                let Some(chain) = self.queue.pop(memory)? else {
                    break;
                };
                left -= 1;
                let mut buffers = self.queue.open(memory, &chain)?;
                let pieces: Vec<VolatileSlice<'_>> =
                    std::iter::from_fn(|| buffers.readable.next_piece(usize::MAX)).collect();
                match tap.map_or(Ok(None), |tap| send(tap, &pieces)) {
                    Ok(Some(bytes)) => {
                        self.counters.tx_packets.add(1);
                        self.counters.tx_bytes.add(bytes as u64);
                    }
                    Ok(None) => self.counters.tx_dropped.add(1),
                    Err(Full) => {
                        self.queue.undo_pop();
                        turn = Turn::Blocked;
                        break 'sent;
                    }
                }
                self.queue.push_used(memory, chain.head_index(), 0)?;
            }
            if left == 0 {
                // Fails only when the counter is full, and then the fd is readable anyway.
                let _ = self.queue.kick.write(1);
                break;
            }
            if !self.queue.enable_kicks(memory)? {
                break;
            }
        }
        Ok((self.queue.needs_notification(memory)?, turn))
    }
}

/// The tap has no room now.
#[derive(Debug, PartialEq, Eq)]
struct Full;

/// Sends one packet and returns its bytes, or drops what is none: the host's kernel looks at its header.
fn send(tap: &Tap, pieces: &[VolatileSlice<'_>]) -> Result<Option<usize>, Full> {
    let bytes: usize = pieces.iter().map(VolatileSlice::len).sum();
    if !(PACKET_MIN_BYTES..=PACKET_MAX_BYTES).contains(&bytes) || pieces.len() > VECTORS_MAX {
        return Ok(None);
    }
    loop {
        match tap.send(pieces) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Err(Full),
            Ok(_) => return Ok(Some(bytes)),
            Err(_) => return Ok(None),
        }
    }
}
