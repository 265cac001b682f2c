//! The host's side of the hostile guest's connections: what each of its ports does, on one thread.

use crate::owner;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// The ports that the guest may dial, and what answers there.
pub(crate) const ECHOES: u32 = 1024;
pub(crate) const NEVER_READS: u32 = 1025;
pub(crate) const NEVER_STOPS: u32 = 1026;
/// How often it looks whether it is to end.
const LOOK_MS: i64 = 50;

/// The thread; it ends when this is dropped.
pub(crate) struct HostSide {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl HostSide {
    /// Serves the connections that come by `owner`.
    pub(crate) fn new(owner: OwnedFd) -> HostSide {
        // For as many connections as a guest may have. The VMM sets its own limit.
        let limit = getrlimit(Resource::Nofile);
        let raised = Rlimit {
            current: limit.maximum,
            ..limit
        };
        setrlimit(Resource::Nofile, raised).unwrap();
        let ends = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&ends);
        let thread = std::thread::spawn(move || serve(&owner, &ended));
        HostSide {
            ends,
            thread: Some(thread),
        }
    }
}

impl Drop for HostSide {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        let served = self.thread.take().unwrap().join();
        assert!(
            served.is_ok() || std::thread::panicking(),
            "the host's side"
        );
    }
}

fn serve(owner: &OwnedFd, ends: &AtomicBool) {
    let timeout = Timespec {
        tv_sec: 0,
        tv_nsec: LOOK_MS * 1_000_000,
    };
    let mut streams: Vec<(u32, UnixStream)> = Vec::new();
    while !ends.load(Ordering::Relaxed) {
        let mut fds = vec![PollFd::new(owner, PollFlags::IN)];
        fds.extend(streams.iter().map(|(port, stream)| {
            let wanted = match *port {
                ECHOES => PollFlags::IN,
                NEVER_STOPS => PollFlags::OUT,
                _ => PollFlags::empty(),
            };
            PollFd::new(stream, wanted)
        }));
        poll(&mut fds, Some(&timeout)).unwrap();
        let mut ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let accepts = ready.remove(0);
        let mut ready = ready.into_iter();
        streams.retain_mut(|(port, stream)| !ready.next().unwrap() || goes_on(*port, stream));
        if accepts {
            // Without a place for its fd it is closed, of which the guest hears.
            if let (port, Some(stream)) = owner::accept_any(owner) {
                stream.set_nonblocking(true).unwrap();
                streams.push((port, stream));
            }
        }
    }
}

/// Does what the port does on a stream that is ready for it; false if it has ended.
fn goes_on(port: u32, stream: &mut UnixStream) -> bool {
    let mut bytes = [0x5a; 4096];
    let done = match port {
        ECHOES => match stream.read(&mut bytes) {
            Ok(0) => return false,
            Ok(count) => stream.write(&bytes[..count]),
            Err(error) => Err(error),
        },
        NEVER_STOPS => stream.write(&bytes),
        // Ready though nothing is wanted of it: the other end is gone.
        _ => return false,
    };
    match done {
        Ok(_) => true,
        Err(error) => error.kind() == ErrorKind::WouldBlock,
    }
}
