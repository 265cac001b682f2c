//! The host's side of a connection: a stream socket whose other end the owner of the VM holds, and the bytes
//! of the guest that it has not taken yet.
//!
//! Moves bytes straight between the socket and guest memory. The slices it is given were checked by
//! [`crate::virtio::chain`]; it adds no trust to them and never looks at what they hold. The module needs
//! `unsafe` because the kernel must be given guest memory by address: a reference to memory that the guest
//! writes at any time would be undefined.
#![allow(unsafe_code)]

use crate::syscall::{self, count};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown, SocketType};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use vm_memory::VolatileSlice;

/// Most slices handed to the kernel in one call (the kernel's own limit is 1024).
const SLICES_PER_CALL: usize = 64;
/// Most bytes of the host that are thrown away when its socket is closed; a unix socket holds about 200 KiB.
const DISCARD_MAX_BYTES: usize = 1024 * 1024;
/// Bytes moved at once where guest memory cannot be used directly.
const CHUNK_BYTES: usize = 4096;

/// The fd given for a connection is not a stream socket.
#[derive(Debug, thiserror::Error)]
#[error("fd for a vsock connection is not a stream socket")]
pub struct NotAStream;

/// A connected stream socket. No call on it blocks, whatever its flags, and none raises SIGPIPE.
pub(super) struct HostSocket(OwnedFd);

impl HostSocket {
    /// Takes the socket.
    pub(super) fn new(fd: OwnedFd) -> Result<HostSocket, NotAStream> {
        match rustix::net::sockopt::socket_type(&fd) {
            Ok(SocketType::STREAM) => Ok(HostSocket(fd)),
            Ok(_) | Err(_) => Err(NotAStream),
        }
    }

