//! A VMM without a machine, for the tests of `capsid run`: it takes its configuration as the real one does, dials as an
//! agent would, and serves the agent's calls. What it does is told by the first word of the file that is given as the
//! kernel, or by the container's first argument; some of it is what a hostile VMM or agent would do.

use capsid_protocol::agent as api;
use capsid_protocol::exec_error::ExecError;
use capsid_protocol::machine::{FdNumber, MachineConfig};
use capsid_protocol::vsock::{AGENT_RPC_PORT, OwnerMessage, StreamHeader};
use protobuf::Message;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::exit;
use std::sync::mpsc;
use std::thread;
use ttrpc::Code;

type Streams = HashMap<u64, UnixStream>;

/// Opens an inherited fd by its number.
fn inherited(fd: FdNumber) -> File {
    let path = format!("/proc/self/fd/{}", fd.get());
    File::open(path).expect("an inherited fd")
}

/// A socket by its number: sockets cannot be opened through /proc.
fn socket(fd: FdNumber) -> UnixStream {
    // A pidfd of ourselves duplicates it without unsafe code.
    let me = rustix::process::pidfd_open(
        rustix::process::getpid(),
        rustix::process::PidfdFlags::empty(),
    )
    .expect("a pidfd");
    let flags = rustix::process::PidfdGetfdFlags::empty();
    let fd = rustix::process::pidfd_getfd(me, fd.get(), flags).expect("an inherited socket");
    UnixStream::from(fd)
}

fn main() {
    let default_hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        default_hook(panic);
        exit(70);
    }));
    let words: Vec<String> = std::env::args().collect();
    let number: i64 = words[2].parse().expect("--config-fd N");
    let mut json = Vec::new();
    inherited(FdNumber::try_from(number).expect("3 or more"))
        .read_to_end(&mut json)
        .expect("the configuration");
    let config = MachineConfig::from_json(&json).expect("a good configuration");
    let mut script = String::new();
    inherited(config.kernel_fd)
        .read_to_string(&mut script)
        .expect("the script");
    let mut words = script.split_whitespace();
    match words.next() {
        Some("end") => {
            let code = words.next().expect("a code").parse().expect("a number");
            eprintln!(
                "capsid-vmm: said by the fake: {}",
                words.collect::<Vec<_>>().join(" ")
            );
            exit(code);
        }
        Some("silent") => loop {
            thread::park();
        },
        _ => {}
    }
    let owner = socket(config.vsock.expect("a vsock device").owner_fd);
    let (host, guest) = UnixStream::pair().expect("sockets");
    send_accepted(&owner, &host);
    drop(host);
    if let Some(told) = script.strip_prefix("mute ") {
        // Hears the first call and never answers; whoever listens at the other end of the pipe is told.
        (&guest).read_exact(&mut [0]).expect("a call");
        std::fs::write(told, "x").expect("a pipe");
        lost();
    }
    let (sender, streams) = mpsc::channel();
    thread::spawn(move || take_streams(&owner, &sender));
    Agent {
        channel: guest,
        new_streams: streams,
        streams: Streams::new(),
        args: Vec::new(),
        signal: mpsc::channel(),
    }
    .serve();
}

fn send_accepted(owner: &UnixStream, host: &UnixStream) {
    let packet = OwnerMessage::Accepted {
        port: AGENT_RPC_PORT,
    }
    .encode();
    let fds = [host.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let buffers = [IoSlice::new(&packet)];
    rustix::net::sendmsg(owner, &buffers, &mut control, SendFlags::NOSIGNAL).expect("sent");
}

/// Takes the streams that the owner dials until it is gone, and then ends as a VMM does.
fn take_streams(owner: &UnixStream, sender: &mpsc::Sender<(u64, UnixStream)>) {
    loop {
        let mut packet = [0; OwnerMessage::BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffers = [IoSliceMut::new(&mut packet)];
        let received =
            rustix::net::recvmsg(owner, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC);
        if received.map_or(0, |received| received.bytes) == 0 {
            exit(91);
        }
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                for fd in fds {
                    let mut stream = UnixStream::from(fd);
                    let mut header = [0; StreamHeader::BYTES];
                    stream.read_exact(&mut header).expect("a header");
                    if let Ok(StreamHeader::Stdio { stream_id }) = StreamHeader::decode(&header) {
                        sender.send((stream_id, stream)).expect("the agent runs");
                    }
                }
            }
        }
    }
}

