//! How `start` leaves a server behind, and what the server finds.
//!
//! The server is this program again. It starts with the pod's listening socket as fd 3, the request on standard input, which it reads and
//! closes first of all, no other descriptor, the bundle as working directory, a session of its own, a umask of 0 and SIGPIPE ignored (Rust's
//! runtime does that). Its environment is containerd's, as every shim's: the variables of Capsid and of log drivers come that way.
//!
//! `unsafe`: work between fork and exec; the number 3 becomes a descriptor that we own.
#![allow(unsafe_code)]

use crate::args::Flags;
use crate::bootstrap::{self, BadRequest, MESSAGE_MAX_BYTES, Request};
use protobuf::Message;
use rustix::fs::{MemfdFlags, Mode, OFlags};
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// The descriptor of the listening socket in the server.
const LISTENER_FD: RawFd = 3;

/// Why a server could not be started, or does not find what it needs.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// A system call of the start.
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
    /// The request could not be encoded.
    #[error("cannot encode the request for the server")]
    Encode(#[source] protobuf::Error),
    /// `serve` without what `start` gives.
    #[error("fd {LISTENER_FD} is no listening socket; only `start` starts a server")]
    NoListener(#[source] io::Error),
    /// The request is not one.
    #[error(transparent)]
    Request(#[from] BadRequest),
}

/// A server that was started. Dropped, it is killed, unless it was left.
#[derive(Debug)]
pub struct Launched(Option<Child>);

impl Launched {
    /// Lets it live.
    pub fn leave(mut self) {
        self.0 = None;
    }
}

impl Drop for Launched {
    fn drop(&mut self) {
        if let Some(mut server) = self.0.take() {
            // It is our child, so both fail only if it has ended already.
            let _ended = server.kill();
            let _reaped = server.wait();
        }
    }
}

/// Starts the server of `request` in `bundle`, with `listener`.
///
/// # Errors
/// The program cannot be executed, or the system has no descriptor or memory left.
pub fn launch(
    request: Request,
    bundle: &Path,
    listener: &UnixListener,
) -> Result<Launched, LaunchError> {
    let program =
        std::env::current_exe().map_err(|cause| LaunchError::Io("find this program", cause))?;
    let mut command = Command::new(&program);
    // Not needed, but what people and tools look for in a list of processes.
    command.args(["-namespace", &request.namespace, "-id", &request.id]);
    command.args(["-address", &request.grpc_address]);
    command.args(request.debug.then_some("-debug"));
    let message = bootstrap::hand_on(request)
        .write_to_bytes()
        .map_err(LaunchError::Encode)?;
    let message =
        in_memory(&message).map_err(|cause| LaunchError::Io("hand the request on", cause))?;
    command
        .arg("serve")
        .current_dir(bundle)
        .stdin(Stdio::from(message))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let server = spawn(command, listener);
    server
        .map(|server| Launched(Some(server)))
        .map_err(|cause| LaunchError::Io("start the server", cause))
}

fn in_memory(message: &[u8]) -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create(
        "capsid-request",
        MemfdFlags::CLOEXEC,
    )?);
    file.write_all(message)?;
    file.rewind()?;
    Ok(file)
}

fn spawn(mut command: Command, listener: &UnixListener) -> io::Result<Child> {
    // Now fd 3 is taken, by this or something else of ours, so it is not the pipe on which a failed exec is reported.
    let listener = rustix::io::fcntl_dupfd_cloexec(listener, LISTENER_FD)?;
    let inherit = move || -> io::Result<()> {
        rustix::process::setsid()?;
        rustix::process::umask(Mode::empty());
        if listener.as_raw_fd() == LISTENER_FD {
            rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty())?;
            return Ok(());
        }
        // SAFETY: whatever fd 3 is in the parent, it is close-on-exec in this child, and nobody here uses it before exec.
        match unsafe { libc::dup2(listener.as_raw_fd(), LISTENER_FD) } {
            -1 => Err(io::Error::last_os_error()),
            _ => Ok(()),
        }
    };
    // SAFETY: the closure runs between fork and exec, where only async-signal-safe work is allowed: it makes system calls, allocates
    // nothing and takes no lock. It owns the listener, which is open until exec.
    unsafe { command.pre_exec(inherit) };
    command.spawn()
}

/// What a server was given.
#[derive(Debug)]
pub struct Given {
    /// The request of the container that was first.
    pub request: Request,
    /// Its bundle.
    pub bundle: PathBuf,
    /// The pod's socket.
    pub listener: UnixListener,
    /// Its path.
    pub socket_path: PathBuf,
}

/// Takes what `start` gave to this process: to be called once, first of all.
///
/// # Errors
/// It was not started by `start`.
pub fn given(flags: &Flags) -> Result<Given, LaunchError> {
    let listener = inherited_listener().map_err(LaunchError::NoListener)?;
    let bound = listener.local_addr().map_err(LaunchError::NoListener)?;
    let socket_path = bound.as_pathname().map(Path::to_owned);
    let nameless = || LaunchError::NoListener(io::Error::other("the socket has no path"));
    let socket_path = socket_path.ok_or_else(nameless)?;
    let message = standard_input().map_err(|cause| LaunchError::Io("read the request", cause))?;
    let bundle =
        std::env::current_dir().map_err(|cause| LaunchError::Io("find the bundle", cause))?;
    let request = bootstrap::read(&message, flags, None)?;
    Ok(Given {
        request,
        bundle,
        listener,
        socket_path,
    })
}

/// Fd 3, if it listens, and nothing above it.
fn inherited_listener() -> io::Result<UnixListener> {
    // SAFETY: F_GETFD of a number touches no memory; that it fails for one that is not open is the point.
    if unsafe { libc::fcntl(LISTENER_FD, libc::F_GETFD) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, whoever called this program gave it to us, and nobody else in this process has taken it: this function is
    // called once, before anything is opened.
    let listener = unsafe { OwnedFd::from_raw_fd(LISTENER_FD) };
    if !rustix::net::sockopt::socket_acceptconn(&listener)? {
        return Err(io::Error::other("it does not listen"));
    }
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::CLOEXEC)?;
    // SAFETY: nothing above fd 3 was opened in this process yet, so no owner of one is left with a closed number.
    match unsafe { libc::syscall(libc::SYS_close_range, LISTENER_FD + 1, RawFd::MAX, 0) } {
        0 => Ok(UnixListener::from(listener)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// All of standard input, which is a file in memory, and then nothing any more.
fn standard_input() -> io::Result<Vec<u8>> {
    let mut message = Vec::new();
    io::stdin()
        .lock()
        .take(MESSAGE_MAX_BYTES as u64 + 1)
        .read_to_end(&mut message)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(null.as_fd())?;
    Ok(message)
}
