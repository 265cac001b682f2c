//! A disk between activation and reset: takes requests off its queues, has them done and answers.
//!
//! Lives on the event loop. A head that is under way cannot be begun again (CVE-2026-45782): what a request works on is kept
//! by a number of our own and given up by its completion alone.

use super::engine::{Client, DiskIo, Done, NoRoom};
use super::fault::DiskFault;
use super::request::{ID_BYTES, Limits, Request, Status};
use super::vectors::Vectors;
use super::work::{Call, Work};
use crate::GuestMemory;
use crate::counters::counters;
use crate::event::{Readiness, Subscriber};
use crate::virtio::chain::Buffers;
use crate::virtio::device::{Busy, Interrupt};
use crate::virtio::queue::{ActiveQueue, Broken, Positions, positions};
use rustix::io::Errno;
use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vm_memory::VolatileSlice;
use vmm_sys_util::eventfd::EventFd;

counters! {
    /// Requests that were done, by kind, and those that were not.
    DiskCounters {
        /// IN.
        reads,
        /// Their bytes.
        read_bytes,
        /// OUT.
        writes,
        /// Their bytes.
        written_bytes,
        /// FLUSH.
        flushes,
        /// DISCARD.
        discards,
        /// WRITE_ZEROES.
        write_zeroes,
        /// Answered with IOERR: the host's file failed, or the request makes no sense.
        errors,
        /// Answered with UNSUPP.
        unsupported,
    }
}

/// What a request counts as when it is done.
#[derive(Clone, Copy, Default)]
enum Tally {
    Read(u64),
    Write(u64),
    Flush,
    Discard,
    WriteZeroes,
    #[default]
    Nothing,
}

impl Tally {
    fn of(request: &Request) -> Tally {
        match request {
            Request::Read(extent) => Tally::Read(extent.length),
            Request::Write(extent) => Tally::Write(extent.length),
            Request::Flush => Tally::Flush,
            Request::Discard(_) => Tally::Discard,
            Request::WriteZeroes(_) => Tally::WriteZeroes,
            Request::Identify => Tally::Nothing,
        }
    }
}

impl DiskCounters {
    fn done(&self, tally: Tally) {
        match tally {
            Tally::Read(bytes) => {
                self.reads.add(1);
                self.read_bytes.add(bytes);
            }
            Tally::Write(bytes) => {
                self.writes.add(1);
                self.written_bytes.add(bytes);
            }
            Tally::Flush => self.flushes.add(1),
            Tally::Discard => self.discards.add(1),
            Tally::WriteZeroes => self.write_zeroes.add(1),
            Tally::Nothing => {}
        }
    }

    fn failed(&self, status: Status) {
        match status {
            Status::Ok => {}
            Status::IoError => self.errors.add(1),
            Status::Unsupported => self.unsupported.add(1),
        }
    }
}

/// What all requests of a disk are checked and answered with.
pub(super) struct Terms {
    pub(super) limits: Limits,
    /// The driver sends no FLUSH, so a write is answered when it is durable.
    pub(super) durable: bool,
    /// What GET_ID answers, padded with NUL.
    pub(super) id: [u8; ID_BYTES],
    pub(super) counters: Arc<DiskCounters>,
}

impl Terms {
    /// The id without its padding.
    fn name(&self) -> &str {
        // Printable ASCII: see `Disk::new`.
        let id = std::str::from_utf8(&self.id).unwrap_or_default();
        id.trim_end_matches('\0')
    }
}

/// A request under way.
struct InFlight {
    queue: usize,
    head: u16,
    work: Work,
    /// The one byte of the status.
    status: Vectors,
    /// Bytes in front of it that the driver lent for data.
    room: u32,
    tally: Tally,
}

/// One queue, and which of its heads are under way.
struct Lane {
    queue: ActiveQueue,
    under_way: BTreeSet<u16>,
}

/// A live disk.
pub(super) struct Server {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    /// One that the driver broke, or left out, is gone.
    lanes: Vec<Option<Lane>>,
    terms: Terms,
    io: Arc<DiskIo>,
    /// The disk's number in the engine.
    number: u8,
    /// Told when no request is under way any more.
    idle: Arc<Condvar>,
    /// Nothing is taken off the queues, and this one is told as well.
    held: Option<Arc<EventFd>>,
    /// By the number that the engine hands back.
    in_flight: Vec<Option<InFlight>>,
    free: Vec<u32>,
}

