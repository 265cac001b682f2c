//! The virtio-fs device (virtio 1.2 section 5.11) and how a share's threads come to be.

use super::confine::{
    ConfineError, Signal, drop_privileges, enter_tree, open_root, own_descriptors,
    own_working_directory,
};
use super::server::Server;
use super::session::FdBudget;
use super::threads::{Pool, Signals};
use crate::counters::Counters;
use crate::event::{EventLoop, Interest, Readiness, Subscriber};
use crate::state::Foreign;
use crate::virtio::device::{
    Activation, Busy, DeviceData, DeviceError, RestoreError, VirtioDevice,
};
use crate::virtio::queue::Positions;
use nix::sys::signal::SigSet;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Device type 26: file system.
const DEVICE_TYPE: u16 = 26;
/// The priority queue is queue 0, the one request queue comes after it (section 5.11.2). The largest
/// request of Linux takes 260 descriptors.
const QUEUE_SIZES: [u16; 2] = [128, 1024];
/// Longest tag, bytes (section 5.11.4).
const TAG_MAX_BYTES: usize = 36;
/// Threads of one share, which is also how many of its requests can be blocked in the host's file system
/// before the share stands still. More would only wait for the same CPUs and disk.
pub const SHARE_THREADS: usize = 4;
/// Stack of one thread, bytes. Nothing here recurses.
const THREAD_STACK_BYTES: usize = 256 * 1024;
/// How long a reset waits for requests that the host's file system holds up.
const RESET_TIMEOUT_MS: u64 = 2_000;
/// How long dropping the device waits for its threads.
const EXIT_TIMEOUT_MS: u64 = 500;
/// The least descriptors with which a share works, and the most that it keeps for nodes.
pub const FD_BUDGET_MIN: usize = 256;
const NODE_FDS_MAX: usize = 4096;

/// What each thread calls last, before it reads the guest's first byte: the VMM's seccomp filter for
/// [`super::FS_SYSCALLS`].
pub type Seal = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// Everything that a share is made of.
pub struct ShareSetup<'a> {
    /// Mount tag, 1 to 36 bytes of UTF-8 without NUL.
    pub tag: String,
    /// A detached mount tree (`open_tree(2)` with OPEN_TREE_CLONE and AT_RECURSIVE) whose root is a
    /// directory. Read-only mounts in it stay read-only: that is how a volume is protected.
    pub tree: OwnedFd,
    /// Whom the threads become, never 0: the jail's user.
    pub uid: u32,
    /// Its group, never 0.
    pub gid: u32,
    /// Descriptors that this share may have open for the guest, at least [`FD_BUDGET_MIN`]. RLIMIT_NOFILE must
    /// hold it and some 30 more: the threads use up to four each for moments.
    pub fd_budget: usize,
    /// What interrupts are sent by, and the seal works with: the threads have it under the number that it has here.
    pub kept: &'a [BorrowedFd<'a>],
    /// Called on each thread last.
    pub seal: Seal,
    /// Hears of the threads when the device is to stand still.
    pub event_loop: Arc<dyn EventLoop>,
}

/// What a share knows: plain data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareState {
    /// The guest has mounted it, so it knows files by numbers that mean something in this process alone.
    mounted: bool,
}

/// Why a share could not be started. Then no thread of it is left.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// Not a tag.
    #[error("share tag {0:?} is empty, longer than 36 bytes or has a NUL in it")]
    Tag(String),
    /// The threads would stay root.
    #[error("share {0:?}: its threads must not run as user or group 0")]
    Root(String),
    /// Too few descriptors.
    #[error(
        "share {tag:?}: a budget of {budget} descriptors is too small, give at least {FD_BUDGET_MIN}"
    )]
    Budget {
        /// The share.
        tag: String,
        /// What it was given.
        budget: usize,
    },
    /// A thread could not be confined.
    #[error("share {tag:?}: a file-system thread could not be confined")]
    Confine {
        /// The share.
        tag: String,
        /// The step that failed.
        #[source]
        cause: ConfineError,
    },
    /// No eventfd.
    #[error("share {tag:?}: cannot make the eventfds of its threads, or watch them")]
    Events {
        /// The share.
        tag: String,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// No thread, or it could not be sealed.
    #[error("share {tag:?}: cannot {what}")]
    Thread {
        /// The share.
        tag: String,
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        cause: io::Error,
    },
}

