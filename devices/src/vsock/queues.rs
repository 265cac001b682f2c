//! The three queues of the device while a driver runs it.
//!
//! One call serves at most as many chains of a queue as it is long; connections take turns of one batch of
//! receive buffers each. A batch is read from the host's socket by one system call straight into the
//! guest's buffers, behind the place of each one's header.

use super::connection::Connection;
use super::device::{Core, RESETS_MAX};
use super::packet::{HEADER_BYTES, Packet, ResetReply};
use super::peer::{Filled, Peer};
use super::table::PeerId;
use crate::GuestMemory;
use crate::counters::counters;
use crate::virtio::chain::{Buffers, Readable, Writable};
use crate::virtio::device::{Activation, DeviceError, Interrupt};
use crate::virtio::queue::{ActiveQueue, BrokenQueue, Positions, ServeError, positions};
use std::io::Read;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use vm_memory::VolatileSlice;

const RX: u16 = 0;
const TX: u16 = 1;
const EVENT: u16 = 2;
/// Most receive buffers filled by one read of a socket. Linux' are a page each, so that this is 64 KiB.
const BATCH_CHAINS: usize = 18;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (section 5.10.6.7).
const EVENT_TRANSPORT_RESET: u32 = 0;

/// What came of a wish for a receive buffer or a turn that needs one.
enum Outcome<T> {
    Done(T),
    /// The driver has none left, or this call has served its share.
    NoBuffer,
}

/// A receive buffer of the guest.
struct Slot<'m> {
    head: u16,
    /// Where the header goes.
    header: Vec<VolatileSlice<'m>>,
    /// Where the payload goes.
    payload: Writable<'m>,
}

counters! {
    /// Packets and connections, as the guest sees them: `rx` are those that it gets.
    VsockCounters {
        /// Packets for the guest.
        rx_packets,
        /// Their payload.
        rx_bytes,
        /// Packets of the guest.
        tx_packets,
        /// Their payload.
        tx_bytes,
        /// Connects of the guest that were made.
        guest_connects,
        /// Connects of the guest that were refused.
        guest_refused,
        /// Connects of the host.
        host_connects,
    }
}

/// A queue and whether the driver is owed a word about it.
struct Served {
    queue: ActiveQueue,
    pushed: bool,
}

impl Served {
    fn push(&mut self, memory: &GuestMemory, head: u16, len: u32) -> Result<(), BrokenQueue> {
        self.pushed = true;
        self.queue.push_used(memory, head, len)
    }

    fn interrupt(
        &mut self,
        memory: &GuestMemory,
        interrupt: &dyn Interrupt,
    ) -> Result<(), BrokenQueue> {
        if std::mem::take(&mut self.pushed) && self.queue.needs_notification(memory)? {
            interrupt.used(self.queue.index);
        }
        Ok(())
    }

    fn open<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<Buffers<'m>>, ServeError> {
        let Some(chain) = self.queue.pop(memory)? else {
            return Ok(None);
        };
        match self.queue.open(memory, &chain) {
            Ok(buffers) => Ok(Some(buffers)),
            Err(cause) => Err(ServeError::Chain {
                index: self.queue.index,
                cause,
            }),
        }
    }
}

pub(super) struct Queues {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    rx: Served,
    tx: Served,
    event: Served,
    counters: Arc<VsockCounters>,
}

impl Queues {
    /// All three must be there.
    pub(super) fn new(
        activation: Activation,
        counters: Arc<VsockCounters>,
    ) -> Result<Queues, DeviceError> {
        let mut queues = activation.queues.into_iter();
        let mut take = |index| match queues.next().flatten() {
            Some(queue) => Ok(Served {
                queue,
                pushed: false,
            }),
            None => Err(DeviceError::QueueMissing(index)),
        };
        Ok(Queues {
            memory: activation.memory,
            interrupt: activation.interrupt,
            rx: take(RX)?,
            tx: take(TX)?,
            event: take(EVENT)?,
            counters,
        })
    }

