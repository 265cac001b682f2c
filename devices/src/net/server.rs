//! A card between activation and reset, on the event loop: which queue is served when.
//!
//! The loop is level-triggered, so a tap is watched for packets only while the driver has lent buffers, and for room only while
//! a packet waits for it.

use super::control::{Ack, parse};
use super::receive::{self, Receive};
use super::tap::Tap;
use super::transmit::{self, Transmit};
use crate::GuestMemory;
use crate::counters::counters;
use crate::event::{EventLoop, Interest, Readiness, Subscriber};
use crate::virtio::device::Interrupt;
use crate::virtio::queue::{ActiveQueue, Broken, Positions};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

counters! {
    /// Packets, as the guest sees them: `rx` are those that it gets.
    NetCounters {
        /// Handed to the driver.
        rx_packets,
        /// Their bytes, with the header of virtio.
        rx_bytes,
        /// Lost: larger than what the driver lends, or while the cable was pulled.
        rx_dropped,
        /// Handed to the tap device.
        tx_packets,
        /// Their bytes, with the header of virtio.
        tx_bytes,
        /// None that the host's kernel takes, or while the cable was pulled.
        tx_dropped,
    }
}

/// What a token is of. The number of a pair is in the higher bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    /// A kick of the queue with this number.
    Kick(usize),
    /// The tap of this pair.
    Tap(usize),
}

const TAP: u64 = 1 << 32;

impl Source {
    fn token(self) -> u64 {
        match self {
            Source::Kick(queue) => queue as u64,
            Source::Tap(pair) => TAP | pair as u64,
        }
    }

    fn of(token: u64) -> Source {
        match token & TAP {
            0 => Source::Kick(token as usize),
            _ => Source::Tap((token & !TAP) as usize),
        }
    }
}

/// A pair of queues with its tap.
struct Pair {
    tap: Arc<Tap>,
    /// `None` where the driver left the queue out or broke it.
    receive: Option<Receive>,
    transmit: Option<Transmit>,
    /// What the tap is watched for.
    interest: Interest,
}

/// The control queue.
struct Control {
    queue: ActiveQueue,
    index: usize,
}

/// A live card.
pub(super) struct Server {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    event_loop: Arc<dyn EventLoop>,
    pairs: Vec<Pair>,
    control: Option<Control>,
    /// By queue, to be watched.
    kicks: Vec<Option<Arc<EventFd>>>,
    /// Pairs that the driver may use.
    agreed: u16,
    /// Pairs that the driver uses: packets of the other taps go to these as well.
    used: usize,
    /// The cable is plugged.
    up: bool,
    counters: Arc<NetCounters>,
    stopped: bool,
}

/// Everything that a server is made of.
pub(super) struct Parts {
    pub(super) memory: GuestMemory,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) event_loop: Arc<dyn EventLoop>,
    pub(super) taps: Vec<Arc<Tap>>,
    pub(super) queues: Vec<Option<ActiveQueue>>,
    /// Pairs of queues that the driver may use; 1 without VIRTIO_NET_F_MQ.
    pub(super) agreed: u16,
    /// Pairs that it uses, at most as many.
    pub(super) used: u16,
    /// A packet may fill several buffers.
    pub(super) mergeable: bool,
    /// The largest packet that may come, with its header, in bytes.
    pub(super) largest: usize,
    pub(super) counters: Arc<NetCounters>,
}

impl Server {
    pub(super) fn new(parts: Parts) -> Server {
        let kick = |queue: &Option<ActiveQueue>| Some(queue.as_ref()?.kick.clone());
        let kicks = parts.queues.iter().map(kick).collect();
        let mut queues = parts.queues.into_iter();
        let mut pairs = Vec::with_capacity(parts.taps.len());
        for (number, tap) in parts.taps.into_iter().enumerate() {
            // Without VIRTIO_NET_F_MQ the taps behind the first have no queues of their own.
            let own = number < usize::from(parts.agreed);
            let mut next = || own.then(|| queues.next().flatten()).flatten();
            let (receive, transmit) = (next(), next());
            let memory = parts.memory.clone();
            let counters = &parts.counters;
            let receive = receive.map(|queue| {
                let counters = counters.clone();
                Receive::new(queue, memory, parts.mergeable, parts.largest, counters)
            });
            pairs.push(Pair {
                tap,
                receive,
                transmit: transmit.map(|queue| Transmit::new(queue, counters.clone())),
                interest: Interest::default(),
            });
        }
        let index = 2 * usize::from(parts.agreed);
        let control = queues.next().flatten();
        let control = control.map(|queue| Control { queue, index });
        Server {
            memory: parts.memory,
            interrupt: parts.interrupt,
            event_loop: parts.event_loop,
            pairs,
            control,
            kicks,
            agreed: parts.agreed,
            used: usize::from(parts.used.clamp(1, parts.agreed)),
            up: true,
            counters: parts.counters,
            stopped: false,
        }
    }