/// What became of a chain at once.
enum Begun {
    /// It is answered, with so many bytes written.
    Answered(u32),
    /// The host has to be asked.
    Wait(InFlight, Vectors),
}

impl Server {
    pub(super) fn new(
        memory: GuestMemory,
        interrupt: Arc<dyn Interrupt>,
        queues: Vec<Option<ActiveQueue>>,
        terms: Terms,
        (io, number): (Arc<DiskIo>, u8),
    ) -> Server {
        let lane = |queue| Lane {
            queue,
            under_way: BTreeSet::new(),
        };
        Server {
            memory,
            interrupt,
            lanes: queues.into_iter().map(|queue| queue.map(lane)).collect(),
            terms,
            io,
            number,
            idle: Arc::default(),
            held: None,
            in_flight: Vec::new(),
            free: Vec::new(),
        }
    }

    /// Takes no more requests, and answers none that is under way. Its kicks are not watched any more; one that is being
    /// delivered may be of the next activation.
    pub(super) fn stop(&mut self) {
        self.lanes.fill_with(|| None);
        self.io.cancel(self.number);
    }

    /// The kicks to watch, with the queues' numbers.
    pub(super) fn kicks(&self) -> Vec<(u64, Arc<EventFd>)> {
        let numbered = (0u64..).zip(&self.lanes);
        numbered
            .filter_map(|(index, lane)| Some((index, lane.as_ref()?.queue.kick.clone())))
            .collect()
    }

    /// Whether no request is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.in_flight.len() == self.free.len()
    }

    /// Takes no more requests; where it stands in its queues.
    ///
    /// # Errors
    /// Some are under way. `idle` is signalled when none is.
    pub(super) fn hold(&mut self, idle: &Arc<EventFd>) -> Result<Positions, Busy> {
        if self.is_idle() {
            let lanes = self.lanes.iter().flatten();
            return Ok(positions(lanes.map(|lane| &lane.queue)));
        }
        self.held = Some(idle.clone());
        Err(Busy)
    }

    /// Takes requests again.
    pub(super) fn keep_on(&mut self) {
        self.held = None;
    }

    /// Takes requests off a queue: as many as it is long, then others get their turn.
    fn serve(&mut self, index: usize) -> Result<(), Broken> {
        let (Some(Some(lane)), None) = (self.lanes.get_mut(index), &self.held) else {
            return Ok(());
        };
        let mut left = lane.queue.size();
        let mut answered = false;
        lane.queue.disable_kicks(&self.memory)?;
        loop {
            while left > 0 {
                let Some(chain) = lane.queue.pop(&self.memory)? else {
                    break;
                };
                left -= 1;
                let head = chain.head_index();
                if lane.under_way.contains(&head) {
                    return Err(Broken);
                }
                let buffers = lane.queue.open(&self.memory, &chain)?;
                match begin(buffers, &self.memory, &self.terms, (index, head)) {
                    Begun::Answered(written) => {
                        lane.queue.push_used(&self.memory, head, written)?;
                        answered = true;
                    }
                    Begun::Wait(request, vectors) => {
                        let call = request.work.call();
                        let request = insert(&mut self.in_flight, &mut self.free, request);
                        let kick = &lane.queue.kick;
                        let begun = self.io.begin(self.number, request, call, vectors, kick);
                        if let Err(NoRoom) = begun {
                            take(&mut self.in_flight, &mut self.free, request);
                            lane.queue.undo_pop();
                            return self.told(index, answered);
                        }
                        lane.under_way.insert(head);
                    }
                }
            }
            if left == 0 {
                // Fails only when the counter is full, and then the fd is readable anyway.
                let _ = lane.queue.kick.write(1);
                break;
            }
            if !lane.queue.enable_kicks(&self.memory)? {
                break;
            }
        }
        self.told(index, answered)
    }

    /// Interrupts the driver if something was answered and it wants to know.
    fn told(&mut self, index: usize, answered: bool) -> Result<(), Broken> {
        if let Some(Some(lane)) = self.lanes.get_mut(index) {
            if answered && lane.queue.needs_notification(&self.memory)? {
                self.interrupt.used(index as u16);
            }
        }
        Ok(())
    }

    /// Takes one result; the queue to which an answer went, if one did.
    fn done(&mut self, done: Done) -> Option<usize> {
        let Done {
            request,
            mut result,
            mut vectors,
        } = done;
        let place = self.in_flight.get_mut(request as usize)?;
        let pending = place.as_mut()?;
        if let Some(None) = self.lanes.get(pending.queue) {
            // Reset, or broken by the driver: nobody waits for the rest of it.
            take(&mut self.in_flight, &mut self.free, request);
            return None;
        }
        let status = loop {
            let made = pending.work.call();
            if let (Ok(moved), Call::Read { .. } | Call::Write { .. }) = (result, made) {
                vectors.advance(moved);
            }
            if let Some(status) = pending.work.completed(result) {
                break status;
            }
            let call = pending.work.call();
            if let Call::Zeroes(extent) = call {
                vectors = Vectors::zeroes(extent.length);
            }
            match self.io.go_on(self.number, request, call, vectors) {
                Ok(()) => return None,
                Err(back) => (vectors, result) = (back, Err(Errno::AGAIN)),
            }
        };
        let ended = take(&mut self.in_flight, &mut self.free, request)?;
        let lane = self.lanes.get_mut(ended.queue)?.as_mut()?;
        lane.under_way.remove(&ended.head);
        let filled = status == Status::Ok && ended.work.is_read();
        let data = if filled { ended.room } else { 0 };
        let written = answer(&ended.status, status, data, ended.room);
        match status {
            Status::Ok => self.terms.counters.done(ended.tally),
            _ => {
                self.terms.counters.failed(status);
                let errno = result.err();
                self.io.failed(&DiskFault {
                    id: self.terms.name(),
                    errno,
                });
            }
        }
        match lane.queue.push_used(&self.memory, ended.head, written) {
            Ok(()) => Some(ended.queue),
            Err(_) => {
                self.broke(ended.queue);
                None
            }
        }
    }

    /// Takes results and interrupts the driver for the answers.
    fn answer_all(&mut self, done: Vec<Done>) {
        let answered: BTreeSet<usize> = done
            .into_iter()
            .filter_map(|done| self.done(done))
            .collect();
        for index in answered {
            if self.told(index, true).is_err() {
                self.broke(index);
            }
        }
        if self.is_idle() {
            self.idle.notify_all();
            if let Some(held) = &self.held {
                // Fails only when the counter is full, and then the fd is readable anyway.
                let _ = held.write(1);
            }
        }
    }

    fn broke(&mut self, index: usize) {
        if let Some(lane) = self.lanes.get_mut(index) {
            *lane = None;
            self.interrupt.needs_reset();
        }
    }
}

