//! The calls of disks by threads that block, for hosts without a ring that can be restricted.
//!
//! `unsafe`: a call works on vectors that the engine keeps, see [`super::engine`].
#![allow(unsafe_code)]

use super::engine::{Completion, Submission};
use super::vectors::perform;
use nix::sys::signal::SigSet;
use rustix::io::Errno;
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use vmm_sys_util::eventfd::EventFd;

/// Threads of all disks together: so many calls may wait for the host's disks at once.
const THREADS: usize = 4;
/// Stack of one thread, bytes. Nothing here recurses.
const THREAD_STACK_BYTES: usize = 128 * 1024;

/// What each thread calls last: the VMM's seccomp filter for [`super::DISK_SYSCALLS`].
pub type Seal = Arc<dyn Fn() -> io::Result<()> + Send + Sync>;

/// The threads; they end when this is dropped, each after its call.
pub(super) struct Workers(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// There is a job, or the end.
    wake: Condvar,
    event: Arc<EventFd>,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<(RawFd, Submission)>,
    done: VecDeque<Completion>,
    ended: bool,
}

impl Workers {
    /// No threads yet. What they will have completed they signal by `event`.
    pub(super) fn new(event: Arc<EventFd>) -> Workers {
        Workers(Arc::new(Shared {
            state: Mutex::default(),
            wake: Condvar::new(),
            event,
        }))
    }

    /// Starts the threads, as whoever the calling thread is by now; when it returns each of them is sealed.
    ///
    /// # Errors
    /// A thread could not be had or sealed.
    pub(super) fn start(&self, seal: &Seal) -> io::Result<()> {
        let (report, reports) = mpsc::channel();
        for number in 0..THREADS {
            let (shared, seal, report) = (self.0.clone(), seal.clone(), report.clone());
            std::thread::Builder::new()
                .name(format!("disk{number}"))
                .stack_size(THREAD_STACK_BYTES)
                .spawn(move || {
                    // The VMM's handlers are for its other threads.
                    let blocked = SigSet::all().thread_block().map_err(io::Error::from);
                    let ready = blocked.and_then(|()| seal());
                    let sealed = ready.is_ok();
                    let _caller_gone = report.send(ready);
                    drop(report);
                    if sealed {
                        shared.work();
                    }
                })?;
        }
        drop(report);
        reports.into_iter().collect()
    }

    /// Hands a call over.
    ///
    /// # Safety
    /// The submission's vectors live, and `file` is open, until its completion was taken.
    pub(super) unsafe fn push(&self, file: RawFd, submission: &Submission) {
        self.0.lock().jobs.push_back((file, *submission));
        self.0.wake.notify_one();
    }

    /// Ends the calls of a disk that no thread has begun.
    pub(super) fn cancel(&self, disk: u8) {
        let mut state = self.0.lock();
        let State { jobs, done, .. } = &mut *state;
        jobs.retain(|(_, job)| {
            if job.disk == disk {
                done.push_back(Completion {
                    ticket: job.ticket,
                    result: Err(Errno::CANCELED),
                });
            }
            job.disk != disk
        });
        drop(state);
        let _ = self.0.event.write(1);
    }

    /// Takes up to `max` completions.
    pub(super) fn take(&self, into: &mut Vec<Completion>, max: usize) {
        let mut state = self.0.lock();
        let count = state.done.len().min(max);
        into.extend(state.done.drain(..count));
    }
}

#[cfg(any(test, feature = "testing"))]
impl Workers {
    /// Makes up to `most` of the calls that wait, on the calling thread; how many there were.
    pub(super) fn work_here(&self, most: usize) -> usize {
        for made in 0..most {
            let Some((file, job)) = self.0.lock().jobs.pop_front() else {
                return made;
            };
            self.0.make(file, &job);
        }
        most
    }
}

impl Shared {
    fn work(&self) {
        loop {
            let mut state = self.lock();
            let (file, job) = loop {
                if state.ended {
                    return;
                }
                if let Some(job) = state.jobs.pop_front() {
                    break job;
                }
                let woken = self.wake.wait(state);
                state = woken.unwrap_or_else(PoisonError::into_inner);
            };
            drop(state);
            self.make(file, &job);
        }
    }

    fn make(&self, file: RawFd, job: &Submission) {
        // SAFETY: whoever pushed the job keeps its vectors and its file until the completion below was taken.
        let result = unsafe { perform(file, job.call, job.vectors) };
        let ticket = job.ticket;
        self.lock().done.push_back(Completion { ticket, result });
        // Fails only when the counter is full, and then the fd is readable anyway.
        let _ = self.event.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics with the lock held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        // Not waited for: one may be blocked in the host's file system. It ends with the process, or when it wakes up.
        self.0.lock().ended = true;
        self.0.wake.notify_all();
    }
}
