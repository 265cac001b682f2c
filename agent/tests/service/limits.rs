//! cgroup limits, figures, pause, OOM.

use crate::guest::{Guest, container_request, context, lines, process_request, refusal};
use capsid_protocol::agent::{Empty, UpdateRequest};
use serde_json::json;
use std::time::{Duration, Instant};
use ttrpc::Code;

#[test]
fn limits_are_set_told_and_changed() {
    let guest = Guest::start();
    let mut spec = guest.spec(&["sleep", "1000"]);
    spec["linux"]["resources"] = json!({
        "memory": {"limit": 64 << 20}, "pids": {"limit": 50},
        "cpu": {"quota": 50_000, "period": 100_000}
    });
    let running = guest.run("c1", &spec);
    let request = container_request("c1");
    let stats = guest.client().stats(context(), &request).expect("told");
    assert_eq!(stats.memory.limit_bytes, 64 << 20);
    assert_eq!(stats.pids.limit, 50);
    assert_eq!(stats.pids.current, 1);
    assert!(stats.memory.usage_bytes > 0);
    assert_eq!(lines("/sys/fs/cgroup/capsid/c1/cpu.max"), ["50000 100000"]);
    let update = UpdateRequest {
        container_id: "c1".into(),
        resources_json: json!({"memory": {"limit": 96 << 20}}).to_string().into(),
        ..Default::default()
    };
    guest.client().update(context(), &update).expect("updated");
    let stats = guest.client().stats(context(), &request).expect("told");
    assert_eq!(stats.memory.limit_bytes, 96 << 20);
    assert_eq!(stats.pids.limit, 50);
    let pids = guest.client().pids(context(), &request).expect("told");
    assert_eq!(pids.guest_pids.len(), 1);
    guest.end(running);
}

