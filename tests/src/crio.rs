//! CRI-O's side of a shim: it starts the binary by itself and calls it as CRI-O does for a `runtime_type = "vm"` (CRI-O,
//! internal/oci/runtime_vm.go; containerd 1.7, runtime/v2/shim/util.go), without containerd and without an address to tell events to.

use crate::bundle::{Scratch, privileged_spec, write};
use crate::command::{RUN_TIMEOUT_S, kill_those, works_in};
use containerd_shim_protos::api::{
    CreateTaskRequest, CreateTaskResponse, DeleteRequest, DeleteResponse, Empty,
    ExecProcessRequest, KillRequest, ShutdownRequest, StartRequest, StartResponse, StateRequest,
    StateResponse, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::ttrpc::{self, Client, Code};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};

/// The namespace of everything that CRI-O asks for.
const NAMESPACE: &str = "default";
/// The service that a CRI-O knows.
const SERVICE: &str = "containerd.task.v2.Task";
/// The highest version of an answer to `start` that it takes.
const BOOTSTRAP_VERSION_MAX: u64 = 2;

/// What became of a call: its answer, or the code of its refusal.
pub type Answer<A> = Result<A, Code>;

/// A container of CRI-O's, whose shim runs. What is left of both is killed when it is dropped.
pub struct Container {
    id: String,
    scratch: Scratch,
    address: String,
    client: Client,
}

/// The outputs of a process, read to their end.
pub struct Outputs {
    stdout: JoinHandle<Vec<u8>>,
    stderr: JoinHandle<Vec<u8>>,
}

impl Outputs {
    /// Both as text, once both have ended.
    ///
    /// # Panics
    /// One could not be read.
    pub fn text(self) -> (String, String) {
        let text = |thread: JoinHandle<Vec<u8>>| {
            let bytes = thread.join().expect("the fifo is read");
            String::from_utf8_lossy(&bytes).into_owned()
        };
        (text(self.stdout), text(self.stderr))
    }
}

/// What a container is in its pod.
#[derive(Clone, Copy, Debug)]
pub enum Role<'a> {
    /// The one that holds the pod's namespaces.
    Sandbox,
    /// Another, in the namespaces of a sandbox.
    Container {
        /// The sandbox's id.
        sandbox: &'a str,
        /// The pid of its task.
        pid: u32,
    },
}

impl Role<'_> {
    /// By which annotations, and with which namespaces, CRI-O says so of the container with this id.
    fn write(self, id: &str, spec: &mut Value) {
        let (kind, sandbox) = match self {
            Role::Sandbox => ("sandbox", id),
            Role::Container { sandbox, .. } => ("container", sandbox),
        };
        spec["annotations"] = json!({
            "io.kubernetes.cri-o.ContainerType": kind,
            "io.kubernetes.cri-o.SandboxID": sandbox,
        });
        let shared = [("network", "net"), ("ipc", "ipc"), ("uts", "uts")];
        let mut namespaces = vec![json!({"type": "mount"}), json!({"type": "pid"})];
        namespaces.extend(shared.map(|(kind, file)| match self {
            Role::Sandbox => json!({ "type": kind }),
            Role::Container { pid, .. } => {
                json!({ "type": kind, "path": format!("/proc/{pid}/ns/{file}") })
            }
        }));
        spec["linux"]["namespaces"] = namespaces.into();
    }
}

impl Container {
    /// Starts the shim for a container that runs `script`.
    ///
    /// # Panics
    /// The shim does not start, says something on standard error, or answers what CRI-O does not take.
    pub fn start(shim: &str, id: &str, role: Role<'_>, script: &str) -> Container {
        let scratch = Scratch::new(id);
        let bundle = scratch.path();
        let mut spec = privileged_spec(script);
        // CRI-O mounts images by itself, anywhere.
        spec["root"] = json!({ "path": bundle.join("rootfs") });
        role.write(id, &mut spec);
        write(bundle, &spec);
        fifo(&bundle.join("log"));
        follow_log(&bundle.join("log"));
        let address = start(shim, id, bundle);
        let client = Client::connect(&address).expect("the shim listens");
        Container {
            id: id.to_owned(),
            scratch,
            address,
            client,
        }
    }