    /// What to watch, with tokens: kicks always, and taps for packets.
    pub(super) fn watched(&mut self) -> Vec<(RawFd, Interest, u64)> {
        let kicks = self.kicks.iter().enumerate();
        let mut watched: Vec<_> = kicks
            .filter_map(|(queue, kick)| {
                let fd = kick.as_ref()?.as_raw_fd();
                Some((fd, Interest::KICK, Source::Kick(queue).token()))
            })
            .collect();
        for (number, pair) in self.pairs.iter_mut().enumerate() {
            pair.interest = Interest::READ;
            watched.push((
                pair.tap.as_raw_fd(),
                Interest::READ,
                Source::Tap(number).token(),
            ));
        }
        watched
    }

    /// Serves no queue any more, and gives back what was lent. Nothing is watched any more; an event that is being delivered
    /// may be of the next activation.
    pub(super) fn stop(&mut self) {
        self.stopped = true;
        for pair in &mut self.pairs {
            pair.receive = None;
            pair.transmit = None;
        }
        self.control = None;
    }

    /// Where it stands in its queues. Buffers that were lent for packets to come are not taken yet.
    pub(super) fn positions(&self) -> Positions {
        let receive = self.pairs.iter().filter_map(|pair| pair.receive.as_ref());
        let transmit = self.pairs.iter().filter_map(|pair| pair.transmit.as_ref());
        let control = self.control.iter().map(|control| &control.queue);
        let control = control.map(|queue| (queue.index, queue.position()));
        receive
            .map(|queue| (queue.index(), queue.position()))
            .chain(transmit.map(|queue| (queue.index(), queue.position())))
            .chain(control)
            .collect()
    }

    /// Pairs that the driver uses.
    pub(super) fn used(&self) -> u16 {
        // No more than there are.
        self.used as u16
    }

    /// The cable is plugged or not as the card begins. Nothing is sent yet: a vCPU's thread, which begins it, may not.
    pub(super) fn begin(&mut self, up: bool) {
        self.up = up;
    }

    /// The cable was plugged or pulled.
    pub(super) fn set_link(&mut self, up: bool) {
        if up && !self.up {
            // What came while it was pulled and the driver had lent nothing.
            for pair in &self.pairs {
                self.counters.rx_dropped.add(pair.tap.discard());
            }
        }
        self.up = up;
        for number in 0..self.pairs.len() {
            // What waits for room in the tap is lost now, or goes.
            self.transmit(number);
        }
        for target in 0..self.used {
            // A kick that came while it was pulled was for buffers that are there now.
            self.feed(target);
        }
    }

    /// Packets of tap `number`, into the receive queue that is used for it.
    fn receive(&mut self, number: usize) {
        let target = number % self.used;
        let Some(tap) = self.pairs.get(number).map(|pair| pair.tap.clone()) else {
            return;
        };
        if !self.up {
            self.counters.rx_dropped.add(tap.discard());
            return;
        }
        let Some(Pair {
            receive: Some(queue),
            ..
        }) = self.pairs.get_mut(target)
        else {
            // Nobody takes its packets: it is left alone, and the host drops what it cannot keep.
            self.watch(number, |interest| interest.readable = false);
            return;
        };
        match queue.turn(&tap, &self.memory) {
            Ok((told, turn)) => {
                if told {
                    self.interrupt.used(queue.index());
                }
                match turn {
                    receive::Turn::Starved => {
                        self.watch(number, |interest| interest.readable = false);
                    }
                    // What this turn has borrowed may be what the taps that share the queue were waiting for, and then no kick
                    // comes for them.
                    receive::Turn::Over => self.feed(target),
                }
            }
            Err(Broken) => {
                self.broke(target, |pair| pair.receive = None);
                self.watch(number, |interest| interest.readable = false);
            }
        }
    }

