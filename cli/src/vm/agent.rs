//! The calls to the agent in the guest, each with a deadline. Its answers are hostile: typed by the protocol, and every
//! text of it escaped and capped before it is shown.

use crate::escape::Line;
use capsid_protocol::agent::{
    AgentClient, CreateContainerRequest, Empty, ProcessRequest, ResizeTtyRequest, SignalRequest,
    StartContainerRequest, StartSandboxRequest, StartSandboxResponse, Stdio,
};
use capsid_protocol::exec_error::ExecError;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use ttrpc::context::{self, Context};

/// How long the agent may take to make or start a container, in ms; an emulated host is some twenty times slower
/// than a real one, and a guest that is gone is noticed by its VMM and not by this.
const START_TIMEOUT_MS: u64 = 300_000;
/// How long it may take over a signal, a new size or the way to its power-off, in ms.
const CONTROL_TIMEOUT_MS: u64 = 60_000;
/// The largest exit status there is.
const EXIT_MAX: u32 = 255;

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    /// The agent refused.
    #[error("the guest cannot {call}: {text}")]
    Refused {
        /// Which call.
        call: &'static str,
        /// What it says.
        text: String,
    },
    /// The command cannot be executed.
    #[error("{text}")]
    Exec {
        /// How.
        kind: ExecError,
        /// The command and what is wrong with it.
        text: String,
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

/// The agent of one guest.
#[derive(Clone)]
pub(crate) struct Agent(AgentClient);

impl Agent {
    /// An agent behind the stream that it has dialled.
    ///
    /// # Errors
    /// The client could not be set up.
    pub(crate) fn new(stream: OwnedFd) -> Result<Agent, AgentError> {
        // The client closes the fd when its last clone is dropped.
        let client = ttrpc::Client::new(stream.into_raw_fd());
        let client = client.map_err(|error| failed("serve", error))?;
        Ok(Agent(AgentClient::new(client)))
    }

    /// The first call: the host's time and name go in, the guest's facts come out.
    pub(crate) fn start_sandbox(&self, hostname: &str) -> Result<StartSandboxResponse, AgentError> {
        let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
        let request = StartSandboxRequest {
            hostname: hostname.to_owned(),
            // A host clock before 1970 or after 2554 leaves the guest's alone.
            realtime_ns: since_epoch
                .ok()
                .and_then(|time| u64::try_from(time.as_nanos()).ok())
                .unwrap_or(0),
            ..Default::default()
        };
        let answer = self.0.start_sandbox(timeout(START_TIMEOUT_MS), &request);
        answer.map_err(|error| failed("start", error))
    }

    pub(crate) fn create(
        &self,
        container_id: &str,
        spec_json: Vec<u8>,
        stdio: Stdio,
    ) -> Result<(), AgentError> {
        let request = CreateContainerRequest {
            container_id: container_id.to_owned(),
            spec_json,
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        let answer = self.0.create_container(timeout(START_TIMEOUT_MS), &request);
        answer
            .map(drop)
            .map_err(|error| failed("create the container", error))
    }

    pub(crate) fn start(&self, container_id: &str) -> Result<(), AgentError> {
        let request = StartContainerRequest {
            container_id: container_id.to_owned(),
            ..Default::default()
        };
        let answer = self.0.start_container(timeout(START_TIMEOUT_MS), &request);
        answer
            .map(drop)
            .map_err(|error| failed("start the container", error))
    }

    /// Waits for the end of the container's process, however long it runs. A status that is none is 255, never 0.
    pub(crate) fn wait(&self, container_id: &str) -> Result<u8, AgentError> {
        let request = ProcessRequest {
            container_id: container_id.to_owned(),
            ..Default::default()
        };
        let answer = self.0.wait(context::with_timeout(0), &request);
        let answer = answer.map_err(|error| failed("wait for the container", error))?;
        Ok(u8::try_from(answer.exit_status.min(EXIT_MAX)).unwrap_or(u8::MAX))
    }

    pub(crate) fn signal(&self, container_id: &str, signal: i32) -> Result<(), AgentError> {
        let request = SignalRequest {
            container_id: container_id.to_owned(),
            signal: u32::try_from(signal).unwrap_or_default(),
            ..Default::default()
        };
        let answer = self.0.signal(timeout(CONTROL_TIMEOUT_MS), &request);
        answer
            .map(drop)
            .map_err(|error| failed("pass a signal on", error))
    }

    pub(crate) fn resize(&self, container_id: &str, size: (u16, u16)) -> Result<(), AgentError> {
        let request = ResizeTtyRequest {
            container_id: container_id.to_owned(),
            width_columns: size.0.into(),
            height_rows: size.1.into(),
            ..Default::default()
        };
        let answer = self.0.resize_tty(timeout(CONTROL_TIMEOUT_MS), &request);
        answer
            .map(drop)
            .map_err(|error| failed("resize the terminal", error))
    }

    /// Syncs, unmounts and powers off.
    pub(crate) fn power_off(&self) -> Result<(), AgentError> {
        let answer = self
            .0
            .power_off(timeout(CONTROL_TIMEOUT_MS), &Empty::default());
        answer.map(drop).map_err(|error| failed("power off", error))
    }
}

fn timeout(milliseconds: u64) -> Context {
    context::with_duration(Duration::from_millis(milliseconds))
}

fn failed(call: &'static str, error: ttrpc::Error) -> AgentError {
    let ttrpc::Error::RpcStatus(status) = error else {
        return AgentError::Lost {
            call,
            text: Line(error.to_string().as_bytes()).to_string(),
        };
    };
    let text = |text: &str| Line(text.as_bytes()).to_string();
    match ExecError::parse(&status.message) {
        Some((kind, _)) => AgentError::Exec {
            kind,
            text: text(&status.message),
        },
        None => AgentError::Refused {
            call,
            text: text(&status.message),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(message: &str) -> AgentError {
        failed(
            "start the container",
            ttrpc::Error::RpcStatus(ttrpc::get_status(ttrpc::Code::INVALID_ARGUMENT, message)),
        )
    }

    #[test]
    fn a_missing_command_is_told_from_every_other_refusal() {
        let error = refusal(&format!("{}nope", ExecError::NotFound.prefix()));
        let AgentError::Exec { kind, text } = error else {
            panic!("an exec error, got {error:?}");
        };
        assert_eq!(kind.exit_code(), 127);
        assert!(text.contains("nope"));
        assert!(matches!(
            refusal("process.cwd: relative"),
            AgentError::Refused { .. }
        ));
    }

    #[test]
    fn an_agent_s_text_is_escaped_and_capped() {
        let text = refusal(&format!("\x1b[2J{}", "x".repeat(1 << 20))).to_string();
        assert!(!text.contains('\x1b') && text.len() < 2000);
    }

    #[test]
    fn an_agent_that_hangs_up_is_lost() {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().expect("sockets");
        let agent = Agent::new(ours.into()).expect("a client");
        drop(theirs);
        assert!(matches!(agent.start("c1"), Err(AgentError::Lost { .. })));
    }
}
