//! What is refused, by which code, and that nothing is left of it.

use crate::guest::{Guest, container_request, context, lines, refusal};
use capsid_protocol::exec_error::ExecError;
use serde_json::json;
use ttrpc::Code;

fn exec_error(text: &str) -> ExecError {
    ExecError::parse(text)
        .unwrap_or_else(|| panic!("no exec error: {text}"))
        .0
}

#[test]
fn a_program_that_is_not_there_is_told_apart() {
    let guest = Guest::start();
    let (code, text) = refusal(guest.create("c1", &guest.spec(&["no-such-program"])));
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert_eq!(exec_error(&text), ExecError::NotFound);
    let (_, text) = refusal(guest.create("c1", &guest.spec(&["/no/such/program"])));
    assert_eq!(exec_error(&text), ExecError::NotFound);
    guest.to_end("c1", &guest.spec(&["true"]));
}

#[test]
fn a_program_that_may_not_be_executed_is_told_apart() {
    let guest = Guest::start();
    for program in ["/etc", "/etc/not-a-program"] {
        let (code, text) = refusal(guest.create("c1", &guest.spec(&[program])));
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert_eq!(exec_error(&text), ExecError::NotExecutable, "{program}");
    }
}

#[test]
fn a_program_that_the_kernel_refuses_fails_its_start() {
    let guest = Guest::start();
    use std::os::unix::fs::PermissionsExt;
    for (name, text, expected) in [
        ("script", "#!/no/interpreter\n", ExecError::NotFound),
        ("garbage", "\u{1}\u{2}\u{3}", ExecError::NotExecutable),
    ] {
        let path = guest.directory.join("rootfs/bin").join(name);
        std::fs::write(&path, text).expect("written");
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).expect("set");
        guest.create(name, &guest.spec(&[name])).expect("created");
        let (code, text) = refusal(guest.start_container(name));
        assert_eq!(code, Code::INVALID_ARGUMENT);
        assert_eq!(exec_error(&text), expected, "{name}");
        guest.wait(name, "").expect("ended");
        guest.delete(name, "").expect("deleted");
    }
}

#[test]
fn an_exec_of_nothing_is_told_apart() {
    let guest = Guest::start();
    let running = guest.sleeper("c1");
    let mut process = guest.process("");
    process["args"] = json!(["no-such-program"]);
    let (code, text) = refusal(guest.exec("c1", "e1", &process));
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert_eq!(exec_error(&text), ExecError::NotFound);
    process["args"] = json!(["/etc"]);
    let (_, text) = refusal(guest.exec("c1", "e1", &process));
    assert_eq!(exec_error(&text), ExecError::NotExecutable);
    guest.end(running);
}

#[test]
fn refused_calls_keep_no_streams() {
    let guest = Guest::start();
    // With three streams each, more than the agent keeps for calls to come.
    for _ in 0..30 {
        let refused = guest.create("no/id", &guest.spec(&["true"]));
        assert_eq!(refusal(refused).0, Code::INVALID_ARGUMENT);
    }
    let running = guest.sleeper("c1");
    for _ in 0..30 {
        let refused = guest.exec("c1", "no/id", &guest.process("true"));
        assert_eq!(refusal(refused).0, Code::INVALID_ARGUMENT);
    }
    let exec = guest.exec("c1", "e1", &guest.process("true"));
    exec.expect("started").finish(&guest);
    guest.end(running);
}

#[test]
fn unknown_ids_are_not_found() {
    let guest = Guest::start();
    assert_eq!(refusal(guest.wait("nobody", "")).0, Code::NOT_FOUND);
    assert_eq!(refusal(guest.delete("nobody", "")).0, Code::NOT_FOUND);
    assert_eq!(
        refusal(guest.kill("nobody", "", 9, false)).0,
        Code::NOT_FOUND
    );
    assert_eq!(refusal(guest.start_container("nobody")).0, Code::NOT_FOUND);
    let request = container_request("nobody");
    let client = guest.client();
    assert_eq!(refusal(client.pids(context(), &request)).0, Code::NOT_FOUND);
    assert_eq!(
        refusal(client.stats(context(), &request)).0,
        Code::NOT_FOUND
    );
    assert_eq!(
        refusal(client.pause(context(), &request)).0,
        Code::NOT_FOUND
    );
}

