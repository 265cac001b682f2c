//! One connection as the protocol sees it (virtio 1.2 sections 5.10.6.3 to 5.10.6.5): a state machine
//! without sockets, queues or clocks. The device tells it what came from the guest and what the host's
//! socket did, and asks it what to send.
//!
//! Trusts nothing of what the guest sends: an operation out of order, a payload beyond the credit or after
//! "I will send no more" ends the connection with RST. It keeps no list of anything, so no guest makes it grow.
//!
//! A close in good order, as net/vmw_vsock/virtio_transport_common.c does it: the side that is done sends
//! SHUTDOWN with both flags, the other answers RST. Whoever waits for that RST gives up after a while and sends
//! its own; the waiting is the device's part (see [`Connection::phase`]).

use super::credit::Credit;
use super::packet::{Op, PAYLOAD_MAX_BYTES, Packet, Ports, Shutdown, Window};

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The host wants it, the guest has not answered. Must not last: the device sets a deadline.
    Requesting,
    /// Data flows where no side has shut down.
    Open,
    /// The host is done and said so in both directions; the guest's RST is awaited. Must not last either.
    Leaving,
}

/// What a packet of the guest means to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing beyond what the connection now wants to send.
    Carry,
    /// The guest granted the connection: the host's data may flow.
    Opened,
    /// The payload is the host's. Its credit is counted; the device calls [`Connection::forwarded`] when
    /// the socket took it.
    Deliver,
    /// The guest shut down a direction; see [`Connection::guest_shutdown`].
    GuestShutdown,
    /// The guest's side is over and the connection has no name any more. What was accepted before still
    /// goes to the host.
    Over {
        /// The guest is to be told by RST.
        reset: bool,
    },
    /// The guest had forgotten this connection and asks for a new one of the same name: this one is over,
    /// the request is to be served as any other.
    Superseded,
}

/// The state of one connection.
#[derive(Clone, Debug)]
pub struct Connection {
    ports: Ports,
    phase: Phase,
    credit: Credit,
    /// What the guest has shut down.
    guest: Shutdown,
    /// What the host has shut down.
    host: Shutdown,
    /// What the guest was told of `host`.
    told: Shutdown,
    /// A REQUEST or RESPONSE is to be sent before all else.
    owes_handshake: bool,
    /// The guest asked for our window.
    owes_window: bool,
    /// The guest is to be asked for its window.
    owes_question: bool,
    /// It was asked since it last gave room.
    asked: bool,
}

impl Connection {
    /// A connection that the guest asked for and the host grants: RESPONSE is due. `buf_alloc` is the size
    /// of the buffer that the device keeps for it, in bytes.
    pub fn granted(ports: Ports, guest: Window, buf_alloc: u32) -> Connection {
        Connection::new(ports, Phase::Open, Credit::new(buf_alloc, guest))
    }

    /// A connection that the host asks for: REQUEST is due.
    pub fn requested(ports: Ports, buf_alloc: u32) -> Connection {
        let credit = Credit::new(buf_alloc, Window::default());
        Connection::new(ports, Phase::Requesting, credit)
    }

    fn new(ports: Ports, phase: Phase, credit: Credit) -> Connection {
        Connection {
            ports,
            phase,
            credit,
            guest: Shutdown::default(),
            host: Shutdown::default(),
            told: Shutdown::default(),
            owes_handshake: true,
            owes_window: false,
            owes_question: false,
            asked: false,
        }
    }

    /// Its name.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// How far it has come. [`Phase::Requesting`] and [`Phase::Leaving`] are to end by a deadline.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Which directions the guest has shut down.
    pub fn guest_shutdown(&self) -> Shutdown {
        self.guest
    }

