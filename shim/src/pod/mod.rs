//! The pod that a shim serves: its containers and the one VM that they run in. What changes it is in the modules below, one for each part of a
//! container's life; [`crate::service`] is how containerd asks for it.
//!
//! Every change of state runs in a task of its own, to its end, whoever waits: ttrpc drops a handler when its caller's deadline has passed or
//! the connection is gone.

mod ask;
mod create;
mod end;
mod run;

use crate::cgroup::{Cgroup, CgroupPath};
use crate::config::Config;
use crate::container::Container;
use crate::error::{TaskError, refuse};
use crate::events::{Event, Publisher};
use crate::hooks;
use crate::record::Record;
use crate::share::Tree;
use crate::sizing::Size;
use crate::stdio::Pumps;
use crate::vm::Vm;
use containerd_shim_protos::events::task::TaskOOM;
use protobuf::well_known_types::timestamp::Timestamp;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{Notify, OnceCell};
use tokio::task::JoinSet;
use ttrpc::Code;

pub use ask::Status;
pub use create::Creation;

/// Most containers of one pod.
const CONTAINERS_MAX: usize = 256;
/// How long a handler that must answer without the guest waits for it all the same, in ms: containerd gives a shim a second.
const ANSWER_MS: u64 = 800;
/// How long the agent may leave a signal or a removal unanswered before its VM is taken down, in ms; an emulated host is some twenty times
/// slower than a real one.
const AGENT_GRACE_MS: u64 = 30_000;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A container that is being made, or that is there.
#[derive(Debug)]
enum Slot {
    Creating {
        /// Whoever asked for it has given up: it is undone once it is made.
        unwanted: bool,
    },
    There(Arc<Container>),
    /// It is being removed: nobody finds it, and its id is not free yet.
    Leaving,
}

/// The containers of a pod, by their ids.
#[derive(Debug, Default)]
struct Table {
    slots: HashMap<String, Slot>,
    /// The shim is to end: nothing is created any more.
    closing: bool,
}

/// The VM of the pod and what goes with it. Dropped, the VM is killed.
#[derive(Debug)]
struct Machine {
    vm: Arc<Vm>,
    cgroup: Option<Cgroup>,
}

/// What the pod's first container says about its VM.
#[derive(Clone, Debug)]
struct Wished {
    size: Size,
    hostname: String,
    sysctls: BTreeMap<String, String>,
    cgroup: Option<CgroupPath>,
    /// How readily the host's kernel kills the VMM for want of memory (proc_pid_oom_score_adj(5)).
    oom_score_adj: i32,
}

/// A pod.
#[derive(Debug)]
pub struct Pod {
    id: String,
    namespace: String,
    bundle: PathBuf,
    config: Result<Config, String>,
    events: Publisher,
    tree: OnceCell<Tree>,
    containers: Mutex<Table>,
    /// Told when the shim may end.
    over: Notify,
    wished: Mutex<Option<Wished>>,
    machine: tokio::sync::Mutex<Option<Machine>>,
    record: Mutex<Record>,
    /// Streams that are being closed: their loggers may have something to write yet.
    closing: Mutex<JoinSet<()>>,
}

impl Pod {
    /// A pod without containers. `record` is kept in `bundle`, for whoever comes after this process.
    pub fn new(
        (id, namespace): (String, String),
        (bundle, record): (PathBuf, Record),
        config: Result<Config, String>,
        events: Publisher,
    ) -> Pod {
        Pod {
            id,
            namespace,
            bundle,
            config,
            events,
            tree: OnceCell::new(),
            containers: Mutex::default(),
            over: Notify::new(),
            wished: Mutex::default(),
            machine: tokio::sync::Mutex::default(),
            record: Mutex::new(record),
            closing: Mutex::default(),
        }
    }

    /// Whether no container is known.
    pub fn is_empty(&self) -> bool {
        locked(&self.containers).slots.is_empty()
    }

    /// The shim is to end, if nobody wants a container of it any more; from then on nothing is created. Whether it is.
    pub fn end_if_unwanted(&self) -> bool {
        let mut table = locked(&self.containers);
        let unwanted =
            |slot: &Slot| matches!(slot, Slot::Creating { unwanted: true } | Slot::Leaving);
        if !table.slots.values().all(unwanted) {
            return false;
        }
        table.closing = true;
        if table.slots.is_empty() {
            self.over.notify_one();
        }
        true
    }

