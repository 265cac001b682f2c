//! The other side of the device: a guest's driver, the host's programs and the loop.

use crate::event::Poller;
use crate::testing::{Buffer, Driver};
use crate::vsock::table::Timeouts;
use crate::vsock::{HostSide, VsockDevice, VsockHandle};
use std::collections::HashMap;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

pub(super) const RX: u16 = 0;
pub(super) const TX: u16 = 1;
pub(super) const EVENT: u16 = 2;
pub(super) const GUEST_CID: u64 = 3;
pub(super) const REQUEST: u16 = 1;
pub(super) const RESPONSE: u16 = 2;
pub(super) const RST: u16 = 3;
pub(super) const SHUTDOWN: u16 = 4;
pub(super) const RW: u16 = 5;
pub(super) const CREDIT_UPDATE: u16 = 6;
pub(super) const CREDIT_REQUEST: u16 = 7;
pub(super) const RECEIVE: u32 = 1;
pub(super) const SEND: u32 = 2;

/// Watched fds of an idle device: three kicks, timer, resume.
pub(super) const IDLE_WATCHES: usize = 5;
/// More calls of subscribers than this without the loop falling silent is a spin.
const SPIN_CALLS: usize = 20_000;

/// A packet as it lies on the wire, put together here without the code under test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wire {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
    pub(super) payload: Vec<u8>,
}

impl Wire {
    /// From the guest's `guest` port to the host's `host` port, with plenty of credit.
    pub(super) fn new(op: u16, host: u32, guest: u32) -> Wire {
        Wire {
            src_cid: GUEST_CID,
            dst_cid: 2,
            src_port: guest,
            dst_port: host,
            len: 0,
            kind: 1,
            op,
            flags: 0,
            buf_alloc: 1 << 30,
            fwd_cnt: 0,
            payload: Vec::new(),
        }
    }

    pub(super) fn data(host: u32, guest: u32, payload: &[u8]) -> Wire {
        Wire {
            len: payload.len() as u32,
            payload: payload.to_vec(),
            ..Wire::new(RW, host, guest)
        }
    }

    pub(super) fn shutdown(host: u32, guest: u32, flags: u32) -> Wire {
        Wire {
            flags,
            ..Wire::new(SHUTDOWN, host, guest)
        }
    }

    pub(super) fn header(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.src_cid.to_le_bytes());
        bytes.extend(self.dst_cid.to_le_bytes());
        bytes.extend(self.src_port.to_le_bytes());
        bytes.extend(self.dst_port.to_le_bytes());
        bytes.extend(self.len.to_le_bytes());
        bytes.extend(self.kind.to_le_bytes());
        bytes.extend(self.op.to_le_bytes());
        bytes.extend(self.flags.to_le_bytes());
        bytes.extend(self.buf_alloc.to_le_bytes());
        bytes.extend(self.fwd_cnt.to_le_bytes());
        bytes
    }

    fn read(bytes: &[u8]) -> Wire {
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let u16_at = |at: usize| u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap());
        Wire {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: u16_at(28),
            op: u16_at(30),
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
            payload: bytes[44..].to_vec(),
        }
    }
}

/// The host's programs: every port of `open` may be dialled so often.
#[derive(Clone, Default)]
pub(super) struct Host {
    pub(super) open: Arc<Mutex<HashMap<u32, u32>>>,
    pub(super) accepted: Arc<Mutex<Vec<(u32, UnixStream)>>>,
}

impl HostSide for Host {
    fn dial(&mut self, port: u32) -> Option<OwnedFd> {
        let mut open = self.open.lock().unwrap();
        let left = open.get_mut(&port).filter(|left| **left > 0)?;
        *left -= 1;
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        self.accepted.lock().unwrap().push((port, ours));
        Some(theirs.into())
    }
}

pub(super) struct Guest {
    pub(super) driver: Driver,
    pub(super) poller: Arc<Poller>,
    pub(super) handle: VsockHandle,
    pub(super) host: Host,
    rx_bytes: usize,
    /// Subscribers called so far.
    pub(super) calls: usize,
}

impl Guest {
    /// A running guest whose receive buffers are `rx_bytes` long and none of which is there yet. Port 1024
    /// may be dialled without end.
    pub(super) fn new(rx_bytes: usize) -> Guest {
        let long = Duration::from_secs(100);
        Guest::with_timeouts(rx_bytes, long, long)
    }

    pub(super) fn with_timeouts(rx_bytes: usize, connect: Duration, close: Duration) -> Guest {
        let poller = Arc::new(Poller::new().unwrap());
        let host = Host::default();
        host.open.lock().unwrap().insert(1024, u32::MAX);
        let device = VsockDevice::with_timeouts(
            GUEST_CID,
            poller.clone(),
            Box::new(host.clone()),
            Timeouts { connect, close },
        )
        .unwrap();
        let handle = device.handle();
        let driver = Driver::up(Box::new(device), 0);
        Guest {
            driver,
            poller,
            handle,
            host,
            rx_bytes,
            calls: 0,
        }
    }