    /// Where the device stands in them.
    pub(super) fn positions(&self) -> Positions {
        positions([&self.rx, &self.tx, &self.event].map(|served| &served.queue))
    }

    /// The fds of the driver's notifications, by token: the queue's number.
    pub(super) fn kicks(&self) -> [(u64, RawFd); 3] {
        [&self.rx, &self.tx, &self.event].map(|served| {
            let queue = &served.queue;
            (u64::from(queue.index), queue.kick.as_raw_fd())
        })
    }

    pub(super) fn needs_reset(&self) {
        self.interrupt.needs_reset();
    }

    /// Sends the interrupts that the driver wants for all that was done since the last time.
    pub(super) fn interrupt(&mut self) -> Result<(), ServeError> {
        for served in [&mut self.rx, &mut self.tx, &mut self.event] {
            served.interrupt(&self.memory, &*self.interrupt)?;
        }
        Ok(())
    }

    /// Takes the guest's packets, unless too many of them wait for an answer.
    pub(super) fn transmit(&mut self, core: &mut Core) -> Result<(), ServeError> {
        let memory = Arc::clone(&self.memory);
        let mut left = self.tx.queue.size();
        self.tx.queue.disable_kicks(&memory)?;
        loop {
            while left > 0 && core.resets.len() < RESETS_MAX {
                let Some(mut buffers) = self.tx.open(&memory)? else {
                    break;
                };
                take_packet(core, &mut buffers.readable);
                self.tx.push(&memory, buffers.head, 0)?;
                left -= 1;
            }
            if core.resets.len() >= RESETS_MAX {
                // Stays due: goes on when the guest has taken some of the answers.
                return Ok(());
            }
            if left == 0 {
                core.resume_later();
                return Ok(());
            }
            if !self.tx.queue.enable_kicks(&memory)? {
                core.tx_due = false;
                return Ok(());
            }
        }
    }

    /// Sends the guest what waits for it, as far as it has buffers.
    pub(super) fn receive(&mut self, core: &mut Core) -> Result<(), ServeError> {
        let memory = Arc::clone(&self.memory);
        let mut left = usize::from(self.rx.queue.size());
        // Each connection that waits now gets one turn; sockets that are ready but not yet heard come
        // before anyone gets a second.
        let mut turns = core.table.turns().max(core.resets.len());
        let held_back = core.resets.len() >= RESETS_MAX;
        self.rx.queue.disable_kicks(&memory)?;
        while core.table.turns() > 0 || !core.resets.is_empty() {
            if left == 0 || turns == 0 {
                core.resume_later();
                break;
            }
            match self.turn(core, &memory, &mut left)? {
                Outcome::Done(()) => turns -= 1,
                // Only now are the driver's kicks of any use.
                Outcome::NoBuffer if left > 0 => {
                    if !self.rx.queue.enable_kicks(&memory)? {
                        break;
                    }
                }
                Outcome::NoBuffer => {}
            }
        }
        if held_back && core.resets.len() < RESETS_MAX {
            core.resume_later();
        }
        Ok(())
    }

    /// One answer to a packet of nobody, and one connection's turn.
    fn turn(
        &mut self,
        core: &mut Core,
        memory: &GuestMemory,
        left: &mut usize,
    ) -> Result<Outcome<()>, ServeError> {
        if let Some(reply) = core.resets.front().map(ResetReply::encode) {
            let Outcome::Done(slot) = self.slot(memory, left)? else {
                return Ok(Outcome::NoBuffer);
            };
            core.resets.pop_front();
            self.send(memory, &slot, &reply, 0)?;
        }
        let Some(id) = core.table.take_turn() else {
            return Ok(Outcome::Done(()));
        };
        let outcome = self.connection_turn(core, id, memory, left)?;
        if let Outcome::NoBuffer = outcome {
            core.table.untake_turn(id);
        }
        core.settle(id);
        Ok(outcome)
    }

