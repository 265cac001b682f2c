//! The vsock device between the transport, the event loop and the host.
//!
//! Sockets are touched and packets are served on the loop's thread alone (and on that of
//! [`VsockHandle::connect`], which is the same one in the VMM). A vCPU's thread, which activates and resets the
//! device, only hands the queues over and takes them back: it needs no system call that a socket needs.

use super::connection::{Connection, Verdict};
use super::packet::{Op, Packet, Ports, ResetReply};
use super::queues::{Queues, VsockCounters};
use super::stream::{HostSocket, NotAStream};
use super::table::{PeerId, Table, Timeouts};
use super::{CLOSE_TIMEOUT_MS, CONNECT_TIMEOUT_MS};
use crate::counters::Counters;
use crate::event::{EventLoop, Interest, Readiness, Subscriber};
use crate::state::Foreign;
use crate::virtio::device::{
    Activation, Busy, DeviceData, DeviceError, RestoreError, VirtioDevice,
};
use crate::virtio::queue::{Positions, ServeError};
use std::collections::VecDeque;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use vm_memory::VolatileSlice;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

mod suspend;

use suspend::Suspended;
pub use suspend::VsockState;

/// Device type (virtio 1.2 section 5.10.1).
const DEVICE_TYPE: u16 = 19;
/// Sizes of the receive, transmit and event queue. Linux fills the receive queue with pages, so its size is
/// guest memory spent: 512 KiB; it is also what can be under way to the guest.
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];
/// Most answers that wait for a receive buffer before the device takes no more packets (section 5.10.6.1.2:
/// "so long as there are additional resources").
pub(super) const RESETS_MAX: usize = 256;

const TOKEN_RX: u64 = 0;
const TOKEN_TX: u64 = 1;
const TOKEN_EVENT: u64 = 2;
const TOKEN_TIMER: u64 = 3;
const TOKEN_RESUME: u64 = 4;
/// Connections are numbered above.
const LAST_TOKEN: u64 = 15;

/// Where a guest's connections to the host lead.
pub trait HostSide: Send {
    /// The guest connects to `port` of the host. Returns the device's end of a stream socket, or `None` to
    /// refuse. Called with the device locked: it must neither block nor call the device.
    fn dial(&mut self, port: u32) -> Option<OwnedFd>;
}

