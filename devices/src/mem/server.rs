//! The queue of the device between activation and reset, on the event loop: one request a turn, and of a large one a part.

use super::device::Shared;
use super::plugging::{Job, Plugging, Progress};
use super::request::{REQUEST_BYTES, RESPONSE_BYTES, Request, Response};
use crate::GuestMemory;
use crate::event::{Readiness, Subscriber};
use crate::virtio::chain::Buffers;
use crate::virtio::device::{Busy, Interrupt};
use crate::virtio::queue::{ActiveQueue, Broken, Chain, Positions, positions};
use std::io::{Read, Write};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

/// A live device.
pub(super) struct Server {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    plugging: Arc<Plugging>,
    shared: Arc<Shared>,
    /// Gone after a reset and after the driver broke it.
    queue: Option<ActiveQueue>,
    /// A request that needs more turns, and the chain that it came by.
    under_way: Option<(Chain, Job)>,
    /// No more requests are taken, and this is signalled when none is under way.
    held: Option<Arc<EventFd>>,
}

impl Server {
    pub(super) fn new(
        memory: GuestMemory,
        interrupt: Arc<dyn Interrupt>,
        queue: ActiveQueue,
        plugging: Arc<Plugging>,
        shared: Arc<Shared>,
    ) -> Server {
        Server {
            memory,
            interrupt,
            plugging,
            shared,
            queue: Some(queue),
            under_way: None,
            held: None,
        }
    }

    /// Takes no more requests; where it stands in its queue.
    ///
    /// # Errors
    /// One is under way. `idle` is signalled when none is.
    pub(super) fn hold(&mut self, idle: &Arc<EventFd>) -> Result<Positions, Busy> {
        if self.under_way.is_none() {
            return Ok(positions(&self.queue));
        }
        self.held = Some(idle.clone());
        Err(Busy)
    }

    /// Takes requests again.
    pub(super) fn keep_on(&mut self) {
        self.held = None;
    }

    /// Serves nothing any more. A request that is under way is done to its end, which nobody is told of: blocks are plugged or not.
    pub(super) fn stop(&mut self) {
        self.queue = None;
        if let Some((_, job)) = self.under_way.take() {
            self.plugging.finish(job);
        }
    }

    fn turn(&mut self) -> Result<(), Broken> {
        let Some(queue) = &mut self.queue else {
            return Ok(());
        };
        let (chain, progress) = match (self.under_way.take(), &self.held) {
            (Some((chain, job)), _) => (chain, Some(self.plugging.go_on(job))),
            (None, Some(_)) => return Ok(()),
            (None, None) => {
                queue.disable_kicks(&self.memory)?;
                let Some(chain) = queue.pop(&self.memory)? else {
                    if queue.enable_kicks(&self.memory)? {
                        again(queue);
                    }
                    return Ok(());
                };
                let buffers = queue.open(&self.memory, &chain)?;
                let progress = begin(&self.plugging, &self.shared, buffers);
                (chain, progress)
            }
        };
        again(queue);
        let response = match progress {
            Some(Progress::UnderWay(job)) => {
                self.under_way = Some((chain, job));
                return Ok(());
            }
            Some(Progress::Done(response)) => Some(response),
            None => None,
        };
        if !matches!(response, Some(Response::Ack | Response::State(_))) {
            self.shared.counters.refused.add(1);
        }
        // The driver may have changed the chain meanwhile, and what it lies in may be memory no more.
        let mut buffers = queue.open(&self.memory, &chain)?;
        if let Some(response) = response {
            // If there is no room any more, the driver has seen to it.
            let _ = buffers.writable.write_all(&response.bytes());
        }
        queue.push_used(&self.memory, chain.head_index(), buffers.writable.written())?;
        if queue.needs_notification(&self.memory)? {
            self.interrupt.used(queue.index);
        }
        Ok(())
    }
}

impl Subscriber for Server {
    fn ready(&mut self, _token: u64, _readiness: Readiness) {
        if self.turn().is_err() {
            self.queue = None;
            self.interrupt.needs_reset();
        }
        if let (None, Some(idle)) = (&self.under_way, &self.held) {
            // Fails only when the counter is full, and then it is readable anyway.
            let _ = idle.write(1);
        }
    }
}

/// Asks for another turn.
fn again(queue: &ActiveQueue) {
    // Fails only when the counter is full, and then the fd is readable anyway.
    let _ = queue.kick.write(1);
}

/// The first turn of a request; `None` without room for the answer: nothing is done then, for the driver would not know of it.
fn begin(plugging: &Plugging, shared: &Shared, mut buffers: Buffers<'_>) -> Option<Progress> {
    shared.counters.requests.add(1);
    if buffers.writable.remaining() < RESPONSE_BYTES {
        return None;
    }
    let mut bytes = [0; REQUEST_BYTES];
    let read = buffers.readable.remaining() >= REQUEST_BYTES
        && buffers.readable.read_exact(&mut bytes).is_ok();
    let request = read.then(|| Request::parse(bytes, shared.extent).ok());
    let begun = request.flatten().map(|request| plugging.begin(request));
    Some(begun.unwrap_or(Progress::Done(Response::Error)))
}
