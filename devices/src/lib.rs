//! What a guest can touch: state machines over bytes that the guest wrote.
//!
//! No KVM, no async runtime, no host paths. The VMM gives a device its memory, its queues, its interrupts
//! and the fds it works on; a device gives nothing back but bytes.

pub mod event;
pub mod virtio;

/// The guest's memory: memfd-backed regions, shared by all of the VMM's threads.
pub type GuestMemory = std::sync::Arc<vm_memory::GuestMemoryMmap<()>>;