/// The failure of one thread, before the share's tag is added.
enum ThreadError {
    Confine(ConfineError),
    Io(&'static str, io::Error),
}

impl From<ConfineError> for ThreadError {
    fn from(cause: ConfineError) -> ThreadError {
        ThreadError::Confine(cause)
    }
}

impl ThreadError {
    fn of(self, tag: String) -> ShareError {
        match self {
            ThreadError::Confine(cause) => ShareError::Confine { tag, cause },
            ThreadError::Io(what, cause) => ShareError::Thread { tag, what, cause },
        }
    }
}

/// Starts the threads of a share and confines each of them; when it returns they wait for the guest with
/// everything given up, and the device can be put on the bus.
///
/// To be called while the process still has CAP_SYS_ADMIN, CAP_SETPCAP and the capabilities that the threads
/// keep, and `/proc` is procfs. Nothing of the rest of the process changes: the threads have their own descriptors,
/// mount namespace, working directory, umask, identity, capabilities and filter. The process then drops its own
/// privileges with calls that reach one thread only (raw system calls; glibc's `setresuid` and TSYNC would
/// reach these threads too), and keeps `/proc/thread-self/fd` readable for its own threads, which the kernel grants
/// whatever their identities are.
///
/// # Errors
/// [`ShareError`] says what could not be done; the threads started so far end.
pub fn spawn_share_threads(setup: ShareSetup<'_>) -> Result<VirtioFs, ShareError> {
    let tag = setup.tag;
    if tag.is_empty() || tag.len() > TAG_MAX_BYTES || tag.contains('\0') {
        return Err(ShareError::Tag(tag));
    }
    if setup.uid == 0 || setup.gid == 0 {
        return Err(ShareError::Root(tag));
    }
    if setup.fd_budget < FD_BUDGET_MIN {
        let budget = setup.fd_budget;
        return Err(ShareError::Budget { tag, budget });
    }
    let events = Events::new().map_err(|cause| ShareError::Events {
        tag: tag.clone(),
        cause,
    })?;
    let (report, reports) = mpsc::channel();
    let pool = Arc::new(Pool::new(events.signals()));
    let start = Start {
        // Numbers: the threads' table has these descriptors as well, and the process's are closed here.
        tree: setup.tree.as_raw_fd(),
        kept: setup
            .kept
            .iter()
            .map(BorrowedFd::as_raw_fd)
            .chain(events.numbers())
            .collect(),
        identity: (setup.uid, setup.gid),
        budget: split_budget(setup.fd_budget),
        seal: setup.seal,
        pool: pool.clone(),
    };
    let leader = spawn(0, move || lead(start, report)).map_err(|error| error.of(tag.clone()))?;
    let mut followers = None;
    let mut ready = 0;
    while ready < SHARE_THREADS {
        match reports.recv() {
            Ok(Report::Ready) => ready += 1,
            Ok(Report::Confined(threads)) => followers = Some(threads),
            Ok(Report::Failed(error)) => {
                return Err(error.of(tag));
            }
            // Every sender is gone, and with it every thread that had not reported.
            Err(mpsc::RecvError) => break,
        }
    }
    match followers {
        Some(mut threads) if ready == SHARE_THREADS => {
            threads.push(leader);
            VirtioFs::new(tag, pool, events, threads, setup.event_loop)
        }
        _ => Err(ShareError::Thread {
            tag,
            what: "hear from its threads",
            cause: io::ErrorKind::BrokenPipe.into(),
        }),
    }
}

pub(super) fn split_budget(descriptors: usize) -> FdBudget {
    let nodes = (descriptors / 4).min(NODE_FDS_MAX);
    FdBudget {
        nodes,
        files: descriptors - nodes,
    }
}

/// The eventfds of a share. The process owns them, and its threads have them as well.
struct Events {
    kicks: [Arc<EventFd>; 2],
    wake: EventFd,
    left: EventFd,
}

impl Events {
    fn new() -> io::Result<Events> {
        let event = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        Ok(Events {
            kicks: [Arc::new(event()?), Arc::new(event()?)],
            wake: event()?,
            left: event()?,
        })
    }

