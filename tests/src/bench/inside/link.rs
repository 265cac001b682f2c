//! Streams to the host and pings of it.

use super::super::load::Exchange;
use super::Task;
use crate::tap::{GUEST, HOST};
use capsid_protocol::vsock::HOST_CID;
use nix::sys::socket::sockopt::ReceiveTimeout;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, VsockAddr, connect,
    recv, sendto, setsockopt, socket,
};
use nix::sys::time::TimeVal;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};

/// The host's port of a vsock stream.
pub const VSOCK_PORT: u32 = 5000;
/// The host's port of a TCP stream.
pub const TCP_PORT: u16 = 5000;
/// What one `write` or `read` of a stream is about, in bytes.
const PIECE_BYTES: usize = 64 << 10;
/// Pings carry our number, so that no other's answers are taken for theirs.
const IDENTIFIER: u16 = 0x6c6f;
/// How long an answer may take, in us.
const ANSWER_TIMEOUT_US: i64 = 50_000;
/// Requests until the link must be up.
const FIRST_PINGS_MAX: usize = 100;
/// Bytes of an echo request (RFC 792): the header and 56 bytes, as `ping` sends.
const ECHO_BYTES: usize = 64;

/// A stream to the host.
pub struct Stream {
    file: File,
    exchange: Exchange,
    buffer: Vec<u8>,
}

impl Stream {
    /// Dials.
    ///
    /// # Errors
    /// There is no device, or nobody listens.
    pub fn connect(exchange: Exchange) -> io::Result<Stream> {
        let fd = if exchange.tcp {
            Ping::open(0)?;
            let stream = TcpStream::connect((HOST, TCP_PORT))?;
            stream.set_nodelay(true)?;
            OwnedFd::from(stream)
        } else {
            let fd = socket(
                AddressFamily::Vsock,
                SockType::Stream,
                SockFlag::SOCK_CLOEXEC,
                None,
            )?;
            let cid = u32::try_from(HOST_CID).map_err(io::Error::other)?;
            connect(fd.as_raw_fd(), &VsockAddr::new(cid, VSOCK_PORT))?;
            fd
        };
        Ok(Stream {
            file: File::from(fd),
            exchange,
            buffer: vec![b'x'; PIECE_BYTES],
        })
    }
}

impl Task for Stream {
    fn round(&mut self) -> io::Result<()> {
        for _ in 0..self.exchange.count {
            send(&mut self.file, &self.buffer, self.exchange.send)?;
            receive(&mut self.file, &mut self.buffer, self.exchange.receive)?;
        }
        Ok(())
    }
}

/// Writes `bytes` bytes in pieces.
///
/// # Errors
/// The stream has ended.
pub fn send(stream: &mut impl Write, piece: &[u8], bytes: usize) -> io::Result<()> {
    let mut left = bytes;
    while left > 0 {
        let length = left.min(piece.len());
        stream.write_all(piece.get(..length).unwrap_or_default())?;
        left -= length;
    }
    Ok(())
}

/// Reads `bytes` bytes in pieces.
///
/// # Errors
/// The stream has ended.
pub fn receive(stream: &mut impl Read, piece: &mut [u8], bytes: usize) -> io::Result<()> {
    let mut left = bytes;
    while left > 0 {
        let length = left.min(piece.len());
        match stream.read(piece.get_mut(..length).unwrap_or_default())? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => left -= read,
        }
    }
    Ok(())
}

/// Echo requests.
pub struct Ping {
    socket: OwnedFd,
    host: SockaddrIn,
    count: usize,
}

impl Ping {
    /// Brings the link up and waits until the host answers: what is sent too early is lost, and TCP would try again in a second.
    ///
    /// # Errors
    /// There is no network card, or nobody answers.
    pub fn open(count: usize) -> io::Result<Ping> {
        bring_up()?;
        let ping = Ping::of(count)?;
        for _ in 0..FIRST_PINGS_MAX {
            match ping.once(0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                answered => return answered.map(|()| ping),
            }
        }
        Err(io::Error::other("the host does not answer"))
    }

    fn of(count: usize) -> io::Result<Ping> {
        let socket = socket(
            AddressFamily::Inet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::Icmp,
        )?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::new(0, ANSWER_TIMEOUT_US))?;
        let host: Ipv4Addr = HOST.parse().map_err(io::Error::other)?;
        Ok(Ping {
            socket,
            host: SockaddrIn::from(SocketAddrV4::new(host, 0)),
            count,
        })
    }
}

impl Ping {
    /// Sends one request and waits for its answer.
    fn once(&self, sequence: u16) -> io::Result<()> {
        let mut answer = [0; 256];
        let (socket, flags) = (self.socket.as_raw_fd(), MsgFlags::empty());
        sendto(socket, &echo_request(sequence), &self.host, flags)?;
        loop {
            let length = recv(socket, &mut answer, flags)?;
            if is_answer(answer.get(..length).unwrap_or_default(), sequence) {
                return Ok(());
            }
        }
    }
}