struct Agent {
    channel: UnixStream,
    new_streams: mpsc::Receiver<(u64, UnixStream)>,
    streams: Streams,
    args: Vec<String>,
    signal: (mpsc::Sender<u32>, mpsc::Receiver<u32>),
}

impl Agent {
    fn serve(mut self) {
        loop {
            let mut header = [0u8; 10];
            if self.channel.read_exact(&mut header).is_err() {
                thread::park(); // the owner is gone: the other thread ends us
                continue;
            }
            let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]);
            let mut body = vec![0; length as usize];
            self.channel.read_exact(&mut body).expect("a body");
            let request = ttrpc::Request::parse_from_bytes(&body).expect("a request");
            let stream = [header[4], header[5], header[6], header[7]];
            self.call(stream, &request);
        }
    }

    fn call(&mut self, stream: [u8; 4], request: &ttrpc::Request) {
        match request.method.as_str() {
            "StartSandbox" => {
                let mut answer = api::StartSandboxResponse::new();
                answer.kernel_release = "fake\x1b[2J".to_owned();
                self.answer(stream, &answer);
            }
            "CreateContainer" => {
                let create = api::CreateContainerRequest::parse_from_bytes(&request.payload);
                self.create(stream, &create.expect("a request"));
            }
            "StartContainer" | "ResizeTty" => self.answer(stream, &api::Empty::new()),
            "Signal" => {
                let signal = api::SignalRequest::parse_from_bytes(&request.payload);
                // A command that has ended takes no more of them.
                let number = signal.expect("a request").signal;
                self.signal.0.send(number).ok();
                self.answer(stream, &api::Empty::new());
            }
            "Wait" => self.wait(stream),
            "PowerOff" => {
                self.answer(stream, &api::Empty::new());
                exit(0);
            }
            other => panic!("call {other} is not expected"),
        }
    }

    fn create(&mut self, stream: [u8; 4], create: &api::CreateContainerRequest) {
        let spec: serde_json::Value = serde_json::from_slice(&create.spec_json).expect("JSON");
        let args = spec["process"]["args"].as_array().expect("args");
        self.args = args
            .iter()
            .filter_map(|arg| arg.as_str().map(str::to_owned))
            .collect();
        match self.args.first().map(String::as_str) {
            Some("no-such-command") => {
                let text = format!("{}no-such-command", ExecError::NotFound.prefix());
                return self.refuse(stream, &text);
            }
            Some("refuse") => return self.refuse(stream, "refused \x1b[2J by the fake"),
            Some("spec") => self.args.push(spec.to_string()),
            _ => {}
        }
        let stdio = create.stdio.clone().unwrap_or_default();
        for id in [stdio.stdin, stdio.stdout, stdio.stderr] {
            while id != 0 && !self.streams.contains_key(&id) {
                let (id, stream) = self.new_streams.recv().expect("dialled before the call");
                self.streams.insert(id, stream);
            }
        }
        self.answer(stream, &api::CreateContainerResponse::new());
    }

    /// The command runs on a thread of its own, so that signals come in meanwhile.
    fn wait(&mut self, stream: [u8; 4]) {
        let mut streams = std::mem::take(&mut self.streams);
        let (_, signals) = std::mem::replace(&mut self.signal, mpsc::channel());
        let (sender, receiver) = mpsc::channel();
        // The ends that later signals go to.
        self.signal.0 = sender;
        drop(signals);
        let args = self.args.clone();
        let mut channel = self.channel.try_clone().expect("a socket");
        thread::spawn(move || {
            let status = command(&args, &mut streams, &receiver, &channel);
            if args.first().map(String::as_str) == Some("hold-output") {
                std::mem::forget(streams);
            } else {
                for stream in streams.values() {
                    stream.shutdown(Shutdown::Write).ok();
                }
            }
            let mut answer = api::WaitResponse::new();
            answer.exit_status = status;
            send(&mut channel, stream, &response(&answer));
        });
    }

    fn answer(&mut self, stream: [u8; 4], message: &impl Message) {
        send(&mut self.channel, stream, &response(message));
    }

    fn refuse(&mut self, stream: [u8; 4], text: &str) {
        let mut response = ttrpc::Response::new();
        response.set_status(ttrpc::get_status(Code::INVALID_ARGUMENT, text));
        send(&mut self.channel, stream, &response);
    }
}

