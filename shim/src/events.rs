//! Events for containerd: what happened to each task, told once each in the order in which it happened, over restarts of containerd too.
//!
//! They go to `containerd.services.events.ttrpc.v1.Events` one at a time: the next is sent when the one before was answered. Where no
//! answer comes, an event is sent again, so containerd may see one twice after an answer was lost. What containerd says is bounded by
//! ttrpc; nobody waits for it. While it is away, timers are what tries again: nothing else tells that a socket came back.

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused,
    TaskResumed, TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};
use ttrpc::r#async::transport::Socket;
use ttrpc::context::Context;

/// Most events that wait; the oldest is lost for one more (containerd's own publisher has as many).
const QUEUE_MAX_EVENTS: usize = 2048;
/// How long one call may take: containerd only puts the event into a queue.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// How old an event may get until it is given up: longer than a restart or an update of containerd takes.
const AGE_LIMIT: Duration = Duration::from_secs(600);
/// How often an event is sent that containerd answers with an error.
const REFUSALS_MAX: u32 = 5;
/// The pauses between attempts grow from the first to the second.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A task was made.
    Create(TaskCreate),
    /// It runs.
    Start(TaskStart),
    /// The guest's kernel killed one of its processes for want of memory.
    Oom(TaskOOM),
    /// It, or a process of it, ended.
    Exit(TaskExit),
    /// It, or a process of it, is gone.
    Delete(TaskDelete),
    /// It has another process.
    ExecAdded(TaskExecAdded),
    /// That runs.
    ExecStarted(TaskExecStarted),
    /// It is frozen.
    Paused(TaskPaused),
    /// It runs again.
    Resumed(TaskResumed),
}

impl Event {
    /// Its topic, and the message as containerd takes it: the bare name of its type (github.com/containerd/typeurl).
    fn packed(self) -> (&'static str, protobuf::Result<Any>) {
        match self {
            Event::Create(it) => (topics::TASK_CREATE_EVENT_TOPIC, any(&it)),
            Event::Start(it) => (topics::TASK_START_EVENT_TOPIC, any(&it)),
            Event::Oom(it) => (topics::TASK_OOM_EVENT_TOPIC, any(&it)),
            Event::Exit(it) => (topics::TASK_EXIT_EVENT_TOPIC, any(&it)),
            Event::Delete(it) => (topics::TASK_DELETE_EVENT_TOPIC, any(&it)),
            Event::ExecAdded(it) => (topics::TASK_EXEC_ADDED_EVENT_TOPIC, any(&it)),
            Event::ExecStarted(it) => (topics::TASK_EXEC_STARTED_EVENT_TOPIC, any(&it)),
            Event::Paused(it) => (topics::TASK_PAUSED_EVENT_TOPIC, any(&it)),
            Event::Resumed(it) => (topics::TASK_RESUMED_EVENT_TOPIC, any(&it)),
        }
    }
}

fn any<M: Message>(message: &M) -> protobuf::Result<Any> {
    Ok(Any {
        type_url: format!("containerd.events.{}", M::NAME),
        value: message.write_to_bytes()?,
        ..Any::default()
    })
}

/// Where events are handed in.
#[derive(Clone, Debug)]
pub struct Publisher {
    namespace: Arc<str>,
    /// None if there is nobody to tell.
    queue: Option<Arc<Queue>>,
}

impl Publisher {
    /// Starts to send to containerd's ttrpc socket, by a task of this runtime that ends with it. Without an address, as from CRI-O,
    /// events are let go.
    pub fn start(namespace: &str, ttrpc_address: Option<String>) -> Publisher {
        let queue = ttrpc_address
            .filter(|address| !address.is_empty())
            .map(|address| {
                let queue = Arc::new(Queue::default());
                tokio::spawn(Sender::new(address, queue.clone()).run());
                queue
            });
        Publisher {
            namespace: namespace.into(),
            queue,
        }
    }

    /// Hands an event in, at the time that it happens. Never waits.
    pub fn publish(&self, event: Event) {
        let Some(queue) = &self.queue else { return };
        let (topic, message) = event.packed();
        match message {
            Ok(message) => queue.push(Waiting {
                envelope: Envelope {
                    timestamp: MessageField::some(Timestamp::from(SystemTime::now())),
                    namespace: self.namespace.to_string(),
                    topic: topic.to_owned(),
                    event: MessageField::some(message),
                    ..Envelope::default()
                },
                since: Instant::now(),
            }),
            Err(error) => tracing::error!(topic, %error, "an event cannot be encoded"),
        }
    }

    /// Waits until no event waits any more, each answered or given up; false if some still do after `limit`.
    pub async fn flushed(&self, limit: Duration) -> bool {
        match &self.queue {
            Some(queue) => timeout(limit, queue.empty()).await.is_ok(),
            None => true,
        }
    }
}

/// An event that waits.
#[derive(Debug)]
struct Waiting {
    envelope: Envelope,
    since: Instant,
}

/// The events that wait, in order.
#[derive(Debug, Default)]
struct Queue {
    state: Mutex<State>,
    /// One more waits. Heard by the sender.
    arrived: Notify,
    /// One less waits. Heard by whoever wants all of them gone.
    settled: Notify,
}

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Waiting>,
    /// One is being sent, which is in the queue no more.
    sending: bool,
    /// Events that found no room, since it was last said.
    lost: u64,
}

