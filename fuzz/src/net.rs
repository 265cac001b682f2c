//! A card of a hostile driver, between whose tap devices and the host are sockets.

use crate::allocations::Bounds;
use crate::guest::{ACTS_MAX, Guest};
use crate::program::{Act, Reader};
use capsid_devices::event::Poller;
use capsid_devices::net::{Net, NetSetup};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::os::fd::OwnedFd;
use std::sync::Arc;

pub(crate) const BOUNDS: Bounds = Bounds {
    growth: 2 << 20,
    // A packet of 64 KiB is read into host memory where the driver lends too little; guest memory is copied to be looked at.
    largest: 256 << 10,
};
const PAIRS_MAX: usize = 2;
const MTU: u16 = 1500;
/// The header of virtio, that of Ethernet with a tag, and what an IP packet can be.
const PACKET_MAX_BYTES: usize = 12 + 18 + 65_535;
/// The headers of virtio and Ethernet.
const PACKET_MIN_BYTES: usize = 12 + 14;

/// The target's own steps, by their kinds. The first byte says which tap.
mod own {
    /// The host sends a packet: the rest of the bytes, the length two more that say how long it is in all.
    pub(super) const SEND: u8 = 0;
    /// The host takes all that was sent.
    pub(super) const TAKE: u8 = 1;
    /// The cable is plugged or pulled.
    pub(super) const CABLE: u8 = 2;
    /// The tap device is gone.
    pub(super) const GONE: u8 = 3;
    pub(super) const KINDS: u8 = GONE + 1;
}

/// A tap: the host's end, and the card's once more.
struct Tap {
    host: OwnedFd,
    card: OwnedFd,
}

impl Tap {
    fn new() -> (Tap, OwnedFd) {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (host, card) =
            socketpair(AddressFamily::UNIX, SocketType::DGRAM, flags, None).expect("sockets");
        let again = card.try_clone().expect("a descriptor");
        (Tap { host, card: again }, card)
    }

    fn send(&self, packet: &[u8]) {
        // One that is full loses it, as a tap device does; so does one that is gone.
        let _ = rustix::io::write(&self.host, packet);
    }

    fn take(&self) {
        let mut packet = vec![0; PACKET_MAX_BYTES + 1];
        loop {
            match rustix::io::read(&self.host, &mut packet) {
                Ok(0) | Err(_) => return,
                Ok(bytes) => assert!((PACKET_MIN_BYTES..=PACKET_MAX_BYTES).contains(&bytes)),
            }
        }
    }

    fn go(&self) {
        let gone = rustix::net::shutdown(&self.card, rustix::net::Shutdown::Both);
        assert!(matches!(gone, Ok(()) | Err(Errno::NOTCONN)));
    }
}

pub(crate) fn run(input: &[u8]) {
    let mut reader = Reader::new(input);
    let Some(form) = reader.u8() else {
        return;
    };
    let poller = Arc::new(Poller::new().expect("a loop"));
    let pairs = 1 + usize::from(form) % PAIRS_MAX;
    let (taps, ends) = (0..pairs)
        .map(|_| Tap::new())
        .unzip::<_, _, Vec<_>, Vec<_>>();
    let setup = NetSetup {
        taps: ends,
        mac: [2, 0, 0, 0, 0, 7],
        mtu: MTU,
    };
    let card = Net::on_sockets(setup, poller.clone()).expect("a card");
    let link = card.link();
    let mut guest = Guest::new(Box::new(card), poller);
    for _ in 0..ACTS_MAX {
        let Some(act) = Act::read(&mut reader) else {
            break;
        };
        let Act::Own { kind, bytes } = &act else {
            guest.play(&act);
            continue;
        };
        let mut bytes = Reader::new(bytes);
        let which = usize::from(bytes.u8().unwrap_or_default());
        let Some(tap) = taps.get(which % pairs) else {
            break;
        };
        guest.offer();
        match kind % own::KINDS {
            own::SEND => {
                let length = usize::from(bytes.u16().unwrap_or_default());
                let mut packet = bytes.rest().to_vec();
                packet.resize(length.max(1), 0xa5);
                tap.send(&packet);
            }
            own::TAKE => tap.take(),
            own::CABLE => link.set(which & 2 != 0),
            _ => tap.go(),
        }
        guest.look();
    }
    guest.leave();
    taps.iter().for_each(Tap::take);
}
