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
//!
//! The threads have a descriptor table of their own ([`super::confine::own_descriptors`]), in which a number of the process's is
//! nothing or something else. So [`Pool`], which both sides hold, has no descriptor of either; it signals by [`Signal`]s, which both
//! tables have. An [`Activation`] is full of the process's: the threads look at it, and give it back to be dropped on the other side.
//! The [`Server`] is full of theirs: only they hold it, and a reset asks one of them to end the session.

use super::confine::Signal;
use super::guest_io::Buffers;
use super::server::{Facts, Server};
use super::session::Scratch;
use crate::GuestMemory;
use crate::virtio::chain;
use crate::virtio::device::{Activation, Busy, Interrupt};
use crate::virtio::queue::{ActiveQueue, BrokenQueue, Positions};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

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
    /// Signalled when the threads must leave, after `stopping` was set.
    wake: Signal,
    stopping: AtomicBool,
}

struct LiveQueue {
    index: u16,
    kick: Signal,
    queue: Mutex<ActiveQueue>,
}

/// What the threads and the process tell each other by.
#[derive(Clone, Copy)]
pub(crate) struct Signals {
    /// The driver's kicks, in the order of the queues.
    pub(crate) kicks: [Signal; 2],
    /// Threads have to leave an activation. Each watches its edges, so nobody ever takes it back.
    pub(crate) wake: Signal,
    /// All have left one, and somebody asked to be told.
    pub(crate) left: Signal,
}

#[derive(Default)]
struct State {
    /// The activation to serve, and its number.
    live: Option<Arc<Live>>,
    generation: u64,
    /// One that the threads were called away from, and some may be at their last request of.
    called_away: Option<Arc<Live>>,
    /// What threads came back from, at most once each since the last offer: the process's to drop.
    given_back: Vec<Arc<Live>>,
    /// Nobody is left on the process's side.
    abandoned: bool,
    /// `left` is to be signalled when no thread is inside an activation any more.
    tell: bool,
    /// A thread has to end the session.
    session_over: bool,
    /// Threads inside an activation, or at the end of a session.
    serving: usize,
    /// Threads that did not end yet.
    alive: usize,
    exit: bool,
}

