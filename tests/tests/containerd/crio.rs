//! The calls that CRI-O makes, which uses a shim without containerd.

use capsid_tests::command::eventually;
use capsid_tests::containerd::Runtime;
use capsid_tests::crio::{Container, annotations};
use capsid_tests::ledger::Ledger;
use containerd_shim_protos::api::Status;
use containerd_shim_protos::ttrpc::Code;

/// The signal that is none, and the one that nobody survives.
const PROBE: u32 = 0;
const KILL: u32 = 9;
/// The exit code of whom the latter ended.
const KILLED: u32 = 137;

const UP: &str = "echo up; exec sleep 100000";

#[track_caller]
fn is(container: &Container, status: Status) {
    let state = container.state().expect("it is there");
    assert_eq!(state.status(), status, "{state:?}");
}

/// Everything that CRI-O does with a container that stands alone.
pub(crate) fn a_container_of_crio_lives_and_dies(runtime: Runtime) {
    // The first makes what stays.
    life(runtime.shim(), "first");
    let before = Ledger::now();
    life(runtime.shim(), "second");
    before.balances();
}

fn life(shim: &str, id: &str) {
    let sandbox = annotations("sandbox", id);
    let container = Container::start(shim, id, sandbox, UP);
    assert_eq!(container.state().err(), Some(Code::NOT_FOUND));
    let (pid, outputs) = container.create().expect("created");
    is(&container, Status::CREATED);
    assert_eq!(container.run("").expect("started"), pid);
    is(&container, Status::RUNNING);
    assert_eq!(container.kill("", PROBE), Ok(()));

    let exec = container.exec("exec", "echo out; echo err >&2; exit 5");
    let exec = exec.expect("added");
    container.run("exec").expect("started");
    assert_eq!(container.wait("exec"), Ok(5));
    let deleted = container.delete("exec").expect("deleted");
    assert_eq!(deleted.exit_status, 5);
    assert_eq!(exec.text(), ("out\n".to_owned(), "err\n".to_owned()));

    assert_eq!(container.kill("", KILL), Ok(()));
    assert_eq!(container.wait(""), Ok(KILLED));
    is(&container, Status::STOPPED);
    assert_eq!(container.kill("", PROBE), Err(Code::NOT_FOUND));
    let deleted = container.delete("").expect("deleted");
    assert_eq!((deleted.pid, deleted.exit_status), (pid, KILLED));
    assert_eq!(outputs.text(), ("up\n".to_owned(), String::new()));
    gone(&container);
}

/// A shim that was told to go does, with its socket.
fn gone(container: &Container) {
    container.shutdown();
    let socket = container.address().trim_start_matches("unix://").to_owned();
    eventually("the socket goes", || {
        std::fs::symlink_metadata(&socket).is_err()
    });
}

/// A CRI-O that was restarted reads where the shim listens, and waits for the end that it has not seen.
pub(crate) fn a_restarted_crio_finds_its_container(runtime: Runtime) {
    let sandbox = annotations("sandbox", "one");
    let mut container = Container::start(runtime.shim(), "one", sandbox, UP);
    let (pid, _outputs) = container.create().expect("created");
    container.run("").expect("started");
    container.found_again();
    let state = container.state().expect("it is there");
    assert_eq!((state.pid, state.status()), (pid, Status::RUNNING));
    assert_eq!(container.kill("", KILL), Ok(()));
    assert_eq!(container.wait(""), Ok(KILLED));
    container.delete("").expect("deleted");
    gone(&container);
}
