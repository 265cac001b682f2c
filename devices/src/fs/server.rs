//! The protocol around a session: one request in, at most one reply out, and INIT before anything else.
//!
//! A request that is cut short before its header's end, or has no room for the header of a reply, is given
//! back with nothing written: there is nobody to answer to. Every other request is answered, wrong ones with
//! the errno that a kernel would give. Before INIT, and after DESTROY or a reset, only INIT is served.

use super::abi::{self, Put};
use super::directory::ENTRIES_MAX_BYTES;
use super::guest_io::Buffers;
use super::request::{Header, Init, Op, REQUEST_MAX_BYTES, parse};
use super::session::{FdBudget, Scratch, Served, Session, put_init};
use crate::counters::{Counters, counters};
use rustix::io::Errno;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

counters! {
    /// Requests that were served.
    FsCounters {
        /// All.
        requests,
        /// Those that were answered with an error, of which a name that is not there is the most common.
        errors,
        /// Bytes of files that were read.
        read_bytes,
        /// Bytes that WRITE brought.
        written_bytes,
    }
}

/// What whoever has another descriptor table may know of a share.
#[derive(Default)]
pub(crate) struct Facts {
    counters: Arc<FsCounters>,
    mounted: AtomicBool,
    /// The session, to look at from outside.
    #[cfg(test)]
    session: Mutex<std::sync::Weak<Session>>,
}

impl Facts {
    /// What the share counts.
    pub(crate) fn counters(&self) -> Arc<dyn Counters> {
        self.counters.clone()
    }

    /// Whether the guest has mounted the share.
    pub(crate) fn is_mounted(&self) -> bool {
        self.mounted.load(Ordering::SeqCst)
    }

    /// The session, which must not be the caller's to drop: not kept beyond the guest's next mount.
    #[cfg(test)]
    pub(crate) fn session(&self) -> Option<Arc<Session>> {
        self.session.lock().unwrap().upgrade()
    }
}

/// The share, as its threads see it after they were confined. It is in their descriptor table alone, and so are they who drop it.
pub(crate) struct Server {
    root: Arc<OwnedFd>,
    proc_fds: Arc<OwnedFd>,
    budget: FdBudget,
    session: Mutex<Option<Arc<Session>>>,
    facts: Arc<Facts>,
}

impl Scratch {
    /// Buffers that grow to their bounds once and stay.
    pub(crate) fn new() -> Scratch {
        Scratch {
            request: Vec::new(),
            reply: Vec::new(),
            entries: Vec::with_capacity(ENTRIES_MAX_BYTES),
        }
    }
}

impl Server {
    /// Serves the tree below `root`; `proc_fds` is the threads' `/proc/thread-self/fd`.
    pub(crate) fn new(
        root: OwnedFd,
        proc_fds: Arc<OwnedFd>,
        budget: FdBudget,
        facts: Arc<Facts>,
    ) -> Server {
        Server {
            root: Arc::new(root),
            proc_fds,
            budget,
            session: Mutex::new(None),
            facts,
        }
    }

    /// Ends the session: its nodes and open files go, once no request uses them.
    pub(crate) fn end_session(&self) {
        let mut slot = self.slot();
        let ended = slot.take();
        self.facts.mounted.store(false, Ordering::SeqCst);
        // Files are closed without the lock.
        drop(slot);
        drop(ended);
    }

