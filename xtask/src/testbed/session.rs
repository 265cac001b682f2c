//! One command inside, seen from here: our streams and signals go in, its streams and exit code come out.
//!
//! A thread for each direction, so that a stream nobody reads holds up nothing else; what is under way is bounded by the
//! windows of `frame`. The third signal gives up on the command and the machine is killed with it.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use signal_hook::consts::SIGWINCH;

use crate::testbed::frame::{DATA_MAX_BYTES, Decoder, Frame, Run, Stream, WINDOW_BYTES};
use crate::testbed::terminal;

/// So many signals are passed on; after the last one we stop waiting for the command.
const SIGNALS_MAX: u32 = 3;
/// As of coreutils' `timeout`.
const TIMED_OUT: u8 = 124;
/// One read from the door.
const DOOR_READ_BYTES: usize = 64 << 10;

/// No credit at all: the door reads it and does nothing. Now and then QEMU (10.0.2) loses an interrupt of the machine's, and an
/// idle machine whose timer's interrupt is lost sleeps for ever. The next interrupt of any device makes up for it, and this frame
/// brings one (`docs/decisions/0008-testbed-of-one-processor.md`).
const NUDGE: Frame = Frame::Credit(Stream::Out, 0);

/// Why the command's end is not known.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The machine went down under the command.
    #[error("the testbed ended before the command: {0}")]
    Gone(String),
    /// The socket could not be shared between threads.
    #[error("opening the streams")]
    Io(#[source] io::Error),
}

/// Where the command's outputs go.
pub struct Outputs {
    /// Its standard output, or all that a terminal shows.
    pub out: Box<dyn Write + Send>,
    /// Its errors.
    pub err: Box<dyn Write + Send>,
}

impl Outputs {
    /// Our own.
    pub fn ours() -> Self {
        Self {
            out: Box::new(io::stdout()),
            err: Box::new(io::stderr()),
        }
    }
}

impl std::fmt::Debug for Outputs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Outputs")
    }
}

enum Event {
    Frame(Frame),
    Signal(i32),
    Gone(String),
}

/// What the other end still takes of a stream.
#[derive(Default)]
struct Credit {
    left: Mutex<u32>,
    more: Condvar,
}

/// Runs a command and returns its exit code. A machine that is silent for `nudge` is sent a frame that means nothing, each time
/// anew: see [`NUDGE`].
///
/// # Errors
/// The machine ended first.
pub(crate) fn carry(
    door: &UnixStream,
    run: Run,
    input: Option<impl Read + Send + 'static>,
    outputs: Outputs,
    signals: Option<Receiver<i32>>,
    limit: Option<Duration>,
    nudge: Option<Duration>,
) -> Result<u8, SessionError> {
    let (events, inbox) = channel();
    let outbox = writer(door.try_clone().map_err(SessionError::Io)?);
    reader(door.try_clone().map_err(SessionError::Io)?, events.clone());
    if let Some(signals) = signals {
        forward_signals(signals, events);
    }
    let credit = Arc::new(Credit::default());
    credit.add(WINDOW_BYTES);
    send(&outbox, Frame::Run(run));
    match input {
        Some(input) => feed(input, outbox.clone(), Arc::clone(&credit)),
        None => send(&outbox, Frame::Closed(Stream::In)),
    }
    let mut sinks = HashMap::from([
        (Stream::Out, sink(Stream::Out, outputs.out, outbox.clone())),
        (Stream::Err, sink(Stream::Err, outputs.err, outbox.clone())),
    ]);
    let code = wait(&inbox, &outbox, &credit, &mut sinks, (limit, nudge))?;
    for (_, (data, thread)) in sinks {
        drop(data);
        // It can only have ended by itself, when nobody reads our output any more.
        let _ = thread.join();
    }
    Ok(code)
}

type Sinks = HashMap<Stream, (Sender<Vec<u8>>, JoinHandle<()>)>;

