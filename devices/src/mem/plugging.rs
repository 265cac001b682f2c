//! What it takes to plug blocks and to unplug them, in an order in which nobody ever reaches what is not there.
//!
//! A block is plugged for the guest's CPUs first and for devices then, and unplugged the other way round; its pages go last.
//!
//! Each of these is a system call, and a request may name all blocks that there are: what is more than one turn of the event loop has
//! room for is a [`Job`], which later turns go on with. While it is under way, devices reach none of its blocks, and what is not done yet
//! is as it was for the guest's CPUs.

use super::device::Shared;
use super::request::{Request, Response, State};
use crate::discard::discard;
use crate::memory::{Blocks, GuestMemory, Region};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::{GuestMemory as _, VolatileSlice};

/// What is plugged or unplugged in one turn of the event loop at most, in blocks: KVM takes some 25 us for each, so 4,096 of them would
/// keep everybody else waiting for 100 ms.
const TURN_BLOCKS_MAX: u64 = 64;
/// And in bytes, whose pages have to be given back, but for a larger block.
const TURN_BYTES_MAX: u64 = 128 << 20;

/// Makes blocks memory for the guest's CPUs. For one caller at a time.
pub trait Backing: Send + Sync {
    /// From now on the guest may reach this block.
    ///
    /// # Errors
    /// The host refused; the guest cannot reach it.
    fn map(&self, block: Block<'_>) -> io::Result<()>;
    /// From now on it may not.
    ///
    /// # Errors
    /// The host refused; the guest can still reach it.
    fn unmap(&self, block: Block<'_>) -> io::Result<()>;
}

/// One block.
pub struct Block<'m> {
    /// Its number in the region.
    pub number: u32,
    /// Guest-physical address.
    pub address: u64,
    /// What backs it, all of it.
    pub memory: VolatileSlice<'m>,
}

/// A request that is under way.
#[derive(Debug)]
pub(super) enum Job {
    /// The blocks before `next` are mapped.
    Plug { range: Range<u64>, next: u64 },
    /// The blocks before `next` are not mapped any more.
    Unmap { range: Range<u64>, next: u64 },
    /// None is mapped any more, and the pages of those before `next` are gone.
    Discard { range: Range<u64>, next: u64 },
    /// None before `next` is plugged. Each block by itself: those that are left are as they were.
    UnplugAll { next: u64 },
}

/// How far a request is.
#[derive(Debug)]
pub(super) enum Progress {
    /// It is answered.
    Done(Response),
    /// It needs another turn.
    UnderWay(Job),
}

/// The one who plugs and unplugs.
pub(super) struct Plugging {
    memory: GuestMemory,
    backing: Arc<dyn Backing>,
    shared: Arc<Shared>,
}

impl Plugging {
    pub(super) fn new(
        memory: GuestMemory,
        backing: Arc<dyn Backing>,
        shared: Arc<Shared>,
    ) -> Plugging {
        Plugging {
            memory,
            backing,
            shared,
        }
    }

    /// The region and what is done to it. Found when the device was made; regions neither come nor go.
    fn work(&self) -> Option<Work<'_>> {
        let mut regions = self.memory.iter();
        let (region, blocks) = regions.find_map(|region| Some((region, region.blocks()?)))?;
        Some(Work {
            region,
            blocks,
            backing: &*self.backing,
            shared: &self.shared,
        })
    }

    /// Numbers of the plugged blocks, in order.
    pub(super) fn plugged(&self) -> Vec<u32> {
        let Some(work) = self.work() else {
            return Vec::new();
        };
        // See `Mem::new`: there are no more than that.
        (0..self.shared.extent.count as u32)
            .filter(|number| work.blocks.is_plugged(u64::from(*number)))
            .collect()
    }

    /// Plugs exactly the blocks of `numbers`, which are in order, and leaves what is in them.
    ///
    /// # Errors
    /// The host refused one. Then none is plugged that it takes back.
    pub(super) fn restore(&self, numbers: &[u32]) -> io::Result<()> {
        let work = self.work().ok_or(io::ErrorKind::NotFound)?;
        let result = work.restore(numbers);
        if result.is_err() {
            work.finish(work.begin(Request::UnplugAll));
        }
        result
    }

