//! The guest's memory: private anonymous memory, one mapping or, around the 3 to 4 GiB hole, two; and one more for what is plugged later.
//!
//! Not a memfd, which gets no huge pages by default (docs/decisions/0004). Not in core dumps: it is
//! the guest's. Huge pages are asked for, and the mapping is aligned so that they can be used by the
//! host's and by the nested page tables alike.
//!
//! A size that this host could never back is refused here, in one sentence: the kernel would map it all
//! the same and kill us when memory is used up.
#![allow(unsafe_code)] // mmap: there is no safe way to have memory that a guest writes to.

use crate::layout::{self, Pluggable};
use capsid_devices::memory::{GuestMemory, Region, slice_of};
use capsid_protocol::machine::MemoryMib;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use vm_memory::{GuestRegionCollection, MmapRegion};

/// Size and alignment of a huge page of x86-64, in bytes.
pub const HUGE_PAGE_BYTES: u64 = 2 << 20;
/// The same, as an alignment of addresses.
const ALIGN_BYTES: usize = HUGE_PAGE_BYTES as usize;

/// Size of a page, in bytes.
pub const PAGE_BYTES: u64 = 4096;

/// Why the guest's memory could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// More than the host has.
    #[error("{asked_mib} MiB of guest memory: this host has only {host_mib} MiB; ask for less")]
    TooMuch {
        /// What the configuration says, in MiB.
        asked_mib: u64,
        /// Memory and swap of the host, in MiB.
        host_mib: u64,
    },
    /// Guest-physical addresses beyond what the CPU can translate.
    #[error("{asked_mib} MiB of guest memory: this CPU addresses only {bits} bits; ask for less")]
    TooWide {
        /// What the configuration says, in MiB.
        asked_mib: u64,
        /// Physical address bits of the guest's CPU.
        bits: u32,
    },
    /// The kernel refused.
    #[error("cannot map {mib} MiB of guest memory")]
    Map {
        /// Size, in MiB.
        mib: u64,
        /// Its answer.
        #[source]
        cause: Errno,
    },
    /// Regions that overlap or wrap; a defect of the layout.
    #[error("guest memory layout of {mib} MiB is not valid")]
    Layout {
        /// Size, in MiB.
        mib: u64,
    },
}

/// Maps guest memory of this size, and address space for what is `pluggable`. Nothing of it is backed yet: pages come on first touch.
///
/// The mapping lasts as long as the process. One process runs one VM, and threads of devices hold the
/// memory by clones of the `Arc`: nobody must ever find a page of it gone.
///
/// # Errors
/// The host cannot back it, or refused the mapping.
pub fn map(size: MemoryMib, pluggable: Option<&Pluggable>) -> Result<GuestMemory, MemoryError> {
    let more = pluggable.map_or(0, |pluggable| pluggable.max_bytes >> 20);
    let mib = size.get() + more;
    refuse_more_than(host_mib(), mib)?;
    let mut regions = Vec::with_capacity(3);
    let mapping = |range: &Range<u64>| {
        map_region(range.end - range.start).map_err(|cause| MemoryError::Map { mib, cause })
    };
    let wraps = || MemoryError::Layout { mib };
    for range in layout::memory_ranges(size.bytes()) {
        let region = Region::boot(range.start, mapping(&range)?);
        regions.push(region.ok_or_else(wraps)?);
    }
    if let Some(Pluggable {
        range, block_bytes, ..
    }) = pluggable
    {
        let region = Region::pluggable(range.start, mapping(range)?, *block_bytes);
        regions.push(region.ok_or_else(wraps)?);
    }
    match GuestRegionCollection::from_regions(regions) {
        Ok(memory) => Ok(Arc::new(memory)),
        Err(_) => Err(MemoryError::Layout { mib }),
    }
}

