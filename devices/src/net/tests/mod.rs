//! A card, driven as a guest drives it, on a real tap device: packets of a UDP socket of the host come out of the receive queue,
//! and what the transmit queue sends arrives at the socket.
//!
//! Needs root and /dev/net/tun. Without them each test says so and is skipped.

mod host;

use super::*;
use crate::event::Poller;
use crate::testing::{Buffer, Driver, RawDescriptor, Used, WAIT_MS};
use host::{GUEST, HOST, mac, taps};
use std::net::UdpSocket;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const HEADER: usize = 12;
/// Ethernet, IPv4 and UDP in front of what a socket sends.
const HEADERS: usize = HEADER + 14 + 20 + 8;
const MTU: u16 = 1500;

/// Feature bits by their names in section 5.1.3.
const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const MRG_RXBUF: u64 = 1 << 15;
const CTRL_VQ: u64 = 1 << 17;
const MQ: u64 = 1 << 22;
const VERSION_1: u64 = 1 << 32;

/// A guest with one card, and the host's end of it.
struct Guest {
    driver: Driver,
    poller: Arc<Poller>,
    socket: UdpSocket,
}

impl Guest {
    /// `None`, loudly, where a test cannot make tap devices.
    fn new(queues: usize, mtu: u16, features: u64) -> Option<Guest> {
        let taps = taps_or_skip(queues, mtu)?;
        let poller = Arc::new(Poller::new().unwrap());
        let setup = NetSetup {
            taps,
            mac: MAC,
            mtu,
        };
        let card = Net::new(setup, poller.clone()).expect("a card");
        let mut driver = Driver::new(Box::new(card));
        match features & VERSION_1 {
            0 => driver.negotiate(features),
            // These and no more: without EVENT_IDX.
            _ => driver.negotiate_exactly(features),
        }
        let pairs = if features & MQ != 0 { queues as u16 } else { 1 };
        for queue in 0..2 * pairs {
            driver.setup_queue(queue, 64);
        }
        if features & CTRL_VQ != 0 {
            driver.setup_queue(2 * pairs, 8);
        }
        driver.start();
        assert_eq!(driver.status(), 0x0f);
        let socket = UdpSocket::bind((HOST, 0)).expect("a socket");
        socket
            .set_read_timeout(Some(Duration::from_millis(WAIT_MS)))
            .unwrap();
        Some(Guest {
            driver,
            poller,
            socket,
        })
    }

    fn lend(&mut self, queue: u16, count: usize, bytes: u32) {
        for _ in 0..count {
            self.driver.add(queue, &[Buffer::Writable(bytes)]);
        }
        self.driver.kick(queue);
    }

    /// The host sends `text` to a port of the guest.
    fn send(&self, text: &[u8]) {
        self.socket.send_to(text, (GUEST, 9)).expect("sent");
    }

    fn received(&mut self, queue: u16) -> Used {
        self.driver.wait_used(queue, Some(&self.poller))
    }

    fn turn(&self) -> usize {
        self.poller.turn(Some(Duration::ZERO)).unwrap()
    }

    /// Turns the loop until nothing is to be done, which has to be soon.
    fn settle(&self) {
        for _ in 0..100 {
            if self.turn() == 0 {
                return;
            }
        }
        panic!("the loop spins");
    }

    fn heard(&self) -> Vec<u8> {
        let mut text = [0; 65_536];
        let (bytes, from) = self.socket.recv_from(&mut text).expect("a packet");
        assert_eq!(from.ip(), GUEST);
        text[..bytes].to_vec()
    }

    /// A packet of the guest's to the host's socket, with the header of virtio.
    fn packet(&self, text: &[u8]) -> Vec<u8> {
        let port = self.socket.local_addr().unwrap().port();
        let length = (20 + 8 + text.len()) as u16;
        let mut ip = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
        ip[2..4].copy_from_slice(&length.to_be_bytes());
        ip.extend(GUEST.octets());
        ip.extend(HOST.octets());
        let words = ip
            .chunks(2)
            .map(|two| u32::from(two[0]) << 8 | u32::from(two[1]));
        let sum: u32 = words.sum();
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        let mut packet = vec![0; HEADER];
        packet.extend(mac().expect("the host's address"));
        packet.extend(MAC);
        packet.extend([8, 0]);
        packet.extend(ip);
        packet.extend(9u16.to_be_bytes());
        packet.extend(port.to_be_bytes());
        packet.extend((length - 20).to_be_bytes());
        packet.extend([0, 0]); // no checksum
        packet.extend(text);
        packet
    }

