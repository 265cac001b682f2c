//! The Task service (containerd `api/runtime/task/v3`, equal on the wire to v2): requests in containerd's words to verbs of the pod, refusals to
//! codes. What a request says is containerd's and trusted to be meant; its sizes and ids are checked where they are used.

use crate::error::{TaskError, refuse, shown};
use crate::pod::{Creation, Pod, Status, timestamp, whole};
use crate::process::{Exit, Streams};
use crate::state::State;
use crate::stats;
use async_trait::async_trait;
use containerd_shim_protos::api;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::types::task::{ProcessInfo, Status as ApiStatus};
use protobuf::EnumOrUnknown;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::empty::Empty;
use std::path::PathBuf;
use std::sync::Arc;
use ttrpc::Code;
use ttrpc::r#async::TtrpcContext;

/// Longest JSON of an exec's process or of new limits, in bytes; ttrpc carries at most 4 MiB.
const JSON_MAX_BYTES: usize = 2 << 20;

/// The service of one shim.
#[derive(Clone, Debug)]
pub struct Service {
    pod: Arc<Pod>,
}

impl Service {
    /// Serves `pod`.
    pub fn new(pod: Arc<Pod>) -> Service {
        Service { pod }
    }
}

type Answer<T> = ttrpc::Result<T>;

fn code(state: State) -> EnumOrUnknown<ApiStatus> {
    EnumOrUnknown::new(match state {
        State::Created | State::Starting => ApiStatus::CREATED,
        State::Running => ApiStatus::RUNNING,
        State::Paused => ApiStatus::PAUSED,
        State::Stopped | State::Deleting => ApiStatus::STOPPED,
    })
}

/// The JSON in an Any, whatever its type is called: containerd has had several names for the same.
fn json(any: Option<&Any>, what: &str) -> Result<Vec<u8>, TaskError> {
    match any {
        Some(any) if any.value.len() <= JSON_MAX_BYTES => Ok(any.value.clone()),
        Some(any) => Err(refuse(
            Code::INVALID_ARGUMENT,
            format!(
                "{what} is {} bytes long, at most {JSON_MAX_BYTES} are taken",
                any.value.len()
            ),
        )),
        None => Err(refuse(Code::INVALID_ARGUMENT, format!("{what} is missing"))),
    }
}

fn state_response(id: &str, exec_id: &str, status: Status) -> api::StateResponse {
    let mut response = api::StateResponse {
        id: id.to_owned(),
        bundle: status.bundle.display().to_string(),
        pid: status.pid,
        status: code(status.state),
        stdin: status.streams.stdin,
        stdout: status.streams.stdout,
        stderr: status.streams.stderr,
        terminal: status.streams.terminal,
        exec_id: exec_id.to_owned(),
        ..Default::default()
    };
    if let Some(exit) = status.exit {
        response.exit_status = exit.status.into();
        response.exited_at = Some(timestamp(exit.at)).into();
    }
    response
}

fn wait_response(exit: Exit) -> api::WaitResponse {
    api::WaitResponse {
        exit_status: exit.status.into(),
        exited_at: Some(timestamp(exit.at)).into(),
        ..Default::default()
    }
}

