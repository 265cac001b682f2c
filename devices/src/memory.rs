//! The guest's memory: what every device reaches it by.
//!
//! Regions are there from the start, or are *pluggable*: address space of which blocks are memory while the guest has plugged them
//! ([`crate::mem`]). An unplugged block is no memory: nobody gets a slice of it, so no descriptor can name it and a device
//! cannot make pages appear there.
//!
//! A slice that was taken before its block was unplugged stays mapped, and a request that is under way may still write there. What it
//! writes the guest cannot read; the pages go when the block is plugged or unplugged the next time. So at most what all queues together
//! have under way is held beyond what is plugged, for each time that blocks are unplugged, and never more than the whole region.
//!
//! [`slice_of`] is the one way to its bytes: a whole range or nothing. What `vm_memory` has beside it (a start address alone, as
//! many bytes as there are, a walk over region boundaries) is forbidden by `clippy.toml` outside of this file.

// This is the one way.
#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::bitmap::BS;
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemory as _, GuestMemoryError, GuestMemoryRegion,
    GuestMemoryRegionBytes, GuestRegionCollection, GuestRegionMmap, MemoryRegionAddress,
    MmapRegion, VolatileSlice,
};

/// The guest's memory: regions shared by all of the VMM's threads.
pub type GuestMemory = Arc<GuestRegionCollection<Region>>;

/// Bytes that nobody gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{address:#x}+{bytes:#x} is empty or not in one region of guest memory")]
pub struct NotMemory {
    /// Guest-physical address of the first.
    pub address: u64,
    /// How many.
    pub bytes: usize,
}

impl From<NotMemory> for GuestMemoryError {
    fn from(refused: NotMemory) -> GuestMemoryError {
        GuestMemoryError::InvalidGuestAddress(GuestAddress(refused.address))
    }
}

/// The `bytes` bytes from guest-physical `address` on, at least one, as one slice: checked with their whole length, all in one region
/// and all of them memory (CVE-2019-18960, CVE-2026-5747).
///
/// # Errors
/// There is a byte among them that is not, or there is none.
pub fn slice_of(
    memory: &GuestMemory,
    address: u64,
    bytes: usize,
) -> Result<VolatileSlice<'_>, NotMemory> {
    let refused = NotMemory { address, bytes };
    if bytes == 0 {
        return Err(refused);
    }
    let slice = memory.get_slice(GuestAddress(address), bytes);
    slice.map_err(|_| refused)
}

/// A structure, read once.
///
/// # Errors
/// As [`slice_of`].
pub fn read<T: ByteValued + Default>(memory: &GuestMemory, address: u64) -> Result<T, NotMemory> {
    let slice = slice_of(memory, address, size_of::<T>())?;
    let mut value = T::default();
    slice.copy_to(value.as_mut_slice());
    Ok(value)
}

/// All of `bytes`, or nothing.
///
/// # Errors
/// As [`slice_of`].
pub fn write(memory: &GuestMemory, address: u64, bytes: &[u8]) -> Result<(), NotMemory> {
    slice_of(memory, address, bytes.len())?.copy_from(bytes);
    Ok(())
}

/// A field of two bytes that the driver may change at this moment, read at once.
///
/// # Errors
/// As [`slice_of`], or the address is odd.
pub(crate) fn load(memory: &GuestMemory, address: u64) -> Result<u16, NotMemory> {
    let field = slice_of(memory, address, size_of::<u16>())?;
    let loaded = field.load(0, Ordering::Relaxed).map(u16::from_le);
    loaded.map_err(|_| NotMemory {
        address,
        bytes: size_of::<u16>(),
    })
}

/// One range of guest-physical addresses, mapped as long as anybody has the memory.
#[derive(Debug)]
pub struct Region {
    mapping: GuestRegionMmap<()>,
    blocks: Option<Arc<Blocks>>,
}

impl Region {
    /// Memory from guest-physical `start` on that is there from the start; `None` if it went on beyond 2^64.
    pub fn boot(start: u64, mapping: MmapRegion) -> Option<Region> {
        Some(Region {
            mapping: GuestRegionMmap::new(mapping, GuestAddress(start))?,
            blocks: None,
        })
    }

    /// Address space for blocks of `block_bytes`, a power of two, none of which is plugged. A part of a block at the end is never memory.
    pub fn pluggable(start: u64, mapping: MmapRegion, block_bytes: u64) -> Option<Region> {
        let blocks = Blocks::new(mapping.size() as u64 / block_bytes, block_bytes);
        Some(Region {
            blocks: Some(Arc::new(blocks)),
            ..Region::boot(start, mapping)?
        })
    }

    /// Which of its blocks are plugged; `None` for memory that is there from the start.
    pub fn blocks(&self) -> Option<&Arc<Blocks>> {
        self.blocks.as_ref()
    }

    /// A block, plugged or not, for the one device that plugs it.
    pub(crate) fn block(&self, number: u64) -> Option<VolatileSlice<'_>> {
        let blocks = self
            .blocks
            .as_ref()
            .filter(|blocks| number < blocks.count)?;
        let offset = MemoryRegionAddress(number * blocks.block_bytes);
        let slice = self.mapping.get_slice(offset, blocks.block_bytes as usize);
        slice.ok()
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> u64 {
        self.mapping.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.mapping.start_addr()
    }

