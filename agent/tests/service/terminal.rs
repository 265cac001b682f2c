//! Terminals: size, resizing, keys, hang-up.

use crate::guest::{Guest, context, process_request, refusal};
use capsid_protocol::agent::{
    CreateContainerRequest, ExecRequest, ResizeTtyRequest, StartContainerRequest, Stdio,
};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use ttrpc::Code;

/// Reads until `mark` was seen; what came so far.
fn read_until(stream: &mut UnixStream, mark: &str) -> String {
    let mut seen = Vec::new();
    let mut byte = [0];
    while !String::from_utf8_lossy(&seen).contains(mark) {
        match stream.read(&mut byte) {
            Ok(1..) => seen.push(byte[0]),
            end => panic!(
                "{end:?} before {mark:?}, after {:?}",
                String::from_utf8_lossy(&seen)
            ),
        }
    }
    String::from_utf8_lossy(&seen).into_owned()
}

fn on_a_terminal(mut spec: Value) -> Value {
    spec["process"]["terminal"] = true.into();
    spec["process"]["consoleSize"] = json!({"width": 100, "height": 40});
    spec
}

fn create(guest: &Guest, id: &str, spec: &Value) -> UnixStream {
    let (stdin, terminal) = guest.dial();
    let request = CreateContainerRequest {
        container_id: id.into(),
        spec_json: spec.to_string().into_bytes(),
        stdio: Some(Stdio {
            stdin,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    let client = guest.client();
    client
        .create_container(context(), &request)
        .expect("created");
    let request = StartContainerRequest {
        container_id: id.into(),
        ..Default::default()
    };
    client
        .start_container(context(), &request)
        .expect("started");
    terminal
}

fn resize(guest: &Guest, id: &str, columns: u32, rows: u32) -> ttrpc::Result<()> {
    let request = ResizeTtyRequest {
        container_id: id.into(),
        width_columns: columns,
        height_rows: rows,
        ..Default::default()
    };
    guest.client().resize_tty(context(), &request).map(|_| ())
}

#[test]
fn a_terminal_has_its_size_and_takes_another() {
    let guest = Guest::start();
    let line = "stty size; tty; read x; stty size";
    let spec = on_a_terminal(guest.spec(&["sh", "-c", line]));
    let mut terminal = create(&guest, "c1", &spec);
    let seen = read_until(&mut terminal, "/dev/pts/0\r\n");
    assert!(seen.starts_with("40 100\r\n"), "{seen}");
    resize(&guest, "c1", 80, 24).expect("resized");
    terminal.write_all(b"x\n").expect("typed");
    read_until(&mut terminal, "24 80\r\n");
    assert_eq!(guest.wait("c1", "").expect("ended"), 0);
    let mut rest = String::new();
    terminal.read_to_string(&mut rest).expect("end of file");
    guest.delete("c1", "").expect("deleted");
}

#[test]
fn ctrl_c_interrupts() {
    let guest = Guest::start();
    let line = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.05; done";
    let spec = on_a_terminal(guest.spec(&["sh", "-c", line]));
    let mut terminal = create(&guest, "c1", &spec);
    read_until(&mut terminal, "ready\r\n");
    terminal.write_all(&[3]).expect("typed");
    read_until(&mut terminal, "caught\r\n");
    assert_eq!(guest.wait("c1", "").expect("ended"), 9);
    guest.delete("c1", "").expect("deleted");
}

#[test]
fn a_host_that_hangs_up_hangs_up_the_terminal() {
    let guest = Guest::start();
    let line = "trap 'exit 4' HUP; echo ready; while :; do sleep 0.05; done";
    let spec = on_a_terminal(guest.spec(&["sh", "-c", line]));
    let mut terminal = create(&guest, "c1", &spec);
    read_until(&mut terminal, "ready\r\n");
    drop(terminal);
    assert_eq!(guest.wait("c1", "").expect("ended"), 4);
    guest.delete("c1", "").expect("deleted");
}

#[test]
fn a_user_owns_its_terminal() {
    let guest = Guest::start();
    let mut spec = guest.spec(&["sh", "-c", "echo again >/dev/pts/0; echo and >/dev/tty"]);
    spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let mut terminal = create(&guest, "c1", &on_a_terminal(spec));
    read_until(&mut terminal, "again\r\nand\r\n");
    assert_eq!(guest.wait("c1", "").expect("ended"), 0);
    guest.delete("c1", "").expect("deleted");
}

#[test]
fn an_exec_can_have_a_terminal() {
    let guest = Guest::start();
    let running = guest.sleeper("c1");
    let (stdin, mut terminal) = guest.dial();
    let spec = on_a_terminal(guest.spec(&["sh", "-c", "stty size; tty; exit 6"]));
    let request = ExecRequest {
        container_id: "c1".into(),
        exec_id: "e1".into(),
        process_json: spec["process"].to_string().into_bytes(),
        stdio: Some(Stdio {
            stdin,
            ..Default::default()
        })
        .into(),
        ..Default::default()
    };
    guest.client().exec(context(), &request).expect("started");
    let mut seen = String::new();
    terminal.read_to_string(&mut seen).expect("end of file");
    assert_eq!(seen, "40 100\r\n/dev/pts/0\r\n");
    assert_eq!(guest.wait("c1", "e1").expect("ended"), 6);
    guest.end(running);
}

#[test]
fn a_process_without_terminal_cannot_be_resized() {
    let guest = Guest::start();
    let running = guest.sleeper("c1");
    assert_eq!(
        refusal(resize(&guest, "c1", 80, 24)).0,
        Code::FAILED_PRECONDITION
    );
    assert_eq!(
        refusal(resize(&guest, "c1", 0, 24)).0,
        Code::INVALID_ARGUMENT
    );
    let request = process_request("c1", "");
    guest
        .client()
        .close_stdin(context(), &request)
        .expect("no matter");
    guest.end(running);
}
