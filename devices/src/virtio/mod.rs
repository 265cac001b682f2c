//! Virtio 1.2: the contract of a device and its queues, and the transport that holds both sides to it.

pub mod chain;
pub mod device;
pub mod pci;
pub mod queue;
mod signal;
pub mod state;
