//! The calls of disks by io_uring(7): one ring for all disks of the VM, and no thread of ours.
//!
//! Requests of a ring pass by a thread's system call filter, so the ring has its own: before it is enabled, and for good, it is
//! restricted to the calls that disks need, on files that were put into its table by number
//! (`IORING_REGISTER_RESTRICTIONS`, Linux 5.10). Nothing can be opened, sent or mapped with it.
//!
//! `unsafe`: an entry holds the address of vectors, which have to live until its completion.
#![allow(unsafe_code)]

use super::engine::{Completion, DISKS_MAX, IN_FLIGHT_MAX, Submission};
use super::vectors::{PUNCH, ZERO_RANGE};
use super::work::Call;
use io_uring::register::Restriction;
use io_uring::squeue::{Entry, Flags};
use io_uring::{IoUring, opcode, types};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// Entries that one call hands over; more are handed over in several.
const ENTRIES: u32 = 128;
/// Threads that the kernel may start for calls that block, of each of its two kinds (Linux 5.15). As many slow calls of one disk
/// hold up those of the others.
const KERNEL_THREADS_MAX: u32 = 16;
/// Largest transfer that may be done while the event loop waits: what is in the host's page cache is copied at once. 256 of these,
/// which is a full queue, are some 2 ms.
const INLINE_MAX_BYTES: usize = 64 * 1024;
/// `IORING_REGISTER_FILES_UPDATE`, the one thing that may still be registered: a disk that comes or goes.
const REGISTER_FILES_UPDATE: u8 = 6;

/// A ring.
pub(super) struct Ring(Mutex<IoUring>);

