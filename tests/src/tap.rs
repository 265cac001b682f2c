//! Tap devices of a test, in a network namespace of its own.
//!
//! `unsafe`: the ioctl that makes one.
#![allow(unsafe_code)]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const NAME: &str = "capsid0";

/// The host's address on the link, and the guest's.
pub const HOST: &str = "10.9.0.1";
/// The guest's.
pub const GUEST: &str = "10.9.0.2";

/// Gives the calling thread a network namespace of its own, in which there is one tap device with `queues` queues, an address and
/// this MTU. It goes when its fds are closed.
///
/// # Errors
/// The host has no tap devices, or the caller is not root.
pub fn taps(queues: usize, mtu: u16) -> io::Result<Vec<OwnedFd>> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
    // Nobody is to look for neighbours and routers in between.
    let _without_ipv6 = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    let mut taps = Vec::with_capacity(queues);
    for _ in 0..queues {
        let tap = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/net/tun")?;
        // SAFETY: `struct ifreq` is plain data, for which zeroes are a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
            *to = from as libc::c_char;
        }
        let many = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | many;
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes a `struct ifreq`.
        if unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw mut request) } == -1 {
            return Err(io::Error::last_os_error());
        }
        taps.push(OwnedFd::from(tap));
    }
    ip(&["address", "add", &format!("{HOST}/24"), "dev", NAME])?;
    ip(&["link", "set", NAME, "mtu", &mtu.to_string(), "up"])?;
    Ok(taps)
}

fn ip(args: &[&str]) -> io::Result<()> {
    let status = Command::new("ip").args(args).status()?;
    match status.success() {
        true => Ok(()),
        false => Err(io::Error::other(format!("ip {}: {status}", args.join(" ")))),
    }
}
