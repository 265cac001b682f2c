//! Streams that the host has opened and no process has taken yet. The host dials before the call that
//! names a stream, but the two travel apart, so whoever wants a stream waits a moment for it.
//!
//! A place is held for as long as its stream is kept: it ends when a call takes the stream, when the call that
//! names it is refused, or when the host closes it with nothing left in it to read.

use crate::stdio::HostStreams;
use crate::stream::{Stream, polled};
use capsid_protocol::vsock::StreamHeader;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// Streams that may be open without an owner; more are closed at once.
const PENDING_STREAMS_MAX_COUNT: usize = 64;
/// How long a peer may take to send its 16 bytes.
const HEADER_TIMEOUT_MS: u64 = 5_000;
/// How long a call waits for a stream that it names, and a refusal for one that it closes.
const ARRIVAL_TIMEOUT_MS: u64 = 5_000;

/// Why a stream named by a call cannot be had.
#[derive(Debug, thiserror::Error)]
#[error(
    "stream {0} is not open: dial the agent's stream port before the call that names it, and keep it open"
)]
pub struct NoSuchStream(pub u64);

/// The streams of a new process, by the ids the host chose.
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamIds {
    /// 0: none.
    pub stdin: u64,
    /// 0: none.
    pub stdout: u64,
    /// 0: none.
    pub stderr: u64,
}

/// The streams nobody has taken.
#[derive(Debug)]
pub struct PendingStreams {
    table: Mutex<Table>,
    arrived: Notify,
    room: Arc<Semaphore>,
    power_off: Notify,
}

#[derive(Debug, Default)]
struct Table {
    streams: HashMap<u64, Kept>,
    /// Streams named by refused calls that were still on their way then, and until when they are closed on arrival.
    refused: Vec<(u64, Instant)>,
    /// How many were kept so far, which tells two streams of one id apart.
    count: u64,
}

/// A stream in its place.
#[derive(Debug)]
struct Kept {
    stream: Stream,
    number: u64,
    _watcher: Watcher,
    _place: OwnedSemaphorePermit,
}

/// The task that waits for the host to close a kept stream.
#[derive(Debug)]
struct Watcher(AbortHandle);

impl Drop for Watcher {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Default for PendingStreams {
    fn default() -> Self {
        PendingStreams {
            table: Mutex::default(),
            arrived: Notify::new(),
            room: Arc::new(Semaphore::new(PENDING_STREAMS_MAX_COUNT)),
            power_off: Notify::new(),
        }
    }
}

impl PendingStreams {
    /// Takes a stream just accepted: reads its header in a task of its own, and keeps or closes it.
    pub fn admit(self: &Arc<Self>, stream: Stream) {
        let Ok(place) = Arc::clone(&self.room).try_acquire_owned() else {
            return; // full: dropping the stream resets it
        };
        let pending = Arc::clone(self);
        tokio::spawn(async move {
            let limit = Duration::from_millis(HEADER_TIMEOUT_MS);
            match tokio::time::timeout(limit, read_header(stream)).await {
                Ok(Ok((StreamHeader::Stdio { stream_id }, stream))) => {
                    if let Err(e) = pending.keep(stream_id, stream, place) {
                        crate::last_words::warn(&format!("keeping stream {stream_id}: {e}"));
                    }
                }
                Ok(Ok((StreamHeader::PowerOff, _))) => pending.power_off.notify_one(),
                Ok(Err(_)) | Err(_) => {} // not our protocol, or too slow: closed
            }
        });
    }

    /// Keeps a stream. One whose id is taken is closed, the first one stays; so is one that a refused call named.
    fn keep(
        self: &Arc<Self>,
        id: u64,
        stream: Stream,
        place: OwnedSemaphorePermit,
    ) -> io::Result<()> {
        let mut table = self.table();
        if table.was_refused(id) || table.streams.contains_key(&id) {
            return Ok(());
        }
        // A registration of its own, of which only the watcher takes the events.
        let watched = polled(stream.as_fd().try_clone_to_owned()?, Interest::WRITABLE)?;
        table.count += 1;
        let number = table.count;
        let watcher = tokio::spawn(watch(Arc::downgrade(self), id, number, watched));
        let kept = Kept {
            stream,
            number,
            _watcher: Watcher(watcher.abort_handle()),
            _place: place,
        };
        table.streams.insert(id, kept);
        self.arrived.notify_waiters();
        Ok(())
    }

    /// The host has closed a stream that is kept.
    fn closed(&self, id: u64, number: u64) {
        let mut table = self.table();
        if table
            .streams
            .get(&id)
            .is_some_and(|kept| kept.number == number)
        {
            table.streams.remove(&id);
        }
    }

    /// The streams that a call names, which the call takes or, when it is refused, closes.
    pub fn claim(self: &Arc<Self>, ids: StreamIds) -> Claim {
        Claim {
            pending: Arc::clone(self),
            left: [ids.stdin, ids.stdout, ids.stderr],
        }
    }

