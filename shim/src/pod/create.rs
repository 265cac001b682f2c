//! Create: a container is made on the host, and in the guest if its VM runs or its network is there.

use super::{CONTAINERS_MAX, Pod, Slot, Wished, locked};
use crate::cgroup::{CgroupError, Hierarchy, Room};
use crate::container::{Container, Described, Made};
use crate::error::{TaskError, chain, internal, invalid, refuse, shown};
use crate::events::Event;
use crate::group::{self, Group};
use crate::hooks::Status;
use crate::link;
use crate::parked::{self, Parked};
use crate::process::Streams;
use crate::record::TaskRecord;
use crate::share::{Mount, Placement, Root};
use crate::sizing::{self, Host};
use crate::spec::{self, Context, GuestSpec, Network, Role};
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use containerd_shim_protos::types::mount::Mount as ApiMount;
use oci_spec::runtime::Spec;
use std::path::PathBuf;
use std::sync::Arc;
use ttrpc::Code;

/// What containerd wants created.
#[derive(Clone, Debug)]
pub struct Creation {
    /// The container's id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// Its root file system; empty: what the spec's root is.
    pub rootfs: Vec<ApiMount>,
    /// Its streams.
    pub streams: Streams,
}

/// A reserved id: given back unless the container comes to be.
struct Reserved {
    pod: Arc<Pod>,
    id: String,
    filled: bool,
}

impl Reserved {
    /// The container is there. Whether anybody wants it still; otherwise nothing has changed.
    fn fill(&mut self, container: &Arc<Container>) -> bool {
        let mut table = locked(&self.pod.containers);
        let Some(slot) = table.slots.get_mut(&self.id) else {
            return false;
        };
        if matches!(slot, Slot::Creating { unwanted: true }) {
            return false;
        }
        *slot = Slot::There(Arc::clone(container));
        self.filled = true;
        true
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if !self.filled {
            self.pod.forget(&self.id);
        }
    }
}

impl Pod {
    /// Creates a container; the task's pid.
    ///
    /// # Errors
    /// The id is taken, the spec or the root file system is refused, a hook fails, the VM does not boot. Nothing is left then.
    pub async fn create(self: &Arc<Self>, creation: Creation) -> Result<u32, TaskError> {
        let mut reserved = self.reserve(&creation.id)?;
        let container = match self.make(&creation).await {
            Ok(container) => Arc::new(container),
            Err(error) => {
                self.end_vm_if_last(&creation.id).await;
                return Err(error);
            }
        };
        let mut made = self.finish(&container).await;
        if made.is_ok() && !reserved.fill(&container) {
            made = Err(refuse(
                Code::CANCELLED,
                "the container was deleted while it was made",
            ));
        }
        if let Err(error) = made {
            // In the guest too, if it came to be there.
            let last = self.is_last(&creation.id);
            self.remove(&container, last).await;
            return Err(error);
        }
        self.events
            .publish(Event::Create(created(&creation, container.pid)));
        Ok(container.pid)
    }

    fn reserve(self: &Arc<Self>, id: &str) -> Result<Reserved, TaskError> {
        if !capsid_protocol::machine::is_id(id) {
            let text = format!(
                "container id {}: Capsid takes 1 to 64 characters of A-Z, a-z, 0-9, '_', '.' and '-'",
                shown(id)
            );
            return Err(refuse(Code::INVALID_ARGUMENT, text));
        }
        let mut table = locked(&self.containers);
        if table.closing {
            return Err(refuse(Code::UNAVAILABLE, "the shim of the pod ends"));
        }
        let containers = &mut table.slots;
        if containers.contains_key(id) {
            let text = format!("container {id} already exists");
            return Err(refuse(Code::ALREADY_EXISTS, text));
        }
        if containers.len() >= CONTAINERS_MAX {
            let text = format!("the pod has {CONTAINERS_MAX} containers already");
            return Err(refuse(Code::RESOURCE_EXHAUSTED, text));
        }
        containers.insert(id.to_owned(), Slot::Creating { unwanted: false });
        Ok(Reserved {
            pod: Arc::clone(self),
            id: id.to_owned(),
            filled: false,
        })
    }

