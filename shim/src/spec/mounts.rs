//! The mounts of a spec: which the guest makes by itself, which need a tree of the host (volumes), and which cannot be.
//!
//! A bind mount of a file or a directory of the host becomes a bind mount of its place in the share. Four kinds of source are not the host's to give:
//!
//! - `/proc`, `/sys` and what is below are the guest's own, as Kata has it: the host's would show the wrong machine, and be a way around
//!   the VM. So a pod that mounts `/sys/fs/cgroup` to run systemd or dockerd works, and one that watches its node sees the VM.
//! - the device nodes that every container has (`/dev/null` over a file hides it) are the guest's own.
//! - other devices below `/dev` are refused: a VM does not have them.
//! - the pod's `/dev/shm`, a tmpfs that the container engine keeps on the host, is one of the guest, which its containers share as memory.
//!
//! Propagation is dropped: mounts of a guest are private to it, and later mounts of the host below a volume arrive by the share.

use super::{Context, Refusal, Role, guest_path, refusal, shown};
use oci_spec::runtime::Mount;
use std::path::{Component, Path, PathBuf};

/// Most volumes of one container.
pub const VOLUMES_MAX: usize = 256;
/// The tmpfs that the agent makes for whoever names it first: 64 MiB, shared by the pod.
const GUEST_SHM: &str = "/run/capsid/pod/shm";
/// File systems that the guest's kernel mounts by itself, without anything of the host.
const GUEST_FILE_SYSTEMS: [&str; 7] = [
    "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2",
];
/// Device nodes that every container has (runtime-spec, `config-linux.md`, "Default Devices").
const GUEST_NODES: [&str; 6] = [
    "/dev/null",
    "/dev/zero",
    "/dev/full",
    "/dev/random",
    "/dev/urandom",
    "/dev/tty",
];
const PROPAGATION: [&str; 8] = [
    "private",
    "rprivate",
    "shared",
    "rshared",
    "slave",
    "rslave",
    "unbindable",
    "runbindable",
];

/// A file or a directory of the host that is mounted into the share. It may be anything: whoever opens it finds sockets, fifos and devices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// Absolute path on the host.
    pub source: PathBuf,
    /// To be enforced on the host.
    pub read_only: bool,
    /// With what is mounted below it (`rbind`).
    pub recursive: bool,
}

/// What a source on the host is to a guest.
enum Source {
    /// A path of the guest.
    Guest(PathBuf),
    /// A path of the host.
    Host(PathBuf),
}

/// Takes the mounts for the guest, and the volumes, in the order of their mounts.
///
/// # Errors
/// The first mount that cannot be had in a VM.
pub(super) fn take(
    mounts: Vec<Mount>,
    context: &Context<'_>,
) -> Result<(Vec<Mount>, Vec<Volume>), Refusal> {
    let mut volumes = Vec::new();
    let mut guest = Vec::with_capacity(mounts.len());
    for (index, mut mount) in mounts.into_iter().enumerate() {
        refuse_id_maps(&mount, index)?;
        let mut options = mount.options().clone().unwrap_or_default();
        options.retain(|option| !PROPAGATION.contains(&option.as_str()));
        if is_bind(&mount) {
            let source = match source(&mount, context, index)? {
                Source::Guest(path) => path,
                Source::Host(source) => {
                    volumes.push(Volume {
                        source,
                        read_only: read_only(&options),
                        recursive: options.iter().any(|option| option == "rbind"),
                    });
                    let place = guest_path(context.id).join("volumes");
                    place.join((volumes.len() - 1).to_string())
                }
            };
            if !options
                .iter()
                .any(|option| option == "bind" || option == "rbind")
            {
                options.push("bind".to_owned());
            }
            mount.set_typ(Some("bind".to_owned()));
            mount.set_source(Some(source));
        } else {
            let kind = guest_file_system(&mount, index)?;
            // A name and no more: none of these has a device.
            let named = mount.source().clone();
            let named = named.filter(|source| !source.to_string_lossy().contains('/'));
            mount.set_source(Some(named.unwrap_or_else(|| kind.into())));
        }
        mount.set_options(Some(options));
        guest.push(mount);
    }
    if volumes.len() > VOLUMES_MAX {
        let problem = format!(
            "{} bind mounts of the host, at most {VOLUMES_MAX}",
            volumes.len()
        );
        return Err(refusal("mounts", problem));
    }
    Ok((guest, volumes))
}