    fn connection_turn(
        &mut self,
        core: &mut Core,
        id: PeerId,
        memory: &GuestMemory,
        left: &mut usize,
    ) -> Result<Outcome<()>, ServeError> {
        let guest_cid = core.guest_cid;
        let Some(peer) = core.table.get(id) else {
            return Ok(Outcome::Done(()));
        };
        // The last bytes of a host that is gone come before the word that it is.
        if !peer.is_hung_up() {
            if let Outcome::NoBuffer = self.control(peer, guest_cid, memory, left)? {
                return Ok(Outcome::NoBuffer);
            }
            return self.data(peer, guest_cid, memory, left);
        }
        match self.data(peer, guest_cid, memory, left)? {
            Outcome::Done(()) if peer.room() == 0 => self.control(peer, guest_cid, memory, left),
            outcome => Ok(outcome),
        }
    }

    /// Sends all that a connection has to say without payload.
    fn control(
        &mut self,
        peer: &mut Peer,
        guest_cid: u64,
        memory: &GuestMemory,
        left: &mut usize,
    ) -> Result<Outcome<()>, ServeError> {
        while peer.connection().is_some_and(|c| c.wants_control()) {
            let Outcome::Done(slot) = self.slot(memory, left)? else {
                return Ok(Outcome::NoBuffer);
            };
            // Wants to send, so there is a packet.
            if let Some(packet) = peer.connection().and_then(Connection::take_control) {
                self.send(memory, &slot, &packet.encode(guest_cid), 0)?;
            }
        }
        Ok(Outcome::Done(()))
    }

    /// Reads one batch of the host's data into the guest's buffers.
    fn data(
        &mut self,
        peer: &mut Peer,
        guest_cid: u64,
        memory: &GuestMemory,
        left: &mut usize,
    ) -> Result<Outcome<()>, ServeError> {
        let room = peer.room() as usize;
        if room == 0 {
            return Ok(Outcome::Done(()));
        }
        let mut pieces = Vec::new();
        let batch = self.batch(memory, left, room, &mut pieces)?;
        if batch.is_empty() {
            return Ok(Outcome::NoBuffer);
        }
        let mut bytes = match peer.fill(&pieces) {
            Filled::Bytes(bytes) => bytes,
            Filled::Nothing => 0,
        };
        for (slot, capacity) in &batch {
            let length = bytes.min(*capacity);
            match peer.connection() {
                Some(connection) if length > 0 => {
                    bytes -= length;
                    // No more than the connection's room, which is 32 bits wide.
                    let packet = connection.take_data(length as u32);
                    self.send(memory, slot, &packet.encode(guest_cid), length as u32)?;
                }
                _ => {
                    // Untouched, and the last ones popped.
                    self.rx.queue.undo_pop();
                    *left += 1;
                }
            }
        }
        peer.ask_for_room();
        Ok(Outcome::Done(()))
    }

