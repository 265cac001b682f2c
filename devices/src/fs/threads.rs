//! The threads of one share: each waits for the guest's kick, takes one request, serves it and comes back.
//!
//! All of them wait on the same eventfds, each with an epoll of its own that takes edges and wakes one
//! waiter (`EPOLLEXCLUSIVE`): an idle thread per kick, and no read of the eventfd. Who takes a request from
//! a queue that has more wakes the next thread, so a burst is served by all of them and a single request by
//! one, without a hand-over. Kicks are on whenever a queue was seen empty; a thread that comes back looks
//! into the queues before it sleeps.
//!
//! A request can block as long as the host's file system lets it (a slow disk, a network share that is
//! gone). It keeps its thread and nobody else's: no lock is held across it.

use super::guest_io::Buffers;
use super::server::Server;
use super::session::Scratch;
use crate::GuestMemory;
use crate::virtio::chain;
use crate::virtio::device::{Activation, Busy, Interrupt};
use crate::virtio::queue::{ActiveQueue, BrokenQueue, Positions};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Everything that belongs to one activation.
struct Rings {
    memory: GuestMemory,
    queues: Vec<LiveQueue>,
    interrupt: Arc<dyn Interrupt>,
    /// They are not ours any more, also for a request that is still under way.
    gone: AtomicBool,
}

/// An activation that the threads serve until they are called away from it.
struct Live {
    rings: Arc<Rings>,
    /// Readable from the moment the threads must leave, for good.
    stop: EventFd,
    stopping: AtomicBool,
}

struct LiveQueue {
    index: u16,
    kick: Arc<EventFd>,
    queue: Mutex<ActiveQueue>,
}

#[derive(Default)]
struct State {
    /// The activation to serve, and its number.
    live: Option<Arc<Live>>,
    generation: u64,
    /// One that the threads were called away from, and some may be at their last request of.
    called_away: Option<Arc<Live>>,
    /// Told when no thread is inside an activation any more.
    idle: Option<Arc<EventFd>>,
    /// Threads inside an activation.
    serving: usize,
    /// Threads that did not end yet.
    alive: usize,
    exit: bool,
}

/// What the device and its threads share.
pub(crate) struct Pool {
    server: Server,
    state: Mutex<State>,
    changed: Condvar,
}

impl Pool {
    pub(crate) fn new(server: Server) -> Pool {
        Pool {
            server,
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
        }
    }

    pub(crate) fn server(&self) -> &Server {
        &self.server
    }

    /// Hands live queues to the threads.
    pub(crate) fn start(&self, activation: Activation) -> std::io::Result<()> {
        let queues = activation.queues.into_iter().flatten();
        let live = Live::new(Arc::new(Rings {
            memory: activation.memory,
            queues: queues
                .map(|queue| LiveQueue {
                    index: queue.index,
                    kick: queue.kick.clone(),
                    queue: Mutex::new(queue),
                })
                .collect(),
            interrupt: activation.interrupt,
            gone: AtomicBool::new(false),
        }))?;
        self.offer(&mut self.state(), live);
        Ok(())
    }

    fn offer(&self, state: &mut State, live: Live) {
        state.live = Some(Arc::new(live));
        state.generation += 1;
        self.changed.notify_all();
    }

    /// Calls the threads away from the queues; where they stood, when each request that was taken off has been answered.
    ///
    /// # Errors
    /// The host's file system holds one up. `idle` is signalled when no thread is inside one any more.
    pub(crate) fn suspend(&self, idle: &Arc<EventFd>) -> Result<Positions, Busy> {
        let mut state = self.state();
        if let Some(live) = state.live.take() {
            live.call_away();
            state.called_away = Some(live);
        }
        // Also a request from before a reset that did not wait for it may still write the guest's memory.
        if state.serving > 0 {
            state.idle = Some(idle.clone());
            return Err(Busy);
        }
        let positions = state.called_away.take().map(|live| live.rings.positions());
        Ok(positions.unwrap_or_default())
    }

