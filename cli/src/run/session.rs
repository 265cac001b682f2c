//! From the start of the VMM to its end: one loop over events, everything else on threads that send them.
//!
//! ```text
//! Booting --agent dialled--> Starting --started--> Running --exited--> Draining --outputs ended--> Stopping --VMM ended--> done
//! ```
//! An agent that does not dial in time leaves Unreached: the VMM is told to end, so that it says what the guest's last words were.
//! An ending signal before Running kills the machine; in Running it is forwarded; the third one there kills the
//! machine, since PID 1 of a container may ignore every signal. The end of the VMM ends every state.
//!
//! Deadlines are for the guest. The time of whoever reads our output has none: only an ending signal hurries it.

use super::verdict::{self, Verdict};
use super::{Clock, RunError, Told};
use crate::abort::Aborted;
use crate::signals::ENDING;
use crate::stdio::{self, OutputEnd, Progress, Waits};
use crate::terminal::{self, Raw};
use crate::vm::agent::{Agent, AgentError};
use crate::vm::{Machine, News};
use capsid_owner::Owner;
use capsid_owner::end::{Ended, How};
use capsid_owner::machine::Parts;
use capsid_protocol::agent::{StartSandboxResponse, Stdio};
use capsid_protocol::exit::VmmExit;
use capsid_protocol::vsock::{AGENT_STREAM_PORT, StreamHeader};
use nix::sys::signal::Signal;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

/// How long the guest may leave an output open and silent after the command's exit, in ms.
const DRAIN_IDLE_MS: u64 = 30_000;
/// How long the guest may take to power off, in ms; longer than the VMM's own grace, and an emulated host is slow.
const STOP_TIMEOUT_MS: u64 = 120_000;
/// How long after the agent was lost its VMM may take to say why, in ms.
const LOST_GRACE_MS: u64 = 10_000;
/// How long an output may be silent and not end after the VMM's end, in ms.
const FLUSH_IDLE_MS: u64 = 5_000;
/// How long our reader may take nothing after the VMM's end once a signal has asked to stop, in ms.
const HURRIED_FLUSH_MS: u64 = 1_000;
/// The ending signal of this number, in a running container, kills the machine.
const SIGNALS_TO_KILL: u32 = 3;

/// Ids of the stdio streams, unique in one VM.
const STDIN_ID: u64 = 1;
const STDOUT_ID: u64 = 2;
const STDERR_ID: u64 = 3;

/// The container to run.
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) hostname: String,
    pub(crate) spec: Vec<u8>,
    pub(crate) interactive: bool,
    pub(crate) tty: bool,
}