    /// A device that no driver has seen.
    pub(super) fn fresh(poller: Arc<Poller>) -> VsockDevice {
        VsockDevice::new(GUEST_CID, poller, Box::new(Host::default())).unwrap()
    }

    /// Turns the loop until nobody is ready. Panics if that never comes.
    pub(super) fn settle(&mut self) {
        let start = self.calls;
        loop {
            let called = self.poller.turn(Some(Duration::ZERO)).unwrap();
            if called == 0 {
                return;
            }
            self.calls += called;
            assert!(self.calls - start < SPIN_CALLS, "the loop spins");
        }
    }

    /// Turns the loop until `done`, waiting for timers too.
    pub(super) fn wait(&mut self, mut done: impl FnMut(&mut Guest) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !done(self) {
            assert!(Instant::now() < deadline, "waited in vain");
            self.calls += self.poller.turn(Some(Duration::from_millis(10))).unwrap();
        }
    }

    /// Gives the device `count` receive buffers and a kick if it wants one.
    pub(super) fn refill(&mut self, count: usize) {
        let mut kick = false;
        for _ in 0..count {
            self.driver
                .add(RX, &[Buffer::Writable(self.rx_bytes as u32)]);
            kick |= self.driver.wants_kick(RX);
        }
        if kick {
            self.driver.kick(RX);
        }
    }

    /// Makes packets available and kicks once.
    pub(super) fn send_all(&mut self, packets: &[Wire]) {
        for packet in packets {
            let header = packet.header();
            if packet.payload.is_empty() {
                self.driver.add(TX, &[Buffer::Readable(&header)]);
            } else {
                let buffers = [Buffer::Readable(&header), Buffer::Readable(&packet.payload)];
                self.driver.add(TX, &buffers);
            }
        }
        self.driver.kick(TX);
        self.settle();
        while self.driver.used(TX).is_some() {}
    }

    pub(super) fn send(&mut self, packet: &Wire) {
        self.send_all(std::slice::from_ref(packet));
    }

    /// The next packet of the host; its buffer is given again.
    pub(super) fn receive(&mut self) -> Option<Wire> {
        let packet = self.take()?;
        self.refill(1);
        self.settle();
        Some(packet)
    }

    /// The next packet of the host; its buffer is gone.
    pub(super) fn take(&mut self) -> Option<Wire> {
        let used = self.driver.used(RX)?;
        assert_eq!(used.data.len(), used.len as usize);
        let packet = Wire::read(&used.data);
        assert_eq!(packet.payload.len(), packet.len as usize);
        Some(packet)
    }

    /// All packets there are.
    pub(super) fn receive_all(&mut self) -> Vec<Wire> {
        self.settle();
        std::iter::from_fn(|| self.receive()).collect()
    }

    /// The operations of all packets there are.
    pub(super) fn ops(&mut self) -> Vec<u16> {
        self.receive_all().iter().map(|packet| packet.op).collect()
    }

    /// Connects `guest` to `host` port; the host's end.
    pub(super) fn dial(&mut self, host: u32, guest: u32) -> UnixStream {
        self.dial_with(&Wire::new(REQUEST, host, guest))
    }

    pub(super) fn dial_with(&mut self, request: &Wire) -> UnixStream {
        self.send(request);
        let packets = self.receive_all();
        assert_eq!(packets.len(), 1);
        assert_eq!(packets[0].op, RESPONSE);
        assert_eq!(packets[0].src_port, request.dst_port);
        assert_eq!(packets[0].dst_port, request.src_port);
        let (port, stream) = self.host.accepted.lock().unwrap().pop().unwrap();
        assert_eq!(port, request.dst_port);
        stream
    }

    /// Asks for a connection of the host to the guest; the host's end and the REQUEST.
    pub(super) fn connect(&mut self, port: u32) -> (UnixStream, Wire) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        self.handle.connect(port, theirs.into()).unwrap();
        let packets = self.receive_all();
        assert_eq!(packets.len(), 1);
        assert_eq!((packets[0].op, packets[0].dst_port), (REQUEST, port));
        (ours, packets[0].clone())
    }

    /// The same, granted.
    pub(super) fn connected(&mut self, port: u32) -> (UnixStream, u32) {
        let (stream, request) = self.connect(port);
        self.send(&Wire::new(RESPONSE, request.src_port, port));
        (stream, request.src_port)
    }
}

/// What a host's program can read now, and whether the stream ended.
pub(super) fn read_now(stream: &mut UnixStream) -> (Vec<u8>, bool) {
    let mut bytes = Vec::new();
    let mut chunk = [0; 16 * 1024];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return (bytes, true),
            Ok(count) => bytes.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return (bytes, false),
            Err(error) => panic!("the host reads an error: {error}"),
        }
    }
}

/// Bytes that differ everywhere.
pub(super) fn pattern(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
        .collect()
}
