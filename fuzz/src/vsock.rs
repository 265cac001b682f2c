//! Vsock of a hostile driver, with a host that connects, sends, takes and goes.

use crate::allocations::Bounds;
use crate::guest::{ACTS_MAX, Guest};
use crate::program::{Act, Reader, shape};
use capsid_devices::event::Poller;
use capsid_devices::vsock::{HostSide, MAX_CONNECTIONS, VsockDevice, VsockHandle};
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

pub(crate) const BOUNDS: Bounds = Bounds {
    // What the device promises at most, and its connections.
    growth: 40 << 20,
    // The buffer of one connection, as its queue grows.
    largest: 512 << 10,
};
/// The most that all connections may hold together, by `vsock/table.rs`.
const HELD_MAX_BYTES: u64 = 32 << 20;
const GUEST_CID: u64 = 3;
/// A port of the host where nobody listens.
const REFUSED_PORT: u32 = 7;
/// Most connections that the host's side keeps; it lets the others go at once.
const KEPT_MAX: usize = 64;
/// Most bytes that the host sends or takes in one step.
const MOVED_MAX_BYTES: usize = 64 << 10;

/// Chains of a flood between two looks of the device's.
const FLOOD_CHAINS: u32 = 16;

/// The target's own steps, by their kinds. The first byte says which connection, or how many.
mod own {
    /// The host connects to a port of the guest.
    pub(super) const CONNECT: u8 = 0;
    /// The host sends on a connection.
    pub(super) const SEND: u8 = 1;
    /// The host takes what was sent.
    pub(super) const TAKE: u8 = 2;
    /// The host ends its stream.
    pub(super) const END: u8 = 3;
    /// The host closes a connection.
    pub(super) const CLOSE: u8 = 4;
    /// The guest asks for many connections at once: from ports that count up.
    pub(super) const FLOOD: u8 = 5;
    pub(super) const KINDS: u8 = FLOOD + 1;
}

/// The host's ends of the connections.
#[derive(Clone, Default)]
struct Host(Arc<Mutex<Vec<UnixStream>>>);

impl Host {
    fn keep(&self, stream: UnixStream) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT_MAX {
            kept.push(stream);
        }
    }

    fn with(&self, which: u8, work: impl FnOnce(&mut Vec<UnixStream>, usize)) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !kept.is_empty() {
            let which = usize::from(which) % kept.len();
            work(&mut kept, which);
        }
    }
}

impl HostSide for Host {
    fn dial(&mut self, port: u32) -> Option<OwnedFd> {
        if port == REFUSED_PORT {
            return None;
        }
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        self.keep(ours);
        Some(theirs.into())
    }
}

pub(crate) fn run(input: &[u8]) {
    let poller = Arc::new(Poller::new().expect("a loop"));
    let host = Host::default();
    let device = VsockDevice::new(GUEST_CID, poller.clone(), Box::new(host.clone()));
    let device = device.expect("a device");
    let handle = device.handle();
    let mut guest = Guest::new(Box::new(device), poller);
    let mut reader = Reader::new(input);
    for _ in 0..ACTS_MAX {
        let Some(act) = Act::read(&mut reader) else {
            break;
        };
        match &act {
            Act::Own { kind, bytes } => {
                guest.offer();
                own_step(&mut guest, &handle, &host, kind % own::KINDS, bytes);
                guest.look();
            }
            _ => guest.play(&act),
        }
        check(&handle);
    }
    guest.leave();
    assert_eq!(handle.connections(), 0, "a reset ends all connections");
}

fn check(handle: &VsockHandle) {
    assert!(handle.connections() <= MAX_CONNECTIONS);
    let (held, promised) = handle.held_bytes();
    assert!(
        held <= promised && promised <= HELD_MAX_BYTES,
        "{held} bytes are held of {promised} promised"
    );
}

fn own_step(guest: &mut Guest, handle: &VsockHandle, host: &Host, kind: u8, bytes: &[u8]) {
    let mut reader = Reader::new(bytes);
    let which = reader.u8().unwrap_or_default();
    match kind {
        own::CONNECT => {
            let (ours, theirs) = UnixStream::pair().expect("sockets");
            if handle.connect(which.into(), theirs.into()).is_ok() {
                host.keep(ours);
            }
        }
        own::SEND => host.with(which, |kept, which| {
            let length = usize::from(reader.u16().unwrap_or_default());
            // A socket that is full, or whose other end is closed, takes none of it.
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            let _ = send(&kept[which], &vec![0xa5; length.max(1)], flags);
        }),
        own::TAKE => host.with(which, |kept, which| {
            let mut taken = vec![0; MOVED_MAX_BYTES];
            // There may be none.
            let _ = recv(&kept[which], &mut taken[..], RecvFlags::DONTWAIT);
        }),
        own::END => host.with(which, |kept, which| {
            // The other end may be closed.
            let _ = shutdown(&kept[which], Shutdown::Write);
        }),
        own::CLOSE => host.with(which, |kept, which| drop(kept.swap_remove(which))),
        _ => flood(guest, which, reader.u16().unwrap_or_default()),
    }
}

/// Asks for `count` connections, from guest ports that count up from `first`.
fn flood(guest: &mut Guest, count: u8, first: u16) {
    for number in 0..u32::from(count) {
        guest.play(&Act::Chain {
            queue: 1,
            shape: shape::KICK,
            readable: packet(1, 1024, u32::from(first) + number, 0, &[]),
            writable: Vec::new(),
        });
        if number % FLOOD_CHAINS == FLOOD_CHAINS - 1 {
            guest.settle();
        }
    }
}

/// A packet of the guest's (virtio 1.2 section 5.10.6): operation, ports of host and guest, flags, payload.
pub(crate) fn packet(op: u16, host: u32, guest: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.extend(GUEST_CID.to_le_bytes());
    packet.extend(2u64.to_le_bytes());
    packet.extend(guest.to_le_bytes());
    packet.extend(host.to_le_bytes());
    packet.extend((payload.len() as u32).to_le_bytes());
    packet.extend(1u16.to_le_bytes());
    packet.extend(op.to_le_bytes());
    packet.extend(flags.to_le_bytes());
    packet.extend((1u32 << 30).to_le_bytes());
    packet.extend(0u32.to_le_bytes());
    packet.extend(payload);
    packet
}