/// What happens to a session.
#[derive(Debug)]
pub(crate) enum Event {
    /// A signal to this process.
    Signal(Signal),
    /// News of the machine.
    Machine(News),
    /// The agent has answered for the first time.
    Guest(Box<StartSandboxResponse>),
    /// The streams are dialled; the outputs come from these pumps.
    Outputs(Vec<Arc<Progress>>),
    /// The container is made; its program does not run yet.
    Created,
    /// The user's program runs.
    Started,
    /// The command's exit, or why it is not known.
    Exited(Result<u8, AgentError>),
    /// One output has ended.
    OutputEnded(&'static str, OutputEnd),
    /// The answer to PowerOff.
    PowerOff(Result<(), AgentError>),
}

/// What the thread for short calls does.
enum Call {
    Signal(i32),
    Resize(u16, u16),
    PowerOff,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Booting,
    Unreached,
    Starting,
    Running,
    Draining,
    Stopping,
}

/// A machine and what is known of its container.
pub(crate) struct Session {
    machine: Machine,
    sender: mpsc::Sender<Event>,
    events: mpsc::Receiver<Event>,
    clock: Clock,
    told: Told,
    /// How long the guest may take from the VMM's start to the agent's dial. One that dies is noticed by its VMM and not by this.
    boot_timeout: Duration,
    state: State,
    /// When the state is over at the latest.
    deadline: Option<Instant>,
    verdict: Option<Verdict>,
    /// What to say if the VMM does not say more.
    lost: Option<Verdict>,
    killed_by_us: bool,
    outputs: Vec<Arc<Progress>>,
    open_outputs: usize,
    /// Since when the outputs are waited for, and nothing else.
    draining_since: Instant,
    /// The signal that asked to stop waiting, our reader included.
    hurried_by: Option<Signal>,
    ending_signals: u32,
    calls: Option<mpsc::Sender<Call>>,
    raw: Option<Raw>,
}

impl Session {
    /// Starts the machine.
    ///
    /// # Errors
    /// Nothing was started.
    pub(crate) fn start(
        parts: Parts,
        boot_timeout: Duration,
        (sender, events): (mpsc::Sender<Event>, mpsc::Receiver<Event>),
        clock: &Clock,
    ) -> Result<Session, RunError> {
        let told = Told {
            id: parts.id.clone(),
            cpus: parts.cpus.get(),
            memory_mib: parts.memory.get(),
            ..Default::default()
        };
        let tell = sender.clone();
        let machine = Machine::start(parts, move |news| {
            // The session may be over.
            let _nobody_listens = tell.send(Event::Machine(news));
        })?;
        clock.mark("vmm exec");
        Ok(Session {
            machine,
            sender,
            events,
            clock: clock.clone(),
            told,
            boot_timeout,
            state: State::Booting,
            deadline: Some(Instant::now() + boot_timeout),
            verdict: None,
            lost: None,
            killed_by_us: false,
            outputs: Vec::new(),
            open_outputs: 0,
            draining_since: Instant::now(),
            hurried_by: None,
            ending_signals: 0,
            calls: None,
            raw: None,
        })
    }

    /// Runs the container to its end and the machine to its.
    ///
    /// # Errors
    /// A signal ended the start.
    pub(crate) fn run(mut self, container: Container) -> Result<(Verdict, Told), RunError> {
        let container = Arc::new(container);
        loop {
            let event = match self.deadline {
                None => self
                    .events
                    .recv()
                    .map_err(|_| RecvTimeoutError::Disconnected),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    self.events.recv_timeout(left)
                }
            };
            match event {
                Ok(Event::Machine(News::Ended(ended))) => return Ok(self.ended(ended)),
                Ok(event) => self.handle(event, &container)?,
                Err(_) => self.late(),
            }
        }
    }

    fn handle(&mut self, event: Event, container: &Arc<Container>) -> Result<(), RunError> {
        match event {
            Event::Machine(News::AgentDialled(fd)) => self.dialled(fd, container),
            Event::Machine(News::Ended(_)) => {} // taken before
            Event::Signal(signal) => self.signal(signal)?,
            Event::Guest(guest) => {
                self.clock.mark("sandbox");
                self.told.guest = Some(*guest);
            }
            Event::Outputs(outputs) => {
                self.open_outputs = outputs.len();
                self.outputs = outputs;
            }
            Event::Created => self.created(container),
            Event::Started => self.started(container),
            Event::Exited(exit) => self.exited(exit),
            Event::OutputEnded(name, end) => self.output_ended(name, &end),
            Event::PowerOff(answer) => {
                if let Err(error) = answer {
                    self.told.power_off = Some(error);
                    self.kill();
                }
            }
        }
        Ok(())
    }

    /// The agent is there: a thread makes the calls that run the container, another the short ones.
    fn dialled(&mut self, fd: OwnedFd, container: &Arc<Container>) {
        if self.state != State::Booting {
            return; // too late: the VMM ends already
        }
        self.clock.mark("agent");
        self.state = State::Starting;
        self.deadline = None; // each call has its own
        let agent = match Agent::new(fd) {
            Ok(agent) => agent,
            Err(error) => return self.exited(Err(error)),
        };
        let (calls, receiver) = mpsc::channel();
        self.calls = Some(calls);
        let (caller, id, sender) = (agent.clone(), container.id.clone(), self.sender.clone());
        thread::spawn(move || make_calls(&caller, &id, &receiver, &sender));
        let start = Start {
            agent,
            owner: self.machine.owner().clone(),
            container: Arc::clone(container),
            sender: self.sender.clone(),
            clock: self.clock.clone(),
        };
        thread::spawn(move || start.run());
    }

