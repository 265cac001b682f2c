//! Output, exit codes, signals, stdin, execs.

use crate::guest::{Guest, Output, context, process_request};
use std::io::Write;
use std::time::{Duration, Instant};

#[test]
fn output_and_exit_code_come_back() {
    let guest = Guest::start();
    let output = guest.shell("c1", "echo out; echo err >&2; exit 7");
    let expected = Output {
        status: 7,
        stdout: "out\n".into(),
        stderr: "err\n".into(),
    };
    assert_eq!(output, expected);
}

#[test]
fn a_killed_container_is_137_and_a_terminated_one_143() {
    let guest = Guest::start();
    let running = guest.sleeper("c1");
    guest.kill("c1", "", 9, false).expect("killed");
    assert_eq!(running.finish(&guest).status, 137);
    // An init has no default actions (pid_namespaces(7)); its child has.
    let running = guest.run(
        "c2",
        &guest.spec(&["sh", "-c", "sh -c 'kill -15 $$'; exit $?"]),
    );
    assert_eq!(running.finish(&guest).status, 143);
}

#[test]
fn a_handled_signal_reaches_its_handler() {
    let guest = Guest::start();
    let line = "trap 'echo got; exit 3' TERM; echo ready >/tmp/ready; while :; do sleep 0.05; done";
    let running = guest.run("c1", &guest.spec(&["sh", "-c", line]));
    let ready = guest.directory.join("rootfs/tmp/ready");
    while !ready.exists() {
        std::thread::sleep(Duration::from_millis(5));
    }
    guest.kill("c1", "", 15, false).expect("sent");
    let output = running.finish(&guest);
    assert_eq!((output.status, output.stdout.as_str()), (3, "got\n"));
}

#[test]
fn eight_mebibytes_go_in_and_come_out_unchanged() {
    let guest = Guest::start();
    let mut running = guest.run("c1", &guest.spec(&["cat"]));
    let sent: Vec<u8> = (0..8u32 << 20)
        .map(|n| (n.wrapping_mul(31) >> 3) as u8)
        .collect();
    let mut stdin = running.stdin.take().expect("open");
    let bytes = sent.clone();
    let writer = std::thread::spawn(move || {
        stdin.write_all(&bytes).expect("written");
        stdin
            .shutdown(std::net::Shutdown::Write)
            .expect("half closed");
        stdin
    });
    let status = guest.wait("c1", "").expect("it ends");
    writer.join().expect("joins");
    assert_eq!(status, 0);
    assert!(running.stdout.join().expect("read") == sent);
}

#[test]
fn close_stdin_ends_a_reader() {
    let guest = Guest::start();
    let mut running = guest.run("c1", &guest.spec(&["cat"]));
    let stdin = running.stdin.as_mut().expect("open");
    stdin.write_all(b"before").expect("room");
    let request = process_request("c1", "");
    guest
        .client()
        .close_stdin(context(), &request)
        .expect("closed");
    assert_eq!(running.finish(&guest).stdout, "before");
}

#[test]
fn the_last_bytes_before_an_exit_arrive() {
    let guest = Guest::start();
    let output = guest.shell(
        "c1",
        "dd if=/dev/zero bs=1000 count=1000 2>/dev/null; printf end",
    );
    assert_eq!(output.stdout.len(), 1_000_003);
    assert!(output.stdout.ends_with("end"));
}

#[test]
fn an_exec_has_its_own_output_and_code() {
    let guest = Guest::start();
    let running = guest.sleeper("c1");
    let process = guest.process("echo from exec; echo $HOSTNAME >&2; hostname; exit 5");
    let exec = guest.exec("c1", "e1", &process).expect("started");
    let output = exec.finish(&guest);
    assert_eq!(output.status, 5);
    assert_eq!(output.stdout, "from exec\nbox\n");
    assert_eq!(guest.delete("c1", "e1").expect("deleted"), 5);
    guest.end(running);
}

#[test]
fn an_exec_reads_its_stdin_to_the_half_close() {
    let guest = Guest::start();
    let running = guest.sleeper("c1");
    let mut exec = guest
        .exec("c1", "e1", &guest.process("cat"))
        .expect("started");
    exec.stdin
        .as_mut()
        .expect("open")
        .write_all(b"tar")
        .expect("room");
    assert_eq!(exec.finish_after_stdin(&guest).stdout, "tar");
    guest.end(running);
}

#[test]
fn a_daemon_left_by_an_exec_does_not_hold_wait() {
    let guest = Guest::start();
    let running = guest.sleeper("c1");
    let exec = guest.exec("c1", "e1", &guest.process("sleep 100 & echo done"));
    let begun = Instant::now();
    let output = exec.expect("started").finish(&guest);
    assert_eq!((output.status, output.stdout.as_str()), (0, "done\n"));
    assert!(begun.elapsed() < Duration::from_secs(30));
    guest.end(running);
}

