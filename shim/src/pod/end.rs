//! Kill and Delete, and the end of the VM with the last container. They answer in time whatever the guest does: what the agent leaves
//! unanswered goes on behind the answer, and takes the VM down when its grace is over.

use super::run::init;
use super::{AGENT_GRACE_MS, Machine, Pod, Slot, in_time, locked, timestamp};
use crate::agent::{AgentError, Target};
use crate::cgroup::Cgroup;
use crate::container::{Container, InGuest};
use crate::error::{TaskError, chain};
use crate::events::Event;
use crate::hooks::{self, Status};
use crate::process::{Exit, Process, SIGKILL};
use crate::record::TaskRecord;
use crate::state::{State, Verb};
use crate::vm::Vm;
use capsid_owner::end::KILLED;
use containerd_shim_protos::events::task::TaskDelete;
use std::sync::Arc;
use std::time::Duration;
use ttrpc::Code;

/// Signals whose default action ends a process that is not there yet: HUP, INT, QUIT, KILL, TERM.
const ENDING: [u32; 5] = [1, 2, 3, SIGKILL, 15];

/// What a Delete leaves behind: the exit.
#[derive(Clone, Copy, Debug)]
pub struct Deleted {
    /// The task's pid.
    pub pid: u32,
    /// The exit of what was deleted.
    pub exit: Exit,
}

impl Pod {
    /// Sends a signal to a process, or to all of its container.
    ///
    /// # Errors
    /// NOT_FOUND: there is no such process, or it has ended. A guest that does not answer is no error; after SIGKILL it is taken down.
    pub async fn kill(
        self: &Arc<Self>,
        (id, exec_id): (&str, &str),
        signal: u32,
        all: bool,
    ) -> Result<(), TaskError> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        process.advance(Verb::Kill)?;
        if signal == 0 {
            return Ok(()); // only asks whether it is there (CRI-O)
        }
        let Some(vm) = container.vm().filter(|_| is_in_guest(&process, exec_id)) else {
            // Nothing runs yet that could handle a signal.
            if ENDING.contains(&signal) {
                let status = u8::try_from(128 + signal).unwrap_or(KILLED);
                self.tell_exit(&container, exec_id, Exit::now(status));
            } else {
                // Whoever starts it sends it then; to what is not being started, none is sent.
                process.note_signal(signal);
            }
            return Ok(());
        };
        if process.note_signal(signal) {
            return Ok(());
        }
        let (of, exec) = (Arc::clone(&container), exec_id.to_owned());
        let sent = in_time(send(vm, of, exec, signal, all)).await;
        match sent {
            // Without an answer it goes on behind ours: CRI's StopContainer would stop at an error, and never come to its SIGKILL.
            Some(Ok(()) | Err(AgentError::Lost { .. })) | None => Ok(()),
            Some(Err(AgentError::Refused {
                code: Code::NOT_FOUND,
                ..
            })) => Err(crate::state::Refusal::Gone.into()),
            Some(Err(error)) => Err(error.into()),
        }
    }

    /// Forgets an exec that has ended or never ran, or removes such a container.
    ///
    /// # Errors
    /// NOT_FOUND: there is none. FAILED_PRECONDITION: it runs.
    pub async fn delete(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<Deleted, TaskError> {
        self.give_up(id);
        let container = self.container(id)?;
        let pid = container.pid;
        if !exec_id.is_empty() {
            let exit = self.delete_exec(&container, exec_id).await?;
            return Ok(Deleted { pid, exit });
        }
        container.init.advance(Verb::Delete)?;
        let exit = self.exit_of_deleted(&container);
        let last = self.is_last(id);
        self.leaves(id);
        let (pod, of) = (Arc::clone(self), Arc::clone(&container));
        // Goes on if it takes longer; until then the id is not free and the shim does not end.
        let _done = in_time(async move {
            pod.remove(&of, last).await;
            pod.forget(&of.id);
        })
        .await;
        self.events.publish(Event::Delete(TaskDelete {
            container_id: id.to_owned(),
            pid,
            exit_status: exit.status.into(),
            exited_at: Some(timestamp(exit.at)).into(),
            ..Default::default()
        }));
        Ok(Deleted { pid, exit })
    }

    /// A container that is still being made, and is to be deleted: whoever makes it undoes it.
    fn give_up(&self, id: &str) {
        let mut table = locked(&self.containers);
        if let Some(Slot::Creating { unwanted }) = table.slots.get_mut(id) {
            *unwanted = true;
        }
    }

    async fn delete_exec(
        self: &Arc<Self>,
        container: &Arc<Container>,
        exec_id: &str,
    ) -> Result<Exit, TaskError> {
        let exec = container.exec(exec_id)?;
        let before = exec.process.advance(Verb::Delete)?;
        let exit = exec.process.exit().unwrap_or_else(|| Exit::now(KILLED));
        if let (State::Stopped, Some(vm)) = (before, container.vm()) {
            let (of, id) = (Arc::clone(container), exec_id.to_owned());
            // An exec that the guest does not forget now goes with its container.
            let _forgotten = in_time(async move {
                let target = Target {
                    container: &of.id,
                    exec: &id,
                };
                vm.agent().delete(target).await
            })
            .await;
        }
        // For whoever waits for one that never ran.
        exec.process.ended(exit);
        self.close(exec.process.take_pumps());
        container.forget_exec(exec_id);
        Ok(exit)
    }

    /// The exit of a container that is about to go; one that never ran was killed.
    fn exit_of_deleted(&self, container: &Container) -> Exit {
        if let Some(exit) = container.init.exit() {
            return exit;
        }
        let exit = Exit::now(KILLED);
        self.tell_exit(container, "", exit);
        container.init.exit().unwrap_or(exit)
    }

    pub(super) fn is_last(&self, id: &str) -> bool {
        let containers = locked(&self.containers);
        let mut others = containers.slots.iter().filter(|(other, _)| *other != id);
        others.all(|(_, slot)| matches!(slot, Slot::Leaving))
    }

    fn leaves(&self, id: &str) {
        if let Some(slot) = locked(&self.containers).slots.get_mut(id) {
            *slot = Slot::Leaving;
        }
    }

    /// Removes a container in the guest and on the host, and the VM with the last one.
    pub(super) async fn remove(self: &Arc<Self>, container: &Arc<Container>, last: bool) {
        let vm = match &*container.in_guest.lock().await {
            InGuest::Made(vm) => Some(Arc::clone(vm)),
            InGuest::Later(_) => None,
        };
        match vm {
            // What it wrote is with the host since it ended.
            _ if last => self.end_vm().await,
            Some(vm) if !vm.has_ended() => remove_in_guest(&vm, container).await,
            _ => {}
        }
        self.close(container.release());
        self.run_stop_hooks(container).await;
    }

    async fn run_stop_hooks(&self, container: &Container) {
        // First: they run once, even if this process does not live to see it.
        TaskRecord::remove(&container.bundle);
        let state = container.state_for_hooks(Status::Stopped);
        for error in hooks::run_each(&container.hooks.stopped, &state).await {
            // The container is gone all the same.
            tracing::warn!(container = container.id, error = chain(&error), "poststop");
        }
    }

    /// Ends the VM, and forgets what it was to be like, if the pod has no container but this one, which could not be made.
    pub(super) async fn end_vm_if_last(&self, id: &str) {
        if self.is_last(id) {
            self.end_vm().await;
        }
    }

    /// Ends the VM and all that goes with it.
    pub async fn end_vm(&self) {
        let machine = self.machine.lock().await.take();
        if let Some(Machine { vm, cgroup }) = machine {
            vm.kill();
            vm.ended().await;
            if let Some(cgroup) = cgroup {
                remove_cgroup(cgroup).await;
            }
        }
        *locked(&self.wished) = None;
    }
}