    /// From here on Ctrl-C is for the command, as a byte.
    fn created(&mut self, container: &Container) {
        self.clock.mark("create");
        if container.tty && container.interactive {
            match Raw::enter() {
                Ok(raw) => self.raw = Some(raw),
                Err(cause) => eprintln!("capsid: cannot put the terminal into raw mode: {cause}"),
            }
        }
    }

    fn started(&mut self, container: &Container) {
        self.clock.mark("start");
        if self.state != State::Starting {
            return;
        }
        self.state = State::Running;
        if container.tty {
            // The size may have changed on the way here.
            self.resize();
        }
    }

    fn signal(&mut self, signal: Signal) -> Result<(), RunError> {
        let is_ending = ENDING.contains(&signal);
        match self.state {
            State::Booting | State::Unreached | State::Starting if is_ending => {
                let signal = signal as i32;
                // Dropping the session kills the machine and waits for its end.
                return Err(Aborted { signal }.into());
            }
            State::Booting | State::Unreached | State::Starting => {}
            State::Running if signal == Signal::SIGWINCH => self.resize(),
            State::Running => {
                self.ending_signals += u32::from(is_ending);
                if self.ending_signals < SIGNALS_TO_KILL {
                    return self.call(Call::Signal(signal as i32));
                }
                let reason = "the command ignored its signals, so its VM was killed";
                let verdict = Verdict::signalled(signal as i32, Some(reason.to_owned()));
                self.verdict = Some(verdict);
                self.hurried_by = Some(signal);
                self.kill();
            }
            // The command has ended: an impatient person need not wait for a slow end.
            State::Draining | State::Stopping if is_ending => {
                self.hurried_by = Some(signal);
                self.kill();
            }
            State::Draining | State::Stopping => {}
        }
        Ok(())
    }

    fn resize(&mut self) {
        if let Some((columns, rows)) = terminal::size() {
            // The calling thread ends with the machine only.
            let _ended = self.call(Call::Resize(columns, rows));
        }
    }

    fn call(&mut self, call: Call) -> Result<(), RunError> {
        if let Some(calls) = &self.calls {
            // Its thread is gone only when the session is over.
            let _over = calls.send(call);
        }
        Ok(())
    }

    fn exited(&mut self, exit: Result<u8, AgentError>) {
        let is_running = matches!(self.state, State::Running);
        match exit {
            Ok(code) => {
                self.clock.mark("run");
                self.verdict.get_or_insert(Verdict::exited(code));
                self.state = State::Draining;
                self.wait_for_outputs();
            }
            Err(error @ AgentError::Lost { .. }) => {
                // The VMM knows more: a guest that panics takes its agent along first.
                self.lost = Some(verdict::agent_failed(&error, is_running));
                self.deadline = Some(Instant::now() + Duration::from_millis(LOST_GRACE_MS));
            }
            Err(error) => {
                self.verdict = Some(verdict::agent_failed(&error, is_running));
                self.stop();
            }
        }
    }

    fn wait_for_outputs(&mut self) {
        if self.open_outputs == 0 {
            return self.stop();
        }
        self.draining_since = Instant::now();
        self.deadline = Some(self.draining_since + Duration::from_millis(DRAIN_IDLE_MS));
    }

    fn output_ended(&mut self, name: &'static str, end: &OutputEnd) {
        self.open_outputs = self.open_outputs.saturating_sub(1);
        self.lost_output(name, end);
        if self.state == State::Draining && self.open_outputs == 0 {
            self.stop();
        }
    }

    /// Output that could not be written is an error of ours, whatever the command's exit.
    fn lost_output(&mut self, name: &'static str, end: &OutputEnd) {
        if let OutputEnd::Failed(error) = end {
            let reason = format!("cannot write {name}: {error}; output was lost");
            self.verdict = Some(Verdict::ours(reason));
        }
    }

