//! Time is tokio's own here and passes when nothing else can happen; the sockets are real, and on the same thread.

use super::*;
use crate::testing::Scratch;
use containerd_shim_protos::api::Empty;
use containerd_shim_protos::shim_async::{Events, create_events};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::path::PathBuf;
use tokio::io::AsyncReadExt;
use tokio::net::UnixListener;
use ttrpc::r#async::{Server, TtrpcContext};

/// A directory with containerd's socket, or without.
struct Daemon {
    scratch: Scratch,
    seen: Arc<Seen>,
}

/// What containerd was told, and how it answers.
#[derive(Default)]
struct Seen {
    events: Mutex<Vec<Envelope>>,
    told: Notify,
    /// Calls that are still to be answered with an error.
    refuse: Mutex<u32>,
}

#[async_trait::async_trait]
impl Events for Seen {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let mut refuse = self.refuse.lock().expect("no panic");
        if *refuse > 0 {
            *refuse -= 1;
            let status = ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, "not this one");
            return Err(ttrpc::Error::RpcStatus(status));
        }
        let envelope = request.envelope.into_option().expect("an envelope");
        self.events.lock().expect("no panic").push(envelope);
        self.told.notify_waiters();
        Ok(Empty::new())
    }
}

impl Daemon {
    fn new() -> Daemon {
        Daemon {
            scratch: Scratch::new("events"),
            seen: Arc::default(),
        }
    }

    fn path(&self) -> PathBuf {
        self.scratch.path().join("ttrpc")
    }

    fn publisher(&self) -> Publisher {
        Publisher::start("k8s.io", Some(self.path().display().to_string()))
    }

    fn listen(&self) -> UnixListener {
        let _absent = std::fs::remove_file(self.path());
        UnixListener::bind(self.path()).expect("writable")
    }

    async fn up(&self) -> Server {
        let mut server = Server::new()
            .add_listener(self.listen().into())
            .register_service(create_events(self.seen.clone()));
        server.start().await.expect("a server");
        server
    }

    async fn down(&self, mut server: Server) {
        server.shutdown().await.expect("its end");
        drop(server);
        std::fs::remove_file(self.path()).expect("ours");
    }

    /// The ids of the tasks in the first `count` events, once there are so many.
    async fn told(&self, count: usize) -> Vec<String> {
        loop {
            let told = self.seen.told.notified();
            tokio::pin!(told);
            told.as_mut().enable();
            let ids = self.ids();
            if ids.len() >= count {
                return ids;
            }
            told.await;
        }
    }

    fn ids(&self) -> Vec<String> {
        let events = self.seen.events.lock().expect("no panic");
        events
            .iter()
            .map(|envelope| exit_of(envelope).container_id)
            .collect()
    }
}

fn exit(id: usize) -> Event {
    Event::Exit(TaskExit {
        container_id: id.to_string(),
        exit_status: 137,
        ..TaskExit::default()
    })
}

fn exit_of(envelope: &Envelope) -> TaskExit {
    TaskExit::parse_from_bytes(&envelope.event.value).expect("an exit")
}

fn ids(numbers: impl IntoIterator<Item = usize>) -> Vec<String> {
    numbers
        .into_iter()
        .map(|number| number.to_string())
        .collect()
}