impl Subscriber for Server {
    /// `token` is the number of the queue that was kicked.
    fn ready(&mut self, token: u64, _readiness: Readiness) {
        let index = token as usize;
        if self.serve(index).is_err() {
            self.broke(index);
        }
        let done = self.io.flush_and_take(self.number);
        if !done.is_empty() {
            self.answer_all(done);
            // Some may go on.
            self.io.flush();
        }
    }
}

/// How the engine knows a disk.
pub(super) struct Results(pub(super) Arc<Mutex<Server>>);

impl Client for Results {
    fn done(&self, done: Vec<Done>) {
        lock(&self.0).answer_all(done);
    }
}

/// Waits until no request of a server that was stopped is under way, which the loop's thread sees to; false if one still is
/// after `patience`.
pub(super) fn wait_until_idle(server: &Mutex<Server>, patience: Duration) -> bool {
    let guard = lock(server);
    let idle = guard.idle.clone();
    let waited = idle.wait_timeout_while(guard, patience, |server| !server.is_idle());
    let (_server, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
    !timeout.timed_out()
}

pub(super) fn lock(server: &Mutex<Server>) -> MutexGuard<'_, Server> {
    // A panic ends the VMM; in tests the state is still the last whole one.
    server.lock().unwrap_or_else(PoisonError::into_inner)
}

fn insert(places: &mut Vec<Option<InFlight>>, free: &mut Vec<u32>, request: InFlight) -> u32 {
    match free.pop() {
        Some(number) => {
            if let Some(place) = places.get_mut(number as usize) {
                *place = Some(request);
            }
            number
        }
        None => {
            places.push(Some(request));
            // No more than all queues have heads, see `Lane::under_way`.
            (places.len() - 1) as u32
        }
    }
}

fn take(places: &mut [Option<InFlight>], free: &mut Vec<u32>, number: u32) -> Option<InFlight> {
    let request = places.get_mut(number as usize)?.take()?;
    free.push(number);
    Some(request)
}