#[test]
fn a_taken_id_exists_already() {
    let guest = Guest::start();
    let running = guest.sleeper("c1");
    let again = guest.create("c1", &guest.spec(&["true"]));
    assert_eq!(refusal(again).0, Code::ALREADY_EXISTS);
    let exec = guest
        .exec("c1", "e1", &guest.process("true"))
        .expect("started");
    exec.finish(&guest);
    let again = guest.exec("c1", "e1", &guest.process("true"));
    assert_eq!(refusal(again).0, Code::ALREADY_EXISTS);
    guest.end(running);
}

#[test]
fn verbs_out_of_order_are_failed_preconditions() {
    let guest = Guest::start();
    let created = guest.create("c1", &guest.spec(&["true"])).expect("created");
    let early = guest.exec("c1", "e1", &guest.process("true"));
    assert_eq!(refusal(early).0, Code::FAILED_PRECONDITION);
    guest.start_container("c1").expect("started");
    assert_eq!(created.finish(&guest).status, 0);
    let again = guest.start_container("c1");
    assert_eq!(refusal(again).0, Code::FAILED_PRECONDITION);
    assert_eq!(refusal(guest.kill("c1", "", 15, false)).0, Code::NOT_FOUND);
    guest.delete("c1", "").expect("deleted");
    let running = guest.sleeper("c1");
    assert_eq!(refusal(guest.delete("c1", "")).0, Code::FAILED_PRECONDITION);
    guest.end(running);
}

#[test]
fn a_bad_spec_is_an_invalid_argument_naming_its_field() {
    let guest = Guest::start();
    let mut spec = guest.spec(&["true"]);
    spec["process"]["cwd"] = "relative".into();
    let (code, text) = refusal(guest.create("c1", &spec));
    assert_eq!(code, Code::INVALID_ARGUMENT);
    assert_eq!(text, "process.cwd: must be absolute");
    let (code, _) = refusal(guest.create("../c1", &guest.spec(&["true"])));
    assert_eq!(code, Code::INVALID_ARGUMENT);
}

#[test]
fn a_failed_create_leaves_nothing() {
    let guest = Guest::start();
    let mut spec = guest.spec(&["true"]);
    spec["mounts"][0]["type"] = "no-such-file-system".into();
    let (code, _) = refusal(guest.create("c1", &spec));
    assert_eq!(code, Code::INTERNAL);
    nothing_is_left(&guest);
}

#[test]
fn a_created_container_can_be_deleted_and_leaves_nothing() {
    let guest = Guest::start();
    guest.create("c1", &guest.spec(&["true"])).expect("created");
    assert_eq!(guest.delete("c1", "").expect("deleted"), 137);
    guest.shell("c2", "exit 0");
    nothing_is_left(&guest);
}

fn nothing_is_left(guest: &Guest) {
    assert!(!std::path::Path::new("/sys/fs/cgroup/capsid/c1").exists());
    for directory in ["run/bundles", "run/state"] {
        let mut entries = std::fs::read_dir(guest.directory.join(directory)).expect("there");
        assert!(entries.next().is_none(), "{directory} is not empty");
    }
    let ours = guest.directory.display().to_string();
    let mounts = lines(format!("/proc/{}/mountinfo", guest.agent.id()));
    assert!(!mounts.iter().any(|mount| mount.contains(&ours)));
    // Descriptors: the std three, the event loop's, the signal pipe, the doors; no container's.
    let descriptors = std::fs::read_dir(format!("/proc/{}/fd", guest.agent.id())).expect("there");
    assert!(descriptors.count() < 16);
}
