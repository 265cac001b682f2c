//! One connection with its host socket: what the protocol says meets what the socket does.
//!
//! Its fd is watched only for what can make progress: for reading while the guest may be sent data and the
//! socket is not already known to have some, for writing while bytes wait for it. So a guest that gives
//! neither credit nor buffers costs one wake-up and not a spinning thread, and so does a host that does not
//! read (both happened: Firecracker dde124627, 65c2ec472).

use super::connection::{Connection, Phase, Verdict};
use super::packet::{Op, Shutdown, Window};
use super::stream::{Backlog, HostSocket};
use crate::event::Interest;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Instant;
use vm_memory::VolatileSlice;

/// What came of reading the host's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Filled {
    /// So many bytes lie in the slices.
    Bytes(usize),
    /// None: the stream ended or has nothing now.
    Nothing,
}

pub(super) struct Peer {
    /// `None` when the guest's side is over and only waiting bytes still go to the host.
    connection: Option<Connection>,
    socket: HostSocket,
    backlog: Backlog,
    /// Size of the buffer that the guest was promised.
    pub(super) promised_bytes: u32,
    /// The socket has data or the end of the stream, which was not read yet.
    readable: bool,
    /// The loop reported the host gone: the fd is not watched any more, reading it goes on to its end.
    hung_up: bool,
    /// The guest's stream was ended on the socket.
    guest_ended: bool,
    /// What the loop watches the fd for; `None` before the first and after the last time.
    pub(super) watched: Option<Interest>,
    /// Waits for its turn to send to the guest.
    pub(super) in_turns: bool,
    /// When the phase it is in ends by force.
    pub(super) deadline: Option<(Phase, Instant)>,
}

impl Peer {
    pub(super) fn new(connection: Connection, socket: HostSocket, promised_bytes: u32) -> Peer {
        Peer {
            connection: Some(connection),
            socket,
            backlog: Backlog::default(),
            promised_bytes,
            readable: false,
            hung_up: false,
            guest_ended: false,
            watched: None,
            in_turns: false,
            deadline: None,
        }
    }

    pub(super) fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    /// The protocol's part, as long as the guest knows of the connection.
    pub(super) fn connection(&mut self) -> Option<&mut Connection> {
        self.connection.as_mut()
    }

    /// The phase it is in, as long as the guest knows of the connection.
    pub(super) fn phase(&self) -> Option<Phase> {
        self.connection.as_ref().map(Connection::phase)
    }

    /// Whether nothing is left to do: the socket may be closed.
    pub(super) fn is_finished(&self) -> bool {
        self.connection.is_none() && self.backlog.is_empty()
    }

