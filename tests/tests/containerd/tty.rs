//! A terminal session, as a person has it.

use capsid_tests::containerd::Daemon;
use capsid_tests::pty::Session;

pub(crate) fn a_terminal_has_its_size_and_follows_it(daemon: &Daemon) {
    // The mark is written so that the echo of a command line does not contain it.
    let words = daemon.words(&["--rm", "--tty"], "one", "echo u''p; exec sh");
    let client = daemon.client();
    let command: Vec<&str> = client.iter().map(String::as_str).chain(words).collect();
    let mut session = Session::start(&command, 33, 99);
    session.sees("up");
    // `ctr` tells the size beside the keys, as it does each change of it: the shell is asked until it knows.
    session.types("until test \"$(stty size)\" = '33 99'; do :; done; echo si''zed\n");
    session.sees("sized");
    session.types("test -t 0 && test -t 1 && test -t 2 && echo all-t''ty\n");
    session.sees("all-tty");
    session.resize(44, 111);
    session.types("until test \"$(stty size)\" = '44 111'; do :; done; echo re''sized\n");
    session.sees("resized");
    session.types("exit 6\n");
    assert_eq!(session.ends(), 6);
}
