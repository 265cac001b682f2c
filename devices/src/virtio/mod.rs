//! Virtio 1.2: the contract of a device and its queues.

pub mod device;
pub mod queue;
