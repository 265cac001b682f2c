//! The two doors of the agent: the one connection it dials (its RPC channel) and the port on which the
//! host opens streams. In a guest both are vsock; the tests use unix sockets, same code behind.
//!
//! Only the host (CID 2) is heard: containers of this guest could reach the port, too, if the kernel
//! offered a loopback transport, so the peer is checked on every accept.

use crate::stream::{Stream, polled};
use capsid_protocol::vsock::{AGENT_RPC_PORT, AGENT_STREAM_PORT, HOST_CID};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, UnixAddr, VsockAddr, accept4, bind,
    connect, getpeername, listen, socket, sockopt,
};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::sync::watch;

/// How long the host may take to accept the agent's one connection.
const CONNECT_TIMEOUT_MS: u64 = 10_000;
/// Streams that wait in the kernel to be accepted.
const BACKLOG_COUNT: i32 = 64;
/// Any context id, for binding (VMADDR_CID_ANY).
const CID_ANY: u32 = u32::MAX;

/// Where the two doors are.
#[derive(Clone, Debug)]
pub enum Doors {
    /// A guest: the ports of `capsid_protocol::vsock`.
    Vsock,
    /// A test: dial the first path, listen on the second.
    Unix {
        /// Listening socket of the test.
        rpc: PathBuf,
        /// Made by the agent.
        streams: PathBuf,
    },
}

/// Why a door does not open.
#[derive(Debug, thiserror::Error)]
pub enum DoorError {
    /// The stream port.
    #[error("listening for streams on {at}")]
    Listen {
        /// Port or path.
        at: String,
        /// errno.
        #[source]
        cause: io::Error,
    },
    /// The RPC channel.
    #[error("dialling the host at {at}")]
    Dial {
        /// Port or path.
        at: String,
        /// errno.
        #[source]
        cause: io::Error,
    },
}

/// The stream port, open.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    vsock: bool,
}

/// The RPC connection, on its way.
#[derive(Debug)]
pub struct Dialled {
    socket: OwnedFd,
    at: String,
}

impl Doors {
    fn open(&self, address: impl Fn() -> io::Result<Address>) -> io::Result<(OwnedFd, Address)> {
        let family = match self {
            Doors::Vsock => AddressFamily::Vsock,
            Doors::Unix { .. } => AddressFamily::Unix,
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(family, SockType::Stream, flags, None)?;
        Ok((socket, address()?))
    }

    /// Listens for streams. Comes before [`Doors::dial`]: the host may open a stream as soon as it has
    /// the connection.
    ///
    /// # Errors
    /// The port is taken, or this kernel has no vsock.
    pub fn listen(&self) -> Result<Listener, DoorError> {
        let at = match self {
            Doors::Vsock => format!("vsock port {AGENT_STREAM_PORT}"),
            Doors::Unix { streams, .. } => streams.display().to_string(),
        };
        let open = || {
            let (socket, address) = self.open(|| match self {
                Doors::Vsock => Ok(Address::vsock(CID_ANY, AGENT_STREAM_PORT)),
                Doors::Unix { streams, .. } => Address::unix(streams),
            })?;
            address.bind(&socket)?;
            listen(&socket, Backlog::new(BACKLOG_COUNT)?)?;
            Ok(socket)
        };
        let socket = open().map_err(|cause| DoorError::Listen { at, cause })?;
        let vsock = matches!(self, Doors::Vsock);
        Ok(Listener { socket, vsock })
    }

    /// Starts the one connection to the host; the kernel goes on with it while the agent boots.
    ///
    /// # Errors
    /// The host's port refuses at once, or this kernel has no vsock.
    pub fn dial(&self) -> Result<Dialled, DoorError> {
        let at = match self {
            Doors::Vsock => format!("vsock {HOST_CID}:{AGENT_RPC_PORT}"),
            Doors::Unix { rpc, .. } => rpc.display().to_string(),
        };
        let open = || {
            let (socket, address) = self.open(|| match self {
                Doors::Vsock => Ok(Address::vsock(HOST_CID as u32, AGENT_RPC_PORT)),
                Doors::Unix { rpc, .. } => Address::unix(rpc),
            })?;
            match address.connect(&socket) {
                Err(Errno::EINPROGRESS) => {}
                result => result?,
            }
            Ok(socket)
        };
        match open() {
            Ok(socket) => Ok(Dialled { socket, at }),
            Err(cause) => Err(DoorError::Dial { at, cause }),
        }
    }
}

enum Address {
    Vsock(VsockAddr),
    Unix(UnixAddr),
}

impl Address {
    fn vsock(cid: u32, port: u32) -> Address {
        Address::Vsock(VsockAddr::new(cid, port))
    }

