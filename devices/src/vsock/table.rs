//! All connections of a device: by name for the guest's packets, by number for the loop's events; whose turn
//! it is, and which ends by force when.
//!
//! Bounded: [`MAX_CONNECTIONS`] connections, and the guest bytes they may hold together.

use super::MAX_CONNECTIONS;
use super::connection::{Connection, Phase};
use super::packet::Ports;
use super::peer::Peer;
use super::stream::HostSocket;
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::time::{Duration, Instant};

/// The buffer promised to the guest for each connection in bytes, as Linux has it
/// (`VSOCK_DEFAULT_BUFFER_SIZE`, net/vmw_vsock/af_vsock.c).
const BUFFER_BYTES: u32 = 256 * 1024;
/// The same once [`BUFFERS_FULL_BYTES`] are promised, in bytes.
const BUFFER_SMALL_BYTES: u32 = 16 * 1024;
/// How much may be promised in full-size buffers, in bytes. With all connections in use the guest can make
/// the device hold this and 16 KiB for each: 32 MiB.
const BUFFERS_FULL_BYTES: u64 = 16 * 1024 * 1024;
/// Ports of the host's side of host-made connections, so that they look like nobody's well-known port.
pub(super) const FIRST_HOST_PORT: u32 = 1 << 30;
const LAST_HOST_PORT: u32 = (1 << 31) - 1;

/// How long a connection may be half open.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timeouts {
    /// From the host's wish to the guest's answer.
    pub(super) connect: Duration,
    /// From the host's SHUTDOWN to the guest's RST.
    pub(super) close: Duration,
}

/// Names a connection for as long as the device lives; never used again, so that an event that comes late
/// finds nobody.
pub(super) type PeerId = u64;

pub(super) struct Table {
    peers: HashMap<PeerId, Peer>,
    names: HashMap<Ports, PeerId>,
    turns: VecDeque<PeerId>,
    deadlines: BTreeSet<(Instant, PeerId)>,
    promised_bytes: u64,
    timeouts: Timeouts,
    last_id: PeerId,
    next_host_port: u32,
}

impl Table {
    /// An empty table that numbers its connections above `first_id`.
    pub(super) fn new(first_id: PeerId, timeouts: Timeouts) -> Table {
        Table {
            peers: HashMap::new(),
            names: HashMap::new(),
            turns: VecDeque::new(),
            deadlines: BTreeSet::new(),
            promised_bytes: 0,
            timeouts,
            last_id: first_id,
            next_host_port: FIRST_HOST_PORT,
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.peers.len() >= MAX_CONNECTIONS
    }

    pub(super) fn len(&self) -> usize {
        self.peers.len()
    }

    /// Bytes that wait for the host's sockets, and those that were promised.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn held_bytes(&self) -> (u64, u64) {
        let held = self.peers.values().map(Peer::held_bytes).sum();
        (held, self.promised_bytes)
    }

    /// The host port that the next connection made by the host gets, if it is free.
    pub(super) fn next_host_port(&self) -> u32 {
        self.next_host_port
    }

    /// Goes on to number host ports from `port`.
    pub(super) fn go_on_at(&mut self, port: u32) {
        self.next_host_port = port.clamp(FIRST_HOST_PORT, LAST_HOST_PORT);
    }

    /// All connections.
    pub(super) fn peers(&mut self) -> impl Iterator<Item = (PeerId, &mut Peer)> {
        self.peers.iter_mut().map(|(id, peer)| (*id, peer))
    }

    /// Names for a connection that the host makes to `guest`: no other has them.
    pub(super) fn free_ports(&mut self, guest: u32) -> Ports {
        loop {
            let host = self.next_host_port;
            self.next_host_port = if host == LAST_HOST_PORT {
                FIRST_HOST_PORT
            } else {
                host + 1
            };
            let ports = Ports { host, guest };
            // Ends: there are fewer connections than ports.
            if !self.names.contains_key(&ports) {
                return ports;
            }
        }
    }

    /// The buffer that the next connection gets, in bytes.
    pub(super) fn next_buffer_bytes(&self) -> u32 {
        if self.promised_bytes + u64::from(BUFFER_BYTES) <= BUFFERS_FULL_BYTES {
            BUFFER_BYTES
        } else {
            BUFFER_SMALL_BYTES
        }
    }

