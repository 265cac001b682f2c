//! The action `start`: finds the server of a container's pod or leaves one behind, and says where it is.
//!
//! containerd runs it in the container's bundle, waits for its end and reads its standard output and standard error as one
//! (core/runtime/v2/binary.go): so on success nothing but the reply is written, and on failure one line. It trusts containerd, and the
//! spec's annotations as far as [`group`] says. If it fails, no server and no socket stay; the bundle is containerd's to delete.

use crate::args::Flags;
use crate::bootstrap::{self, BadRequest, MESSAGE_MAX_BYTES, Request};
use crate::cgroup::{CgroupError, Hierarchy};
use crate::config::{Options, OptionsError};
use crate::group::{self, BadGroup, Group};
use crate::launch::{self, LaunchError};
use crate::socket::{self, Claim, SocketError};
use crate::spec::{self, ReadError};
use capsid_owner::escape::Line;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{getpid, getppid};
use rustix::thread::CoreSchedulingScope;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long standard input may take to end. containerd writes it at once; a person at a terminal never would.
const MESSAGE_LIMIT: Duration = Duration::from_secs(5);
/// The highest `oom_score_adj` (include/uapi/linux/oom.h).
const OOM_SCORE_MAX: i32 = 1000;
/// Set by containerd if the processes of each pod are to share a core with none of another (`sched_core`).
const SCHED_CORE: &str = "SCHED_CORE";

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Standard input did not end.
    #[error("standard input did not end within {} s", .0.as_secs())]
    EndlessInput(Duration),
    /// Standard input is too long.
    #[error("standard input is longer than {MESSAGE_MAX_BYTES} bytes")]
    LongInput,
    /// What it says is refused.
    #[error(transparent)]
    Request(#[from] BadRequest),
    /// The spec could not be read.
    #[error(transparent)]
    Spec(#[from] ReadError),
    /// Its annotations are refused.
    #[error(transparent)]
    Group(#[from] BadGroup),
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The server.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// A pod whose sandbox is gone.
    #[error("the pod is gone: the shim of its sandbox {sandbox} does not answer at {path}")]
    NoSandbox {
        /// The sandbox.
        sandbox: String,
        /// Where it should answer.
        path: PathBuf,
    },
    /// The runtime's options.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The cgroup that they name.
    #[error("no ShimCgroup")]
    Cgroup(#[from] CgroupError),
    /// A file.
    #[error("cannot {what} {path}")]
    File {
        /// What.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// Some other system call.
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
    /// The reply.
    #[error("cannot encode the reply")]
    Reply(#[source] protobuf::Error),
}

fn io_error<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> StartError {
    move |cause| StartError::Io(what, cause.into())
}

/// `start`, in the bundle that is the working directory.
///
/// # Errors
/// There is no server, and none was left.
pub fn start(flags: &Flags) -> Result<(), StartError> {
    let message = read_to_end(io::stdin(), MESSAGE_LIMIT)?;
    // What is no text is no address of containerd's.
    let ttrpc_address = std::env::var("TTRPC_ADDRESS").ok();
    let request = bootstrap::read(&message, flags, ttrpc_address)?;
    let bundle = std::env::current_dir().map_err(io_error("find the bundle"))?;
    let group = group::of(&request.id, &spec::annotations(&bundle)?)?;
    let path = socket_path(&request, &group)?;
    let address = socket::address(&path);
    let reply = bootstrap::reply(request.form, &address).map_err(StartError::Reply)?;
    match claim(&path, group)? {
        Claim::Answered => {
            write_address(&bundle, &address)?;
            say(&reply)
        }
        Claim::Ours(socket) => {
            place_for_server(&request)?;
            write_address(&bundle, &address)?;
            let server = launch::launch(request, &bundle, socket.listener())?;
            say(&reply)?;
            server.leave();
            socket.leave();
            Ok(())
        }
    }
}

/// Everything up to the end of `input`, by events and until a deadline.
fn read_to_end(input: impl AsFd, limit: Duration) -> Result<Vec<u8>, StartError> {
    let failed = "read standard input";
    let deadline = Instant::now() + limit;
    let mut message = Vec::new();
    let mut buffer = [0; 16 << 10];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).unwrap_or_default();
        let mut ready = [PollFd::new(&input, PollFlags::IN)];
        match rustix::event::poll(&mut ready, Some(&left)) {
            Ok(0) => return Err(StartError::EndlessInput(limit)),
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(cause) => return Err(io_error(failed)(cause)),
        }
        let count = rustix::io::read(&input, &mut buffer).map_err(io_error(failed))?;
        match buffer.get(..count) {
            None | Some([]) => return Ok(message),
            Some(bytes) => message.extend_from_slice(bytes),
        }
        if message.len() > MESSAGE_MAX_BYTES {
            return Err(StartError::LongInput);
        }
    }
}

fn socket_path(request: &Request, group: &Group) -> Result<PathBuf, SocketError> {
    let variable = || std::env::var_os(socket::DIRECTORY_VARIABLE).filter(|path| !path.is_empty());
    let directory = request.socket_dir.clone();
    let directory = directory.or_else(|| variable().map(PathBuf::from));
    let directory = directory.unwrap_or_else(|| socket::DEFAULT_DIRECTORY.into());
    let name = group.name(&request.id);
    socket::path(&directory, &request.grpc_address, &request.namespace, name)
}

/// The socket of the group. A container of a pod never starts one: its sandbox was there before, and what a new VM lacks of it (the
/// network, the namespaces) nobody would bring.
fn claim(path: &Path, group: Group) -> Result<Claim, StartError> {
    let Group::Of(sandbox) = group else {
        return Ok(socket::claim(path)?);
    };
    match socket::answers(path)? {
        true => Ok(Claim::Answered),
        false => Err(StartError::NoSandbox {
            sandbox: Line(sandbox.as_bytes()).to_string(),
            path: path.to_owned(),
        }),
    }
}

/// Puts this process, which has nothing else to do, where the server is to be: the server inherits it, and is never elsewhere.
fn place_for_server(request: &Request) -> Result<(), StartError> {
    if let Some(place) = Options::decode(request.options.as_ref())?.shim_cgroup {
        Hierarchy::find()?.enter(&place, std::process::id())?;
    }
    if std::env::var_os(SCHED_CORE).is_some_and(|value| !value.is_empty()) {
        share_no_core()?;
    }
    let parent = getppid().map_or(0, |parent| parent.as_raw_nonzero().get());
    let parent = PathBuf::from(format!("/proc/{parent}/oom_score_adj"));
    let score = std::fs::read_to_string(&parent).map_err(file_error("read", &parent))?;
    let number = score.trim().parse().map_err(io::Error::other);
    let number: i32 = number.map_err(file_error("understand", &parent))?;
    let own = Path::new("/proc/self/oom_score_adj");
    std::fs::write(own, oom_score_after(number).to_string()).map_err(file_error("write", own))
}

fn file_error(what: &'static str, path: &Path) -> impl Fn(io::Error) -> StartError {
    let path = path.to_owned();
    move |cause| StartError::File {
        what,
        path: path.clone(),
        cause,
    }
}

/// One more than the parent's: the kernel ends a shim before containerd (pkg/shim/util_unix.go, `AdjustOOMScore`).
fn oom_score_after(parent: i32) -> i32 {
    parent.saturating_add(1).min(OOM_SCORE_MAX)
}

/// Core scheduling (Documentation/admin-guide/hw-vuln/core-scheduling.rst): a cookie that the server and its VM inherit.
fn share_no_core() -> Result<(), StartError> {
    match rustix::thread::create_core_scheduling_cookie(getpid(), CoreSchedulingScope::ThreadGroup)
    {
        // No core here has two threads: there is nobody to share one with.
        Ok(()) | Err(Errno::NODEV) => Ok(()),
        Err(cause) => Err(io_error(
            "have a core for each pod alone, as SCHED_CORE asks",
        )(cause)),
    }
}

/// Writes the bundle's `address`, which containerd 1.7 and CRI-O read after a restart, byte for byte (`ReadAddress`): all of it or nothing.
fn write_address(bundle: &Path, address: &str) -> Result<(), StartError> {
    // A name of this process's own: another start of the same container may be at it.
    let new = bundle.join(format!(".address.{}", std::process::id()));
    let path = bundle.join("address");
    std::fs::write(&new, address).map_err(file_error("write", &new))?;
    std::fs::rename(&new, &path).map_err(file_error("write", &path))
}

fn say(reply: &[u8]) -> Result<(), StartError> {
    let mut output = io::stdout().lock();
    let said = output.write_all(reply).and_then(|()| output.flush());
    said.map_err(io_error("write the reply"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scratch;
    use std::fs::File;

    #[test]
    fn a_message_is_read_to_its_end() {
        let (input, mut output) = rustix_pipe();
        output.write_all(&[7; 20_000]).expect("room in the pipe");
        drop(output);
        let message = read_to_end(&input, MESSAGE_LIMIT).expect("a message");
        assert_eq!(message, [7; 20_000]);
        let null = File::open("/dev/null").expect("there");
        assert!(
            read_to_end(&null, MESSAGE_LIMIT)
                .expect("nothing")
                .is_empty()
        );
    }

    #[test]
    fn a_message_that_does_not_end_or_is_too_long_is_refused() {
        let (input, _held) = rustix_pipe();
        let error = read_to_end(&input, Duration::from_millis(10)).expect_err("endless");
        assert!(matches!(error, StartError::EndlessInput(_)), "{error}");
        let zeros = File::open("/dev/zero").expect("there");
        let error = read_to_end(&zeros, MESSAGE_LIMIT).expect_err("long");
        assert!(matches!(error, StartError::LongInput), "{error}");
    }

    fn rustix_pipe() -> (File, File) {
        let (input, output) = rustix::pipe::pipe().expect("a pipe");
        (input.into(), output.into())
    }

    #[test]
    fn the_oom_score_is_one_more_and_ends_at_the_kernel_s_highest() {
        assert_eq!(
            [-999, 0, 999, 1000].map(oom_score_after),
            [-998, 1, 1000, 1000]
        );
    }

    #[test]
    fn the_address_has_no_newline_and_replaces_an_older_one() {
        let bundle = Scratch::new("address");
        for address in ["unix:///run/longer", "unix:///s"] {
            write_address(bundle.path(), address).expect("writable");
            let read = std::fs::read_to_string(bundle.path().join("address"));
            assert_eq!(read.expect("there"), address);
        }
        assert!(!bundle.path().join(".address").exists());
    }
}
