//! The runtime process: a second, short life of the agent's program, started for each container and each exec.
//!
//! Container work forks, changes its own oom_score_adj and dumpability, and waits for its children: in
//! PID 1, which has threads, clients and orphans to reap, each of these is a trap. So PID 1 executes
//! itself as a runtime process with one order on descriptor 0, and the runtime process's end hands the new process to PID 1
//! as an orphan. Until the agent has acknowledged the pid the runtime process stays the parent, so that neither an
//! early exit nor the pid can be lost.

mod clone;
mod create;
mod exec;
mod executor;
pub mod message;
pub mod pause;

use message::{Answer, Order, bounded};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::ExitCode;

/// The argument that makes the program a runtime process.
pub const ARGUMENT: &str = "oci-runtime";
/// The soft limit of open files that containers start with, as everywhere; the hard one is the agent's.
const OPEN_FILES_SOFT_COUNT: u64 = 1024;

/// Why the runtime process could not obey.
#[derive(Debug, thiserror::Error)]
enum RuntimeError {
    #[error("{what}")]
    Io {
        what: &'static str,
        #[source]
        cause: io::Error,
    },
    #[error("the order came without its descriptors")]
    NoDescriptors,
    #[error(transparent)]
    Container(#[from] libcontainer::error::LibcontainerError),
    #[error("the container has no init process")]
    NoPid,
    #[error("{0}")]
    Exec(String),
}

fn io_error(what: &'static str) -> impl Fn(io::Error) -> RuntimeError {
    move |cause| RuntimeError::Io { what, cause }
}

/// Descriptors 0, 1 and 2 of the process to be made, and the pipe on which it reports.
#[derive(Debug)]
struct ProcessFds {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
    report: OwnedFd,
}

/// The runtime process's main: obeys the one order that waits on descriptor 0.
pub fn main() -> ExitCode {
    match obey() {
        Ok(()) => ExitCode::SUCCESS,
        Err(_agent_is_gone) => ExitCode::FAILURE,
    }
}

fn obey() -> io::Result<()> {
    inheritance_for_containers()?;
    let agent = take_control_socket()?;
    let (order, mut fds) = message::receive::<Order>(&agent)?;
    let done = match order {
        Order::Create {
            container_id,
            bundle,
            state_root,
            console_socket,
            loopback,
        } => process_fds(&mut fds).and_then(|fds| {
            let container = create::Container {
                container_id,
                bundle,
                state_root,
                console_socket,
                loopback,
            };
            create::create(&agent, container, fds)
        }),
        Order::Exec { bundle, process } => process_fds(&mut fds)
            .and_then(|process_fds| exec::exec(&agent, &bundle, &process, process_fds, fds)),
        Order::Pause => {
            process_fds(&mut fds).and_then(|process_fds| pause::pause(process_fds, fds.pop()))
        }
    };
    match done {
        Ok(pid) => {
            message::send(&agent, &Answer::Pid(pid), &[])?;
            // Any record, or the agent's end: both let the process go.
            let _acknowledged = message::receive::<()>(&agent);
            Ok(())
        }
        Err(error) => {
            let text = bounded(&crate::last_words::chain(&error));
            message::send(&agent, &Answer::Failed(text), &[])
        }
    }
}

/// What a container would otherwise inherit from a Rust program and from PID 1.
#[allow(unsafe_code)] // restoring a signal's default action
fn inheritance_for_containers() -> io::Result<()> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: no handler is installed, only the default action; nothing of this process relies on it.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(
        Resource::RLIMIT_NOFILE,
        OPEN_FILES_SOFT_COUNT.min(hard),
        hard,
    )?;
    Ok(())
}

/// Moves the control socket away from descriptor 0, where the new process would find it.
fn take_control_socket() -> io::Result<OwnedFd> {
    let stdin = io::stdin();
    let agent = rustix::io::fcntl_dupfd_cloexec(stdin.as_fd(), 3)?;
    let null = rustix::fs::open(
        "/dev/null",
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(agent)
}

fn process_fds(fds: &mut Vec<OwnedFd>) -> Result<ProcessFds, RuntimeError> {
    if fds.len() < 4 {
        return Err(RuntimeError::NoDescriptors);
    }
    let mut first = fds.drain(..4);
    match (first.next(), first.next(), first.next(), first.next()) {
        (Some(stdin), Some(stdout), Some(stderr), Some(report)) => Ok(ProcessFds {
            stdin,
            stdout,
            stderr,
            report,
        }),
        _ => Err(RuntimeError::NoDescriptors),
    }
}

/// Passes a terminal's master on to the agent.
fn hand_over_terminal(agent: &OwnedFd, master: &OwnedFd) -> Result<(), RuntimeError> {
    message::send(agent, &Answer::Terminal, &[master.as_raw_fd()])
        .map_err(io_error("handing over the terminal"))
}