    /// Asks the guest to power off.
    fn stop(&mut self) {
        self.state = State::Stopping;
        self.deadline = Some(Instant::now() + Duration::from_millis(STOP_TIMEOUT_MS));
        self.raw = None; // the person's terminal is theirs again
        match &self.calls {
            Some(calls) if calls.send(Call::PowerOff).is_ok() => {}
            _ => self.kill(),
        }
    }

    /// The deadline of the state has passed.
    fn late(&mut self) {
        match self.state {
            State::Draining => {
                let end = self.silence_ends(Duration::from_millis(DRAIN_IDLE_MS));
                if end > Instant::now() {
                    self.deadline = Some(end);
                    // A terminal in raw mode sends no Ctrl-C, which is the way out of a wait this long.
                    self.raw = None;
                    return;
                }
                eprintln!("capsid: the guest did not end its output; some of it may be missing");
                self.stop();
            }
            State::Booting => {
                self.state = State::Unreached;
                self.deadline = Some(Instant::now() + Duration::from_millis(STOP_TIMEOUT_MS));
                self.machine.stop();
            }
            State::Unreached | State::Starting | State::Running | State::Stopping => self.kill(),
        }
    }

    fn kill(&mut self) {
        self.deadline = None; // the kernel does not refuse this signal, so the end comes
        self.killed_by_us = true;
        self.machine.kill();
    }

    /// The VMM is gone. An exit that the agent told stands; else the VMM's end is the reason, unless it was ours.
    fn ended(mut self, ended: Ended) -> (Verdict, Told) {
        self.clock.mark("end");
        self.flush_outputs();
        self.raw = None;
        // One that was told to end and did; any other end has its own reason.
        let as_told = ended.how == How::Exit(VmmExit::Stopped) || self.killed_by_us;
        if self.state == State::Unreached && as_told {
            self.verdict = Some(verdict::agent_unreached(self.boot_timeout, &ended));
        }
        let is_running = matches!(self.state, State::Running);
        let lost = self.lost.take().filter(|_| self.killed_by_us);
        let verdict = self.verdict.take().or(lost);
        let verdict = verdict.unwrap_or_else(|| verdict::machine_ended(&ended, is_running));
        self.told.report = ended.report;
        (verdict, std::mem::take(&mut self.told))
    }

    /// What the guest had sent before its end is still in the sockets: it is written out, however slowly it is read.
    /// Only a signal gives up on a reader.
    fn flush_outputs(&mut self) {
        self.draining_since = Instant::now();
        while self.open_outputs > 0 {
            let limit_ms = match self.hurried_by {
                Some(_) => HURRIED_FLUSH_MS,
                None => FLUSH_IDLE_MS,
            };
            let end = self.silence_ends(Duration::from_millis(limit_ms));
            let left = end.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(Event::OutputEnded(name, end)) => {
                    self.open_outputs -= 1;
                    self.lost_output(name, &end);
                }
                Ok(Event::Signal(signal)) if ENDING.contains(&signal) => {
                    self.hurried_by = Some(signal);
                }
                Ok(_) => {}
                Err(_) if left.is_zero() => return self.unflushed(),
                Err(_) => {} // an output may have moved meanwhile
            }
        }
    }

    /// An output is given up. A command's exit alone would say that all of it is there.
    fn unflushed(&mut self) {
        const LOST: &str = "not all output was written";
        match (self.hurried_by, &self.verdict) {
            (Some(signal), Some(Verdict { reason: None, .. })) => {
                let reason = format!("stopped by signal {}: {LOST}", signal as i32);
                self.verdict = Some(Verdict::signalled(signal as i32, Some(reason)));
            }
            _ => eprintln!("capsid: {LOST}"),
        }
    }

    /// When the outputs will have been silent for `limit`. An output that waits for our reader is not silent: what
    /// he has not taken would be lost.
    fn silence_ends(&self, limit: Duration) -> Instant {
        let waits = self.outputs.iter().map(|output| output.waits());
        let last = waits.map(|waits| match waits {
            Waits::Reader(_) if self.hurried_by.is_none() => Instant::now(),
            Waits::Guest(since) | Waits::Reader(since) => since,
        });
        last.fold(self.draining_since, Instant::max) + limit
    }
}

