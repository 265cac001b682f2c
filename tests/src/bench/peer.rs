//! The host's end of a guest's stream.

use super::inside::link::{TCP_PORT, VSOCK_PORT, receive, send};
use super::load::Exchange;
use crate::tap::HOST;
use crate::vmm::accept;
use nix::libc::VMADDR_CID_ANY;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, listen, socket,
};
use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd};

/// What one `read` or `write` is about, in bytes.
const PIECE_BYTES: usize = 64 << 10;

/// Where the guest's one stream comes from.
pub enum Peer {
    /// The network.
    Tcp(TcpListener),
    /// The host's own vsock.
    Vsock(OwnedFd),
    /// The owner channel of our VMM; it closes with the stream, and that is the VM's end.
    Owner(OwnedFd),
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

    /// Takes the stream and answers each message, until the guest ends it.
    ///
    /// # Errors
    /// There is no stream, or it fails.
    pub fn serve(self, exchange: Exchange) -> io::Result<()> {
        let stream = match &self {
            Peer::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                OwnedFd::from(stream)
            }
            Peer::Vsock(listener) => rustix::net::accept(listener)?,
            Peer::Owner(owner) => accept(owner)?,
        };
        let mut stream = File::from(stream);
        let mut buffer = vec![b'y'; PIECE_BYTES];
        loop {
            match receive(&mut stream, &mut buffer, exchange.send) {
                // A guest that resets does not take leave.
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset
                    ) =>
                {
                    return Ok(());
                }
                received => received?,
            }
            send(&mut stream, &buffer, exchange.receive)?;
        }
    }
}
