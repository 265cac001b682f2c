//! The VMM's end of the control channel ([`capsid_protocol::control`]): takes one request at a time off the socket, has it
//! [`serve`]d, and sends the reply.
//!
//! The machine looks at it after each turn of the event loop that something of it woke; nothing here waits. Trusts the owner as far as the
//! owner channel does: what it asks is done or refused, and bytes that are no message end the VM, since then one of the two is
//! not what the other takes it for.

mod serve;

pub use serve::Attachments;

use crate::end::End;
use crate::machine::Machine;
use crate::vcpus::Vcpus;
use capsid_devices::event::{EventLoop, Interest, Poller, Readiness, Subscriber};
use capsid_protocol::control::{
    FRAME_TIMEOUT_MS, FrameLength, REQUEST_FDS_MAX, REQUEST_MAX_BYTES, Reply, Request,
};
use capsid_protocol::exit::VmmExit;
use rustix::io::Errno;
use rustix::net::sockopt::socket_type;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, SocketType,
    recvmsg, send,
};
use serve::Answer;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long the vCPUs may take to leave the guest when they are to pause, and the devices to end what is under way, in ms. A vCPU may be
/// inside a device whose reset waits for the host's disk, which is bounded by less.
pub const PAUSE_TIMEOUT_MS: u64 = 3_000;

/// Why the socket cannot be one.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Not a stream.
    #[error("the control channel is not a SOCK_STREAM socket")]
    NotStream,
    /// The event loop cannot watch it.
    #[error("cannot watch the control channel")]
    Watch(#[source] io::Error),
}

/// A frame that is on its way in.
#[derive(Default)]
struct Inbox {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
    /// More fds came than this process or a request has room for.
    fds_cut: bool,
    /// When its first byte came.
    begun: Option<Instant>,
}

/// What the channel is at.
enum Stage {
    /// The next request may come.
    Listening,
    /// The vCPUs were told to pause, until then, and the devices are told when they have.
    Pausing(Instant),
    /// The rest of a reply waits for room in the socket, until then.
    Replying(Vec<u8>, Instant),
    /// The owner closed it.
    Closed,
}

/// The open channel. Its drop stops listening.
pub struct Control {
    socket: OwnedFd,
    poller: Arc<Poller>,
    woken: Arc<Woken>,
    quiet: RawFd,
    inbox: Inbox,
    stage: Stage,
    attachments: Attachments,
}

/// Notes that the socket is ready, or that the vCPUs have paused.
struct Wake(Arc<Woken>);

#[derive(Default)]
struct Woken {
    ready: AtomicBool,
    /// The owner's end is closed.
    hung_up: AtomicBool,
}

impl Subscriber for Wake {
    fn ready(&mut self, _token: u64, readiness: Readiness) {
        self.0.ready.store(true, Ordering::Relaxed);
        self.0.hung_up.fetch_or(readiness.hangup, Ordering::Relaxed);
    }
}

/// What came of one look at the socket.
enum Received {
    Some,
    NothingYet,
    Closed,
}

impl Control {
    /// Listens to the owner on `socket` from now on.
    ///
    /// # Errors
    /// See [`ControlError`].
    pub fn open(
        socket: OwnedFd,
        vcpus: &Vcpus,
        attachments: Attachments,
    ) -> Result<Control, ControlError> {
        if socket_type(&socket) != Ok(SocketType::STREAM) {
            return Err(ControlError::NotStream);
        }
        let poller = attachments.poller.clone();
        let woken = Arc::<Woken>::default();
        let wake = Arc::new(Mutex::new(Wake(Arc::clone(&woken))));
        let readable = interest(&Stage::Listening);
        for fd in [socket.as_raw_fd(), vcpus.quiet().as_raw_fd()] {
            poller
                .watch(fd, readable, 0, wake.clone())
                .map_err(ControlError::Watch)?;
        }
        Ok(Control {
            socket,
            poller,
            woken,
            quiet: vcpus.quiet().as_raw_fd(),
            inbox: Inbox::default(),
            stage: Stage::Listening,
            attachments,
        })
    }

