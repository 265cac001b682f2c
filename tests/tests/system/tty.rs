//! A terminal session, as a person has it.

use capsid_tests::capsid::{image, vmm_of};
use capsid_tests::ledger::Ledger;
use capsid_tests::pty::Session;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn shell(rows: u16, columns: u16) -> Session {
    // The mark is written so that the echo of the command line itself does not contain it.
    script("echo u''p; exec sh", rows, columns)
}

fn script(script: &str, rows: u16, columns: u16) -> Session {
    let image = image();
    let image = image.to_str().expect("utf-8");
    Session::start(
        &[
            "capsid", "run", "-it", "--image", image, "--", "sh", "-c", script,
        ],
        rows,
        columns,
    )
}

#[test]
fn a_shell_has_the_terminal_s_size_and_follows_it() {
    let mut session = shell(33, 99);
    session.sees("up");
    session.types("stty size; test -t 0 && test -t 1 && test -t 2 && echo all-t''ty\n");
    session.sees("33 99");
    session.sees("all-tty");
    session.resize(44, 111);
    // The signal travels beside the keys: the shell is asked until it has seen the new size.
    session.types("while [ \"$(stty size)\" != '44 111' ]; do :; done; echo re''sized\n");
    session.sees("resized");
    session.types("exit 6\n");
    assert_eq!(session.ends(), 6);
}

#[test]
fn ctrl_c_interrupts_the_command_and_not_the_shell() {
    let mut session = shell(24, 80);
    session.sees("up");
    // The command says itself that it is there: a key before that reaches the shell alone, which then waits for it.
    session.types("trap 'echo in''t' INT; sh -c 'echo re\"\"ady; exec sleep 1000'\n");
    session.sees("ready");
    session.types("\u{3}");
    session.sees("int");
    session.types("exit 0\n");
    session.ends();
}

#[test]
fn the_terminal_s_modes_are_restored() {
    let mut session = shell(24, 80);
    session.sees("up");
    let raw = session.modes();
    assert!(raw.contains("-icanon"), "raw while it runs: {raw}");
    session.types("exit 0\n");
    session.sees("exit 0");
    assert_eq!(session.ends_with_modes("icanon"), 0);
}

#[test]
fn the_terminal_s_modes_are_restored_when_the_vmm_is_killed() {
    let before = Ledger::now();
    let mut session = shell(24, 80);
    session.sees("up");
    assert!(session.modes().contains("-icanon"), "{}", session.modes());
    let vmm = vmm_of(session.pid()).expect("a VMM");
    kill(vmm, Signal::SIGKILL).expect("the VMM runs");
    assert_eq!(session.ends_with_modes("icanon"), 137);
    before.balances();
}

#[test]
fn the_terminal_s_modes_are_restored_after_sigterm() {
    let before = Ledger::now();
    let trapping = "trap 'exit 9' TERM; echo up; while :; do sleep 0.1; done";
    let mut session = script(trapping, 24, 80);
    session.sees("up");
    assert!(session.modes().contains("-icanon"), "{}", session.modes());
    kill(Pid::from_raw(session.pid()), Signal::SIGTERM).expect("capsid runs");
    assert_eq!(session.ends_with_modes("icanon"), 9);
    before.balances();
}
