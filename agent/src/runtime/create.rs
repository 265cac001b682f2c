//! Makes a container: libcontainer's init builder on a bundle that the agent has checked and written.

use super::executor::ReportingExecutor;
use super::message::own;
use super::{ProcessFds, RuntimeError, hand_over_terminal, io_error};
use crate::boot::loopback_up;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

/// The order's content.
#[derive(Debug)]
pub(super) struct Container {
    pub(super) container_id: String,
    pub(super) bundle: PathBuf,
    pub(super) state_root: PathBuf,
    pub(super) console_socket: Option<PathBuf>,
    pub(super) loopback: bool,
}

/// Makes the container up to its notify socket; answers the pid of its init.
pub(super) fn create(
    agent: &OwnedFd,
    order: Container,
    fds: ProcessFds,
) -> Result<i32, RuntimeError> {
    let console = match &order.console_socket {
        Some(path) => {
            Some(UnixListener::bind(path).map_err(io_error("making the console socket"))?)
        }
        None => None,
    };
    let mut builder = ContainerBuilder::new(order.container_id, SyscallType::Linux)
        .with_root_path(order.state_root)?
        .with_executor(ReportingExecutor::new(fds.report))
        .with_console_socket(order.console_socket);
    if console.is_none() {
        builder = builder
            .with_stdin(fds.stdin)
            .with_stdout(fds.stdout)
            .with_stderr(fds.stderr);
    }
    let container = builder
        .validate_id()?
        .as_init(order.bundle)
        .with_systemd(false)
        .with_detach(true)
        .build()?;
    let pid = container.pid().ok_or(RuntimeError::NoPid)?.as_raw();
    if let Some(console) = console {
        let master = receive_master(&console).map_err(io_error("taking the terminal"))?;
        hand_over_terminal(agent, &master)?;
    }
    if order.loopback {
        let namespace = File::open(format!("/proc/{pid}/ns/net"));
        let namespace = namespace.map_err(io_error("opening the container's network"))?;
        setns(namespace, CloneFlags::CLONE_NEWNET)
            .map_err(|e| io_error("entering the container's network")(e.into()))?;
        loopback_up().map_err(io_error("bringing the container's loopback interface up"))?;
    }
    Ok(pid)
}

/// libcontainer has connected and sent while it made the container: nothing here waits.
fn receive_master(console: &UnixListener) -> io::Result<OwnedFd> {
    console.set_nonblocking(true)?;
    let (socket, _) = console.accept()?;
    receive_fd(&OwnedFd::from(socket))
}

/// Receives the one descriptor that a console socket carries.
pub(super) fn receive_fd(socket: &OwnedFd) -> io::Result<OwnedFd> {
    let mut name = [0; 64];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut iov = [IoSliceMut::new(&mut name)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            if let Some(fd) = fds.into_iter().next() {
                return Ok(own(fd));
            }
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}
