//! Disks (virtio 1.2 section 5.2), raw ones on a file that the owner opened.
//!
//! | file | what |
//! |---|---|
//! | `request.rs` | what the driver asks, parsed and checked; pure |
//! | `work.rs` | which calls it takes; pure |
//! | `server.rs` | queues, requests under way, answers |
//! | `vectors.rs` | the driver's buffers for as long as the kernel works on them |
//! | `engine.rs`, `ring.rs`, `workers.rs` | where the calls are made: io_uring, or threads |
//! | `backing.rs` | what can be a disk |
//! | `fault.rs` | what went wrong on the host's side |
//! | `device.rs` | the device: features, configuration space, activation, reset |
//!
//! Trusts the owner's file to be the guest's own. Refuses every request that is not wholly inside the disk, and every change
//! of a read-only one. A host that fails is an IOERR to the guest and a [`DiskFault`] to whoever runs the host.

mod backing;
mod device;
mod engine;
mod fault;
mod request;
mod ring;
mod server;
mod vectors;
mod work;
mod workers;

pub use backing::BackingError;
pub use device::{DISK_QUEUES_MAX, Disk, DiskError, DiskSetup};
pub use engine::{DISKS_MAX, DiskIo, EngineKind};
pub use fault::{DiskFault, OnFault};
pub use request::ID_BYTES as DISK_ID_BYTES;
pub use workers::Seal;

/// All that a thread of [`DiskIo`] asks of the kernel.
pub const DISK_SYSCALLS: &[libc::c_long] = &[
    libc::SYS_preadv,
    libc::SYS_pwritev2,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    // Waiting for a call to make, and telling that it is made.
    libc::SYS_futex,
    libc::SYS_write,
    // The last thread closes the event.
    libc::SYS_close,
    // Builds with debug assertions ask F_GETFD of each descriptor that they close.
    #[cfg(debug_assertions)]
    libc::SYS_fcntl,
    // Memory of queues, and the end of a thread.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_madvise,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sched_yield,
    libc::SYS_exit,
    // What glibc looks up when it first shrinks the heap of a thread; the threads of a VMM have one heap together.
    #[cfg(test)]
    libc::SYS_openat,
    #[cfg(test)]
    libc::SYS_read,
];

#[cfg(test)]
mod tests;
