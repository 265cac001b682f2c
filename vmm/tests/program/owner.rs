//! The owner channel of the real program under its filters: a guest of a few hundred instructions drives the
//! vsock device, and the owner talks with it, hangs up on it and goes away.

use crate::harness::{Code, Running, Vmm, can_run};
use capsid_protocol::exit::VmmExit;
use capsid_protocol::vsock::OwnerMessage;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// BAR of the vsock device, in slot 3 behind pvpanic and the entropy device.
const BAR: u32 = 0xc001_8000;
const NOTIFY: u32 = BAR + 0x3000;
/// Rings of four: descriptors, available and used ring a page each, three pages a queue.
const RINGS: u32 = 0x20_0000;
const RX_BUFFERS: u32 = 0x21_0000;
const RX_BYTES: u32 = 0x100;
const PACKETS: u32 = 0x22_0000;
const REQUEST: u32 = 1;
const RW: u32 = 5;
/// How long the owner waits for anything in these tests.
const WAIT: Duration = Duration::from_secs(60);

/// Stores of two bytes and waits for them.
trait More {
    fn store16(self, address: u32, value: u16) -> Self;
    fn wait16(self, address: u32, value: u16) -> Self;
}

impl More for Code {
    fn store16(mut self, address: u32, value: u16) -> Code {
        self.0.extend([0x66, 0xc7, 0x05]);
        self.0.extend(address.to_le_bytes());
        self.0.extend(value.to_le_bytes());
        self
    }

    /// `cmp word [address], value`; `jne` back to it.
    fn wait16(mut self, address: u32, value: u16) -> Code {
        self.0.extend([0x66, 0x81, 0x3d]);
        self.0.extend(address.to_le_bytes());
        self.0.extend(value.to_le_bytes());
        self.0.extend([0x75, 0xf5]);
        self
    }
}

fn ring(queue: u32, part: u32) -> u32 {
    RINGS + (3 * queue + part) * 0x1000
}

fn descriptor(code: Code, queue: u32, index: u32, address: u32, len: u32, flags: u16) -> Code {
    let at = ring(queue, 0) + 16 * index;
    code.store32(at, address)
        .store32(at + 8, len)
        .store16(at + 12, flags)
        .store16(at + 14, index as u16 + 1)
}

/// A packet's header from port 7 of the guest to port 1024 of the host.
fn packet(code: Code, at: u32, op: u32, len: u32) -> Code {
    let words = [3, 0, 2, 0, 7, 1024, len, op << 16 | 1, 0, 0x1_0000, 0];
    (0..).zip(words).fold(code, |code, (word, value)| {
        code.store32(at + 4 * word, value)
    })
}

/// Brings the device up: queues of four, four receive buffers.
fn driver() -> Code {
    let mut code = Code::default()
        .outl(0xcf8, 0x8000_1804)
        .outl(0xcfc, 0x0000_0006)
        .store8(BAR + 0x14, 0)
        .store8(BAR + 0x14, 1)
        .store8(BAR + 0x14, 3)
        .store32(BAR + 8, 1)
        .store32(BAR + 0xc, 1)
        .store8(BAR + 0x14, 11);
    for queue in 0..3 {
        code = code
            .store16(BAR + 0x16, queue as u16)
            .store16(BAR + 0x18, 4)
            .store32(BAR + 0x20, ring(queue, 0))
            .store32(BAR + 0x28, ring(queue, 1))
            .store32(BAR + 0x30, ring(queue, 2))
            .store16(BAR + 0x1c, 1);
    }
    for buffer in 0..4 {
        let address = RX_BUFFERS + buffer * RX_BYTES;
        code = descriptor(code, 0, buffer, address, RX_BYTES, 2)
            .store16(ring(0, 1) + 4 + 2 * buffer, buffer as u16);
    }
    code.store16(ring(0, 1) + 2, 4).store8(BAR + 0x14, 15)
}

/// Dials port 1024, sends "ping", prints what comes back and waits to be hung up on.
fn ping() -> Code {
    let code = packet(driver(), PACKETS, REQUEST, 0);
    let code = packet(code, PACKETS + 0x40, RW, 4).store32(PACKETS + 0x80, 0x676e_6970);
    let code = descriptor(code, 1, 0, PACKETS, 44, 0);
    let code = descriptor(code, 1, 1, PACKETS + 0x40, 44, 1);
    descriptor(code, 1, 2, PACKETS + 0x80, 4, 0)
        .store16(ring(1, 1) + 4, 0)
        .store16(ring(1, 1) + 6, 1)
        .store16(ring(1, 1) + 2, 2)
        .store16(NOTIFY + 4, 1)
        .wait16(ring(0, 2) + 2, 2)
        .outsb(RX_BUFFERS + RX_BYTES + 44, 4)
        .wait16(ring(0, 2) + 2, 3)
        .print(" hung up\n")
        .halt()
}

