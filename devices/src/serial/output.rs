//! Where the serial port writes besides the ring: a file, pipe, terminal or socket of the owner's.
//!
//! The guest must not be able to make the host wait, nor the owner's slow terminal the guest. So a byte is
//! written on the vCPU's thread only if poll(2) says that the fd takes it; otherwise it waits in a queue of
//! [`OUTPUT_QUEUE_BYTES`] that the event loop drains, and what does not fit is dropped, counted and told in
//! the output itself once there is room again. The fd is not made non-blocking, because that would reach
//! everyone who shares it. (Between poll and write another writer of the same pipe may take the room; then
//! the write waits for the pipe's reader, and the VMM's kick of the vCPU thread ends it with EINTR.)
//!
//! An fd that failed (the reader is gone, the disk is full) is not written to again; the ring still is.

use crate::event::{EventLoop, Interest, Subscriber};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The most bytes that wait for a slow reader.
pub const OUTPUT_QUEUE_BYTES: usize = 64 * 1024;
/// The most bytes written at once: no more than a pipe or a terminal takes whole when it says that it is
/// ready (a pipe has PIPE_BUF, a terminal WAKEUP_CHARS of room then).
const WRITE_MAX_BYTES: usize = 256;

pub(super) struct Output {
    fd: OwnedFd,
    event_loop: Arc<dyn EventLoop>,
    drain: Arc<Mutex<dyn Subscriber>>,
    queue: VecDeque<u8>,
    watched: bool,
    failed: bool,
    /// Dropped since the last notice.
    dropped: u64,
    /// Dropped ever.
    lost: u64,
}

impl Output {
    pub(super) fn new(
        fd: OwnedFd,
        event_loop: Arc<dyn EventLoop>,
        drain: Arc<Mutex<dyn Subscriber>>,
    ) -> Output {
        Output {
            fd,
            event_loop,
            drain,
            queue: VecDeque::new(),
            watched: false,
            failed: false,
            dropped: 0,
            lost: 0,
        }
    }

    pub(super) fn send(&mut self, byte: u8) {
        self.enqueue(byte);
        // While it is watched the event loop writes, so that order is kept and nobody polls twice.
        if !self.watched {
            self.drain();
        }
    }

    #[cfg(test)]
    pub(super) fn queued(&self) -> usize {
        self.queue.len()
    }

    fn enqueue(&mut self, byte: u8) {
        if self.failed || self.queue.len() >= OUTPUT_QUEUE_BYTES {
            self.dropped = self.dropped.saturating_add(1);
            self.lost = self.lost.saturating_add(1);
        } else {
            self.queue.push_back(byte);
        }
    }

    /// Writes as much as the fd takes now, and sees to it that the loop calls again for the rest.
    pub(super) fn drain(&mut self) {
        while !self.queue.is_empty() && self.wait_writable(Duration::ZERO) {
            self.write_some();
        }
        self.notice();
        let want = !self.queue.is_empty() && !self.failed;
        if want && !self.watched {
            let interest = Interest {
                readable: false,
                writable: true,
                edge: false,
            };
            let drain = Arc::clone(&self.drain);
            // A regular file cannot be watched, and need not be: it is always ready. If the watch fails all
            // the same, the next byte of the guest tries again.
            self.watched = self
                .event_loop
                .watch(self.fd.as_raw_fd(), interest, 0, drain)
                .is_ok();
        } else if !want && self.watched {
            self.event_loop.forget(self.fd.as_raw_fd());
            self.watched = false;
        }
    }

    /// Queues a line about what was dropped, once there is room for much more than the line itself.
    fn notice(&mut self) {
        if self.dropped > 0 && !self.failed && self.queue.len() <= OUTPUT_QUEUE_BYTES / 2 {
            let line = format!("\n[{} bytes of console output lost]\n", self.dropped);
            self.dropped = 0;
            self.queue.extend(line.bytes());
        }
    }

    fn write_some(&mut self) {
        let (front, _) = self.queue.as_slices();
        let chunk = front.get(..WRITE_MAX_BYTES).unwrap_or(front);
        match rustix::io::write(&self.fd, chunk) {
            Ok(written) => drop(self.queue.drain(..written)),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) => self.fail(),
        }
    }

    fn fail(&mut self) {
        self.failed = true;
        self.lost = self.lost.saturating_add(self.queue.len() as u64);
        self.queue = VecDeque::new();
    }

    /// Whether the fd takes bytes, waiting for that as long as `patience`.
    fn wait_writable(&mut self, patience: Duration) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        let timeout = Timespec {
            tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(patience.subsec_nanos()),
        };
        let ready = match poll(&mut fds, Some(&timeout)) {
            Ok(ready) => ready > 0,
            Err(_) => false,
        };
        let [fd] = &fds;
        let flags = fd.revents();
        if flags.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL) {
            self.fail();
            return false;
        }
        ready && flags.contains(PollFlags::OUT)
    }

    pub(super) fn flush(&mut self, patience: Duration) -> u64 {
        let deadline = Instant::now() + patience;
        loop {
            self.drain();
            let left = deadline.saturating_duration_since(Instant::now());
            if self.queue.is_empty() || left.is_zero() {
                break;
            }
            self.wait_writable(left);
        }
        self.lost.saturating_add(self.queue.len() as u64)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.watched {
            self.event_loop.forget(self.fd.as_raw_fd());
        }
    }
}