    /// Serves one request; returns how many bytes were written into its buffers.
    pub(crate) fn serve(&self, buffers: &Buffers<'_>, scratch: &mut Scratch) -> u32 {
        let mut bytes = [0; abi::IN_HEADER_BYTES];
        if buffers.read_at(0, &mut bytes) < bytes.len() {
            return 0;
        }
        let Some(header) = Header::parse(&bytes) else {
            return 0;
        };
        let wants_reply = header.wants_reply();
        let room = match buffers.writable_bytes().checked_sub(abi::OUT_HEADER_BYTES) {
            Some(room) => room,
            None if wants_reply => return 0,
            None => 0,
        };
        let served = self.answer(&header, buffers, room, scratch);
        let counters = &self.facts.counters;
        counters.requests.add(1);
        match &served {
            Ok(Served::Data(bytes)) => counters.read_bytes.add(*bytes as u64),
            Ok(Served::Payload) => {}
            Err(_) => counters.errors.add(1),
        }
        if !wants_reply {
            return 0;
        }
        let (payload, errno) = match served {
            Ok(Served::Payload) if scratch.reply.len() <= room => {
                (buffers.write_at(abi::OUT_HEADER_BYTES, &scratch.reply), 0)
            }
            Ok(Served::Payload) => (0, Errno::INVAL.raw_os_error()),
            Ok(Served::Data(bytes)) => (bytes, 0),
            Err(errno) => (0, errno.raw_os_error()),
        };
        // A chain is shorter than 4 GiB (the queue code sees to it), so this does not truncate.
        let len = (abi::OUT_HEADER_BYTES + payload) as u32;
        let mut out = Vec::with_capacity(abi::OUT_HEADER_BYTES);
        out.put_u32(len);
        out.put_u32((-errno) as u32);
        out.put_u64(header.unique);
        buffers.write_at(0, &out);
        len
    }

    fn answer(
        &self,
        header: &Header,
        buffers: &Buffers<'_>,
        room: usize,
        scratch: &mut Scratch,
    ) -> Result<Served, Errno> {
        scratch.reply.clear();
        header.check(buffers.readable_bytes())?;
        let behind = buffers.readable_bytes() - abi::IN_HEADER_BYTES;
        // The data of a WRITE stays where it is.
        let (args, data) = match header.opcode {
            abi::opcode::WRITE => match behind.checked_sub(abi::WRITE_IN_BYTES) {
                Some(data) => {
                    self.facts.counters.written_bytes.add(data as u64);
                    (abi::WRITE_IN_BYTES, data)
                }
                None => return Err(Errno::INVAL),
            },
            _ if behind > REQUEST_MAX_BYTES => return Err(Errno::TOOBIG),
            _ => (behind, 0),
        };
        let mut request = std::mem::take(&mut scratch.request);
        request.resize(args, 0);
        let copied = buffers.read_at(abi::IN_HEADER_BYTES, &mut request);
        let served = match copied == args {
            true => self.dispatch(header, &request, data, buffers, room, scratch),
            false => Err(Errno::INVAL),
        };
        scratch.request = request;
        served
    }

    fn dispatch(
        &self,
        header: &Header,
        args: &[u8],
        data: usize,
        buffers: &Buffers<'_>,
        room: usize,
        scratch: &mut Scratch,
    ) -> Result<Served, Errno> {
        let session = self.slot().clone();
        match (parse(header, args, data)?, session) {
            (Op::Init(init), None) => self.init(&init, room, &mut scratch.reply),
            (Op::Destroy, _) => {
                self.end_session();
                Ok(Served::Payload)
            }
            (Op::Init(_), Some(_)) | (_, None) => Err(Errno::PROTO),
            (op, Some(session)) => session.serve(header, &op, buffers, room, scratch),
        }
    }

    fn init(&self, init: &Init, room: usize, out: &mut Vec<u8>) -> Result<Served, Errno> {
        if room < abi::INIT_OUT_BYTES {
            return Err(Errno::INVAL);
        }
        if init.major > abi::VERSION_MAJOR {
            // The guest is newer and will ask again in our version.
            out.put_u32(abi::VERSION_MAJOR);
            out.put_u32(abi::VERSION_MINOR);
            out.put_zeros(abi::INIT_OUT_BYTES - 8);
            return Ok(Served::Payload);
        }
        if init.major < abi::VERSION_MAJOR || init.minor < abi::VERSION_MINOR_MIN {
            return Err(Errno::PROTO);
        }
        let session = Session::new(self.root.clone(), self.proc_fds.clone(), self.budget, init)?;
        let mut slot = self.slot();
        if slot.is_some() {
            return Err(Errno::PROTO);
        }
        let session = Arc::new(session);
        #[cfg(test)]
        {
            *self.facts.session.lock().unwrap() = Arc::downgrade(&session);
        }
        *slot = Some(session);
        self.facts.mounted.store(true, Ordering::SeqCst);
        put_init(init, out);
        Ok(Served::Payload)
    }

    fn slot(&self) -> std::sync::MutexGuard<'_, Option<Arc<Session>>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