    /// Takes a connection in. Its name is free.
    pub(super) fn insert(
        &mut self,
        connection: Connection,
        socket: HostSocket,
        buffer_bytes: u32,
    ) -> PeerId {
        self.last_id += 1;
        self.promised_bytes += u64::from(buffer_bytes);
        self.names.insert(connection.ports(), self.last_id);
        self.peers
            .insert(self.last_id, Peer::new(connection, socket, buffer_bytes));
        self.last_id
    }

    pub(super) fn find(&self, ports: Ports) -> Option<PeerId> {
        self.names.get(&ports).copied()
    }

    pub(super) fn get(&mut self, id: PeerId) -> Option<&mut Peer> {
        self.peers.get_mut(&id)
    }

    /// The guest's side of a connection is over: its name is free again. Returns the name it had.
    pub(super) fn unname(&mut self, id: PeerId) -> Option<Ports> {
        let peer = self.peers.get_mut(&id)?;
        let ports = peer.connection()?.ports();
        self.names.remove(&ports);
        peer.guest_is_gone();
        Some(ports)
    }

    /// Takes a connection out.
    pub(super) fn remove(&mut self, id: PeerId) -> Option<Peer> {
        self.unname(id);
        let peer = self.peers.remove(&id)?;
        self.promised_bytes -= u64::from(peer.promised_bytes);
        if let Some((_, deadline)) = peer.deadline {
            self.deadlines.remove(&(deadline, id));
        }
        Some(peer)
    }

    /// Takes all connections out.
    pub(super) fn drain(&mut self) -> Vec<Peer> {
        self.names.clear();
        self.turns.clear();
        self.deadlines.clear();
        self.promised_bytes = 0;
        self.peers.drain().map(|(_, peer)| peer).collect()
    }

    /// Gives a connection its turn behind all others, if it wants one and waits for none yet.
    pub(super) fn queue_turn(&mut self, id: PeerId) {
        if let Some(peer) = self.peers.get_mut(&id) {
            if peer.wants_turn() && !peer.in_turns {
                peer.in_turns = true;
                self.turns.push_back(id);
            }
        }
    }

    /// Whose turn it is.
    pub(super) fn take_turn(&mut self) -> Option<PeerId> {
        while let Some(id) = self.turns.pop_front() {
            if let Some(peer) = self.peers.get_mut(&id) {
                peer.in_turns = false;
                return Some(id);
            }
        }
        None
    }

    /// Gives back a turn that could not be used.
    pub(super) fn untake_turn(&mut self, id: PeerId) {
        if let Some(peer) = self.peers.get_mut(&id) {
            if !peer.in_turns {
                peer.in_turns = true;
                self.turns.push_front(id);
            }
        }
    }

    /// How many wait for their turn.
    pub(super) fn turns(&self) -> usize {
        self.turns.len()
    }

    /// Sets or lifts the deadline of the phase that a connection is in.
    pub(super) fn settle_deadline(&mut self, id: PeerId) {
        let Some(peer) = self.peers.get_mut(&id) else {
            return;
        };
        let half_open = match peer.phase() {
            Some(Phase::Requesting) => Some((Phase::Requesting, self.timeouts.connect)),
            Some(Phase::Leaving) => Some((Phase::Leaving, self.timeouts.close)),
            Some(Phase::Open) | None => None,
        };
        if peer.deadline.map(|(phase, _)| phase) == half_open.map(|(phase, _)| phase) {
            return;
        }
        if let Some((_, deadline)) = peer.deadline.take() {
            self.deadlines.remove(&(deadline, id));
        }
        if let Some((phase, timeout)) = half_open {
            let deadline = Instant::now() + timeout;
            peer.deadline = Some((phase, deadline));
            self.deadlines.insert((deadline, id));
        }
    }

    /// Puts all deadlines off.
    pub(super) fn delay(&mut self, by: Duration) {
        self.deadlines.clear();
        for (id, peer) in &mut self.peers {
            if let Some((_, deadline)) = &mut peer.deadline {
                *deadline += by;
                self.deadlines.insert((*deadline, *id));
            }
        }
    }

    /// The earliest deadline.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }

    /// A connection whose deadline is over.
    pub(super) fn expired(&self, now: Instant) -> Option<PeerId> {
        let (deadline, id) = self.deadlines.first()?;
        (*deadline <= now).then_some(*id)
    }
}
