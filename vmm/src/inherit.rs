//! What the process was started with: its configuration and every resource, as inherited fds. Everything else
//! that came along, fds and environment, is let go before anything else happens.
#![allow(unsafe_code)] // fd numbers become owned fds here, and the environment is emptied.

use capsid_protocol::machine::{CONFIG_MAX_BYTES, ConfigError, FdNumber, MachineConfig};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// Why the configuration or what it names could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    /// `--config-fd` names no fd of ours.
    #[error("config fd {0} is not open; the owner passes the configuration on an fd of 3 or more")]
    ConfigFd(RawFd),
    /// Reading it failed.
    #[error("cannot read the configuration from fd {fd}")]
    Read {
        /// The fd.
        fd: RawFd,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// Refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A resource that is not there.
    #[error("{what} is fd {fd}, which is not open")]
    NotOpen {
        /// The field of the configuration.
        what: &'static str,
        /// Its number.
        fd: FdNumber,
    },
    /// The kernel has no `close_range(2)`.
    #[error("cannot close fds that nobody named; a host kernel of 5.10 or newer is needed")]
    CloseRange(#[source] io::Error),
}

/// The resources of one VM, by what they are.
pub struct Inherited {
    /// The configuration that named them.
    pub config: MachineConfig,
    /// The guest kernel.
    pub kernel: File,
    /// The initramfs.
    pub initramfs: Option<File>,
    /// The VMM's end of the owner channel.
    pub owner: Option<OwnedFd>,
    /// The VMM's end of the control channel.
    pub control: Option<OwnedFd>,
    /// The trees of the shares, in the order of the configuration.
    pub shares: Vec<OwnedFd>,
    /// The files of the disks, in the order of the configuration.
    pub disks: Vec<File>,
    /// The tap devices of the network cards, in the order of the configuration.
    pub nics: Vec<Vec<OwnedFd>>,
    /// Where the serial port writes.
    pub serial: Option<OwnedFd>,
    /// Where the report goes.
    pub report: Option<OwnedFd>,
}

/// Empties the environment, which is the owner's and may hold what is no business of a guest: also the copy
/// that `/proc/PID/environ` shows.
///
/// To be called once, first of all, while the process has one thread.
pub fn empty_environment() {
    unsafe extern "C" {
        static mut environ: *mut *mut libc::c_char;
    }
    // SAFETY: one thread so far, so nobody reads the environment meanwhile. `environ` is a list of pointers to
    // NUL-terminated strings that ends with a null pointer (environ(7)), in the writable memory that the kernel
    // put them in; each is overwritten up to its NUL, and `clearenv` lets go of the list.
    unsafe {
        let mut entry = environ;
        while !entry.is_null() && !(*entry).is_null() {
            libc::memset((*entry).cast(), 0, libc::strlen(*entry));
            entry = entry.add(1);
        }
        libc::clearenv();
    }
}

/// Makes all threads share one heap. With one for each, glibc opens `/proc/sys/vm/overcommit_memory` on the thread that first
/// gives memory of its heap back (malloc/arena.c, check_may_shrink_heap), which no filter of ours allows; and each heap costs
/// memory.
///
/// To be called once, first of all, while the process has one thread.
pub fn one_heap() {
    // SAFETY: sets a number inside glibc, before there is a second thread.
    let set = unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    debug_assert_eq!(set, 1, "glibc knows M_ARENA_MAX");
}

/// Reads the configuration from `config_fd`, takes every fd that it names, and closes all others but 0, 1, 2.
///
/// To be called once: the numbers become fds that this process owns.
///
/// # Errors
/// The configuration was refused, or an fd that it names is not open.
pub fn take(config_fd: RawFd) -> Result<Inherited, InheritError> {
    if config_fd <= 2 || !is_open(config_fd) {
        return Err(InheritError::ConfigFd(config_fd));
    }
    // SAFETY: it is open, and our owner gave it to us to read and to close.
    let mut file = File::from(unsafe { OwnedFd::from_raw_fd(config_fd) });
    let mut json = Vec::with_capacity(4096);
    let limit = CONFIG_MAX_BYTES as u64 + 1;
    (&mut file)
        .take(limit)
        .read_to_end(&mut json)
        .map_err(|cause| InheritError::Read {
            fd: config_fd,
            cause,
        })?;
    drop(file);
    let config = MachineConfig::from_json(&json)?;
    close_all_but(&config.fds())?;

    let owner = config.vsock.as_ref().map(|vsock| vsock.owner_fd);
    let shares = config.shares.iter();
    let disks = config.disks.iter();
    let nics = config.nics.iter();
    Ok(Inherited {
        kernel: File::from(own("kernel_fd", config.kernel_fd)?),
        initramfs: own_some("initramfs_fd", config.initramfs_fd)?.map(File::from),
        owner: own_some("owner_fd", owner)?,
        control: own_some("control_fd", config.control_fd)?,
        shares: shares
            .map(|share| own("tree_fd", share.tree_fd))
            .collect::<Result<_, _>>()?,
        disks: disks
            .map(|disk| own("disk fd", disk.fd).map(File::from))
            .collect::<Result<_, _>>()?,
        nics: nics
            .map(|nic| nic.tap_fds.iter().map(|fd| own("tap fd", *fd)).collect())
            .collect::<Result<_, _>>()?,
        serial: own_some("serial fd", config.serial.map(|serial| serial.fd))?,
        report: own_some("report_fd", config.report_fd)?,
        config,
    })
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: F_GETFD reads a flag of an fd and touches no memory; a closed fd is an error.
    unsafe { libc::fcntl(fd, libc::F_GETFD) != -1 }
}

fn own(what: &'static str, fd: FdNumber) -> Result<OwnedFd, InheritError> {
    if !is_open(fd.get()) {
        return Err(InheritError::NotOpen { what, fd });
    }
    // SAFETY: it is open, our owner gave it to us, and the configuration names each number once.
    Ok(unsafe { OwnedFd::from_raw_fd(fd.get()) })
}

fn own_some(what: &'static str, fd: Option<FdNumber>) -> Result<Option<OwnedFd>, InheritError> {
    fd.map(|fd| own(what, fd)).transpose()
}

fn close_all_but(kept: &[FdNumber]) -> Result<(), InheritError> {
    let mut kept: Vec<u32> = kept.iter().map(|fd| fd.get().unsigned_abs()).collect();
    kept.sort_unstable();
    let mut first = 3;
    for fd in kept {
        if fd > first {
            close_range(first, fd - 1)?;
        }
        first = fd + 1;
    }
    close_range(first, u32::MAX)
}

fn close_range(first: u32, last: u32) -> Result<(), InheritError> {
    // SAFETY: nothing in this process owns an fd of this range yet: it has just begun, and what it inherited
    // and was not told of is nobody's.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } {
        0 => Ok(()),
        _ => Err(InheritError::CloseRange(io::Error::last_os_error())),
    }
}
