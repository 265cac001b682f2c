//! The exit code of `capsid run` is the command's own.

use capsid_tests::capsid::sh;
use capsid_tests::ledger::Ledger;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn exit_codes_come_back_as_they_are() {
    for code in [0, 1, 2, 7, 42, 124, 125, 126, 127, 128, 137, 200, 254, 255] {
        sh(&[], &format!("exit {code}")).wait().exits(code);
    }
}

#[test]
fn a_command_killed_by_a_signal_exits_128_plus_its_number() {
    for signal in [1, 2, 6, 9, 10, 11, 15] {
        // A shell of its own dies of the signal; as PID 1 of the container `sh` itself would ignore it.
        sh(&[], &format!("sh -c 'kill -{signal} $$'; exit $?"))
            .wait()
            .exits(128 + signal);
    }
}

#[test]
fn an_init_killed_by_a_signal_exits_128_plus_its_number() {
    let mut running = sh(&[], "echo up; exec sleep 1000").start();
    running.until("up");
    // SIGKILL cannot be forwarded; SIGTERM does nothing to a PID 1 without a handler, as with docker.
    let mut trapping = sh(
        &[],
        "trap 'exit 9' TERM; echo up; while :; do sleep 1; done",
    )
    .start();
    trapping.until("up");
    kill(Pid::from_raw(trapping.pid()), Signal::SIGTERM).expect("capsid runs");
    trapping.wait().exits(9);
    kill(Pid::from_raw(running.pid()), Signal::SIGKILL).expect("capsid runs");
    running.wait().exits(137);
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
