//! What a container is held to, read back from inside it, for its init and for an exec alike.

use crate::guest::{Guest, Output};
use serde_json::json;

/// Runs a line as the container's init and as an exec of a sleeping one.
fn both(guest: &Guest, line: &str) -> [Output; 2] {
    let init = guest.shell("c1", line);
    let running = guest.sleeper("c2");
    let exec = guest
        .exec("c2", "e1", &guest.process(line))
        .expect("started");
    let exec = exec.finish(guest);
    guest.end(running);
    [init, exec]
}

#[test]
fn capabilities_are_the_specs() {
    let guest = Guest::start();
    for output in both(&guest, "grep ^Cap /proc/self/status") {
        let expected = "CapInh:\t0000000000000000\nCapPrm:\t00000000a80425fb\n\
                        CapEff:\t00000000a80425fb\nCapBnd:\t00000000a80425fb\n\
                        CapAmb:\t0000000000000000\n";
        assert_eq!(output.stdout, expected);
    }
}

#[test]
fn the_seccomp_filter_holds() {
    let guest = Guest::start();
    for output in both(
        &guest,
        "grep ^Seccomp: /proc/self/status; mkdir /tmp/x 2>&1",
    ) {
        assert_eq!(
            output.stdout,
            "Seccomp:\t2\nmkdir: can't create directory '/tmp/x': Function not implemented\n"
        );
    }
}

#[test]
fn the_seccomp_filter_holds_with_no_new_privileges() {
    let guest = Guest::start();
    let line = "grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status";
    let mut spec = guest.spec(&["sh", "-c", line]);
    spec["process"]["noNewPrivileges"] = true.into();
    let expected = "NoNewPrivs:\t1\nSeccomp:\t2\n";
    assert_eq!(guest.to_end("c1", &spec).stdout, expected);
    let running = guest.sleeper("c2");
    let exec = guest.exec("c2", "e1", &spec["process"]).expect("started");
    assert_eq!(exec.finish(&guest).stdout, expected);
    guest.end(running);
}

#[test]
fn only_three_descriptors_are_inherited() {
    let guest = Guest::start();
    // ls has the directory itself open as 3.
    for output in both(&guest, "ls /proc/self/fd") {
        assert_eq!(output.stdout, "0\n1\n2\n3\n");
    }
}

#[test]
fn nothing_of_the_agent_is_inherited() {
    let guest = Guest::start();
    let line = "cat /proc/self/oom_score_adj; ulimit -n; grep ^SigBlk: /proc/self/status; \
                grep ^SigIgn: /proc/self/status; env";
    for output in both(&guest, line) {
        let expected = "0\n1024\nSigBlk:\t0000000000000000\nSigIgn:\t";
        let rest = output.stdout.strip_prefix(expected).expect(&output.stdout);
        let ignored = rest
            .split('\n')
            .next()
            .and_then(|mask| u64::from_str_radix(mask, 16).ok());
        // glibc's posix_spawn leaves its own two, 32 and 33, ignored in whatever it starts.
        assert_eq!(ignored.map(|mask| mask & !0x1_8000_0000), Some(0), "{rest}");
        assert!(!output.stdout.contains("CARGO"));
    }
}

#[test]
fn masked_and_read_only_paths_are() {
    let guest = Guest::start();
    for output in both(
        &guest,
        "wc -c </proc/timer_list; echo 1 >/proc/sys/kernel/panic",
    ) {
        assert_eq!(output.stdout, "0\n");
        assert!(
            output.stderr.contains("Read-only file system"),
            "{}",
            output.stderr
        );
    }
}

#[test]
fn processes_and_networks_are_the_containers_own() {
    let guest = Guest::start();
    let line = "echo $$; cat /sys/class/net/lo/operstate /proc/self/cgroup; hostname";
    for (output, pid) in both(&guest, line).iter().zip(["1", "2"]) {
        // "unknown" is what a loopback interface that is up has to say (RFC 2863).
        let expected = format!("{pid}\nunknown\n0::/\nbox\n");
        assert_eq!(output.stdout, expected);
    }
}

#[test]
fn a_read_only_root_is_read_only() {
    let guest = Guest::start();
    let mut spec = guest.spec(&["touch", "/etc/new"]);
    spec["root"]["readonly"] = true.into();
    let output = guest.to_end("c1", &spec);
    assert_eq!(output.status, 1);
    assert!(output.stderr.contains("Read-only file system"));
}

#[test]
fn rlimits_and_oom_score_are_the_specs() {
    let guest = Guest::start();
    let line = "ulimit -n; ulimit -Hn; cat /proc/self/oom_score_adj";
    let mut spec = guest.spec(&["sh", "-c", line]);
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}]);
    spec["process"]["oomScoreAdj"] = 500.into();
    assert_eq!(guest.to_end("c1", &spec).stdout, "100\n200\n500\n");
    let running = guest.sleeper("c2");
    let exec = guest.exec("c2", "e1", &spec["process"]).expect("started");
    assert_eq!(exec.finish(&guest).stdout, "100\n200\n500\n");
    guest.end(running);
}

#[test]
fn a_working_directory_outside_the_root_is_refused() {
    let guest = Guest::start();
    let running = guest.sleeper("c1");
    for fd in 3..20 {
        let mut process = guest.process("true");
        process["cwd"] = format!("/proc/self/fd/{fd}").into();
        guest.exec("c1", "e1", &process).expect_err("outside");
    }
    guest.end(running);
}
