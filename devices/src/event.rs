//! How a device takes part in the VMM's event loop without knowing it: it names the fds it waits for, and
//! is called with the token of the one that is ready.
//!
//! The loop is level-triggered. A subscriber must take away the reason of each event or change its interest,
//! so that the loop never spins on what the guest does or leaves undone. Kicks alone are edge-triggered: they only count, and to take
//! the count away would be a system call for each notification of a driver.
//!
//! [`Poller`] is the one implementation: the VMM runs it on its event-loop thread, the tests turn it by hand.

mod poller;

pub use poller::{Poller, WATCHES_PER_TURN};

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};

/// What a subscriber waits for on one fd.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Interest {
    /// Ready when a read would not block.
    pub readable: bool,
    /// Ready when a write would not block.
    pub writable: bool,
    /// Told of each time it becomes ready, and not again while it stays so.
    pub edge: bool,
}

impl Interest {
    /// An fd to be read.
    pub const READ: Interest = Interest {
        readable: true,
        writable: false,
        edge: false,
    };
    /// The eventfd of a driver's notifications, which nobody reads: each `write` to it is an event, the first watch of one that was
    /// written before as well.
    pub const KICK: Interest = Interest {
        readable: true,
        writable: false,
        edge: true,
    };
}

/// What an fd is ready for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    /// A read will not block, or the peer shut down its writing side.
    pub readable: bool,
    /// A write will not block.
    pub writable: bool,
    /// The peer is gone or the fd failed; reported whatever the interest.
    pub hangup: bool,
}

/// The loop, as a subscriber sees it. All calls take effect at once and may be made from any thread.
pub trait EventLoop: Send + Sync {
    /// Starts to watch `fd` for `subscriber` under `token`. The subscriber keeps the fd open until `forget`.
    ///
    /// # Errors
    /// The kernel refused to watch the fd.
    fn watch(
        &self,
        fd: RawFd,
        interest: Interest,
        token: u64,
        subscriber: Arc<Mutex<dyn Subscriber>>,
    ) -> std::io::Result<()>;
    /// Changes what `fd` is watched for.
    ///
    /// # Errors
    /// The fd is not watched.
    fn change(&self, fd: RawFd, interest: Interest) -> std::io::Result<()>;
    /// Stops watching `fd`; must come before the fd is closed. After it returns, no event of this watch is
    /// delivered except one that is being delivered right now on the loop's thread.
    fn forget(&self, fd: RawFd);
}

/// A piece of a device that lives on the event loop.
pub trait Subscriber: Send {
    /// `token` is ready.
    fn ready(&mut self, token: u64, readiness: Readiness);
}
