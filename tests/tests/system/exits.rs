//! The exit code of `capsid run` is the command's own.

use capsid_tests::bundle::{Scratch, privileged_spec, write};
use capsid_tests::capsid::{capsid, sh};
use capsid_tests::command::Run;
use capsid_tests::ledger::Ledger;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::time::Duration;

/// Each code costs a guest, so these are sampled: both ends, the neighbours of 128, and every code that `capsid` or
/// docker gives a meaning of its own, which the command's must not be taken for.
#[test]
fn the_exit_codes_at_both_ends_around_128_and_with_a_meaning_come_back_as_they_are() {
    for code in [0, 1, 2, 42, 124, 125, 126, 127, 128, 129, 137, 254, 255] {
        sh(&[], &format!("exit {code}")).wait().exits(code);
    }
}

#[test]
fn what_a_shell_says_of_a_child_killed_by_a_signal_comes_back() {
    // The shell is the container's init, its child dies; the shell makes the code.
    sh(&[], "sh -c 'kill -11 $$'; exit $?").wait().exits(139);
}

/// A container whose first process is no init of a pid namespace, so that a signal without a handler kills it.
fn mortal(scratch: &Scratch, script: &str) -> Run {
    write(scratch.path(), &privileged_spec(script));
    capsid(["run", "--bundle", scratch.path().to_str().expect("utf-8")])
}

#[test]
fn a_container_s_first_process_killed_by_a_signal_exits_128_plus_its_number() {
    let before = Ledger::now();
    let scratch = Scratch::new("killed");
    // The first, two that dump core, the one that cannot be caught, and the usual one.
    for signal in [1, 6, 9, 11, 15] {
        mortal(&scratch, &format!("kill -{signal} $$; exit 1"))
            .wait()
            .exits(128 + signal);
    }
    drop(scratch);
    before.balances();
}

#[test]
fn a_first_process_killed_by_a_real_time_signal_exits_128_plus_its_number() {
    let before = Ledger::now();
    let scratch = Scratch::new("real-time");
    mortal(&scratch, "kill -64 $$; exit 1")
        .within(Duration::from_secs(60))
        .wait()
        .exits(192);
    drop(scratch);
    before.balances();
}

#[test]
fn a_forwarded_signal_that_nobody_handles_ends_the_command_with_128_plus_its_number() {
    let before = Ledger::now();
    let scratch = Scratch::new("forwarded");
    for signal in [Signal::SIGTERM, Signal::SIGUSR1] {
        let mut running = mortal(&scratch, "echo up; exec sleep 1000").start();
        running.until("up");
        kill(Pid::from_raw(running.pid()), signal).expect("capsid runs");
        running.wait().exits(128 + signal as i32);
    }
    drop(scratch);
    before.balances();
}

#[test]
fn an_init_that_faults_or_runs_out_of_time_exits_128_plus_the_signal_s_number() {
    let before = Ledger::now();
    // PID 1 of a pid namespace is spared what is sent to it from inside, but not what the kernel must do.
    let overflow = "ulimit -s 256; f() { f; }; f";
    sh(&[], overflow).wait().exits(128 + Signal::SIGSEGV as i32);
    let no_time = "ulimit -t 1; while :; do :; done";
    sh(&[], no_time).wait().exits(128 + Signal::SIGKILL as i32);
    before.balances();
}

#[test]
fn an_init_that_ignores_its_signals_is_killed_by_the_third() {
    let before = Ledger::now();
    let mut running = sh(
        &[],
        "trap 'echo heard' TERM; echo up; while :; do sleep 0.1; done",
    )
    .start();
    running.until("up");
    for _ in 0..2 {
        // Two signals at once are one to a process, so each is heard before the next is sent.
        kill(Pid::from_raw(running.pid()), Signal::SIGTERM).expect("capsid runs");
        running.until("heard");
    }
    kill(Pid::from_raw(running.pid()), Signal::SIGTERM).expect("capsid runs");
    running.wait().refuses(143, &["ignored its signals"]);
    before.balances();
}

#[test]
fn capsid_killed_by_9_takes_its_vm_along() {
    let before = Ledger::now();
    let mut running = sh(&[], "echo up; exec sleep 1000").start();
    running.until("up");
    kill(Pid::from_raw(running.pid()), Signal::SIGKILL).expect("capsid runs");
    running.wait().exits(137);
    before.balances();
}

#[test]
fn signals_are_forwarded_to_the_command() {
    for signal in [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGTERM,
    ] {
        let before = Ledger::now();
        let name = signal.as_str().trim_start_matches("SIG").to_owned();
        let script =
            format!("trap 'echo got {name}; exit 33' {name}; echo up; while :; do sleep 0.1; done");
        let mut running = sh(&[], &script).start();
        running.until("up");
        kill(Pid::from_raw(running.pid()), signal).expect("capsid runs");
        running.until(&format!("got {name}"));
        running.wait().exits(33);
        before.balances();
    }
}
