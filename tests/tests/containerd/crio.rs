//! The calls that CRI-O makes, which uses a shim without containerd.

use capsid_tests::command::eventually;
use capsid_tests::containerd::Runtime;
use capsid_tests::crio::{Container, Outputs, Role};
use capsid_tests::ledger::Ledger;
use containerd_shim_protos::api::{DeleteResponse, Status};
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

/// Everything that CRI-O does with a pod of one container.
pub(crate) fn a_pod_of_crio_lives_and_dies(runtime: Runtime) {
    // The first makes what stays.
    life(runtime, "first");
    let before = Ledger::now();
    life(runtime, "second");
    before.balances();
}

fn life(runtime: Runtime, name: &str) {
    let shim = runtime.shim();
    let (sandbox, pid, _outputs) = sandbox(shim, name);
    let id = format!("{name}-container");
    let role = Role::Container { sandbox: name, pid };
    let container = Container::start(shim, &id, role, UP);
    if runtime == Runtime::Capsid {
        assert_eq!(container.address(), sandbox.address(), "a pod has one shim");
    }
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

    let deleted = killed_and_deleted(&container);
    assert_eq!((deleted.pid, deleted.exit_status), (pid, KILLED));
    assert_eq!(outputs.text(), ("up\n".to_owned(), String::new()));
    container.shutdown();
    // The sandbox goes on without it.
    is(&sandbox, Status::RUNNING);
    killed_and_deleted(&sandbox);
    gone(&sandbox);
}

/// A sandbox that runs, and the pid of its task.
fn sandbox(shim: &str, id: &str) -> (Container, u32, Outputs) {
    let sandbox = Container::start(shim, id, Role::Sandbox, UP);
    let (pid, outputs) = sandbox.create().expect("created");
    sandbox.run("").expect("started");
    (sandbox, pid, outputs)
}

fn killed_and_deleted(container: &Container) -> DeleteResponse {
    assert_eq!(container.kill("", KILL), Ok(()));
    assert_eq!(container.wait(""), Ok(KILLED));
    is(container, Status::STOPPED);
    assert_eq!(container.kill("", PROBE), Err(Code::NOT_FOUND));
    container.delete("").expect("deleted")
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
    let (mut sandbox, pid, _outputs) = sandbox(runtime.shim(), "one");
    sandbox.found_again();
    let state = sandbox.state().expect("it is there");
    assert_eq!((state.pid, state.status()), (pid, Status::RUNNING));
    killed_and_deleted(&sandbox);
    gone(&sandbox);
}
