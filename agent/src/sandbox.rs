//! The one owner of the containers. Each verb: look the container up, make its move in the state table,
//! let go of every lock, then do the slow part on a blocking thread. Work that must not stop half-way
//! runs in a task of its own, because ttrpc drops a call whose time is over.

mod create;

use crate::birth::{launch_exec, not_executed, notify};
use crate::cgroup::{Cgroup, CgroupError};
use crate::container::Container;
pub use crate::error::SandboxError;
use crate::error::{Result, io_error};
use crate::events::Events;
use crate::figures;
use crate::last_words::{self, chain};
use crate::launch::Launcher;
use crate::pending::PendingStreams;
pub use crate::pending::StreamIds;
use crate::process::Process;
use crate::reaper::{Exit, Reaper};
use crate::share::Share;
use crate::shm::Shm;
use crate::spec;
use crate::state::{Refusal, State, Verb};
use capsid_protocol::machine::is_id;
pub use create::Wish;
use rustix::process::Signal;
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;

/// Most containers at a time.
const CONTAINERS_MAX_COUNT: usize = 512;
/// Runtime processes at work at a time; fewer than the blocking threads, so that Stats and Signal always have one.
pub const LAUNCHES_MAX_COUNT: usize = 8;
/// How long a created container may take to die when it is deleted.
const KILL_TIMEOUT_MS: u64 = 10_000;

/// Where the sandbox lives in its guest.
#[derive(Clone, Debug)]
pub struct Places {
    /// The agent's program, which is also its runtime process.
    pub program: PathBuf,
    /// A tmpfs directory of the agent.
    pub run: PathBuf,
    /// The mount point of cgroup2.
    pub cgroup_root: PathBuf,
    /// Mount point of the host's share; `None` where there is none (tests).
    pub share: Option<PathBuf>,
}

/// The end of a process, for the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// How and when.
    pub exit: Exit,
    /// OOM kills in its container so far; each is queued as an event before this is told.
    pub oom_kills: u64,
}

impl End {
    async fn of(container: &Container, exit: Exit) -> End {
        let oom_kills = container.oom.check().await;
        End { exit, oom_kills }
    }
}

#[derive(Debug)]
enum Slot {
    Creating,
    There(Arc<Container>),
}

/// All containers of this guest.
#[derive(Debug)]
pub struct Sandbox {
    containers: Mutex<HashMap<String, Slot>>,
    launcher: Arc<Launcher>,
    launches: Arc<Semaphore>,
    places: Places,
    /// Streams that the host has dialled.
    pub pending: Arc<PendingStreams>,
    /// News for the host.
    pub events: Arc<Events>,
    /// The host's share.
    pub share: Share,
    /// The pod's shared memory.
    pub shm: Shm,
}

impl Sandbox {
    /// An empty sandbox.
    pub fn new(places: Places, reaper: Arc<Reaper>, pending: Arc<PendingStreams>) -> Sandbox {
        Sandbox {
            containers: Mutex::default(),
            launcher: Arc::new(Launcher::new(places.program.clone(), reaper)),
            launches: Arc::new(Semaphore::new(LAUNCHES_MAX_COUNT)),
            share: Share::at(places.share.clone()),
            shm: Shm::below(&places.run),
            places,
            pending,
            events: Arc::default(),
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// The container with this id.
    ///
    /// # Errors
    /// There is none, or it is still being made.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        match self.table().get(id) {
            Some(Slot::There(container)) => Ok(Arc::clone(container)),
            Some(Slot::Creating) | None => Err(SandboxError::NoContainer(bounded_id(id))),
        }
    }

    /// Lets the init execute its program.
    ///
    /// # Errors
    /// Not created; or the program cannot be executed, or a startContainer hook failed: the init has
    /// ended then.
    pub async fn start(&self, id: &str) -> Result<()> {
        let container = self.container(id)?;
        container.advance(Verb::Start)?;
        whole(async move {
            let Some(report) = container.take_report() else {
                return Ok(()); // the pause process runs already: the table lets one Start through
            };
            let socket = container.directories.notify_socket();
            blocking(move || notify(&socket).map_err(io_error("waking the init process"))).await?;
            match container.init.executed(report).await {
                Ok(()) => Ok(()),
                Err(why) => {
                    // Already dying, or stuck before its program: the end is the same.
                    let _ = container.init.signal(Signal::KILL);
                    Err(not_executed(why))
                }
            }
        })
        .await
    }