    fn unix(path: &std::path::Path) -> io::Result<Address> {
        Ok(Address::Unix(UnixAddr::new(path)?))
    }

    fn bind(&self, socket: &OwnedFd) -> nix::Result<()> {
        match self {
            Address::Vsock(a) => bind(socket.as_raw_fd(), a),
            Address::Unix(a) => bind(socket.as_raw_fd(), a),
        }
    }

    fn connect(&self, socket: &OwnedFd) -> nix::Result<()> {
        match self {
            Address::Vsock(a) => connect(socket.as_raw_fd(), a),
            Address::Unix(a) => connect(socket.as_raw_fd(), a),
        }
    }
}

impl Dialled {
    /// The connection, once the host has taken it.
    ///
    /// # Errors
    /// The host refused it or did not answer in time.
    pub async fn connected(self) -> Result<Stream, DoorError> {
        let Dialled { socket, at } = self;
        let wait = async {
            let socket = polled(socket, Interest::WRITABLE)?;
            socket.writable().await?.retain_ready();
            match nix::sys::socket::getsockopt(socket.get_ref(), sockopt::SocketError)? {
                0 => Stream::new(socket.into_inner()),
                errno => Err(io::Error::from_raw_os_error(errno)),
            }
        };
        match tokio::time::timeout(Duration::from_millis(CONNECT_TIMEOUT_MS), wait).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(cause)) => Err(DoorError::Dial { at, cause }),
            Err(_) => {
                let cause = io::ErrorKind::TimedOut.into();
                Err(DoorError::Dial { at, cause })
            }
        }
    }
}

impl Listener {
    /// Hands every stream of the host to `take`, for ever; streams of anybody else are closed.
    ///
    /// # Errors
    /// The listening socket itself is broken.
    pub async fn accept_each(self, take: impl Fn(Stream)) -> io::Result<()> {
        let socket = polled(self.socket, Interest::READABLE)?;
        loop {
            let mut guard = socket.readable().await?;
            match guard.try_io(|listener| accept(listener.get_ref())) {
                Ok(Ok(socket)) if !self.vsock || from_host(&socket) => {
                    // A stream that cannot be polled is closed, which is all that can be said to it.
                    if let Ok(stream) = Stream::new(socket) {
                        take(stream);
                    }
                }
                Ok(Ok(_stranger)) => {}
                Ok(Err(e)) if is_transient(&e) => {}
                Ok(Err(e)) => return Err(e),
                Err(_would_block) => {}
            }
        }
    }
}

fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let raw = accept4(listener.as_raw_fd(), flags)?;
    Ok(own(raw))
}

#[allow(unsafe_code)] // accept4 hands out a raw descriptor
fn own(raw: i32) -> OwnedFd {
    // SAFETY: accept4 has just made this descriptor for us; nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

/// The peer went away before it was accepted: its problem, not the listener's (accept(2)).
fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}

fn from_host(socket: &OwnedFd) -> bool {
    getpeername::<VsockAddr>(socket.as_raw_fd())
        .is_ok_and(|peer| peer.len() > 0 && u64::from(peer.cid()) == HOST_CID)
}

/// The RPC channel, which tells when it has ended: the agent has nobody left to serve then.
#[derive(Debug)]
pub struct RpcStream {
    stream: Stream,
    ended: watch::Sender<bool>,
}

impl RpcStream {
    /// Wraps the channel; the receiver turns true at its end.
    pub fn new(stream: Stream) -> (RpcStream, watch::Receiver<bool>) {
        let (ended, told) = watch::channel(false);
        (RpcStream { stream, ended }, told)
    }
}

impl Drop for RpcStream {
    fn drop(&mut self) {
        self.ended.send_replace(true);
    }
}

impl AsyncRead for RpcStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buffer);
        match &read {
            Poll::Ready(Ok(())) if buffer.filled().len() == before => {
                self.ended.send_replace(true);
            }
            Poll::Ready(Err(_)) => {
                self.ended.send_replace(true);
            }
            Poll::Ready(Ok(())) | Poll::Pending => {}
        }
        read
    }
}

impl AsyncWrite for RpcStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
