//! A card, driven as a guest drives it, on a real tap device: packets of a UDP socket of the host come out of the receive queue,
//! and what the transmit queue sends arrives at the socket.
//!
//! Needs root and /dev/net/tun. Without them each test says so and is skipped.

mod host;
mod hostile;
mod serving;

use super::*;
use crate::event::Poller;
use crate::testing::{Buffer, Driver, RawDescriptor, Used, WAIT_MS, written_down};
use host::{GUEST, HOST, mac, taps};
use std::collections::BTreeMap;
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
const STATUS: u64 = 1 << 16;
const CTRL_VQ: u64 = 1 << 17;
const MQ: u64 = 1 << 22;
const VERSION_1: u64 = 1 << 32;

/// A guest with one card, and the host's end of it.
struct Guest {
    driver: Driver,
    poller: Arc<Poller>,
    socket: UdpSocket,
    link: Link,
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
        let link = card.link();
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
            link,
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
