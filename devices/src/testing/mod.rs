//! A driver for tests: brings any [`VirtioDevice`] up through the real transport, over the ports and the BAR
//! that a guest would use, and talks to it by rings in guest memory. No KVM. It panics where a
//! test should fail.
//!
//! ```
//! use capsid_devices::event::Poller;
//! use capsid_devices::rng::Rng;
//! use capsid_devices::testing::{Buffer, Driver};
//! use std::sync::Arc;
//!
//! let poller = Arc::new(Poller::new().unwrap());
//! let device = Box::new(Rng::new(poller.clone()));
//! let mut driver = Driver::up(device, 0); // the device-specific features that the driver wants
//!
//! driver.add(0, &[Buffer::Writable(32)]); // queue 0: one chain of one buffer of 32 bytes
//! driver.kick(0);
//! let used = driver.wait_used(0, Some(&poller)); // turns the loop until the chain comes back
//! assert_eq!(used.data.len(), 32);
//! assert_eq!(driver.interrupts(0), 1);
//! driver.reset();
//! ```
//!
//! - Step by step instead of [`Driver::up`]: [`Driver::new`], [`Driver::negotiate`], [`Driver::setup_queue`],
//!   [`Driver::start`].
//! - A device with threads of its own: `wait_used(queue, None)` waits for its interrupt.
//! - Indirect tables: [`Driver::add_indirect`]. Chains that no sane driver makes: [`Driver::add_raw`],
//!   [`Driver::set_available_index`]; afterwards [`Driver::needs_reset`] says whether the device asked for it.
//! - The registers: [`Driver::read`], [`Driver::write`] at [`Region`]s found by their capabilities;
//!   [`sweep`] makes every access that a guest can make to the BAR and configuration space.

#![allow(clippy::indexing_slicing)] // a test's own indices: a panic is how it fails
#![allow(clippy::disallowed_methods, clippy::disallowed_types)] // it plays the driver, whose memory it is

mod driver;
mod edges;
mod queue;
mod routes;

pub use driver::{Driver, Region, WAIT_MS, sweep};
pub use edges::{EDGES, around};
#[cfg(test)]
pub(crate) use queue::any_descriptor;
pub use queue::{Buffer, RawDescriptor, Used};
pub use routes::FakeRoutes;

/// The state of a driver's device, suspended, as another process reads it.
#[cfg(test)]
pub(crate) fn written_down(driver: &Driver) -> crate::virtio::pci::VirtioState {
    driver.stand_still();
    let state = driver.transport.state().expect("suspended");
    let json = serde_json::to_string(&state).expect("plain data");
    let read = serde_json::from_str(&json).expect("what was written");
    assert_eq!(state, read);
    read
}

use crate::memory::{self, GuestMemory};
use std::sync::Arc;
use vm_memory::{GuestRegionCollection, MmapRegion};

#[cfg(doc)]
use crate::virtio::device::VirtioDevice;

/// Guest memory of these `(start, length)` regions.
pub fn memory(regions: &[(u64, usize)]) -> GuestMemory {
    of(regions.iter().map(boot).collect())
}

/// The same with a pluggable region behind them, in blocks of `block_bytes`.
pub fn memory_with_blocks(
    regions: &[(u64, usize)],
    pluggable: (u64, usize),
    block_bytes: u64,
) -> GuestMemory {
    let (start, length) = pluggable;
    let pluggable = memory::Region::pluggable(start, mapping(length), block_bytes);
    let pluggable = pluggable.expect("guest memory");
    of(regions.iter().map(boot).chain([pluggable]).collect())
}

fn boot((start, length): &(u64, usize)) -> memory::Region {
    memory::Region::boot(*start, mapping(*length)).expect("guest memory")
}

fn of(regions: Vec<memory::Region>) -> GuestMemory {
    Arc::new(GuestRegionCollection::from_regions(regions).expect("guest memory"))
}

fn mapping(length: usize) -> MmapRegion {
    MmapRegion::new(length).expect("guest memory")
}
