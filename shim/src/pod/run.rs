//! From a container that is known to one that runs, and the watch over each process until its end.

use super::end::{remove_cgroup, send};
use super::{Machine, Pod, Wished, locked, timestamp};
use crate::agent::{AgentError, Target};
use crate::cgroup::{Cgroup, CgroupPath, Hierarchy};
use crate::container::{Container, Exec, InGuest};
use crate::error::{TaskError, chain, internal, invalid, refuse};
use crate::events::Event;
use crate::hooks::Status;
use crate::process::{Exit, Process, SIGKILL};
use crate::record::{Record, Started};
use crate::sizing::Size;
use crate::spec::{GuestSpec, PidNamespace};
use crate::state::Verb;
use crate::stdio::{GuestEnds, Outputs, Stdio, StdioError, Wanted};
use crate::vm::Vm;
use capsid_owner::end::UNKNOWN;
use capsid_owner::files::Part;
use capsid_owner::machine::Parts;
use capsid_protocol::agent::{self as api, CreateContainerRequest};
use containerd_shim_protos::events::task::{TaskExecStarted, TaskExit, TaskStart};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use ttrpc::Code;

/// How long after its agent was lost a VM may take to end by itself, in ms: a guest that panics takes its agent along first.
const LOST_GRACE_MS: u64 = 10_000;
/// How long after an event of the guest's the next one is asked for, in ms.
const EVENT_PAUSE_MS: u64 = 20;
/// The exit of a process whose start failed for a reason of ours.
const NOT_STARTED: u8 = 128;

impl Pod {
    /// Starts a container that was created; the task's pid.
    ///
    /// # Errors
    /// It is not in the state for it, the VM does not boot, or the guest refuses.
    pub async fn start(self: &Arc<Self>, id: &str) -> Result<u32, TaskError> {
        let container = self.container(id)?;
        container.init.advance(Verb::Start)?;
        let started = self.start_init(&container).await;
        if let Err(error) = &started {
            tracing::warn!(container = id, %error, "not started");
            // What was being started has come to its end, whatever is left of it.
            self.tell_exit(&container, "", Exit::now(NOT_STARTED));
        }
        started.map(|()| container.pid)
    }

    async fn start_init(self: &Arc<Self>, container: &Arc<Container>) -> Result<(), TaskError> {
        let vm = self.made_in_guest(container).await?;
        if container.init.exit().is_some() {
            // Killed while the VM booted.
            return Err(crate::state::Refusal::Gone.into());
        }
        let started = vm.agent().start(&container.id).await;
        if let Err(AgentError::Lost { .. }) = started {
            // It may run, though Start is to fail.
            let of = Arc::clone(container);
            tokio::spawn(send(Arc::clone(&vm), of, String::new(), SIGKILL, true));
        }
        started?;
        if let Err(error) =
            Pod::run_hooks(container, &container.hooks.started, Status::Running).await
        {
            // As with runc: a container whose poststart hook fails is ended.
            let killed = vm.agent().signal(init(container), SIGKILL, true).await;
            if let Err(error) = killed {
                tracing::warn!(container = container.id, %error, "ending it");
            }
            return Err(internal(&error));
        }
        self.events.publish(Event::Start(TaskStart {
            container_id: container.id.clone(),
            pid: container.pid,
            ..Default::default()
        }));
        container.init.advance(Verb::Started)?;
        self.send_noted(&vm, container, "", &container.init);
        Ok(())
    }

    /// Sends what came while a process was being started.
    fn send_noted(
        &self,
        vm: &Arc<Vm>,
        container: &Arc<Container>,
        exec_id: &str,
        process: &Process,
    ) {
        if let Some(signal) = process.take_noted() {
            let (vm, container) = (Arc::clone(vm), Arc::clone(container));
            let exec = exec_id.to_owned();
            tokio::spawn(async move {
                // What became of it is in the log.
                let _sent = send(vm, container, exec, signal, false).await;
            });
        }
    }

    /// Has the container made in the guest, with a VM that boots if there is none, unless it is there already.
    pub(super) async fn made_in_guest(
        self: &Arc<Self>,
        container: &Arc<Container>,
    ) -> Result<Arc<Vm>, TaskError> {
        let mut in_guest = container.in_guest.lock().await;
        let spec = match &mut *in_guest {
            InGuest::Made(vm) => return Ok(Arc::clone(vm)),
            InGuest::Later(spec) => spec,
        };
        let vm = self.vm().await?;
        self.make_in(&vm, container, spec).await?;
        *in_guest = InGuest::Made(Arc::clone(&vm));
        drop(in_guest);
        self.watch(container, String::new(), &container.init, &vm);
        let limits = locked(&container.limits).take();
        if let Some(json) = limits {
            vm.agent().update(&container.id, json).await?;
        }
        Ok(vm)
    }