    /// The stream with this id; `None` for id 0.
    ///
    /// # Errors
    /// It did not arrive in time.
    async fn take(&self, id: u64) -> Result<Option<Stream>, NoSuchStream> {
        if id == 0 {
            return Ok(None);
        }
        let arrives = async {
            loop {
                // Registered before the look, so that an arrival in between is not missed.
                let arrived = self.arrived.notified();
                let kept = self.table().streams.remove(&id);
                if let Some(kept) = kept {
                    return kept.stream;
                }
                arrived.await;
            }
        };
        let limit = Duration::from_millis(ARRIVAL_TIMEOUT_MS);
        match tokio::time::timeout(limit, arrives).await {
            Ok(stream) => Ok(Some(stream)),
            Err(_) => Err(NoSuchStream(id)),
        }
    }

    /// Waits until the host (its VMM) asks for the end by a stream of kind PowerOff.
    pub async fn power_off(&self) {
        self.power_off.notified().await;
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Whether this arrival is the one that a refused call named.
    fn was_refused(&mut self, id: u64) -> bool {
        let now = Instant::now();
        self.refused.retain(|(_, until)| *until > now);
        let found = self.refused.iter().position(|(refused, _)| *refused == id);
        found.map(|index| self.refused.swap_remove(index)).is_some()
    }

    /// Closes a stream, now or when it arrives.
    fn refuse(&mut self, id: u64) {
        if self.streams.remove(&id).is_some() {
            return;
        }
        let now = Instant::now();
        self.refused.retain(|(_, until)| *until > now);
        // More than can be on their way are not remembered.
        if self.refused.len() < PENDING_STREAMS_MAX_COUNT {
            let until = now + Duration::from_millis(ARRIVAL_TIMEOUT_MS);
            self.refused.push((id, until));
        }
    }
}

/// The streams that a call names. Dropped before all were taken, the call was refused: the others are closed.
#[derive(Debug)]
pub struct Claim {
    pending: Arc<PendingStreams>,
    left: [u64; 3],
}

impl Claim {
    /// Takes them all.
    ///
    /// # Errors
    /// One of them did not arrive in time.
    pub async fn take(mut self) -> Result<HostStreams, NoSuchStream> {
        Ok(HostStreams {
            stdin: self.next(0).await?,
            stdout: self.next(1).await?,
            stderr: self.next(2).await?,
        })
    }

