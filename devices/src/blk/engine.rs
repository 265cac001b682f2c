//! Where the calls of all disks of a VM are made: by a ring, or by threads where the host has no ring.
//!
//! Owns what a call works on while it is under way, so that nothing is freed under the kernel's hands: a disk gives its vectors
//! away with the call and gets them back with the result, on the event loop. At most [`IN_FLIGHT_MAX`] calls are under way for
//! all disks together, [`DISK_IN_FLIGHT_MAX`] of one; beyond that a disk leaves its queue alone and is kicked when there is room again.

use super::fault::{DiskFault, OnFault};
use super::ring::Ring;
use super::vectors::{RawVectors, Vectors};
use super::work::Call;
use super::workers::{Seal, Workers};
use crate::event::{EventLoop, Interest, Readiness, Subscriber};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Most disks of one VM.
pub const DISKS_MAX: usize = 64;
/// Most calls under way, of all disks together.
pub(super) const IN_FLIGHT_MAX: usize = 1024;
/// Most calls under way of one disk, so that one that hangs leaves room for the others.
pub(super) const DISK_IN_FLIGHT_MAX: usize = 256;
/// Most results handed out between two turns of the event loop.
const RESULTS_MAX: usize = 256;

/// A call as a ring or a thread takes it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Submission {
    pub(super) ticket: u64,
    pub(super) disk: u8,
    pub(super) call: Call,
    pub(super) vectors: RawVectors,
}

/// The end of a call, as a ring or a thread tells it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Completion {
    pub(super) ticket: u64,
    pub(super) result: Result<u64, Errno>,
}

/// The end of a call, as its disk gets it.
pub(super) struct Done {
    /// What the disk calls the request.
    pub(super) request: u32,
    /// Bytes that were moved.
    pub(super) result: Result<u64, Errno>,
    /// What the disk gave away.
    pub(super) vectors: Vectors,
}

/// A disk, as the engine sees it.
pub(super) trait Client: Send + Sync {
    /// These calls have ended. Called with no lock held.
    fn done(&self, done: Vec<Done>);
}

enum Backend {
    Ring(Box<Ring>),
    Workers(Workers),
}

struct Flight {
    disk: u8,
    request: u32,
    vectors: Vectors,
}

impl Flight {
    fn done(self, completion: &Completion) -> Done {
        Done {
            request: self.request,
            result: completion.result,
            vectors: self.vectors,
        }
    }
}

struct Attached {
    /// Where calls are made by threads. A ring has its files to itself: the process keeps no descriptor of them, by which another
    /// of its threads could reach a disk.
    file: Option<File>,
    client: Option<Arc<dyn Client>>,
    under_way: usize,
}

#[derive(Default)]
struct Table {
    /// By ticket.
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    disks: Vec<Option<Attached>>,
    /// Completions that one disk found and that are another's.
    late: Vec<Completion>,
    /// Kicks of queues that found no room, by their disks.
    stalled: Vec<(u8, Arc<EventFd>)>,
}

impl Table {
    fn under_way(&self) -> usize {
        self.flights.len() - self.free.len()
    }

    fn has_room(&self, disk: u8) -> bool {
        let attached = self.disks.get(usize::from(disk)).and_then(Option::as_ref);
        self.under_way() < IN_FLIGHT_MAX
            && attached.is_some_and(|disk| disk.under_way < DISK_IN_FLIGHT_MAX)
    }

    fn count(&mut self, disk: u8) -> Option<&mut usize> {
        let attached = self.disks.get_mut(usize::from(disk))?.as_mut()?;
        Some(&mut attached.under_way)
    }

    fn start(&mut self, flight: Flight) -> usize {
        if let Some(count) = self.count(flight.disk) {
            *count += 1;
        }
        let ticket = self.free.pop().unwrap_or(self.flights.len());
        match self.flights.get_mut(ticket) {
            Some(place) => *place = Some(flight),
            None => self.flights.push(Some(flight)),
        }
        ticket
    }

    fn end(&mut self, ticket: u64) -> Option<Flight> {
        let ticket = usize::try_from(ticket).ok()?;
        let flight = self.flights.get_mut(ticket)?.take()?;
        self.free.push(ticket);
        if let Some(count) = self.count(flight.disk) {
            *count -= 1;
        }
        Some(flight)
    }

