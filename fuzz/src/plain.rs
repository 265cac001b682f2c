//! A device that has queues and nothing else, for code that serves a queue but is no device by itself.

use capsid_devices::GuestMemory;
use capsid_devices::event::{EventLoop, Interest, Poller, Readiness, Subscriber};
use capsid_devices::virtio::device::{Activation, Busy, DeviceError, Interrupt, VirtioDevice};
use capsid_devices::virtio::queue::{ActiveQueue, Positions};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// What serves the queues.
pub(crate) trait Serve: Send + 'static {
    /// A queue was kicked. `None`: the driver broke it, and it is served no more.
    fn kicked(
        &mut self,
        queue: &mut ActiveQueue,
        memory: &GuestMemory,
        interrupt: &dyn Interrupt,
    ) -> Option<()>;

    /// Whether it has taken what it has not given back.
    fn is_busy(&self) -> bool {
        false
    }

    /// The driver reset the device.
    fn reset(&mut self);
}

/// What the device and its target share.
pub(crate) struct Core<S> {
    pub(crate) serve: S,
    live: Option<Activation>,
    /// By queue; also of those that are gone, for the driver may go on kicking.
    kicks: Vec<Option<Arc<EventFd>>>,
}

impl<S: Serve> Core<S> {
    pub(crate) fn new(serve: S) -> Arc<Mutex<Core<S>>> {
        Arc::new(Mutex::new(Core {
            serve,
            live: None,
            kicks: Vec::new(),
        }))
    }

    /// Works on a live queue, if it is one.
    pub(crate) fn with_queue(
        &mut self,
        index: usize,
        work: impl FnOnce(&mut S, &mut ActiveQueue, &GuestMemory, &dyn Interrupt) -> Option<()>,
    ) {
        let Some(live) = &mut self.live else {
            return;
        };
        if let Some(Some(queue)) = live.queues.get_mut(index) {
            if work(&mut self.serve, queue, &live.memory, &*live.interrupt).is_none() {
                live.interrupt.needs_reset();
                if let Some(queue) = live.queues.get_mut(index) {
                    *queue = None;
                }
            }
        }
    }
}

pub(crate) fn lock<S>(core: &Mutex<Core<S>>) -> MutexGuard<'_, Core<S>> {
    core.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S: Serve> Subscriber for Core<S> {
    fn ready(&mut self, token: u64, _readiness: Readiness) {
        if let Some(Some(kick)) = self.kicks.get(token as usize) {
            // Takes the event away, or the loop would spin on it. An empty counter: another turn has taken it.
            let _ = kick.read();
        }
        self.with_queue(token as usize, |serve, queue, memory, interrupt| {
            serve.kicked(queue, memory, interrupt)
        });
    }
}

/// The device.
pub(crate) struct Plain<S> {
    pub(crate) core: Arc<Mutex<Core<S>>>,
    pub(crate) poller: Arc<Poller>,
    pub(crate) sizes: &'static [u16],
    watched: Vec<i32>,
}

impl<S: Serve> Plain<S> {
    pub(crate) fn new(
        core: Arc<Mutex<Core<S>>>,
        poller: Arc<Poller>,
        sizes: &'static [u16],
    ) -> Plain<S> {
        Plain {
            core,
            poller,
            sizes,
            watched: Vec::new(),
        }
    }
}

impl<S> Plain<S> {
    /// The queues, which nobody watches any more.
    fn let_go(&mut self) -> Option<Activation> {
        for fd in self.watched.drain(..) {
            self.poller.forget(fd);
        }
        let mut core = lock(&self.core);
        core.kicks.clear();
        core.live.take()
    }
}

impl<S: Serve> VirtioDevice for Plain<S> {
    fn device_type(&self) -> u16 {
        4
    }

    fn queue_sizes(&self) -> &[u16] {
        self.sizes
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        for (token, queue) in (0..).zip(&activation.queues) {
            if let Some(queue) = queue {
                let fd = queue.kick.as_raw_fd();
                let watched = self
                    .poller
                    .watch(fd, Interest::READ, token, self.core.clone());
                watched.expect("a kick can be watched");
                self.watched.push(fd);
            }
        }
        let kick = |queue: &Option<ActiveQueue>| Some(queue.as_ref()?.kick.clone());
        let mut core = lock(&self.core);
        core.kicks = activation.queues.iter().map(kick).collect();
        core.live = Some(activation);
        Ok(())
    }

    fn suspend(&mut self, _idle: &Arc<EventFd>) -> Result<Positions, Busy> {
        if lock(&self.core).serve.is_busy() {
            return Err(Busy);
        }
        let queues = self.let_go().map(|live| live.queues).unwrap_or_default();
        let queues = queues.iter().flatten();
        Ok(queues
            .map(|queue| (queue.index, queue.position()))
            .collect())
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        drop(self.let_go());
        lock(&self.core).serve.reset();
        Ok(())
    }
}
