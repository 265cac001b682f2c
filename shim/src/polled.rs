//! The one way a descriptor gets into the event loop.
#![allow(unsafe_code)] // registering a descriptor with the event loop is unsafe since tokio 1.54

use std::io;
use std::os::fd::OwnedFd;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Registers a descriptor, which is non-blocking or never read.
///
/// # Errors
/// It cannot be polled.
pub fn polled(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open and keeps its number until it is dropped, which the AsyncFd that owns
    // it does last; nobody here replaces it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
