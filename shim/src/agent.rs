//! The calls to the agent in the guest, each with a deadline. Its answers are hostile: typed by the protocol, and every text of it escaped
//! and capped before anybody sees it.

use capsid_owner::escape::Line;
use capsid_protocol::agent::r#async::AgentClient;
use capsid_protocol::agent::{
    ContainerRequest, CreateContainerRequest, Empty, Event, ExecRequest, ProcessRequest,
    ResizeTtyRequest, SignalRequest, StartContainerRequest, StartSandboxRequest,
    StartSandboxResponse, StatsResponse, Stdio, UpdateRequest,
};
use capsid_protocol::exec_error::ExecError;
use std::collections::BTreeMap;
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use ttrpc::r#async::transport::Socket;
use ttrpc::context::{self, Context};

/// How long the agent may take to make, start or remove something, in ms; an emulated host is some twenty times slower than a real one, and
/// a guest that is gone is noticed by its VMM and not by this.
const WORK_TIMEOUT_MS: u64 = 120_000;
/// The largest exit status there is.
const EXIT_MAX: u32 = 255;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent refused.
    #[error("the guest cannot {call}: {text}")]
    Refused {
        /// Which call.
        call: &'static str,
        /// The ttrpc code.
        code: ttrpc::Code,
        /// What it says.
        text: String,
    },
    /// The program cannot be executed. The words are those that containerd's clients look for, which know runc's.
    #[error("exec: {program}: {}", words(*.kind, .program))]
    Exec {
        /// How.
        kind: ExecError,
        /// The program.
        program: String,
    },
    /// No answer.
    #[error("the guest did not answer when asked to {call}: {text}")]
    Lost {
        /// Which call.
        call: &'static str,
        /// What the transport says.
        text: String,
    },
}

fn words(kind: ExecError, program: &str) -> &'static str {
    match kind {
        ExecError::NotFound if program.contains('/') => "stat: no such file or directory",
        ExecError::NotFound => "executable file not found in $PATH",
        ExecError::NotExecutable => "permission denied",
    }
}

/// The end of a process, as the agent tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestExit {
    /// 0 to 255.
    pub status: u8,
    /// How many OOM kills its container had had.
    pub oom_kills: u64,
}

/// One process of a container.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// The container.
    pub container: &'a str,
    /// Empty: its init process.
    pub exec: &'a str,
}

/// The agent of one guest.
#[derive(Clone)]
pub struct Agent(AgentClient);

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Agent")
    }
}

type Answer<T> = Result<T, AgentError>;

impl Agent {
    /// The agent behind the stream that it has dialled.
    ///
    /// # Errors
    /// The stream cannot be used by the event loop.
    pub fn new(stream: UnixStream) -> std::io::Result<Agent> {
        stream.set_nonblocking(true)?;
        let stream = tokio::net::UnixStream::from_std(stream)?;
        let client = ttrpc::r#async::Client::new(Socket::new(stream));
        Ok(Agent(AgentClient::new(client)))
    }

    /// The first call: the host's time, the pod's name and kernel parameters go in, the guest's facts come out.
    pub async fn start_sandbox(
        &self,
        hostname: &str,
        sysctls: &BTreeMap<String, String>,
    ) -> Answer<StartSandboxResponse> {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        let request = StartSandboxRequest {
            hostname: hostname.to_owned(),
            sysctls: sysctls.clone().into_iter().collect(),
            // A host clock before 1970 or after 2554 leaves the guest's alone.
            realtime_ns: since_epoch
                .ok()
                .and_then(|time| u64::try_from(time.as_nanos()).ok())
                .unwrap_or(0),
            ..Default::default()
        };
        let answer = self.0.start_sandbox(work(), &request).await;
        answer.map_err(failed("start"))
    }

    /// Makes a container.
    pub async fn create(&self, request: CreateContainerRequest) -> Answer<()> {
        let answer = self.0.create_container(work(), &request).await;
        answer.map(drop).map_err(failed("create the container"))
    }

    /// Lets a container's init run its program.
    pub async fn start(&self, container: &str) -> Answer<()> {
        let request = StartContainerRequest {
            container_id: container.to_owned(),
            ..Default::default()
        };
        let answer = self.0.start_container(work(), &request).await;
        answer.map(drop).map_err(failed("start the container"))
    }

