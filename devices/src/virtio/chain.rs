//! The only code that walks descriptors (virtio 1.2 section 2.7.5): from a head that the driver made
//! available to the bytes that a device may read and write.
//!
//! `virtio_queue` walks a chain too, but as an iterator that just ends at whatever it does not like: a loop,
//! a bad index, a nested table all look like a shorter chain, and it cannot know that indirect tables were
//! not agreed on. So [`Buffers`] walks once itself, and a chain is either wholly as the section says or it is
//! [`BadChain`]:
//! - each buffer is one slice, taken with its whole length from one region of memory (CVE-2019-18960,
//!   CVE-2026-5747: never a start address alone), and not empty;
//! - readable buffers come before writable ones (2.7.4.2);
//! - at most as many descriptors as the queue is long, in a table or out of it, and 2^32 - 1 bytes;
//! - an indirect table only where it was agreed on, alone (no NEXT beside it), not nested, of whole entries.
//!
//! Each descriptor is read once, into host memory, so the driver gains nothing by changing it afterwards.
//! The buffers' contents stay the driver's to change: read once, then check.
//!
//! Two heads in flight may name the same descriptors. Nothing here keeps state by head and slices are
//! volatile, so a driver that does so only garbles its own data; a device that keeps state by head must
//! refuse the second itself (CVE-2026-45782).

use crate::memory::{self, GuestMemory};
use std::io::{self, Read, Write};
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued, VolatileSlice};

/// Bytes of one descriptor.
const DESCRIPTOR_BYTES: u32 = 16;
/// Flags of a descriptor, in the width they have there.
const NEXT: u16 = VRING_DESC_F_NEXT as u16;
const WRITE: u16 = VRING_DESC_F_WRITE as u16;
const INDIRECT: u16 = VRING_DESC_F_INDIRECT as u16;

/// The driver made available what is no chain. The device asks for a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadChain {
    /// A descriptor index beyond the table.
    #[error("descriptor {index} is beyond a table of {size}")]
    Index {
        /// The index.
        index: u16,
        /// Entries of the table.
        size: u32,
    },
    /// More descriptors than the queue has, which a loop also is.
    #[error("chain is longer than the queue")]
    TooLong,
    /// More than 2^32 - 1 bytes in all.
    #[error("chain has more than 2^32 - 1 bytes")]
    TooLarge,
    /// A buffer that is empty, not in memory, or not in one region of it.
    #[error("buffer {address:#x}+{length:#x} is empty or not in memory")]
    Buffer {
        /// Guest address.
        address: u64,
        /// Length in bytes.
        length: u32,
    },
    /// A readable buffer behind a writable one.
    #[error("readable buffer behind a writable one")]
    Order,
    /// An indirect table that was not agreed on, is nested, has a next, or is no table.
    #[error("indirect descriptor is not allowed here or its table of {length} bytes is none")]
    Indirect {
        /// Length of the table in bytes.
        length: u32,
    },
    /// A descriptor that cannot be read.
    #[error("descriptor table at {address:#x} is not in memory")]
    Table {
        /// Where the descriptor should be.
        address: u64,
    },
}

/// What of a queue the walk needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table {
    /// Guest address of the descriptor table.
    pub(crate) address: u64,
    /// Size of the queue.
    pub(crate) size: u16,
    /// Whether VIRTIO_F_INDIRECT_DESC was agreed on.
    pub(crate) indirect: bool,
}

/// The buffers of one chain.
pub struct Buffers<'m> {
    /// Index of the chain's first descriptor, by which it is handed back.
    pub head: u16,
    /// What the driver sends.
    pub readable: Readable<'m>,
    /// Where the device may answer.
    pub writable: Writable<'m>,
}

impl<'m> Buffers<'m> {
    pub(crate) fn walk(
        memory: &'m GuestMemory,
        queue: Table,
        head: u16,
    ) -> Result<Buffers<'m>, BadChain> {
        let mut walk = Walk {
            memory,
            readable: Vec::new(),
            writable: Vec::new(),
            bytes: 0,
            left: queue.size,
        };
        walk.table(queue.address, u32::from(queue.size), head, queue.indirect)?;
        Ok(Buffers {
            head,
            readable: Readable(Cursor::new(walk.readable)),
            writable: Writable(Cursor::new(walk.writable)),
        })
    }
}

struct Walk<'m> {
    memory: &'m GuestMemory,
    readable: Vec<VolatileSlice<'m>>,
    writable: Vec<VolatileSlice<'m>>,
    bytes: u32,
    /// Descriptors that may still come. The descriptor that names an indirect table is not counted.
    left: u16,
}

