//! Programs that take the outputs: shells here.

use super::*;
use crate::stdio::{LoggerError, Outputs};
use tokio::time::Instant;

/// A URL that has a shell run this script, with more of a query behind it.
fn shell(scheme: &str, script: &str, more: &str) -> String {
    let escaped: String = script.bytes().map(|byte| format!("%{byte:02x}")).collect();
    format!("{scheme}:///bin/sh?-c={escaped}{more}")
}

fn logger_error(error: StdioError) -> LoggerError {
    match error {
        StdioError::Logger { cause, .. } => cause,
        other => panic!("{other}"),
    }
}

/// A program that only sleeps, by a name that no other test's has.
fn sleeper(place: &Place) -> (String, String) {
    let name = format!(
        "sleeper-{}",
        place
            .0
            .display()
            .to_string()
            .rsplit('-')
            .next()
            .expect("a number")
    );
    let program = place.name(&name);
    std::os::unix::fs::symlink("/bin/sleep", &program).expect("a name");
    (name, format!("exec {program} 1000"))
}

/// True for a child of ours of this name, a zombie as well.
fn has_child(name: &str) -> bool {
    let (name, us) = (
        format!("Name:\t{name}\n"),
        format!("PPid:\t{}\n", std::process::id()),
    );
    let processes = std::fs::read_dir("/proc").expect("proc").flatten();
    processes
        .map(|process| process.path().join("status"))
        .any(|status| {
            // Others come and go meanwhile.
            let status = std::fs::read_to_string(status).unwrap_or_default();
            status.contains(&name) && status.contains(&us)
        })
}

#[tokio::test]
async fn one_logger_takes_both_outputs_and_knows_whose_they_are() {
    let place = Place::new();
    let (out, err, env) = (place.name("out"), place.name("err"), place.name("env"));
    let script = format!(
        "/bin/cat <&4 >{err} 5>&- & /usr/bin/env >{env}; exec 5>&-; /bin/cat <&3 >{out}; wait"
    );
    let url = shell("binary", &script, "&env.MODE=a+b");
    let (pumps, mut guest) = joined(Urls {
        stdout: &url,
        stderr: &url,
        ..NONE
    })
    .await
    .expect("ready");
    let (mut guest_out, mut guest_err) = (guest.stdout(), guest.stderr());
    beside(move || {
        guest_out.write_all(&bytes(3_000_000)).expect("it is read");
        guest_err.write_all(b"errors").expect("it is read");
    })
    .await;
    assert_eq!(pumps.outputs_done().await, Outputs::Written);
    pumps.close().await;
    assert!(std::fs::read(out).expect("written") == bytes(3_000_000));
    assert_eq!(std::fs::read(err).expect("written"), b"errors");
    let env = std::fs::read_to_string(env).expect("written");
    let mut env: Vec<&str> = env
        .lines()
        .filter(|line| !line.starts_with("_=") && !line.starts_with("PWD="))
        .collect();
    env.sort_unstable();
    assert_eq!(
        env,
        [
            "CONTAINER_ID=container",
            "CONTAINER_NAMESPACE=k8s.io",
            "MODE=a b"
        ]
    );
}

#[tokio::test]
async fn a_logger_has_six_descriptors_and_no_signal_of_ours() {
    let place = Place::new();
    let (fds, status) = (place.name("fds"), place.name("status"));
    let script = format!(
        "for fd in /proc/$$/fd/*; do echo ${{fd##*/}}; done >{fds}; \
         while read line; do echo $line; done </proc/$$/status >{status}; echo >&5; read x <&3"
    );
    let url = shell("binary-v2", &script, "");
    let (pumps, _guest) = joined(stdout_to(&url)).await.expect("ready");
    pumps.close().await;
    let fds = std::fs::read_to_string(fds).expect("written");
    // Whoever ran the tests may have left descriptors that every child has; a shim has none.
    let inherited = |fd: u32| {
        let flags = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap_or_default();
        let flags = flags.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok());
        fd > 6 && flags.is_some_and(|flags| flags & libc::O_CLOEXEC == 0)
    };
    let ours: Vec<&str> = fds
        .split_whitespace()
        .filter(|fd| fd.parse().is_ok_and(|fd: u32| fd < 10 && !inherited(fd)))
        .collect();
    // The last one is the directory, open while its names are read.
    assert_eq!(ours, ["0", "1", "2", "3", "4", "5", "6"]);
    let status = std::fs::read_to_string(status).expect("written");
    for kind in ["SigBlk: ", "SigIgn: "] {
        let set = status
            .lines()
            .find_map(|line| line.strip_prefix(kind))
            .expect("there");
        // Two beyond these are the C library's own.
        assert_eq!(
            u64::from_str_radix(set, 16).expect("a set") & 0x7fff_ffff,
            0,
            "{kind}"
        );
    }
}

