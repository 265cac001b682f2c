//! Guest memory whose contents nobody wants any more is given back to the host.
//!
//! Guest memory is a private mapping (docs/decisions/0004): `MADV_DONTNEED` takes its pages away, and whoever touches them next gets new
//! ones. Those are zero, or what the kernel's file says where that is mapped (0006), which the guest may read anyway.
//!
//! `unsafe`: the call takes an address.
#![allow(unsafe_code)]

use rustix::io::Errno;
use rustix::mm::{Advice, madvise};
use vm_memory::VolatileSlice;

/// Size of a page of the host, in bytes.
const PAGE_BYTES: usize = 4096;

/// Gives the whole pages of `slice` back and returns their bytes. A part of a page at either end stays.
///
/// # Errors
/// The host refused; some pages may be gone.
pub(crate) fn discard(slice: &VolatileSlice<'_>) -> Result<usize, Errno> {
    let start = slice.ptr_guard_mut().as_ptr();
    let before = start.align_offset(PAGE_BYTES);
    let bytes = slice.len().saturating_sub(before) / PAGE_BYTES * PAGE_BYTES;
    if bytes == 0 {
        return Ok(0);
    }
    let pages = start.wrapping_add(before).cast();
    // SAFETY: the pages are wholly inside the slice, which is one range of mapped guest memory. The guest may change what is in it at
    // any time, so nothing in this process relies on it or has a reference into it.
    unsafe { madvise(pages, bytes, Advice::LinuxDontNeed) }?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory;
    use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

    #[test]
    fn whole_pages_are_gone_and_parts_of_pages_stay() {
        let memory = memory(&[(0, 64 << 10)]);
        memory.write_slice(&[7; 64 << 10], GuestAddress(0)).unwrap();
        for (start, length, given) in [(4096, 8192, 8192), (20481, 8191, 4096), (40000, 100, 0)] {
            let slice = memory.get_slice(GuestAddress(start), length).unwrap();
            assert_eq!(discard(&slice).unwrap(), given);
        }
        let zeros: Vec<u64> = (0..16)
            .filter(|page| memory.read_obj::<u8>(GuestAddress(page << 12)).unwrap() == 0)
            .collect();
        assert_eq!(zeros, [1, 2, 6]);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(20481)).unwrap(), 7);
    }
}
