//! Buffers that the driver lent for packets to come: chains that were taken off the available ring and not handed back yet.
//!
//! A packet is read straight into them. How many of them it fills is known only then, and the others wait for the next packet.
//!
//! `unsafe`: the buffers outlive the walk that checked them, so here are their addresses, and a share in the memory that keeps
//! them mapped.
#![allow(unsafe_code)]

use super::tap::{HEADER_BYTES, Tap};
use crate::GuestMemory;
use crate::syscall::{VECTORS_MAX, vector};
use rustix::io::Errno;
use std::collections::VecDeque;
use vm_memory::VolatileSlice;

/// Where in the header the number of buffers is (`struct virtio_net_hdr_v1`).
const NUM_BUFFERS: usize = 10;

/// One chain.
#[derive(Clone, Copy, Debug)]
struct Chain {
    head: u16,
    vectors: usize,
    bytes: usize,
}

/// What is lent.
pub(super) struct Lent {
    chains: VecDeque<Chain>,
    vectors: VecDeque<libc::iovec>,
    bytes: usize,
    /// What the addresses lie in.
    _memory: GuestMemory,
}

// SAFETY: the addresses are of shared memory that `_memory` keeps mapped; no thread owns them.
unsafe impl Send for Lent {}

impl Lent {
    pub(super) fn new(memory: GuestMemory) -> Lent {
        Lent {
            chains: VecDeque::new(),
            vectors: VecDeque::new(),
            bytes: 0,
            _memory: memory,
        }
    }

    /// Bytes that a packet may have.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many chains there are.
    pub(super) fn chains(&self) -> usize {
        self.chains.len()
    }

    /// Whether one call of the kernel cannot take more buffers.
    pub(super) fn is_full(&self) -> bool {
        self.vectors.len() >= VECTORS_MAX
    }

    /// Takes the writable buffers of a chain.
    pub(super) fn add(&mut self, head: u16, pieces: &[VolatileSlice<'_>]) {
        self.vectors.extend(pieces.iter().map(vector));
        // The walk admitted no more than u32::MAX bytes a chain, and there are no more chains than a queue has entries.
        let bytes = pieces.iter().map(VolatileSlice::len).sum();
        self.bytes += bytes;
        self.chains.push_back(Chain {
            head,
            vectors: pieces.len(),
            bytes,
        });
    }

    /// Reads one packet into the first `chains` chains; returns its bytes with the header.
    ///
    /// # Errors
    /// What the kernel said. `MSGSIZE`: the packet did not fit, and is lost.
    pub(super) fn receive(&self, tap: &Tap, chains: usize) -> Result<usize, Errno> {
        let chains = self.chains.iter().take(chains);
        let count: usize = chains.map(|chain| chain.vectors).sum();
        let count = count.min(VECTORS_MAX - 1);
        let mut vectors: Vec<libc::iovec> = Vec::with_capacity(count + 1);
        vectors.extend(self.vectors.iter().take(count));
        let room: usize = vectors.iter().map(|vector| vector.iov_len).sum();
        // A packet that has a byte in here was cut off.
        let mut beyond = [0u8; 1];
        vectors.push(libc::iovec {
            iov_base: beyond.as_mut_ptr().cast(),
            iov_len: beyond.len(),
        });
        // SAFETY: the vectors are buffers that `chain` has checked whole, in memory that `_memory` keeps mapped and that no Rust
        // reference names; the last one is `beyond`, which lives and is not looked at.
        let bytes = unsafe { tap.receive(&vectors) }?;
        if bytes > room {
            return Err(Errno::MSGSIZE);
        }
        Ok(bytes)
    }

    /// The room of the first `chains` chains, in bytes.
    pub(super) fn room(&self, chains: usize) -> usize {
        let chains = self.chains.iter().take(chains);
        chains.map(|chain| chain.bytes).sum()
    }

    /// Copies a packet to the front of the chains, as far as there is room.
    pub(super) fn copy(&self, packet: &[u8]) {
        let mut left = packet;
        for vector in &self.vectors {
            let (now, later) = left.split_at(left.len().min(vector.iov_len));
            // SAFETY: `now` is not longer than this vector, which is checked and mapped as above.
            unsafe {
                std::ptr::copy_nonoverlapping(now.as_ptr(), vector.iov_base.cast(), now.len());
            }
            left = later;
            if left.is_empty() {
                return;
            }
        }
    }

    /// Hands out the chains that a packet of `bytes` has filled, with how many bytes of each; its header tells how many they
    /// are.
    pub(super) fn take(&mut self, bytes: usize) -> Vec<(u16, u32)> {
        let mut left = bytes;
        let mut filled = Vec::new();
        for chain in &self.chains {
            let here = left.min(chain.bytes);
            filled.push((chain.head, here as u32));
            left -= here;
            if left == 0 {
                break;
            }
        }
        self.write(NUM_BUFFERS, (filled.len() as u16).to_le_bytes());
        for _ in &filled {
            if let Some(chain) = self.chains.pop_front() {
                self.vectors.drain(..chain.vectors.min(self.vectors.len()));
                self.bytes -= chain.bytes;
            }
        }
        filled
    }

    /// Writes at `offset` of the packet; the header may be in pieces of one byte.
    fn write(&self, offset: usize, bytes: [u8; 2]) {
        const { assert!(NUM_BUFFERS + 2 == HEADER_BYTES) };
        for (at, byte) in (offset..).zip(bytes) {
            let mut skip = at;
            for vector in &self.vectors {
                if skip < vector.iov_len {
                    let place = vector.iov_base.cast::<u8>().wrapping_add(skip);
                    // SAFETY: inside this vector, which is checked and mapped as above.
                    unsafe { place.write_volatile(byte) };
                    break;
                }
                skip -= vector.iov_len;
            }
        }
    }
}