    async fn next(&mut self, index: usize) -> Result<Option<Stream>, NoSuchStream> {
        let id = self.left.get(index).copied().unwrap_or(0);
        let stream = self.pending.take(id).await?;
        if let Some(taken) = self.left.get_mut(index) {
            *taken = 0;
        }
        Ok(stream)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        for id in self.left.into_iter().filter(|id| *id != 0) {
            self.pending.table().refuse(id);
        }
    }
}

/// Waits until the host has closed a stream in both directions, and gives its place back.
async fn watch(pending: Weak<PendingStreams>, id: u64, number: u64, stream: AsyncFd<OwnedFd>) {
    // Each change of the socket's state makes it writable anew; the socket itself is asked what it was.
    while let Ok(mut guard) = stream.writable().await {
        guard.clear_ready();
        if !is_closed(stream.get_ref()) {
            continue;
        }
        let mut byte = [0];
        let peeked = rustix::net::recv(stream.get_ref(), &mut byte, RecvFlags::PEEK);
        match (peeked, pending.upgrade()) {
            // A whole input that was written and closed is still worth a call.
            (Ok((1.., _)), _) | (_, None) => {}
            (_, Some(pending)) => pending.closed(id, number),
        }
        return;
    }
}

/// Whether the peer takes nothing more, which on a vsock no event mask tells from its half-close: nothing is sent.
fn is_closed(stream: &OwnedFd) -> bool {
    !matches!(
        rustix::net::send(stream, &[], SendFlags::NOSIGNAL),
        Ok(_) | Err(Errno::AGAIN | Errno::INTR)
    )
}

async fn read_header(mut stream: Stream) -> io::Result<(StreamHeader, Stream)> {
    let mut bytes = [0; StreamHeader::BYTES];
    stream.read_exact(&mut bytes).await?;
    let header = StreamHeader::decode(&bytes).map_err(io::Error::other)?;
    Ok((header, stream))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    fn pair() -> (UnixStream, Stream) {
        let (host, guest) = UnixStream::pair().expect("a socket pair");
        (host, Stream::new(guest.into()).expect("a stream"))
    }

    #[tokio::test]
    async fn a_stream_is_taken_by_its_id() {
        let pending = Arc::new(PendingStreams::default());
        let (mut host, guest) = pair();
        let header = StreamHeader::Stdio { stream_id: 7 };
        host.write_all(&header.encode()).expect("room");
        pending.admit(guest);
        assert!(pending.take(7).await.expect("it arrives").is_some());
    }

    #[tokio::test]
    async fn id_zero_is_no_stream() {
        let pending = PendingStreams::default();
        assert!(pending.take(0).await.expect("none").is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_never_comes_is_an_error() {
        let pending = PendingStreams::default();
        assert!(pending.take(9).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_sends_no_header_is_closed() {
        let pending = Arc::new(PendingStreams::default());
        let (host, guest) = pair();
        pending.admit(guest);
        tokio::time::sleep(Duration::from_millis(HEADER_TIMEOUT_MS * 2)).await;
        let mut byte = [0];
        let read = std::io::Read::read(&mut &host, &mut byte);
        assert_eq!(read.expect("end of file"), 0);
    }

    #[tokio::test]
    async fn streams_over_the_bound_are_closed() {
        let pending = Arc::new(PendingStreams::default());
        let mut kept = Vec::new();
        for _ in 0..PENDING_STREAMS_MAX_COUNT {
            let (host, guest) = pair();
            pending.admit(guest);
            kept.push(host);
        }
        let (host, guest) = pair();
        pending.admit(guest);
        let mut byte = [0];
        let read = std::io::Read::read(&mut &host, &mut byte);
        assert_eq!(read.expect("end of file"), 0);
    }

    /// Opens a stream, to be kept under this id.
    fn dial(pending: &Arc<PendingStreams>, id: u64) -> UnixStream {
        let (mut host, guest) = pair();
        let header = StreamHeader::Stdio { stream_id: id };
        host.write_all(&header.encode()).expect("room");
        pending.admit(guest);
        host
    }

    async fn kept(pending: &PendingStreams, id: u64) {
        loop {
            let arrived = pending.arrived.notified();
            if pending.table().streams.contains_key(&id) {
                return;
            }
            arrived.await;
        }
    }

    /// Waits for the end of what the agent sends.
    async fn ends(host: UnixStream) {
        let host = Stream::new(host.into()).expect("a stream");
        let limit = Duration::from_millis(ARRIVAL_TIMEOUT_MS);
        let read = tokio::time::timeout(limit, async { host.read(&mut [0]).await }).await;
        assert_eq!(read.expect("closed").expect("end of file"), 0);
    }

    /// Waits until all places are free.
    async fn all_free(pending: &PendingStreams) {
        let all = pending.room.acquire_many(PENDING_STREAMS_MAX_COUNT as u32);
        let limit = Duration::from_millis(ARRIVAL_TIMEOUT_MS);
        let all = tokio::time::timeout(limit, all).await.expect("all free");
        drop(all.expect("open"));
    }

    fn stdin_and_stdout(stdin: u64, stdout: u64) -> StreamIds {
        StreamIds {
            stdin,
            stdout,
            stderr: 0,
        }
    }

    #[tokio::test]
    async fn a_refused_call_closes_its_streams_and_gives_their_places_back() {
        let pending = Arc::new(PendingStreams::default());
        for _ in 0..PENDING_STREAMS_MAX_COUNT * 2 {
            let hosts = [1, 2].map(|id| dial(&pending, id));
            kept(&pending, 1).await;
            kept(&pending, 2).await;
            drop(pending.claim(stdin_and_stdout(1, 2)));
            for host in hosts {
                ends(host).await;
            }
        }
        all_free(&pending).await;
    }

    #[tokio::test]
    async fn a_stream_that_arrives_after_its_call_was_refused_is_closed() {
        let pending = Arc::new(PendingStreams::default());
        drop(pending.claim(stdin_and_stdout(1, 0)));
        let late = dial(&pending, 1);
        all_free(&pending).await;
        ends(late).await;
        let _again = dial(&pending, 1);
        assert!(pending.take(1).await.expect("kept").is_some());
    }

    #[tokio::test]
    async fn a_stream_that_the_host_closes_gives_its_place_back() {
        let pending = Arc::new(PendingStreams::default());
        let host = dial(&pending, 1);
        kept(&pending, 1).await;
        drop(host);
        all_free(&pending).await;
        assert!(pending.table().streams.is_empty());
    }

    #[tokio::test]
    async fn what_the_host_has_written_is_kept_through_its_half_close_and_its_close() {
        let pending = Arc::new(PendingStreams::default());
        let mut host = dial(&pending, 1);
        kept(&pending, 1).await;
        host.write_all(b"x").expect("room");
        host.shutdown(std::net::Shutdown::Write).expect("open");
        // Whoever is kept later was told later: the events of the first have been taken.
        let _other = dial(&pending, 2);
        kept(&pending, 2).await;
        drop(host);
        let _another = dial(&pending, 3);
        kept(&pending, 3).await;
        let streams = pending.claim(stdin_and_stdout(1, 0)).take().await;
        let stdin = streams.expect("kept").stdin.expect("named");
        let mut byte = [0];
        assert_eq!(stdin.read(&mut byte).await.expect("readable"), 1);
        assert_eq!(stdin.read(&mut byte).await.expect("end of file"), 0);
        assert_eq!(
            pending.room.available_permits(),
            PENDING_STREAMS_MAX_COUNT - 2
        );
    }

    #[tokio::test]
    async fn power_off_is_heard() {
        let pending = Arc::new(PendingStreams::default());
        let (mut host, guest) = pair();
        host.write_all(&StreamHeader::PowerOff.encode())
            .expect("room");
        pending.admit(guest);
        pending.power_off().await;
    }
}