#[tokio::test(start_paused = true)]
async fn events_arrive_in_order_with_topic_type_time_and_namespace() {
    let daemon = Daemon::new();
    let _server = daemon.up().await;
    let publisher = daemon.publisher();
    let events = [
        (
            Event::Create(TaskCreate::new()),
            "/tasks/create",
            "TaskCreate",
        ),
        (Event::Start(TaskStart::new()), "/tasks/start", "TaskStart"),
        (
            Event::ExecAdded(TaskExecAdded::new()),
            "/tasks/exec-added",
            "TaskExecAdded",
        ),
        (
            Event::ExecStarted(TaskExecStarted::new()),
            "/tasks/exec-started",
            "TaskExecStarted",
        ),
        (
            Event::Paused(TaskPaused::new()),
            "/tasks/paused",
            "TaskPaused",
        ),
        (
            Event::Resumed(TaskResumed::new()),
            "/tasks/resumed",
            "TaskResumed",
        ),
        (Event::Oom(TaskOOM::new()), "/tasks/oom", "TaskOOM"),
        (Event::Exit(TaskExit::new()), "/tasks/exit", "TaskExit"),
        (
            Event::Delete(TaskDelete::new()),
            "/tasks/delete",
            "TaskDelete",
        ),
    ];
    for (event, _, _) in &events {
        publisher.publish(event.clone());
    }
    assert!(publisher.flushed(Duration::from_secs(60)).await);
    let seen = daemon.seen.events.lock().expect("no panic");
    assert_eq!(seen.len(), events.len());
    for (envelope, (_, topic, name)) in seen.iter().zip(&events) {
        assert_eq!(envelope.topic, *topic);
        assert_eq!(envelope.event.type_url, format!("containerd.events.{name}"));
        assert_eq!(envelope.namespace, "k8s.io");
        assert!(envelope.timestamp.seconds > 1_700_000_000);
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_arrives_whole_and_an_address_may_be_an_url() {
    let daemon = Daemon::new();
    let _server = daemon.up().await;
    let address = format!("unix://{}", daemon.path().display());
    let publisher = Publisher::start("k8s.io", Some(address));
    publisher.publish(exit(7));
    daemon.told(1).await;
    let seen = daemon.seen.events.lock().expect("no panic");
    let exit = exit_of(&seen[0]);
    assert_eq!((exit.container_id.as_str(), exit.exit_status), ("7", 137));
}

#[tokio::test(start_paused = true)]
async fn a_restart_of_containerd_loses_and_reorders_nothing() {
    let daemon = Daemon::new();
    let publisher = daemon.publisher();
    let server = daemon.up().await;
    for number in 0..10 {
        publisher.publish(exit(number));
    }
    daemon.told(10).await;
    daemon.down(server).await;
    for number in 10..20 {
        publisher.publish(exit(number));
    }
    assert!(!publisher.flushed(Duration::from_secs(180)).await);
    let server = daemon.up().await;
    assert_eq!(daemon.told(20).await, ids(0..20));
    assert!(publisher.flushed(Duration::from_secs(60)).await);
    // A restart that nobody noticed: the old connection is dead, the new socket there.
    daemon.down(server).await;
    let _server = daemon.up().await;
    let before = Instant::now();
    publisher.publish(exit(20));
    assert_eq!(daemon.told(21).await, ids(0..21));
    assert_eq!(before.elapsed(), Duration::ZERO, "no pause for it");
}

#[tokio::test(start_paused = true)]
async fn an_event_that_is_refused_is_sent_again_and_then_given_up() {
    let daemon = Daemon::new();
    let _server = daemon.up().await;
    let publisher = daemon.publisher();
    *daemon.seen.refuse.lock().expect("no panic") = REFUSALS_MAX - 1;
    publisher.publish(exit(0));
    assert_eq!(daemon.told(1).await, ids([0]));
    *daemon.seen.refuse.lock().expect("no panic") = REFUSALS_MAX;
    publisher.publish(exit(1));
    publisher.publish(exit(2));
    assert_eq!(daemon.told(2).await, ids([0, 2]));
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_never_answers_is_left_and_its_successor_told() {
    let daemon = Daemon::new();
    let publisher = daemon.publisher();
    let silent = daemon.listen();
    publisher.publish(exit(0));
    let (mut connection, _) = silent.accept().await.expect("the publisher");
    // The publisher hangs up: all that it sent is followed by the end.
    let before = Instant::now();
    let mut request = Vec::new();
    connection.read_to_end(&mut request).await.expect("the end");
    assert!(!request.is_empty() && before.elapsed() >= ANSWER_LIMIT);
    drop((connection, silent));
    let _server = daemon.up().await;
    assert_eq!(daemon.told(1).await, ids([0]));
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_accepts_nobody_does_not_hold_the_shim() {
    let daemon = Daemon::new();
    let publisher = daemon.publisher();
    let stopped = daemon.listen();
    // Its backlog is full: a blocking connect would wait.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let address = SocketAddrUnix::new(daemon.path()).expect("short");
    let mut waiting = Vec::new();
    loop {
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        let socket = socket.expect("a socket");
        match rustix::net::connect(&socket, &address) {
            Ok(()) => waiting.push(socket),
            Err(_full) => break,
        }
    }
    publisher.publish(exit(0));
    assert!(!publisher.flushed(Duration::from_secs(60)).await);
    drop(stopped);
    let _server = daemon.up().await;
    assert_eq!(daemon.told(1).await, ids([0]));
}

#[tokio::test(start_paused = true)]
async fn of_too_many_events_the_oldest_are_lost() {
    let daemon = Daemon::new();
    let publisher = daemon.publisher();
    publisher.publish(exit(0));
    // The first one is on its way.
    assert!(!publisher.flushed(Duration::from_secs(1)).await);
    for number in 1..=QUEUE_MAX_EVENTS + 10 {
        publisher.publish(exit(number));
    }
    let _server = daemon.up().await;
    let told = daemon.told(1 + QUEUE_MAX_EVENTS).await;
    assert_eq!(told, ids([0].into_iter().chain(11..=QUEUE_MAX_EVENTS + 10)));
    assert!(publisher.flushed(Duration::from_secs(60)).await);
    assert_eq!(daemon.ids().len(), 1 + QUEUE_MAX_EVENTS);
}

#[tokio::test(start_paused = true)]
async fn an_event_is_given_up_when_it_is_too_old_and_not_before() {
    let daemon = Daemon::new();
    let publisher = daemon.publisher();
    publisher.publish(exit(0));
    assert!(!publisher.flushed(AGE_LIMIT - 2 * PAUSE_MAX).await);
    publisher.publish(exit(1));
    tokio::time::sleep(4 * PAUSE_MAX).await;
    let _server = daemon.up().await;
    assert_eq!(daemon.told(1).await, ids([1]));
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_is_away_is_not_asked_again_and_again() {
    let daemon = Daemon::new();
    let publisher = daemon.publisher();
    let listener = daemon.listen();
    publisher.publish(exit(0));
    let mut attempts = 0;
    let hang_up = async {
        loop {
            drop(listener.accept().await.expect("the publisher"));
            attempts += 1;
        }
    };
    tokio::select! {
        () = hang_up => {}
        flushed = publisher.flushed(2 * AGE_LIMIT) => assert!(flushed),
    }
    // The pauses double to their longest, and stay there.
    let longest = AGE_LIMIT.as_secs() / PAUSE_MAX.as_secs();
    assert!((longest..=longest + 10).contains(&attempts), "{attempts}");
}

#[tokio::test(start_paused = true)]
async fn without_an_address_events_are_let_go() {
    for address in [None, Some(String::new())] {
        let publisher = Publisher::start("default", address);
        publisher.publish(exit(0));
        assert!(publisher.flushed(Duration::ZERO).await);
    }
}

#[tokio::test(start_paused = true)]
async fn flushed_waits_for_the_last_answer_and_no_longer_than_it_may() {
    let daemon = Daemon::new();
    let publisher = daemon.publisher();
    assert!(publisher.flushed(Duration::ZERO).await);
    publisher.publish(exit(0));
    let before = Instant::now();
    assert!(!publisher.flushed(Duration::from_secs(3)).await);
    assert_eq!(before.elapsed(), Duration::from_secs(3));
    let _server = daemon.up().await;
    assert!(publisher.flushed(Duration::from_secs(60)).await);
    assert_eq!(daemon.ids(), ids([0]));
}
