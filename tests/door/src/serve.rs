//! Waits at the port for a command and carries its streams: one thread, one poll loop, no unbounded buffer.
//!
//! Input is kept until the command takes it, at most a window of it; output is read only against credit. When the command
//! has ended, what it left in its pipes is carried out before its exit code; a background process that keeps a pipe open
//! does not hold the exit back.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::mount::{MountFlags, mount};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::frame::{DATA_MAX_BYTES, Decoder, Frame, FrameError, Run, Stream, WINDOW_BYTES};
use crate::init::PATH;
use crate::task::{Refusal, Streams, Task};

/// The port's name, as QEMU is told it.
const PORT_NAME: &str = "capsid.door";
/// The drive with the programs under test, and where it is mounted.
const DRIVE: &str = "/dev/vdb";
const PROGRAMS: &str = "/capsid";
/// Docker's code for a failure that is not the command's.
const OUR_FAILURE: u8 = 125;
/// One read from the port.
const PORT_READ_BYTES: usize = 64 << 10;

/// Why the door is of no use any more.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error("the machine has no virtio-serial port named {PORT_NAME}")]
    NoPort,
    #[error("{doing}: {cause}")]
    Io {
        doing: &'static str,
        cause: io::Error,
    },
    #[error("from the port: {0}")]
    Frame(#[from] FrameError),
    #[error("the other end closed the port")]
    Closed,
    #[error("the window of the input was overrun")]
    Overrun,
    #[error("the first frame is not a command to run")]
    NoRun,
}

/// Serves one command.
pub(crate) fn run() -> Result<(), ServeError> {
    let mut port = Port::open()?;
    port.send(&Frame::Ready)?;
    let run = loop {
        if let Some(frame) = port.receive()? {
            break frame;
        }
    };
    let Frame::Run(run) = run else {
        return Err(ServeError::NoRun);
    };
    let task = prepare(&run).and_then(|()| Task::start(&run));
    match task {
        Ok((task, streams)) => Session::new(port, task, streams).carry(),
        Err((code, why)) => port.send(&Frame::Refused(code, why)),
    }
}

