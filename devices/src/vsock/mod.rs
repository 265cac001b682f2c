//! Vsock: stream sockets between guest and host (virtio 1.2 section 5.10).

pub mod connection;
pub mod credit;
pub mod packet;