    /// Bytes that wait for the socket.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn held_bytes(&self) -> u64 {
        self.backlog.len() as u64
    }

    /// Whether the loop reported the host gone; what it sent before may still have to be read.
    pub(super) fn is_hung_up(&self) -> bool {
        self.hung_up
    }

    /// What its fd is worth watching for; `None`: nothing, ever again.
    pub(super) fn interest(&self) -> Option<Interest> {
        let takes = self
            .connection
            .as_ref()
            .is_some_and(Connection::takes_host_data);
        (!self.hung_up).then_some(Interest {
            readable: takes && !self.readable,
            writable: !self.backlog.is_empty(),
            edge: false,
        })
    }

    /// Whether it wants a turn to send to the guest, which it could use given a receive buffer.
    pub(super) fn wants_turn(&self) -> bool {
        self.connection.as_ref().is_some_and(|connection| {
            connection.wants_control() || (self.readable && connection.room() > 0)
        })
    }

    /// Bytes of the host's that may and can be read for the guest now.
    pub(super) fn room(&self) -> u32 {
        match &self.connection {
            Some(connection) if self.readable => connection.room(),
            _ => 0,
        }
    }

    /// Takes a packet of the guest, whose payload is `payload`. The caller acts on [`Verdict::Over`] and
    /// [`Verdict::Superseded`].
    pub(super) fn receive(
        &mut self,
        op: Op,
        window: Window,
        payload: &mut [VolatileSlice<'_>],
    ) -> Verdict {
        let Some(connection) = &mut self.connection else {
            return Verdict::Carry;
        };
        let verdict = connection.receive(op, window);
        let guest = connection.guest_shutdown();
        match verdict {
            Verdict::Deliver => {
                let taken = self.backlog.deliver(&self.socket, payload);
                self.taken(taken);
            }
            Verdict::GuestShutdown => self.obey_shutdown(guest),
            Verdict::Over { .. } | Verdict::Superseded | Verdict::Carry | Verdict::Opened => {}
        }
        self.ask_for_room();
        verdict
    }

    /// The guest's side is over. What it sent before still goes to the host.
    pub(super) fn guest_is_gone(&mut self) {
        self.connection = None;
        self.obey_shutdown(Shutdown::BOTH);
    }

    fn obey_shutdown(&mut self, guest: Shutdown) {
        if guest.receive {
            self.readable = false;
            self.socket.refuse_host_stream();
            self.settle_end();
        }
        if guest.send && self.backlog.is_empty() && !self.guest_ended {
            self.guest_ended = true;
            self.socket.end_guest_stream();
        }
    }

    /// The socket took some of the guest's bytes, or never will.
    fn taken(&mut self, taken: io::Result<usize>) {
        match (taken, &mut self.connection) {
            // A connection never holds more than its 32-bit window.
            (Ok(count), Some(connection)) => connection.forwarded(count as u32),
            (Ok(_), None) => {}
            (Err(_), _) => self.host_receives_no_more(),
        }
    }

    /// The host takes nothing any more; what waits for it is lost, as it would be in any closed socket.
    fn host_receives_no_more(&mut self) {
        self.backlog.clear();
        if let Some(connection) = &mut self.connection {
            connection.host_receives_no_more();
        }
    }

    /// The loop says that the socket may be written.
    pub(super) fn writable(&mut self) {
        let taken = self.backlog.flush(&self.socket);
        self.taken(taken);
        let guest = match &self.connection {
            Some(connection) => connection.guest_shutdown(),
            None => Shutdown::BOTH,
        };
        if guest.send {
            self.obey_shutdown(Shutdown {
                receive: false,
                send: true,
            });
        }
    }

    /// The loop says that the socket may be read.
    pub(super) fn readable(&mut self) {
        self.readable = true;
        self.ask_for_room();
    }

    /// The loop says that the host is gone. The fd is not worth watching any more.
    pub(super) fn hung_up(&mut self) {
        self.hung_up = true;
        self.host_receives_no_more();
        self.readable();
        self.settle_end();
    }

    /// A host that is gone and whose last bytes the guest does not want has nothing more to send.
    fn settle_end(&mut self) {
        let unwanted = self
            .connection
            .as_ref()
            .is_some_and(|connection| connection.guest_shutdown().receive);
        if self.hung_up && unwanted {
            self.host_sends_no_more();
        }
    }

    /// If the host has data and the guest has no room, the guest is asked.
    pub(super) fn ask_for_room(&mut self) {
        if self.readable {
            if let Some(connection) = &mut self.connection {
                connection.starved();
            }
        }
    }

    /// Reads the host's data into `slices`, which hold no more than [`Peer::room`]. The caller reports the
    /// packets with [`Connection::take_data`].
    pub(super) fn fill(&mut self, slices: &[VolatileSlice<'_>]) -> Filled {
        // The second time only if the first reported that the host closed without reading all: an error
        // that hides the data behind it and comes once.
        for _ in 0..2 {
            match self.socket.receive(slices) {
                Ok(0) => {
                    self.host_sends_no_more();
                    return Filled::Nothing;
                }
                Ok(count) => {
                    let offered: usize = slices.iter().map(VolatileSlice::len).sum();
                    // A short read emptied the socket; the loop will tell of more. Nobody tells of the
                    // end of a host that hung up.
                    self.readable = count == offered || self.hung_up;
                    return Filled::Bytes(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Filled::Nothing;
                }
                Err(_) => self.host_receives_no_more(),
            }
        }
        self.host_sends_no_more();
        Filled::Nothing
    }

    fn host_sends_no_more(&mut self) {
        self.readable = false;
        if let Some(connection) = &mut self.connection {
            connection.host_sends_no_more();
        }
    }
}
