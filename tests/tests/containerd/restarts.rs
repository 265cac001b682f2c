//! containerd goes and comes back; containers do not notice, and it does not miss what they did.

use crate::tasks::UP;
use capsid_tests::command::eventually;
use capsid_tests::containerd::Daemon;
use capsid_tests::ledger::Ledger;
use nix::sys::signal::Signal;
use std::fs;

/// So many containers run while containerd is away.
const CONTAINERS: usize = 20;

pub(crate) fn containerd_restarted_with_running_containers(daemon: &mut Daemon) {
    away_and_back(daemon, Signal::SIGTERM);
}

pub(crate) fn containerd_killed_with_running_containers(daemon: &mut Daemon) {
    away_and_back(daemon, Signal::SIGKILL);
}

fn away_and_back(daemon: &mut Daemon, signal: Signal) {
    let ids: Vec<String> = (0..CONTAINERS).map(|number| format!("c{number}")).collect();
    for id in &ids {
        daemon.run(&["--detach"], id, UP).wait().exits(0);
    }
    let pids = |daemon: &Daemon| -> Vec<i32> {
        let pid = |id: &String| {
            let (pid, status) = daemon.status(id).expect("listed");
            assert_eq!(status, "RUNNING", "{id}");
            pid
        };
        ids.iter().map(pid).collect()
    };
    let before = pids(daemon);
    daemon.stop(signal);
    daemon.start_again();
    assert_eq!(pids(daemon), before);
    for (number, id) in ids.iter().enumerate() {
        let script = format!("echo in {id}; exit {number}");
        let ended = daemon.exec("again", id, &script).wait();
        let code = i32::try_from(number).expect("a few");
        assert_eq!(ended.exits(code).text(), format!("in {id}\n"));
        daemon.task(&["kill", "--signal", "SIGKILL"], id);
    }
    for id in &ids {
        daemon.reaches(id, "STOPPED");
        assert_eq!(daemon.delete(id), 137);
    }
}

/// What becomes of it is containerd's choice: it may keep the task, whose code is then the container's own, or take it away when
/// it loads (containerd, core/runtime/v2/shim_load.go, "cleaning leaked shim process"). It never stays as one that runs.
pub(crate) fn an_exit_while_containerd_is_down_is_seen_later(daemon: &mut Daemon) {
    // The first makes what stays.
    daemon.run(&["--rm"], "first", "true").wait().exits(0);
    let before = Ledger::now();
    let shared = daemon.file("shared");
    fs::create_dir(&shared).expect("a directory of ours");
    let mount = format!("type=bind,src={shared},dst=/shared,options=rbind:rw");
    let script = "until test -e /shared/go; do sleep 0.1; done; touch /shared/gone; exit 9";
    daemon
        .run(&["--detach", "--null-io", "--mount", &mount], "one", script)
        .wait()
        .exits(0);
    daemon.stop(Signal::SIGTERM);
    fs::write(format!("{shared}/go"), "").expect("a directory of ours");
    eventually("the container ends", || {
        fs::metadata(format!("{shared}/gone")).is_ok()
    });
    daemon.start_again();
    eventually("its end is seen", || {
        daemon
            .status("one")
            .is_none_or(|(_, status)| status == "STOPPED")
    });
    if daemon.status("one").is_some() {
        assert_eq!(daemon.delete("one"), 9);
    }
    daemon.ctr(["containers", "delete", "one"]).wait().exits(0);
    before.balances();
}