#[test]
fn orphans_of_a_container_are_reaped() {
    let guest = Guest::start();
    let running = guest.sleeper("c1");
    for n in 0..5 {
        // Joined execs are children of the agent; what they leave is the container's init's to reap.
        let exec = guest.exec(
            "c1",
            &format!("e{n}"),
            &guest.process("(sleep 0.01 &) ; true"),
        );
        assert_eq!(exec.expect("started").finish(&guest).status, 0);
        guest.delete("c1", &format!("e{n}")).expect("deleted");
    }
    assert_eq!(children(guest.agent.id()), 1, "only the init is left");
    guest.end(running);
}

#[test]
fn user_directory_environment_and_home_are_the_specs() {
    let guest = Guest::start();
    let mut spec = guest.spec(&[
        "sh",
        "-c",
        "id -u; id -g; id -G; readlink /proc/self/cwd; echo $A $HOME; umask",
    ]);
    spec["process"]["user"] =
        serde_json::json!({"uid": 1000, "gid": 1000, "additionalGids": [5, 6], "umask": 0o077});
    spec["process"]["cwd"] = "/tmp".into();
    spec["process"]["env"] = serde_json::json!(["PATH=/bin", "A=b c"]);
    let output = guest.to_end("c1", &spec);
    assert_eq!(
        output.stdout,
        "1000\n1000\n1000 5 6\n/tmp\nb c /home\n0077\n"
    );
}

#[test]
fn a_user_can_open_dev_stdout_again() {
    let guest = Guest::start();
    let mut spec = guest.spec(&[
        "sh",
        "-c",
        "echo again >/dev/stdout; echo too >/proc/self/fd/2",
    ]);
    spec["process"]["user"] = serde_json::json!({"uid": 1000, "gid": 1000});
    let output = guest.to_end("c1", &spec);
    assert_eq!(
        (output.stdout.as_str(), output.stderr.as_str()),
        ("again\n", "too\n")
    );
}

#[test]
fn guest_hooks_run_and_a_failing_one_fails_the_start() {
    let guest = Guest::start();
    let mut spec = guest.spec(&["cat", "/tmp/hook"]);
    let line = "echo hooked >/tmp/hook";
    spec["hooks"]["startContainer"] =
        serde_json::json!([{"path": "/bin/sh", "args": ["sh", "-c", line]}]);
    assert_eq!(guest.to_end("c1", &spec).stdout, "hooked\n");
    spec["hooks"]["startContainer"][0]["args"][2] = "exit 1".into();
    guest.create("c2", &spec).expect("created");
    guest.start_container("c2").expect_err("the hook failed");
    assert_eq!(guest.wait("c2", "").expect("ended"), 255);
    guest.delete("c2", "").expect("deleted");
}

#[test]
fn a_create_container_hook_is_told_the_state_and_a_failing_one_fails_the_create() {
    let guest = Guest::start();
    let told = std::env::temp_dir().join(format!("create-container-{}", std::process::id()));
    let line = format!("cat >{}", told.display());
    let mut spec = guest.spec(&["true"]);
    spec["hooks"]["createContainer"] =
        serde_json::json!([{"path": "/bin/sh", "args": ["sh", "-c", line]}]);
    guest.to_end("c1", &spec);
    let state = std::fs::read(&told).expect("written by the hook");
    std::fs::remove_file(&told).expect("removed");
    let state: serde_json::Value = serde_json::from_slice(&state).expect("the OCI state");
    assert_eq!(
        (&state["id"], &state["status"]),
        (&"c1".into(), &"creating".into())
    );
    spec["hooks"]["createContainer"][0]["args"][2] = "exit 1".into();
    guest.create("c2", &spec).expect_err("the hook failed");
    let again = guest.to_end("c2", &guest.spec(&["echo", "free"]));
    assert_eq!(
        again.stdout, "free\n",
        "a failed create leaves its name free"
    );
}

/// How many processes have `parent` as their parent, zombies included.
fn children(parent: u32) -> usize {
    let entries = std::fs::read_dir("/proc").expect("mounted");
    let stats = entries
        .flatten()
        .filter_map(|entry| std::fs::read_to_string(entry.path().join("stat")).ok());
    // pid (name) state ppid ...: the name may hold anything but is followed by the last ')'.
    let parents = stats.filter_map(|stat| {
        let rest = stat.rsplit_once(')')?.1.to_owned();
        rest.split_whitespace().nth(1)?.parse::<u32>().ok()
    });
    parents.filter(|found| *found == parent).count()
}