/// Why the host's connection was not made; its fd is closed.
#[derive(Debug, thiserror::Error)]
pub enum ConnectRefused {
    /// No driver uses the device (yet, or since its reset).
    #[error("the guest has no vsock driver running")]
    NotReady,
    /// All connections are in use.
    #[error("vsock has {max} connections already", max = super::MAX_CONNECTIONS)]
    Full,
    /// The fd is of no use.
    #[error(transparent)]
    Socket(#[from] NotAStream),
    /// The event loop cannot watch the fd.
    #[error("cannot watch the socket of a vsock connection")]
    Watch(#[source] std::io::Error),
}

/// The device, as the transport holds it.
pub struct VsockDevice {
    core: Arc<Mutex<Core>>,
    guest_cid: u64,
    counters: Arc<VsockCounters>,
}

/// The device, as the host's side holds it. Stays valid after the device is gone.
#[derive(Clone)]
pub struct VsockHandle(Weak<Mutex<Core>>);

impl VsockDevice {
    /// A device for the guest `guest_cid` that works on `event_loop`.
    ///
    /// # Errors
    /// No timer or eventfd could be had, or watched.
    pub fn new(
        guest_cid: u64,
        event_loop: Arc<dyn EventLoop>,
        host: Box<dyn HostSide>,
    ) -> Result<VsockDevice, DeviceError> {
        let timeouts = Timeouts {
            connect: Duration::from_millis(CONNECT_TIMEOUT_MS),
            close: Duration::from_millis(CLOSE_TIMEOUT_MS),
        };
        VsockDevice::with_timeouts(guest_cid, event_loop, host, timeouts)
    }

    pub(super) fn with_timeouts(
        guest_cid: u64,
        event_loop: Arc<dyn EventLoop>,
        host: Box<dyn HostSide>,
        timeouts: Timeouts,
    ) -> Result<VsockDevice, DeviceError> {
        let failed = |what| move |cause| DeviceError::Io { what, cause };
        let timer = TimerFd::new()
            .map_err(std::io::Error::from)
            .map_err(failed("make the timer of the vsock device"))?;
        let resume = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
            .map_err(failed("make the eventfd of the vsock device"))?;
        let (timer_fd, resume_fd) = (timer.as_raw_fd(), resume.as_raw_fd());
        let watcher = Arc::clone(&event_loop);
        let counters = Arc::<VsockCounters>::default();
        let core = Arc::new_cyclic(|me| {
            Mutex::new(Core {
                me: me.clone(),
                guest_cid,
                event_loop,
                host,
                table: Table::new(LAST_TOKEN, timeouts),
                resets: VecDeque::new(),
                queues: None,
                timer,
                armed: None,
                resume,
                tx_due: false,
                owes_reset_event: false,
                forgotten: false,
                suspended: None,
                counters: counters.clone(),
            })
        });
        // From here on its drop forgets what is watched.
        let device = VsockDevice {
            core,
            guest_cid,
            counters,
        };
        for (fd, token) in [(timer_fd, TOKEN_TIMER), (resume_fd, TOKEN_RESUME)] {
            watcher
                .watch(fd, Interest::READ, token, device.core.clone())
                .map_err(failed("watch the timer of the vsock device"))?;
        }
        Ok(device)
    }

    /// The way for the host to connect to the guest.
    pub fn handle(&self) -> VsockHandle {
        VsockHandle(Arc::downgrade(&self.core))
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        lock(&self.core)
    }
}

impl Drop for VsockDevice {
    fn drop(&mut self) {
        let mut core = self.core();
        core.stop();
        core.event_loop.forget(core.timer.as_raw_fd());
        core.event_loop.forget(core.resume.as_raw_fd());
    }
}

impl VirtioDevice for VsockDevice {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        // No feature bit means stream sockets only (section 5.10.3).
        0
    }

    fn config(&self) -> Vec<u8> {
        self.guest_cid.to_le_bytes().to_vec()
    }

    fn counters(&self) -> Arc<dyn Counters> {
        self.counters.clone()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let queues = Queues::new(activation, self.counters.clone())?;
        let mut core = self.core();
        for (token, fd) in queues.kicks() {
            let watched = core
                .event_loop
                .watch(fd, Interest::KICK, token, self.core.clone())
                .map_err(|cause| DeviceError::Io {
                    what: "watch the kicks of the vsock device",
                    cause,
                });
            if watched.is_err() {
                for (_, fd) in queues.kicks() {
                    core.event_loop.forget(fd);
                }
                return watched;
            }
        }
        core.queues = Some(queues);
        // The resumption looks at the transmit queue.
        core.resume_later();
        Ok(())
    }

    fn suspend(&mut self, _: &Arc<EventFd>) -> Result<Positions, Busy> {
        Ok(self.core().suspend())
    }

    /// The connections go on, too.
    fn resume(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.activate(activation)?;
        self.core().watch_again();
        Ok(())
    }

    fn data(&self) -> DeviceData {
        DeviceData::Vsock(self.core().state())
    }

    fn restore(&mut self, data: &DeviceData) -> Result<(), RestoreError> {
        match data {
            DeviceData::Vsock(state) => Ok(self.core().take_over(state)?),
            _ => Err(Foreign("kind").into()),
        }
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        let mut core = self.core();
        core.release_queues();
        core.forgotten = true;
        core.resume_later();
        Ok(())
    }
}

impl VsockHandle {
    /// Connects `host` to `port` of the guest. If the guest refuses or does not answer within
    /// [`CONNECT_TIMEOUT_MS`], the fd is closed before any byte came through it.
    ///
    /// # Errors
    /// The connection was not even asked for; the fd is closed.
    pub fn connect(&self, port: u32, host: OwnedFd) -> Result<(), ConnectRefused> {
        let core = self.0.upgrade().ok_or(ConnectRefused::NotReady)?;
        let mut core = lock(&core);
        core.connect(port, host)
    }

    /// Tells the driver that all its connections are gone (section 5.10.6.7), and drops them, as a device does that was
    /// restored. Told as soon as a driver runs that has a buffer for it.
    #[cfg(test)]
    pub(super) fn reset_transport(&self) {
        if let Some(core) = self.0.upgrade() {
            let mut core = lock(&core);
            core.forgotten = true;
            core.owes_reset_event = true;
            core.work();
        }
    }

    /// Bytes of the guest that wait for the host's sockets, and for how many there is room in the buffers that the guest was
    /// promised.
    #[cfg(any(test, feature = "testing"))]
    pub fn held_bytes(&self) -> (u64, u64) {
        let core = self.0.upgrade();
        core.map_or((0, 0), |core| lock(&core).table.held_bytes())
    }