fn field(index: usize, name: &str) -> String {
    format!("mounts[{index}].{name}")
}

fn is_bind(mount: &Mount) -> bool {
    let mut options = mount.options().iter().flatten();
    mount.typ().as_deref() == Some("bind")
        || options.any(|option| option == "bind" || option == "rbind")
}

/// The last one counts, as for mount(8).
fn read_only(options: &[String]) -> bool {
    let mut last = options.iter().rev();
    let last = last.find(|option| matches!(option.as_str(), "ro" | "rro" | "rw"));
    last.is_some_and(|option| option != "rw")
}

fn refuse_id_maps(mount: &Mount, index: usize) -> Result<(), Refusal> {
    let mapped = [mount.uid_mappings(), mount.gid_mappings()];
    let mapped = mapped
        .iter()
        .any(|map| map.as_ref().is_some_and(|map| !map.is_empty()));
    let mut options = mount.options().iter().flatten();
    if mapped || options.any(|option| option == "idmap" || option == "ridmap") {
        return Err(refusal(
            field(index, "uidMappings"),
            "mounts with mapped ids do not reach into a VM yet: run this pod without hostUsers: false",
        ));
    }
    Ok(())
}

fn guest_file_system(mount: &Mount, index: usize) -> Result<&'static str, Refusal> {
    let kind = mount.typ().as_deref().unwrap_or_default();
    let found = GUEST_FILE_SYSTEMS.into_iter().find(|name| *name == kind);
    found.ok_or_else(|| {
        let problem = format!(
            "the file system \"{}\" needs something of the host: mount it there and bind mount it into the container",
            shown(kind)
        );
        refusal(field(index, "type"), problem)
    })
}

fn source(mount: &Mount, context: &Context<'_>, index: usize) -> Result<Source, Refusal> {
    let field = || field(index, "source");
    let source = mount.source().as_deref().unwrap_or(Path::new(""));
    if source.as_os_str().is_empty() {
        return Err(refusal(field(), "missing for a bind mount"));
    }
    if source.components().any(|part| part == Component::ParentDir) {
        return Err(refusal(
            field(),
            format!("{} must not contain ..", shown(source)),
        ));
    }
    // Relative to the bundle, as runc takes it. Without the doubled slashes and dots that would hide what is meant.
    let source: PathBuf = context.bundle.join(source).components().collect();
    if mount.destination() == Path::new("/dev/shm") && is_shm_of_pod(&source, context) {
        return Ok(Source::Guest(GUEST_SHM.into()));
    }
    let guest_s = source.starts_with("/proc") || source.starts_with("/sys");
    if guest_s || GUEST_NODES.iter().any(|node| Path::new(node) == source) {
        return Ok(Source::Guest(source));
    }
    if source.starts_with("/dev") && !source.starts_with("/dev/shm") {
        let problem = format!(
            "{} is the host's, whose devices a VM does not have: do not mount it",
            shown(&source)
        );
        return Err(refusal(field(), problem));
    }
    Ok(Source::Host(source))
}

/// Whether this is the directory that the container engine keeps for the pod (containerd: `…/sandboxes/ID/shm`, CRI-O: `…/ID/userdata/shm`), or
/// for the container alone (docker: `…/ID/mounts/shm`), and not a volume that a person mounts at `/dev/shm`.
fn is_shm_of_pod(source: &Path, context: &Context<'_>) -> bool {
    let owner = match context.role {
        Role::Member { sandbox } => sandbox,
        Role::Alone | Role::Pause => context.id,
    };
    source.ends_with("shm") && source.components().any(|part| part.as_os_str() == owner)
}
