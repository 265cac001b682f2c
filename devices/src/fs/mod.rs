//! virtio-fs (virtio 1.2 section 5.11): a directory tree of the host, as a file system of the guest.
//!
//! Trusts: the host's kernel and file systems, and that the tree it was given is meant for the guest, whole.
//! Refuses: every byte of the guest that is not a well-formed FUSE request, every name that is more than a
//! name, every open of what is not a regular file or a directory.
//!
//! | file | what |
//! |---|---|
//! | `device.rs` | the device, and [`spawn_share_threads`] |
//! | `confine.rs` | mount namespace, identity and capabilities of the threads |
//! | `threads.rs` | queues, kicks, interrupts, reset |
//! | `guest_io.rs` | buffers in guest memory, file I/O straight into them |
//! | `abi.rs`, `request.rs` | FUSE as it lies on the queue; requests parsed once |
//! | `server.rs`, `session.rs` | one request in, one reply out; one mount of the share |
//! | `nodes.rs` | the files the guest knows, within a budget of descriptors |
//! | `names.rs`, `files.rs`, `attributes.rs`, `directory.rs` | the operations |
//! | `credentials.rs` | whose files are made, setuid bits |
//!
//! Why not a library: `docs/decisions/0002-virtio-fs-library.md`. Not here: DAX, locks (the guest keeps them),
//! notifications to the guest, POSIX ACLs, `trusted.*` attributes.

mod abi;
mod attributes;
#[cfg(any(test, feature = "testing"))]
mod bare;
mod confine;
mod credentials;
mod device;
mod directory;
mod files;
mod guest_io;
mod names;
mod nodes;
mod request;
mod server;
mod session;
mod syscalls;
mod threads;

#[cfg(any(test, feature = "testing"))]
pub use bare::BareShare;
pub use confine::{ConfineError, KEPT_CAPABILITIES};
pub use device::{
    FD_BUDGET_MIN, SHARE_THREADS, Seal, ShareError, ShareSetup, ShareState, VirtioFs,
    spawn_share_threads,
};
pub use syscalls::FS_SYSCALLS;

#[cfg(test)]
mod tests;