#[async_trait]
impl Task for Service {
    async fn state(&self, _: &TtrpcContext, r: api::StateRequest) -> Answer<api::StateResponse> {
        let status = self.pod.status(&r.id, &r.exec_id)?;
        Ok(state_response(&r.id, &r.exec_id, status))
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        r: api::CreateTaskRequest,
    ) -> Answer<api::CreateTaskResponse> {
        if !r.checkpoint.is_empty() {
            let text =
                "a container cannot be restored from a checkpoint: Capsid has no snapshots yet";
            return Err(refuse(Code::UNIMPLEMENTED, text).into());
        }
        let creation = Creation {
            id: r.id,
            bundle: PathBuf::from(r.bundle),
            rootfs: r.rootfs,
            streams: Streams {
                stdin: r.stdin,
                stdout: r.stdout,
                stderr: r.stderr,
                terminal: r.terminal,
            },
        };
        let pod = Arc::clone(&self.pod);
        let pid = whole(async move { pod.create(creation).await }).await?;
        Ok(api::CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, r: api::StartRequest) -> Answer<api::StartResponse> {
        let pod = Arc::clone(&self.pod);
        let pid = whole(async move {
            match r.exec_id.as_str() {
                "" => pod.start(&r.id).await,
                exec_id => pod.start_exec(&r.id, exec_id).await,
            }
        });
        Ok(api::StartResponse {
            pid: pid.await?,
            ..Default::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, r: api::DeleteRequest) -> Answer<api::DeleteResponse> {
        let pod = Arc::clone(&self.pod);
        let deleted = whole(async move { pod.delete(&r.id, &r.exec_id).await }).await?;
        Ok(api::DeleteResponse {
            pid: deleted.pid,
            exit_status: deleted.exit.status.into(),
            exited_at: Some(timestamp(deleted.exit.at)).into(),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, r: api::PidsRequest) -> Answer<api::PidsResponse> {
        // The pids of a guest mean nothing on the host: a task has one process here, which stands for all of them.
        let status = self.pod.status(&r.id, "")?;
        Ok(api::PidsResponse {
            processes: vec![ProcessInfo {
                pid: status.pid,
                ..Default::default()
            }],
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, r: api::PauseRequest) -> Answer<Empty> {
        let pod = Arc::clone(&self.pod);
        whole(async move { pod.pause(&r.id).await }).await?;
        Ok(Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, r: api::ResumeRequest) -> Answer<Empty> {
        let pod = Arc::clone(&self.pod);
        whole(async move { pod.resume(&r.id).await }).await?;
        Ok(Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, r: api::CheckpointTaskRequest) -> Answer<Empty> {
        self.pod.container(&r.id)?;
        let text = "a container cannot be checkpointed: Capsid has no snapshots yet";
        Err(refuse(Code::UNIMPLEMENTED, text).into())
    }

    async fn kill(&self, _: &TtrpcContext, r: api::KillRequest) -> Answer<Empty> {
        let pod = Arc::clone(&self.pod);
        whole(async move { pod.kill((&r.id, &r.exec_id), r.signal, r.all).await }).await?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, r: api::ExecProcessRequest) -> Answer<Empty> {
        let json = json(r.spec.as_ref(), "the process of an exec")?;
        let streams = Streams {
            stdin: r.stdin,
            stdout: r.stdout,
            stderr: r.stderr,
            terminal: r.terminal,
        };
        self.pod.add_exec((&r.id, &r.exec_id), streams, json)?;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, r: api::ResizePtyRequest) -> Answer<Empty> {
        let pod = Arc::clone(&self.pod);
        let resized = async move { pod.resize((&r.id, &r.exec_id), (r.width, r.height)).await };
        whole(resized).await?;
        Ok(Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, r: api::CloseIORequest) -> Answer<Empty> {
        match r.stdin {
            true => self.pod.close_stdin(&r.id, &r.exec_id)?,
            false => drop(self.pod.status(&r.id, &r.exec_id)?),
        }
        Ok(Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, r: api::UpdateTaskRequest) -> Answer<Empty> {
        let json = json(r.resources.as_ref(), "the resources of an update")?;
        let json =
            crate::spec::guest_limits(&json).map_err(|error| crate::error::invalid(&error))?;
        let pod = Arc::clone(&self.pod);
        whole(async move { pod.update(&r.id, json).await }).await?;
        Ok(Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, r: api::WaitRequest) -> Answer<api::WaitResponse> {
        Ok(wait_response(self.pod.wait(&r.id, &r.exec_id).await?))
    }

    async fn stats(&self, _: &TtrpcContext, r: api::StatsRequest) -> Answer<api::StatsResponse> {
        let figures = self.pod.figures(&r.id).await?;
        let packed = stats::pack(figures).map_err(|error| crate::error::internal(&error))?;
        Ok(api::StatsResponse {
            stats: Some(packed).into(),
            ..Default::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        r: api::ConnectRequest,
    ) -> Answer<api::ConnectResponse> {
        // As runc's shim: whoever connects to no container in particular still gets to know the shim.
        let task_pid = self
            .pod
            .container(&r.id)
            .map_or(0, |container| container.pid);
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, r: api::ShutdownRequest) -> Answer<Empty> {
        if self.pod.end_if_unwanted() {
            tracing::debug!(by = shown(&r.id), "shutdown");
        }
        Ok(Empty::default())
    }
}
