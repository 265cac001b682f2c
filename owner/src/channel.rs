//! The owner channel ([`capsid_protocol::vsock`]): one `SOCK_SEQPACKET` socket to the VMM, each packet with one fd.
//! What the VMM sends is hostile: a packet that was not expected is closed and forgotten.

use capsid_protocol::vsock::OwnerMessage;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

/// How long a VMM may leave a packet of ours unread, in ms.
const SEND_TIMEOUT_MS: u64 = 10_000;

/// So many packets that are none are passed over in one call; a VMM that sends more is not listened to.
const STRAYS_MAX: usize = 16;

/// Our end.
#[derive(Clone, Debug)]
pub struct Owner(Arc<OwnedFd>);

impl Owner {
    /// Both ends: ours and the VMM's.
    ///
    /// # Errors
    /// The kernel gave no sockets.
    pub fn pair() -> io::Result<(Owner, OwnedFd)> {
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let timeout = Duration::from_millis(SEND_TIMEOUT_MS);
        set_socket_timeout(&ours, Timeout::Send, Some(timeout))?;
        Ok((Owner(Arc::new(ours)), theirs))
    }

    /// Makes both directions return [`io::ErrorKind::WouldBlock`] instead of waiting; for owners with an event loop, which is told of
    /// this socket by [`AsFd`].
    ///
    /// # Errors
    /// The kernel's.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        Ok(rustix::io::ioctl_fionbio(&*self.0, true)?)
    }

    /// Connects to a port of the guest. A guest that refuses shows as the end of the stream before its first byte.
    ///
    /// # Errors
    /// The VMM is gone or does not take packets.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        let packet = OwnerMessage::Connect { port }.encode();
        let fds = [theirs.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::other("the control message does not fit"));
        }
        let sent = sendmsg(
            &*self.0,
            &[IoSlice::new(&packet)],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        match sent {
            OwnerMessage::BYTES => Ok(ours),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    /// Waits for the next connection that the guest has made to a listed port; `None` when the VMM is gone. Packets
    /// that are none are dropped, some of them.
    ///
    /// # Errors
    /// The kernel's, or too many packets that are none.
    pub fn accept(&self) -> io::Result<Option<(u32, OwnedFd)>> {
        for _ in 0..STRAYS_MAX {
            // One byte more than a packet, so that a longer one is seen as such.
            let mut packet = [0u8; OwnerMessage::BYTES + 1];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut buffers = [IoSliceMut::new(&mut packet)];
            let received = recvmsg(
                &*self.0,
                &mut buffers,
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            );
            let length = match received {
                Ok(received) => received.bytes,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            // Every fd is taken out, so that those nobody wants are closed.
            let mut fds: Vec<OwnedFd> = Vec::new();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    fds.extend(received);
                }
            }
            if length == 0 {
                return Ok(None);
            }
            let message = OwnerMessage::decode(packet.get(..length).unwrap_or_default());
            if let (Ok(OwnerMessage::Accepted { port }), Some(fd)) = (message, fds.pop()) {
                return Ok(Some((port, fd)));
            }
        }
        Err(io::Error::other("the VMM sends what is no message"))
    }
}

impl AsFd for Owner {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn send(to: &OwnedFd, packet: &[u8], fds: &[&UnixStream]) {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        }
        sendmsg(
            to,
            &[IoSlice::new(packet)],
            &mut control,
            SendFlags::NOSIGNAL,
        )
        .expect("sent");
    }

    #[test]
    fn a_connection_of_the_guest_comes_with_its_port_and_fd() {
        let (owner, vmm) = Owner::pair().expect("sockets");
        let (mut ours, theirs) = UnixStream::pair().expect("sockets");
        send(
            &vmm,
            &OwnerMessage::Accepted { port: 1024 }.encode(),
            &[&theirs],
        );
        drop(theirs);
        let (port, fd) = owner.accept().expect("received").expect("a connection");
        assert_eq!(port, 1024);
        UnixStream::from(fd).write_all(b"x").expect("connected");
        let mut byte = [0];
        ours.read_exact(&mut byte).expect("connected");
    }

    #[test]
    fn what_is_no_message_is_dropped_with_its_fd() {
        let (owner, vmm) = Owner::pair().expect("sockets");
        let (mut ours, theirs) = UnixStream::pair().expect("sockets");
        send(&vmm, b"too short", &[&theirs]);
        send(
            &vmm,
            &OwnerMessage::Connect { port: 1 }.encode(),
            &[&theirs],
        );
        send(&vmm, &OwnerMessage::Accepted { port: 1 }.encode(), &[]);
        drop((vmm, theirs));
        assert!(owner.accept().expect("received").is_none());
        let mut byte = [0];
        assert_eq!(ours.read(&mut byte).expect("closed"), 0);
    }

    #[test]
    fn an_owner_with_an_event_loop_never_waits() {
        let (owner, vmm) = Owner::pair().expect("sockets");
        owner.set_nonblocking().expect("a socket");
        let error = owner.accept().expect_err("nothing there");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        // A VMM that takes nothing: sooner or later its socket is full.
        let error = (0..100_000).find_map(|_| owner.connect(1025).err());
        assert_eq!(
            error.expect("full").kind(),
            io::ErrorKind::WouldBlock,
            "and not an endless wait"
        );
        drop(vmm);
    }

    #[test]
    fn connecting_to_a_vmm_that_is_gone_is_an_error() {
        let (owner, vmm) = Owner::pair().expect("sockets");
        drop(vmm);
        assert!(owner.connect(1025).is_err());
    }
}