    /// Adds a process to a container.
    pub async fn exec(&self, of: Target<'_>, process_json: Vec<u8>, stdio: Stdio) -> Answer<()> {
        let request = ExecRequest {
            container_id: of.container.to_owned(),
            exec_id: of.exec.to_owned(),
            process_json,
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let answer = self.0.exec(work(), &request).await;
        answer.map(drop).map_err(failed("start the process"))
    }

    /// Waits for the end of a process, however long it runs. A status that is none is 255, never 0.
    pub async fn wait(&self, of: Target<'_>) -> Answer<GuestExit> {
        let answer = self.0.wait(context::with_timeout(0), &process(of)).await;
        let answer = answer.map_err(failed("wait for the process"))?;
        Ok(GuestExit {
            status: u8::try_from(answer.exit_status.min(EXIT_MAX)).unwrap_or(u8::MAX),
            oom_kills: answer.oom_kills,
        })
    }

    /// Sends a signal to one process or, with `all`, to every one of the container.
    pub async fn signal(&self, of: Target<'_>, signal: u32, all: bool) -> Answer<()> {
        let request = SignalRequest {
            container_id: of.container.to_owned(),
            exec_id: of.exec.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        let answer = self.0.signal(work(), &request).await;
        answer.map(drop).map_err(failed("send the signal"))
    }

    /// Freezes a container, or lets it go on.
    pub async fn freeze(&self, container: &str, frozen: bool) -> Answer<()> {
        let request = named(container);
        let answer = match frozen {
            true => self.0.pause(work(), &request).await,
            false => self.0.resume(work(), &request).await,
        };
        let call = if frozen { "pause" } else { "resume" };
        answer.map(drop).map_err(failed(call))
    }

    /// Sets limits of a container.
    pub async fn update(&self, container: &str, resources_json: Vec<u8>) -> Answer<()> {
        let request = UpdateRequest {
            container_id: container.to_owned(),
            resources_json,
            ..Default::default()
        };
        let answer = self.0.update(work(), &request).await;
        answer.map(drop).map_err(failed("set the limits"))
    }

    /// The figures of a container.
    pub async fn stats(&self, container: &str) -> Answer<StatsResponse> {
        let answer = self.0.stats(work(), &named(container)).await;
        answer.map_err(failed("read the figures"))
    }

    /// Sets the size of a terminal.
    pub async fn resize(&self, of: Target<'_>, columns: u32, rows: u32) -> Answer<()> {
        let request = ResizeTtyRequest {
            container_id: of.container.to_owned(),
            exec_id: of.exec.to_owned(),
            width_columns: columns,
            height_rows: rows,
            ..Default::default()
        };
        let answer = self.0.resize_tty(work(), &request).await;
        answer.map(drop).map_err(failed("resize the terminal"))
    }

    /// Forgets an exec, or removes a container that has ended.
    pub async fn delete(&self, of: Target<'_>) -> Answer<()> {
        let answer = self.0.delete(work(), &process(of)).await;
        answer.map(drop).map_err(failed("remove the container"))
    }

    /// The next event, however long it takes.
    pub async fn next_event(&self) -> Answer<Event> {
        let request = Empty::default();
        let answer = self.0.next_event(context::with_timeout(0), &request).await;
        answer.map_err(failed("tell its next event"))
    }
}

fn work() -> Context {
    context::with_duration(Duration::from_millis(WORK_TIMEOUT_MS))
}

fn named(container: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: container.to_owned(),
        ..Default::default()
    }
}

fn process(of: Target<'_>) -> ProcessRequest {
    ProcessRequest {
        container_id: of.container.to_owned(),
        exec_id: of.exec.to_owned(),
        ..Default::default()
    }
}

fn failed(call: &'static str) -> impl FnOnce(ttrpc::Error) -> AgentError {
    move |error| {
        let shown = |text: &str| Line(text.as_bytes()).to_string();
        let ttrpc::Error::RpcStatus(status) = error else {
            return AgentError::Lost {
                call,
                text: shown(&error.to_string()),
            };
        };
        if let Some((kind, program)) = ExecError::parse(&status.message) {
            let program = program.strip_suffix(" in PATH").unwrap_or(program);
            return AgentError::Exec {
                kind,
                program: shown(program),
            };
        }
        AgentError::Refused {
            call,
            code: status.code(),
            text: shown(&status.message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(message: &str) -> AgentError {
        let status = ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, message);
        failed("start the container")(ttrpc::Error::RpcStatus(status))
    }

    #[test]
    fn a_missing_program_is_told_in_the_words_that_clients_look_for() {
        for (program, words) in [
            (
                "\"nope\" in PATH",
                "exec: \"nope\": executable file not found in $PATH",
            ),
            (
                "\"/no/such\"",
                "exec: \"/no/such\": stat: no such file or directory",
            ),
        ] {
            let error = refusal(&format!("{}{program}", ExecError::NotFound.prefix()));
            assert_eq!(error.to_string(), words);
        }
    }

    #[test]
    fn an_agent_s_text_is_escaped_and_capped() {
        let text = refusal(&format!("\x1b[2J{}", "x".repeat(1 << 20))).to_string();
        assert!(!text.contains('\x1b') && text.len() < 2000);
    }

    #[tokio::test]
    async fn an_agent_that_hangs_up_is_lost() {
        let (ours, theirs) = UnixStream::pair().expect("sockets");
        let agent = Agent::new(ours).expect("a client");
        drop(theirs);
        let lost = agent.start("c1").await;
        assert!(matches!(lost, Err(AgentError::Lost { .. })), "{lost:?}");
    }
}
