//! What happens to a container is told, in the order in which it happened.

use capsid_tests::command::Running;
use capsid_tests::containerd::{Daemon, Runtime};
use std::time::Duration;

/// A subscription is not acknowledged: something happens every so often until one event of it has come.
const KNOCK_STEP: Duration = Duration::from_millis(200);

/// `ctr events` that listens.
fn listener(daemon: &Daemon) -> Running {
    let mut listener = daemon.ctr(["events"]).start();
    let mut heard = String::new();
    let mut knocks = 0;
    while !heard.contains('\n') {
        knocks += 1;
        let label = format!("knock={knocks}");
        daemon
            .ctr(["namespaces", "label", "default", &label])
            .wait()
            .exits(0);
        heard += &listener.says_within(KNOCK_STEP);
    }
    listener
}

pub(crate) fn events_come_in_order(daemon: &Daemon) {
    let mut listener = listener(daemon);
    let mut running = daemon
        .run(&["--rm"], "one", "echo up; read line; exit 4")
        .typed()
        .start();
    running.until("up\n");
    let (pid, _) = daemon.status("one").expect("listed");
    daemon.exec("other", "one", "exit 3").wait().exits(3);
    daemon.task(&["pause"], "one");
    daemon.task(&["resume"], "one");
    running.types("go\n");
    running.wait().exits(4);

    let heard = until_line(&mut listener, "/tasks/delete");
    let tasks: Vec<(&str, serde_json::Value)> = heard.lines().filter_map(task_event).collect();
    let topics: Vec<&str> = tasks.iter().map(|(topic, _)| *topic).collect();
    assert_eq!(
        topics,
        [
            "create",
            "start",
            "exec-added",
            "exec-started",
            "exit",
            "paused",
            "resumed",
            "exit",
            "delete"
        ],
        "{heard}"
    );
    let field = |number: usize, name: &str| tasks[number].1[name].clone();
    assert!(
        tasks
            .iter()
            .all(|(_, event)| event["container_id"] == "one"),
        "{heard}"
    );
    for number in [0, 1, 7, 8] {
        assert_eq!(field(number, "pid"), pid, "{heard}");
    }
    for (number, id, code) in [(4, "other", 3), (7, "one", 4)] {
        assert_eq!(field(number, "id"), id, "{heard}");
        assert_eq!(field(number, "exit_status"), code, "{heard}");
    }
    assert_eq!(field(8, "exit_status"), 4, "{heard}");
    assert_eq!(field(8, "exited_at"), field(7, "exited_at"), "{heard}");
}

/// A container that takes more memory than it may have.
pub(crate) fn an_oom_is_told_and_is_137(daemon: &Daemon) {
    let mut listener = listener(daemon);
    let flags = ["--rm", "--memory-limit", "33554432"];
    let script = "exec dd if=/dev/zero of=/dev/shm/much bs=1M count=60";
    daemon.run(&flags, "one", script).wait().exits(137);
    // runc's shim looks at the cgroup beside the exit, which may take the cgroup away first.
    if daemon.runtime() == Runtime::Capsid {
        let heard = until_line(&mut listener, "/tasks/delete");
        let topics: Vec<&str> = heard
            .lines()
            .filter_map(task_event)
            .map(|event| event.0)
            .collect();
        assert_eq!(
            topics,
            ["create", "start", "oom", "exit", "delete"],
            "{heard}"
        );
    }
}

/// What comes up to the end of the line with this mark.
fn until_line(listener: &mut Running, mark: &str) -> String {
    let heard = [listener.until(mark), listener.until("\n")].concat();
    String::from_utf8_lossy(&heard).into_owned()
}

/// The topic behind `/tasks/`, and what the event says; other events are none of a task.
fn task_event(line: &str) -> Option<(&str, serde_json::Value)> {
    let (_, rest) = line.split_once(" /tasks/")?;
    let (topic, event) = rest.split_once(' ')?;
    Some((topic, serde_json::from_str(event).expect("ctr prints JSON")))
}
