//! The spec that containerd writes for a container, made into the one that the agent takes: what is the host's business comes out of it or
//! is refused, what is the guest's stays. Pure, but for the bounded [`read`].
//!
//! Trusted is who writes config.json; not trusted is that it can be had in a VM. Paths of the host become paths of the guest here and nowhere else:
//!
//! - `root.path` is `/run/capsid/share/ID/rootfs`;
//! - the source of bind mount n of those that need the host is `/run/capsid/share/ID/volumes/n` ([`mounts`]);
//! - what runs or lies on the host is moved out: its hooks, its cgroup, its namespaces ([`namespaces`]), its annotations, which guest hooks
//!   therefore do not see;
//! - limits and parameters that name CPUs, disks and devices of the host are dropped ([`resources`]).
//!
//! The agent has a filter of its own (`agent/src/spec.rs`), for whoever its host is: it bounds the process, sets the cgroup, drops AppArmor and
//! SELinux labels, Intel RDT and inheritable capabilities. None of that is done here again. Capabilities, rlimits, seccomp, oomScoreAdj,
//! noNewPrivileges, masked and read-only paths and time namespaces are the guest's, and stay as they are.

pub mod mounts;
pub mod namespaces;
mod read;
mod resources;

use crate::cgroup::CgroupPath;
use crate::hooks::HostHooks;
use capsid_owner::escape::Line;
use oci_spec::runtime::{Root, Spec};
use serde::Serialize;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

pub use mounts::Volume;
pub use namespaces::{Network, PidNamespace};
pub use read::{ReadError, annotations, read};

/// Longest config.json that is read, and longest spec that the agent takes, in bytes.
pub const SPEC_MAX_BYTES: usize = 2 << 20;
/// Where the agent mounts the share in the guest.
pub const GUEST_SHARE: &str = "/run/capsid/share";
/// Longest host name of a Linux system in bytes (`__NEW_UTS_LEN`, include/uapi/linux/utsname.h).
const HOSTNAME_MAX_BYTES: usize = 64;

/// Which container of a VM this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role<'a> {
    /// The only one: it came from `ctr`, nerdctl or docker.
    Alone,
    /// The pause container that stands for a pod (CRI). The agent is its program, and reads no spec for it.
    Pause,
    /// One of a pod's.
    Member {
        /// The id of the pod's pause container.
        sandbox: &'a str,
    },
}

/// Whose spec is translated.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The container's id (`capsid_protocol::machine::is_id`).
    pub id: &'a str,
    /// Its bundle: relative paths start here.
    pub bundle: &'a Path,
    /// Its place in the pod.
    pub role: Role<'a>,
}

/// A spec that fits a guest, and all that the host has to do for it.
#[derive(Debug)]
pub struct GuestSpec {
    /// config.json for the agent, at most [`SPEC_MAX_BYTES`]; empty for [`Role::Pause`].
    pub json: Vec<u8>,
    /// The root file system on the host.
    pub root: PathBuf,
    /// Whether the host must not let the guest write to it.
    pub read_only_root: bool,
    /// What is mounted into the share at `/ID/volumes/n`, n being the index; none for [`Role::Pause`].
    pub volumes: Vec<Volume>,
    /// Whose pid namespace it is born into.
    pub pid_namespace: PidNamespace,
    /// The network namespace of the host whose links become the guest's.
    pub network: Network,
    /// The host name of the guest, where this container is the one that says it.
    pub hostname: Option<String>,
    /// Kernel parameters of the namespaces that the container shares with the guest itself, by name (`net.ipv4.ip_forward`): whoever owns
    /// the guest sets them there, before the container starts. Those of namespaces that the container has for itself are in `json`.
    pub sysctls: BTreeMap<String, String>,
    /// What runs on the host.
    pub hooks: HostHooks,
    /// `linux.cgroupsPath`.
    pub cgroup: Option<CgroupPath>,
}

/// Why a spec cannot be had in a VM: one sentence that names the field, the cause and, where there is one, the remedy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("config.json: {field}: {problem}")]
pub struct Refusal {
    /// Its path in the spec, such as `mounts[3].source`.
    pub field: String,
    /// What is wrong, and what to do about it.
    pub problem: String,
}

fn refusal(field: impl Into<String>, problem: impl Into<String>) -> Refusal {
    Refusal {
        field: field.into(),
        problem: problem.into(),
    }
}

/// A stranger's text, fit for a message.
fn shown(text: impl AsRef<OsStr>) -> String {
    Line(text.as_ref().as_encoded_bytes()).to_string()
}

