//! An owner's end of the control channel ([`capsid_protocol::control`]).
//!
//! Also compiled into the tests of the VMM's program, which are in its own package.

use capsid_protocol::control::{
    FrameLength, PciAddress, REPLY_MAX_BYTES, REPLY_TIMEOUT_MS, Reply, Request,
};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
    sendmsg, socketpair,
};
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// How much longer than it may take a reply is waited for: the VMMs of tests run on emulated hosts.
const SLOWER: u32 = 10;

/// The owner's end.
pub struct Control(UnixStream);

impl Control {
    /// Both ends; the VMM's is inherited by whatever is started.
    ///
    /// # Panics
    /// The kernel gave none.
    pub fn pair() -> (Control, OwnedFd) {
        let pair = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::empty(),
            None,
        );
        let (ours, theirs) = pair.expect("a pair of sockets");
        rustix::io::fcntl_setfd(&ours, rustix::io::FdFlags::CLOEXEC).expect("an fd");
        let ours = UnixStream::from(ours);
        let patience = Duration::from_millis(REPLY_TIMEOUT_MS) * SLOWER;
        ours.set_read_timeout(Some(patience)).expect("a socket");
        (Control(ours), theirs)
    }

    /// The socket, for what no request is.
    pub fn socket(&self) -> &UnixStream {
        &self.0
    }

    /// Asks, with these fds, and waits for the reply.
    ///
    /// # Panics
    /// There is none.
    pub fn ask(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> Reply {
        let frame = request.to_frame().expect("a request");
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let bytes = [IoSlice::new(&frame)];
        let sent = sendmsg(&self.0, &bytes, &mut control, SendFlags::NOSIGNAL);
        assert_eq!(sent, Ok(frame.len()));
        self.reply()
    }

    /// Waits for a reply.
    ///
    /// # Panics
    /// There is none.
    pub fn reply(&mut self) -> Reply {
        let mut length = [0; FrameLength::BYTES];
        self.0.read_exact(&mut length).expect("a reply");
        let length = FrameLength::decode(length, REPLY_MAX_BYTES).expect("a length");
        let mut json = vec![0; length.get()];
        self.0.read_exact(&mut json).expect("the reply");
        Reply::from_json(&json).expect("a reply")
    }

    /// Asks for what is answered by nothing but that it is done.
    ///
    /// # Panics
    /// It was refused.
    pub fn done(&mut self, request: &Request) {
        assert_eq!(self.ask(request, &[]), Reply::Done, "{request:?}");
    }

    /// Asks for what has to be refused; why.
    ///
    /// # Panics
    /// It was not.
    pub fn refused(&mut self, request: &Request, fds: &[BorrowedFd<'_>]) -> String {
        match self.ask(request, fds) {
            Reply::Refused { why } => why,
            reply => panic!("{request:?}: {reply:?}"),
        }
    }

    /// Attaches a device; where it is.
    ///
    /// # Panics
    /// It was refused.
    pub fn attach(&mut self, request: &Request, fds: &[impl AsFd]) -> PciAddress {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        match self.ask(request, &fds) {
            Reply::Attached { pci } => pci,
            reply => panic!("{request:?}: {reply:?}"),
        }
    }
}
