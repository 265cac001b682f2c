//! How a container comes to be: checked, given a place, launched, watched. What fails leaves nothing.

use super::{CONTAINERS_MAX_COUNT, Sandbox, Slot, blocking, bounded_id, clean, whole};
use crate::birth::{launch_init, launch_pause, not_executed};
use crate::cgroup::Cgroup;
use crate::container::{Container, Directories};
use crate::error::{Result, SandboxError, io_error};
use crate::events::OomWatch;
use crate::last_words;
use crate::pending::StreamIds;
use crate::process::Process;
use crate::spec::{self, ContainerSpec};
use crate::stdio::HostStreams;
use capsid_protocol::machine::is_id;
use rustix::process::Signal;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

/// What the host wants.
#[derive(Clone, Copy, Debug)]
pub enum Wish<'a> {
    /// The pause container of a pod.
    Pause,
    /// A container for a program.
    Program {
        /// OCI config.json.
        spec: &'a [u8],
        /// The container whose pid namespace it is born into; `None`: one of its own.
        pid_namespace_of: Option<&'a str>,
    },
}

/// The same, checked.
enum Plan {
    Pause,
    Program {
        checked: Box<ContainerSpec>,
        pid_namespace_of: Option<Arc<Container>>,
    },
}

impl Sandbox {
    /// Creates a container up to, not including, its program.
    ///
    /// # Errors
    /// A refused id or spec, a missing stream, or what the runtime process says; nothing is left then.
    pub async fn create(self: &Arc<Self>, id: &str, wish: Wish<'_>, ids: StreamIds) -> Result<u32> {
        let claim = self.pending.claim(ids);
        if !is_id(id) {
            return Err(SandboxError::BadId(bounded_id(id)));
        }
        let plan = self.plan(id, wish)?;
        let place = self.reserve(id)?;
        if let Plan::Program { checked, .. } = &plan {
            self.share.mounted_for(&checked.root).await?;
            self.shm.mounted_for(checked).await?;
        }
        let streams = claim.take().await?;
        let sandbox = Arc::clone(self);
        whole(async move {
            match sandbox.create_reserved(&place, plan, streams).await {
                Ok(container) => {
                    let pid = container.init.pid;
                    place.fill(container);
                    Ok(pid)
                }
                Err(error) => {
                    let id = place.id.clone();
                    let forgotten = blocking(move || {
                        let forgotten = sandbox.share.forget(&id);
                        forgotten.map_err(io_error("unmounting its part of the share"))
                    });
                    if let Err(e) = forgotten.await {
                        last_words::warn(&last_words::chain(&e));
                    }
                    Err(error)
                }
            }
        })
        .await
    }

    fn plan(&self, id: &str, wish: Wish<'_>) -> Result<Plan> {
        let Wish::Program {
            spec,
            pid_namespace_of,
        } = wish
        else {
            return Ok(Plan::Pause);
        };
        let checked = Box::new(spec::container(id, spec)?);
        let of = pid_namespace_of.map(|of| {
            let why = || format!("pid_namespace_of: there is no container {}", bounded_id(of));
            self.container(of).map_err(|_| SandboxError::Wrong(why()))
        });
        Ok(Plan::Program {
            checked,
            pid_namespace_of: of.transpose()?,
        })
    }

    fn reserve(self: &Arc<Self>, id: &str) -> Result<Place> {
        let mut table = self.table();
        if table.contains_key(id) {
            return Err(SandboxError::Exists(format!("container {id}")));
        }
        if table.len() >= CONTAINERS_MAX_COUNT {
            let why = format!("there are {CONTAINERS_MAX_COUNT} containers already");
            return Err(SandboxError::Full(why));
        }
        table.insert(id.into(), Slot::Creating);
        Ok(Place {
            sandbox: Arc::clone(self),
            id: id.into(),
            filled: false,
        })
    }

    async fn create_reserved(
        &self,
        place: &Place,
        plan: Plan,
        streams: HostStreams,
    ) -> Result<Container> {
        let _turn = self.launches.acquire().await;
        let cgroup = Cgroup::of(&self.places.cgroup_root, &place.id);
        let id = place.id.clone();
        let (root, own_pids) = plan.facts();
        let (run, launcher) = (self.places.run.clone(), Arc::clone(&self.launcher));
        let (made, cgroup_of) = (id.clone(), cgroup.clone());
        let (launched, stdio, directories, memory_events) = blocking(move || {
            // One that a dead agent left would be used again; as seen with Linux 6.12.107, whoever is born by
            // CLONE_INTO_CGROUP into a cgroup that was once killed through cgroup.kill dies at once.
            cgroup_of.remove()?;
            let directories =
                Directories::make(&run, &made).map_err(io_error("making its directories"))?;
            let launched = match plan {
                Plan::Pause => launch_pause(&launcher, &cgroup_of, streams),
                Plan::Program {
                    checked,
                    pid_namespace_of: of,
                } => launch_init(
                    &launcher,
                    (&made, &directories),
                    *checked,
                    of.as_deref(),
                    streams,
                ),
            };
            let (launched, stdio) = launched.inspect_err(|_| clean(&cgroup_of))?;
            let memory_events = cgroup_of
                .memory_events()
                .inspect_err(|_| clean(&cgroup_of))?;
            Ok((launched, stdio, directories, memory_events))
        })
        .await?;
        // With PID 1 of a namespace all in it end; with any other init it alone would.
        let ends = (!own_pids).then(|| cgroup.clone());
        let adopted = Process::adopt(launched, stdio, ends);
        let adopted = adopted.map_err(io_error("connecting its streams"));
        let init = match adopted {
            Ok((init, report)) if root.is_none() => in_place(init, report).await,
            Ok((init, report)) => Ok((init, Some(report))),
            Err(error) => Err(error),
        };
        let init = match init {
            Ok(init) => init,
            Err(error) => {
                blocking(move || {
                    clean(&cgroup);
                    Ok(())
                })
                .await?;
                return Err(error);
            }
        };
        let events = Arc::clone(&self.events);
        let oom = OomWatch::start(&id, cgroup.clone(), memory_events, events);
        let places = (cgroup, directories);
        Ok(Container::new((id, root), places, init, oom))
    }
}

impl Plan {
    /// The root file system, if there is to be one, and whether it has a pid namespace of its own.
    fn facts(&self) -> (Option<PathBuf>, bool) {
        match self {
            Plan::Pause => (None, true),
            Plan::Program {
                checked,
                pid_namespace_of,
            } => {
                let own_pids = checked.own_pids && pid_namespace_of.is_none();
                (Some(checked.root.clone()), own_pids)
            }
        }
    }
}

/// The pause process, once it has said that it is there.
async fn in_place(init: Process, report: OwnedFd) -> Result<(Process, Option<OwnedFd>)> {
    match init.executed(report).await {
        Ok(()) => Ok((init, None)),
        Err(why) => {
            // Already dying, or stuck: the end is the same.
            let _ = init.signal(Signal::KILL);
            Err(not_executed(why))
        }
    }
}

/// A reserved container id: given back unless the container comes to be.
#[derive(Debug)]
struct Place {
    sandbox: Arc<Sandbox>,
    id: String,
    filled: bool,
}

impl Place {
    fn fill(mut self, container: Container) {
        self.filled = true;
        let there = Slot::There(Arc::new(container));
        self.sandbox.table().insert(self.id.clone(), there);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.filled {
            self.sandbox.table().remove(&self.id);
        }
    }
}