    /// Whether a call is one of this disk.
    fn is_of(&self, ticket: u64, disk: u8) -> bool {
        let place = usize::try_from(ticket).ok();
        let flight = place.and_then(|place| self.flights.get(place)?.as_ref());
        flight.is_some_and(|flight| flight.disk == disk)
    }

    /// Kicks the queues for which there is room again.
    fn wake_stalled(&mut self) {
        let stalled = std::mem::take(&mut self.stalled);
        for (disk, kick) in stalled {
            if self.has_room(disk) {
                // Fails only when the counter is full, and then the fd is readable anyway.
                let _ = kick.write(1);
            } else {
                self.stalled.push((disk, kick));
            }
        }
    }
}

/// The engine of a VM's disks.
pub struct DiskIo {
    backend: Backend,
    event: Arc<EventFd>,
    table: Mutex<Table>,
    left: AtomicBool,
    on_fault: OnceLock<OnFault>,
    /// See [`EngineKind::Here`].
    #[cfg(any(test, feature = "testing"))]
    here: bool,
}

/// Which engine to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// A ring if the host has one, else threads.
    Best,
    /// Threads.
    Threads,
    /// Nobody: one thread is everything, and makes the calls by [`DiskIo::work_here`].
    #[cfg(any(test, feature = "testing"))]
    Here,
}

impl DiskIo {
    /// An engine whose results are handed out on `event_loop`. Threads make no call before
    /// [`DiskIo::start`].
    ///
    /// # Errors
    /// No eventfd, or it cannot be watched.
    pub fn new(kind: EngineKind, event_loop: &dyn EventLoop) -> io::Result<Arc<DiskIo>> {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        let ring = match kind {
            EngineKind::Best => Ring::new(&event).ok(),
            EngineKind::Threads => None,
            #[cfg(any(test, feature = "testing"))]
            EngineKind::Here => None,
        };
        let backend = match ring {
            Some(ring) => Backend::Ring(Box::new(ring)),
            None => Backend::Workers(Workers::new(event.clone())),
        };
        let mut table = Table::default();
        table.disks.resize_with(DISKS_MAX, || None);
        let engine = Arc::new(DiskIo {
            backend,
            event,
            table: Mutex::new(table),
            left: AtomicBool::new(false),
            on_fault: OnceLock::new(),
            #[cfg(any(test, feature = "testing"))]
            here: kind == EngineKind::Here,
        });
        let results = Arc::new(Mutex::new(Results(engine.clone())));
        event_loop.watch(engine.event.as_raw_fd(), Interest::KICK, 0, results)?;
        Ok(engine)
    }

    /// Starts the threads, if calls are made by threads. They are who the calling thread is by now, and call `seal` before
    /// anything else; so this comes after the process has given its privileges up.
    ///
    /// # Errors
    /// A thread could not be had or sealed.
    pub fn start(&self, seal: &Seal) -> io::Result<()> {
        match &self.backend {
            Backend::Ring(_) => Ok(()),
            Backend::Workers(workers) => workers.start(seal),
        }
    }

    /// Who is told of faults of all disks. The first one is; without one nobody is.
    pub fn on_fault(&self, told: OnFault) {
        let _another_is = self.on_fault.set(told);
    }

    pub(super) fn failed(&self, fault: &DiskFault<'_>) {
        if let Some(told) = self.on_fault.get() {
            told(fault);
        }
    }

    /// Makes up to `most` of the calls that wait for [`EngineKind::Here`]; how many there were. Their results come by the event
    /// loop.
    #[cfg(any(test, feature = "testing"))]
    pub fn work_here(&self, most: usize) -> usize {
        match &self.backend {
            Backend::Workers(workers) if self.here => workers.work_here(most),
            _ => 0,
        }
    }

    /// Hands out the results of what a reset has ended, if the thread that resets is the one that turns the loop: it would wait
    /// in vain.
    #[cfg(any(test, feature = "testing"))]
    pub(super) fn harvest_here(&self) {
        if self.here {
            self.harvest();
        }
    }