    /// What the control queue answers.
    fn command(&mut self, queue: u16, command: &[u8]) -> u8 {
        self.driver
            .add(queue, &[Buffer::Readable(command), Buffer::Writable(1)]);
        self.driver.kick(queue);
        let used = self.received(queue);
        assert_eq!(used.len, 1);
        used.data[0]
    }
}

fn taps_or_skip(queues: usize, mtu: u16) -> Option<Vec<OwnedFd>> {
    match taps(queues, i32::from(mtu)) {
        Ok(taps) => Some(taps),
        Err(error) => {
            eprintln!(
                "SKIPPED: {}: cannot make a tap device: {error}",
                module_path!()
            );
            None
        }
    }
}

/// What the host's socket had sent, out of a packet.
fn text(packet: &[u8]) -> &[u8] {
    assert_eq!(packet[HEADER + 12..HEADER + 14], [8, 0], "IPv4");
    &packet[HEADERS..]
}

fn buffers(packet: &[u8]) -> u16 {
    u16::from_le_bytes([packet[10], packet[11]])
}

#[test]
fn packets_pass_both_ways() {
    for features in [0, MRG_RXBUF, MRG_RXBUF | CSUM | GUEST_CSUM] {
        let Some(mut guest) = Guest::new(1, MTU, features) else {
            return;
        };
        guest.lend(RECEIVE, 4, 2048);
        guest.send(b"to the guest");
        let used = guest.received(RECEIVE);
        assert_eq!(used.len as usize, HEADERS + 12);
        assert_eq!(
            (text(&used.data), buffers(&used.data)),
            (&b"to the guest"[..], 1)
        );
        let packet = guest.packet(b"to the host");
        let (first, second) = packet.split_at(20);
        guest.driver.add(
            TRANSMIT,
            &[Buffer::Readable(first), Buffer::Readable(second)],
        );
        guest.driver.kick(TRANSMIT);
        assert_eq!(guest.received(TRANSMIT).len, 0);
        assert_eq!(guest.heard(), b"to the host");
        guest.settle();
    }
}

#[test]
fn a_large_packet_fills_several_buffers_at_once() {
    let Some(mut guest) = Guest::new(1, 9000, MRG_RXBUF) else {
        return;
    };
    let large: Vec<u8> = (0..8000).map(|at| (at / 31) as u8).collect();
    guest.lend(RECEIVE, 16, 1500);
    guest.send(&large);
    guest.send(b"next");
    let first = guest.received(RECEIVE);
    assert_eq!(
        usize::from(buffers(&first.data)),
        (HEADERS + 8000usize).div_ceil(1500)
    );
    let mut whole = first.data.clone();
    for _ in 1..buffers(&first.data) {
        // All of them are there as soon as the first is.
        whole.extend(guest.driver.used(RECEIVE).expect("the next buffer").data);
    }
    assert_eq!(text(&whole), large);
    let next = guest.received(RECEIVE);
    assert_eq!((text(&next.data), buffers(&next.data)), (&b"next"[..], 1));
}

#[test]
fn a_packet_that_no_buffer_holds_is_dropped_and_the_next_is_not() {
    let Some(mut guest) = Guest::new(1, MTU, 0) else {
        return;
    };
    guest.lend(RECEIVE, 4, 512);
    guest.send(&[1; 1000]);
    guest.send(b"small");
    assert_eq!(text(&guest.received(RECEIVE).data), b"small");
}

#[test]
fn without_buffers_the_loop_rests_and_with_them_it_goes_on() {
    // B2.11.
    let Some(mut guest) = Guest::new(1, MTU, MRG_RXBUF) else {
        return;
    };
    for _ in 0..300 {
        guest.send(b"flood");
    }
    guest.settle();
    for _ in 0..300 {
        guest.lend(RECEIVE, 1, 2048);
        assert_eq!(text(&guest.received(RECEIVE).data), b"flood");
    }
    guest.settle();
}