    /// How many connections there are, those included whose last bytes wait for the host.
    pub fn connections(&self) -> usize {
        self.0.upgrade().map_or(0, |core| lock(&core).table.len())
    }
}

fn lock(core: &Mutex<Core>) -> MutexGuard<'_, Core> {
    // No panic leaves the core half changed: it ends the VMM.
    core.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Everything behind the one lock of the device.
pub(super) struct Core {
    me: Weak<Mutex<Core>>,
    pub(super) guest_cid: u64,
    event_loop: Arc<dyn EventLoop>,
    host: Box<dyn HostSide>,
    pub(super) table: Table,
    /// Answers to packets of no connection, at most [`RESETS_MAX`] and one for each connection.
    pub(super) resets: VecDeque<ResetReply>,
    queues: Option<Queues>,
    timer: TimerFd,
    /// What the timer is set to.
    armed: Option<Instant>,
    /// Wakes the loop for the rest of work that was cut short to let others have their turn.
    resume: EventFd,
    /// The transmit queue is to be looked at.
    pub(super) tx_due: bool,
    /// The driver is to be told of a transport reset.
    pub(super) owes_reset_event: bool,
    /// The driver reset the device: the connections are to be dropped before anything else is done.
    forgotten: bool,
    suspended: Option<Suspended>,
    pub(super) counters: Arc<VsockCounters>,
}

impl Subscriber for Core {
    fn ready(&mut self, token: u64, readiness: Readiness) {
        self.drop_forgotten();
        match token {
            TOKEN_TIMER => self.expire(),
            TOKEN_RESUME => {
                // An empty counter means that the event is gone already.
                let _ = self.resume.read();
                self.tx_due = true;
                self.work();
            }
            TOKEN_RX | TOKEN_TX | TOKEN_EVENT => {
                self.tx_due |= token == TOKEN_TX;
                self.work();
            }
            id => self.socket_ready(id, readiness),
        }
    }
}

impl Core {
    fn socket_ready(&mut self, id: PeerId, readiness: Readiness) {
        let Some(peer) = self.table.get(id) else {
            return;
        };
        if readiness.writable {
            peer.writable();
        }
        if readiness.hangup {
            peer.hung_up();
        } else if readiness.readable {
            peer.readable();
        }
        self.table.queue_turn(id);
        self.work();
        // Only now: mostly the work took away the reason, and the watch stays as it is.
        self.settle(id);
    }

    /// Does what can be done now. Bounded by the queues' sizes; the rest is done on a later turn of the loop.
    fn work(&mut self) {
        self.drop_forgotten();
        if let Some(mut queues) = self.queues.take() {
            let done = self.serve(&mut queues);
            self.queues = Some(queues);
            if done.is_err() {
                // The driver broke a ring. It reads of it in the status and resets the device.
                self.broken();
            }
        }
        self.arm_timer();
    }

    fn serve(&mut self, queues: &mut Queues) -> Result<(), ServeError> {
        if self.tx_due {
            queues.transmit(self)?;
        }
        queues.receive(self)?;
        queues.event(self)?;
        queues.interrupt()
    }

    fn broken(&mut self) {
        if let Some(queues) = &self.queues {
            queues.needs_reset();
        }
        self.stop();
    }

    /// Lets go of the queues and of all connections.
    fn stop(&mut self) {
        self.release_queues();
        self.drop_connections();
        self.arm_timer();
    }

    /// After it nothing touches the guest's memory.
    fn release_queues(&mut self) {
        if let Some(queues) = self.queues.take() {
            for (_, fd) in queues.kicks() {
                self.event_loop.forget(fd);
            }
        }
    }

    /// Drops the connections of a driver that has reset the device.
    fn drop_forgotten(&mut self) {
        if std::mem::take(&mut self.forgotten) {
            self.drop_connections();
        }
    }

    fn drop_connections(&mut self) {
        self.suspended = None;
        self.resets.clear();
        for peer in self.table.drain() {
            if peer.watched.is_some() {
                self.event_loop.forget(peer.fd());
            }
        }
    }

    /// The loop comes back to this device after the others.
    pub(super) fn resume_later(&self) {
        // Fails only when the counter is full, and then the fd is readable anyway.
        let _ = self.resume.write(1);
    }

    fn connect(&mut self, port: u32, host: OwnedFd) -> Result<(), ConnectRefused> {
        self.drop_forgotten();
        if self.queues.is_none() && self.suspended.is_none() {
            return Err(ConnectRefused::NotReady);
        }
        if self.table.is_full() {
            return Err(ConnectRefused::Full);
        }
        let ports = self.table.free_ports(port);
        let buffer_bytes = self.table.next_buffer_bytes();
        self.insert(
            Connection::requested(ports, buffer_bytes),
            host,
            buffer_bytes,
        )?;
        self.counters.host_connects.add(1);
        self.work();
        Ok(())
    }

