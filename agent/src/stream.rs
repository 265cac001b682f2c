//! One connected byte stream to the host (vsock in a guest, a unix socket under test), and the readiness
//! loop shared by every descriptor the agent copies between.
#![allow(unsafe_code)] // registering a descriptor with the event loop is unsafe since tokio 1.54

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// Registers a descriptor with the event loop.
///
/// # Errors
/// It cannot be polled.
pub fn polled(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open and keeps its number until it is dropped, which the AsyncFd that owns
    // it does last; nobody here replaces it.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// A non-blocking descriptor in the event loop: a stream socket, a pipe end or a pty master.
#[derive(Debug)]
pub struct Stream(AsyncFd<OwnedFd>);

impl Stream {
    /// Takes the descriptor over and makes it non-blocking.
    ///
    /// # Errors
    /// The descriptor cannot be polled.
    pub fn new(fd: OwnedFd) -> io::Result<Stream> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Stream(polled(fd, Interest::READABLE | Interest::WRITABLE)?))
    }

    /// For a descriptor of which only one direction exists (a pipe end).
    ///
    /// # Errors
    /// The descriptor cannot be polled.
    pub fn one_way(fd: OwnedFd, interest: Interest) -> io::Result<Stream> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Stream(polled(fd, interest)?))
    }

    /// Reads what is there now; `WouldBlock` if nothing is.
    ///
    /// # Errors
    /// As read(2).
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match rustix::io::read(self.0.get_ref(), &mut *buffer) {
                Err(rustix::io::Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
    }

    /// Waits until there may be something to read. Cancel safe.
    ///
    /// # Errors
    /// The event loop is gone.
    pub async fn readable(&self) -> io::Result<()> {
        let mut guard = self.0.readable().await?;
        // Readiness is an edge: it is cleared here and asked again of the descriptor itself, which
        // tells whether something came in between.
        guard.clear_ready();
        Ok(())
    }

    /// Reads at least one byte, or 0 at the end.
    ///
    /// # Errors
    /// As read(2).
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let mut guard = self.0.readable().await?;
            let read = guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut *buffer)?));
            match read {
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(result) => return result,
                Err(_would_block) => {}
            }
        }
    }

    /// Writes all of `bytes`.
    ///
    /// # Errors
    /// As write(2).
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let mut guard = self.0.writable().await?;
            match guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?)) {
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(written) => bytes = bytes.get(written?..).unwrap_or_default(),
                Err(_would_block) => {}
            }
        }
        Ok(())
    }

    /// True once the peer has closed both directions.
    pub fn is_hung_up(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(self.0.get_ref(), PollFlags::empty())];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let closed = PollFlags::HUP | PollFlags::ERR;
        poll(&mut fds, Some(&now)).is_ok() && fds.iter().any(|fd| fd.revents().intersects(closed))
    }

    /// Half-close: the peer reads end of file after the last byte.
    pub fn end_writing(&self) {
        // A peer that is gone needs no half-close.
        let _ = rustix::net::shutdown(self.0.get_ref(), rustix::net::Shutdown::Write);
    }

    /// Takes no more bytes from the peer.
    pub fn end_reading(&self) {
        let _ = rustix::net::shutdown(self.0.get_ref(), rustix::net::Shutdown::Read);
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.get_ref().as_fd()
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            let unfilled = buffer.initialize_unfilled();
            match guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), &mut *unfilled)?)) {
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(read) => {
                    buffer.advance(read?);
                    return Poll::Ready(Ok(()));
                }
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            match guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), bytes)?)) {
                Ok(Err(e)) if e.kind() == io::ErrorKind::Interrupted => {}
                Ok(written) => return Poll::Ready(written),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.end_writing();
        Poll::Ready(Ok(()))
    }
}