#[test]
fn buffers_of_one_byte_hold_a_small_packet_and_lose_a_larger_one() {
    // V16. The header is spread over twelve of them.
    let Some(mut guest) = Guest::new(1, MTU, MRG_RXBUF) else {
        return;
    };
    guest.lend(RECEIVE, 64, 1);
    // All that the queue holds is lent, and will not be more.
    guest.send(&[1; 100]);
    guest.send(b"x");
    let mut whole = Vec::new();
    for _ in 0..HEADERS + 1 {
        whole.extend(guest.received(RECEIVE).data);
    }
    assert_eq!(
        (text(&whole), usize::from(buffers(&whole))),
        (&b"x"[..], HEADERS + 1)
    );
    guest.settle();
    assert_eq!(guest.driver.used(RECEIVE), None);
    assert_eq!(guest.driver.status(), 0x0f);
}

#[test]
fn a_chain_to_receive_into_without_room_comes_back_empty() {
    let Some(mut guest) = Guest::new(1, MTU, MRG_RXBUF) else {
        return;
    };
    guest.driver.add(RECEIVE, &[Buffer::Readable(b"?")]);
    guest.lend(RECEIVE, 2, 2048);
    guest.send(b"text");
    assert_eq!(guest.received(RECEIVE).len, 0);
    assert_eq!(text(&guest.received(RECEIVE).data), b"text");
}

#[test]
fn packets_that_are_none_are_dropped() {
    // V16: no header, a header alone, lies in the header.
    let Some(mut guest) = Guest::new(1, MTU, CSUM) else {
        return;
    };
    let whole = guest.packet(b"whole");
    let bad = guest.packet(b"bad");
    let mut checksum_outside = bad.clone();
    checksum_outside[0] = 1; // NEEDS_CSUM
    checksum_outside[6..8].copy_from_slice(&60_000u16.to_le_bytes());
    let mut no_segments = bad.clone();
    no_segments[1] = 1; // TCPv4 segmentation, in segments of 0 bytes
    let mut unknown = bad.clone();
    unknown[1] = 0x77;
    let short = vec![0; 11];
    let header = vec![0; HEADER];
    let huge = vec![0; 70_000];
    for bad in [short, header, checksum_outside, no_segments, unknown, huge] {
        guest.driver.add(TRANSMIT, &[Buffer::Readable(&bad)]);
    }
    guest.driver.add(TRANSMIT, &[Buffer::Writable(100)]);
    guest.driver.add(TRANSMIT, &[Buffer::Readable(&whole)]);
    guest.driver.kick(TRANSMIT);
    for _ in 0..8 {
        assert_eq!(guest.received(TRANSMIT).len, 0);
    }
    assert_eq!(guest.heard(), b"whole");
    assert_eq!(guest.driver.status(), 0x0f);
}

#[test]
fn a_broken_queue_asks_for_a_reset_and_a_reset_mends_it() {
    for queue in [RECEIVE, TRANSMIT] {
        let Some(mut guest) = Guest::new(1, MTU, MRG_RXBUF) else {
            return;
        };
        let outside = RawDescriptor {
            addr: 1 << 40,
            len: 16,
            flags: if queue == RECEIVE { 2 } else { 0 },
            next: 0,
        };
        guest.driver.add_raw(queue, 0, &[outside]);
        guest.driver.kick(queue);
        guest.send(b"lost");
        guest.settle();
        assert!(guest.driver.needs_reset());
        // Its kicks are taken, and packets are left where they are.
        guest.driver.kick(queue);
        guest.send(b"lost");
        guest.settle();
        guest.driver.reset();
        guest.settle();
        guest.driver.negotiate(MRG_RXBUF);
        guest.driver.setup_queue(RECEIVE, 64);
        guest.driver.setup_queue(TRANSMIT, 64);
        guest.driver.start();
        guest.lend(RECEIVE, 8, 2048);
        guest.send(b"again");
        while text(&guest.received(RECEIVE).data) != b"again" {}
    }
}