fn response(message: &impl Message) -> ttrpc::Response {
    let mut response = ttrpc::Response::new();
    response.set_status(ttrpc::get_status(Code::OK, ""));
    response.payload = message.write_to_bytes().expect("a message");
    response
}

fn send(channel: &mut UnixStream, stream: [u8; 4], response: &ttrpc::Response) {
    let body = response.write_to_bytes().expect("a message");
    let mut frame = (body.len() as u32).to_be_bytes().to_vec();
    frame.extend(stream);
    frame.extend([2, 0]); // a response
    frame.extend(body);
    channel.write_all(&frame).expect("the owner reads");
}

/// Plays the command; its exit status.
fn command(
    args: &[String],
    streams: &mut Streams,
    signals: &mpsc::Receiver<u32>,
    channel: &UnixStream,
) -> u32 {
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["exit", code] => code.parse().expect("a number"),
        ["say", out, err] => {
            write!(streams.get_mut(&2).expect("stdout"), "{out}").expect("read");
            write!(streams.get_mut(&3).expect("stderr"), "{err}").expect("read");
            0
        }
        ["flood", bytes] => {
            let bytes = vec![b'y'; bytes.parse().expect("a number")];
            let to = streams.get_mut(&2).expect("stdout");
            to.write_all(&bytes).expect("read");
            0
        }
        ["spec", spec] => {
            write!(streams.get_mut(&2).expect("stdout"), "{spec}").expect("read");
            0
        }
        ["cat"] => {
            let mut from = streams.remove(&1).expect("stdin");
            let to = streams.get_mut(&2).expect("stdout");
            u32::from(io::copy(&mut from, to).is_err())
        }
        ["yes"] => {
            let to = streams.get_mut(&2).expect("stdout");
            while to.write_all(b"y\n").is_ok() {}
            141
        }
        ["trap"] => {
            write!(streams.get_mut(&2).expect("stdout"), "up").expect("read");
            100 + signals.recv().expect("a signal")
        }
        ["ignore"] => {
            write!(streams.get_mut(&2).expect("stdout"), "up").expect("read");
            while let Ok(_signal) = signals.recv() {}
            unreachable!("the sender is kept")
        }
        ["die", code] => {
            write!(streams.get_mut(&2).expect("stdout"), "last words").expect("read");
            eprintln!("capsid-vmm: said by the fake\n  console: the guest's last line");
            exit(code.parse().expect("a number"))
        }
        ["killed"] => {
            // The first process of a PID namespace cannot kill itself; the kernel does, when the time that it may use is over.
            let limit = rustix::process::Rlimit {
                current: Some(1),
                maximum: Some(1),
            };
            rustix::process::setrlimit(rustix::process::Resource::Cpu, limit).expect("a limit");
            loop {
                std::hint::spin_loop();
            }
        }
        ["hang-up"] => {
            channel.shutdown(Shutdown::Both).expect("a socket");
            lost()
        }
        ["garbage"] => {
            let mut channel = channel.try_clone().expect("a socket");
            // A frame of 4 GiB that never comes, and then the end of the channel.
            channel.write_all(&[0xff; 4096]).expect("read");
            channel.shutdown(Shutdown::Both).expect("a socket");
            lost()
        }
        ["hold-output"] => 0,
        other => panic!("command {other:?} is not expected"),
    }
}

/// What an agent without a channel does: nothing.
fn lost() -> ! {
    loop {
        thread::park();
    }
}