/// Looks at one chain. Without a byte for the status nobody can be told anything: it is handed back as it is.
fn begin(
    mut buffers: Buffers<'_>,
    memory: &GuestMemory,
    terms: &Terms,
    (queue, head): (usize, u16),
) -> Begun {
    let Some(room) = buffers.writable.remaining().checked_sub(1) else {
        return Begun::Answered(0);
    };
    let request = Request::parse(&mut buffers.readable, room, terms.limits);
    let mut data = Vec::new();
    let mut left = room;
    while let Some(piece) = buffers.writable.next_piece(left) {
        left -= piece.len();
        data.push(piece);
    }
    let status: Vec<VolatileSlice<'_>> = buffers.writable.next_piece(1).into_iter().collect();
    let status = Vectors::new(memory, &status);
    // The walk admitted no more than u32::MAX bytes.
    let room = room as u32;
    let tally = request.as_ref().map(Tally::of).unwrap_or_default();
    let (work, vectors) = match request {
        Err(refused) => {
            terms.counters.failed(refused);
            return Begun::Answered(answer(&status, refused, 0, room));
        }
        Ok(Request::Read(extent)) if extent.length > 0 => {
            (Some(Work::read(extent)), Vectors::new(memory, &data))
        }
        Ok(Request::Write(extent)) if extent.length > 0 => {
            let sent: Vec<_> =
                std::iter::from_fn(|| buffers.readable.next_piece(usize::MAX)).collect();
            let work = Work::write(extent, terms.durable);
            (Some(work), Vectors::new(memory, &sent))
        }
        Ok(Request::Read(_) | Request::Write(_)) => (None, Vectors::empty()),
        Ok(Request::Flush) => (Some(Work::flush()), Vectors::empty()),
        Ok(Request::Discard(ranges)) => (Work::discard(&ranges), Vectors::empty()),
        Ok(Request::WriteZeroes(ranges)) => {
            let work = Work::write_zeroes(&ranges, terms.durable);
            (work, Vectors::empty())
        }
        Ok(Request::Identify) => {
            let told = Vectors::new(memory, &data).fill(&terms.id) as u32;
            return Begun::Answered(answer(&status, Status::Ok, told, room));
        }
    };
    match work {
        None => Begun::Answered(answer(&status, Status::Ok, 0, room)),
        Some(work) => {
            let request = InFlight {
                queue,
                head,
                work,
                status,
                room,
                tally,
            };
            Begun::Wait(request, vectors)
        }
    }
}

/// Writes the status behind `room` bytes of which the first `data` were written; returns how many bytes from the first on the
/// driver may believe (section 2.7.8.2).
fn answer(status: &Vectors, code: Status, data: u32, room: u32) -> u32 {
    status.fill(&[code as u8]);
    if data < room {
        data
    } else {
        room.saturating_add(1)
    }
}

#[cfg(test)]
mod tests {
    use super::super::engine::EngineKind;
    use super::*;
    use crate::event::Poller;
    use crate::testing::memory;
    use std::time::Instant;

    struct Nobody;

    impl Interrupt for Nobody {
        fn used(&self, _queue: u16) {}
        fn config_changed(&self) {}
        fn needs_reset(&self) {}
    }

    #[test]
    fn a_reset_waits_for_what_is_under_way_and_not_for_ever() {
        let poller = Poller::new().unwrap();
        let io = DiskIo::new(EngineKind::Threads, &poller).unwrap();
        let terms = Terms {
            limits: Limits {
                sectors: 1,
                read_only: false,
                discard: false,
                write_zeroes: false,
            },
            durable: false,
            id: [0; ID_BYTES],
            counters: Arc::default(),
        };
        let memory = memory(&[(0, 4096)]);
        let mut server = Server::new(memory, Arc::new(Nobody), vec![None], terms, (io, 0));
        let request = InFlight {
            queue: 0,
            head: 0,
            work: Work::flush(),
            status: Vectors::empty(),
            room: 0,
            tally: Tally::Nothing,
        };
        let request = insert(&mut server.in_flight, &mut server.free, request);
        server.stop();
        let server = Arc::new(Mutex::new(server));
        let short = Duration::from_millis(20);
        let since = Instant::now();
        assert!(!wait_until_idle(&server, short));
        assert!(since.elapsed() >= short);
        let results = Results(server.clone());
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| wait_until_idle(&server, Duration::from_secs(10)));
            results.done(vec![Done {
                request,
                result: Ok(0),
                vectors: Vectors::empty(),
            }]);
            assert!(waiting.join().unwrap());
        });
    }
}
