//! Both ends of the channel: an owner that keeps the rules or breaks them, and a guest's driver.

use super::*;
use capsid_devices::event::Poller;
use capsid_devices::testing::{Buffer, Driver};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const RW: u16 = 5;

struct Pair {
    owner: OwnedFd,
    channel: OwnerChannel,
    driver: Driver,
    poller: Arc<Poller>,
    ends: Ends,
}

impl Pair {
    /// A channel to a guest that may dial these ports and whose driver runs.
    fn new(dials: &[(u32, u32)]) -> Pair {
        let dials: Vec<GuestDial> = dials
            .iter()
            .map(|&(port, connections)| GuestDial { port, connections })
            .collect();
        let (ours, owner) = seqpacket_pair();
        let (poller, ends) = (Arc::new(Poller::new().unwrap()), Ends::new().unwrap());
        let opened = OwnerChannel::open(
            ours,
            &dials,
            poller.clone(),
            ends.clone(),
            crate::record::Phases::default(),
        );
        let (channel, device) = opened.unwrap();
        let mut driver = Driver::up(Box::new(device), 0);
        for _ in 0..64 {
            driver.add(0, &[Buffer::Writable(256)]);
        }
        driver.kick(0);
        Pair {
            owner,
            channel,
            driver,
            poller,
            ends,
        }
    }

    /// Turns the loop until it is silent.
    fn settle(&mut self) {
        for _ in 0..1000 {
            if self.poller.turn(Some(Duration::ZERO)).unwrap() == 0 {
                return;
            }
        }
        panic!("the loop spins");
    }

    /// The guest sends a packet without payload.
    fn guest_sends(&mut self, op: u16, host: u32, guest: u32) {
        let mut header = Vec::new();
        for cid in [3u64, 2] {
            header.extend(cid.to_le_bytes());
        }
        for field in [guest, host, 0, 1 | u32::from(op) << 16, 0, 1 << 20, 0] {
            header.extend(field.to_le_bytes());
        }
        self.driver.add(1, &[Buffer::Readable(&header)]);
        self.driver.kick(1);
        self.settle();
        while self.driver.used(1).is_some() {}
    }

    /// What the guest received: operation, host port and payload of each packet.
    fn guest_receives(&mut self) -> Vec<(u16, u32, Vec<u8>)> {
        self.settle();
        let mut packets = Vec::new();
        while let Some(used) = self.driver.used(0) {
            let op = u16::from_le_bytes([used.data[30], used.data[31]]);
            let port = u32::from_le_bytes(used.data[16..20].try_into().unwrap());
            packets.push((op, port, used.data[44..].to_vec()));
            self.driver.add(0, &[Buffer::Writable(256)]);
        }
        self.driver.kick(0);
        self.settle();
        packets
    }

    fn exit(&mut self) -> Option<VmmExit> {
        self.settle();
        self.ends.get().map(|end| end.exit)
    }
}

fn seqpacket_pair() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC;
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

/// The owner sends these bytes with these fds.
fn send_raw(owner: &OwnedFd, bytes: &[u8], fds: &[&OwnedFd]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    }
    sendmsg(
        owner,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .unwrap();
}

/// The owner connects to a port of the guest.
fn connect(owner: &OwnedFd, port: u32) -> UnixStream {
    let (ours, theirs) = stream_pair().unwrap();
    send_raw(owner, &OwnerMessage::Connect { port }.encode(), &[&theirs]);
    UnixStream::from(ours)
}

/// What the owner finds in the channel, if anything.
fn accepted(owner: &OwnedFd) -> Option<(OwnerMessage, UnixStream)> {
    let mut packet = [0; 64];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut packet)];
    let message = recvmsg(owner, &mut into, &mut control, RecvFlags::DONTWAIT).ok()?;
    let fd = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    let message = OwnerMessage::decode(&packet[..message.bytes]).unwrap();
    Some((message, fd.expect("a message has an fd").into()))
}

#[test]
fn the_owners_connect_reaches_the_guest_with_its_bytes() {
    let mut pair = Pair::new(&[]);
    let mut stream = connect(&pair.owner, 1025);
    stream.write_all(b"hello guest").unwrap();
    let asked = pair.guest_receives();
    assert_eq!((asked.len(), asked[0].0), (1, REQUEST));
    pair.guest_sends(RESPONSE, asked[0].1, 1025);
    let data = pair.guest_receives();
    assert_eq!(data[0], (RW, asked[0].1, b"hello guest".to_vec()));
    assert_eq!(pair.exit(), None);
}

#[test]
fn a_connect_that_the_guest_refuses_or_cannot_hear_closes_the_owners_fd() {
    let mut pair = Pair::new(&[]);
    let mut refused = connect(&pair.owner, 1025);
    let asked = pair.guest_receives();
    pair.guest_sends(RST, asked[0].1, 1025);
    assert_eq!(refused.read(&mut [0; 1]).unwrap(), 0);
    pair.driver.reset();
    let mut unheard = connect(&pair.owner, 1025);
    pair.settle();
    assert_eq!(unheard.read(&mut [0; 1]).unwrap(), 0);
    // An fd that cannot be a connection is closed just so.
    let message = OwnerMessage::Connect { port: 1 }.encode();
    let (_, packet) = seqpacket_pair();
    send_raw(&pair.owner, &message, &[&packet]);
    assert_eq!(pair.exit(), None);
}

