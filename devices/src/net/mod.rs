//! Network cards (virtio 1.2 section 5.1), each on a tap device that the owner made and opened.
//!
//! | file | what |
//! |---|---|
//! | `features.rs` | which offloads are what in virtio and in the tap; pure |
//! | `tap.rs` | the tap device: its settings, a packet in, a packet out |
//! | `lent.rs` | buffers that the driver lent for packets to come |
//! | `receive.rs`, `transmit.rs`, `control.rs` | the three kinds of queues |
//! | `link.rs` | the cable, to be pulled and plugged |
//! | `server.rs` | a card between activation and reset: who is served when |
//! | `device.rs` | the device: features, configuration space, activation, reset |
//!
//! Packets pass between guest memory and the tap without a look at them, and without a copy unless the driver lends little: the host's kernel checks the header
//! in front of each (`virtio_net_hdr_to_skb`), as it does for every other VMM. A packet that it refuses, or for which there is
//! no room, is dropped, as networks do.

mod control;
mod device;
mod features;
mod lent;
mod link;
mod receive;
mod server;
mod tap;
mod transmit;

pub use device::{MTU_MIN, Net, NetError, NetSetup, NetState, PAIRS_MAX};
pub use link::Link;
pub use tap::{TAP_SET_OFFLOAD, TapError};

#[cfg(test)]
mod tests;