    /// Watches all taps whose packets go to the receive queue of pair `target`. One for which there is no room after all turns
    /// itself off again.
    fn feed(&mut self, target: usize) {
        for number in (target..self.pairs.len()).step_by(self.used) {
            self.watch(number, |interest| interest.readable = true);
        }
    }

    fn transmit(&mut self, number: usize) {
        let Some(Pair {
            tap,
            transmit: Some(queue),
            ..
        }) = self.pairs.get_mut(number)
        else {
            self.watch(number, |interest| interest.writable = false);
            return;
        };
        match queue.turn(self.up.then_some(&**tap), &self.memory) {
            Ok((told, turn)) => {
                if told {
                    self.interrupt.used(queue.index());
                }
                let blocked = turn == transmit::Turn::Blocked;
                self.watch(number, |interest| interest.writable = blocked);
            }
            Err(Broken) => {
                self.broke(number, |pair| pair.transmit = None);
                self.watch(number, |interest| interest.writable = false);
            }
        }
    }

    fn broke(&mut self, number: usize, forget: impl FnOnce(&mut Pair)) {
        if let Some(pair) = self.pairs.get_mut(number) {
            forget(pair);
        }
        self.interrupt.needs_reset();
    }

    fn watch(&mut self, number: usize, change: impl FnOnce(&mut Interest)) {
        if let Some(pair) = self.pairs.get_mut(number) {
            let mut interest = pair.interest;
            change(&mut interest);
            // Fails only for an fd that is not watched, and then there is nothing to change.
            if interest != pair.interest
                && self
                    .event_loop
                    .change(pair.tap.as_raw_fd(), interest)
                    .is_ok()
            {
                pair.interest = interest;
            }
        }
    }

    /// A kick: of a receive queue the driver has lent more, of the control queue it wants something.
    fn kicked(&mut self, queue: usize) {
        if self
            .control
            .as_ref()
            .is_some_and(|control| control.index == queue)
        {
            self.command();
        } else if queue % 2 == 1 {
            self.transmit(queue / 2);
        } else {
            for number in (queue / 2..self.pairs.len()).step_by(self.used) {
                self.receive(number);
            }
        }
    }

    fn command(&mut self) {
        let Some(mut control) = self.control.take() else {
            return;
        };
        let (memory, interrupt) = (self.memory.clone(), self.interrupt.clone());
        let served = control.queue.serve(&memory, &*interrupt, |mut buffers| {
            let ack = match parse(&mut buffers.readable, self.agreed) {
                Some(pairs) => self.use_pairs(pairs),
                None => Ack::Error,
            };
            // Without room for it nobody is told.
            let _ = buffers.writable.write_struct(&(ack as u8));
            buffers.writable.written()
        });
        match served {
            Ok(()) => self.control = Some(control),
            Err(_) => self.interrupt.needs_reset(),
        }
    }

    fn use_pairs(&mut self, pairs: u16) -> Ack {
        self.used = usize::from(pairs);
        // The taps may feed other queues from now on, which may have room.
        for target in 0..self.used {
            self.feed(target);
        }
        Ack::Ok
    }
}

impl Subscriber for Server {
    fn ready(&mut self, token: u64, readiness: Readiness) {
        if self.stopped {
            return;
        }
        match Source::of(token) {
            Source::Kick(queue) => self.kicked(queue),
            Source::Tap(number) => {
                if readiness.writable {
                    self.transmit(number);
                }
                if readiness.hangup {
                    // The tap is gone, and says so for ever. What waits for room in it is lost.
                    self.transmit(number);
                    if let Some(pair) = self.pairs.get(number) {
                        self.event_loop.forget(pair.tap.as_raw_fd());
                    }
                } else if readiness.readable {
                    self.receive(number);
                }
            }
        }
    }
}
