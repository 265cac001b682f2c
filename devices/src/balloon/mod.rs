//! The balloon (virtio 1.2 section 5.5): memory that the guest does not use goes back to the host.
//!
//! - *Reporting* (VIRTIO_BALLOON_F_PAGE_REPORTING): the guest names what is free in it, in ranges of 2 MiB and more, a while after it
//!   was freed. It may use it again at any time without a word. This goes on by itself.
//! - *Inflating*: the VMM asks for pages by a target, and the guest takes them away from its own use until the target is lowered, or
//!   until it has nothing left (VIRTIO_BALLOON_F_DEFLATE_ON_OOM).
//!
//! | file | what |
//! |---|---|
//! | `pages.rs` | page frame numbers to ranges; pure |
//! | `device.rs` | the device: features, configuration space, activation, reset; the handle of the VMM |
//! | `server.rs` | its queues between activation and reset |
//!
//! Whatever the guest names, it can only take its own memory away from itself: a page outside memory is counted and left alone, a
//! page named twice is gone already. What it can cost is time on the event loop, so one turn gives back a bounded piece.
//!
//! Not offered: VIRTIO_BALLOON_F_MUST_TELL_HOST, since a page that the guest takes back is there by being touched; PAGE_POISON, since pages
//! of the kernel's file do not come back as one value, and a guest that needs that then reports nothing; STATS_VQ, since the agent can be
//! asked for more; FREE_PAGE_HINT, which is for migration.

mod device;
mod pages;
mod server;

pub use device::{Balloon, BalloonHandle, BalloonState, TargetTooLarge};

#[cfg(test)]
mod tests;