impl Queue {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, event: Waiting) {
        let mut state = self.state();
        if state.waiting.len() == QUEUE_MAX_EVENTS {
            state.waiting.pop_front();
            state.lost += 1;
            if state.lost == 1 {
                tracing::warn!(
                    "{QUEUE_MAX_EVENTS} events wait for containerd; the oldest are lost"
                );
            }
        }
        state.waiting.push_back(event);
        drop(state);
        self.arrived.notify_one();
    }

    /// The next one to send; [`Queue::settle`] says that it was.
    async fn next(&self) -> Waiting {
        loop {
            if let Some(event) = self.take() {
                return event;
            }
            // It remembers one call that comes before the wait.
            self.arrived.notified().await;
        }
    }

    fn take(&self) -> Option<Waiting> {
        let mut state = self.state();
        let event = state.waiting.pop_front()?;
        state.sending = true;
        Some(event)
    }

    fn settle(&self) {
        self.state().sending = false;
        self.settled.notify_waiters();
    }

    fn take_lost(&self) -> u64 {
        std::mem::take(&mut self.state().lost)
    }

    fn is_empty(&self) -> bool {
        let state = self.state();
        state.waiting.is_empty() && !state.sending
    }

    async fn empty(&self) {
        loop {
            let settled = self.settled.notified();
            tokio::pin!(settled);
            // From here on no call is missed.
            settled.as_mut().enable();
            if self.is_empty() {
                return;
            }
            settled.await;
        }
    }
}

/// Why an attempt failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("cannot connect")]
    Connect(#[source] std::io::Error),
    #[error("the connection ended")]
    Ended(#[source] ttrpc::Error),
    #[error("no answer within {} s", ANSWER_LIMIT.as_secs())]
    Late,
    #[error("containerd refuses it")]
    Refused(#[source] ttrpc::Error),
}

/// Sends what waits.
struct Sender {
    path: String,
    queue: Arc<Queue>,
    client: Option<EventsClient>,
    /// Before the next attempt, if one fails. Grows until one goes well.
    pause: Duration,
    /// Events given up since containerd last took one, and whether it is known to take none.
    given_up: u64,
    away: bool,
}

impl Sender {
    fn new(address: String, queue: Arc<Queue>) -> Sender {
        let path = address.strip_prefix("unix://").map(str::to_owned);
        Sender {
            path: path.unwrap_or(address),
            queue,
            client: None,
            pause: PAUSE_MIN,
            given_up: 0,
            away: false,
        }
    }

    async fn run(mut self) {
        loop {
            let event = self.queue.next().await;
            self.deliver(event).await;
            self.queue.settle();
        }
    }

    /// Sends one event until it is answered or given up.
    async fn deliver(&mut self, event: Waiting) {
        let request = ForwardRequest {
            envelope: MessageField::some(event.envelope),
            ..ForwardRequest::default()
        };
        let mut refusals = 0;
        loop {
            let failure = match self.attempt(&request).await {
                Ok(()) => return self.taken(),
                Err(failure) => failure,
            };
            if matches!(failure, Failure::Refused(_)) {
                refusals += 1;
            }
            let old = event.since.elapsed() + self.pause > AGE_LIMIT;
            if old || refusals == REFUSALS_MAX {
                let topic = &request.envelope.topic;
                return self.give_up(topic, &failure);
            }
            self.failed(&failure);
            sleep(self.pause).await;
            self.pause = (self.pause * 2).min(PAUSE_MAX);
        }
    }

    /// One attempt; a connection that ended since the last event, because containerd was restarted, costs none.
    async fn attempt(&mut self, request: &ForwardRequest) -> Result<(), Failure> {
        if let Some(client) = self.client.take() {
            match self.forward(client, request).await {
                Err(Failure::Ended(_)) => {}
                other => return other,
            }
        }
        // Not by the client's own connect, which blocks the thread while a backlog is full.
        let stream = UnixStream::connect(&self.path)
            .await
            .map_err(Failure::Connect)?;
        let client = EventsClient::new(Client::new(Socket::from(stream)));
        self.forward(client, request).await
    }

    /// Sends, and keeps the connection if it can carry another call.
    async fn forward(
        &mut self,
        client: EventsClient,
        request: &ForwardRequest,
    ) -> Result<(), Failure> {
        let answered = timeout(ANSWER_LIMIT, client.forward(Context::default(), request)).await;
        match answered.map_err(|_elapsed| Failure::Late)? {
            Ok(_) => {
                self.client = Some(client);
                Ok(())
            }
            Err(error @ ttrpc::Error::RpcStatus(_)) => {
                self.client = Some(client);
                Err(Failure::Refused(error))
            }
            Err(error) => Err(Failure::Ended(error)),
        }
    }

    fn taken(&mut self) {
        self.pause = PAUSE_MIN;
        let lost = std::mem::take(&mut self.given_up) + self.queue.take_lost();
        if std::mem::take(&mut self.away) || lost > 0 {
            tracing::info!(lost, "containerd takes events again");
        }
    }

    /// Said once, until it goes well again.
    fn failed(&mut self, failure: &Failure) {
        if !std::mem::replace(&mut self.away, true) {
            let cause = std::error::Error::source(failure).map(ToString::to_string);
            tracing::warn!(
                path = self.path,
                cause,
                "events wait for containerd: {failure}"
            );
        }
    }

    fn give_up(&mut self, topic: &str, failure: &Failure) {
        self.given_up += 1;
        if self.given_up == 1 {
            let cause = std::error::Error::source(failure).map(ToString::to_string);
            tracing::error!(topic, cause, "an event is given up: {failure}");
        }
    }
}

#[cfg(test)]
#[path = "events_tests.rs"]
mod tests;