    fn signals(&self) -> Signals {
        let [priority, requests] = &self.kicks;
        Signals {
            kicks: [Signal::of(priority), Signal::of(requests)],
            wake: Signal::of(&self.wake),
            left: Signal::of(&self.left),
        }
    }

    fn numbers(&self) -> [RawFd; 4] {
        let Signals { kicks, wake, left } = self.signals();
        let [priority, requests] = kicks;
        [priority, requests, wake, left].map(Signal::number)
    }
}

/// What the first thread begins with: nothing that closes a descriptor.
struct Start {
    tree: RawFd,
    kept: Vec<RawFd>,
    identity: (u32, u32),
    budget: FdBudget,
    seal: Seal,
    pool: Arc<Pool>,
}

/// What a starting thread tells the caller.
enum Report {
    /// The leader is in the share and has started the others.
    Confined(Vec<JoinHandle<()>>),
    /// One thread waits for the guest.
    Ready,
    Failed(ThreadError),
}

/// The first thread: enters the share and drops its privileges; the others inherit both from it.
fn lead(start: Start, report: mpsc::Sender<Report>) {
    let Start {
        tree,
        kept,
        identity: (uid, gid),
        budget,
        seal,
        pool,
    } = start;
    let confined = || -> Result<_, ThreadError> {
        let tree = own_descriptors(tree, &kept)?;
        // This and the root are the first two.
        let fds = Arc::new(enter_tree(tree)?);
        let root = open_root()?;
        drop_privileges(uid, gid)?;
        let server = Server::new(root, fds.clone(), budget, pool.facts().clone());
        Ok((fds, Arc::new(server)))
    };
    let followers = confined().and_then(|(fds, server)| {
        let mut threads = Vec::new();
        for number in 1..SHARE_THREADS {
            let (pool_, server_, fds_, seal_, report_) = (
                pool.clone(),
                server.clone(),
                fds.clone(),
                seal.clone(),
                report.clone(),
            );
            match spawn(number, move || {
                work(&pool_, &server_, &fds_, &seal_, report_);
            }) {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    pool.exit();
                    return Err(error);
                }
            }
        }
        Ok((fds, server, threads))
    });
    match followers {
        Ok((fds, server, threads)) => {
            // A caller that is gone has heard of a thread that failed.
            let _caller_gone = report.send(Report::Confined(threads));
            work(&pool, &server, &fds, &seal, report);
        }
        Err(error) => {
            let _caller_gone = report.send(Report::Failed(error));
        }
    }
}

/// Every thread: the last steps, and then its life.
fn work(pool: &Pool, server: &Server, fds: &OwnedFd, seal: &Seal, report: mpsc::Sender<Report>) {
    let _alive = pool.alive();
    let sealed = || -> Result<(), ThreadError> {
        // The VMM's handlers are for its other threads; here their system calls would be forbidden ones.
        let blocked = SigSet::all().thread_block();
        blocked.map_err(|errno| ThreadError::Io("block signals", errno.into()))?;
        own_working_directory(fds.as_fd())?;
        seal().map_err(|cause| ThreadError::Io("seal a file-system thread", cause))
    };
    match sealed() {
        Ok(()) => {
            let _caller_gone = report.send(Report::Ready);
            drop(report);
            pool.run(server);
        }
        Err(error) => {
            // The others may wait for the guest already.
            pool.exit();
            let _caller_gone = report.send(Report::Failed(error));
        }
    }
}