    /// Where its shim listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Its bundle.
    pub fn bundle(&self) -> &Path {
        self.scratch.path()
    }

    /// Forgets the connection and makes another, as a CRI-O does that was restarted: by the file `address`.
    ///
    /// # Panics
    /// The file is not there, or nobody listens.
    pub fn found_again(&mut self) {
        let address = fs::read_to_string(self.bundle().join("address")).expect("the shim wrote it");
        self.client = Client::connect(address.trim()).expect("the shim listens");
    }

    /// Creates the task.
    ///
    /// # Errors
    /// The shim refused.
    pub fn create(&self) -> Answer<(u32, Outputs)> {
        let (stdout, stderr, outputs) = self.outputs("create");
        let answer: CreateTaskResponse = self.ask(
            "Create",
            &CreateTaskRequest {
                id: self.id.clone(),
                bundle: self.bundle().to_string_lossy().into_owned(),
                stdout,
                stderr,
                ..Default::default()
            },
        )?;
        Ok((answer.pid, outputs))
    }

    /// Starts the task or a process that was added to it.
    ///
    /// # Errors
    /// The shim refused.
    pub fn run(&self, exec_id: &str) -> Answer<u32> {
        let request = StartRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        let answer: StartResponse = self.ask("Start", &request)?;
        Ok(answer.pid)
    }

    /// Adds a process that is to run `script`.
    ///
    /// # Errors
    /// The shim refused.
    pub fn exec(&self, exec_id: &str, script: &str) -> Answer<Outputs> {
        let (stdout, stderr, outputs) = self.outputs(exec_id);
        let mut process = privileged_spec(script)["process"].take();
        process["cwd"] = json!("/");
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: process.to_string().into_bytes(),
            ..Default::default()
        };
        let _nothing: Empty = self.ask(
            "Exec",
            &ExecProcessRequest {
                id: self.id.clone(),
                exec_id: exec_id.to_owned(),
                stdout,
                stderr,
                spec: MessageField::some(spec),
                ..Default::default()
            },
        )?;
        Ok(outputs)
    }

    /// What the shim says of the task.
    ///
    /// # Errors
    /// The shim refused.
    pub fn state(&self) -> Answer<StateResponse> {
        let id = self.id.clone();
        self.ask(
            "State",
            &StateRequest {
                id,
                ..Default::default()
            },
        )
    }

    /// Sends a signal; 0 asks only whether there is somebody to send one to.
    ///
    /// # Errors
    /// The shim refused.
    pub fn kill(&self, exec_id: &str, signal: u32) -> Answer<()> {
        let request = KillRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            signal,
            ..Default::default()
        };
        let _nothing: Empty = self.ask("Kill", &request)?;
        Ok(())
    }

    /// Waits for the end of the task or of a process of it; its exit code.
    ///
    /// # Errors
    /// The shim refused.
    pub fn wait(&self, exec_id: &str) -> Answer<u32> {
        let request = WaitRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        let answer: WaitResponse = self.ask("Wait", &request)?;
        Ok(answer.exit_status)
    }

    /// Takes away the task or a process of it.
    ///
    /// # Errors
    /// The shim refused.
    pub fn delete(&self, exec_id: &str) -> Answer<DeleteResponse> {
        let request = DeleteRequest {
            id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        self.ask("Delete", &request)
    }

    /// Tells the shim that it may go.
    ///
    /// # Panics
    /// It refuses.
    pub fn shutdown(&self) {
        let request = ShutdownRequest {
            id: self.id.clone(),
            ..Default::default()
        };
        let answer: ttrpc::Result<Empty> = self.call("Shutdown", &request);
        match answer {
            Ok(_) => {}
            // It may go before it answers; CRI-O takes that for an answer.
            Err(ttrpc::Error::RpcStatus(status)) => panic!("Shutdown: {status:?}"),
            Err(_) => {}
        }
    }

    fn ask<A: Message>(&self, method: &str, request: &impl Message) -> Answer<A> {
        self.call(method, request).map_err(|error| match error {
            ttrpc::Error::RpcStatus(status) => {
                println!("{method}: {}", status.message());
                status.code()
            }
            other => panic!("{method}: {other}"),
        })
    }

    fn call<A: Message>(&self, method: &str, request: &impl Message) -> ttrpc::Result<A> {
        let limit = i64::try_from(RUN_TIMEOUT_S * 1_000_000_000).expect("some minutes");
        let context = ttrpc::context::with_timeout(limit);
        let mut answer = A::new();
        ttrpc::client_request!(self, context, request, SERVICE, method, answer);
        Ok(answer)
    }

    /// Two fifos of a process, which are read.
    fn outputs(&self, name: &str) -> (String, String, Outputs) {
        let [stdout, stderr] = ["stdout", "stderr"].map(|stream| {
            let path = self.bundle().join(format!("{name}-{stream}"));
            fifo(&path);
            path
        });
        let text = |path: &Path| path.to_string_lossy().into_owned();
        let names = (text(&stdout), text(&stderr));
        let outputs = Outputs {
            stdout: read(stdout),
            stderr: read(stderr),
        };
        (names.0, names.1, outputs)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        kill_those(|process| works_in(process, self.bundle()));
    }
}

