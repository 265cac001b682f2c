//! What a guest can touch: state machines over bytes that the guest wrote.
//!
//! No KVM, no async runtime, no host paths. The VMM gives a device its memory, its queues, its interrupts
//! and the fds it works on; a device gives nothing back but bytes.

// An index or a range that came from the guest must meet `get`, not a panic (CH#7917).
#![cfg_attr(not(test), deny(clippy::indexing_slicing))]
// Tests play the driver, whose memory it is.
#![cfg_attr(test, allow(clippy::disallowed_methods, clippy::disallowed_types))]

pub mod balloon;
pub mod blk;
pub mod bus;
pub mod counters;
mod discard;
pub mod event;
pub mod fs;
pub mod i8042;
pub mod machine;
pub mod mem;
pub mod memory;
pub mod net;
pub mod pci;
pub mod pvpanic;
pub mod rng;
pub mod serial;
pub mod state;
mod syscall;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod virtio;
pub mod vsock;

pub use memory::GuestMemory;