    /// The next receive buffer that holds a header.
    fn slot<'m>(
        &mut self,
        memory: &'m GuestMemory,
        left: &mut usize,
    ) -> Result<Outcome<Slot<'m>>, ServeError> {
        while *left > 0 {
            let Some(buffers) = self.rx.open(memory)? else {
                return Ok(Outcome::NoBuffer);
            };
            *left -= 1;
            match Slot::new(buffers) {
                Ok(slot) => return Ok(Outcome::Done(slot)),
                // Of no use for anything; goes back empty, which Linux drops.
                Err(head) => self.rx.push(memory, head, 0)?,
            }
        }
        Ok(Outcome::NoBuffer)
    }

    /// Receive buffers for up to `room` bytes of payload, each with the bytes it is to take; `pieces` gets
    /// their memory.
    fn batch<'m>(
        &mut self,
        memory: &'m GuestMemory,
        left: &mut usize,
        room: usize,
        pieces: &mut Vec<VolatileSlice<'m>>,
    ) -> Result<Vec<(Slot<'m>, usize)>, ServeError> {
        let mut batch = Vec::with_capacity(BATCH_CHAINS.min(*left));
        let mut room = room;
        while room > 0 && batch.len() < BATCH_CHAINS && *left > 0 {
            let Some(buffers) = self.rx.open(memory)? else {
                break;
            };
            let head = buffers.head;
            let slot = Slot::new(buffers);
            let usable = slot.ok().filter(|slot| slot.payload.remaining() > 0);
            let Some(mut slot) = usable else {
                if batch.is_empty() {
                    *left -= 1;
                    self.rx.push(memory, head, 0)?;
                    continue;
                }
                // Buffers are given back from the last one on, so none among them may be used up.
                self.rx.queue.undo_pop();
                break;
            };
            *left -= 1;
            let before = room;
            while let Some(piece) = slot.payload.next_piece(room) {
                room -= piece.len();
                pieces.push(piece);
            }
            batch.push((slot, before - room));
        }
        Ok(batch)
    }

    fn send(
        &mut self,
        memory: &GuestMemory,
        slot: &Slot<'_>,
        header: &[u8; HEADER_BYTES],
        payload_bytes: u32,
    ) -> Result<(), BrokenQueue> {
        let mut rest = &header[..];
        for piece in &slot.header {
            let (now, later) = rest.split_at(piece.len().min(rest.len()));
            piece.copy_from(now);
            rest = later;
        }
        self.counters.rx_packets.add(1);
        self.counters.rx_bytes.add(u64::from(payload_bytes));
        let length = HEADER_BYTES as u32 + payload_bytes;
        self.rx.push(memory, slot.head, length)
    }

    /// Tells the driver of a transport reset, if it is to be told and has a buffer for it.
    pub(super) fn event(&mut self, core: &mut Core) -> Result<(), ServeError> {
        let memory = Arc::clone(&self.memory);
        let mut left = self.event.queue.size();
        while core.owes_reset_event && left > 0 {
            left -= 1;
            let Some(mut buffers) = self.event.open(&memory)? else {
                if self.event.queue.enable_kicks(&memory)? {
                    continue;
                }
                break;
            };
            let event = EVENT_TRANSPORT_RESET.to_le_bytes();
            core.owes_reset_event = buffers.writable.write_struct(&event).is_err();
            let written = buffers.writable.written();
            self.event.push(&memory, buffers.head, written)?;
        }
        Ok(())
    }
}

impl<'m> Slot<'m> {
    /// A chain whose writable part holds a header. An error is the head of one that does not.
    fn new(mut buffers: Buffers<'m>) -> Result<Slot<'m>, u16> {
        if buffers.writable.remaining() < HEADER_BYTES {
            return Err(buffers.head);
        }
        let mut header = Vec::with_capacity(1);
        let mut left = HEADER_BYTES;
        while let Some(piece) = buffers.writable.next_piece(left) {
            left -= piece.len();
            header.push(piece);
        }
        Ok(Slot {
            head: buffers.head,
            header,
            payload: buffers.writable,
        })
    }
}

/// Reads one packet of the guest and hands it to its connection.
fn take_packet(core: &mut Core, readable: &mut Readable<'_>) {
    let mut header = [0; HEADER_BYTES];
    if readable.remaining() < HEADER_BYTES || readable.read_exact(&mut header).is_err() {
        // Nobody to answer: it has no address.
        return;
    }
    match Packet::parse(&header, readable.remaining(), core.guest_cid) {
        Ok(packet) => {
            let mut payload = Vec::new();
            let mut left = packet.payload_bytes();
            while let Some(piece) = readable.next_piece(left) {
                left -= piece.len();
                payload.push(piece);
            }
            core.counters.tx_packets.add(1);
            core.counters.tx_bytes.add(packet.payload_bytes() as u64);
            core.route(&packet, &mut payload);
        }
        Err(refused) => {
            if let Some(id) = refused.breaks.and_then(|ports| core.table.find(ports)) {
                core.end(id, false);
            }
            core.resets.extend(refused.reply);
        }
    }
}