impl Walk<'_> {
    /// Walks one table; an indirect one in it with a recursion of depth one at most.
    fn table(&mut self, base: u64, size: u32, first: u16, indirect: bool) -> Result<(), BadChain> {
        let mut index = first;
        loop {
            let descriptor = self.read(base, size, index)?;
            let flags = descriptor.flags();
            if flags & INDIRECT != 0 {
                let length = descriptor.len();
                let whole = length != 0 && length % DESCRIPTOR_BYTES == 0;
                if !indirect || flags & NEXT != 0 || !whole {
                    return Err(BadChain::Indirect { length });
                }
                let entries = length / DESCRIPTOR_BYTES;
                return self.table(descriptor.addr().0, entries, 0, false);
            }
            self.buffer(&descriptor, flags & WRITE != 0)?;
            if flags & NEXT == 0 {
                return Ok(());
            }
            index = descriptor.next();
        }
    }

    fn read(&self, base: u64, size: u32, index: u16) -> Result<Descriptor, BadChain> {
        if u32::from(index) >= size {
            return Err(BadChain::Index { index, size });
        }
        let address = base
            .checked_add(u64::from(index) * u64::from(DESCRIPTOR_BYTES))
            .ok_or(BadChain::Table { address: base })?;
        memory::read(self.memory, address).map_err(|_| BadChain::Table { address })
    }

    fn buffer(&mut self, descriptor: &Descriptor, write: bool) -> Result<(), BadChain> {
        self.left = self.left.checked_sub(1).ok_or(BadChain::TooLong)?;
        let length = descriptor.len();
        self.bytes = self.bytes.checked_add(length).ok_or(BadChain::TooLarge)?;
        let address = descriptor.addr().0;
        let slice = memory::slice_of(self.memory, address, length as usize)
            .map_err(|_| BadChain::Buffer { address, length })?;
        if write {
            self.writable.push(slice);
        } else if self.writable.is_empty() {
            self.readable.push(slice);
        } else {
            return Err(BadChain::Order);
        }
        Ok(())
    }
}

/// A position in a row of slices.
struct Cursor<'m> {
    slices: std::vec::IntoIter<VolatileSlice<'m>>,
    /// What is left of the slice that was begun.
    current: Option<VolatileSlice<'m>>,
    left: usize,
    done: usize,
}

impl<'m> Cursor<'m> {
    fn new(slices: Vec<VolatileSlice<'m>>) -> Cursor<'m> {
        Cursor {
            left: slices.iter().map(VolatileSlice::len).sum(),
            slices: slices.into_iter(),
            current: None,
            done: 0,
        }
    }

    /// The next contiguous piece of at most `max` bytes, moved past; `None` at the end.
    fn piece(&mut self, max: usize) -> Option<VolatileSlice<'m>> {
        if max == 0 {
            return None;
        }
        let slice = self.current.take().or_else(|| self.slices.next())?;
        let (piece, rest) = match slice.split_at(max) {
            Ok((piece, rest)) => (piece, (!rest.is_empty()).then_some(rest)),
            Err(_) => (slice, None), // shorter than `max`
        };
        self.current = rest;
        self.left -= piece.len();
        self.done += piece.len();
        Some(piece)
    }
}

/// The readable bytes of a chain, in order; reading moves on.
pub struct Readable<'m>(Cursor<'m>);

impl<'m> Readable<'m> {
    /// Bytes that are left.
    pub fn remaining(&self) -> usize {
        self.0.left
    }

    /// Reads one structure.
    ///
    /// # Errors
    /// `UnexpectedEof` if fewer bytes are left than it has; nothing is then read.
    pub fn read_struct<T: ByteValued + Default>(&mut self) -> io::Result<T> {
        let mut value = T::default();
        if self.0.left < size_of::<T>() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.read_exact(value.as_mut_slice())?;
        Ok(value)
    }

    /// The next contiguous piece of at most `max` bytes for I/O straight from guest memory, moved past.
    /// `None` if nothing is left.
    pub fn next_piece(&mut self, max: usize) -> Option<VolatileSlice<'m>> {
        self.0.piece(max)
    }
}

impl Read for Readable<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut total = 0;
        let mut rest = buffer;
        while let Some(piece) = self.0.piece(rest.len()) {
            let count = piece.copy_to(rest);
            total += count;
            rest = rest.split_at_mut(count).1;
        }
        Ok(total)
    }
}

/// The writable bytes of a chain, in order; writing moves on.
pub struct Writable<'m>(Cursor<'m>);

impl<'m> Writable<'m> {
    /// Bytes that still fit.
    pub fn remaining(&self) -> usize {
        self.0.left
    }

    /// Bytes written, which is what [`super::queue::ActiveQueue::push_used`] is told.
    pub fn written(&self) -> u32 {
        // The walk admitted no more than u32::MAX bytes.
        self.0.done as u32
    }

    /// Writes one structure.
    ///
    /// # Errors
    /// `WriteZero` if it does not fit; nothing is then written.
    pub fn write_struct<T: ByteValued>(&mut self, value: &T) -> io::Result<()> {
        if self.0.left < size_of::<T>() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.write_all(value.as_slice())
    }

    /// The next contiguous piece of at most `max` bytes for I/O straight into guest memory, moved past: the
    /// caller fills all of it. `None` if nothing is left.
    pub fn next_piece(&mut self, max: usize) -> Option<VolatileSlice<'m>> {
        self.0.piece(max)
    }
}

impl Write for Writable<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let mut rest = buffer;
        while let Some(piece) = self.0.piece(rest.len()) {
            let (now, later) = rest.split_at(piece.len().min(rest.len()));
            piece.copy_from(now);
            rest = later;
        }
        Ok(buffer.len() - rest.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
#[path = "chain_tests.rs"]
mod tests;