#[test]
fn a_container_over_its_memory_is_killed_and_told() {
    let guest = Guest::start();
    // tail keeps what has no line ends in memory.
    let mut spec = guest.spec(&["tail", "/dev/zero"]);
    spec["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
    let running = guest.run("c1", &spec);
    let event = guest.client().next_event(context(), &Empty::default());
    let event = event.expect("an event");
    assert_eq!(event.oom_kill().container_id, "c1");
    assert_eq!(event.oom_kill().oom_kills, 1);
    assert_eq!(running.finish(&guest).status, 137);
    let request = process_request("c1", "");
    let ended = guest.client().wait(context(), &request).expect("told");
    assert_eq!(ended.oom_kills, 1);
    let request = container_request("c1");
    let stats = guest.client().stats(context(), &request).expect("told");
    assert_eq!(stats.memory_events.oom_kill, 1);
    guest.delete("c1", "").expect("deleted");
}

#[test]
fn the_event_of_an_oom_kill_is_ready_before_wait_answers() {
    let guest = Guest::start();
    let limited = |spec: &mut serde_json::Value| {
        let limits = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
        spec["linux"]["resources"] = limits;
    };
    let mut init = guest.spec(&["tail", "/dev/zero"]);
    limited(&mut init);
    let mut sleeper = guest.spec(&["sleep", "1000"]);
    limited(&mut sleeper);
    let oom = |id: &str, exec: &str| {
        let request = process_request(id, exec);
        let ended = guest.client().wait(context(), &request).expect("told");
        assert_eq!(
            (ended.exit_status, ended.oom_kills),
            (137, 1),
            "{id} {exec}"
        );
        // Asked only now: what it answers was there.
        let event = guest.client().next_event(context(), &Empty::default());
        let event = event.expect("an event");
        assert_eq!(event.oom_kill().container_id, id);
        assert_eq!(event.oom_kill().oom_kills, 1);
    };
    let killed = guest.run("c1", &init);
    oom("c1", "");
    killed.finish(&guest);
    guest.delete("c1", "").expect("deleted");
    let running = guest.run("c2", &sleeper);
    let exec = guest.exec("c2", "e1", &guest.process("exec tail /dev/zero"));
    exec.expect("started");
    oom("c2", "e1");
    guest.end(running);
}

#[test]
fn figures_are_the_kernels() {
    let guest = Guest::start();
    let mut spec = guest.spec(&[
        "sh",
        "-c",
        "head -c 3000000 /dev/zero >/file; exec sleep 1000",
    ]);
    spec["linux"]["resources"] = json!({"cpu": {"quota": 20_000, "period": 10_000}});
    let running = guest.run("c1", &spec);
    let request = container_request("c1");
    let until = Instant::now() + Duration::from_secs(60);
    let stats = loop {
        let stats = guest.client().stats(context(), &request).expect("told");
        // The writer may be there a moment longer than its file takes.
        if stats.memory.file >= 3_000_000 && stats.pids.current == 1 {
            break stats;
        }
        assert!(Instant::now() < until, "{stats:?}");
        std::thread::sleep(Duration::from_millis(10));
    };
    let directory = std::path::Path::new("/sys/fs/cgroup/capsid/c1");
    let keyed = |file: &str, key: &str| -> u64 {
        let all = lines(directory.join(file));
        let value = all
            .iter()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
        value
            .unwrap_or_else(|| panic!("{key} in {file}"))
            .parse()
            .expect("a number")
    };
    assert!(
        stats.cpu.usage_usec > 0 && stats.cpu.nr_periods > 0,
        "{stats:?}"
    );
    assert!(stats.memory.max_usage_bytes >= stats.memory.file);
    assert!(
        stats.memory.pgfault > 0 && stats.memory.kernel_stack > 0,
        "{stats:?}"
    );
    // What does not change any more is told to the byte.
    assert_eq!(stats.memory.file, keyed("memory.stat", "file"));
    assert_eq!(
        stats.memory.inactive_anon,
        keyed("memory.stat", "inactive_anon")
    );
    assert_eq!(
        stats.memory.slab_reclaimable,
        keyed("memory.stat", "slab_reclaimable")
    );
    assert_eq!(stats.memory_events.oom_kill, 0);
    assert_eq!(stats.pids.current, 1);
    guest.end(running);
}

#[test]
fn an_exec_goes_where_init_is_if_the_container_has_cgroups_of_its_own() {
    let guest = Guest::start();
    let own_tree = "cd /sys/fs/cgroup && mkdir init && echo 1 > init/cgroup.procs && \
                    echo +pids > cgroup.subtree_control && echo moved && exec sleep 1000";
    let mut spec = guest.spec(&["sh", "-c", own_tree]);
    // The filter of these specs refuses mkdir.
    spec["linux"]["seccomp"].take();
    for mount in spec["mounts"].as_array_mut().expect("mounts") {
        if mount["destination"] == "/sys/fs/cgroup" {
            mount["options"] = json!(["nosuid", "noexec", "nodev", "rw"]);
        }
    }
    let running = guest.run("c1", &spec);
    let given_on = "/sys/fs/cgroup/capsid/c1/cgroup.subtree_control";
    let until = Instant::now() + Duration::from_secs(60);
    while lines(given_on) != ["pids"] {
        assert!(Instant::now() < until, "the container made no cgroups");
        std::thread::sleep(Duration::from_millis(10));
    }
    let exec = guest.exec("c1", "e1", &guest.process("cat /proc/self/cgroup"));
    let output = exec.expect("started").finish(&guest);
    assert_eq!((output.status, output.stdout.as_str()), (0, "0::/init\n"));
    guest.end(running);
}

#[test]
fn a_paused_container_stands_still() {
    let guest = Guest::start();
    let running = guest.run("c1", &guest.spec(&["sh", "-c", "while :; do :; done"]));
    let request = container_request("c1");
    guest.client().pause(context(), &request).expect("paused");
    let used = || {
        let stats = guest.client().stats(context(), &request);
        stats.expect("told").cpu.usage_usec
    };
    let before = used();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(used(), before);
    let again = guest.client().pause(context(), &request);
    assert_eq!(refusal(again).0, Code::FAILED_PRECONDITION);
    let exec = guest.exec("c1", "e1", &guest.process("true"));
    assert_eq!(refusal(exec).0, Code::FAILED_PRECONDITION);
    guest.client().resume(context(), &request).expect("resumed");
    let exec = guest.exec("c1", "e1", &guest.process("true"));
    assert_eq!(exec.expect("started").finish(&guest).status, 0);
    guest.end(running);
}

#[test]
fn a_paused_container_can_be_killed() {
    let guest = Guest::start();
    let running = guest.sleeper("c1");
    let request = container_request("c1");
    guest.client().pause(context(), &request).expect("paused");
    guest.kill("c1", "", 9, false).expect("killed");
    assert_eq!(running.finish(&guest).status, 137);
    guest.delete("c1", "").expect("deleted");
}

#[test]
fn a_fork_bomb_ends_at_its_limit_and_dies_as_one() {
    let guest = Guest::start();
    let line = "for i in $(seq 100); do sleep 1000 & done; wait";
    let mut spec = guest.spec(&["sh", "-c", line]);
    spec["linux"]["resources"] = json!({"pids": {"limit": 20}});
    let running = guest.run("c1", &spec);
    guest.kill("c1", "", 9, true).expect("killed");
    assert_eq!(running.finish(&guest).status, 137);
    guest.delete("c1", "").expect("deleted");
    assert!(!std::path::Path::new("/sys/fs/cgroup/capsid/c1").exists());
}
