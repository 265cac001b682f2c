//! A receive queue: packets of a tap into the buffers that the driver lends.

use super::lent::Lent;
use super::server::NetCounters;
use super::tap::{HEADER_BYTES, Tap};
use crate::GuestMemory;
use crate::virtio::queue::{ActiveQueue, Broken, QueuePosition};
use rustix::io::Errno;
use std::sync::Arc;
use vm_memory::VolatileSlice;

/// Most packets of one turn; then others get theirs.
const PACKETS_PER_TURN: usize = 128;
/// The largest packet that a tap hands over: 64 KiB less one, which is what an IP packet can be, its Ethernet header with a
/// VLAN tag, and ours.
pub(super) const PACKET_MAX_BYTES: usize = 65_535 + 18 + HEADER_BYTES;

/// How a turn ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// The tap has no packet now, or had so many that it is others' turn.
    Over,
    /// The driver has lent too little; it kicks when there is more.
    Starved,
}

/// A receive queue.
pub(super) struct Receive {
    queue: ActiveQueue,
    lent: Lent,
    /// A packet may fill several buffers (VIRTIO_NET_F_MRG_RXBUF).
    mergeable: bool,
    /// Bytes of the largest packet that may come, with its header.
    largest: usize,
    /// A packet that waits for the driver to lend more.
    held: Option<Vec<u8>>,
    /// The next chain has room for nothing. It comes back after those that are lent, which so stay what was taken off the queue
    /// last, and none behind it can be lent before.
    roomless_next: bool,
    counters: Arc<NetCounters>,
}

impl Receive {
    pub(super) fn new(
        queue: ActiveQueue,
        memory: GuestMemory,
        mergeable: bool,
        largest: usize,
        counters: Arc<NetCounters>,
    ) -> Receive {
        Receive {
            queue,
            lent: Lent::new(memory),
            mergeable,
            largest,
            held: None,
            roomless_next: false,
            counters,
        }
    }

    /// Number of the queue.
    pub(super) fn index(&self) -> u16 {
        self.queue.index
    }

    /// Where it stands, with all that is lent given back: it is what was taken off the queue last.
    pub(super) fn position(&self) -> QueuePosition {
        let position = self.queue.position();
        // No more chains than the queue is long.
        let lent = self.lent.chains() as u16;
        QueuePosition {
            next_available: position.next_available.wrapping_sub(lent),
            ..position
        }
    }

    /// Takes packets off the tap; whether the driver is to be told, and how it ended.
    ///
    /// # Errors
    /// The driver broke the queue.
    pub(super) fn turn(&mut self, tap: &Tap, memory: &GuestMemory) -> Result<(bool, Turn), Broken> {
        // As many chains as the queue is long; then others get their turn.
        let mut left = self.queue.size();
        let mut turn = Turn::Over;
        for _ in 0..PACKETS_PER_TURN {
            self.borrow(memory, &mut left)?;
            if self.lent.chains() == 0 {
                turn = Turn::Starved;
                break;
            }
            match self.next(tap) {
                Ok(Some(bytes)) => {
                    let chains = self.lent.take(bytes);
                    self.queue.push_used_together(memory, &chains)?;
                    self.counters.rx_packets.add(1);
                    self.counters.rx_bytes.add(bytes as u64);
                }
                Ok(None) => {
                    turn = Turn::Starved;
                    break;
                }
                Err(Errno::INTR) => {}
                // It did not fit, or is larger than agreed on.
                Err(Errno::MSGSIZE) => self.counters.rx_dropped.add(1),
                // None is there; or the tap is going away, of which the loop is told by a hang-up.
                Err(_) => break,
            }
        }
        if left == 0 && turn == Turn::Starved {
            // There may be more in the queue than was looked at. Fails only when the counter is full, and then the fd is
            // readable anyway.
            let _ = self.queue.kick.write(1);
        }
        Ok((self.queue.needs_notification(memory)?, turn))
    }

    /// Puts a packet to the front of what is lent; its bytes, or `None` if it has to wait for the driver to lend more.
    fn next(&mut self, tap: &Tap) -> Result<Option<usize>, Errno> {
        let chains = if self.mergeable { usize::MAX } else { 1 };
        let fits_all = !self.mergeable || self.lent.bytes() >= self.largest;
        let bytes = if self.held.is_none() && fits_all {
            self.lent.receive(tap, chains)?
        } else {
            let packet = match self.held.take() {
                Some(packet) => packet,
                None => read(tap)?,
            };
            if packet.len() > self.lent.room(chains) {
                if self.all_is_lent() {
                    return Err(Errno::MSGSIZE);
                }
                self.held = Some(packet);
                return Ok(None);
            }
            self.lent.copy(&packet);
            packet.len()
        };
        match (HEADER_BYTES..=self.largest).contains(&bytes) {
            true => Ok(Some(bytes)),
            false => Err(Errno::MSGSIZE),
        }
    }

    /// Takes buffers from the driver until a packet of any size fits, or it has lent all it wants to; then it kicks when there
    /// is more.
    fn borrow(&mut self, memory: &GuestMemory, left: &mut u16) -> Result<(), Broken> {
        self.roomless_next &= self.lent.chains() > 0;
        loop {
            while !self.enough() && *left > 0 {
                let Some(chain) = self.queue.pop(memory)? else {
                    break;
                };
                *left -= 1;
                let mut buffers = self.queue.open(memory, &chain)?;
                let pieces: Vec<VolatileSlice<'_>> =
                    std::iter::from_fn(|| buffers.writable.next_piece(usize::MAX)).collect();
                if !pieces.is_empty() {
                    self.lent.add(chain.head_index(), &pieces);
                } else if self.lent.chains() > 0 {
                    self.queue.undo_pop();
                    self.roomless_next = true;
                } else {
                    self.queue.push_used(memory, chain.head_index(), 0)?;
                }
            }
            if self.enough() {
                return Ok(self.queue.disable_kicks(memory)?);
            }
            if !self.queue.enable_kicks(memory)? || *left == 0 {
                return Ok(());
            }
        }
    }

    /// Whether a packet of any size fits, or no more can be lent.
    fn enough(&self) -> bool {
        // Without merging each packet has one buffer, whatever its size.
        let wanted = if self.mergeable { self.largest } else { 1 };
        self.lent.bytes() >= wanted || self.all_is_lent()
    }

    /// A driver that has lent all that its queue holds will not lend more; nor can one call of the kernel take more.
    fn all_is_lent(&self) -> bool {
        self.lent.is_full()
            || self.lent.chains() >= usize::from(self.queue.size())
            || self.roomless_next
    }
}

impl Drop for Receive {
    fn drop(&mut self) {
        if self.held.is_some() {
            self.counters.rx_dropped.add(1);
        }
    }
}

/// A packet into host memory: how large it is, is known only when it is read.
fn read(tap: &Tap) -> Result<Vec<u8>, Errno> {
    let mut packet = vec![0; PACKET_MAX_BYTES];
    let bytes = tap.receive_to(&mut packet)?;
    packet.truncate(bytes);
    packet.shrink_to_fit();
    Ok(packet)
}