fn wait(
    inbox: &Receiver<Event>,
    outbox: &Sender<Frame>,
    credit: &Credit,
    sinks: &mut Sinks,
    (limit, nudge): (Option<Duration>, Option<Duration>),
) -> Result<u8, SessionError> {
    let deadline = limit.map(|limit| Instant::now() + limit);
    let mut signals = 0;
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let event = match left.into_iter().chain(nudge).min() {
            None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(patience) => inbox.recv_timeout(patience),
        };
        match event {
            Ok(Event::Frame(Frame::Data(stream, bytes))) => {
                if let Some((data, _)) = sinks.get(&stream) {
                    // A sink that is gone has told the other end so already.
                    let _ = data.send(bytes);
                }
            }
            Ok(Event::Frame(Frame::Credit(Stream::In, bytes))) => credit.add(bytes),
            Ok(Event::Frame(Frame::Closed(_))) => {}
            Ok(Event::Frame(Frame::Exit(code))) => return Ok(code),
            Ok(Event::Frame(Frame::Refused(code, why))) => {
                eprintln!("testbed: {why}");
                return Ok(code);
            }
            Ok(Event::Frame(frame)) => {
                return Err(SessionError::Gone(format!(
                    "it spoke out of turn: {frame:?}"
                )));
            }
            Ok(Event::Signal(SIGWINCH)) => {
                if let Some(size) = terminal::size() {
                    send(outbox, Frame::Resize(size));
                }
            }
            Ok(Event::Signal(number)) => {
                signals += 1;
                let number = u8::try_from(number).unwrap_or_default();
                if signals >= SIGNALS_MAX {
                    eprintln!("testbed: the command does not end; the testbed does");
                    return Ok(128 + number);
                }
                send(outbox, Frame::Signal(number));
            }
            Ok(Event::Gone(why)) => return Err(SessionError::Gone(why)),
            Err(RecvTimeoutError::Timeout) if deadline.is_none_or(|end| Instant::now() < end) => {
                send(outbox, NUDGE);
            }
            Err(RecvTimeoutError::Timeout) => {
                eprintln!("testbed: the command did not end within its time limit");
                return Ok(TIMED_OUT);
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(SessionError::Gone("nobody is left to hear from".to_owned()));
            }
        }
    }
}

fn send(outbox: &Sender<Frame>, frame: Frame) {
    // The writer ends only when the door is shut, which the reader notices and tells.
    let _ = outbox.send(frame);
}

fn writer(mut door: UnixStream) -> Sender<Frame> {
    let (outbox, frames) = channel::<Frame>();
    std::thread::spawn(move || {
        for frame in frames {
            if door.write_all(&frame.encode()).is_err() {
                return;
            }
        }
    });
    outbox
}

fn reader(mut door: UnixStream, events: Sender<Event>) {
    std::thread::spawn(move || {
        let mut decoder = Decoder::default();
        let mut bytes = vec![0; DOOR_READ_BYTES];
        loop {
            let why = match decoder.next_frame() {
                Ok(Some(frame)) => {
                    if events.send(Event::Frame(frame)).is_err() {
                        return;
                    }
                    continue;
                }
                Ok(None) => match door.read(&mut bytes) {
                    Ok(0) => "QEMU ended".to_owned(),
                    Ok(length) => {
                        decoder.push(bytes.get(..length).unwrap_or_default());
                        continue;
                    }
                    Err(error) => error.to_string(),
                },
                Err(error) => error.to_string(),
            };
            let _ = events.send(Event::Gone(why));
            return;
        }
    });
}

fn forward_signals(signals: Receiver<i32>, events: Sender<Event>) {
    std::thread::spawn(move || {
        for signal in signals {
            if events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    });
}

/// Reads our input and sends it, as far as the credit goes.
fn feed(mut input: impl Read + Send + 'static, outbox: Sender<Frame>, credit: Arc<Credit>) {
    std::thread::spawn(move || {
        let mut bytes = vec![0; DATA_MAX_BYTES];
        loop {
            let room = credit.wait();
            let limit = room.min(bytes.len());
            match input.read(bytes.get_mut(..limit).unwrap_or_default()) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(length) if length > 0 => {
                    credit.take(length);
                    send(
                        &outbox,
                        Frame::Data(Stream::In, bytes.get(..length).unwrap_or_default().to_vec()),
                    );
                }
                // The end, or an input that cannot be read: both are the end to the command.
                Ok(_) | Err(_) => return send(&outbox, Frame::Closed(Stream::In)),
            }
        }
    });
}