    /// Lets the threads serve on after a suspension that did not come to its end.
    pub(crate) fn keep_on(&self) {
        let mut state = self.state();
        state.idle = None;
        let Some(live) = state.called_away.take() else {
            return;
        };
        match Live::new(live.rings.clone()) {
            Ok(again) if !live.rings.gone.load(Ordering::SeqCst) => self.offer(&mut state, again),
            Ok(_) => {}
            // The host has no eventfd for it, and the driver has to reset the device.
            Err(_) => live.rings.interrupt.needs_reset(),
        }
    }

    /// Takes the queues away again, and waits until no thread is inside a request.
    ///
    /// # Errors
    /// TimedOut: a request is still blocked in the host's file system.
    pub(crate) fn stop(&self, patience: Duration) -> std::io::Result<()> {
        let mut state = self.state();
        for live in [state.live.take(), state.called_away.take()] {
            live.inspect(|live| live.leave());
        }
        let (state, timeout) = self
            .changed
            .wait_timeout_while(state, patience, |state| state.serving > 0)
            .unwrap_or_else(PoisonError::into_inner);
        drop(state);
        if timeout.timed_out() {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        self.server.end_session();
        Ok(())
    }

    /// Waits until no thread is inside a request of an activation that was taken away.
    #[cfg(test)]
    pub(crate) fn wait_until_idle(&self, patience: Duration) -> bool {
        let (state, timeout) = self
            .changed
            .wait_timeout_while(self.state(), patience, |state| state.serving > 0)
            .unwrap_or_else(PoisonError::into_inner);
        drop(state);
        !timeout.timed_out()
    }

    /// Lets the threads end, also from within an activation.
    pub(crate) fn exit(&self) {
        let mut state = self.state();
        state.exit = true;
        if let Some(live) = state.live.take() {
            live.leave();
        }
        self.changed.notify_all();
    }

    /// Counts the calling thread as alive while the guard lives.
    pub(crate) fn alive(&self) -> Alive<'_> {
        self.state().alive += 1;
        Alive(self)
    }

    /// Waits until no thread is alive; false if it takes longer than `patience`.
    pub(crate) fn wait_for_exit(&self, patience: Duration) -> bool {
        let (state, timeout) = self
            .changed
            .wait_timeout_while(self.state(), patience, |state| state.alive > 0)
            .unwrap_or_else(PoisonError::into_inner);
        drop(state);
        !timeout.timed_out()
    }

    /// The life of one thread, which was confined before.
    pub(crate) fn run(&self) {
        let mut scratch = Scratch::new();
        let mut seen = 0;
        while let Some(live) = self.next(&mut seen) {
            if let Err(_broken) = live.serve(&self.server, &mut scratch) {
                // The driver broke a ring, or this host cannot even wait for it: the others leave too, and
                // the driver is told to reset the device.
                live.leave();
                live.rings.interrupt.needs_reset();
            }
            drop(live);
            self.left();
        }
    }

    /// A thread has left an activation.
    fn left(&self) {
        let mut state = self.state();
        state.serving -= 1;
        if state.serving == 0 {
            if let Some(idle) = state.idle.take() {
                // A full counter is as readable.
                let _full = idle.write(1);
            }
        }
        self.changed.notify_all();
    }

    /// Waits for an activation that this thread has not served yet.
    fn next(&self, seen: &mut u64) -> Option<Arc<Live>> {
        let mut state = self
            .changed
            .wait_while(self.state(), |state| {
                !state.exit && (state.live.is_none() || state.generation == *seen)
            })
            .unwrap_or_else(PoisonError::into_inner);
        if state.exit {
            return None;
        }
        *seen = state.generation;
        let live = state.live.clone()?;
        state.serving += 1;
        Some(live)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See [`Pool::alive`].
pub(crate) struct Alive<'p>(&'p Pool);

impl Drop for Alive<'_> {
    fn drop(&mut self) {
        self.0.state().alive -= 1;
        self.0.changed.notify_all();
    }
}

/// Why a thread cannot go on with an activation.
#[derive(Debug)]
enum Stuck {
    Queue,
    Wait,
}

