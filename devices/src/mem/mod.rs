//! Memory that grows and shrinks while the guest runs (virtio 1.2 section 5.15, virtio-mem): a region of address space of which the
//! guest plugs blocks when it is asked to have more, and unplugs them when it is asked to have less.
//!
//! | file | what |
//! |---|---|
//! | `request.rs` | a request of the driver, checked against the region; pure |
//! | `plugging.rs` | plugs and unplugs |
//! | `device.rs` | the device: configuration space, activation, reset; the handle of the VMM |
//! | `server.rs` | its queue between activation and reset |
//!
//! What is unplugged is no memory for anybody: not for the guest's CPUs, because each block that is plugged is a memory slot of its own
//! ([`Backing`]) and there are no others, and not for devices, because [`crate::memory`] hands out no slice of it. So a guest never has
//! more than it was granted, whatever it asks for, and what it gives up is the host's at once. VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE
//! says so to its driver.

mod device;
mod plugging;
mod request;
mod server;

pub use device::{Mem, MemHandle, MemState, NoPluggableRegion, RequestTooLarge};
pub use plugging::{Backing, Block};

#[cfg(test)]
mod tests;
