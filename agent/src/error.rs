//! Why a call of the host is refused or fails; `server.rs` has the table to ttrpc's codes.

use crate::cgroup::CgroupError;
use crate::cpus::CpusError;
use crate::hotplug::HotplugError;
use crate::launch::LaunchError;
use crate::pending::NoSuchStream;
use crate::share::ShareError;
use crate::shm::ShmError;
use crate::spec::BadSpec;
use crate::state::Refusal;
use capsid_protocol::exec_error::ExecError;
use std::io;

/// Why a call is refused or failed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the texts say it
pub enum SandboxError {
    #[error("no container {0}")]
    NoContainer(String),
    #[error("container {container} has no process {exec}")]
    NoExec { container: String, exec: String },
    #[error("{0} exists already")]
    Exists(String),
    #[error("{0:?} is no id: 1 to 64 of A-Z a-z 0-9 _ . -")]
    BadId(String),
    #[error(transparent)]
    BadSpec(#[from] BadSpec),
    #[error("{0}")]
    BadRequest(String),
    #[error("{}{what}", kind.prefix())]
    NotExecuted { kind: ExecError, what: String },
    #[error("{0}")]
    NotStarted(String),
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("{0}")]
    Wrong(String),
    #[error("{0}")]
    Full(String),
    #[error(transparent)]
    NoStream(#[from] NoSuchStream),
    #[error(transparent)]
    Share(#[from] ShareError),
    #[error(transparent)]
    Shm(#[from] ShmError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error(transparent)]
    Hotplug(#[from] HotplugError),
    #[error(transparent)]
    Cpus(#[from] CpusError),
    #[error("{what}")]
    Io {
        what: &'static str,
        #[source]
        cause: io::Error,
    },
}

pub(crate) type Result<T> = std::result::Result<T, SandboxError>;

pub(crate) fn io_error(what: &'static str) -> impl Fn(io::Error) -> SandboxError {
    move |cause| SandboxError::Io { what, cause }
}
