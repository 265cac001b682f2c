//! The buffers of a request that outlives the call that began it, and the one way from a [`Call`] to the kernel.
//!
//! [`crate::virtio::chain`] has checked each buffer whole against the guest's memory. The chain's slices borrow that memory; a
//! request that the kernel still works on cannot, so here are the addresses, and a share in the memory itself that keeps them
//! mapped. The guest may change the bytes at any time, which harms only the guest: nothing here looks at them.
//!
//! `unsafe`: the kernel takes raw pointers, for longer than a borrow lives. Whoever hands [`Vectors::raw`] to it keeps the
//! `Vectors` until it has answered ([`super::server`] does: a slot is freed by its completion alone).
#![allow(unsafe_code)]

use super::work::{Call, ZEROES_MAX_BYTES};
use crate::GuestMemory;
use crate::syscall::VECTORS_MAX;
use rustix::io::Errno;
use std::os::fd::RawFd;
use vm_memory::VolatileSlice;

/// Most bytes of one call; the rest is a short transfer. What is in the host's page cache is copied while the caller waits, and
/// a guest may name the same buffer many times over: a chain has up to 4 GiB.
pub(super) const CALL_MAX_BYTES: usize = 1 << 20;
/// What zeroes are written from.
static ZEROES: [u8; ZEROES_PIECE_BYTES] = [0; ZEROES_PIECE_BYTES];
const ZEROES_PIECE_BYTES: usize = 64 * 1024;
const _: () = {
    assert!(ZEROES_MAX_BYTES as usize <= CALL_MAX_BYTES);
    assert!(CALL_MAX_BYTES / ZEROES_PIECE_BYTES <= VECTORS_MAX);
};

/// Buffers in guest memory, or of zeroes, of which a part may be done.
pub(super) struct Vectors {
    vectors: Vec<libc::iovec>,
    /// The first that is not done.
    first: usize,
    /// What the addresses lie in; `None` for what is static.
    _memory: Option<GuestMemory>,
}

// SAFETY: the addresses are of shared memory that `_memory` keeps mapped, or static; no thread owns them.
unsafe impl Send for Vectors {}