/// Clock, programs, copies.
fn prepare(run: &Run) -> Result<(), Refusal> {
    let failed =
        |doing: &str, cause: &dyn std::fmt::Display| (OUR_FAILURE, format!("{doing}: {cause}"));
    let seconds = i64::try_from(run.clock_ns / 1_000_000_000).unwrap_or(i64::MAX);
    let nanoseconds = i64::try_from(run.clock_ns % 1_000_000_000).unwrap_or_default();
    clock_settime(
        ClockId::Realtime,
        Timespec {
            tv_sec: seconds,
            tv_nsec: nanoseconds,
        },
    )
    .map_err(|errno| failed("setting the clock", &errno))?;
    mount(DRIVE, PROGRAMS, "ext4", MountFlags::RDONLY, None)
        .map_err(|errno| failed("mounting the programs under test", &errno))?;
    for (from, to) in &run.copies {
        let from = Path::new(PROGRAMS).join(String::from_utf8_lossy(from).as_ref());
        let to = String::from_utf8_lossy(to).into_owned();
        copy(&from, Path::new(&to)).map_err(|cause| failed(&format!("copying to {to}"), &cause))?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    if let Some(parent) = to.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let mut command = Command::new("cp");
    command
        .args(["-a", "-T", "--"])
        .arg(from)
        .arg(to)
        .env("PATH", PATH)
        .stdin(Stdio::null());
    let output = command.output()?;
    if output.status.success() {
        Ok(())
    } else {
        Err(io::Error::other(
            String::from_utf8_lossy(&output.stderr).into_owned(),
        ))
    }
}

/// The virtio-serial port, as frames.
struct Port {
    file: File,
    decoder: Decoder,
    /// Reused: clearing a new one for each read would cost more than the read.
    bytes: Vec<u8>,
}

impl Port {
    fn open() -> Result<Self, ServeError> {
        let io = |doing| move |cause| ServeError::Io { doing, cause };
        let ports =
            std::fs::read_dir("/sys/class/virtio-ports").map_err(io("listing the ports"))?;
        for port in ports {
            let port = port.map_err(io("listing the ports"))?;
            // A port without a name is QEMU's own.
            let name = std::fs::read_to_string(port.path().join("name")).unwrap_or_default();
            if name.trim() == PORT_NAME {
                let path = Path::new("/dev").join(port.file_name());
                let file = File::options()
                    .read(true)
                    .write(true)
                    .open(path)
                    .map_err(io("opening the port"))?;
                return Ok(Self {
                    file,
                    decoder: Decoder::default(),
                    bytes: vec![0; PORT_READ_BYTES],
                });
            }
        }
        Err(ServeError::NoPort)
    }

    fn send(&mut self, frame: &Frame) -> Result<(), ServeError> {
        self.file
            .write_all(&frame.encode())
            .map_err(|cause| ServeError::Io {
                doing: "writing to the port",
                cause,
            })
    }

    /// Reads what is there and returns the next whole frame, if there is one.
    fn receive(&mut self) -> Result<Option<Frame>, ServeError> {
        if let Some(frame) = self.decoder.next_frame()? {
            return Ok(Some(frame));
        }
        let length = self
            .file
            .read(&mut self.bytes)
            .map_err(|cause| ServeError::Io {
                doing: "reading the port",
                cause,
            })?;
        if length == 0 {
            return Err(ServeError::Closed);
        }
        self.decoder
            .push(self.bytes.get(..length).unwrap_or_default());
        Ok(self.decoder.next_frame()?)
    }
}

/// One of the command's outputs.
struct Output {
    stream: Stream,
    fd: Option<OwnedFd>,
    credit: u32,
}

/// A command being carried.
struct Session {
    port: Port,
    task: Task,
    input: Option<OwnedFd>,
    pending: Vec<u8>,
    input_ended: bool,
    outputs: Vec<Output>,
    ended: Option<u8>,
}

/// What the poll found.
struct Found {
    port: bool,
    ended: bool,
    input: bool,
    outputs: Vec<bool>,
}

impl Session {
    fn new(port: Port, task: Task, streams: Streams) -> Self {
        let outputs = [
            (Stream::Out, Some(streams.stdout)),
            (Stream::Err, streams.stderr),
        ]
        .map(|(stream, fd)| Output {
            stream,
            fd,
            credit: WINDOW_BYTES,
        })
        .into();
        let input = Some(streams.stdin);
        Self {
            port,
            task,
            input,
            pending: Vec::new(),
            input_ended: false,
            outputs,
            ended: None,
        }
    }

    fn carry(mut self) -> Result<(), ServeError> {
        loop {
            let found = self.wait()?;
            if found.port {
                let mut next = self.port.receive()?;
                while let Some(frame) = next {
                    self.handle(frame)?;
                    next = self.port.decoder.next_frame()?;
                }
            }
            if found.input {
                self.feed()?;
            }
            for (index, readable) in found.outputs.iter().enumerate() {
                if *readable || self.ended.is_some() {
                    self.drain(index)?;
                }
            }
            if found.ended && self.ended.is_none() {
                let code = self.task.reap().map_err(|cause| ServeError::Io {
                    doing: "reaping the command",
                    cause,
                })?;
                self.ended = Some(code);
            }
            if let Some(code) = self.ended {
                if self.outputs.iter().all(|output| output.fd.is_none()) {
                    return self.port.send(&Frame::Exit(code));
                }
            }
        }
    }

    fn wait(&self) -> Result<Found, ServeError> {
        let mut fds = vec![
            PollFd::new(&self.port.file, PollFlags::IN),
            PollFd::new(&self.task.pidfd, PollFlags::IN),
        ];
        let input = self.input.as_ref().filter(|_| !self.pending.is_empty());
        let watched = |output: &Output| output.fd.is_some() && output.credit > 0;
        if let Some(fd) = input {
            fds.push(PollFd::new(fd, PollFlags::OUT));
        }
        for output in self.outputs.iter().filter(|output| watched(output)) {
            fds.extend(output.fd.as_ref().map(|fd| PollFd::new(fd, PollFlags::IN)));
        }
        if self.ended.is_some() {
            // Ready for ever; what is left is in the pipes and at the port.
            fds.remove(1);
        }
        // Once the command has ended, an output with credit is read right away: it is empty, or it is not.
        let at_once = self.ended.is_some() && self.outputs.iter().any(watched);
        let timeout = at_once.then_some(&Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        });
        match poll(&mut fds, timeout) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => {
                return Err(ServeError::Io {
                    doing: "waiting",
                    cause: errno.into(),
                });
            }
        }
        let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
        let mut next = |is_there: bool| is_there && ready.next().unwrap_or(false);
        Ok(Found {
            port: next(true),
            ended: next(self.ended.is_none()),
            input: next(input.is_some()),
            outputs: self
                .outputs
                .iter()
                .map(|output| next(watched(output)))
                .collect(),
        })
    }

    fn handle(&mut self, frame: Frame) -> Result<(), ServeError> {
        match frame {
            Frame::Data(Stream::In, bytes) => {
                if self.pending.len() + bytes.len() > WINDOW_BYTES as usize {
                    return Err(ServeError::Overrun);
                }
                if self.input.is_some() {
                    self.pending.extend_from_slice(&bytes);
                    self.feed()?;
                }
            }
            Frame::Closed(Stream::In) => {
                self.input_ended = true;
                self.feed()?;
            }
            Frame::Closed(stream) => {
                // Nobody reads it outside: the command learns it from its pipe.
                self.outputs
                    .iter_mut()
                    .filter(|output| output.stream == stream)
                    .for_each(|output| output.fd = None);
            }
            Frame::Credit(stream, bytes) => {
                let outputs = self
                    .outputs
                    .iter_mut()
                    .filter(|output| output.stream == stream);
                outputs.for_each(|output| {
                    output.credit = output.credit.saturating_add(bytes).min(WINDOW_BYTES);
                });
            }
            Frame::Signal(number) => self.task.signal(number),
            Frame::Resize(size) => {
                self.task.resize(size).map_err(|cause| ServeError::Io {
                    doing: "resizing the terminal",
                    cause,
                })?;
            }
            Frame::Ready
            | Frame::Run(_)
            | Frame::Data(..)
            | Frame::Exit(_)
            | Frame::Refused(..) => {
                return Err(ServeError::NoRun);
            }
        }
        Ok(())
    }

    /// Gives the command what it takes of its input.
    fn feed(&mut self) -> Result<(), ServeError> {
        let Some(input) = &self.input else {
            return Ok(());
        };
        if !self.pending.is_empty() {
            match rustix::io::write(input, &self.pending) {
                Ok(taken) => {
                    self.pending.drain(..taken.min(self.pending.len()));
                    self.port.send(&Frame::Credit(
                        Stream::In,
                        u32::try_from(taken).unwrap_or(u32::MAX),
                    ))?;
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
                Err(_) => {
                    // The command closed its input; that is its right.
                    self.pending.clear();
                    self.input = None;
                    return self.port.send(&Frame::Closed(Stream::In));
                }
            }
        }
        if self.input_ended && self.pending.is_empty() {
            self.input = None;
        }
        Ok(())
    }

    /// Carries out what one output has, as far as its credit goes.
    fn drain(&mut self, index: usize) -> Result<(), ServeError> {
        let Some(output) = self.outputs.get_mut(index) else {
            return Ok(());
        };
        let Some(fd) = &output.fd else { return Ok(()) };
        let room = DATA_MAX_BYTES.min(output.credit as usize);
        if room == 0 {
            return Ok(());
        }
        let mut bytes = vec![0; room];
        match rustix::io::read(fd.as_fd(), &mut bytes[..]) {
            Ok(length) if length > 0 => {
                bytes.truncate(length);
                output.credit -= u32::try_from(length).unwrap_or(output.credit);
                let stream = output.stream;
                self.port.send(&Frame::Data(stream, bytes))
            }
            Err(rustix::io::Errno::INTR) => Ok(()),
            Err(rustix::io::Errno::AGAIN) if self.ended.is_none() => Ok(()),
            // The end; or the command is gone and its pipe is empty; or (EIO) its terminal is gone.
            Ok(_) | Err(_) => {
                output.fd = None;
                let stream = output.stream;
                self.port.send(&Frame::Closed(stream))
            }
        }
    }
}