    /// To be called when nobody will turn the event loop any more, before the disks are dropped: their resets then wait for
    /// nothing.
    pub fn leave(&self) {
        self.left.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_left(&self) -> bool {
        self.left.load(Ordering::SeqCst)
    }

    /// Whether the calls are made by a ring.
    pub fn is_ring(&self) -> bool {
        matches!(self.backend, Backend::Ring(_))
    }

    /// Takes a disk in; returns its number.
    ///
    /// # Errors
    /// There are [`DISKS_MAX`] already, or the ring refused the file.
    pub(super) fn attach(&self, file: File) -> io::Result<u8> {
        let mut table = self.lock();
        let place = table.disks.iter().position(Option::is_none);
        let number = place.ok_or(io::ErrorKind::StorageFull)?;
        let file = match &self.backend {
            Backend::Ring(ring) => {
                ring.set_file(number as u8, file.as_raw_fd())?;
                None
            }
            Backend::Workers(_) => Some(file),
        };
        if let Some(place) = table.disks.get_mut(number) {
            *place = Some(Attached {
                file,
                client: None,
                under_way: 0,
            });
        }
        Ok(number as u8)
    }

    /// Lets a disk go that nobody serves any more; its number may be another's from now on. While calls of it are under way it
    /// stays, with its file.
    pub(super) fn detach(&self, number: u8) {
        let mut table = self.lock();
        let Some(place) = table.disks.get_mut(usize::from(number)) else {
            return;
        };
        if place.as_ref().is_none_or(|attached| attached.under_way > 0) {
            return;
        }
        if let Backend::Ring(ring) = &self.backend {
            if ring.set_file(number, -1).is_err() {
                // It still has the file, so the number cannot be another's.
                return;
            }
        }
        *place = None;
        table.stalled.retain(|(disk, _)| *disk != number);
    }

    /// Who gets the results of a disk's calls from now on; with `None` they are dropped.
    pub(super) fn serve(&self, number: u8, client: Option<Arc<dyn Client>>) {
        if let Some(Some(attached)) = self.lock().disks.get_mut(usize::from(number)) {
            attached.client = client;
        }
    }

    /// Begins a call of a new request, which the disk calls `request`. Its result comes by [`Client::done`]. The kernel may
    /// learn of it as late as at [`DiskIo::flush`].
    ///
    /// # Errors
    /// There is no room now. `kick` is signalled when there is.
    pub(super) fn begin(
        &self,
        disk: u8,
        request: u32,
        call: Call,
        vectors: Vectors,
        kick: &Arc<EventFd>,
    ) -> Result<(), NoRoom> {
        let mut table = self.lock();
        let room = table.has_room(disk);
        if room && self.push(&mut table, disk, request, call, vectors).is_ok() {
            return Ok(());
        }
        let waits = |(_, other): &(u8, Arc<EventFd>)| Arc::ptr_eq(other, kick);
        if !table.stalled.iter().any(waits) {
            table.stalled.push((disk, kick.clone()));
        }
        Err(NoRoom)
    }

    /// Begins the next call of a request whose last one has just ended.
    ///
    /// # Errors
    /// The kernel has no memory for it; here are the vectors back.
    pub(super) fn go_on(
        &self,
        disk: u8,
        request: u32,
        call: Call,
        vectors: Vectors,
    ) -> Result<(), Vectors> {
        self.push(&mut self.lock(), disk, request, call, vectors)
    }

    #[allow(unsafe_code)]
    fn push(
        &self,
        table: &mut Table,
        disk: u8,
        request: u32,
        call: Call,
        vectors: Vectors,
    ) -> Result<(), Vectors> {
        let raw = vectors.raw();
        let ticket = table.start(Flight {
            disk,
            request,
            vectors,
        }) as u64;
        let submission = Submission {
            ticket,
            disk,
            call,
            vectors: raw,
        };
        match &self.backend {
            Backend::Ring(ring) => {
                // SAFETY: the table keeps the vectors until `harvest` has taken the completion, and if it never comes, for
                // ever: see `drop`. Their addresses are on the heap and do not move with them.
                let pushed = unsafe { ring.push(&submission) };
                if pushed.is_ok() {
                    return Ok(());
                }
                table
                    .end(ticket)
                    .map_or(Ok(()), |flight| Err(flight.vectors))
            }
            Backend::Workers(workers) => {
                let attached = table.disks.get(usize::from(disk)).and_then(Option::as_ref);
                let file = attached.and_then(|attached| attached.file.as_ref());
                let file = file.map_or(-1, File::as_raw_fd);
                // SAFETY: as above, and a disk's file stays in the table while calls of it are under way.
                unsafe { workers.push(file, &submission) };
                Ok(())
            }
        }
    }

    /// Ends what of a disk's calls can still be ended; their results come as those of others do.
    pub(super) fn cancel(&self, disk: u8) {
        match &self.backend {
            // A ring that could cancel would need one more call, and what it has begun it does not cancel either.
            Backend::Ring(_) => {}
            Backend::Workers(workers) => workers.cancel(disk),
        }
    }

    /// Tells the kernel of all calls begun so far.
    pub(super) fn flush(&self) {
        if let Backend::Ring(ring) = &self.backend {
            if ring.flush().is_err() {
                // The kernel has no memory for them now.
                self.come_back();
            }
        }
    }

    /// Does the same for `disk`, and returns the results of those of its calls that the kernel made at once, as it does what is in the
    /// page cache: the event and a turn of the loop are spared.
    pub(super) fn flush_and_take(&self, disk: u8) -> Vec<Done> {
        let Backend::Ring(ring) = &self.backend else {
            return Vec::new();
        };
        if ring.flush_silently().is_err() {
            self.come_back();
        }
        let mut completions = Vec::new();
        ring.take(&mut completions, RESULTS_MAX);
        if completions.is_empty() {
            return Vec::new();
        }
        let mut table = self.lock();
        let (own, late): (Vec<Completion>, Vec<_>) = completions
            .iter()
            .partition(|completion| table.is_of(completion.ticket, disk));
        table.late.extend(late);
        if completions.len() == RESULTS_MAX || !table.late.is_empty() {
            self.come_back();
        }
        let ended = own.iter().filter_map(|completion: &Completion| {
            Some(table.end(completion.ticket)?.done(completion))
        });
        let done = ended.collect();
        table.wake_stalled();
        done
    }

    /// The loop comes back to the results.
    fn come_back(&self) {
        // Fails only when the counter is full, which nobody lives to see.
        let _ = self.event.write(1);
    }

    /// Hands out results, at most [`RESULTS_MAX`] of the kernel's; for whatever else there is the loop comes back.
    fn harvest(&self) {
        let mut completions = std::mem::take(&mut self.lock().late);
        let late = completions.len();
        match &self.backend {
            Backend::Ring(ring) => ring.take(&mut completions, RESULTS_MAX),
            Backend::Workers(workers) => workers.take(&mut completions, RESULTS_MAX),
        }
        if completions.len() - late == RESULTS_MAX {
            self.come_back();
        }
        for (client, done) in self.sort(&completions) {
            client.done(done);
        }
        self.lock().wake_stalled();
        self.flush();
    }

    /// The results of each disk.
    fn sort(&self, completions: &[Completion]) -> Vec<(Arc<dyn Client>, Vec<Done>)> {
        let mut table = self.lock();
        let mut by_disk: Vec<Vec<Done>> = Vec::new();
        by_disk.resize_with(DISKS_MAX, Vec::new);
        for completion in completions {
            let Some(flight) = table.end(completion.ticket) else {
                continue;
            };
            if let Some(done) = by_disk.get_mut(usize::from(flight.disk)) {
                done.push(flight.done(completion));
            }
        }
        let attached = table.disks.iter().zip(by_disk);
        attached
            .filter(|(_, done)| !done.is_empty())
            .filter_map(|(disk, done)| Some((disk.as_ref()?.client.clone()?, done)))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing in here panics with the lock held.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for DiskIo {
    fn drop(&mut self) {
        let table = self.table.get_mut().unwrap_or_else(PoisonError::into_inner);
        if table.under_way() > 0 {
            // It still names the vectors and the files: they stay, and with the former the guest's memory.
            std::mem::forget(std::mem::take(&mut table.flights));
            std::mem::forget(std::mem::take(&mut table.disks));
        }
    }
}

/// There is no room for one more call now.
pub(super) struct NoRoom;

/// The engine's place on the event loop.
struct Results(Arc<DiskIo>);

impl Subscriber for Results {
    fn ready(&mut self, _token: u64, _readiness: Readiness) {
        self.0.harvest();
    }
}