    /// Adds a process to a running container.
    ///
    /// # Errors
    /// A refused id or process, a missing stream, or what the runtime process says; nothing is left then.
    pub async fn exec(
        self: &Arc<Self>,
        id: &str,
        exec_id: &str,
        json: &[u8],
        ids: StreamIds,
    ) -> Result<u32> {
        let claim = self.pending.claim(ids);
        if !is_id(exec_id) {
            return Err(SandboxError::BadId(bounded_id(exec_id)));
        }
        let container = self.container(id)?;
        let Some(root) = container.root.clone() else {
            let why = "the pause container has no programs to execute";
            return Err(SandboxError::Wrong(why.into()));
        };
        let checked = spec::process(json)?;
        let place = container.reserve_exec(exec_id).map_err(|why| match why {
            Some(why) => SandboxError::Full(why),
            None => SandboxError::Exists(format!("exec {exec_id} of container {id}")),
        })?;
        container.advance(Verb::Exec)?;
        let streams = claim.take().await?;
        let (launches, launcher) = (Arc::clone(&self.launches), Arc::clone(&self.launcher));
        let exec_id = exec_id.to_owned();
        whole(async move {
            let _turn = launches.acquire_owned().await;
            let of = Arc::clone(&container);
            let (launched, stdio) =
                blocking(move || launch_exec(&launcher, (&of, &root), &exec_id, checked, streams))
                    .await?;
            let adopted = Process::adopt(launched, stdio, None);
            let (process, report) = adopted.map_err(io_error("connecting its streams"))?;
            if let Err(why) = process.executed(report).await {
                let _ = process.signal(Signal::KILL);
                return Err(not_executed(why));
            }
            let pid = process.pid;
            place.fill(process);
            Ok(pid)
        })
        .await
    }

    /// Waits for the end of a process and of its outputs.
    ///
    /// # Errors
    /// No such process.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<End> {
        let container = self.container(id)?;
        let exit = match exec_id {
            "" => container.init.wait_finished().await,
            exec_id => exec_of(&container, exec_id)?.wait_finished().await,
        };
        Ok(End::of(&container, exit).await)
    }

    /// Sends a signal to one process, or to all of the container.
    ///
    /// # Errors
    /// No such process, it has ended, or no such signal.
    pub async fn signal(&self, id: &str, exec_id: &str, number: u32, all: bool) -> Result<()> {
        let container = self.container(id)?;
        let signal = signal_of(number)?;
        if !exec_id.is_empty() {
            return Ok(exec_of(&container, exec_id)?.signal(signal)?);
        }
        if all {
            let cgroup = container.cgroup.clone();
            return blocking(move || Ok(signal_all(&cgroup, signal)?)).await;
        }
        container.advance(Verb::Signal)?;
        Ok(container.init.signal(signal)?)
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// Not running, or it cannot be frozen (then it is thawed again).
    pub async fn pause(&self, id: &str) -> Result<()> {
        self.freeze(id, Verb::Pause, true).await
    }

    /// Thaws a container.
    ///
    /// # Errors
    /// Not paused.
    pub async fn resume(&self, id: &str) -> Result<()> {
        self.freeze(id, Verb::Resume, false).await
    }

    async fn freeze(&self, id: &str, verb: Verb, frozen: bool) -> Result<()> {
        let container = self.container(id)?;
        let before = container.advance(verb)?;
        whole(async move {
            let cgroup = container.cgroup.clone();
            let done = blocking(move || {
                cgroup.freeze(frozen).inspect_err(|_| {
                    if let (true, Err(e)) = (frozen, cgroup.freeze(false)) {
                        last_words::warn(&format!("thawing again: {}", chain(&e)));
                    }
                })?;
                Ok(())
            })
            .await;
            done.inspect_err(|_| container.retreat(before))
        })
        .await
    }

    /// Sets limits of a container.
    ///
    /// # Errors
    /// It has ended, or a limit is refused.
    pub async fn update(&self, id: &str, json: &[u8]) -> Result<()> {
        let container = self.container(id)?;
        let resources = spec::resources(json)?;
        container.advance(Verb::Update)?;
        let cgroup = container.cgroup.clone();
        blocking(move || Ok(cgroup.update(&resources)?)).await
    }

    /// The pids of a container.
    ///
    /// # Errors
    /// No such container.
    pub async fn pids(&self, id: &str) -> Result<Vec<u32>> {
        let cgroup = self.container(id)?.cgroup.clone();
        blocking(move || Ok(cgroup.pids()?)).await
    }

    /// The figures of a container.
    ///
    /// # Errors
    /// No such container.
    pub async fn figures(&self, id: &str) -> Result<capsid_protocol::agent::StatsResponse> {
        let cgroup = self.container(id)?.cgroup.clone();
        blocking(move || Ok(figures::read(&cgroup)?)).await
    }

    /// The process that a request names: the init for an empty exec id.
    ///
    /// # Errors
    /// No such process.
    pub fn with_process<T>(
        &self,
        id: &str,
        exec_id: &str,
        act: impl FnOnce(&Process) -> T,
    ) -> Result<T> {
        let container = self.container(id)?;
        if exec_id.is_empty() {
            return Ok(act(&container.init));
        }
        Ok(act(&*exec_of(&container, exec_id)?))
    }

    /// Forgets an exec that ended, or removes a container that ended or never started.
    ///
    /// # Errors
    /// It runs, or its cgroup cannot be removed (then it stays, to be deleted again).
    pub async fn delete(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<End> {
        let container = self.container(id)?;
        if !exec_id.is_empty() {
            let exit = exec_of(&container, exec_id)?.exited();
            let running = || SandboxError::Wrong(format!("exec {exec_id} is running"));
            let exit = exit.ok_or_else(running)?;
            container.forget_exec(exec_id);
            return Ok(End::of(&container, exit).await);
        }
        container.advance(Verb::Delete)?;
        let sandbox = Arc::clone(self);
        whole(async move {
            let removed = sandbox.remove(&container).await;
            match removed {
                Ok(end) => {
                    sandbox.table().remove(&container.id);
                    // The last look at the container's directories may be this one: tmpfs, quick.
                    drop(container);
                    Ok(end)
                }
                Err(e) => {
                    container.retreat(State::Stopped);
                    Err(e)
                }
            }
        })
        .await
    }

    async fn remove(self: &Arc<Self>, container: &Arc<Container>) -> Result<End> {
        let exit = match container.init.exited() {
            Some(exit) => exit,
            None => {
                container
                    .init
                    .signal(Signal::KILL)
                    .or(Ok::<(), Refusal>(()))?;
                let limit = Duration::from_millis(KILL_TIMEOUT_MS);
                let ended = tokio::time::timeout(limit, container.init.wait_exited()).await;
                ended.map_err(|e| io_error("waiting for the killed init process")(e.into()))?
            }
        };
        let end = End::of(container, exit).await;
        let (sandbox, id, cgroup) = (
            Arc::clone(self),
            container.id.clone(),
            container.cgroup.clone(),
        );
        blocking(move || {
            // Its processes first: they use what is unmounted then.
            cgroup.remove()?;
            let forgotten = sandbox.share.forget(&id);
            forgotten.map_err(io_error("unmounting its part of the share"))
        })
        .await?;
        Ok(end)
    }

    /// Kills every container. For the end of the machine: nothing is reported.
    pub async fn kill_all(&self) {
        let capsid = self.places.cgroup_root.join("capsid");
        let killed = blocking(
            move || match std::fs::write(capsid.join("cgroup.kill"), "1") {
                // There never was a container.
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
                all => all.map_err(io_error("killing all containers")),
            },
        );
        if let Err(e) = killed.await {
            last_words::warn(&chain(&e));
        }
    }
}

/// Runs to its end even if the caller stops waiting.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    let joined = tokio::spawn(work).await;
    joined.unwrap_or_else(|e| Err(io_error("the work was cut short")(io::Error::other(e))))
}