/// The calls that run the container, one after another.
struct Start {
    agent: Agent,
    owner: Owner,
    container: Arc<Container>,
    sender: mpsc::Sender<Event>,
    clock: Clock,
}

impl Start {
    fn run(self) {
        let exit = self.exit();
        self.tell(Event::Exited(exit));
    }

    fn tell(&self, event: Event) {
        // The session may be over.
        let _nobody_listens = self.sender.send(event);
    }

    fn exit(&self) -> Result<u8, AgentError> {
        let Container { id, hostname, .. } = &*self.container;
        let guest = self.agent.start_sandbox(hostname)?;
        self.tell(Event::Guest(Box::new(guest)));
        let (stdio, input) = self.dial().map_err(|cause| AgentError::Lost {
            call: "open the standard streams",
            text: cause.to_string(),
        })?;
        self.agent.create(id, self.container.spec.clone(), stdio)?;
        self.tell(Event::Created);
        self.agent.start(id)?;
        self.tell(Event::Started);
        if let Some(input) = input {
            let half_close = !self.container.tty;
            // Ends with the process: nobody can take a read of standard input back.
            thread::spawn(move || {
                stdio::input(rustix::stdio::stdin(), &input, half_close);
            });
        }
        self.agent.wait(id)
    }

    /// Dials the streams that the container needs and starts the pumps of its outputs. The stream for our input is
    /// given back: nothing of it is read before the command runs.
    fn dial(&self) -> io::Result<(Stdio, Option<UnixStream>)> {
        let mut stdio = Stdio::default();
        if self.container.tty {
            let terminal = self.stream(STDIN_ID)?;
            stdio.stdin = STDIN_ID;
            let input = terminal.try_clone()?;
            self.pump(vec![("standard output", terminal)]);
            return Ok((stdio, self.container.interactive.then_some(input)));
        }
        let input = match self.container.interactive {
            true => Some(self.stream(STDIN_ID)?),
            false => None,
        };
        if input.is_some() {
            stdio.stdin = STDIN_ID;
        }
        stdio.stdout = STDOUT_ID;
        stdio.stderr = STDERR_ID;
        let (out, err) = (self.stream(STDOUT_ID)?, self.stream(STDERR_ID)?);
        self.pump(vec![("standard output", out), ("standard error", err)]);
        Ok((stdio, input))
    }

    fn stream(&self, stream_id: u64) -> io::Result<UnixStream> {
        let stream = self.owner.connect(AGENT_STREAM_PORT)?;
        stdio::send(&stream, &StreamHeader::Stdio { stream_id }.encode())?;
        Ok(stream)
    }

    fn pump(&self, outputs: Vec<(&'static str, UnixStream)>) {
        let progress: Vec<Arc<Progress>> = outputs.iter().map(|_| Arc::default()).collect();
        self.tell(Event::Outputs(progress.clone()));
        for ((name, stream), progress) in outputs.into_iter().zip(progress) {
            let (sender, clock) = (self.sender.clone(), self.clock.clone());
            thread::spawn(move || {
                let (stdout, stderr) = (io::stdout(), io::stderr());
                let to = match name {
                    "standard error" => stderr.as_fd(),
                    _ => stdout.as_fd(),
                };
                let first = || clock.mark(&format!("first of {name}"));
                let end = stdio::output(&stream, to, &progress, first);
                // The session may be over.
                let _nobody_listens = sender.send(Event::OutputEnded(name, end));
            });
        }
    }
}

/// Makes the short calls in their order.
fn make_calls(agent: &Agent, id: &str, calls: &mpsc::Receiver<Call>, sender: &mpsc::Sender<Event>) {
    while let Ok(call) = calls.recv() {
        match call {
            // Both lose the race against the command's end, and the end is what counts.
            Call::Signal(signal) => drop(agent.signal(id, signal)),
            Call::Resize(columns, rows) => drop(agent.resize(id, (columns, rows))),
            Call::PowerOff => {
                // The session may be over.
                let _nobody_listens = sender.send(Event::PowerOff(agent.power_off()));
                // The agent waits with the end until its host has hung up: this handle is the last.
                return;
            }
        }
    }
}