    /// When the channel wants to be looked at even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        match self.stage {
            Stage::Pausing(deadline) | Stage::Replying(_, deadline) => Some(deadline),
            _ => Some(self.inbox.begun? + Duration::from_millis(FRAME_TIMEOUT_MS)),
        }
    }

    /// Does what can be done now; an end if the owner wants one, or is none.
    pub fn turn(&mut self, machine: &mut Machine) -> Option<End> {
        let late = self
            .deadline()
            .is_some_and(|deadline| deadline <= Instant::now());
        if !self.woken.ready.swap(false, Ordering::Relaxed) && !late {
            return None;
        }
        // An empty counter: it was the socket.
        let _ = machine.vcpus.quiet().read();
        let end = self.step(machine, late);
        // A socket that the owner has closed is watched no more; else this fails for no fd that is watched.
        let _ = self
            .poller
            .change(self.socket.as_raw_fd(), interest(&self.stage));
        end
    }

    /// The guest is asked to power off: a pause would keep it from hearing that, so the one that is under way is given up, and no
    /// other is begun.
    pub fn ends(&mut self, machine: &Machine, signal: &str) {
        self.attachments.ends = true;
        machine.resume();
        if let Stage::Pausing(_) = self.stage {
            let why = format!("{signal} came: the VM is to end");
            self.reply(&Reply::Refused { why }, machine);
        }
    }

    fn step(&mut self, machine: &mut Machine, late: bool) -> Option<End> {
        match &mut self.stage {
            Stage::Closed => None,
            Stage::Replying(..) if late => {
                // An owner that does not read is none.
                self.close(machine);
                None
            }
            Stage::Replying(rest, until) => {
                let (rest, until) = (std::mem::take(rest), *until);
                self.send(rest, until, machine);
                None
            }
            Stage::Pausing(_) => {
                self.pause(machine, late);
                None
            }
            Stage::Listening => self.listen(machine, late),
        }
    }

    /// Goes on with a pause: when the vCPUs have left the guest, the devices end what is under way and let go of its memory.
    fn pause(&mut self, machine: &Machine, late: bool) {
        let why = match machine.vcpus.is_quiet() {
            true => match machine.slots.suspend(machine.vcpus.quiet()) {
                Ok(()) => return self.reply(&Reply::Done, machine),
                Err(restless) => late.then(|| crate::end::in_full(&restless)),
            },
            false => {
                late.then(|| format!("a vCPU did not leave the guest within {PAUSE_TIMEOUT_MS} ms"))
            }
        };
        if let Some(why) = why {
            machine.resume();
            self.reply(&Reply::Refused { why }, machine);
        } else if self.woken.hung_up.load(Ordering::Relaxed) {
            self.close(machine);
        }
    }

    /// Takes as much of one request as is there.
    fn listen(&mut self, machine: &mut Machine, late: bool) -> Option<End> {
        let bad = |why: String| Some(End::new(VmmExit::BadConfig, why));
        loop {
            let wanted = match self.inbox.wanted() {
                Ok(Some(wanted)) => wanted,
                Ok(None) => break,
                Err(frame) => return bad(frame.to_string()),
            };
            match receive(&self.socket, &mut self.inbox, wanted) {
                Ok(Received::Some) => {}
                Ok(Received::NothingYet) if late && self.inbox.begun.is_some() => {
                    return bad(format!(
                        "a message on the control channel was not whole after {FRAME_TIMEOUT_MS} ms"
                    ));
                }
                Ok(Received::NothingYet) => return None,
                Ok(Received::Closed) => {
                    self.close(machine);
                    return None;
                }
                Err(error) => {
                    let why = format!("cannot read the control channel: {error}");
                    return Some(End::new(VmmExit::Internal, why));
                }
            }
        }
        let inbox = std::mem::take(&mut self.inbox);
        match self.attachments.serve(machine, inbox.request(), inbox.fds) {
            Answer::Reply(reply) => self.reply(&reply, machine),
            Answer::Pausing => {
                self.stage =
                    Stage::Pausing(Instant::now() + Duration::from_millis(PAUSE_TIMEOUT_MS));
            }
            Answer::Stop => {
                self.reply(&Reply::Done, machine);
                let why = "the owner said so on the control channel";
                return Some(End::new(VmmExit::Stopped, why));
            }
        }
        None
    }

    fn reply(&mut self, reply: &Reply, machine: &Machine) {
        let frame = reply.to_frame().or_else(|bad| {
            let why = bad.to_string();
            Reply::Refused { why }.to_frame()
        });
        // The second one is short.
        let until = Instant::now() + Duration::from_millis(FRAME_TIMEOUT_MS);
        self.send(frame.unwrap_or_default(), until, machine);
    }

    /// Sends what there is room for; the rest waits.
    fn send(&mut self, mut bytes: Vec<u8>, until: Instant, machine: &Machine) {
        self.stage = Stage::Listening;
        while !bytes.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::io::retry_on_intr(|| send(&self.socket, &bytes, flags)) {
                Ok(sent) => drop(bytes.drain(..sent)),
                Err(Errno::AGAIN) => {
                    self.stage = Stage::Replying(bytes, until);
                    return;
                }
                Err(_) => {
                    self.close(machine);
                    return;
                }
            }
        }
        // The next request may be there already, and nobody is woken for what is not looked at.
        self.woken.ready.store(true, Ordering::Relaxed);
    }

    /// The owner is gone: nobody is left to end a pause.
    fn close(&mut self, machine: &Machine) {
        machine.resume();
        self.poller.forget(self.socket.as_raw_fd());
        self.inbox = Inbox::default();
        self.stage = Stage::Closed;
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        self.poller.forget(self.quiet);
        self.poller.forget(self.socket.as_raw_fd());
    }
}