fn spawn(
    number: usize,
    body: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, ThreadError> {
    std::thread::Builder::new()
        .name(format!("fs{number}"))
        .stack_size(THREAD_STACK_BYTES)
        .spawn(body)
        .map_err(|cause| ThreadError::Io("start a file-system thread", cause))
}

/// A virtio-fs device whose threads run already; see [`spawn_share_threads`].
pub struct VirtioFs {
    tag: String,
    pool: Arc<Pool>,
    events: Arc<Events>,
    threads: Vec<JoinHandle<()>>,
    asked: Arc<Mutex<Asked>>,
    event_loop: Arc<dyn EventLoop>,
}

/// Who asked that the device stand still. The threads cannot signal an eventfd of the process's that they were not given.
struct Asked {
    events: Arc<Events>,
    idle: Option<Arc<EventFd>>,
}

impl Subscriber for Asked {
    fn ready(&mut self, _token: u64, _readiness: Readiness) {
        // Watched for being readable; what was read before has no other reader.
        let _ = self.events.left.read();
        if let Some(idle) = self.idle.take() {
            // Fails only when the counter is full, and then the fd is readable anyway.
            let _ = idle.write(1);
        }
    }
}

impl VirtioFs {
    fn new(
        tag: String,
        pool: Arc<Pool>,
        events: Events,
        threads: Vec<JoinHandle<()>>,
        event_loop: Arc<dyn EventLoop>,
    ) -> Result<VirtioFs, ShareError> {
        let events = Arc::new(events);
        let asked = Arc::new(Mutex::new(Asked {
            events: events.clone(),
            idle: None,
        }));
        let share = VirtioFs {
            tag,
            pool,
            events,
            threads,
            asked: asked.clone(),
            event_loop,
        };
        let left = share.events.left.as_raw_fd();
        match share.event_loop.watch(left, Interest::READ, 0, asked) {
            Ok(()) => Ok(share),
            Err(cause) => Err(ShareError::Events {
                tag: share.tag.clone(),
                cause,
            }),
        }
    }

    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for VirtioFs {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    /// None: no notification queue (VIRTIO_FS_F_NOTIFICATION), no DAX.
    fn features(&self) -> u64 {
        0
    }

    /// The tag, padded with NUL, and the number of request queues.
    fn config(&self) -> Vec<u8> {
        let mut config = self.tag.as_bytes().to_vec();
        config.resize(TAG_MAX_BYTES, 0);
        config.extend_from_slice(&(QUEUE_SIZES.len() as u32 - 1).to_le_bytes());
        config
    }

    fn counters(&self) -> Arc<dyn Counters> {
        self.pool.facts().counters()
    }

    /// Its threads have them in a descriptor table of their own.
    fn kicks(&self) -> Option<Vec<Arc<EventFd>>> {
        Some(self.events.kicks.to_vec())
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        // FORGET would starve without the first, nothing would be served without the second.
        for (index, queue) in (0..).zip(&activation.queues) {
            if queue.is_none() {
                return Err(DeviceError::QueueMissing(index));
            }
        }
        self.pool.start(activation);
        Ok(())
    }

    fn suspend(&mut self, idle: &Arc<EventFd>) -> Result<Positions, Busy> {
        // Before the threads could say that they have left.
        self.asked().idle = Some(idle.clone());
        let positions = self.pool.suspend()?;
        self.asked().idle = None;
        Ok(positions)
    }

    fn keep_on(&mut self) {
        self.asked().idle = None;
        self.pool.keep_on();
    }

    fn data(&self) -> DeviceData {
        DeviceData::Share(ShareState {
            mounted: self.pool.facts().is_mounted(),
        })
    }

    fn restore(&mut self, data: &DeviceData) -> Result<(), RestoreError> {
        match data {
            DeviceData::Share(ShareState { mounted: false }) => Ok(()),
            DeviceData::Share(_) => Err(RestoreError::Mounted(self.tag.clone())),
            _ => Err(Foreign("kind").into()),
        }
    }

    /// Ends within [`RESET_TIMEOUT_MS`] whatever the host's file system does. If a request is blocked in it
    /// even then, the device is of no more use: that thread's read may still write the guest's memory.
    fn reset(&mut self) -> Result<(), DeviceError> {
        let patience = Duration::from_millis(RESET_TIMEOUT_MS);
        self.pool.stop(patience).map_err(|cause| DeviceError::Io {
            what: "stop a request that the host's file system holds up",
            cause,
        })
    }
}

impl Drop for VirtioFs {
    fn drop(&mut self) {
        self.event_loop.forget(self.events.left.as_raw_fd());
        self.pool.exit();
        if self.pool.abandon(Duration::from_millis(EXIT_TIMEOUT_MS)) {
            for thread in self.threads.drain(..) {
                let _ended_before_panics_abort = thread.join();
            }
        }
        // Otherwise one is blocked in the host's file system; it ends with the process, or when it wakes up.
    }
}

#[cfg(test)]
impl VirtioFs {
    pub(crate) fn pool(&self) -> Arc<Pool> {
        self.pool.clone()
    }
}
