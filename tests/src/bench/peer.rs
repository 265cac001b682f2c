//! The host's end of a guest's stream.

use super::inside::link::{TCP_PORT, VSOCK_PORT, receive, send};
use super::load::{Exchange, ROUND_TIMEOUT_SECONDS};
use crate::tap::HOST;
use crate::vmm::accept;
use nix::libc::VMADDR_CID_ANY;
use nix::sys::socket::sockopt::{ReceiveTimeout, SendTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, listen, setsockopt, socket,
};
use nix::sys::time::TimeVal;
use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// What one `read` or `write` is about, in bytes.
const PIECE_BYTES: usize = 64 << 10;

/// Where the guest's one stream comes from.
pub enum Peer {
    /// The network.
    Tcp(TcpListener),
    /// The host's own vsock.
    Vsock(OwnedFd),
    /// The owner channel of our VMM; when it closes, that is the VM's end.
    Owner(OwnedFd),
}

/// The host's ends of a stream that was served, to be kept until the guest has come to its own end.
pub struct Ends {
    _peer: Peer,
    _stream: File,
}

impl Peer {
    /// Listens at the host's address on the link.
    ///
    /// # Errors
    /// There is no such link.
    pub fn tcp() -> io::Result<Peer> {
        Ok(Peer::Tcp(TcpListener::bind((HOST, TCP_PORT))?))
    }

    /// Listens for guests of vhost.
    ///
    /// # Errors
    /// The host's kernel has no vsock.
    pub fn vsock() -> io::Result<Peer> {
        let kind = SockType::Stream;
        let socket = socket(AddressFamily::Vsock, kind, SockFlag::SOCK_CLOEXEC, None)?;
        bind(
            socket.as_raw_fd(),
            &VsockAddr::new(VMADDR_CID_ANY, VSOCK_PORT),
        )?;
        listen(&socket, Backlog::new(1)?)?;
        Ok(Peer::Vsock(socket))
    }

    /// Takes the stream and answers each message of so many rounds. What the guest says after that is nobody's business: it resets
    /// without taking leave, or takes it when nobody carries it any more.
    ///
    /// # Errors
    /// There is no stream, or it fails, or nothing comes for [`ROUND_TIMEOUT_SECONDS`].
    pub fn serve(self, exchange: Exchange, rounds: usize) -> io::Result<Ends> {
        bounded(&self)?;
        let stream = match &self {
            Peer::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                OwnedFd::from(stream)
            }
            Peer::Vsock(listener) => rustix::net::accept(listener)?,
            Peer::Owner(owner) => accept(owner)?,
        };
        bounded(&stream)?;
        let mut stream = File::from(stream);
        let mut buffer = vec![b'y'; PIECE_BYTES];
        for _ in 0..rounds * exchange.count {
            receive(&mut stream, &mut buffer, exchange.send)?;
            send(&mut stream, &buffer, exchange.receive)?;
        }
        Ok(Ends {
            _peer: self,
            _stream: stream,
        })
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Peer::Tcp(listener) => listener.as_fd(),
            Peer::Vsock(socket) | Peer::Owner(socket) => socket.as_fd(),
        }
    }
}

/// Lets no call on a socket wait for ever.
fn bounded(socket: &impl AsFd) -> io::Result<()> {
    let limit = TimeVal::new(ROUND_TIMEOUT_SECONDS, 0);
    setsockopt(socket, ReceiveTimeout, &limit)?;
    Ok(setsockopt(socket, SendTimeout, &limit)?)
}