/// A container's init is in the guest when the container is; an exec once it was started.
fn is_in_guest(process: &Process, exec_id: &str) -> bool {
    exec_id.is_empty() || process.state() != State::Created
}

pub(super) async fn send(
    vm: Arc<Vm>,
    container: Arc<Container>,
    exec: String,
    signal: u32,
    all: bool,
) -> Result<(), AgentError> {
    let target = Target {
        container: &container.id,
        exec: &exec,
    };
    let grace = Duration::from_millis(AGENT_GRACE_MS);
    let sent = tokio::time::timeout(grace, vm.agent().signal(target, signal, all)).await;
    let lost = matches!(sent, Err(_) | Ok(Err(AgentError::Lost { .. })));
    if lost && signal != SIGKILL {
        tracing::warn!(
            container = container.id,
            signal,
            "the guest has not taken a signal"
        );
    }
    if lost && signal == SIGKILL {
        tracing::warn!(
            container = container.id,
            "the guest takes no SIGKILL: its VM is killed"
        );
        vm.kill();
    }
    sent.unwrap_or_else(|_| {
        Err(AgentError::Lost {
            call: "send the signal",
            text: "no answer".to_owned(),
        })
    })
}

async fn remove_in_guest(vm: &Vm, container: &Container) {
    let grace = Duration::from_millis(AGENT_GRACE_MS);
    let removed = tokio::time::timeout(grace, async {
        match vm.agent().delete(init(container)).await {
            // It runs, though nobody here knows of it: a Start whose answer was lost.
            Err(AgentError::Refused {
                code: Code::FAILED_PRECONDITION,
                ..
            }) => {
                vm.agent().signal(init(container), SIGKILL, true).await?;
                vm.agent().wait(init(container)).await?;
                vm.agent().delete(init(container)).await
            }
            deleted => deleted,
        }
    });
    match removed.await {
        Ok(Ok(())) => {}
        Ok(Err(AgentError::Refused { text, .. })) => {
            tracing::warn!(
                container = container.id,
                text,
                "the guest does not remove it"
            );
        }
        _ => {
            tracing::warn!(
                container = container.id,
                "the guest does not answer: its VM is killed"
            );
            vm.kill();
        }
    }
}

/// Waits for the kernel on another thread.
pub(super) async fn remove_cgroup(cgroup: Cgroup) {
    let removed = tokio::task::spawn_blocking(move || cgroup.remove()).await;
    if let Ok(Err(error)) = removed {
        tracing::warn!(error = chain(&error), "removing the VM's cgroup");
    }
}