impl Task for Ping {
    fn round(&mut self) -> io::Result<()> {
        (0..self.count).try_for_each(|sequence| self.once(sequence as u16))
    }
}

fn echo_request(sequence: u16) -> [u8; ECHO_BYTES] {
    let mut packet = [b'x'; ECHO_BYTES];
    let ([i0, i1], [s0, s1]) = (IDENTIFIER.to_be_bytes(), sequence.to_be_bytes());
    // Type 8, code 0, the sum, identifier, sequence number.
    packet[..8].copy_from_slice(&[8, 0, 0, 0, i0, i1, s0, s1]);
    // RFC 1071.
    let words = packet.chunks_exact(2);
    let sum: u32 = words
        .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let folded = (folded & 0xffff) + (folded >> 16);
    packet[2..4].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    packet
}

/// Whether a packet, which comes with its IP header, is the answer to our request.
fn is_answer(packet: &[u8], sequence: u16) -> bool {
    let header_bytes = packet
        .first()
        .map_or(0, |first| usize::from(first & 0xf) * 4);
    let ([i0, i1], [s0, s1]) = (IDENTIFIER.to_be_bytes(), sequence.to_be_bytes());
    matches!(packet.get(header_bytes..), Some([0, 0, _, _, a, b, c, d, ..]) if [*a, *b, *c, *d] == [i0, i1, s0, s1])
}

/// Gives the network card the guest's address and brings it up, by rtnetlink(7).
fn bring_up() -> io::Result<()> {
    const NEW_LINK: u16 = 16;
    const NEW_ADDRESS: u16 = 20;
    const UP: u32 = 1;
    const INET: u8 = 2;
    const LOCAL: u16 = 2;
    let index: u32 = fs::read_to_string("/sys/class/net/eth0/ifindex")?
        .trim()
        .parse()
        .map_err(io::Error::other)?;
    let address: Ipv4Addr = GUEST.parse().map_err(io::Error::other)?;
    // `struct ifaddrmsg` with 24 bits of network, and one attribute.
    let mut body = vec![INET, 24, 0, 0];
    body.extend(index.to_ne_bytes());
    body.extend(8u16.to_ne_bytes());
    body.extend(LOCAL.to_ne_bytes());
    body.extend(address.octets());
    netlink(NEW_ADDRESS, &body)?;
    // `struct ifinfomsg`: the flag, and that it is the one to change.
    let mut body = vec![0; 4];
    body.extend(index.to_ne_bytes());
    body.extend(UP.to_ne_bytes());
    body.extend(UP.to_ne_bytes());
    netlink(NEW_LINK, &body)
}

/// Sends one request and takes its acknowledgement (`struct nlmsghdr`, then `struct nlmsgerr`).
fn netlink(kind: u16, body: &[u8]) -> io::Result<()> {
    const HEADER_BYTES: usize = 16;
    const REQUEST_AND_ACKNOWLEDGE: u16 = 5;
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    let length = (HEADER_BYTES + body.len()) as u32;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(REQUEST_AND_ACKNOWLEDGE.to_ne_bytes());
    message.extend([0; 8]); // sequence number, port
    message.extend(body);
    let mut stream = File::from(socket);
    stream.write_all(&message)?;
    let mut answer = [0; 4096];
    let length = stream.read(&mut answer)?;
    match answer
        .get(..length)
        .and_then(|answer| answer.get(HEADER_BYTES..HEADER_BYTES + 4))
    {
        Some(&[a, b, c, d]) => match i32::from_ne_bytes([a, b, c, d]) {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(-error)),
        },
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_echo_request_sums_to_nothing() {
        let request = echo_request(0x1234);
        let words = request.chunks_exact(2);
        let sum: u32 = words
            .map(|word| u32::from(word[0]) << 8 | u32::from(word[1]))
            .sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }

    #[test]
    fn only_the_answer_to_our_own_request_is_one() {
        let mut packet = vec![0x45; 20];
        let mut answer = echo_request(7);
        assert!(!is_answer(&[&packet[..], &answer[..]].concat(), 7));
        answer[0] = 0;
        packet.extend_from_slice(&answer);
        assert!(is_answer(&packet, 7));
        assert!(!is_answer(&packet, 8));
        assert!(!is_answer(&[], 0));
    }

    #[test]
    fn a_stream_that_ends_early_is_an_error() {
        let mut sent = Vec::new();
        send(&mut sent, b"abc", 7).unwrap();
        assert_eq!(sent, b"abcabca");
        let mut piece = [0; 4];
        receive(&mut sent.as_slice(), &mut piece, 7).unwrap();
        assert!(receive(&mut sent.as_slice(), &mut piece, 8).is_err());
    }
}
