//! The buffers of one request in guest memory, and file I/O straight into and out of them.
//!
//! [`chain`] has checked every buffer whole against the guest's memory, that readable ones come before
//! writable ones, and how many there are. The guest may change the bytes at any time, so what is parsed is
//! copied out once; file data is never looked at.
//!
//! `unsafe`: `preadv` and `pwritev2` take raw pointers, and guest memory must not be turned into Rust
//! references for a safe wrapper's sake, because the guest writes it while they would live.
#![allow(unsafe_code)]

use crate::syscall::{VECTORS_MAX, count, vector};
use crate::virtio::chain;
use rustix::io::Errno;
use std::os::fd::{AsRawFd, BorrowedFd};
use vm_memory::VolatileSlice;

/// The checked buffers of one request.
pub(crate) struct Buffers<'m> {
    readable: Vec<VolatileSlice<'m, ()>>,
    writable: Vec<VolatileSlice<'m, ()>>,
    readable_bytes: usize,
    writable_bytes: usize,
}

impl<'m> Buffers<'m> {
    /// The buffers of a checked chain.
    pub(crate) fn new(mut chain: chain::Buffers<'m>) -> Buffers<'m> {
        let readable: Vec<_> =
            std::iter::from_fn(|| chain.readable.next_piece(usize::MAX)).collect();
        let writable: Vec<_> =
            std::iter::from_fn(|| chain.writable.next_piece(usize::MAX)).collect();
        // The walk admitted no more than u32::MAX bytes.
        Buffers {
            readable_bytes: readable.iter().map(VolatileSlice::len).sum(),
            writable_bytes: writable.iter().map(VolatileSlice::len).sum(),
            readable,
            writable,
        }
    }

    /// How many bytes the driver sent.
    pub(crate) fn readable_bytes(&self) -> usize {
        self.readable_bytes
    }

    /// How many bytes the driver has room for.
    pub(crate) fn writable_bytes(&self) -> usize {
        self.writable_bytes
    }

    /// Copies what lies at `offset` of the request into `to`; returns how much there was.
    pub(crate) fn read_at(&self, offset: usize, to: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in cut(&self.readable, offset, to.len()) {
            let end = done + slice.len();
            let Some(part) = to.get_mut(done..end) else {
                break;
            };
            slice.copy_to(part);
            done = end;
        }
        done
    }

    /// Copies `from` to `offset` of the reply; returns how much fitted.
    pub(crate) fn write_at(&self, offset: usize, from: &[u8]) -> usize {
        let mut done = 0;
        for slice in cut(&self.writable, offset, from.len()) {
            let end = done + slice.len();
            let Some(part) = from.get(done..end) else {
                break;
            };
            slice.copy_from(part);
            done = end;
        }
        done
    }

    /// Reads up to `len` bytes at `file_offset` of `file` into the reply at `offset`.
    pub(crate) fn read_file(
        &self,
        offset: usize,
        len: usize,
        file: BorrowedFd<'_>,
        file_offset: u64,
    ) -> Result<usize, Errno> {
        let vectors = vectors(&self.writable, offset, len);
        let file_offset = i64::try_from(file_offset).map_err(|_| Errno::INVAL)?;
        // SAFETY: each vector lies whole inside guest memory (checked by `chain`), which `'m` keeps mapped;
        // the kernel writes at most that, and no Rust reference to it exists.
        let done = unsafe {
            libc::preadv(
                file.as_raw_fd(),
                vectors.as_ptr(),
                vectors.len() as libc::c_int,
                file_offset,
            )
        };
        count(done)
    }

    /// Writes `len` bytes of the request from `offset` on to `file_offset` of `file`, or to its end.
    pub(crate) fn write_file(
        &self,
        offset: usize,
        len: usize,
        file: BorrowedFd<'_>,
        file_offset: u64,
        append: bool,
    ) -> Result<usize, Errno> {
        let vectors = vectors(&self.readable, offset, len);
        let file_offset = i64::try_from(file_offset).map_err(|_| Errno::FBIG)?;
        // SAFETY: as in `read_file`; the kernel only reads these vectors.
        let done = unsafe {
            libc::pwritev2(
                file.as_raw_fd(),
                vectors.as_ptr(),
                vectors.len() as libc::c_int,
                file_offset,
                if append { libc::RWF_APPEND } else { 0 },
            )
        };
        count(done)
    }
}

/// The vectors of one call for `len` bytes from `offset` on. The largest request of Linux has 260 buffers; of one with more than a
/// call takes, the rest is a short read or write.
fn vectors(slices: &[VolatileSlice<'_>], offset: usize, len: usize) -> Vec<libc::iovec> {
    let slices = cut(slices, offset, len).take(VECTORS_MAX);
    slices.map(|slice| vector(&slice)).collect()
}

/// The parts of `slices` that make up `len` bytes from `offset` on, as far as there are any.
fn cut<'s, 'm>(
    slices: &'s [VolatileSlice<'m, ()>],
    offset: usize,
    len: usize,
) -> impl Iterator<Item = VolatileSlice<'m, ()>> + 's {
    let (mut skip, mut left) = (offset, len);
    slices.iter().filter_map(move |slice| {
        let from = skip.min(slice.len());
        skip -= from;
        let take = left.min(slice.len() - from);
        left -= take;
        if take == 0 {
            return None;
        }
        slice.subslice(from, take).ok()
    })
}