/// What the socket is watched for.
fn interest(stage: &Stage) -> Interest {
    Interest {
        // One request at a time: the next waits in the socket.
        readable: matches!(stage, Stage::Listening),
        writable: matches!(stage, Stage::Replying(..)),
        edge: false,
    }
}

impl Inbox {
    /// How many bytes are missing; `None` if the frame is whole.
    fn wanted(&self) -> Result<Option<usize>, capsid_protocol::control::BadFrame> {
        let whole = match self.bytes.first_chunk() {
            None => FrameLength::BYTES,
            Some(length) => {
                FrameLength::BYTES + FrameLength::decode(*length, REQUEST_MAX_BYTES)?.get()
            }
        };
        let wanted = whole - self.bytes.len();
        Ok((wanted > 0).then_some(wanted))
    }

    fn request(&self) -> Result<Request, String> {
        if self.fds_cut {
            return Err(format!(
                "more fds came with the request than {REQUEST_FDS_MAX}, or than the VMM has room for"
            ));
        }
        let json = self.bytes.get(FrameLength::BYTES..).unwrap_or_default();
        Request::from_json(json, self.fds.len()).map_err(|error| crate::end::in_full(&error))
    }
}

/// Takes up to `wanted` bytes and what fds come with them, without waiting.
fn receive(socket: &OwnedFd, inbox: &mut Inbox, wanted: usize) -> Result<Received, Errno> {
    let mut bytes = [0; REQUEST_MAX_BYTES];
    let wanted = wanted.min(bytes.len());
    let room = bytes.get_mut(..wanted).unwrap_or_default();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(REQUEST_FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = rustix::io::retry_on_intr(|| {
        recvmsg(
            socket,
            &mut [IoSliceMut::new(&mut *room)],
            &mut control,
            flags,
        )
    });
    let message = match message {
        Ok(message) => message,
        Err(Errno::AGAIN) => return Ok(Received::NothingYet),
        Err(Errno::CONNRESET) => return Ok(Received::Closed),
        Err(error) => return Err(error),
    };
    for received in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = received {
            inbox.fds.extend(fds);
        }
    }
    inbox.fds_cut |= message.flags.contains(ReturnFlags::CTRUNC);
    if inbox.fds.len() > REQUEST_FDS_MAX {
        inbox.fds.truncate(REQUEST_FDS_MAX);
        inbox.fds_cut = true;
    }
    if message.bytes == 0 {
        return Ok(Received::Closed);
    }
    inbox.begun.get_or_insert_with(Instant::now);
    let got = bytes.get(..message.bytes).unwrap_or_default();
    inbox.bytes.extend_from_slice(got);
    Ok(Received::Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_is_read_to_its_end_and_no_byte_further() {
        let mut inbox = Inbox::default();
        assert_eq!(inbox.wanted(), Ok(Some(4)));
        inbox.bytes.extend([3, 0]);
        assert_eq!(inbox.wanted(), Ok(Some(2)));
        inbox.bytes.extend([0, 0, b'x']);
        assert_eq!(inbox.wanted(), Ok(Some(2)));
        inbox.bytes.extend([b'y', b'z']);
        assert_eq!(inbox.wanted(), Ok(None));
        inbox.bytes = 4097u32.to_le_bytes().to_vec();
        assert!(inbox.wanted().is_err());
    }

    #[test]
    fn too_many_fds_are_refused_and_closed() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let fds: Vec<_> = (0..17).map(|_| ours.try_clone().unwrap()).collect();
        let borrowed: Vec<_> = fds.iter().map(std::os::fd::AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(17))];
        let mut control = rustix::net::SendAncillaryBuffer::new(&mut space);
        assert!(control.push(rustix::net::SendAncillaryMessage::ScmRights(&borrowed)));
        let bytes = [io::IoSlice::new(&[6, 0, 0, 0])];
        rustix::net::sendmsg(&ours, &bytes, &mut control, SendFlags::empty()).unwrap();
        let mut inbox = Inbox::default();
        let socket = OwnedFd::from(theirs);
        assert!(matches!(
            receive(&socket, &mut inbox, 4),
            Ok(Received::Some)
        ));
        assert!(inbox.fds.len() <= REQUEST_FDS_MAX && inbox.fds_cut);
        assert!(inbox.request().unwrap_err().contains("more fds"));
    }
}