/// What the device and its threads share.
pub(crate) struct Pool {
    signals: Signals,
    facts: Arc<Facts>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Pool {
    pub(crate) fn new(signals: Signals) -> Pool {
        Pool {
            signals,
            facts: Arc::default(),
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
        }
    }

    /// What anybody may know of the share.
    pub(crate) fn facts(&self) -> &Arc<Facts> {
        &self.facts
    }

    /// Hands live queues to the threads.
    pub(crate) fn start(&self, activation: Activation) {
        let queues = self.signals.kicks.into_iter().zip(activation.queues);
        let rings = Arc::new(Rings {
            memory: activation.memory,
            queues: queues
                .filter_map(|(kick, queue)| {
                    queue.map(|queue| LiveQueue {
                        index: queue.index,
                        kick,
                        queue: Mutex::new(queue),
                    })
                })
                .collect(),
            interrupt: activation.interrupt,
            gone: AtomicBool::new(false),
        });
        self.offer(&mut self.state(), rings);
    }

    fn offer(&self, state: &mut State, rings: Arc<Rings>) {
        state.given_back.clear();
        state.live = Some(Arc::new(Live {
            rings,
            wake: self.signals.wake,
            stopping: AtomicBool::new(false),
        }));
        state.generation += 1;
        self.changed.notify_all();
    }

    /// Calls the threads away from the queues; where they stood, when each request that was taken off has been answered.
    ///
    /// # Errors
    /// The host's file system holds one up. `left` is signalled when no thread is inside one any more.
    pub(crate) fn suspend(&self) -> Result<Positions, Busy> {
        let mut state = self.state();
        if let Some(live) = state.live.take() {
            live.call_away();
            state.called_away = Some(live);
        }
        // Also a request from before a reset that did not wait for it may still write the guest's memory.
        if state.serving > 0 {
            state.tell = true;
            return Err(Busy);
        }
        let positions = state.called_away.take().map(|live| live.rings.positions());
        Ok(positions.unwrap_or_default())
    }

    /// Lets the threads serve on after a suspension that did not come to its end.
    pub(crate) fn keep_on(&self) {
        let mut state = self.state();
        state.tell = false;
        if let Some(live) = state.called_away.take() {
            if !live.rings.gone.load(Ordering::SeqCst) {
                self.offer(&mut state, live.rings.clone());
            }
        }
    }

    /// Takes the queues away again, waits until no thread is inside a request, and has one end the session. Each of both has `patience`.
    ///
    /// # Errors
    /// TimedOut: a request is still blocked in the host's file system, or the end of the session is.
    pub(crate) fn stop(&self, patience: Duration) -> std::io::Result<()> {
        let deadline = Instant::now() + patience;
        let mut state = self.state();
        for live in [state.live.take(), state.called_away.take()] {
            live.inspect(|live| live.leave());
        }
        let mut state = self.wait_until(state, deadline, |state| state.serving == 0)?;
        state.given_back.clear();
        state.session_over = true;
        self.changed.notify_all();
        let ended = |state: &State| !state.session_over && state.serving == 0;
        // However late the last request ended, a thread has its time for this.
        self.wait_until(state, Instant::now() + patience, ended)
            .map(drop)
    }

    fn wait_until<'p>(
        &'p self,
        state: MutexGuard<'p, State>,
        deadline: Instant,
        there: impl Fn(&State) -> bool,
    ) -> std::io::Result<MutexGuard<'p, State>> {
        let patience = deadline.saturating_duration_since(Instant::now());
        let (state, _) = self
            .changed
            .wait_timeout_while(state, patience, |state| !there(state))
            .unwrap_or_else(PoisonError::into_inner);
        match there(&state) {
            true => Ok(state),
            false => Err(std::io::ErrorKind::TimedOut.into()),
        }
    }

    /// Waits until no thread is inside a request of an activation that was taken away.
    #[cfg(test)]
    pub(crate) fn wait_until_idle(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let idle = |state: &State| state.serving == 0;
        self.wait_until(self.state(), deadline, idle).is_ok()
    }

    /// Lets the threads end, also from within an activation.
    pub(crate) fn exit(&self) {
        let mut state = self.state();
        state.exit = true;
        if let Some(live) = state.live.take() {
            live.leave();
            // For `abandon` to drop.
            state.called_away = Some(live);
        }
        self.changed.notify_all();
    }

    /// Waits until no thread is alive; false if it takes longer than `patience`. Afterwards nothing of the process's is left in here,
    /// and what a thread has in hand then stays open as long as the process.
    pub(crate) fn abandon(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        let ended = self
            .wait_until(self.state(), deadline, |state| state.alive == 0)
            .is_ok();
        let mut state = self.state();
        state.abandoned = true;
        state.called_away = None;
        state.given_back.clear();
        ended
    }

    /// Counts the calling thread as alive while the guard lives.
    pub(crate) fn alive(&self) -> Alive<'_> {
        self.state().alive += 1;
        Alive(self)
    }

    /// The life of one thread, which was confined before.
    pub(crate) fn run(&self, server: &Server) {
        let mut scratch = Scratch::new();
        let mut seen = 0;
        while let Some(task) = self.next(&mut seen) {
            match task {
                Task::EndSession => {
                    server.end_session();
                    self.done(&mut self.state());
                }
                Task::Serve(live) => {
                    if let Err(_broken) = live.serve(server, &mut scratch) {
                        // The driver broke a ring, or this host cannot even wait for it: the others leave too,
                        // and the driver is told to reset the device.
                        live.leave();
                        live.rings.interrupt.needs_reset();
                    }
                    self.give_back(live);
                }
            }
        }
    }

    /// A thread has left an activation, and drops nothing of it: its descriptors are another table's.
    fn give_back(&self, live: Arc<Live>) {
        let mut state = self.state();
        match state.abandoned {
            true => std::mem::forget(live),
            false => state.given_back.push(live),
        }
        self.done(&mut state);
    }

    fn done(&self, state: &mut State) {
        state.serving -= 1;
        if state.serving == 0 && std::mem::take(&mut state.tell) {
            self.signals.left.send();
        }
        self.changed.notify_all();
    }

    /// Waits for the end of a session, or an activation that this thread has not served yet.
    fn next(&self, seen: &mut u64) -> Option<Task> {
        let mut state = self
            .changed
            .wait_while(self.state(), |state| {
                let serve = state.live.is_some() && state.generation != *seen;
                !(state.exit || state.session_over || serve)
            })
            .unwrap_or_else(PoisonError::into_inner);
        if state.exit {
            return None;
        }
        let task = match std::mem::take(&mut state.session_over) {
            true => Task::EndSession,
            false => {
                *seen = state.generation;
                Task::Serve(state.live.clone()?)
            }
        };
        state.serving += 1;
        Some(task)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a thread has to do next.
enum Task {
    Serve(Arc<Live>),
    EndSession,
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
    /// Makes every thread leave when it has answered the request that it is at.
    fn call_away(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.wake.send();
    }

    /// Makes every thread leave this activation as soon as it can, without an answer.
    fn leave(&self) {
        self.rings.gone.store(true, Ordering::SeqCst);
        self.call_away();
    }

    fn serve(&self, server: &Server, scratch: &mut Scratch) -> Result<(), Stuck> {
        let waiter = Epoll::new()?;
        let watch = |signal: Signal, events| {
            let event = EpollEvent::new(events | EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
            waiter.ctl(ControlOperation::Add, signal.number(), event)
        };
        // Whoever called away before this has set the flag that is looked at behind it.
        watch(self.wake, EventSet::empty())?;
        for queue in &self.rings.queues {
            watch(queue.kick, EventSet::EXCLUSIVE)?;
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
                    live.kick.send();
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