/// Runs work that may block in the kernel on a thread for that; it goes on even if the caller stops waiting.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let joined = tokio::task::spawn_blocking(work).await;
    joined.unwrap_or_else(|e| Err(io_error("the work was cut short")(io::Error::other(e))))
}

/// Removes what a container that did not come to be has left; what cannot be removed is said.
fn clean(cgroup: &Cgroup) {
    if let Err(e) = cgroup.remove() {
        last_words::warn(&chain(&e));
    }
}

fn bounded_id(id: &str) -> String {
    id.chars().take(64).collect()
}

fn exec_of(container: &Container, exec_id: &str) -> Result<Arc<Process>> {
    container.exec(exec_id).ok_or_else(|| SandboxError::NoExec {
        container: container.id.clone(),
        exec: bounded_id(exec_id),
    })
}

/// The kernel's signals, real-time ones included; 0 would only ask whether the process is there.
fn signal_of(number: u32) -> Result<Signal> {
    let signal = i32::try_from(number).ok().filter(|n| (1..=64).contains(n));
    let signal = signal.and_then(raw_signal);
    signal.ok_or_else(|| SandboxError::BadRequest(format!("signal {number}: 1 to 64 are signals")))
}

#[allow(unsafe_code)] // rustix names a signal by number only so
fn raw_signal(number: i32) -> Option<Signal> {
    // SAFETY: it is only passed to pidfd_send_signal(2), which takes any number the kernel knows; the
    // rule behind this function concerns libc's reserved signals, which a child may be sent, too.
    std::num::NonZeroI32::new(number).map(|n| unsafe { Signal::from_raw_nonzero_unchecked(n) })
}

/// A signal to each process. Who forks in between may be missed, but for SIGKILL (cgroup.kill).
fn signal_all(cgroup: &Cgroup, signal: Signal) -> std::result::Result<(), CgroupError> {
    use rustix::process::{Pid, PidfdFlags, pidfd_open, pidfd_send_signal};
    if signal == Signal::KILL {
        return cgroup.kill();
    }
    let open = |pid: u32| {
        let named = Pid::from_raw(i32::try_from(pid).ok()?)?;
        Some((pid, pidfd_open(named, PidfdFlags::empty()).ok()?))
    };
    let opened: Vec<(u32, OwnedFd)> = cgroup.pids()?.into_iter().filter_map(open).collect();
    // A pid that is still listed after its pidfd was opened was this container's all along.
    let still = cgroup.pids()?;
    for (pid, pidfd) in opened {
        if still.binary_search(&pid).is_ok() {
            // Ended in between.
            let _ = pidfd_send_signal(&pidfd, signal);
        }
    }
    Ok(())
}
