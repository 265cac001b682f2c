//! After a container the host is as it was, and so is containerd.

use crate::tasks::UP;
use capsid_tests::containerd::Daemon;

pub(crate) fn delete_leaves_nothing(daemon: &Daemon) {
    // The first makes what stays: directories, cgroups of a namespace, connections.
    round(daemon);
    let (host, objects) = (daemon.ledger(), daemon.objects());
    for _ in 0..3 {
        round(daemon);
    }
    host.balances();
    assert_eq!(daemon.objects(), objects);
}

/// A container of each kind of end.
fn round(daemon: &Daemon) {
    daemon.run(&["--rm"], "one", "exit 7").wait().exits(7);
    let mut running = daemon.run(&["--rm"], "two", UP).start();
    running.until("up\n");
    daemon.exec("first", "two", "exit 3").wait().exits(3);
    daemon.task(&["kill", "--signal", "SIGKILL"], "two");
    running.wait().exits(137);
    // Its command cannot be started, and what was made for it is taken back.
    let words = ["run", "--rm", "--runtime", daemon.runtime().name()];
    let ended = daemon
        .ctr(words)
        .args([capsid_tests::containerd::IMAGE, "three", "/no/such/program"])
        .wait();
    assert_ne!(ended.code, 0, "{}", ended.stderr);
    assert!(
        ended.stderr.contains("/no/such/program"),
        "{}",
        ended.stderr
    );
}