/// Writes one of the command's outputs to ours and gives credit back for what was taken.
fn sink(
    stream: Stream,
    mut ours: impl Write + Send + 'static,
    outbox: Sender<Frame>,
) -> (Sender<Vec<u8>>, JoinHandle<()>) {
    let (data, pieces) = channel::<Vec<u8>>();
    let thread = std::thread::spawn(move || {
        for piece in pieces {
            if ours.write_all(&piece).and_then(|()| ours.flush()).is_err() {
                return send(&outbox, Frame::Closed(stream));
            }
            send(
                &outbox,
                Frame::Credit(stream, u32::try_from(piece.len()).unwrap_or(u32::MAX)),
            );
        }
    });
    (data, thread)
}

impl Credit {
    fn add(&self, bytes: u32) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        *left = left.saturating_add(bytes).min(WINDOW_BYTES);
        self.more.notify_one();
    }

    /// Waits until there is some, and returns how much.
    fn wait(&self) -> usize {
        let left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let left = self
            .more
            .wait_while(left, |left| *left == 0)
            .unwrap_or_else(PoisonError::into_inner);
        *left as usize
    }

    fn take(&self, bytes: usize) {
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        *left = left.saturating_sub(u32::try_from(bytes).unwrap_or(u32::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::RecvTimeoutError;

    /// Long enough for any machine; a test that needs it has failed.
    const TEST_TIMEOUT: Duration = Duration::from_secs(60);

    /// What a command printed.
    #[derive(Clone, Default)]
    struct Kept(Arc<Mutex<Vec<u8>>>);

    impl Write for Kept {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("kept").extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A reader that nobody listens to any more.
    struct Gone;

    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::Error::from(io::ErrorKind::BrokenPipe))
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn run_of(word: &str) -> Run {
        let words = vec![word.as_bytes().to_vec()];
        Run {
            clock_ns: 0,
            terminal: None,
            words,
            variables: Vec::new(),
            copies: Vec::new(),
        }
    }

    /// The inside end, as a script of frames.
    struct Door {
        socket: UnixStream,
        decoder: Decoder,
    }

    impl Door {
        fn next(&mut self) -> Frame {
            let mut bytes = vec![0; 4096];
            loop {
                if let Some(frame) = self.decoder.next_frame().expect("well formed") {
                    return frame;
                }
                let length = self.socket.read(&mut bytes).expect("read");
                assert!(length > 0, "the session hung up");
                self.decoder.push(&bytes[..length]);
            }
        }

        fn wait_for_the_end(&mut self) {
            let mut bytes = [0; 64];
            while self.socket.read(&mut bytes).is_ok_and(|length| length > 0) {}
        }

        fn say(&mut self, frame: &Frame) {
            self.socket.write_all(&frame.encode()).expect("write");
        }
    }

    /// Runs a session against a scripted door; returns its end and what it printed.
    fn session(
        input: &'static [u8],
        limit: Option<Duration>,
        out: Box<dyn Write + Send>,
        script: impl FnOnce(&mut Door) + Send + 'static,
    ) -> Result<u8, SessionError> {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        theirs
            .set_read_timeout(Some(TEST_TIMEOUT))
            .expect("timeout");
        let door = std::thread::spawn(move || {
            let mut door = Door {
                socket: theirs,
                decoder: Decoder::default(),
            };
            script(&mut door);
        });
        let outputs = Outputs {
            out,
            err: Box::new(io::sink()),
        };
        let (_, silent) = channel();
        let signals = Some(silent);
        let code = carry(
            &ours,
            run_of("x"),
            Some(input),
            outputs,
            signals,
            limit,
            None,
        );
        // Threads of the session still hold the socket.
        ours.shutdown(std::net::Shutdown::Both).expect("shut");
        door.join().expect("the script went through");
        code
    }

    #[test]
    fn output_and_exit_code_come_out() {
        let kept = Kept::default();
        let code = session(b"", None, Box::new(kept.clone()), |door| {
            assert_eq!(door.next(), Frame::Run(run_of("x")));
            door.say(&Frame::Data(Stream::Out, b"hello".to_vec()));
            door.say(&Frame::Exit(7));
        });
        assert_eq!(code.expect("ended"), 7);
        assert_eq!(kept.0.lock().expect("kept").as_slice(), b"hello");
    }

    #[test]
    fn input_goes_in_and_ends() {
        let code = session(b"abc", None, Box::new(io::sink()), |door| {
            assert_eq!(door.next(), Frame::Run(run_of("x")));
            assert_eq!(door.next(), Frame::Data(Stream::In, b"abc".to_vec()));
            assert_eq!(door.next(), Frame::Closed(Stream::In));
            door.say(&Frame::Exit(0));
        });
        assert_eq!(code.expect("ended"), 0);
    }

    #[test]
    fn input_stops_at_the_window_until_credit_comes() {
        static INPUT: [u8; 2 * WINDOW_BYTES as usize] = [7; 2 * WINDOW_BYTES as usize];
        let code = session(&INPUT, None, Box::new(io::sink()), |door| {
            assert_eq!(door.next(), Frame::Run(run_of("x")));
            let mut got = 0;
            while got < WINDOW_BYTES as usize {
                let Frame::Data(Stream::In, bytes) = door.next() else {
                    panic!("not data")
                };
                got += bytes.len();
            }
            assert_eq!(got, WINDOW_BYTES as usize);
            door.say(&Frame::Credit(Stream::In, 5));
            let Frame::Data(Stream::In, bytes) = door.next() else {
                panic!("not data")
            };
            assert_eq!(bytes.len(), 5);
            door.say(&Frame::Exit(0));
        });
        assert_eq!(code.expect("ended"), 0);
    }

    #[test]
    fn output_that_nobody_reads_is_told_to_the_command() {
        let code = session(b"", None, Box::new(Gone), |door| {
            door.say(&Frame::Data(Stream::Out, b"y".to_vec()));
            while door.next() != Frame::Closed(Stream::Out) {}
            door.say(&Frame::Exit(141));
        });
        assert_eq!(code.expect("ended"), 141);
    }

    #[test]
    fn a_machine_that_goes_down_is_no_exit_code() {
        let code = session(b"", None, Box::new(io::sink()), |door| {
            door.next();
            door.socket
                .shutdown(std::net::Shutdown::Both)
                .expect("shut");
        });
        assert!(matches!(code, Err(SessionError::Gone(_))), "{code:?}");
    }

    #[test]
    fn a_command_over_its_limit_is_given_up() {
        let code = session(
            b"",
            Some(Duration::from_millis(50)),
            Box::new(io::sink()),
            |door| {
                door.next();
                // Silent until it is given up on.
                door.wait_for_the_end();
            },
        );
        assert_eq!(code.expect("given up"), TIMED_OUT);
    }

    #[test]
    fn a_silent_machine_is_nudged() {
        let (sender, inbox) = channel();
        let (outbox, frames) = channel();
        let machine = std::thread::spawn(move || {
            assert_eq!(frames.recv(), Ok(NUDGE));
            sender.send(Event::Frame(Frame::Exit(3))).expect("heard");
            frames
        });
        let code = wait(
            &inbox,
            &outbox,
            &Credit::default(),
            &mut HashMap::new(),
            (None, Some(Duration::from_millis(5))),
        );
        machine.join().expect("it was nudged");
        assert_eq!(code.expect("ended"), 3);
    }

    #[test]
    fn the_third_signal_gives_up() {
        let (sender, inbox) = channel();
        let (outbox, frames) = channel();
        for _ in 0..SIGNALS_MAX {
            sender.send(Event::Signal(2)).expect("sent");
        }
        let code = wait(
            &inbox,
            &outbox,
            &Credit::default(),
            &mut HashMap::new(),
            (None, None),
        );
        assert_eq!(code.expect("given up"), 130);
        let frames: Vec<Frame> = frames.try_iter().collect();
        assert_eq!(frames, vec![Frame::Signal(2); SIGNALS_MAX as usize - 1]);
        assert!(matches!(
            inbox.recv_timeout(Duration::ZERO),
            Err(RecvTimeoutError::Timeout)
        ));
    }
}