    /// Does the first turn of a request. No other is under way.
    pub(super) fn begin(&self, request: Request) -> Progress {
        match self.work() {
            Some(work) => work.begin(request),
            None => Progress::Done(Response::Error),
        }
    }

    /// Does another turn.
    pub(super) fn go_on(&self, job: Job) -> Progress {
        match self.work() {
            Some(work) => work.go_on(job),
            None => Progress::Done(Response::Error),
        }
    }

    /// Does all that is left, for whoever has no more turns.
    pub(super) fn finish(&self, job: Job) {
        if let Some(work) = self.work() {
            work.finish(Progress::UnderWay(job));
        }
    }
}

struct Work<'a> {
    region: &'a Region,
    blocks: &'a Blocks,
    backing: &'a dyn Backing,
    shared: &'a Shared,
}

impl Work<'_> {
    fn state(&self, range: Range<u64>) -> State {
        let all = range.end - range.start;
        match range
            .filter(|number| self.blocks.is_plugged(*number))
            .count() as u64
        {
            0 => State::Unplugged,
            plugged if plugged == all => State::Plugged,
            _ => State::Mixed,
        }
    }

    fn bytes(&self, range: &Range<u64>) -> u64 {
        (range.end - range.start) * self.blocks.block_bytes()
    }

    fn begin(&self, request: Request) -> Progress {
        let job = match request {
            Request::Plug(range) => self.plug(range),
            Request::Unplug(range) => self.unplug(range),
            Request::UnplugAll => Ok(Job::UnplugAll { next: 0 }),
            Request::State(range) => Err(Response::State(self.state(range))),
        };
        match job {
            Ok(job) => self.go_on(job),
            Err(response) => Progress::Done(response),
        }
    }

    fn plug(&self, range: Range<u64>) -> Result<Job, Response> {
        if self.state(range.clone()) != State::Unplugged {
            return Err(Response::Error);
        }
        let plugged = self.shared.plugged.load(Ordering::Relaxed) + self.bytes(&range);
        if plugged > self.shared.requested.load(Ordering::Relaxed) {
            return Err(Response::Nack);
        }
        let next = range.start;
        Ok(Job::Plug { range, next })
    }

    fn unplug(&self, range: Range<u64>) -> Result<Job, Response> {
        if self.state(range.clone()) != State::Plugged {
            return Err(Response::Error);
        }
        for number in range.clone() {
            self.blocks.set(number, false);
        }
        let next = range.start;
        Ok(Job::Unmap { range, next })
    }

    fn go_on(&self, job: Job) -> Progress {
        match job {
            Job::Plug { range, next } => self.go_on_plugging(range, next),
            Job::Unmap { range, next } => self.go_on_unmapping(range, next),
            Job::Discard { range, next } => self.go_on_discarding(range, next),
            Job::UnplugAll { next } => self.go_on_unplugging_all(next),
        }
    }

    fn finish(&self, mut progress: Progress) -> Response {
        loop {
            match progress {
                Progress::Done(response) => return response,
                Progress::UnderWay(job) => progress = self.go_on(job),
            }
        }
    }

    /// Where in `range` the turn ends that begins at `next`.
    fn turn_ends(&self, range: &Range<u64>, next: u64) -> u64 {
        range.end.min(next + self.turn_blocks())
    }

    fn turn_blocks(&self) -> u64 {
        (TURN_BYTES_MAX / self.blocks.block_bytes()).clamp(1, TURN_BLOCKS_MAX)
    }

    fn go_on_plugging(&self, range: Range<u64>, next: u64) -> Progress {
        let end = self.turn_ends(&range, next);
        for number in next..end {
            // What a device wrote here after the block was unplugged goes now.
            self.discard(number);
            if self.map(number).is_err() {
                for mapped in range.start..number {
                    let _ = self.unmap(mapped);
                }
                return Progress::Done(Response::Busy);
            }
        }
        if end < range.end {
            return Progress::UnderWay(Job::Plug { range, next: end });
        }
        for number in range.clone() {
            self.blocks.set(number, true);
        }
        let bytes = self.bytes(&range);
        self.shared.plugged.fetch_add(bytes, Ordering::Relaxed);
        Progress::Done(Response::Ack)
    }

    fn go_on_unmapping(&self, range: Range<u64>, next: u64) -> Progress {
        let end = self.turn_ends(&range, next);
        for number in next..end {
            if self.unmap(number).is_err() {
                self.undo_unplug(range, number);
                return Progress::Done(Response::Busy);
            }
        }
        if end < range.end {
            return Progress::UnderWay(Job::Unmap { range, next: end });
        }
        // Nothing is undone from here on.
        let next = range.start;
        match range.end - range.start > self.turn_blocks() {
            true => Progress::UnderWay(Job::Discard { range, next }),
            false => self.go_on_discarding(range, next),
        }
    }

    fn go_on_discarding(&self, range: Range<u64>, next: u64) -> Progress {
        let end = self.turn_ends(&range, next);
        for number in next..end {
            self.discard(number);
        }
        if end < range.end {
            return Progress::UnderWay(Job::Discard { range, next: end });
        }
        let bytes = self.bytes(&range);
        self.shared.plugged.fetch_sub(bytes, Ordering::Relaxed);
        Progress::Done(Response::Ack)
    }

    /// The guest keeps `range`, of which those below `failed` are not mapped any more.
    fn undo_unplug(&self, range: Range<u64>, failed: u64) {
        for number in range {
            // One that cannot be mapped again is none for devices either, and nothing for the guest until it unplugs it.
            let there = number >= failed || self.map(number).is_ok();
            self.blocks.set(number, there);
            if !there {
                self.discard(number);
                let bytes = self.blocks.block_bytes();
                self.shared.plugged.fetch_sub(bytes, Ordering::Relaxed);
            }
        }
    }

    fn restore(&self, numbers: &[u32]) -> io::Result<()> {
        if self.finish(self.begin(Request::UnplugAll)) != Response::Ack {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        for number in numbers.iter().map(|number| u64::from(*number)) {
            self.map(number)?;
            self.blocks.set(number, true);
            let bytes = self.blocks.block_bytes();
            self.shared.plugged.fetch_add(bytes, Ordering::Relaxed);
        }
        Ok(())
    }

    fn go_on_unplugging_all(&self, next: u64) -> Progress {
        let mut left = self.turn_blocks();
        for number in (next..self.blocks.count()).filter(|number| self.blocks.is_plugged(*number)) {
            if left == 0 {
                return Progress::UnderWay(Job::UnplugAll { next: number });
            }
            left -= 1;
            let one = Request::Unplug(number..number + 1);
            if self.finish(self.begin(one)) != Response::Ack {
                return Progress::Done(Response::Busy);
            }
        }
        Progress::Done(Response::Ack)
    }

    fn map(&self, number: u64) -> io::Result<()> {
        let mapped = self.block(number).and_then(|block| self.backing.map(block));
        mapped.inspect_err(|_| self.failed())
    }

    fn unmap(&self, number: u64) -> io::Result<()> {
        let unmapped = self
            .block(number)
            .and_then(|block| self.backing.unmap(block));
        unmapped.inspect_err(|_| self.failed())
    }

    fn block(&self, number: u64) -> io::Result<Block<'_>> {
        let memory = self.region.block(number);
        Ok(Block {
            // A region has fewer: see `Mem::new`.
            number: number as u32,
            address: self.shared.extent.start + number * self.blocks.block_bytes(),
            memory: memory.ok_or(io::ErrorKind::InvalidInput)?,
        })
    }

    fn discard(&self, number: u64) {
        let memory = self.region.block(number);
        if memory.is_none_or(|memory| discard(&memory).is_err()) {
            self.failed();
        }
    }

    fn failed(&self) {
        self.shared.counters.errors.add(1);
    }
}