impl From<BrokenQueue> for Stuck {
    fn from(_: BrokenQueue) -> Stuck {
        Stuck::Queue
    }
}

impl From<chain::BadChain> for Stuck {
    fn from(_: chain::BadChain) -> Stuck {
        Stuck::Queue
    }
}

impl From<std::io::Error> for Stuck {
    fn from(_: std::io::Error) -> Stuck {
        Stuck::Wait
    }
}

impl Live {
    fn new(rings: Arc<Rings>) -> std::io::Result<Live> {
        Ok(Live {
            rings,
            stop: EventFd::new(EFD_NONBLOCK)?,
            stopping: AtomicBool::new(false),
        })
    }

    /// Makes every thread leave when it has answered the request that it is at.
    fn call_away(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        // It can fail only because the counter is full: then it is readable, which is what it is for.
        let _full = self.stop.write(1);
    }

    /// Makes every thread leave this activation as soon as it can, without an answer.
    fn leave(&self) {
        self.rings.gone.store(true, Ordering::SeqCst);
        self.call_away();
    }

    fn serve(&self, server: &Server, scratch: &mut Scratch) -> Result<(), Stuck> {
        let waiter = Epoll::new()?;
        let watch = |fd: &EventFd, events| {
            let fd = fd.as_raw_fd();
            waiter.ctl(ControlOperation::Add, fd, EpollEvent::new(events, 0))
        };
        watch(&self.stop, EventSet::IN)?;
        for queue in &self.rings.queues {
            let one_thread = EventSet::IN | EventSet::EDGE_TRIGGERED | EventSet::EXCLUSIVE;
            watch(&queue.kick, one_thread)?;
        }
        let mut events = vec![EpollEvent::default(); 1 + self.rings.queues.len()];
        while !self.stopping.load(Ordering::SeqCst) {
            let mut found = false;
            for queue in &self.rings.queues {
                if let Some(chain) = self.rings.take(queue)? {
                    self.rings.serve_one(queue, chain, server, scratch)?;
                    found = true;
                    break;
                }
            }
            if !found {
                match waiter.wait(-1, &mut events) {
                    Ok(_) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }
}

impl Rings {
    /// Where the threads stand; nowhere in rings that are not ours any more.
    fn positions(&self) -> Positions {
        let ours = !self.gone.load(Ordering::SeqCst);
        let queues = self.queues.iter().filter(|_| ours);
        queues
            .map(|live| (live.index, lock(&live.queue).position()))
            .collect()
    }

    /// The next request of a queue. Whoever leaves some behind wakes another thread.
    fn take(&self, live: &LiveQueue) -> Result<Option<chain::Buffers<'_>>, Stuck> {
        let mut queue = lock(&live.queue);
        // More turns than the queue has entries would mean that the driver keeps refilling it between the
        // two looks; the kick that goes with that wakes us.
        for _ in 0..=queue.size() {
            let chain = queue.pop(&self.memory)?;
            let more = queue.enable_kicks(&self.memory)?;
            if let Some(chain) = chain {
                if more {
                    // A full counter is as readable.
                    let _full = live.kick.write(1);
                }
                return Ok(Some(queue.open(&self.memory, &chain)?));
            }
            if !more {
                break;
            }
        }
        Ok(None)
    }

    fn serve_one(
        &self,
        live: &LiveQueue,
        chain: chain::Buffers<'_>,
        server: &Server,
        scratch: &mut Scratch,
    ) -> Result<(), Stuck> {
        let head = chain.head;
        let written = server.serve(&Buffers::new(chain), scratch);
        let mut queue = lock(&live.queue);
        // After a reset that did not wait for this request any longer, the rings are not ours.
        if self.gone.load(Ordering::SeqCst) {
            return Ok(());
        }
        queue.push_used(&self.memory, head, written)?;
        let notify = queue.needs_notification(&self.memory)?;
        drop(queue);
        if notify {
            self.interrupt.used(live.index);
        }
        Ok(())
    }
}

fn lock(queue: &Mutex<ActiveQueue>) -> MutexGuard<'_, ActiveQueue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}
