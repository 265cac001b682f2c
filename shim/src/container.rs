//! One container as the shim keeps it: its processes and what of the host belongs to it. Each resource is a guard; the container lets go of them
//! in the reverse of the order in which they were made.

use crate::error::TaskError;
use crate::hooks::{HostHooks, State, Status};
use crate::parked::Parked;
use crate::process::{Process, Streams};
use crate::share::Placed;
use crate::spec::GuestSpec;
use crate::stdio::Pumps;
use crate::vm::Vm;
use capsid_protocol::agent::StatsResponse;
use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use ttrpc::Code;

/// Most OOM kills of one container that are told: a guest can have as many as it likes, and the queue of events is for all of its pod.
const OOMS_MAX: u64 = 64;
/// Most execs of one container that are known at a time, ended ones that nobody deleted included.
const EXECS_MAX: usize = 1024;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether the guest knows of a container yet.
#[derive(Debug)]
pub enum InGuest {
    /// Not yet: the VM boots, and the container is made in it, when it is started.
    Later(Box<GuestSpec>),
    /// It is made in this VM.
    Made(Arc<Vm>),
}

/// What of the spec hooks are told.
#[derive(Clone, Debug)]
pub struct Described {
    /// `ociVersion`.
    pub oci_version: String,
    /// Its annotations.
    pub annotations: HashMap<String, String>,
}

/// A further process of a container.
#[derive(Debug)]
pub struct Exec {
    /// Its id, unique in the container.
    pub id: String,
    /// Its life.
    pub process: Arc<Process>,
    /// The `process` object of the runtime-spec, until it is started.
    pub json: Mutex<Option<Vec<u8>>>,
}

/// A container.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// It is the one that stands for a pod.
    pub is_pause: bool,
    /// The task's pid.
    pub pid: u32,
    /// Its init process.
    pub init: Arc<Process>,
    /// For hooks.
    pub described: Described,
    /// What runs on the host.
    pub hooks: HostHooks,
    /// Whether the guest knows it. Held while it is made there.
    pub in_guest: tokio::sync::Mutex<InGuest>,
    /// New limits that came before the guest knew it.
    pub limits: Mutex<Option<Vec<u8>>>,
    /// The last figures.
    pub figures: Mutex<Option<StatsResponse>>,
    /// Held while it is frozen or let go on: one after the other.
    pub freezing: tokio::sync::Mutex<()>,
    /// Held while the guest is asked for them.
    pub asking: Arc<tokio::sync::Mutex<()>>,
    parked: Mutex<Option<Parked>>,
    placed: Mutex<Option<Placed>>,
    execs: Mutex<BTreeMap<String, Arc<Exec>>>,
    said_ooms: Mutex<u64>,
}

/// What a container is made from.
#[derive(Debug)]
pub struct Made {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// It is the one that stands for a pod.
    pub is_pause: bool,
    /// Its streams.
    pub streams: Streams,
    /// For hooks.
    pub described: Described,
    /// Its spec for the guest.
    pub guest: GuestSpec,
    /// Its files.
    pub placed: Placed,
    /// Its pid.
    pub parked: Parked,
}

impl Container {
    /// A container that is made on the host.
    pub fn new(made: Made) -> Container {
        let hooks = made.guest.hooks.clone();
        Container {
            id: made.id,
            bundle: made.bundle,
            is_pause: made.is_pause,
            pid: made.parked.pid(),
            init: Arc::new(Process::new(made.streams)),
            described: made.described,
            hooks,
            in_guest: tokio::sync::Mutex::new(InGuest::Later(Box::new(made.guest))),
            limits: Mutex::default(),
            figures: Mutex::default(),
            freezing: tokio::sync::Mutex::default(),
            asking: Arc::default(),
            parked: Mutex::new(Some(made.parked)),
            placed: Mutex::new(Some(made.placed)),
            execs: Mutex::default(),
            said_ooms: Mutex::default(),
        }
    }

    /// It, as its hooks are told.
    pub fn state_for_hooks(&self, status: Status) -> State<'_> {
        State {
            oci_version: &self.described.oci_version,
            id: &self.id,
            status,
            pid: (status != Status::Stopped).then_some(self.pid),
            bundle: &self.bundle,
            annotations: &self.described.annotations,
        }
    }

    /// The VM that it is made in, if it is and nobody is making it there right now.
    pub fn vm(&self) -> Option<Arc<Vm>> {
        match &*self.in_guest.try_lock().ok()? {
            InGuest::Made(vm) => Some(Arc::clone(vm)),
            InGuest::Later(_) => None,
        }
    }

    /// Its init for an empty id, else the exec with it.
    ///
    /// # Errors
    /// There is none.
    pub fn process(&self, exec: &str) -> Result<Arc<Process>, TaskError> {
        match exec {
            "" => Ok(Arc::clone(&self.init)),
            exec => Ok(Arc::clone(&self.exec(exec)?.process)),
        }
    }

    /// The exec with this id.
    ///
    /// # Errors
    /// There is none.
    pub fn exec(&self, id: &str) -> Result<Arc<Exec>, TaskError> {
        let execs = locked(&self.execs);
        let exec = execs.get(id).map(Arc::clone);
        exec.ok_or_else(|| TaskError::no_exec(&self.id, id))
    }

    /// Adds an exec.
    ///
    /// # Errors
    /// Its id is taken, or there are too many.
    pub fn add_exec(&self, exec: Exec) -> Result<(), TaskError> {
        let mut execs = locked(&self.execs);
        if execs.contains_key(&exec.id) {
            let text = format!("exec {} already exists", crate::error::shown(&exec.id));
            return Err(crate::error::refuse(Code::ALREADY_EXISTS, text));
        }
        if execs.len() >= EXECS_MAX {
            let text = format!("container {} has {EXECS_MAX} execs already", self.id);
            return Err(crate::error::refuse(Code::RESOURCE_EXHAUSTED, text));
        }
        execs.insert(exec.id.clone(), Arc::new(exec));
        Ok(())
    }

    /// Forgets an exec.
    pub fn forget_exec(&self, id: &str) {
        locked(&self.execs).remove(id);
    }

    /// How many OOM kills there are to be told, now that the guest counts `kills`: each is told once, the first [`OOMS_MAX`] at all.
    pub fn new_ooms(&self, kills: u64) -> u64 {
        let kills = kills.min(OOMS_MAX);
        let mut said = locked(&self.said_ooms);
        let new = kills.saturating_sub(*said);
        *said = (*said).max(kills);
        new
    }

    /// Lets go of what it has on the host; its streams are to be closed by the caller.
    pub fn release(&self) -> Vec<Pumps> {
        let mut pumps: Vec<Pumps> = locked(&self.execs)
            .values()
            .filter_map(|exec| exec.process.take_pumps())
            .collect();
        pumps.extend(self.init.take_pumps());
        let parked = locked(&self.parked).take();
        drop(parked);
        let placed = locked(&self.placed).take();
        drop(placed);
        pumps
    }
}
