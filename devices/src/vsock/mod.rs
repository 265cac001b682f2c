//! Vsock: stream sockets between guest and host (virtio 1.2 section 5.10).
//!
//! The host's side of each connection is a stream socket whose other end the owner of the VM holds. A
//! connection that the guest makes gets its socket from a [`HostSide`]; one that the host makes comes with it
//! ([`VsockHandle::connect`]). The device opens, binds and listens on nothing.
//!
//! Trusted: the host's sockets as far as the kernel goes. Not trusted: every byte in the queues, the credit
//! that the guest tells, when it refills its queues and whether it does.
//!
//! - [`packet`]: the 44-byte header, parsed once.
//! - [`credit`], [`connection`]: the protocol, as state machines without I/O.
//! - `stream`, `peer`: a connection's socket and what waits for it.
//! - `table`: all connections.
//! - `device`, `queues`: the device on the event loop.

pub mod connection;
pub mod credit;
mod device;
pub mod packet;
mod peer;
mod queues;
mod stream;
mod table;

pub use device::{ConnectRefused, HostSide, VsockDevice, VsockHandle, VsockState};

/// Most connections at once, as in Firecracker and Cloud Hypervisor; one more is reset.
pub const MAX_CONNECTIONS: usize = 1023;
/// How long the guest may take to answer a connection that the host makes, in ms.
pub const CONNECT_TIMEOUT_MS: u64 = 10_000;
/// How long the guest may take to confirm that a connection is closed, in ms (`VSOCK_CLOSE_TIMEOUT` of
/// net/vmw_vsock/virtio_transport_common.c).
pub const CLOSE_TIMEOUT_MS: u64 = 8_000;

#[cfg(test)]
mod tests;