    /// Takes a packet of the guest.
    pub fn receive(&mut self, op: Op, guest: Window) -> Verdict {
        self.credit.update(guest);
        if self.credit.room() > 0 {
            self.asked = false;
            self.owes_question = false;
        }
        match (self.phase, op) {
            (_, Op::Reset) => Verdict::Over { reset: false },
            (Phase::Requesting, Op::Response) if !self.owes_handshake => {
                self.phase = Phase::Open;
                self.settle_phase();
                Verdict::Opened
            }
            (Phase::Leaving, Op::Request) => Verdict::Superseded,
            (Phase::Requesting, _) | (_, Op::Request | Op::Response) => {
                Verdict::Over { reset: true }
            }
            (_, Op::Data(bytes)) => self.receive_data(bytes),
            (_, Op::Shutdown(closed)) => {
                self.guest = self.guest.union(closed);
                if self.guest == Shutdown::BOTH {
                    Verdict::Over { reset: true }
                } else {
                    Verdict::GuestShutdown
                }
            }
            (_, Op::CreditUpdate) => Verdict::Carry,
            (_, Op::CreditRequest) => {
                self.owes_window = true;
                Verdict::Carry
            }
        }
    }

    fn receive_data(&mut self, bytes: u32) -> Verdict {
        if self.guest.send || self.credit.receive(bytes).is_err() {
            return Verdict::Over { reset: true };
        }
        if self.host.receive {
            // Was under way when the host closed; the guest will read of it in our SHUTDOWN.
            self.credit.forward(bytes);
            return Verdict::Carry;
        }
        Verdict::Deliver
    }

    /// The host's socket took `bytes` of what [`Verdict::Deliver`] handed over.
    pub fn forwarded(&mut self, bytes: u32) {
        self.credit.forward(bytes);
    }

    /// The host will send no more, and all it sent is with the guest.
    pub fn host_sends_no_more(&mut self) {
        self.host.send = true;
        self.settle_phase();
    }

    /// The host will take no more; what it has not taken is lost.
    pub fn host_receives_no_more(&mut self) {
        self.host.receive = true;
        self.credit.forward(self.credit.held());
        self.settle_phase();
    }

    /// A request that the guest has not answered stays one, whatever the host does meanwhile.
    fn settle_phase(&mut self) {
        if self.phase == Phase::Open && self.host == Shutdown::BOTH {
            self.phase = Phase::Leaving;
        }
    }

    /// Whether data of the host may ever flow again, so that the host's socket is worth watching.
    pub fn takes_host_data(&self) -> bool {
        self.phase == Phase::Open && !self.host.send && !self.guest.receive
    }

    /// Bytes of the host's data that may be sent to the guest in one packet now.
    pub fn room(&self) -> u32 {
        if self.takes_host_data() && !self.owes_handshake {
            self.credit.room().min(PAYLOAD_MAX_BYTES)
        } else {
            0
        }
    }

    /// The host has data and the guest gives no room: asks the guest once for its window.
    pub fn starved(&mut self) {
        if self.takes_host_data() && self.credit.room() == 0 && !self.asked {
            self.asked = true;
            self.owes_question = true;
        }
    }

    /// Whether [`Connection::take_control`] has something.
    pub fn wants_control(&self) -> bool {
        let may_speak = self.phase != Phase::Requesting;
        self.owes_handshake
            || (may_speak
                && (self.host != self.told
                    || self.owes_window
                    || self.owes_question
                    || self.owes_update()))
    }

    /// The next packet without payload. It counts as sent.
    pub fn take_control(&mut self) -> Option<Packet> {
        let op = if self.owes_handshake {
            self.owes_handshake = false;
            match self.phase {
                Phase::Requesting => Op::Request,
                Phase::Open | Phase::Leaving => Op::Response,
            }
        } else if self.phase == Phase::Requesting {
            return None;
        } else if self.host != self.told {
            self.told = self.host;
            Op::Shutdown(self.host)
        } else if self.owes_question {
            self.owes_question = false;
            Op::CreditRequest
        } else if self.owes_window || self.owes_update() {
            Op::CreditUpdate
        } else {
            return None;
        };
        Some(self.packet(op))
    }

    /// The packet that carries `bytes` of the host's data, at most [`Connection::room`]. It counts as sent.
    pub fn take_data(&mut self, bytes: u32) -> Packet {
        self.credit.send(bytes);
        self.packet(Op::Data(bytes))
    }

    fn owes_update(&self) -> bool {
        !self.guest.send && self.credit.owes_update()
    }

    fn packet(&mut self, op: Op) -> Packet {
        // Every packet tells our window.
        self.owes_window = false;
        Packet {
            ports: self.ports,
            op,
            window: self.credit.tell(),
        }
    }
}

#[cfg(test)]
mod tests;
