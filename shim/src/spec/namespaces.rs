//! The namespaces that a spec names, on the host, and what becomes of them in a guest.
//!
//! The guest itself is the pod: its network, ipc and uts namespaces are the pod's. A container that shares one of them with its pod has no entry
//! for it in the guest's spec, which tells the agent to leave it where the agent is. So a path means "the pod's", whatever it names (containerd
//! writes `/proc/N/ns/ipc`, CRI-O `/run/ipcns/UUID`); only the pid namespace's names one container of several. A missing entry means the
//! host's namespace to runc, and cannot be had.

use super::{Refusal, Role, refusal, shown};
use oci_spec::runtime::{Linux, LinuxNamespace, LinuxNamespaceType as Type};
use std::path::{Path, PathBuf};

/// Longest path of a namespace, in bytes (PATH_MAX).
const PATH_MAX_BYTES: usize = 4096;

/// Whose pid namespace a container is born into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PidNamespace {
    /// A new one.
    Own,
    /// That of the container with this task pid on the host: the spec names `/proc/PID/ns/pid`.
    OfTask(u32),
}

/// The network namespace of the host whose links become the guest's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// None is named: a new one is to be made.
    New,
    /// An existing one.
    Path(PathBuf),
}

/// Which namespaces a container shares with the guest itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Shared {
    pub(super) network: bool,
    pub(super) ipc: bool,
    pub(super) uts: bool,
}

/// What the entries of a spec say.
#[derive(Debug)]
pub(super) struct Joined {
    pub(super) pid: PidNamespace,
    pub(super) network: Network,
    pub(super) shared: Shared,
}

/// Those that must be named, and what the lack of one means. The network first: a pod with the host's has also its host name.
const REQUIRED: [(Type, &str); 5] = [
    (
        Type::Network,
        "none of type network, so the container would be in the host's network: a VM has a network of its own; run this container with runc, \
         or without hostNetwork or --network=host",
    ),
    (
        Type::Pid,
        "none of type pid, so the container would see the processes of the host: a VM has its own; run this container with runc, or without \
         hostPID or --pid=host",
    ),
    (
        Type::Ipc,
        "none of type ipc, so the container would share memory with processes of the host, which a VM cannot: run this container with runc, \
         or without hostIPC or --ipc=host",
    ),
    (
        Type::Uts,
        "none of type uts, so the container would have the host's name: a VM has its own; run this container with runc, or without --uts=host",
    ),
    (
        Type::Mount,
        "none of type mount, so the container would see the files of the host: run this container with runc",
    ),
];

/// Takes the entries that mean something on the host out of the spec.
///
/// # Errors
/// A namespace of the host, or one that no guest has.
pub(super) fn take(linux: &mut Linux, role: Role<'_>) -> Result<Joined, Refusal> {
    let given = linux.namespaces().clone().unwrap_or_default();
    for (index, entry) in given.iter().enumerate() {
        let mut before = given.iter().take(index);
        if before.any(|earlier| earlier.typ() == entry.typ()) {
            return Err(refusal(field(index), "a type named twice"));
        }
    }
    for (kind, problem) in REQUIRED {
        if !given.iter().any(|entry| entry.typ() == kind) {
            return Err(refusal("linux.namespaces", problem));
        }
    }
    let mut joined = Joined {
        pid: PidNamespace::Own,
        network: Network::New,
        shared: Shared::default(),
    };
    let mut kept = Vec::with_capacity(given.len());
    for (index, entry) in given.iter().enumerate() {
        let path = path_of(entry, index)?;
        if joined.enter(entry.typ(), path, role, index)? {
            let mut new = LinuxNamespace::default();
            new.set_typ(entry.typ());
            kept.push(new);
        }
    }
    linux.set_namespaces(Some(kept));
    Ok(joined)
}

impl Joined {
    /// Notes an entry; whether the guest makes a namespace for it.
    fn enter(
        &mut self,
        kind: Type,
        path: Option<&Path>,
        role: Role<'_>,
        index: usize,
    ) -> Result<bool, Refusal> {
        match (kind, path) {
            (Type::User, _) => Err(refusal(
                field(index),
                "user namespaces do not reach into a VM yet: run this pod without hostUsers: false, or this container without --userns-remap",
            )),
            (Type::Pid, Some(path)) => {
                self.pid = PidNamespace::OfTask(task_of(path, index)?);
                Ok(true)
            }
            (Type::Pid | Type::Mount | Type::Cgroup | Type::Time, None) => Ok(true),
            (Type::Mount | Type::Cgroup | Type::Time, Some(path)) => Err(refusal(
                field(index),
                format!(
                    "{} is a namespace of the host, which a VM cannot enter",
                    shown(path)
                ),
            )),
            (Type::Network, path) => {
                let path = path.filter(|path| *path != Path::new("/proc/0/ns/net"));
                // A container of a pod that asks for a network of its own gets one with nothing in it.
                self.shared.network = path.is_some() || !matches!(role, Role::Member { .. });
                self.network = path.map_or(Network::New, |path| Network::Path(path.to_owned()));
                Ok(!self.shared.network)
            }
            (Type::Ipc | Type::Uts, path) => {
                let shared = match (role, path) {
                    (Role::Pause, _) | (Role::Member { .. }, Some(_)) => true,
                    (_, None) => false,
                    (Role::Alone, Some(path)) => {
                        let problem = format!(
                            "{} is the namespace of another container: only containers of one pod are in one VM and can share it",
                            shown(path)
                        );
                        return Err(refusal(field(index), problem));
                    }
                };
                match kind {
                    Type::Ipc => self.shared.ipc = shared,
                    _ => self.shared.uts = shared,
                }
                Ok(!shared)
            }
        }
    }
}

fn field(index: usize) -> String {
    format!("linux.namespaces[{index}]")
}

/// An empty path is none, as for runc.
fn path_of(entry: &LinuxNamespace, index: usize) -> Result<Option<&Path>, Refusal> {
    let Some(path) = entry.path().as_deref() else {
        return Ok(None);
    };
    let bytes = path.as_os_str().as_encoded_bytes();
    if bytes.is_empty() {
        return Ok(None);
    }
    if !path.is_absolute() || bytes.len() > PATH_MAX_BYTES || bytes.contains(&0) {
        let problem = format!("{} is not an absolute path", shown(path));
        return Err(refusal(field(index), problem));
    }
    Ok(Some(path))
}

/// The pid in `/proc/PID/ns/pid`.
fn task_of(path: &Path, index: usize) -> Result<u32, Refusal> {
    let text = path.to_str().and_then(|path| path.strip_prefix("/proc/"));
    let pid = text.and_then(|text| text.strip_suffix("/ns/pid"));
    // `parse` would take a plus sign, too.
    let pid = pid.filter(|pid| pid.bytes().all(|byte| byte.is_ascii_digit()));
    let pid = pid.and_then(|pid| pid.parse().ok()).filter(|pid| *pid > 0);
    pid.ok_or_else(|| {
        let problem = format!(
            "{} is not /proc/PID/ns/pid with the pid of a task: no other pid namespace can be found in a VM",
            shown(path)
        );
        refusal(field(index), problem)
    })
}
