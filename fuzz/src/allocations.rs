//! Counts what is allocated, so that each target can say how much one input may make the code hold, and that no single
//! allocation has a size which the stranger chose. Counted are those of Rust, of all threads; guest memory is mapped and is not.
//!
//! `unsafe`: the trait of an allocator is.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes that are allocated now.
static LIVE: AtomicUsize = AtomicUsize::new(0);
/// The most that there were since [`Watch::begin`].
static PEAK: AtomicUsize = AtomicUsize::new(0);
/// The largest allocation since then.
static LARGEST: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, which counts.
struct Counting;

fn more(bytes: usize) {
    let live = LIVE.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(live, Ordering::Relaxed);
}

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        more(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        more(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // While it is moved there are both.
        more(size);
        // SAFETY: the caller's promise.
        let moved = unsafe { System.realloc(block, layout, size) };
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        moved
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) };
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
    }
}

/// What one input may make a target allocate, in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// At once, beyond what there was before.
    pub(crate) growth: usize,
    /// In one piece.
    pub(crate) largest: usize,
}

/// One input at a time: what other threads allocate counts too.
static TURN: Mutex<()> = Mutex::new(());

/// The allocations of one input.
pub(crate) struct Watch {
    before: usize,
    _turn: MutexGuard<'static, ()>,
}

impl Watch {
    pub(crate) fn begin() -> Watch {
        // Who panicked with it has lost its own input alone.
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let before = LIVE.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        LARGEST.store(0, Ordering::Relaxed);
        Watch {
            before,
            _turn: turn,
        }
    }

    /// # Panics
    /// More was allocated than `bounds` allow.
    pub(crate) fn end(self, bounds: Bounds) {
        let largest = LARGEST.load(Ordering::Relaxed);
        assert!(
            largest <= bounds.largest,
            "one allocation has {largest} bytes"
        );
        let growth = PEAK.load(Ordering::Relaxed).saturating_sub(self.before);
        assert!(
            growth <= bounds.growth,
            "{growth} bytes are allocated at once"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[should_panic(expected = "one allocation has")]
    fn one_large_allocation_is_found() {
        let watch = Watch::begin();
        drop(std::hint::black_box(vec![1u8; 64 << 20]));
        watch.end(Bounds {
            growth: usize::MAX,
            largest: 32 << 20,
        });
    }

    #[test]
    #[should_panic(expected = "bytes are allocated at once")]
    fn many_small_allocations_are_found() {
        let watch = Watch::begin();
        let many: Vec<Vec<u8>> = (0..64).map(|_| vec![1; 1 << 20]).collect();
        drop(std::hint::black_box(many));
        watch.end(Bounds {
            growth: 32 << 20,
            largest: usize::MAX,
        });
    }
}
