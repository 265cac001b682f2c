//! The host's side of a tap device, in a network namespace of the test's thread alone: an address, a neighbour, a UDP socket.
//!
//! `unsafe`: ioctls that make and set up network devices.
#![allow(unsafe_code)]

use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

/// The host's address and the guest's.
pub(super) const HOST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
pub(super) const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const NAME: &[u8] = b"capsid0";
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

fn request() -> libc::ifreq {
    // SAFETY: `struct ifreq` is plain data, for which zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME) {
        *to = *from as libc::c_char;
    }
    request
}

fn address(ip: Ipv4Addr) -> libc::sockaddr {
    let [a, b, c, d] = ip.octets().map(|byte| byte as libc::c_char);
    libc::sockaddr {
        sa_family: libc::AF_INET as libc::sa_family_t,
        sa_data: [0, 0, a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0],
    }
}

fn ioctl<T>(fd: RawFd, number: libc::c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: `argument` is the structure that the request reads and writes.
    match unsafe { libc::ioctl(fd, number, std::ptr::from_mut(argument)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// `queues` queues of one new tap device with this MTU. The calling thread gets a network namespace of its own first, with
/// which everything goes. The guest's hardware address is known to the host.
pub(super) fn taps(queues: usize, mtu: i32) -> io::Result<Vec<OwnedFd>> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
    // Nobody is to look for neighbours and routers in between.
    let _without_ipv6 = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    let mut fds = Vec::new();
    for _ in 0..queues {
        let mut options = std::fs::OpenOptions::new();
        let fd = OwnedFd::from(options.read(true).write(true).open("/dev/net/tun")?);
        let mut tap = request();
        let many = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | many;
        tap.ifr_ifru.ifru_flags = flags as libc::c_short;
        ioctl(fd.as_raw_fd(), TUNSETIFF, &mut tap)?;
        fds.push(fd);
    }
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let socket = socket.as_raw_fd();
    let mut set = request();
    set.ifr_ifru.ifru_mtu = mtu;
    ioctl(socket, libc::SIOCSIFMTU, &mut set)?;
    let mut set = request();
    set.ifr_ifru.ifru_addr = address(HOST);
    ioctl(socket, libc::SIOCSIFADDR, &mut set)?;
    set.ifr_ifru.ifru_addr = address(Ipv4Addr::new(255, 255, 255, 0));
    ioctl(socket, libc::SIOCSIFNETMASK, &mut set)?;
    let mut set = request();
    set.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING | libc::IFF_NOARP) as libc::c_short;
    ioctl(socket, libc::SIOCSIFFLAGS, &mut set)?;
    Ok(fds)
}

/// The host's hardware address of the tap.
pub(super) fn mac() -> io::Result<[u8; 6]> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let mut ask = request();
    ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &mut ask)?;
    // SAFETY: SIOCGIFHWADDR has filled this member.
    let data = unsafe { ask.ifr_ifru.ifru_hwaddr.sa_data };
    Ok([0, 1, 2, 3, 4, 5].map(|at: usize| data[at] as u8))
}
