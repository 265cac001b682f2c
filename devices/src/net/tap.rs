//! A tap device, by one of its queues: one packet a call, with the header of virtio in front.
//!
//! `unsafe`: ioctls of the driver, and packets straight between guest memory and the kernel.
#![allow(unsafe_code)]

use super::features::{TUN_ALWAYS, TUN_USO};
use crate::syscall::{VECTORS_MAX, count, vector};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use vm_memory::VolatileSlice;

/// Bytes of `struct virtio_net_hdr_v1` (section 5.1.6).
pub(super) const HEADER_BYTES: usize = 12;

/// Most packets that are thrown away at once: twice what a tap device keeps, unless it was told to keep more.
const DISCARDED_MAX: u64 = 2000;

/// `TUNSETOFFLOAD`, the one ioctl that is made after the guest has started.
pub const TAP_SET_OFFLOAD: u32 = 0x4004_54d0;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

/// Why an fd cannot be a card's.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No tap device.
    #[error("it is no queue of a tap device")]
    NotTap(#[source] Errno),
    /// Its packets have another form.
    #[error("it has to be made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, and has flags {0:#x}")]
    Flags(u16),
    /// A setting was refused.
    #[error("cannot {0}")]
    Set(&'static str, #[source] Errno),
}

/// One queue of a tap device.
#[derive(Debug)]
pub(super) struct Tap(OwnedFd);

impl Tap {
    /// Checks what it is, and has it put the header of virtio in front of packets.
    ///
    /// Each ioctl of a tap device, and its end, waits for the one lock of all network settings of the host (`rtnl_lock`,
    /// drivers/net/tun.c), those that only ask included: an owner that had done these would spare nobody the wait.
    ///
    /// # Errors
    /// See [`TapError`].
    pub(super) fn new(fd: OwnedFd) -> Result<Tap, TapError> {
        let tap = Tap(fd);
        let flags = tap.flags().map_err(TapError::NotTap)?;
        let form = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
        if flags & form != form {
            return Err(TapError::Flags(flags));
        }
        let status = fcntl_getfl(&tap.0).map_err(|e| TapError::Set("read its flags", e))?;
        fcntl_setfl(&tap.0, status | OFlags::NONBLOCK)
            .map_err(|e| TapError::Set("make it not block", e))?;
        let size = HEADER_BYTES as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int (drivers/net/tun.c).
        let done = unsafe { libc::ioctl(tap.0.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) };
        count(done as isize).map_err(|e| TapError::Set("set the size of its header", e))?;
        Ok(tap)
    }

    /// Leaves nothing to the guest yet; whether it can cut UDP packets. Of a device with several queues, one is enough.
    ///
    /// # Errors
    /// See [`TapError`].
    pub(super) fn leave_nothing(&self) -> Result<bool, TapError> {
        let uso = self.set_offload(TUN_ALWAYS | TUN_USO).is_ok();
        self.set_offload(0)
            .map_err(|e| TapError::Set("set its offloads", e))?;
        Ok(uso)
    }

    /// A socket in place of a tap device: one end of a pair of SOCK_DGRAM that does not block. Its offloads are nobody's.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn in_place_of_one(socket: OwnedFd) -> Tap {
        Tap(socket)
    }

    fn flags(&self) -> Result<u16, Errno> {
        // SAFETY: `struct ifreq` is plain data, for which zeroes are a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF writes a `struct ifreq`.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), TUNGETIFF, &raw mut request) };
        count(done as isize)?;
        // SAFETY: TUNGETIFF has filled this member.
        Ok(unsafe { request.ifr_ifru.ifru_flags } as u16)
    }

    /// What the tap may leave to who reads it, in its own flags.
    ///
    /// # Errors
    /// It knows one of them not.
    pub(super) fn set_offload(&self, flags: u32) -> Result<(), Errno> {
        let request = libc::c_ulong::from(TAP_SET_OFFLOAD);
        // SAFETY: TUNSETOFFLOAD takes a number and no pointer.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), request, libc::c_ulong::from(flags)) };
        match count(done as isize) {
            // The socket of a test.
            #[cfg(any(test, feature = "testing"))]
            Err(_) if rustix::net::sockopt::socket_type(&self.0).is_ok() => Ok(()),
            set => set.map(|_| ()),
        }
    }

    /// Sends one packet with its header.
    ///
    /// # Errors
    /// `AGAIN`: there is no room now. Anything else: the packet is none.
    pub(super) fn send(&self, pieces: &[VolatileSlice<'_>]) -> Result<usize, Errno> {
        let vectors: Vec<libc::iovec> = pieces.iter().take(VECTORS_MAX).map(vector).collect();
        let length = vectors.len() as libc::c_int;
        // SAFETY: each vector lies whole inside guest memory (checked by `chain`), which the borrow behind `pieces` keeps mapped; the
        // kernel only reads it.
        let done = unsafe { libc::writev(self.0.as_raw_fd(), vectors.as_ptr(), length) };
        count(done)
    }

    /// Receives one packet with its header into host memory.
    ///
    /// # Errors
    /// `AGAIN`: there is none now.
    pub(super) fn receive_to(&self, packet: &mut [u8]) -> Result<usize, Errno> {
        rustix::io::read(&self.0, packet)
    }

    /// Throws away what waits to be received, which an earlier driver did not take or which comes while the cable is pulled;
    /// how many packets it was.
    pub(super) fn discard(&self) -> u64 {
        for discarded in 0..DISCARDED_MAX {
            // Too small for any packet, which is an error, but the packet is gone.
            let read = rustix::io::read(&self.0, &mut [0; 1]);
            if matches!(read, Err(Errno::AGAIN | Errno::BADFD)) {
                return discarded;
            }
        }
        DISCARDED_MAX
    }

    /// Receives one packet with its header; what does not fit is lost.
    ///
    /// # Errors
    /// `AGAIN`: there is none now.
    ///
    /// # Safety
    /// The vectors lie in memory that is mapped and that no Rust reference names.
    pub(super) unsafe fn receive(&self, vectors: &[libc::iovec]) -> Result<usize, Errno> {
        let length = vectors.len().min(VECTORS_MAX) as libc::c_int;
        // SAFETY: the caller's promise.
        let done = unsafe { libc::readv(self.0.as_raw_fd(), vectors.as_ptr(), length) };
        count(done)
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