#[test]
fn after_a_reset_nothing_is_watched_and_nothing_is_written() {
    let Some(mut guest) = Guest::new(1, MTU, MRG_RXBUF) else {
        return;
    };
    guest.lend(RECEIVE, 8, 2048);
    guest.settle();
    assert_eq!(guest.poller.watched(), 3);
    guest.driver.set_status(0);
    guest.send(b"lost");
    assert_eq!((guest.poller.watched(), guest.turn()), (0, 0));
    assert_eq!(guest.driver.used_index(RECEIVE), 0);
}

#[test]
fn a_card_without_its_queues_asks_for_a_reset() {
    // B2.10.
    let Some(taps) = taps_or_skip(1, MTU) else {
        return;
    };
    let poller = Arc::new(Poller::new().unwrap());
    let setup = NetSetup {
        taps,
        mac: MAC,
        mtu: MTU,
    };
    let mut driver = Driver::new(Box::new(Net::new(setup, poller.clone()).unwrap()));
    driver.negotiate(0);
    driver.setup_queue(RECEIVE, 8);
    driver.start();
    assert!(driver.needs_reset());
    driver.reset();
    assert_eq!((driver.status(), poller.watched()), (0, 0));
}

#[test]
fn the_control_queue_sets_the_pairs_and_refuses_the_rest() {
    let Some(mut guest) = Guest::new(2, MTU, MRG_RXBUF | CTRL_VQ | MQ) else {
        return;
    };
    let control = 4;
    for pairs in [1, 2, 1] {
        assert_eq!(guest.command(control, &[4, 0, pairs, 0]), 0);
    }
    // More than there are; none; cut short; longer; offloads, which are not agreed on; unknown; nothing.
    for bad in [
        &[4, 0, 3, 0][..],
        &[4, 0, 0, 0],
        &[4, 0, 1],
        &[4, 0, 1, 0, 0],
        &[4, 1, 1, 0],
        &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[0, 0, 1],
        &[255, 255],
        &[4],
    ] {
        assert_eq!(guest.command(control, bad), 1, "{bad:?}");
    }
    // Without room for the answer nobody is told.
    guest
        .driver
        .add(control, &[Buffer::Readable(&[4, 0, 1, 0])]);
    guest.driver.kick(control);
    assert_eq!(guest.received(control).len, 0);
}

#[test]
fn a_full_frame_fits_into_the_buffer_that_the_specification_asks_for() {
    // Section 5.1.6.3.1: 1526 bytes without merging.
    let Some(mut guest) = Guest::new(1, MTU, 0) else {
        return;
    };
    guest.lend(RECEIVE, 4, 1526);
    let full = [7; 1500 - 28];
    guest.send(&full);
    let used = guest.received(RECEIVE);
    assert_eq!((used.len, text(&used.data)), (1526, &full[..]));
}

#[test]
fn a_driver_that_lends_little_gets_what_fits() {
    // Less than the largest packet that may come, and less than its queue holds.
    for features in [MRG_RXBUF, MRG_RXBUF | GUEST_CSUM | GUEST_TSO4] {
        let Some(mut guest) = Guest::new(1, 9000, features) else {
            return;
        };
        guest.lend(RECEIVE, 4, 1000);
        guest.send(b"small");
        assert_eq!(text(&guest.received(RECEIVE).data), b"small");
        // This one waits until there is room for it, and those behind it with it.
        guest.send(&[3; 5000]);
        guest.send(b"next");
        guest.settle();
        assert_eq!(guest.driver.used(RECEIVE), None);
        guest.lend(RECEIVE, 4, 1000);
        let mut whole = guest.received(RECEIVE).data;
        for _ in 1..buffers(&whole) {
            whole.extend(guest.driver.used(RECEIVE).expect("the next buffer").data);
        }
        assert_eq!(text(&whole), [3; 5000]);
        assert_eq!(text(&guest.received(RECEIVE).data), b"next");
    }
}