/// Starts a VMM with an owner channel; also the owner's end.
pub(crate) fn start(mut vmm: Vmm) -> (Running, OwnedFd) {
    let (theirs, ours) = channel();
    vmm.more += &config(&theirs, r#"{"port":1024,"connections":1}"#);
    (vmm.start(), ours)
}

/// The vsock device of a configuration, with the ports that the guest may dial.
pub(crate) fn config(theirs: &OwnedFd, guest_may_dial: &str) -> String {
    let fd = theirs.as_raw_fd();
    format!(r#","vsock":{{"owner_fd":{fd},"guest_may_dial":[{guest_may_dial}]}}"#)
}

/// An owner channel: the VMM's end, which a child inherits, and the owner's.
pub(crate) fn channel() -> (OwnedFd, OwnedFd) {
    let pair = |flags| socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
    let (theirs, ours) = pair(SocketFlags::empty()).unwrap();
    rustix::io::fcntl_setfd(&ours, rustix::io::FdFlags::CLOEXEC).unwrap();
    rustix::net::sockopt::set_socket_timeout(
        &ours,
        rustix::net::sockopt::Timeout::Recv,
        Some(WAIT),
    )
    .unwrap();
    (theirs, ours)
}

/// Waits for a connection of the guest; its port, and the host's end if there was a place for it.
pub(crate) fn accept_any(owner: &OwnedFd) -> (u32, Option<UnixStream>) {
    let mut packet = [0; 16];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut packet)];
    let message = recvmsg(owner, &mut into, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    let Ok(OwnerMessage::Accepted { port }) = OwnerMessage::decode(&packet[..message.bytes]) else {
        panic!("{:?}", &packet[..message.bytes]);
    };
    let stream = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    (port, stream.map(UnixStream::from))
}

/// Waits for the guest's connection.
fn accept(owner: &OwnedFd) -> UnixStream {
    let (port, stream) = accept_any(owner);
    assert_eq!(port, 1024);
    let stream = stream.expect("an fd");
    stream.set_read_timeout(Some(WAIT)).unwrap();
    stream
}

fn connect(owner: &OwnedFd, port: u32) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [theirs.as_fd()];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let message = OwnerMessage::Connect { port }.encode();
    sendmsg(
        owner,
        &[IoSlice::new(&message)],
        &mut control,
        SendFlags::empty(),
    )
    .unwrap();
    ours.set_read_timeout(Some(WAIT)).unwrap();
    ours
}

#[test]
fn a_guest_and_its_owner_talk_and_the_vm_ends_with_its_owner() {
    if !can_run("a_guest_and_its_owner_talk_and_the_vm_ends_with_its_owner") {
        return;
    }
    let (mut running, owner) = start(Vmm::of(&ping()));
    let mut stream = accept(&owner);
    let mut said = [0; 4];
    stream.read_exact(&mut said).unwrap();
    assert_eq!(&said, b"ping");
    stream.write_all(b"pong").unwrap();
    running.printed("pong");
    // A close that the guest never confirms, and a connect that it never answers: both wait for a deadline.
    drop(stream);
    running.printed("hung up");
    let _asked = connect(&owner, 1025);
    assert!(running.child.try_wait().unwrap().is_none());
    drop(owner);
    let ended = running.wait();
    assert_eq!(ended.exit, Some(VmmExit::OwnerGone), "{}", ended.stderr);
}

#[test]
fn a_connect_before_the_guests_driver_runs_reads_the_end_and_the_vm_goes_on() {
    if !can_run("a_connect_before_the_guests_driver_runs_reads_the_end_and_the_vm_goes_on") {
        return;
    }
    let (running, owner) = start(Vmm::of(&Code::default().halt()));
    for port in 0..20 {
        assert_eq!(connect(&owner, port).read(&mut [0; 1]).unwrap(), 0);
    }
    drop(owner);
    let ended = running.wait();
    assert_eq!(ended.exit, Some(VmmExit::OwnerGone), "{}", ended.stderr);
}

#[test]
fn a_message_that_is_none_is_refused_like_a_bad_config() {
    if !can_run("a_message_that_is_none_is_refused_like_a_bad_config") {
        return;
    }
    let (running, owner) = start(Vmm::of(&Code::default().halt()));
    rustix::net::send(&owner, b"CONNECT 1024\n", SendFlags::empty()).unwrap();
    let ended = running.wait();
    assert_eq!(ended.exit, Some(VmmExit::BadConfig), "{}", ended.stderr);
    assert!(ended.stderr.contains("owner message"), "{}", ended.stderr);
}
