//! The owner channel: the one socket that joins a VMM to the process it runs for
//! ([`capsid_protocol::vsock`]).
//!
//! The owner's connects come in by it, each with the host's end of the connection; the guest's connects to
//! the ports that the configuration lists go out by it. When the owner's end closes, the VM ends.
//!
//! Trusts the owner as far as this: what it sends is obeyed or, if it is no message, ends the VM, since then
//! one of the two is not what the other takes it for. Trusts nothing of the guest: it dials the listed ports, each
//! as often as listed, and no more may wait for the owner than its socket holds.

use crate::end::{End, Ends};
use crate::machine::PowerOff;
use crate::record::Phases;
use capsid_devices::event::{EventLoop, Interest, Readiness, Subscriber};
use capsid_devices::virtio::device::DeviceError;
use capsid_devices::vsock::{HostSide, VsockDevice, VsockHandle};
use capsid_protocol::exit::VmmExit;
use capsid_protocol::machine::GuestDial;
use capsid_protocol::vsock::{
    AGENT_RPC_PORT, AGENT_STREAM_PORT, BadOwnerMessage, GUEST_CID, OwnerMessage, StreamHeader,
};
use rustix::io::Errno;
use rustix::net::sockopt::socket_type;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, send,
    sendmsg, socketpair,
};
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

/// Most messages taken in one turn of the loop, so that a busy owner does not hold up the guest.
const MESSAGES_PER_TURN: usize = 16;

/// Why the channel cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The fd is not the end of a `SOCK_SEQPACKET` pair.
    #[error("the owner channel is not a SOCK_SEQPACKET socket")]
    NotSeqpacket,
    /// The vsock device could not be made.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The event loop cannot watch it.
    #[error("cannot watch the owner channel")]
    Watch(#[source] std::io::Error),
}

impl ChannelError {
    /// The exit code that goes with it.
    pub fn exit(&self) -> VmmExit {
        match self {
            ChannelError::NotSeqpacket => VmmExit::BadConfig,
            ChannelError::Device(_) | ChannelError::Watch(_) => VmmExit::Device,
        }
    }
}

/// What of the owner's messages is none.
#[derive(Debug, thiserror::Error)]
enum BadMessage {
    #[error(transparent)]
    Form(#[from] BadOwnerMessage),
    #[error("owner message is too long")]
    TooLong,
    #[error("owner message carries {0} fds, expected 1")]
    Fds(usize),
    #[error("owner message accepts a connection, which only the VMM does")]
    Accepted,
}

/// What came of one look at the channel.
enum Received {
    Connect {
        port: u32,
        host: OwnedFd,
    },
    /// A message whose fd found no place in this process: it is closed, as for any refusal.
    NoRoom,
    NothingYet,
    Closed,
    Bad(BadMessage),
    Failed(Errno),
}

/// The open channel. Its drop stops listening to the owner.
pub struct OwnerChannel {
    socket: Arc<OwnedFd>,
    event_loop: Arc<dyn EventLoop>,
    vsock: VsockHandle,
}

impl OwnerChannel {
    /// Makes the vsock device whose host side is the owner at the other end of `socket`, and listens to
    /// the owner on `event_loop` from now on. The guest may dial the ports of `guest_may_dial`. A
    /// closed channel or a message that is none is reported to `ends`.
    ///
    /// # Errors
    /// The socket is of another kind, or the kernel lacks resources.
    pub fn open(
        socket: OwnedFd,
        guest_may_dial: &[GuestDial],
        event_loop: Arc<dyn EventLoop>,
        ends: Ends,
        phases: Phases,
    ) -> Result<(OwnerChannel, VsockDevice), ChannelError> {
        if socket_type(&socket) != Ok(SocketType::SEQPACKET) {
            return Err(ChannelError::NotSeqpacket);
        }
        let socket = Arc::new(socket);
        let dialer = Dialer {
            socket: Arc::clone(&socket),
            left: guest_may_dial.to_vec(),
            phases,
        };
        let device = VsockDevice::new(GUEST_CID, Arc::clone(&event_loop), Box::new(dialer))?;
        let vsock = device.handle();
        let listener = Arc::new(Mutex::new(Listener {
            socket: Arc::clone(&socket),
            event_loop: Arc::clone(&event_loop),
            vsock: vsock.clone(),
            ends,
        }));
        event_loop
            .watch(socket.as_raw_fd(), Interest::READ, 0, listener)
            .map_err(ChannelError::Watch)?;
        let channel = OwnerChannel {
            socket,
            event_loop,
            vsock,
        };
        Ok((channel, device))
    }
}

impl Drop for OwnerChannel {
    fn drop(&mut self) {
        self.event_loop.forget(self.socket.as_raw_fd());
    }
}

impl PowerOff for OwnerChannel {
    /// Dials the agent's stream port from inside and leaves the word. True if it is on its way; whether the
    /// guest listens and obeys shows in its end.
    fn power_off(&mut self) -> bool {
        let Ok((ours, theirs)) = stream_pair() else {
            return false;
        };
        let header = StreamHeader::PowerOff.encode();
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        // A new socket has room for 16 bytes. They are read before the end of our side, even if the guest
        // answers after it.
        let written = send(&ours, &header, flags) == Ok(header.len());
        written && self.vsock.connect(AGENT_STREAM_PORT, theirs).is_ok()
    }
}

/// Both ends of a new stream, for a connection.
fn stream_pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
}