#[tokio::test]
async fn the_pipe_of_an_output_that_is_not_named_is_at_its_end() {
    let place = Place::new();
    let err = place.name("err");
    let script = format!("echo >&5; /bin/cat <&4 >{err} && echo whole >>{err}; /bin/cat <&3");
    let url = shell("binary-v2", &script, "");
    let urls = Urls {
        terminal: true,
        ..stdout_to(&url)
    };
    let (pumps, guest) = joined(urls).await.expect("ready");
    drop(guest);
    assert_eq!(pumps.outputs_done().await, Outputs::Written);
    pumps.close().await;
    assert_eq!(std::fs::read(err).expect("written"), b"whole\n");
}

#[tokio::test]
async fn a_logger_that_cannot_start_is_an_error_and_leaves_nothing() {
    let place = Place::new();
    let missing = format!("binary://{}", place.name("missing"));
    let error = Stdio::open(stdout_to(&missing))
        .await
        .expect_err("not there");
    assert!(matches!(logger_error(error), LoggerError::Failed(_)));
    // It closes its pipe, and runs on.
    let (name, sleep) = sleeper(&place);
    let url = shell("binary-v2", &format!("exec 5>&-; {sleep}"), "");
    let error = Stdio::open(stdout_to(&url)).await.expect_err("not ready");
    assert!(matches!(logger_error(error), LoggerError::Unready));
    assert!(!has_child(&name));
}

#[tokio::test(start_paused = true)]
async fn a_logger_that_is_not_ready_in_30_s_is_killed() {
    let place = Place::new();
    let (name, sleep) = sleeper(&place);
    let begun = Instant::now();
    let url = shell("binary", &sleep, "");
    let error = Stdio::open(stdout_to(&url)).await.expect_err("not ready");
    assert!(matches!(logger_error(error), LoggerError::Late));
    assert_eq!(begun.elapsed().as_secs(), 30);
    assert!(!has_child(&name));
}

#[tokio::test]
async fn a_logger_that_dies_neither_ends_nor_blocks_the_container() {
    let url = shell("binary", "exit 3", "");
    let urls = Urls {
        stderr: &url,
        ..stdout_to(&url)
    };
    let (pumps, mut guest) = joined(urls).await.expect("ready by its end");
    let (mut guest_out, mut guest_err) = (guest.stdout(), guest.stderr());
    beside(move || {
        guest_out.write_all(&bytes(2_000_000)).expect("it is read");
        guest_err.write_all(&bytes(2_000_000)).expect("it is read");
    })
    .await;
    assert_eq!(pumps.outputs_done().await, Outputs::Written);
    pumps.close().await;
}

#[tokio::test]
async fn a_logger_has_its_time_behind_the_end_of_its_pipes_and_is_reaped() {
    let place = Place::new();
    let (end, name) = (place.name("end"), place.name("logger-of-test"));
    std::os::unix::fs::symlink("/bin/sh", &name).expect("a name");
    let script = format!("exec 5>&-; /bin/cat <&3 >{end}; /bin/sleep 0.2; echo flushed >>{end}");
    let url = shell("binary", &script, "").replace("/bin/sh?", &format!("{name}?"));
    let (pumps, mut guest) = joined(stdout_to(&url)).await.expect("ready");
    guest.stdout().write_all(b"said ").expect("room");
    assert_eq!(pumps.outputs_done().await, Outputs::Written);
    assert!(has_child("logger-of-test"));
    pumps.close().await;
    assert_eq!(std::fs::read(end).expect("written"), b"said flushed\n");
    assert!(!has_child("logger-of-test"));
}

#[tokio::test]
async fn a_logger_that_does_not_end_is_told_to_after_10_s_and_killed_after_2_more() {
    for (before, limit_s) in [("", 10), ("trap '' TERM; ", 12)] {
        let place = Place::new();
        let (name, sleep) = sleeper(&place);
        let url = shell("binary", &format!("{before}exec 5>&-; {sleep}"), "");
        let (pumps, _guest) = joined(stdout_to(&url)).await.expect("ready");
        // From here on the clock jumps whenever nothing else happens.
        tokio::time::pause();
        let begun = Instant::now();
        pumps.close().await;
        // It may jump once more before SIGTERM has had its effect.
        let took = begun.elapsed().as_secs();
        assert!((limit_s..=12).contains(&took), "{took} s");
        assert!(!has_child(&name));
        tokio::time::resume();
    }
}

#[tokio::test]
async fn two_loggers_are_told_to_end_at_once() {
    let place = Place::new();
    let (name, sleep) = sleeper(&place);
    let [out, err] = ["1", "2"].map(|which| {
        shell(
            "binary",
            &format!("trap '' TERM; exec 5>&-; {sleep}"),
            &format!("&which={which}"),
        )
    });
    let urls = Urls {
        stderr: &err,
        ..stdout_to(&out)
    };
    let (pumps, _guest) = joined(urls).await.expect("ready");
    tokio::time::pause();
    let begun = Instant::now();
    pumps.close().await;
    assert_eq!(begun.elapsed().as_secs(), 12);
    assert!(!has_child(&name));
}