#[test]
fn the_guest_dials_a_listed_port_as_often_as_listed_and_no_other() {
    let mut pair = Pair::new(&[(1024, 1), (7, 2)]);
    for (host, granted) in [
        (1024, true),
        (1024, false),
        (1025, false),
        (7, true),
        (7, true),
        (7, false),
    ] {
        pair.guest_sends(REQUEST, host, 40 + host);
        let answer = pair.guest_receives();
        let op = if granted { RESPONSE } else { RST };
        assert_eq!((answer.len(), answer[0].0, answer[0].1), (1, op, host));
        match accepted(&pair.owner) {
            Some((message, mut stream)) => {
                assert!(granted);
                assert_eq!(message, OwnerMessage::Accepted { port: host });
                stream.write_all(b"x").unwrap();
                assert_eq!(pair.guest_receives()[0].0, RW);
            }
            None => assert!(!granted),
        }
        // The same name again for the next one.
        pair.guest_sends(RST, host, 40 + host);
        pair.guest_receives();
    }
}

#[test]
fn an_owner_that_does_not_read_stops_the_guests_dials_and_nothing_else() {
    let mut pair = Pair::new(&[(7, u32::MAX)]);
    let mut refused = 0;
    for guest in 0..600 {
        pair.guest_sends(REQUEST, 7, guest);
        let answer = pair.guest_receives();
        refused += usize::from(answer[0].0 == RST);
        pair.guest_sends(RST, 7, guest);
    }
    assert!(refused > 0 && refused < 600, "{refused} of 600 refused");
    while accepted(&pair.owner).is_some() {}
    pair.guest_sends(REQUEST, 7, 1);
    assert_eq!(pair.guest_receives()[0].0, RESPONSE);
    assert_eq!(pair.exit(), None);
}

#[test]
fn an_owner_that_goes_away_ends_the_vm_after_its_last_message() {
    let mut pair = Pair::new(&[(7, 1)]);
    let _stream = connect(&pair.owner, 1025);
    // With a message of ours that it never read.
    pair.guest_sends(REQUEST, 7, 1);
    let (_other, spare) = seqpacket_pair();
    drop(std::mem::replace(&mut pair.owner, spare));
    assert_eq!(pair.exit(), Some(VmmExit::OwnerGone));
    let ops: Vec<u16> = pair.guest_receives().iter().map(|p| p.0).collect();
    assert!(ops.contains(&REQUEST), "{ops:?}");
}

#[test]
fn what_is_no_message_ends_the_vm_and_says_why() {
    let good = OwnerMessage::Connect { port: 1 }.encode();
    let accepted = OwnerMessage::Accepted { port: 1 }.encode();
    for (bytes, fds, why) in [
        (&good[..7], 1, "7 bytes long, expected 8"),
        (&[0; 9][..], 1, "9 bytes long"),
        (&[0; 5000][..], 1, "too long"),
        (&[9; 8][..], 1, "unknown kind"),
        (&good[..], 0, "carries 0 fds"),
        (&good[..], 2, "carries 2 fds"),
        (&good[..], 4, "fds, expected 1"),
        (&accepted[..], 1, "accepts a connection"),
    ] {
        let mut pair = Pair::new(&[]);
        let (fd, _other) = stream_pair().unwrap();
        send_raw(&pair.owner, bytes, &vec![&fd; fds]);
        assert_eq!(pair.exit(), Some(VmmExit::BadConfig), "{why}");
        let said = pair.ends.get().unwrap().why;
        assert!(said.contains(why), "{said:?} does not say {why:?}");
        assert!(pair.guest_receives().is_empty());
    }
}

#[test]
fn a_busy_owner_gets_all_its_connects() {
    let mut pair = Pair::new(&[]);
    let streams: Vec<UnixStream> = (0..50).map(|port| connect(&pair.owner, port)).collect();
    assert_eq!(pair.guest_receives().len(), 50);
    drop(streams);
}

#[test]
fn the_word_to_power_off_reaches_the_agents_stream_port() {
    let mut pair = Pair::new(&[]);
    assert!(pair.channel.power_off());
    let asked = pair.guest_receives();
    assert_eq!(asked[0].0, REQUEST);
    pair.guest_sends(RESPONSE, asked[0].1, AGENT_STREAM_PORT);
    let data = pair.guest_receives();
    let header = data[0].2.clone().try_into().unwrap();
    assert_eq!(StreamHeader::decode(&header), Ok(StreamHeader::PowerOff));
    pair.driver.reset();
    pair.settle();
    assert!(!pair.channel.power_off(), "nobody hears it");
}

#[test]
fn a_socket_of_another_kind_is_refused() {
    let (ours, _owner) = stream_pair().unwrap();
    let (poller, ends) = (Arc::new(Poller::new().unwrap()), Ends::new().unwrap());
    let refused = OwnerChannel::open(ours, &[], poller, ends, crate::record::Phases::default());
    let error = refused.err().expect("refused");
    assert_eq!(error.exit(), VmmExit::BadConfig);
}

#[test]
fn a_dropped_channel_leaves_nothing_watched() {
    let pair = Pair::new(&[]);
    let poller = pair.poller.clone();
    drop((pair.channel, pair.driver));
    assert_eq!(poller.watched(), 0);
}