/// Where the guest's connects go. Kept by the device.
struct Dialer {
    socket: Arc<OwnedFd>,
    /// The listed ports and how many connections each may still make.
    left: Vec<GuestDial>,
    /// Where the agent's first word is noted.
    phases: Phases,
}

impl HostSide for Dialer {
    fn dial(&mut self, port: u32) -> Option<OwnedFd> {
        let listed = self.left.iter_mut().find(|listed| listed.port == port)?;
        let left = listed.connections.checked_sub(1)?;
        let (guest, owner) = stream_pair().ok()?;
        // A channel that is full or closed: the guest is refused, and the connection not counted.
        send_accepted(self.socket.as_fd(), port, &owner).ok()?;
        listed.connections = left;
        if port == AGENT_RPC_PORT {
            self.phases.ended("agent");
        }
        Some(guest)
    }
}

fn send_accepted(
    channel: std::os::fd::BorrowedFd<'_>,
    port: u32,
    owner: &OwnedFd,
) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [owner.as_fd()];
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(Errno::NOBUFS);
    }
    let message = OwnerMessage::Accepted { port }.encode();
    // A packet goes whole or not at all.
    sendmsg(
        channel,
        &[IoSlice::new(&message)],
        &mut control,
        SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
    )?;
    Ok(())
}

/// Hears the owner.
struct Listener {
    socket: Arc<OwnedFd>,
    event_loop: Arc<dyn EventLoop>,
    vsock: VsockHandle,
    ends: Ends,
}

impl Subscriber for Listener {
    fn ready(&mut self, _token: u64, _readiness: Readiness) {
        for _ in 0..MESSAGES_PER_TURN {
            let end = match receive(&self.socket) {
                Received::Connect { port, host } => {
                    // Refused: the fd is closed, which is how the owner reads of it.
                    let _ = self.vsock.connect(port, host);
                    continue;
                }
                Received::NoRoom => continue,
                Received::NothingYet => return,
                Received::Closed => End::new(
                    VmmExit::OwnerGone,
                    "the owner closed its end of the owner channel",
                ),
                Received::Bad(error) => End::from_error(VmmExit::BadConfig, &error),
                Received::Failed(error) => {
                    let why = format!("cannot read the owner channel: {error}");
                    End::new(VmmExit::Internal, why)
                }
            };
            self.ends.report(end);
            self.event_loop.forget(self.socket.as_raw_fd());
            return;
        }
    }
}

/// Takes one message without waiting.
fn receive(socket: &OwnedFd) -> Received {
    // One byte more than a message, so that a longer one shows.
    let mut packet = [0; OwnerMessage::BYTES + 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = rustix::io::retry_on_intr(|| {
        recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut packet)],
            &mut control,
            flags,
        )
    });
    let message = match message {
        Ok(message) => message,
        Err(Errno::AGAIN) => return Received::NothingYet,
        // The owner went away without reading all that the guest dialled.
        Err(Errno::CONNRESET) => return Received::Closed,
        Err(error) => return Received::Failed(error),
    };
    let mut fds: Vec<OwnedFd> = control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect();
    if message.bytes == 0 && fds.is_empty() {
        return Received::Closed;
    }
    if message.flags.contains(ReturnFlags::TRUNC) {
        return Received::Bad(BadMessage::TooLong);
    }
    let cut = message.flags.contains(ReturnFlags::CTRUNC);
    if cut && fds.is_empty() {
        return Received::NoRoom;
    }
    let count = fds.len() + usize::from(cut);
    let decoded = OwnerMessage::decode(packet.get(..message.bytes).unwrap_or_default());
    match (decoded, fds.pop()) {
        (Err(error), _) => Received::Bad(error.into()),
        (Ok(OwnerMessage::Accepted { .. }), _) => Received::Bad(BadMessage::Accepted),
        (Ok(OwnerMessage::Connect { port }), Some(host)) if count == 1 => {
            Received::Connect { port, host }
        }
        (Ok(OwnerMessage::Connect { .. }), _) => Received::Bad(BadMessage::Fds(count)),
    }
}

#[cfg(test)]
mod tests;