    async fn make_in(
        &self,
        vm: &Arc<Vm>,
        container: &Container,
        spec: &mut GuestSpec,
    ) -> Result<(), TaskError> {
        let pid_namespace_of = match spec.pid_namespace {
            PidNamespace::Own => String::new(),
            PidNamespace::OfTask(pid) => {
                let other = self.container_of_pid(pid);
                let other = other.ok_or_else(|| {
                    let text = format!("no container of this pod has the task pid {pid}");
                    refuse(Code::FAILED_PRECONDITION, text)
                })?;
                other.id.clone()
            }
        };
        let stdio = self.streams(vm, &container.init, &container.id).await?;
        let request = CreateContainerRequest {
            container_id: container.id.clone(),
            // It may be tried again only after a new Create.
            spec_json: std::mem::take(&mut spec.json),
            stdio: Some(stdio).into(),
            pause: container.is_pause,
            pid_namespace_of,
            ..Default::default()
        };
        vm.agent().create(request).await?;
        Ok(())
    }

    /// Opens a process's streams on both sides and connects them.
    async fn streams(&self, vm: &Vm, process: &Process, id: &str) -> Result<api::Stdio, TaskError> {
        let opened = Stdio::open(process.streams.urls(id, &self.namespace)).await;
        let opened = opened.map_err(|error| match error {
            StdioError::Name { .. } => invalid(&error),
            error => internal(&error),
        })?;
        let Wanted {
            stdin,
            stdout,
            stderr,
        } = opened.wanted();
        let mut ids = api::Stdio::default();
        let dial = |wanted: bool, number: &mut u64| match wanted {
            false => Ok(None),
            true => vm.stream().map(|(stream, end)| {
                *number = stream;
                Some(end)
            }),
        };
        let ends = (|| {
            Ok::<_, std::io::Error>(GuestEnds {
                stdin: dial(stdin, &mut ids.stdin)?,
                stdout: dial(stdout, &mut ids.stdout)?,
                stderr: dial(stderr, &mut ids.stderr)?,
            })
        })();
        let ends = ends.map_err(|cause| {
            let text = format!("cannot open streams to the guest: {cause}");
            refuse(Code::UNAVAILABLE, text)
        })?;
        let pumps = opened.join(ends).map_err(|error| internal(&error))?;
        process.connected(pumps);
        Ok(ids)
    }