    /// Receives into `slices`; 0 is the end of the host's stream. Takes as many slices as fit one call.
    pub(super) fn receive(&self, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let mut vectors = Vectors::of(slices);
        let mut message = vectors.message();
        loop {
            // SAFETY: each vector is a whole slice of guest memory, which stays mapped as long as the
            // borrow behind `slices`, and which the kernel may write as the guest itself does.
            let received = unsafe {
                libc::recvmsg(
                    self.0.as_raw_fd(),
                    &raw mut message,
                    libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC,
                )
            };
            match count(received) {
                Err(Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }

    /// Sends from `slices` what the socket takes of them. Takes as many slices as fit one call.
    pub(super) fn send(&self, slices: &[VolatileSlice<'_>]) -> io::Result<usize> {
        let mut vectors = Vectors::of(slices);
        let message = vectors.message();
        loop {
            // SAFETY: as in `receive`; the kernel only reads.
            let sent = unsafe {
                libc::sendmsg(
                    self.0.as_raw_fd(),
                    &raw const message,
                    libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                )
            };
            match count(sent) {
                Err(Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }

    fn send_bytes(&self, bytes: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(rustix::io::retry_on_intr(|| {
            rustix::net::send(&self.0, bytes, flags)
        })?)
    }

    /// The host reads the end of the guest's stream behind what was sent.
    pub(super) fn end_guest_stream(&self) {
        // Fails only when the host is gone, which the loop tells.
        let _ = rustix::net::shutdown(&self.0, Shutdown::Write);
    }

    /// The host's writes fail from now on: the guest reads no more.
    pub(super) fn refuse_host_stream(&self) {
        // As above.
        let _ = rustix::net::shutdown(&self.0, Shutdown::Read);
    }

    /// Throws away what the host sent. Closing a unix socket with unread bytes would make the host read an
    /// error where it should read the end.
    fn discard_unread(&self) {
        let mut chunk = [0; CHUNK_BYTES];
        let mut discarded = 0;
        while discarded < DISCARD_MAX_BYTES {
            match rustix::net::recv(&self.0, &mut chunk, RecvFlags::DONTWAIT) {
                Ok((1.., count)) => discarded += count,
                Ok((0, _)) | Err(_) => break,
            }
        }
    }
}

impl Drop for HostSocket {
    fn drop(&mut self) {
        self.refuse_host_stream();
        self.discard_unread();
    }
}

impl AsRawFd for HostSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Slices as the kernel takes them.
struct Vectors {
    vectors: [libc::iovec; SLICES_PER_CALL],
    count: usize,
}

impl Vectors {
    fn of(slices: &[VolatileSlice<'_>]) -> Vectors {
        let empty = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        let mut vectors = [empty; SLICES_PER_CALL];
        for (vector, slice) in vectors.iter_mut().zip(slices) {
            *vector = syscall::vector(slice);
        }
        Vectors {
            vectors,
            count: slices.len().min(SLICES_PER_CALL),
        }
    }

    /// Points into `self`, which must outlive the call it is used for.
    fn message(&mut self) -> libc::msghdr {
        // SAFETY: a msghdr of zeros is one without address, vectors and control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.vectors.as_mut_ptr();
        message.msg_iovlen = self.count;
        message
    }
}

/// Bytes of the guest that the host's socket has not taken: at most the connection's `buf_alloc`, which the
/// credit sees to. Without memory while it is empty.
#[derive(Default)]
pub(super) struct Backlog(VecDeque<u8>);

impl Backlog {
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing waits.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Forgets what waits.
    pub(super) fn clear(&mut self) {
        self.0 = VecDeque::new();
    }

    fn extend(&mut self, slices: &[VolatileSlice<'_>]) {
        let mut chunk = [0u8; CHUNK_BYTES];
        for slice in slices {
            let mut rest = *slice;
            while !rest.is_empty() {
                let count = rest.copy_to(&mut chunk[..]);
                self.0.extend(chunk.iter().take(count));
                match rest.offset(count) {
                    Ok(behind) => rest = behind,
                    Err(_) => break,
                }
            }
        }
    }

    /// Sends what waits until the socket is full. Returns how much it took.
    pub(super) fn flush(&mut self, socket: &HostSocket) -> io::Result<usize> {
        let mut taken = 0;
        while !self.0.is_empty() {
            match socket.send_bytes(self.0.as_slices().0) {
                Ok(count) => {
                    self.0.drain(..count.min(self.0.len()));
                    taken += count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        if self.0.is_empty() {
            self.clear();
        }
        Ok(taken)
    }

    /// Hands a payload of the guest to the socket, behind what waits. Returns how much the socket took at
    /// once; the rest waits.
    pub(super) fn deliver(
        &mut self,
        socket: &HostSocket,
        payload: &mut [VolatileSlice<'_>],
    ) -> io::Result<usize> {
        let mut rest = payload;
        let mut taken = 0;
        while self.0.is_empty() && !rest.is_empty() {
            let offered: usize = rest
                .iter()
                .take(SLICES_PER_CALL)
                .map(VolatileSlice::len)
                .sum();
            match socket.send(rest) {
                Ok(count) => {
                    taken += count;
                    rest = advance(rest, count);
                    if count < offered {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        self.extend(rest);
        Ok(taken)
    }
}

/// The slices behind the first `count` bytes.
fn advance<'a, 'm>(
    slices: &'a mut [VolatileSlice<'m>],
    count: usize,
) -> &'a mut [VolatileSlice<'m>] {
    let mut left = count;
    let whole = slices
        .iter()
        .take_while(|slice| {
            let fits = slice.len() <= left;
            left -= if fits { slice.len() } else { 0 };
            fits
        })
        .count();
    let (_, rest) = slices.split_at_mut(whole);
    if let Some(first) = rest.first_mut() {
        // `left` is less than the slice is long.
        if let Ok(behind) = first.offset(left) {
            *first = behind;
        }
    }
    rest
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixDatagram, UnixStream};

    fn pair() -> (HostSocket, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (HostSocket::new(ours.into()).unwrap(), theirs)
    }

    fn slices(bytes: &mut [u8], size: usize) -> Vec<VolatileSlice<'_>> {
        bytes.chunks_mut(size).map(VolatileSlice::from).collect()
    }

    #[test]
    fn only_a_stream_socket_is_taken() {
        let (datagram, _other) = UnixDatagram::pair().unwrap();
        assert!(HostSocket::new(datagram.into()).is_err());
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(HostSocket::new(file.into()).is_err());
    }

    #[test]
    fn a_payload_in_many_pieces_arrives_in_order() {
        let (socket, mut host) = pair();
        let mut bytes: Vec<u8> = (0..1000u32).map(|n| n as u8).collect();
        let expected = bytes.clone();
        let mut backlog = Backlog::default();
        let taken = backlog
            .deliver(&socket, &mut slices(&mut bytes, 3))
            .unwrap();
        assert_eq!((taken, backlog.len()), (1000, 0));
        let mut read = vec![0; 1000];
        host.read_exact(&mut read).unwrap();
        assert_eq!(read, expected);
    }

    #[test]
    fn what_the_socket_does_not_take_waits_and_keeps_its_order() {
        let (socket, mut host) = pair();
        let mut backlog = Backlog::default();
        let mut sent = Vec::new();
        let mut taken = 0;
        for round in 0..40u8 {
            let mut bytes: Vec<u8> = (0..20_000u32).map(|n| (n / 7) as u8 ^ round).collect();
            sent.extend_from_slice(&bytes);
            taken += backlog
                .deliver(&socket, &mut slices(&mut bytes, 4096))
                .unwrap();
        }
        assert!(!backlog.is_empty());
        assert_eq!(taken + backlog.len(), sent.len());
        let mut read = vec![0; sent.len()];
        let mut at = 0;
        while at < read.len() {
            at += host.read(&mut read[at..]).unwrap();
            backlog.flush(&socket).unwrap();
        }
        assert!(read == sent);
        assert_eq!(backlog.0.capacity(), 0);
    }

    #[test]
    fn a_host_that_is_gone_is_an_error_and_no_signal() {
        let (socket, host) = pair();
        drop(host);
        let mut bytes = [1u8; 4];
        let error = Backlog::default()
            .deliver(&socket, &mut slices(&mut bytes, 4))
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_host_whose_last_bytes_nobody_read_reads_the_end_and_no_error() {
        let (socket, mut host) = pair();
        host.write_all(&[7; 100_000]).unwrap();
        drop(socket);
        assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
    }

    #[test]
    fn receiving_fills_the_slices_in_order_and_never_waits() {
        let (socket, mut host) = pair();
        let mut bytes = [0u8; 10];
        let error = socket.receive(&slices(&mut bytes, 4)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        host.write_all(b"abcdefg").unwrap();
        assert_eq!(socket.receive(&slices(&mut bytes, 4)).unwrap(), 7);
        assert_eq!(&bytes, b"abcdefg\0\0\0");
        drop(host);
        assert_eq!(socket.receive(&slices(&mut bytes, 4)).unwrap(), 0);
    }

    #[test]
    fn advancing_cuts_whole_and_broken_slices() {
        for count in 0..=10 {
            let mut bytes: Vec<u8> = (0..10).collect();
            let mut row = slices(&mut bytes, 4);
            let rest = advance(&mut row, count);
            let mut left = Backlog::default();
            left.extend(rest);
            let expected: Vec<u8> = (count as u8..10).collect();
            assert_eq!(Vec::from(left.0), expected);
        }
    }
}