    /// Notes for the `delete` action, which containerd runs as soon as it has hung up, that this process ends by itself.
    pub fn ends(&self) {
        let mut record = locked(&self.record);
        record.ends = true;
        // A bundle that is gone needs no note.
        let _gone = record.write(&self.bundle);
    }

    /// Waits until the shim may end.
    pub async fn over(&self) {
        self.over.notified().await;
    }

    /// Forgets a container, or an id that was reserved for one.
    fn forget(&self, id: &str) {
        let mut table = locked(&self.containers);
        table.slots.remove(id);
        if table.closing && table.slots.is_empty() {
            self.over.notify_one();
        }
    }

    /// The container with this id.
    ///
    /// # Errors
    /// There is none, or it is still being made.
    pub fn container(&self, id: &str) -> Result<Arc<Container>, TaskError> {
        match locked(&self.containers).slots.get(id) {
            Some(Slot::There(container)) => Ok(Arc::clone(container)),
            Some(Slot::Creating { .. } | Slot::Leaving) | None => Err(TaskError::no_container(id)),
        }
    }

    /// The container whose task has this pid.
    fn container_of_pid(&self, pid: u32) -> Option<Arc<Container>> {
        let containers = locked(&self.containers);
        containers.slots.values().find_map(|slot| match slot {
            Slot::There(container) if container.pid == pid => Some(Arc::clone(container)),
            _ => None,
        })
    }

    /// Closes streams behind whatever comes next.
    fn close(&self, pumps: impl IntoIterator<Item = Pumps>) {
        let mut closing = locked(&self.closing);
        for pumps in pumps {
            closing.spawn(pumps.close());
        }
        while closing.try_join_next().is_some() {}
    }

    /// Waits until all streams are closed and their loggers have ended, which takes them 12 s at most.
    pub async fn closed(&self) {
        let closing = std::mem::take(&mut *locked(&self.closing));
        let mut closing = closing;
        while closing.join_next().await.is_some() {}
    }

    /// The configuration.
    ///
    /// # Errors
    /// It was refused.
    fn config(&self) -> Result<&Config, TaskError> {
        let refused = |text: &String| refuse(Code::FAILED_PRECONDITION, text.as_str());
        self.config.as_ref().map_err(refused)
    }

    async fn tree(&self) -> Result<&Tree, TaskError> {
        let tree = self.tree.get_or_try_init(Tree::make).await;
        tree.map_err(|error| crate::error::internal(&error))
    }

    /// Tells of OOM kills, each once and before the exit that it caused.
    fn tell_ooms(&self, container: &Container, kills: u64) {
        let new = container.new_ooms(kills);
        if new > 0 {
            // CRI-O hears no events: it looks for this file (internal/oci/runtime_vm.go). A bundle that is gone needs none.
            let _gone = std::fs::write(container.bundle.join("oom"), "");
        }
        for _ in 0..new {
            self.events.publish(Event::Oom(TaskOOM {
                container_id: container.id.clone(),
                ..Default::default()
            }));
        }
    }

    /// Runs a container's hooks for what it is doing.
    async fn run_hooks(
        container: &Container,
        hooks: &[hooks::Hook],
        status: hooks::Status,
    ) -> Result<(), hooks::HookError> {
        let state = container.state_for_hooks(status);
        hooks::run(hooks, &state).await
    }

    /// Stops the VM in good order because this process was asked to end; the exits of its containers follow.
    pub async fn stop(&self) {
        if let Some(machine) = &*self.machine.lock().await {
            machine.vm.stop();
        }
    }
}

/// Runs a change to its end even if whoever asked for it stops waiting.
pub async fn whole<T: Send + 'static>(
    change: impl Future<Output = Result<T, TaskError>> + Send + 'static,
) -> Result<T, TaskError> {
    let joined = tokio::spawn(change).await;
    joined.unwrap_or_else(|_| Err(refuse(Code::INTERNAL, "the work was cut short by a defect")))
}

/// Waits for a change as long as a handler may; `None` if it goes on.
async fn in_time<T: Send + 'static>(change: impl Future<Output = T> + Send + 'static) -> Option<T> {
    let limit = Duration::from_millis(ANSWER_MS);
    let joined = tokio::time::timeout(limit, tokio::spawn(change)).await;
    joined.ok()?.ok()
}

/// A time as protobuf has it.
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or_default(),
        ..Default::default()
    }
}