    fn insert(
        &mut self,
        connection: Connection,
        host: OwnedFd,
        buffer_bytes: u32,
    ) -> Result<(), ConnectRefused> {
        let socket = HostSocket::new(host)?;
        let id = self.table.insert(connection, socket, buffer_bytes);
        if let Some(suspended) = &mut self.suspended {
            suspended.peers.push(id);
        } else if let Err(cause) = self.watch(id) {
            self.table.remove(id);
            return Err(ConnectRefused::Watch(cause));
        }
        self.settle(id);
        Ok(())
    }

    /// Takes a packet of the guest and its payload.
    pub(super) fn route(&mut self, packet: &Packet, payload: &mut [VolatileSlice<'_>]) {
        let found = self.table.find(packet.ports);
        let Some((id, peer)) = found.and_then(|id| Some((id, self.table.get(id)?))) else {
            match packet.op {
                Op::Request => self.admit(packet),
                Op::Reset => {}
                _ => self.reset_unknown(packet.ports),
            }
            return;
        };
        match peer.receive(packet.op, packet.window, payload) {
            Verdict::Over { reset } => self.end(id, reset),
            Verdict::Superseded => {
                self.end(id, false);
                self.admit(packet);
            }
            Verdict::Carry | Verdict::Opened | Verdict::Deliver | Verdict::GuestShutdown => {
                self.settle(id);
            }
        }
    }

    /// The guest asks for a connection of a name that is free.
    fn admit(&mut self, packet: &Packet) {
        let granted = !self.table.is_full()
            && self.host.dial(packet.ports.host).is_some_and(|host| {
                let buffer_bytes = self.table.next_buffer_bytes();
                let connection = Connection::granted(packet.ports, packet.window, buffer_bytes);
                // Refused by the kernel: the guest is refused too, which is all it can be told.
                self.insert(connection, host, buffer_bytes).is_ok()
            });
        match granted {
            true => self.counters.guest_connects.add(1),
            false => {
                self.counters.guest_refused.add(1);
                self.reset_unknown(packet.ports);
            }
        }
    }

    fn reset_unknown(&mut self, ports: Ports) {
        self.resets
            .push_back(ResetReply::of_connection(ports, self.guest_cid));
    }

    /// The guest's side of a connection is over, with RST if the guest is still to be told.
    pub(super) fn end(&mut self, id: PeerId, reset: bool) {
        if let Some(ports) = self.table.unname(id) {
            if reset {
                self.reset_unknown(ports);
            }
        }
        self.settle(id);
    }

    /// Brings all that depends on a connection's state up to date: its end, its turn, its deadline and what
    /// its fd is watched for.
    pub(super) fn settle(&mut self, id: PeerId) {
        let Some(peer) = self.table.get(id) else {
            return;
        };
        if peer.is_finished() {
            if let Some(peer) = self.table.remove(id) {
                self.forget(peer.watched, peer.fd());
            }
            return;
        }
        let (fd, watched, interest) = (peer.fd(), peer.watched, peer.interest());
        if watched != interest && watched.is_some() {
            peer.watched = interest;
            match interest {
                // Fails only for an fd that is not watched, which this one is.
                Some(interest) => drop(self.event_loop.change(fd, interest)),
                None => self.event_loop.forget(fd),
            }
        }
        self.table.queue_turn(id);
        self.table.settle_deadline(id);
    }

    fn watch(&mut self, id: PeerId) -> std::io::Result<()> {
        let (Some(me), Some(peer)) = (self.me.upgrade(), self.table.get(id)) else {
            return Err(std::io::ErrorKind::NotFound.into());
        };
        let interest = peer.interest().unwrap_or_default();
        peer.watched = Some(interest);
        self.event_loop.watch(peer.fd(), interest, id, me)
    }

    fn forget(&self, watched: Option<Interest>, fd: RawFd) {
        if watched.is_some() {
            self.event_loop.forget(fd);
        }
    }

    /// Ends what was half open for too long.
    fn expire(&mut self) {
        let now = Instant::now();
        while let Some(id) = self.table.expired(now) {
            // It may stay for its last bytes, but not with this deadline.
            self.end(id, true);
        }
        // Setting the timer anew takes the event away.
        self.armed = Some(now);
        self.work();
    }

    fn arm_timer(&mut self) {
        let next = self.table.next_deadline();
        if next == self.armed || self.suspended.is_some() {
            return;
        }
        self.armed = next;
        let set = match next {
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                // Zero would disarm it.
                self.timer.reset(left.max(Duration::from_millis(1)), None)
            }
            None => self.timer.clear(),
        };
        debug_assert!(set.is_ok(), "the kernel refused to set a timer");
    }
}
