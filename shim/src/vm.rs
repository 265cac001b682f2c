//! The VM of a pod: its VMM process and the agent in its guest. Started, watched without polling, killed and reaped whatever happens.
//!
//! The truth about it is the process: what `waitid(2)` says beats every message of the agent. What the VMM sends is hostile and bounded.

use crate::agent::{Agent, AgentError};
use crate::console;
use crate::polled::polled;
use capsid_owner::Owner;
use capsid_owner::end::{Ended, How};
use capsid_owner::escape;
use capsid_owner::machine::{self, Parts, STDERR_MAX_BYTES, StartError, Started};
use capsid_protocol::agent::StartSandboxResponse;
use capsid_protocol::report::REPORT_MAX_BYTES;
use capsid_protocol::vsock::{AGENT_RPC_PORT, AGENT_STREAM_PORT, StreamHeader};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, Interest};
use tokio::net::unix::pipe;
use tokio::sync::{oneshot, watch};

/// How long the pipes of a VMM that is gone may stay open, in ms.
const LAST_WORDS_TIMEOUT_MS: u64 = 2_000;
/// How long a VMM that was told to end may take to do so by itself, in ms: its guest gets a grace to power off.
const STOP_TIMEOUT_MS: u64 = 20_000;
/// How long after the agent was lost its VMM may take to say why, in ms.
const LOST_GRACE_MS: u64 = 10_000;

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The VMM did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Something of the event loop.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// The VM ended before its agent was there.
    #[error("the VM ended while it booted: {0}")]
    Ended(String),
    /// The agent did not dial in time.
    #[error("agent not reachable in {seconds} s{console}")]
    Unreached {
        /// The limit.
        seconds: u64,
        /// The guest's last console lines, each behind a line feed.
        console: String,
    },
    /// The agent refuses.
    #[error(transparent)]
    Agent(#[from] AgentError),
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> BootError {
    move |cause| BootError::Io { what, cause }
}

/// A VM whose agent answers. Dropped, it is killed; it is reaped by a task of its own.
#[derive(Debug)]
pub struct Vm {
    agent: Agent,
    process: Process,
    streams: AtomicU64,
}

/// The VMM's process. Dropped, it is killed.
#[derive(Debug)]
struct Process {
    pid: u32,
    pidfd: OwnedFd,
    owner: Owner,
    ended: watch::Receiver<Option<Arc<Ended>>>,
}

impl Drop for Process {
    fn drop(&mut self) {
        machine::kill(&self.pidfd);
    }
}

impl Process {
    async fn ended(&self) -> Arc<Ended> {
        let mut ended = self.ended.clone();
        let known = ended.wait_for(Option::is_some).await;
        match known.ok().and_then(|known| known.clone()) {
            Some(known) => known,
            // The watching task ends with an answer or with the event loop, where nobody asks.
            None => Arc::new(Ended {
                how: How::Code(-1),
                words: String::new(),
                report: None,
            }),
        }
    }
}

impl Vm {
    /// Starts a VM and waits for its agent's first answer.
    ///
    /// # Errors
    /// What kept it from booting, with the guest's last words; nothing is left then.
    pub async fn boot(
        parts: Parts,
        limit: Duration,
        (hostname, sysctls): (&str, &BTreeMap<String, String>),
    ) -> Result<(Vm, StartSandboxResponse), BootError> {
        let pod = parts.id.clone();
        let started = tokio::task::spawn_blocking(move || machine::start(parts));
        let mut started = started.await.unwrap_or_else(|error| {
            let cause = io::Error::other(error);
            Err(machine::prepare("process")(cause))
        })?;
        if let Some(console) = started.console.take() {
            tokio::spawn(console::copy(pod, console));
        }
        let (process, dialled) = watch_over(started).await?;
        let mut dialled = dialled;
        let stream = tokio::select! {
            stream = &mut dialled => stream.ok(),
            ended = process.ended() => return Err(BootError::Ended(ended.reason())),
            () = tokio::time::sleep(limit) => {
                machine::stop(&process.pidfd);
                let grace = Duration::from_millis(STOP_TIMEOUT_MS);
                let ended = tokio::time::timeout(grace, process.ended()).await;
                return Err(BootError::Unreached {
                    seconds: limit.as_secs(),
                    console: ended.map(|ended| ended.console()).unwrap_or_default(),
                });
            }
        };
        let Some(stream) = stream else {
            // The owner channel closed: the VMM ends, or is made to.
            let grace = Duration::from_millis(LOST_GRACE_MS);
            if tokio::time::timeout(grace, process.ended()).await.is_err() {
                machine::kill(&process.pidfd);
            }
            return Err(BootError::Ended(process.ended().await.reason()));
        };
        let agent = Agent::new(stream.into()).map_err(io_error("talk to the agent"))?;
        let vm = Vm {
            agent,
            process,
            streams: AtomicU64::new(1),
        };
        match vm.agent.start_sandbox(hostname, sysctls).await {
            Ok(guest) => Ok((vm, guest)),
            Err(error @ AgentError::Lost { .. }) => Err(vm.explain(error).await),
            Err(error) => Err(error.into()),
        }
    }

    /// The VMM knows more than a channel that broke: a guest that panics takes its agent along first.
    async fn explain(&self, error: AgentError) -> BootError {
        let grace = Duration::from_millis(LOST_GRACE_MS);
        match tokio::time::timeout(grace, self.process.ended()).await {
            Ok(ended) => BootError::Ended(ended.reason()),
            Err(_) => error.into(),
        }
    }

    /// The agent.
    pub fn agent(&self) -> &Agent {
        &self.agent
    }

    /// The VMM's process id.
    pub fn pid(&self) -> u32 {
        self.process.pid
    }

    /// Kills it; its end is told by [`Vm::ended`].
    pub fn kill(&self) {
        machine::kill(&self.process.pidfd);
    }

    /// Tells it to end in good order; its end is told by [`Vm::ended`].
    pub fn stop(&self) {
        machine::stop(&self.process.pidfd);
    }

    /// Waits for its end.
    pub async fn ended(&self) -> Arc<Ended> {
        self.process.ended().await
    }

    /// Whether it has ended, as far as is known.
    pub fn has_ended(&self) -> bool {
        self.process.ended.borrow().is_some()
    }

    /// Opens a stream for a process to come; its number, never 0, and our end.
    ///
    /// # Errors
    /// The VMM is gone or takes nothing.
    pub fn stream(&self) -> io::Result<(u64, UnixStream)> {
        let stream_id = self.streams.fetch_add(1, Ordering::Relaxed);
        let mut stream = self.process.owner.connect(AGENT_STREAM_PORT)?;
        // A socket just made has room for sixteen bytes.
        stream.write_all(&StreamHeader::Stdio { stream_id }.encode())?;
        stream.set_nonblocking(true)?;
        Ok((stream_id, stream))
    }
}

/// Takes over a VMM just started: from here on it is killed with what is returned, and reaped.
async fn watch_over(started: Started) -> Result<(Process, oneshot::Receiver<OwnedFd>), BootError> {
    let Started {
        mut child,
        pidfd,
        owner,
        report,
        stderr,
        console: _,
    } = started;
    let (tell, ended) = watch::channel(None);
    let process = Process {
        pid: child.id(),
        pidfd,
        owner: owner.clone(),
        ended,
    };
    let exited = process.pidfd.try_clone();
    let exited = exited.and_then(|pidfd| polled(pidfd, Interest::READABLE));
    let exited = match exited.map_err(io_error("watch the VMM")) {
        Ok(exited) => exited,
        Err(error) => {
            machine::kill(&process.pidfd);
            // SIGKILL ends it at once, and nobody else would reap it.
            let _how = machine::reap(&mut child);
            return Err(error);
        }
    };
    let words = stderr.map(|stderr| collect(OwnedFd::from(stderr).into(), STDERR_MAX_BYTES));
    let report = collect(report, REPORT_MAX_BYTES);
    tokio::spawn(async move {
        // An error would be the event loop's end.
        let _readable = exited.readable().await;
        let how = machine::reap(&mut child);
        let words = match words {
            Some(words) => last_words(words).await,
            None => Vec::new(),
        };
        let report = machine::read_report(&last_words(report).await);
        // Nobody may be left who wants to know.
        let _nobody = tell.send(Some(Arc::new(Ended {
            how,
            words: escape::console(&words),
            report,
        })));
    });
    let channel = owner
        .set_nonblocking()
        .and_then(|()| owner.as_fd().try_clone_to_owned())
        .and_then(|socket| polled(socket, Interest::READABLE));
    let channel = channel.map_err(io_error("watch the owner channel"))?;
    let (dialled, answer) = oneshot::channel();
    tokio::spawn(accept(channel, owner, dialled));
    Ok((process, answer))
}

/// Hands over the one connection of the agent.
async fn accept(channel: AsyncFd<OwnedFd>, owner: Owner, dialled: oneshot::Sender<OwnedFd>) {
    while let Ok(mut ready) = channel.readable().await {
        match ready.try_io(|_socket| owner.accept()) {
            Ok(Ok(Some((AGENT_RPC_PORT, stream)))) => {
                // Whoever waited may have given up; then the stream is closed. Nothing else is ever wanted of the VMM here, and what it
                // sends all the same fills a socket of its own.
                let _nobody = dialled.send(stream);
                return;
            }
            // The guest may dial no other port: such a VMM is not listened to.
            Ok(Ok(_) | Err(_)) => return,
            Err(_would_block) => {}
        }
    }
}

/// Reads a pipe to its end on the event loop and keeps the first `max_bytes`.
fn collect(from: File, max_bytes: usize) -> oneshot::Receiver<Vec<u8>> {
    let (sender, receiver) = oneshot::channel();
    tokio::spawn(async move {
        let kept = match pipe::Receiver::from_file(from) {
            Ok(pipe) => keep(pipe, max_bytes).await,
            Err(_) => Vec::new(), // not a pipe, or no room in the event loop: there are no words then
        };
        // The VM may be forgotten.
        let _nobody = sender.send(kept);
    });
    receiver
}

async fn keep(mut from: impl AsyncRead + Unpin, max_bytes: usize) -> Vec<u8> {
    let mut kept = Vec::new();
    let mut buffer = [0u8; 4096];
    // What came is what there is.
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        let room = max_bytes.saturating_sub(kept.len()).min(count);
        kept.extend(buffer.iter().take(room));
    }
    kept
}

async fn last_words(collected: oneshot::Receiver<Vec<u8>>) -> Vec<u8> {
    let limit = Duration::from_millis(LAST_WORDS_TIMEOUT_MS);
    let words = tokio::time::timeout(limit, collected).await;
    words.ok().and_then(Result::ok).unwrap_or_default()
}
