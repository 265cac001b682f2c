//! What it takes to plug blocks and to unplug them, in an order in which nobody ever reaches what is not there.
//!
//! A block is plugged for the guest's CPUs first and for devices then, and unplugged the other way round; its pages go last.

use super::device::Shared;
use super::request::{Request, Response, State};
use crate::discard::discard;
use crate::memory::{Blocks, GuestMemory, Region};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_memory::{GuestMemory as _, VolatileSlice};

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
            work.unplug_all();
        }
        result
    }

    pub(super) fn answer(&self, request: Request) -> Response {
        let Some(work) = self.work() else {
            return Response::Error;
        };
        match request {
            Request::Plug(range) => work.plug(range),
            Request::Unplug(range) => work.unplug(range),
            Request::UnplugAll => work.unplug_all(),
            Request::State(range) => Response::State(work.state(range)),
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

    fn plug(&self, range: Range<u64>) -> Response {
        if self.state(range.clone()) != State::Unplugged {
            return Response::Error;
        }
        let plugged = self.shared.plugged.load(Ordering::Relaxed) + self.bytes(&range);
        if plugged > self.shared.requested.load(Ordering::Relaxed) {
            return Response::Nack;
        }
        for number in range.clone() {
            // What a device wrote here after the block was unplugged goes now.
            self.discard(number);
            if self.map(number).is_err() {
                for mapped in range.start..number {
                    let _ = self.unmap(mapped);
                }
                return Response::Busy;
            }
        }
        for number in range {
            self.blocks.set(number, true);
        }
        self.shared.plugged.store(plugged, Ordering::Relaxed);
        Response::Ack
    }

    fn unplug(&self, range: Range<u64>) -> Response {
        if self.state(range.clone()) != State::Plugged {
            return Response::Error;
        }
        for number in range.clone() {
            self.blocks.set(number, false);
        }
        for number in range.clone() {
            if self.unmap(number).is_err() {
                self.undo_unplug(range, number);
                return Response::Busy;
            }
        }
        for number in range.clone() {
            self.discard(number);
        }
        let bytes = self.bytes(&range);
        self.shared.plugged.fetch_sub(bytes, Ordering::Relaxed);
        Response::Ack
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
        if self.unplug_all() != Response::Ack {
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

    fn unplug_all(&self) -> Response {
        for number in (0..self.blocks.count()).filter(|number| self.blocks.is_plugged(*number)) {
            if self.unplug(number..number + 1) != Response::Ack {
                return Response::Busy;
            }
        }
        Response::Ack
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