/// Puts whole pages of a file into guest memory without reading them: a private mapping, so that the guest's
/// writes go to pages of its own and pages that it only reads are the page cache's, shared by all VMs of this
/// file. A file that is cut short afterwards stops the guest at its next touch of what is gone.
///
/// # Errors
/// A number is not that of a page, the range is not inside one region, or the kernel refused.
pub fn map_file(
    memory: &GuestMemory,
    place: u64,
    file: &File,
    offset: u64,
    bytes: u64,
) -> Result<(), Errno> {
    let whole_pages = [place, offset, bytes].iter().all(|n| n % PAGE_BYTES == 0);
    let length = usize::try_from(bytes).map_err(|_| Errno::INVAL)?;
    let slice = slice_of(memory, place, length);
    let (true, Ok(slice)) = (whole_pages, slice) else {
        return Err(Errno::INVAL);
    };
    let start = slice.ptr_guard_mut().as_ptr().cast();
    // SAFETY: the range is a part of one region of guest memory, to its page, and stays mapped throughout:
    // MAP_FIXED replaces the pages in one step. Nothing in this process holds a reference into guest memory.
    unsafe {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        mmap(start, length, protection, flags, file, offset)?;
        madvise(start, length, Advice::LinuxDontDump)
    }
}

/// Refuses memory that ends beyond the guest CPU's physical addresses.
///
/// # Errors
/// It does.
pub fn refuse_wider_than(
    bits: u32,
    size: MemoryMib,
    pluggable: Option<&Pluggable>,
) -> Result<(), MemoryError> {
    let ranges = layout::memory_ranges(size.bytes());
    let last = pluggable
        .map(|pluggable| &pluggable.range)
        .or(ranges.last());
    let end = last.map_or(0, |range| range.end);
    if bits < u64::BITS && end > 1 << bits {
        let more = pluggable.map_or(0, |pluggable| pluggable.max_bytes >> 20);
        return Err(MemoryError::TooWide {
            asked_mib: size.get() + more,
            bits,
        });
    }
    Ok(())
}

fn refuse_more_than(host_mib: u64, asked_mib: u64) -> Result<(), MemoryError> {
    if asked_mib > host_mib {
        return Err(MemoryError::TooMuch {
            asked_mib,
            host_mib,
        });
    }
    Ok(())
}

/// All the memory and swap of the host. What of it is free at this moment says little: the page cache
/// gives way, and a guest touches its memory slowly if ever.
fn host_mib() -> u64 {
    let info = rustix::system::sysinfo();
    let units = info.totalram.saturating_add(info.totalswap);
    units.saturating_mul(u64::from(info.mem_unit)) >> 20
}