/// Runs `start` and takes its answer as CRI-O does; where the shim listens.
fn start(shim: &str, id: &str, bundle: &Path) -> String {
    let output = Command::new(shim)
        .args(["-namespace", NAMESPACE, "-address", ""])
        .args(["-publish-binary", "/usr/bin/crio", "-id", id, "start"])
        .current_dir(bundle)
        .env("GOMAXPROCS", "2")
        .env("MAX_SHIM_VERSION", "2")
        .env("TTRPC_ADDRESS", "")
        .env("GRPC_ADDRESS", "")
        .env("NAMESPACE", NAMESPACE)
        .process_group(0)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| panic!("{shim}: {error}"));
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (said(&output.stdout), said(&output.stderr));
    assert!(output.status.success(), "start: {stdout}{stderr}");
    assert_eq!(stderr, "", "both outputs are its answer");
    address(stdout.trim())
}

/// As `parseStartResponse` of containerd 1.7: JSON of a version that it knows, or else an address.
fn address(answer: &str) -> String {
    let Ok(Value::Object(parameters)) = serde_json::from_str(answer) else {
        return answer.to_owned();
    };
    let version = parameters["version"].as_u64().expect("a version");
    assert!(version <= BOOTSTRAP_VERSION_MAX, "unsupported: {answer}");
    assert_eq!(parameters["protocol"], "ttrpc", "{answer}");
    parameters["address"]
        .as_str()
        .expect("an address")
        .to_owned()
}

fn fifo(path: &Path) {
    mkfifo(path, Mode::from_bits_truncate(0o700)).expect("a directory of ours");
}

/// Reads a fifo to its end, once somebody writes to it.
fn read(path: PathBuf) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let mut fifo = File::open(path).expect("a fifo of ours");
        fifo.read_to_end(&mut bytes).expect("a fifo");
        bytes
    })
}

/// Passes the shim's log on; it is for whoever looks at a test that failed.
fn follow_log(path: &Path) {
    let log = read(path.to_owned());
    thread::spawn(move || {
        let bytes = log.join().expect("a fifo of ours");
        println!("the shim's log:\n{}", String::from_utf8_lossy(&bytes));
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_an_address_or_json_of_version_2() {
        let json = r#"{"version":2,"address":"unix:///run/s","protocol":"ttrpc"}"#;
        for answer in ["unix:///run/s", json] {
            assert_eq!(address(answer), "unix:///run/s");
        }
    }

    #[test]
    #[should_panic(expected = "unsupported")]
    fn an_answer_of_version_3_is_not_taken() {
        address(r#"{"version":3,"address":"unix:///run/s","protocol":"ttrpc"}"#);
    }
}