    /// On the host: files, pid, network namespace.
    async fn make(&self, creation: &Creation) -> Result<Container, TaskError> {
        let spec = spec::read(&creation.bundle).map_err(|error| invalid(&error))?;
        let annotations = spec.annotations().clone().unwrap_or_default();
        let group = group::of(&creation.id, &annotations).map_err(|error| invalid(&error))?;
        let is_pause = group == Group::Sandbox;
        let context = Context {
            id: &creation.id,
            bundle: &creation.bundle,
            role: role(&group),
        };
        let guest = spec::translate(&spec, &context).map_err(|error| invalid(&error))?;
        self.wish(&spec, context.role, &guest)?;
        let placement = Placement {
            id: creation.id.clone(),
            root: root(creation, &guest, is_pause),
            volumes: guest.volumes.clone(),
        };
        let placed = {
            // Not while a VM boots: what is mounted between the copy of the tree and its arrival in the VMM is not in either of them.
            let _no_boot = self.machine.lock().await;
            self.tree().await?.add(placement).await
        };
        let mut placed = placed.map_err(|error| internal(&error))?;
        let root = placed
            .take_root()
            .ok_or_else(|| refuse(Code::INTERNAL, "the root file system was taken already"))?;
        let network = match &guest.network {
            Network::New => parked::Network::New,
            Network::Path(path) => parked::Network::Path(path.clone()),
        };
        let parked = Parked::start(network, root).await;
        let parked = parked.map_err(|error| internal(&error))?;
        Ok(Container::new(Made {
            id: creation.id.clone(),
            bundle: creation.bundle.clone(),
            is_pause,
            streams: creation.streams.clone(),
            described: Described {
                oci_version: spec.version().clone(),
                annotations,
            },
            guest,
            placed,
            parked,
        }))
    }

    /// Hooks, and the guest if it is time for it.
    async fn finish(self: &Arc<Self>, container: &Arc<Container>) -> Result<(), TaskError> {
        let record = TaskRecord { pid: container.pid }.write(&container.bundle);
        record.map_err(|cause| {
            let text = format!("writing what `delete` needs into the bundle: {cause}");
            refuse(Code::INTERNAL, text)
        })?;
        let hooks = Pod::run_hooks(container, &container.hooks.create, Status::Creating).await;
        hooks.map_err(|error| internal(&error))?;
        let runs = self.machine.lock().await.is_some();
        if runs || link::any(container.pid).map_err(|error| internal(&error))? {
            self.made_in_guest(container).await?;
        }
        Ok(())
    }

    /// The first container of a pod says what its VM is like and where it belongs.
    fn wish(&self, spec: &Spec, role: Role<'_>, guest: &GuestSpec) -> Result<(), TaskError> {
        let mut wished = locked(&self.wished);
        if wished.is_some() {
            return Ok(());
        }
        let limited = |error: &CgroupError| refuse(Code::FAILED_PRECONDITION, chain(error));
        let mut room = Room::default();
        if let Some(place) = &guest.cgroup {
            let hierarchy = Hierarchy::find().map_err(|error| limited(&error))?;
            room = hierarchy.room(place).map_err(|error| limited(&error))?;
        }
        let size = sizing::size(spec, role, &room, &Host::read(), self.config()?);
        let size = size.map_err(|error| refuse(Code::RESOURCE_EXHAUSTED, chain(&error)))?;
        *wished = Some(Wished {
            size,
            hostname: guest.hostname.clone().unwrap_or_default(),
            sysctls: guest.sysctls.clone(),
            cgroup: guest.cgroup.clone(),
            oom_score_adj: oom_score_adj(spec, role),
        });
        Ok(())
    }
}

/// A single container's own. The pause container's is not its pod's: it says that pause is to live.
fn oom_score_adj(spec: &Spec, role: Role<'_>) -> i32 {
    let process = spec.process().as_ref().filter(|_| role == Role::Alone);
    process
        .and_then(|process| process.oom_score_adj())
        .unwrap_or(0)
}

fn role(group: &Group) -> Role<'_> {
    match group {
        Group::Sandbox => Role::Pause,
        Group::Of(sandbox) => Role::Member { sandbox },
        Group::Alone | Group::Label(_) => Role::Alone,
    }
}

fn root(creation: &Creation, guest: &GuestSpec, is_pause: bool) -> Root {
    if is_pause {
        return Root::Empty;
    }
    if creation.rootfs.is_empty() {
        return Root::Directory(guest.root.clone());
    }
    let mounts = creation.rootfs.iter().map(|mount| Mount {
        kind: mount.type_.clone(),
        source: mount.source.clone(),
        target: mount.target.clone(),
        options: mount.options.clone(),
    });
    Root::Mounts(mounts.collect())
}

fn created(creation: &Creation, pid: u32) -> TaskCreate {
    let streams = &creation.streams;
    let io = TaskIO {
        stdin: streams.stdin.clone(),
        stdout: streams.stdout.clone(),
        stderr: streams.stderr.clone(),
        terminal: streams.terminal,
        ..Default::default()
    };
    TaskCreate {
        container_id: creation.id.clone(),
        bundle: creation.bundle.display().to_string(),
        rootfs: creation.rootfs.clone(),
        io: Some(io).into(),
        pid,
        ..Default::default()
    }
}