/// Makes the spec of a container fit a guest.
///
/// # Errors
/// The first thing in it that cannot be had in a VM.
pub fn translate(spec: &Spec, context: &Context<'_>) -> Result<GuestSpec, Refusal> {
    check_platform(spec)?;
    let mut spec = spec.clone();
    let hooks = HostHooks::take(&mut spec)?;
    let root = spec.root().clone().unwrap_or_default();
    let read_only_root = root.readonly().unwrap_or(false);
    let mut linux = spec.linux().clone();
    let linux = linux.as_mut().ok_or_else(|| refusal("linux", "missing"))?;
    let joined = namespaces::take(linux, context.role)?;
    let sysctls = resources::take_sysctls(linux, joined.shared)?;
    resources::check_devices(linux)?;
    resources::drop_host_limits(linux)?;
    let cgroup = match linux.cgroups_path() {
        Some(path) if !path.as_os_str().is_empty() => {
            let parsed = CgroupPath::parse(path);
            Some(parsed.map_err(|bad| refusal("linux.cgroupsPath", bad.to_string()))?)
        }
        _ => None,
    };
    linux.set_cgroups_path(None);
    // Mounts of the guest are private: nothing that is mounted in it can appear on the host.
    linux.set_rootfs_propagation(None);
    let hostname = take_hostname(&mut spec, joined.shared.uts, context.role)?;
    if let Some(mut process) = spec.process().clone() {
        // Numbers of CPUs of the host.
        process.set_exec_cpu_affinity(None);
        spec.set_process(Some(process));
    }
    let mounts = spec.mounts().clone().unwrap_or_default();
    let mut guest = GuestSpec {
        json: Vec::new(),
        root: context.bundle.join(root.path()),
        read_only_root,
        volumes: Vec::new(),
        pid_namespace: joined.pid,
        network: joined.network,
        hostname,
        sysctls,
        hooks,
        cgroup,
    };
    if context.role == Role::Pause {
        return Ok(guest);
    }
    let (mounts, volumes) = mounts::take(mounts, context)?;
    guest.volumes = volumes;
    spec.set_mounts(Some(mounts));
    spec.set_root(Some(guest_root(context.id, read_only_root)));
    spec.set_linux(Some(linux.clone()));
    spec.set_annotations(None);
    guest.json = to_json(&spec)?;
    Ok(guest)
}

/// Makes new limits of a container, a `linux.resources` object, fit a guest.
///
/// # Errors
/// They are no such object, or ask for what no guest has.
pub fn guest_limits(json: &[u8]) -> Result<Vec<u8>, Refusal> {
    let limits = serde_json::from_slice(json);
    let limits = limits.map_err(|error| refusal("linux.resources", shown(error.to_string())))?;
    to_json(&resources::of_guest(limits)?)
}

fn check_platform(spec: &Spec) -> Result<(), Refusal> {
    if !spec.version().starts_with("1.") {
        let version = shown(spec.version());
        return Err(refusal("ociVersion", format!("{version} is not 1.x")));
    }
    if spec.windows().is_some() || spec.solaris().is_some() || spec.zos().is_some() {
        return Err(refusal("windows, solaris or zos", "the guest is Linux"));
    }
    if spec.vm().is_some() {
        return Err(refusal(
            "vm",
            "the VM is configured in Capsid's own configuration file",
        ));
    }
    Ok(())
}

/// The name that the guest gets. A container in the guest's own UTS namespace has it from there.
fn take_hostname(spec: &mut Spec, shared: bool, role: Role<'_>) -> Result<Option<String>, Refusal> {
    let name = spec.hostname().clone().filter(|name| !name.is_empty());
    if name
        .as_ref()
        .is_some_and(|name| name.len() > HOSTNAME_MAX_BYTES)
    {
        let problem = format!("longer than {HOSTNAME_MAX_BYTES} bytes, which Linux does not take");
        return Err(refusal("hostname", problem));
    }
    if shared {
        spec.set_hostname(None);
        spec.set_domainname(None);
    }
    Ok(name.filter(|_| !matches!(role, Role::Member { .. })))
}

fn guest_root(id: &str, read_only: bool) -> Root {
    let mut root = Root::default();
    root.set_path(guest_path(id).join("rootfs"));
    root.set_readonly(Some(read_only));
    root
}

fn guest_path(id: &str) -> PathBuf {
    Path::new(GUEST_SHARE).join(id)
}

fn to_json(object: &impl Serialize) -> Result<Vec<u8>, Refusal> {
    let json = serde_json::to_vec(object);
    let json =
        json.map_err(|error| refusal("all of it", format!("cannot be written again: {error}")))?;
    if json.len() > SPEC_MAX_BYTES {
        let problem = format!(
            "{} bytes long for the guest, at most {SPEC_MAX_BYTES} are taken",
            json.len()
        );
        return Err(refusal("all of it", problem));
    }
    Ok(json)
}

#[cfg(test)]
mod engines;
#[cfg(test)]
mod properties;
#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