    fn bitmap(&self) -> BS<'_, ()> {
        // Nobody keeps track of what is written.
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> Result<VolatileSlice<'_>, GuestMemoryError> {
        let slice = self.mapping.get_slice(offset, count)?;
        match &self.blocks {
            Some(blocks) if !blocks.all_plugged(offset.0, count as u64) => {
                Err(GuestMemoryError::InvalidBackendAddress)
            }
            _ => Ok(slice),
        }
    }
}

// Its slices are all that is used of a region, and they are checked above; the whole of it as one slice only while all of it is plugged.
impl GuestMemoryRegionBytes for Region {}

/// Which blocks of a region are plugged. Changed by one device, on one thread; asked by all.
#[derive(Debug)]
pub struct Blocks {
    count: u64,
    block_bytes: u64,
    /// One bit a block.
    plugged: Vec<AtomicU64>,
}

impl Blocks {
    fn new(count: u64, block_bytes: u64) -> Blocks {
        let words = count.div_ceil(u64::from(u64::BITS));
        Blocks {
            count,
            block_bytes,
            plugged: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Size of each, in bytes.
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// Whether block `number` is plugged.
    pub fn is_plugged(&self, number: u64) -> bool {
        let (word, bit) = place(number);
        // What is behind a block that is plugged was made before the bit was set.
        let word = word.and_then(|word| self.plugged.get(word));
        word.is_some_and(|word| word.load(Ordering::Acquire) & bit != 0)
    }

    pub(crate) fn set(&self, number: u64, plugged: bool) {
        let (word, bit) = place(number);
        let word = word.and_then(|word| self.plugged.get(word));
        let Some(word) = word.filter(|_| number < self.count) else {
            return;
        };
        match plugged {
            true => word.fetch_or(bit, Ordering::AcqRel),
            false => word.fetch_and(!bit, Ordering::AcqRel),
        };
    }

    /// Whether each of `bytes` bytes from `offset` on, at least one, is of a plugged block.
    fn all_plugged(&self, offset: u64, bytes: u64) -> bool {
        let Some(last) = bytes
            .checked_sub(1)
            .and_then(|more| offset.checked_add(more))
        else {
            return bytes == 0;
        };
        (offset / self.block_bytes..=last / self.block_bytes).all(|number| self.is_plugged(number))
    }
}

fn place(number: u64) -> (Option<usize>, u64) {
    let bits = u64::from(u64::BITS);
    (usize::try_from(number / bits).ok(), 1 << (number % bits))
}

#[cfg(test)]
#[path = "memory_breach_tests.rs"]
mod breaches;

#[cfg(test)]
#[path = "memory_proofs.rs"]
mod proofs;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory_with_blocks;

    const BLOCK: u64 = 64 << 10;
    const REGION: u64 = 1 << 20;

    fn blocks_of(memory: &GuestMemory) -> Arc<Blocks> {
        let region = memory.find_region(GuestAddress(REGION)).unwrap();
        Arc::clone(region.blocks().unwrap())
    }

    #[test]
    fn only_plugged_blocks_are_memory_for_slices_reads_and_writes() {
        let memory = memory_with_blocks(&[(0, 1 << 20)], (REGION, 4 * BLOCK as usize), BLOCK);
        let at = |offset| GuestAddress(REGION + offset);
        let readable = |offset, bytes| memory.get_slice(at(offset), bytes).is_ok();
        assert!(!readable(0, 1) && memory.write_obj(1u8, at(0)).is_err());
        let blocks = blocks_of(&memory);
        blocks.set(1, true);
        blocks.set(2, true);
        let block = BLOCK as usize;
        assert!(readable(BLOCK, 2 * block) && readable(2 * BLOCK, block));
        assert!(!readable(BLOCK - 1, 2) && !readable(2 * BLOCK, block + 1));
        assert!(!readable(0, 4 * block) && !readable(3 * BLOCK, 1));
        memory.write_obj(7u8, at(BLOCK)).unwrap();
        // What begins in memory goes as far as memory does.
        assert_eq!(memory.write(&[1; 16], at(3 * BLOCK - 8)).unwrap_or(0), 0);
        blocks.set(1, false);
        assert!(memory.read_obj::<u8>(at(BLOCK)).is_err());
        assert!(readable(2 * BLOCK, block));
    }

    #[test]
    fn a_range_from_boot_memory_into_a_block_is_no_slice() {
        let memory = memory_with_blocks(&[(0, 1 << 20)], (REGION, BLOCK as usize), BLOCK);
        blocks_of(&memory).set(0, true);
        assert!(memory.get_slice(GuestAddress(REGION - 1), 2).is_err());
        assert_eq!(memory.get_slices(GuestAddress(REGION - 1), 2).count(), 2);
    }

    #[test]
    fn a_part_of_a_block_at_the_end_is_never_memory() {
        let memory = memory_with_blocks(&[], (REGION, 3 * BLOCK as usize / 2), BLOCK);
        let blocks = blocks_of(&memory);
        assert_eq!(blocks.count(), 1);
        blocks.set(0, true);
        assert!(memory.get_slice(GuestAddress(REGION + BLOCK), 1).is_err());
        let region = memory.find_region(GuestAddress(REGION)).unwrap();
        assert!(region.block(0).is_some() && region.block(1).is_none());
    }

    #[test]
    fn blocks_beyond_the_last_are_never_plugged() {
        let blocks = Blocks::new(3, BLOCK);
        for number in [3, 63, 64, u64::MAX] {
            assert!(!blocks.is_plugged(number));
        }
        blocks.set(u64::MAX, true);
        assert!(!blocks.all_plugged(u64::MAX, 2) && blocks.all_plugged(0, 0));
    }
}
