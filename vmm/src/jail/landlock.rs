//! Landlock: the calling thread and those that it starts from now on open, make, rename and execute nothing, whatever
//! file system they should ever see; where the kernel knows these, they use no TCP port and reach no process and no abstract
//! socket outside the VMM.
//!
//! A second lock behind the empty root and the system call filter, for the day when one of them has a hole. What is
//! open already is not affected. The threads of shares, which live from opening files, are started before and stay outside.
//!
//! Optional, as the one part of the jail: many kernels are built or started without it. Any other failure than that is one
//! of the jail. Source: Documentation/userspace-api/landlock.rst and include/uapi/linux/landlock.h of Linux 6.18.
#![allow(unsafe_code)] // The three system calls have no wrapper in a crate of ours.

use super::{JailError, step};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `LANDLOCK_CREATE_RULESET_VERSION`.
const CREATE_RULESET_VERSION: u32 = 1;
/// Both rights of `LANDLOCK_ACCESS_NET_*`: bind and connect of TCP.
const NET: u64 = 0b11;
/// Both scopes of `LANDLOCK_SCOPE_*`: abstract unix sockets and signals.
const SCOPES: u64 = 0b11;

/// `struct landlock_ruleset_attr`. A kernel that knows less of it takes it as long as the rest is 0.
#[repr(C)]
#[derive(Debug, PartialEq, Eq)]
struct RulesetAttr {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

impl RulesetAttr {
    /// All that a kernel with this ABI can forbid.
    fn everything(abi: u32) -> RulesetAttr {
        // The rights of LANDLOCK_ACCESS_FS_* are the lowest bits: EXECUTE to MAKE_SYM, then REFER, TRUNCATE, IOCTL_DEV.
        let fs_rights = match abi {
            0 | 1 => 13,
            2 => 14,
            3 | 4 => 15,
            5.. => 16,
        };
        RulesetAttr {
            handled_access_fs: (1 << fs_rights) - 1,
            handled_access_net: if abi >= 4 { NET } else { 0 },
            scoped: if abi >= 6 { SCOPES } else { 0 },
        }
    }
}

/// Allows the calling thread, and those that it starts from now on, nothing of what Landlock can forbid; does nothing on a
/// kernel that has none. Behind `no_new_privs`.
///
/// # Errors
/// The kernel has Landlock and refused.
pub(super) fn forbid_everything() -> Result<(), JailError> {
    match step("ask for the version of Landlock", version())? {
        Some(abi) => {
            let ruleset = create_ruleset(&RulesetAttr::everything(abi));
            let ruleset = step("make a Landlock ruleset", ruleset)?;
            step("enter a Landlock domain", restrict_self(&ruleset))
        }
        None => Ok(()),
    }
}

/// The ABI of this kernel's Landlock, 1 or more; `None` if it was built or started without.
fn version() -> Result<Option<u32>, Errno> {
    // SAFETY: with this flag the kernel takes no address: both are to be 0.
    let abi = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<RulesetAttr>(),
            0usize,
            CREATE_RULESET_VERSION,
        )
    };
    match returned(abi) {
        Ok(abi) => Ok(Some(u32::try_from(abi).unwrap_or(u32::MAX))),
        Err(Errno::NOSYS | Errno::OPNOTSUPP) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn create_ruleset(attr: &RulesetAttr) -> Result<OwnedFd, Errno> {
    // SAFETY: the structure lives through the call, which only reads it, and its size is the one given.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::from_ref(attr),
            size_of::<RulesetAttr>(),
            0u32,
        )
    };
    let fd = i32::try_from(returned(fd)?).map_err(|_| Errno::BADF)?;
    // SAFETY: the kernel has just made this descriptor, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn restrict_self(ruleset: &OwnedFd) -> Result<(), Errno> {
    // SAFETY: it takes no address.
    let done =
        unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0u32) };
    returned(done).map(drop)
}

fn returned(result: libc::c_long) -> Result<libc::c_long, Errno> {
    if result < 0 {
        let error = io::Error::last_os_error();
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Mode, OFlags, open};
    use rustix::thread::set_no_new_privs;
    use std::net::{Ipv4Addr, TcpListener};
    use std::thread;

    #[test]
    fn every_abi_forbids_all_that_it_knows() {
        let all = |abi| {
            let attr = RulesetAttr::everything(abi);
            (attr.handled_access_fs, attr.handled_access_net, attr.scoped)
        };
        assert_eq!(all(1), (0x1fff, 0, 0));
        assert_eq!(all(2), (0x3fff, 0, 0));
        assert_eq!(all(3), (0x7fff, 0, 0));
        assert_eq!(all(4), (0x7fff, 3, 0));
        assert_eq!(all(5), (0xffff, 3, 0));
        assert_eq!(all(6), (0xffff, 3, 3));
        assert_eq!(all(u32::MAX), (0xffff, 3, 3));
    }

    /// What is refused afterwards, to the calling thread.
    fn refused(abi: u32) -> Vec<&'static str> {
        let mut refused = Vec::new();
        let mut attempt = |what, result: io::Result<()>| {
            if result.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
                refused.push(what);
            }
        };
        let directory = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = open(c"/", directory, Mode::empty());
        attempt("read a directory", root.map(drop).map_err(io::Error::from));
        let file = std::fs::File::open("/proc/self/stat");
        attempt("read a file", file.map(drop));
        let name = std::env::temp_dir().join(format!("capsid-landlock-{}", std::process::id()));
        let made = std::fs::create_dir(&name).and_then(|()| std::fs::remove_dir(&name));
        attempt("make a directory", made);
        if abi >= 4 {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
            attempt("use a TCP port", listener.map(drop));
        }
        refused
    }

    #[test]
    fn behind_it_a_thread_and_those_that_it_starts_open_nothing_and_others_go_on() {
        let Some(abi) = version().unwrap() else {
            let name = "behind_it_a_thread_and_those_that_it_starts_open_nothing_and_others_go_on";
            eprintln!("SKIPPED {name}: needs a kernel with Landlock");
            return;
        };
        let mut all = vec!["read a directory", "read a file", "make a directory"];
        if abi >= 4 {
            all.push("use a TCP port");
        }
        assert_eq!(refused(abi), [""; 0]);
        let (own, inherited) = thread::spawn(move || {
            set_no_new_privs(true).unwrap();
            forbid_everything().unwrap();
            let inherited = thread::spawn(move || refused(abi)).join().unwrap();
            (refused(abi), inherited)
        })
        .join()
        .unwrap();
        assert_eq!(own, all);
        assert_eq!(inherited, all);
        assert_eq!(refused(abi), [""; 0], "another thread is not in the domain");
    }

    #[test]
    fn a_kernel_that_has_it_and_refuses_is_an_error() {
        if version().unwrap().is_none() {
            let name = "a_kernel_that_has_it_and_refuses_is_an_error";
            eprintln!("SKIPPED {name}: needs a kernel with Landlock");
            return;
        }
        // A thread can be in 16 domains, each within the one before.
        let refused = thread::spawn(|| {
            set_no_new_privs(true).unwrap();
            (0..=16).find_map(|_| forbid_everything().err())
        });
        let Some(JailError::Step { step, cause }) = refused.join().unwrap() else {
            panic!("no error");
        };
        assert_eq!((step, cause), ("enter a Landlock domain", Errno::TOOBIG));
    }
}
