//! A terminal session, as a person has it.

use crate::tasks::UP;
use capsid_tests::containerd::Daemon;
use capsid_tests::pty::Session;

/// A shell that `ctr` runs, with a terminal of this size. The mark is written so that the echo of a command line does not
/// contain it.
const SHELL: &str = "echo u''p; exec sh";
const ROWS: u16 = 33;
const COLUMNS: u16 = 99;

fn session(daemon: &Daemon, words: Vec<&str>) -> Session {
    let client = daemon.client();
    let command: Vec<&str> = client.iter().map(String::as_str).chain(words).collect();
    let mut session = Session::start(&command, ROWS, COLUMNS);
    session.sees("up");
    session
}

pub(crate) fn a_terminal_has_its_size_and_follows_it(daemon: &Daemon) {
    let mut session = session(daemon, daemon.words(&["--rm", "--tty"], "one", SHELL));
    follows(&mut session);
    session.types("exit 6\n");
    assert_eq!(session.ends(), 6);
}

pub(crate) fn an_exec_has_a_terminal_of_its_own(daemon: &Daemon) {
    let mut running = daemon.run(&["--rm"], "one", UP).start();
    running.until("up\n");
    let words = "tasks exec --exec-id shell --tty one sh -c".split(' ');
    let mut session = session(daemon, words.chain([SHELL]).collect());
    follows(&mut session);
    // Ctrl-C is for what the shell runs.
    session.types("sh -c 'echo re\"\"ady; exec sleep 1000'\n");
    session.sees("ready");
    session.types("\u{3}");
    session.types("exit 6\n");
    assert_eq!(session.ends(), 6);
    daemon.task(&["kill", "--signal", "SIGKILL"], "one");
    running.wait().exits(137);
}

fn follows(session: &mut Session) {
    // `ctr` tells the size beside the keys, as it does each change of it: the shell is asked until it knows.
    session.types("until test \"$(stty size)\" = '33 99'; do :; done; echo si''zed\n");
    session.sees("sized");
    session.types("test -t 0 && test -t 1 && test -t 2 && echo all-t''ty\n");
    session.sees("all-tty");
    session.resize(44, 111);
    session.types("until test \"$(stty size)\" = '44 111'; do :; done; echo re''sized\n");
    session.sees("resized");
}