impl Vectors {
    /// `slices`, which lie in `memory`.
    pub(super) fn new(memory: &GuestMemory, slices: &[VolatileSlice<'_>]) -> Vectors {
        let mut vectors = Vec::with_capacity(slices.len());
        for slice in slices {
            let start = slice.ptr_guard_mut().as_ptr();
            // A vector has to fit into a call.
            for offset in (0..slice.len()).step_by(CALL_MAX_BYTES) {
                vectors.push(libc::iovec {
                    iov_base: start.wrapping_add(offset).cast(),
                    iov_len: (slice.len() - offset).min(CALL_MAX_BYTES),
                });
            }
        }
        Vectors {
            vectors,
            first: 0,
            _memory: Some(memory.clone()),
        }
    }

    /// No buffers.
    pub(super) fn empty() -> Vectors {
        Vectors {
            vectors: Vec::new(),
            first: 0,
            _memory: None,
        }
    }

    /// Zeroes to write, at most [`ZEROES_MAX_BYTES`].
    pub(super) fn zeroes(bytes: u64) -> Vectors {
        let mut left = bytes.min(ZEROES_MAX_BYTES) as usize;
        let mut vectors = Vec::with_capacity(left.div_ceil(ZEROES_PIECE_BYTES));
        while left > 0 {
            let piece = left.min(ZEROES_PIECE_BYTES);
            vectors.push(libc::iovec {
                iov_base: ZEROES.as_ptr().cast_mut().cast(),
                iov_len: piece,
            });
            left -= piece;
        }
        Vectors {
            vectors,
            first: 0,
            _memory: None,
        }
    }

    /// Moves on by `bytes` that are done.
    pub(super) fn advance(&mut self, bytes: u64) {
        let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
        while let Some(vector) = self.vectors.get_mut(self.first) {
            if left < vector.iov_len {
                vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(left).cast();
                vector.iov_len -= left;
                return;
            }
            left -= vector.iov_len;
            self.first += 1;
        }
    }

    /// Writes as many of `bytes` as there is room for; returns how many.
    pub(super) fn fill(&self, bytes: &[u8]) -> usize {
        let mut left = bytes;
        for vector in self.vectors.iter().skip(self.first) {
            let (now, later) = left.split_at(left.len().min(vector.iov_len));
            // SAFETY: `now` is not longer than this vector, which lies in guest memory that `_memory` keeps mapped and that no
            // Rust reference names; zeroes are never filled.
            unsafe {
                std::ptr::copy_nonoverlapping(now.as_ptr(), vector.iov_base.cast(), now.len());
            }
            left = later;
        }
        bytes.len() - left.len()
    }

    /// What is left, for one call of the kernel.
    pub(super) fn raw(&self) -> RawVectors {
        let left = self.vectors.get(self.first..).unwrap_or_default();
        let (mut count, mut bytes) = (0, 0);
        for vector in left.iter().take(VECTORS_MAX) {
            if bytes + vector.iov_len > CALL_MAX_BYTES {
                break;
            }
            count += 1;
            bytes += vector.iov_len;
        }
        RawVectors {
            first: left.as_ptr(),
            count,
            bytes,
        }
    }
}

/// Where the vectors of a call are.
#[derive(Clone, Copy, Debug)]
pub(super) struct RawVectors {
    pub(super) first: *const libc::iovec,
    pub(super) count: u32,
    /// At most [`CALL_MAX_BYTES`].
    pub(super) bytes: usize,
}

// SAFETY: as for `Vectors`; who holds it sees to it that they live.
unsafe impl Send for RawVectors {}

/// FALLOC_FL_KEEP_SIZE with one of the two ways to zero.
pub(super) const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
pub(super) const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// Makes `call` here and now, with these vectors where it has any; returns the bytes that were moved.
///
/// # Errors
/// What the kernel said.
///
/// # Safety
/// The vectors are [`Vectors::raw`] of vectors that live until this returns.
pub(super) unsafe fn perform(fd: RawFd, call: Call, vectors: RawVectors) -> Result<u64, Errno> {
    let count = vectors.count as libc::c_int;
    // A disk has at most i64::MAX bytes, and every extent lies inside it.
    let at = |offset: u64| offset as i64;
    let write = |offset: u64, flags| {
        // SAFETY: the caller keeps the vectors, and they the memory; the kernel only reads it.
        let done = unsafe { libc::pwritev2(fd, vectors.first, count, at(offset), flags) };
        done as i64
    };
    let allocate = |mode, offset: u64, length: u64| {
        // SAFETY: takes no pointer.
        let done = unsafe { libc::fallocate64(fd, mode, at(offset), at(length)) };
        i64::from(done)
    };
    let done = match call {
        // SAFETY: the caller keeps the vectors, and they the memory; no Rust reference names it.
        Call::Read { offset } => unsafe {
            libc::preadv(fd, vectors.first, count, at(offset)) as i64
        },
        Call::Write { offset, durable } => write(offset, if durable { libc::RWF_DSYNC } else { 0 }),
        Call::Zeroes(extent) => write(extent.offset, 0),
        Call::Punch(extent) => allocate(PUNCH, extent.offset, extent.length),
        Call::ZeroRange(extent) => allocate(ZERO_RANGE, extent.offset, extent.length),
        // SAFETY: takes no pointer.
        Call::Sync => i64::from(unsafe { libc::fdatasync(fd) }),
    };
    crate::syscall::count(done as isize).map(|moved| moved as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::memory;
    use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

    fn counted(vectors: &Vectors) -> (u32, usize) {
        let raw = vectors.raw();
        (raw.count, raw.bytes)
    }

    #[test]
    fn a_call_has_a_bounded_number_of_bytes_and_of_buffers() {
        let memory = memory(&[(0, 4 << 20)]);
        let large = memory.get_slice(GuestAddress(0), 3 << 20).unwrap();
        let small = memory.get_slice(GuestAddress(0), 1).unwrap();
        // The same memory twice, as a driver may.
        let mut vectors = Vectors::new(&memory, &[small, large, large]);
        assert_eq!(counted(&vectors), (1, 1));
        vectors.advance(1);
        assert_eq!(counted(&vectors), (1, CALL_MAX_BYTES));
        vectors.advance(CALL_MAX_BYTES as u64 / 2);
        assert_eq!(counted(&vectors), (1, CALL_MAX_BYTES / 2));
        let many = Vectors::new(&memory, &vec![small; 3000]);
        assert_eq!(counted(&many), (1024, 1024));
        assert_eq!(counted(&Vectors::zeroes(u64::MAX)), (16, CALL_MAX_BYTES));
        assert_eq!(counted(&Vectors::empty()), (0, 0));
    }

    #[test]
    fn what_is_filled_stays_inside_the_buffers() {
        let memory = memory(&[(0, 1 << 16)]);
        let piece = |at, length| memory.get_slice(GuestAddress(at), length).unwrap();
        let vectors = Vectors::new(&memory, &[piece(100, 3), piece(200, 2)]);
        assert_eq!(vectors.fill(b"abcdefgh"), 5);
        let mut seen = [0; 4];
        memory.read_slice(&mut seen, GuestAddress(100)).unwrap();
        assert_eq!(&seen, b"abc\0");
        memory.read_slice(&mut seen, GuestAddress(200)).unwrap();
        assert_eq!(&seen, b"de\0\0");
    }
}