impl Ring {
    /// A ring that signals `event` for what it has completed.
    ///
    /// # Errors
    /// The host has none, or none that can be restricted; then threads have to do.
    pub(super) fn new(event: &EventFd) -> io::Result<Ring> {
        let ring: IoUring = IoUring::builder()
            .dontfork()
            .setup_r_disabled()
            // So many may be in flight, so that the queue of completions never overflows.
            .setup_cqsize(IN_FLIGHT_MAX as u32)
            .build(ENTRIES)?;
        let submitter = ring.submitter();
        submitter.register_files(&[-1; DISKS_MAX])?;
        submitter.register_eventfd(event.as_raw_fd())?;
        // Without it (before Linux 5.15) there may be as many as RLIMIT_NPROC allows.
        let _ = submitter.register_iowq_max_workers(&mut [KERNEL_THREADS_MAX; 2]);
        let (required, allowed) = (Flags::FIXED_FILE.bits(), Flags::ASYNC.bits());
        submitter.register_restrictions(&mut [
            Restriction::register_op(REGISTER_FILES_UPDATE),
            Restriction::sqe_op(opcode::Readv::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_op(opcode::Fsync::CODE),
            Restriction::sqe_op(opcode::Fallocate::CODE),
            Restriction::sqe_flags_required(required),
            Restriction::sqe_flags_allowed(allowed),
        ])?;
        submitter.register_enable_rings()?;
        Ok(Ring(Mutex::new(ring)))
    }

    /// Gives disk number `disk` its file, or takes it away (-1).
    ///
    /// # Errors
    /// The kernel refused.
    pub(super) fn set_file(&self, disk: u8, file: RawFd) -> io::Result<()> {
        let ring = self.lock();
        let submitter = ring.submitter();
        submitter.register_files_update(u32::from(disk), &[file])?;
        Ok(())
    }

    /// Puts a call into the ring; the kernel learns of it by [`Ring::flush`] at the latest.
    ///
    /// # Errors
    /// The ring is full, and the kernel has no memory to take what is in it.
    ///
    /// # Safety
    /// The submission's vectors live until its completion was taken, if this succeeds.
    pub(super) unsafe fn push(&self, submission: &Submission) -> io::Result<()> {
        let entry = entry(submission);
        let mut ring = self.lock();
        // SAFETY: the caller keeps the vectors.
        if unsafe { ring.submission().push(&entry) }.is_ok() {
            return Ok(());
        }
        submit(&ring)?;
        // SAFETY: as above.
        unsafe { ring.submission().push(&entry) }.map_err(|_full| io::ErrorKind::OutOfMemory.into())
    }

    /// Tells the kernel of what was pushed.
    ///
    /// # Errors
    /// It has no memory for it now; what was pushed stays, and this can be called again.
    pub(super) fn flush(&self) -> io::Result<()> {
        let mut ring = self.lock();
        if ring.submission().is_empty() {
            return Ok(());
        }
        submit(&ring)
    }

    /// The same, but for what is completed before this returns the event is not signalled: whoever calls takes it.
    ///
    /// # Errors
    /// As [`Ring::flush`].
    pub(super) fn flush_silently(&self) -> io::Result<()> {
        let mut ring = self.lock();
        if ring.submission().is_empty() {
            return Ok(());
        }
        ring.completion().disable_eventfd();
        let submitted = submit(&ring);
        ring.completion().enable_eventfd();
        submitted
    }

    /// Takes up to `max` completions.
    pub(super) fn take(&self, into: &mut Vec<Completion>, max: usize) {
        let mut ring = self.lock();
        let completions = ring.completion().take(max).map(|done| Completion {
            ticket: done.user_data(),
            result: match done.result() {
                moved @ 0.. => Ok(moved as u64),
                error => Err(Errno::from_raw_os_error(error.wrapping_neg())),
            },
        });
        into.extend(completions);
    }

    fn lock(&self) -> MutexGuard<'_, IoUring> {
        // Nothing in here panics with the lock held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn submit(ring: &IoUring) -> io::Result<()> {
    loop {
        match ring.submit() {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn entry(submission: &Submission) -> Entry {
    let file = types::Fixed(u32::from(submission.disk));
    let vectors = submission.vectors;
    let write = |offset, flags| {
        opcode::Writev::new(file, vectors.first, vectors.count)
            .offset(offset)
            .rw_flags(flags)
            .build()
    };
    let allocate = |mode, offset, length| {
        opcode::Fallocate::new(file, length)
            .offset(offset)
            .mode(mode)
            .build()
    };
    let entry = match submission.call {
        Call::Read { offset } => opcode::Readv::new(file, vectors.first, vectors.count)
            .offset(offset)
            .build(),
        Call::Write { offset, durable } => write(offset, if durable { libc::RWF_DSYNC } else { 0 }),
        Call::Zeroes(extent) => write(extent.offset, 0),
        Call::Punch(extent) => allocate(PUNCH, extent.offset, extent.length),
        Call::ZeroRange(extent) => allocate(ZERO_RANGE, extent.offset, extent.length),
        Call::Sync => opcode::Fsync::new(file)
            .flags(types::FsyncFlags::DATASYNC)
            .build(),
    };
    let waits = match submission.call {
        Call::Read { .. } | Call::Write { durable: false, .. } => vectors.bytes > INLINE_MAX_BYTES,
        Call::Write { durable: true, .. } | Call::Zeroes(_) => true,
        // The kernel itself never makes these while the caller waits.
        Call::Punch(_) | Call::ZeroRange(_) | Call::Sync => false,
    };
    let flags = if waits { Flags::ASYNC } else { Flags::empty() };
    // The builder has set the flag of the file's table beside these.
    entry.flags(flags).user_data(submission.ticket)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    /// The result of one entry, as the kernel gives it.
    fn result(ring: &Ring, entry: &Entry) -> i32 {
        let mut ring = ring.lock();
        // SAFETY: none of the entries of this test names memory.
        unsafe { ring.submission().push(entry) }.expect("room");
        ring.submit_and_wait(1).expect("submitted");
        let done = ring.completion().next().expect("a completion");
        done.result()
    }

    #[test]
    fn a_ring_refuses_everything_but_the_calls_of_disks() {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let Ok(ring) = Ring::new(&event) else {
            eprintln!("SKIPPED: {}: this host has no io_uring", module_path!());
            return;
        };
        let file = File::open("/proc/self/exe").unwrap();
        ring.set_file(0, file.as_raw_fd()).unwrap();
        let (own, table) = (types::Fd(file.as_raw_fd()), types::Fixed(0));
        for refused in [
            opcode::Nop::new().build(),
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/".as_ptr()).build(),
            opcode::Socket::new(libc::AF_UNIX, libc::SOCK_STREAM, 0).build(),
            opcode::Close::new(own).build(),
            // The calls of disks, on a file that is not in the table, or with a flag that they do not need.
            opcode::Fsync::new(own).build(),
            opcode::Fsync::new(table).build().flags(Flags::IO_DRAIN),
        ] {
            assert_eq!(result(&ring, &refused), -libc::EACCES, "{refused:?}");
        }
        assert_ne!(
            result(&ring, &opcode::Fsync::new(table).build()),
            -libc::EACCES
        );
        // And nothing more can be registered.
        let guard = ring.lock();
        let refused = guard.submitter().register_eventfd(event.as_raw_fd());
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EACCES));
    }
}
