//! The queue of the device between activation and reset, on the event loop: one request a turn.

use super::device::Shared;
use super::plugging::Plugging;
use super::request::{REQUEST_BYTES, RESPONSE_BYTES, Request, Response};
use crate::GuestMemory;
use crate::event::{Readiness, Subscriber};
use crate::virtio::chain::Buffers;
use crate::virtio::device::Interrupt;
use crate::virtio::queue::{ActiveQueue, Positions, positions};
use std::io::{Read, Write};
use std::sync::Arc;

/// A live device.
pub(super) struct Server {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    plugging: Arc<Plugging>,
    shared: Arc<Shared>,
    /// Gone after a reset and after the driver broke it.
    queue: Option<ActiveQueue>,
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
        }
    }

    /// Where it stands in its queue.
    pub(super) fn positions(&self) -> Positions {
        positions(&self.queue)
    }

    /// Serves nothing any more.
    pub(super) fn stop(&mut self) {
        self.queue = None;
    }
}

impl Subscriber for Server {
    fn ready(&mut self, _token: u64, _readiness: Readiness) {
        let Some(queue) = &mut self.queue else {
            return;
        };
        let (plugging, shared) = (&self.plugging, &self.shared);
        let served = queue.serve_up_to(1, &self.memory, &*self.interrupt, |buffers| {
            answer(plugging, shared, buffers)
        });
        if served.is_err() {
            self.queue = None;
            self.interrupt.needs_reset();
        }
    }
}

fn answer(plugging: &Plugging, shared: &Shared, mut buffers: Buffers<'_>) -> u32 {
    let counters = &shared.counters;
    counters.requests.add(1);
    // Without room for the answer nothing is done, for the driver would not know of it.
    let response = if buffers.writable.remaining() < RESPONSE_BYTES {
        None
    } else {
        let mut bytes = [0; REQUEST_BYTES];
        let read = buffers.readable.remaining() >= REQUEST_BYTES
            && buffers.readable.read_exact(&mut bytes).is_ok();
        let request = read.then(|| Request::parse(bytes, shared.extent).ok());
        let answered = request.flatten().map(|request| plugging.answer(request));
        Some(answered.unwrap_or(Response::Error))
    };
    if !matches!(response, Some(Response::Ack | Response::State(_))) {
        counters.refused.add(1);
    }
    if let Some(response) = response {
        // There is room.
        let _ = buffers.writable.write_all(&response.bytes());
    }
    buffers.writable.written()
}