    /// Starts an exec that was added; the task's pid.
    ///
    /// # Errors
    /// As for [`Pod::start`].
    pub async fn start_exec(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32, TaskError> {
        let container = self.container(id)?;
        let exec = container.exec(exec_id)?;
        container.init.advance(Verb::Exec)?;
        exec.process.advance(Verb::Start)?;
        if let Err(error) = self.run_exec(&container, &exec).await {
            self.tell_exit(&container, exec_id, Exit::now(NOT_STARTED));
            return Err(error);
        }
        Ok(container.pid)
    }

    async fn run_exec(
        self: &Arc<Self>,
        container: &Arc<Container>,
        exec: &Exec,
    ) -> Result<(), TaskError> {
        let json = locked(&exec.json).take().unwrap_or_default();
        let Some(vm) = container.vm() else {
            let text = format!("container {} is not in its VM", container.id);
            return Err(refuse(Code::FAILED_PRECONDITION, text));
        };
        let stdio = self.streams(&vm, &exec.process, &exec.id).await?;
        let target = Target {
            container: &container.id,
            exec: &exec.id,
        };
        let started = vm.agent().exec(target, json, stdio).await;
        if let Err(AgentError::Lost { .. }) = started {
            // It may run, and nobody would watch it.
            let (of, exec_id) = (Arc::clone(container), exec.id.clone());
            tokio::spawn(send(Arc::clone(&vm), of, exec_id, SIGKILL, false));
        }
        started?;
        self.events.publish(Event::ExecStarted(TaskExecStarted {
            container_id: container.id.clone(),
            exec_id: exec.id.clone(),
            pid: container.pid,
            ..Default::default()
        }));
        exec.process.advance(Verb::Started)?;
        self.send_noted(&vm, container, &exec.id, &exec.process);
        self.watch(container, exec.id.clone(), &exec.process, &vm);
        Ok(())
    }

    /// Waits for a process's end in a task of its own, and tells it once all that it wrote was passed on.
    fn watch(
        self: &Arc<Self>,
        container: &Arc<Container>,
        exec_id: String,
        process: &Arc<Process>,
        vm: &Arc<Vm>,
    ) {
        let (pod, container) = (Arc::clone(self), Arc::clone(container));
        let (process, vm) = (Arc::clone(process), Arc::clone(vm));
        tokio::spawn(async move {
            let target = Target {
                container: &container.id,
                exec: &exec_id,
            };
            let (status, oom_kills) = end_of(&vm, target).await;
            let outputs = process.outputs_done().await;
            if outputs != Outputs::Written {
                tracing::warn!(
                    container = container.id,
                    exec_id,
                    ?outputs,
                    "not all output was taken"
                );
            }
            process.settled().await;
            pod.tell_ooms(&container, oom_kills);
            pod.tell_exit(&container, &exec_id, Exit::now(status));
        });
    }

    /// A process has ended: everybody who waits is told, and containerd once.
    pub(super) fn tell_exit(&self, container: &Container, exec_id: &str, exit: Exit) {
        let Ok(process) = container.process(exec_id) else {
            return; // forgotten meanwhile
        };
        if !process.ended(exit) {
            return;
        }
        let id = if exec_id.is_empty() {
            &container.id
        } else {
            exec_id
        };
        self.events.publish(Event::Exit(TaskExit {
            container_id: container.id.clone(),
            id: id.to_owned(),
            pid: container.pid,
            exit_status: exit.status.into(),
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        }));
    }

    /// The pod's VM; it boots if there is none.
    async fn vm(self: &Arc<Self>) -> Result<Arc<Vm>, TaskError> {
        let mut machine = self.machine.lock().await;
        if let Some(Machine { vm, .. }) = &*machine {
            return match vm.has_ended() {
                false => Ok(Arc::clone(vm)),
                true => {
                    let reason = vm.ended().await.reason_in_one_line();
                    let text = format!("the VM of the pod has ended: {reason}");
                    Err(refuse(Code::FAILED_PRECONDITION, text))
                }
            };
        }
        let booted = self.boot().await?;
        let vm = Arc::clone(&booted.vm);
        *machine = Some(booted);
        self.watch_vm(&vm);
        Ok(vm)
    }

    async fn boot(&self) -> Result<Machine, TaskError> {
        let wished = locked(&self.wished).clone();
        let Some(wished) = wished else {
            return Err(refuse(
                Code::FAILED_PRECONDITION,
                "no container was created",
            ));
        };
        let size = wished.size;
        let usable = self.config()?.check_kvm();
        usable.map_err(|error| refuse(Code::FAILED_PRECONDITION, chain(&error)))?;
        let began = Instant::now();
        // Before there is such a cgroup: whoever kills this process then leaves a note of it.
        self.record(|record| record.cgroup = wished.cgroup.as_ref().map(ToString::to_string))?;
        let cgroup = match wished.cgroup.clone() {
            Some(place) => Some(make_cgroup(place).await?),
            None => None,
        };
        let booted = self.boot_in(cgroup.as_ref(), &wished).await;
        let (vm, guest) = match booted {
            Ok(booted) => booted,
            Err(error) => {
                if let Some(cgroup) = cgroup {
                    remove_cgroup(cgroup).await;
                }
                return Err(error);
            }
        };
        // It has the shim's until now, which the kernel spares.
        let score = format!("/proc/{}/oom_score_adj", vm.pid());
        if let Err(cause) = std::fs::write(&score, wished.oom_score_adj.to_string()) {
            tracing::warn!(%cause, score, "the VMM keeps the shim's OOM score");
        }
        tracing::info!(
            pod = self.id,
            vmm_pid = vm.pid(),
            memory_mib = size.memory.get(),
            cpus = size.cpus.get(),
            kernel = %capsid_owner::escape::Line(guest.kernel_release.as_bytes()),
            boot_ms = began.elapsed().as_secs_f64() * 1e3,
            "the VM has booted"
        );
        Ok(Machine {
            vm: Arc::new(vm),
            cgroup,
        })
    }

    async fn boot_in(
        &self,
        cgroup: Option<&Cgroup>,
        wished: &Wished,
    ) -> Result<(Vm, api::StartSandboxResponse), TaskError> {
        let entrance = cgroup.map(Cgroup::entrance).transpose();
        let entrance = entrance.map_err(|error| internal(&error))?.map(File::from);
        let share = self.tree().await?.copy().await;
        let share = share.map_err(|error| internal(&error))?;
        let parts = self.parts(&wished.size, share, entrance)?;
        let limit = self.config()?.boot_timeout;
        let booted = Vm::boot(parts, limit, (&wished.hostname, &wished.sysctls)).await;
        let (vm, guest) = booted.map_err(|error| refuse(Code::UNAVAILABLE, chain(&error)))?;
        self.record(|record| record.vmm = Started::now(vm.pid()))?;
        Ok((vm, guest))
    }

    fn parts(&self, size: &Size, share: OwnedFd, cgroup: Option<File>) -> Result<Parts, TaskError> {
        let find = |part: Part, named| {
            let found = part.find(named);
            found.map_err(|error| refuse(Code::FAILED_PRECONDITION, chain(&error)))
        };
        let open = |part: Part, named| {
            let opened = part.open(&find(part, named)?);
            opened.map_err(|error| refuse(Code::FAILED_PRECONDITION, chain(&error)))
        };
        let config = self.config()?;
        Ok(Parts {
            id: self.id.clone(),
            vmm: find(Part::Vmm, config.vmm.as_deref())?,
            kernel: open(Part::Kernel, config.kernel.as_deref())?,
            initramfs: open(Part::Initramfs, config.initramfs.as_deref())?,
            share: Some(share),
            cpus: size.cpus,
            memory: size.memory,
            console: config.debug_console,
            cgroup,
        })
    }

    /// Notes what the `delete` action would have to end.
    fn record(&self, note: impl FnOnce(&mut Record)) -> Result<(), TaskError> {
        let mut record = locked(&self.record);
        note(&mut record);
        let written = record.write(&self.bundle);
        written.map_err(|cause| {
            let text = format!("writing what `delete` needs into the bundle: {cause}");
            refuse(Code::INTERNAL, text)
        })
    }

    /// Tells what the agent tells, and says why the VM ended.
    fn watch_vm(self: &Arc<Self>, vm: &Arc<Vm>) {
        let (pod, of) = (Arc::downgrade(self), Arc::clone(vm));
        tokio::spawn(async move {
            while let Ok(event) = of.agent().next_event().await {
                // A guest that always has one does not keep this process busy.
                tokio::time::sleep(Duration::from_millis(EVENT_PAUSE_MS)).await;
                let Some(pod) = pod.upgrade() else { return };
                if let Some(api::event::Kind::OomKill(kill)) = event.kind {
                    // One that the guest made up has no container.
                    if let Ok(container) = pod.container(&kill.container_id) {
                        pod.tell_ooms(&container, kill.oom_kills);
                    }
                }
            }
        });
        let (id, of) = (self.id.clone(), Arc::clone(vm));
        tokio::spawn(async move {
            let ended = of.ended().await;
            tracing::info!(pod = id, reason = ended.reason(), "the VM has ended");
        });
    }
}

/// On another thread: the kernel may take its time.
async fn make_cgroup(place: CgroupPath) -> Result<Cgroup, TaskError> {
    let make = move || Hierarchy::find().and_then(|hierarchy| hierarchy.make(&place));
    let made = tokio::task::spawn_blocking(make).await;
    let made = made.map_err(|_| refuse(Code::INTERNAL, "making the cgroup was cut short"))?;
    made.map_err(|error| refuse(Code::FAILED_PRECONDITION, chain(&error)))
}

pub(super) fn init(container: &Container) -> Target<'_> {
    Target {
        container: &container.id,
        exec: "",
    }
}

/// The end of a process: what the agent says, or what the end of the VM says when the agent cannot. Never 0 by default.
async fn end_of(vm: &Vm, target: Target<'_>) -> (u8, u64) {
    let told = tokio::select! {
        biased;
        told = vm.agent().wait(target) => Some(told),
        _ended = vm.ended() => None,
    };
    match told {
        Some(Ok(exit)) => return (exit.status, exit.oom_kills),
        // An agent that answers is not lost, whatever it knows of this process.
        Some(Err(AgentError::Refused { .. } | AgentError::Exec { .. })) => return (UNKNOWN, 0),
        Some(Err(AgentError::Lost { .. })) | None => {}
    }
    let grace = Duration::from_millis(LOST_GRACE_MS);
    if tokio::time::timeout(grace, vm.ended()).await.is_err() {
        tracing::warn!("the agent is lost and its VM goes on: it is killed");
        vm.kill();
    }
    (vm.ended().await.how.command_exit(), 0)
}
