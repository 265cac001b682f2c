//! The queues of a balloon between activation and reset, on the event loop.
//!
//! Each turn answers one chain of a queue, and what a chain may cost is bounded: to give back 1,024 pages that are no neighbours, or
//! [`REPORT_MAX_BYTES`] that were backed page by page, takes some milliseconds.

use super::device::Shared;
use super::pages;
use crate::counters::Counter;
use crate::discard::discard;
use crate::event::{Readiness, Subscriber};
use crate::memory::{GuestMemory, NotMemory, slice_of};
use crate::virtio::chain::{Buffers, Readable, Writable};
use crate::virtio::device::Interrupt;
use crate::virtio::queue::{ActiveQueue, Positions, ServeError, positions};
use std::ops::Range;
use std::sync::Arc;
use vm_memory::VolatileSlice;
use vmm_sys_util::eventfd::EventFd;

/// The most page frame numbers of one chain that are looked at. Linux sends 256, Windows a page of them.
pub(super) const FRAMES_MAX: usize = 1024;
/// The most that one report gives back, in bytes. Linux reports 32 ranges of at most 4 MiB.
pub(super) const REPORT_MAX_BYTES: usize = 256 << 20;
/// Bytes of a page frame number.
const FRAME_BYTES: usize = size_of::<u32>();

/// What a queue is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Inflate,
    Deflate,
    Reporting,
}

struct Served {
    kind: Kind,
    /// To be watched.
    kick: Arc<EventFd>,
    /// Gone after the driver broke it.
    queue: Option<ActiveQueue>,
}

/// A live balloon.
pub(super) struct Server {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    shared: Arc<Shared>,
    /// By token; empty after a reset.
    served: Vec<Served>,
}

impl Server {
    /// Serves the inflate and the deflate queue, and that of reporting if there is one.
    pub(super) fn new(
        memory: GuestMemory,
        interrupt: Arc<dyn Interrupt>,
        shared: Arc<Shared>,
        pfns: Vec<ActiveQueue>,
        reporting: Option<ActiveQueue>,
    ) -> Server {
        let kinds = [Kind::Inflate, Kind::Deflate, Kind::Reporting];
        let queues = pfns.into_iter().chain(reporting);
        let served = kinds.into_iter().zip(queues).map(|(kind, queue)| Served {
            kind,
            kick: Arc::clone(&queue.kick),
            queue: Some(queue),
        });
        Server {
            memory,
            interrupt,
            shared,
            served: served.collect(),
        }
    }

    /// What to watch, with tokens.
    pub(super) fn kicks(&self) -> Vec<(u64, Arc<EventFd>)> {
        let kicks = self.served.iter().map(|served| served.kick.clone());
        (0..).zip(kicks).collect()
    }

    /// Where it stands in its queues.
    pub(super) fn positions(&self) -> Positions {
        positions(
            self.served
                .iter()
                .filter_map(|served| served.queue.as_ref()),
        )
    }

    /// Serves nothing any more; an event that is being delivered may be of the next activation.
    pub(super) fn stop(&mut self) {
        self.served.clear();
    }
}

impl Subscriber for Server {
    fn ready(&mut self, token: u64, _readiness: Readiness) {
        let served = usize::try_from(token).ok();
        let Some(served) = served.and_then(|token| self.served.get_mut(token)) else {
            return;
        };
        let Some(queue) = &mut served.queue else {
            return;
        };
        let giving = Giving {
            memory: &self.memory,
            shared: &self.shared,
        };
        let result: Result<(), ServeError> =
            queue.serve_up_to(1, &self.memory, &*self.interrupt, |buffers| {
                giving.answer(served.kind, buffers);
                0
            });
        if result.is_err() {
            served.queue = None;
            self.interrupt.needs_reset();
        }
    }
}

/// Memory that is being given back.
struct Giving<'a> {
    memory: &'a GuestMemory,
    shared: &'a Shared,
}

impl Giving<'_> {
    /// Nothing of any chain is written to.
    fn answer(&self, kind: Kind, mut buffers: Buffers<'_>) {
        match kind {
            Kind::Inflate => self.inflate(&mut buffers.readable),
            // Pages come back by being touched.
            Kind::Deflate => {}
            Kind::Reporting => self.report(&mut buffers.writable),
        }
    }

    fn inflate(&self, named: &mut Readable<'_>) {
        let count = (named.remaining() / FRAME_BYTES).min(FRAMES_MAX);
        let mut frames = Vec::with_capacity(count);
        for _ in 0..count {
            // There are as many: they were counted.
            let Ok(frame) = named.read_struct::<u32>() else {
                break;
            };
            frames.push(u32::from_le(frame));
        }
        let beyond = named.remaining() / FRAME_BYTES;
        self.refused(beyond.saturating_mul(pages::PAGE_BYTES as usize));
        let inflated = &self.shared.counters.inflated_bytes;
        for range in pages::ranges(frames) {
            if self.give_range(&range, inflated).is_err() {
                // It goes on from one region to the next or has pages that are no memory: each by itself.
                for start in range.step_by(pages::PAGE_BYTES as usize) {
                    let page = start..start + pages::PAGE_BYTES;
                    if self.give_range(&page, inflated).is_err() {
                        self.refused(pages::PAGE_BYTES as usize);
                    }
                }
            }
        }
    }

    fn give_range(&self, range: &Range<u64>, counter: &Counter) -> Result<(), NotMemory> {
        let bytes = (range.end - range.start) as usize;
        self.give(&slice_of(self.memory, range.start, bytes)?, counter);
        Ok(())
    }

    /// Each writable buffer is a free range.
    fn report(&self, free: &mut Writable<'_>) {
        let counters = &self.shared.counters;
        counters.reports.add(1);
        let mut left = REPORT_MAX_BYTES;
        while let Some(range) = free.next_piece(left) {
            left -= range.len();
            self.give(&range, &counters.reported_bytes);
        }
        self.refused(free.remaining());
    }

    fn give(&self, slice: &VolatileSlice<'_>, counter: &Counter) {
        match discard(slice) {
            Ok(bytes) => {
                counter.add(bytes as u64);
            }
            Err(_) => {
                self.shared.counters.errors.add(1);
            }
        }
    }

    fn refused(&self, bytes: usize) {
        let counter = &self.shared.counters.refused_bytes;
        counter.add(bytes as u64);
    }
}