fn map_region(bytes: u64) -> Result<MmapRegion, Errno> {
    let bytes = usize::try_from(bytes).map_err(|_| Errno::NOMEM)?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // One huge page more than needed; what sticks out of the aligned place in it is given back.
    let mapped_bytes = bytes.checked_add(ALIGN_BYTES).ok_or(Errno::NOMEM)?;
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let mapped = unsafe { mmap_anonymous(std::ptr::null_mut(), mapped_bytes, protection, flags)? };
    let before = mapped.align_offset(ALIGN_BYTES);
    let start = mapped.wrapping_byte_add(before);
    let end = start.wrapping_byte_add(bytes);
    // SAFETY: the mapping made above, which nobody else knows of, has three disjoint parts: what is before
    // `start`, `start..end`, and the rest of the huge page; the lengths are theirs, in whole pages.
    unsafe {
        if before > 0 {
            munmap(mapped, before)?;
        }
        if before < ALIGN_BYTES {
            munmap(end, ALIGN_BYTES - before)?;
        }
        madvise(start, bytes, Advice::LinuxDontDump)?;
        // Refused only by a host kernel without huge pages, which then has none to give.
        let _ = madvise(start, bytes, Advice::LinuxHugepage);
        MmapRegion::build_raw(
            start.cast(),
            bytes,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        )
        .map_err(|_| Errno::INVAL)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryRegion};

    fn mib(mib: u64) -> MemoryMib {
        MemoryMib::try_from(mib).unwrap()
    }

    #[test]
    fn every_byte_of_the_size_is_there_and_zero() {
        let memory = map(mib(64), None).unwrap();
        let last = GuestAddress((64 << 20) - 8);
        assert_eq!(memory.read_obj::<u64>(last).unwrap(), 0);
        memory.write_obj(7u64, last).unwrap();
        assert_eq!(memory.read_obj::<u64>(last).unwrap(), 7);
        assert!(memory.read_obj::<u8>(GuestAddress(64 << 20)).is_err());
    }

    #[test]
    fn memory_around_the_hole_is_two_aligned_regions_of_different_bytes() {
        // Only touched pages are backed, so this needs no 4 GiB of the host.
        let Ok(memory) = map(mib(4096), None) else {
            eprintln!("SKIPPED memory_around_the_hole: this host has less than 4 GiB");
            return;
        };
        let regions: Vec<(u64, u64)> = memory
            .iter()
            .map(|region| (region.start_addr().0, region.len()))
            .collect();
        assert_eq!(regions, [(0, 3 << 30), (4 << 30, 1 << 30)]);
        for region in memory.iter() {
            let slice = memory.get_slice(region.start_addr(), 1).unwrap();
            assert_eq!(slice.ptr_guard().as_ptr() as usize % ALIGN_BYTES, 0);
        }
        memory.write_obj(1u64, GuestAddress(0)).unwrap();
        memory.write_obj(2u64, GuestAddress(4 << 30)).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(0)).unwrap(), 1);
        assert!(memory.read_obj::<u8>(GuestAddress(3 << 30)).is_err());
    }

    #[test]
    fn what_may_be_plugged_is_mapped_and_no_memory_yet() {
        let pluggable = layout::pluggable(64 << 20, 256 << 20);
        let memory = map(mib(64), Some(&pluggable)).unwrap();
        let region = memory.iter().last().unwrap();
        assert_eq!(region.start_addr().0, pluggable.range.start);
        assert_eq!(region.len(), 256 << 20);
        assert_eq!(region.blocks().unwrap().count(), 128);
        assert!(memory.read_obj::<u8>(region.start_addr()).is_err());
        let wide = |bits| refuse_wider_than(bits, mib(64), Some(&pluggable));
        assert!(wide(32).is_err());
        wide(33).unwrap();
    }

    #[test]
    fn more_than_the_host_has_is_refused_with_both_numbers() {
        let refused = refuse_more_than(16_000, 16_001).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "16001 MiB of guest memory: this host has only 16000 MiB; ask for less"
        );
        refuse_more_than(16_000, 16_000).unwrap();
        assert!(host_mib() > 64);
    }

    #[test]
    fn a_mapped_file_is_read_and_written_but_never_changed() {
        let memory = map(mib(64), None).unwrap();
        let mut file = File::from(memfd_create(c"test", MemfdFlags::CLOEXEC).unwrap());
        file.write_all(&[7; 8192]).unwrap();
        map_file(&memory, 0x10_0000, &file, 4096, 4096).unwrap();
        let place = GuestAddress(0x10_0000);
        assert_eq!(memory.read_obj::<u8>(place).unwrap(), 7);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0x10_1000)).unwrap(), 0);
        memory.write_obj(9u8, place).unwrap();
        assert_eq!(memory.read_obj::<u8>(place).unwrap(), 9);
        let mut bytes = [0; 1];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 4096).unwrap();
        assert_eq!(bytes, [7]);
    }

    #[test]
    fn parts_of_pages_and_ranges_outside_memory_are_not_mapped() {
        let memory = map(mib(64), None).unwrap();
        let file = File::from(memfd_create(c"test", MemfdFlags::CLOEXEC).unwrap());
        for (place, offset, bytes) in [
            (1, 0, 4096),
            (0, 1, 4096),
            (0, 0, 1),
            (0, 0, 0),
            (64 << 20, 0, 4096),
            ((64 << 20) - 4096, 0, 8192),
            (u64::MAX - 4095, 0, 8192),
        ] {
            assert_eq!(
                map_file(&memory, place, &file, offset, bytes),
                Err(Errno::INVAL)
            );
        }
    }

    #[test]
    fn memory_beyond_the_address_bits_is_refused() {
        assert!(refuse_wider_than(32, mib(4096), None).is_err());
        refuse_wider_than(32, mib(3072), None).unwrap();
        refuse_wider_than(39, mib(256 * 1024), None).unwrap();
        assert!(refuse_wider_than(39, mib(512 * 1024), None).is_err());
        refuse_wider_than(64, mib(512 * 1024), None).unwrap();
    }
}