#[test]
fn a_card_wakes_every_tap_that_feeds_a_queue() {
    // Without EVENT_IDX, where one turn's wish for silence hides the kick that another waits for.
    let Some(mut guest) = Guest::new(4, MTU, VERSION_1 | MRG_RXBUF) else {
        return;
    };
    let flows: Vec<UdpSocket> = (0..16)
        .map(|_| UdpSocket::bind((HOST, 0)).expect("a socket"))
        .collect();
    for _ in 0..20 {
        for flow in &flows {
            flow.send_to(b"flow", (GUEST, 9)).expect("sent");
        }
        for _ in 0..flows.len() {
            guest.driver.add(RECEIVE, &[Buffer::Writable(2048)]);
            if guest.driver.wants_kick(RECEIVE) {
                guest.driver.kick(RECEIVE);
            }
            guest.turn();
        }
        for _ in 0..flows.len() {
            assert_eq!(text(&guest.received(RECEIVE).data), b"flow");
        }
    }
}

#[test]
fn what_an_earlier_driver_left_is_not_for_the_next() {
    let Some(mut guest) = Guest::new(1, MTU, MRG_RXBUF) else {
        return;
    };
    guest.send(b"old");
    guest.driver.reset();
    guest.driver.negotiate(MRG_RXBUF);
    for queue in [RECEIVE, TRANSMIT] {
        guest.driver.setup_queue(queue, 64);
    }
    guest.driver.start();
    guest.lend(RECEIVE, 4, 2048);
    guest.send(b"new");
    assert_eq!(text(&guest.received(RECEIVE).data), b"new");
}

#[test]
fn with_several_queues_each_packet_comes_once() {
    let Some(mut guest) = Guest::new(4, MTU, MRG_RXBUF | CTRL_VQ | MQ) else {
        return;
    };
    let control = 8;
    // The driver begins with one pair, whichever queue of the tap the host has chosen.
    guest.lend(RECEIVE, 60, 2048);
    for number in 0..20u8 {
        let flow = UdpSocket::bind((HOST, 0)).expect("a socket");
        flow.send_to(&[number], (GUEST, 9)).expect("sent");
    }
    let mut seen: Vec<u8> = (0..20)
        .map(|_| text(&guest.received(RECEIVE).data)[0])
        .collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..20).collect::<Vec<_>>());
    // Then with all of them.
    assert_eq!(guest.command(control, &[4, 0, 4, 0]), 0);
    for pair in 1..4 {
        guest.lend(2 * pair, 30, 2048);
    }
    for number in 0..20u8 {
        let flow = UdpSocket::bind((HOST, 0)).expect("a socket");
        flow.send_to(&[number], (GUEST, 9)).expect("sent");
    }
    let mut seen = Vec::new();
    let deadline = Instant::now() + Duration::from_millis(WAIT_MS);
    while seen.len() < 20 {
        assert!(Instant::now() < deadline, "only {seen:?}");
        guest.poller.turn(Some(Duration::from_millis(10))).unwrap();
        for pair in 0..4 {
            while let Some(used) = guest.driver.used(2 * pair) {
                seen.push(text(&used.data)[0]);
            }
        }
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..20).collect::<Vec<_>>());
    guest.settle();
}

#[test]
fn the_configuration_space_tells_what_there_is() {
    let Some(guest) = Guest::new(4, 9000, 0) else {
        return;
    };
    let config = guest.driver.device_config();
    assert_eq!(config[..6], MAC);
    assert_eq!(config[8..12], [4, 0, 0x28, 0x23]);
    assert_eq!(guest.driver.queue_count(), 9);
}

#[test]
fn what_cannot_be_a_card_is_refused() {
    let poller = Arc::new(Poller::new().unwrap());
    let refused = |taps: Vec<OwnedFd>, mac, mtu| {
        let setup = NetSetup { taps, mac, mtu };
        let error = Net::new(setup, poller.clone()).err().expect("refused");
        std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string)
    };
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    assert!(refused(vec![], MAC, MTU).contains("not 0"));
    assert!(refused((0..17).map(|_| null()).collect(), MAC, MTU).contains("not 17"));
    assert!(refused(vec![null()], [1, 0, 0, 0, 0, 1], MTU).contains("group"));
    assert!(refused(vec![null()], [0; 6], MTU).contains("nobody"));
    assert!(refused(vec![null()], MAC, 67).contains("less than 68"));
    assert!(refused(vec![null()], MAC, MTU).contains("no queue of a tap"));
}
