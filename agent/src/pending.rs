//! Streams that the host has opened and no process has taken yet. The host dials before the call that
//! names a stream, but the two travel apart, so whoever wants a stream waits a moment for it.

use crate::stream::Stream;
use capsid_protocol::vsock::StreamHeader;
use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::sync::{Notify, Semaphore};

/// Streams that may be open without an owner; more are closed at once.
const PENDING_STREAMS_MAX_COUNT: usize = 64;
/// How long a peer may take to send its 16 bytes.
const HEADER_TIMEOUT_MS: u64 = 5_000;
/// How long a call waits for a stream that it names.
const ARRIVAL_TIMEOUT_MS: u64 = 5_000;

/// Why a stream named by a call cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("stream {0} was never opened: dial the agent's stream port before the call that names it")]
pub struct NoSuchStream(pub u64);

/// The streams nobody has taken.
#[derive(Debug)]
pub struct PendingStreams {
    streams: Mutex<HashMap<u64, Stream>>,
    arrived: Notify,
    room: Arc<Semaphore>,
    power_off: Notify,
}

impl Default for PendingStreams {
    fn default() -> Self {
        PendingStreams {
            streams: Mutex::default(),
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
                    if pending.keep(stream_id, stream) {
                        place.forget(); // the place is given back by `take`
                    }
                }
                Ok(Ok((StreamHeader::PowerOff, _))) => pending.power_off.notify_one(),
                Ok(Err(_)) | Err(_) => {} // not our protocol, or too slow: closed
            }
        });
    }

    /// Keeps a stream; false if its id is taken (then it is closed: the first one stays).
    fn keep(&self, id: u64, stream: Stream) -> bool {
        let mut streams = self.table();
        let free = !streams.contains_key(&id);
        if free {
            streams.insert(id, stream);
            self.arrived.notify_waiters();
        }
        free
    }

    /// The stream with this id; `None` for id 0.
    ///
    /// # Errors
    /// It did not arrive in time.
    pub async fn take(&self, id: u64) -> Result<Option<Stream>, NoSuchStream> {
        if id == 0 {
            return Ok(None);
        }
        let arrives = async {
            loop {
                // Registered before the look, so that an arrival in between is not missed.
                let arrived = self.arrived.notified();
                if let Some(stream) = self.table().remove(&id) {
                    self.room.add_permits(1);
                    return stream;
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

    fn table(&self) -> MutexGuard<'_, HashMap<u64, Stream>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
