//! What changes little or nothing: State, Pids, Stats, Wait, Pause, Resume, Update, Exec, ResizePty, CloseIO.

use super::{ANSWER_MS, Pod, locked};
use crate::agent::Target;
use crate::container::{Container, Exec, InGuest};
use crate::error::{TaskError, refuse, shown};
use crate::events::Event;
use crate::process::{Exit, Process, Streams};
use crate::state::{State, Verb};
use capsid_protocol::agent::StatsResponse;
use containerd_shim_protos::events::task::{TaskExecAdded, TaskPaused, TaskResumed};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use ttrpc::Code;

/// Most devices of a guest in its figures: what the protocol has.
const DEVICES_MAX: usize = 64;

/// A process, as containerd asks for it.
#[derive(Clone, Debug)]
pub struct Status {
    /// Its container's bundle.
    pub bundle: PathBuf,
    /// The task's pid.
    pub pid: u32,
    /// Where it is.
    pub state: State,
    /// Its exit, if it has ended.
    pub exit: Option<Exit>,
    /// Its streams.
    pub streams: Streams,
}

impl Pod {
    /// How a process is.
    ///
    /// # Errors
    /// There is none.
    pub fn status(&self, id: &str, exec_id: &str) -> Result<Status, TaskError> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        let mut state = process.state();
        // An exec is frozen with its container.
        if state == State::Running && container.init.state() == State::Paused {
            state = State::Paused;
        }
        Ok(Status {
            bundle: container.bundle.clone(),
            pid: container.pid,
            state,
            exit: process.exit(),
            streams: process.streams.clone(),
        })
    }

    /// Waits for the end of a process.
    ///
    /// # Errors
    /// There is none.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit, TaskError> {
        let process = self.container(id)?.process(exec_id)?;
        let exit = process.wait().await;
        exit.ok_or_else(|| refuse(Code::INTERNAL, "the process is forgotten"))
    }

    /// Adds an exec.
    ///
    /// # Errors
    /// Its id is taken or none, or the container does not run.
    pub fn add_exec(
        &self,
        (id, exec_id): (&str, &str),
        streams: Streams,
        process_json: Vec<u8>,
    ) -> Result<(), TaskError> {
        let container = self.container(id)?;
        if !capsid_protocol::machine::is_id(exec_id) {
            let text = format!(
                "exec id {}: Capsid takes 1 to 64 characters of A-Z, a-z, 0-9, '_', '.' and '-'",
                shown(exec_id)
            );
            return Err(refuse(Code::INVALID_ARGUMENT, text));
        }
        container.init.advance(Verb::Exec)?;
        container.add_exec(Exec {
            id: exec_id.to_owned(),
            process: Arc::new(Process::new(streams)),
            json: Mutex::new(Some(process_json)),
        })?;
        self.events.publish(Event::ExecAdded(TaskExecAdded {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        }));
        Ok(())
    }

    /// Freezes a container.
    ///
    /// # Errors
    /// It does not run, or cannot be frozen.
    pub async fn pause(&self, id: &str) -> Result<(), TaskError> {
        let container = self.container(id)?;
        let _turn = container.freezing.lock().await;
        container.init.advance(Verb::Pause)?;
        let frozen = freeze(&container, true).await;
        frozen.inspect_err(|_| container.init.retreat(State::Paused, State::Running))?;
        self.events.publish(Event::Paused(TaskPaused {
            container_id: id.to_owned(),
            ..Default::default()
        }));
        Ok(())
    }

    /// Lets a frozen container go on.
    ///
    /// # Errors
    /// It is not frozen.
    pub async fn resume(&self, id: &str) -> Result<(), TaskError> {
        let container = self.container(id)?;
        let _turn = container.freezing.lock().await;
        container.init.advance(Verb::Resume)?;
        let thawed = freeze(&container, false).await;
        thawed.inspect_err(|_| container.init.retreat(State::Running, State::Paused))?;
        self.events.publish(Event::Resumed(TaskResumed {
            container_id: id.to_owned(),
            ..Default::default()
        }));
        Ok(())
    }

    /// Sets limits of a container; before the guest knows it, they wait for that.
    ///
    /// # Errors
    /// It has ended, or the guest refuses.
    pub async fn update(&self, id: &str, resources_json: Vec<u8>) -> Result<(), TaskError> {
        let container = self.container(id)?;
        container.init.advance(Verb::Update)?;
        let in_guest = container.in_guest.lock().await;
        match &*in_guest {
            InGuest::Made(vm) => {
                let vm = Arc::clone(vm);
                drop(in_guest);
                Ok(vm.agent().update(id, resources_json).await?)
            }
            InGuest::Later(_) => {
                *locked(&container.limits) = Some(resources_json);
                Ok(())
            }
        }
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// It has none, or is not there.
    pub async fn resize(
        &self,
        (id, exec_id): (&str, &str),
        (columns, rows): (u32, u32),
    ) -> Result<(), TaskError> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        // As with runc, a size that comes before the process or after it is not an error.
        let (State::Running | State::Paused, Some(vm)) = (process.state(), container.vm()) else {
            return Ok(());
        };
        let target = Target {
            container: id,
            exec: exec_id,
        };
        Ok(vm.agent().resize(target, columns, rows).await?)
    }

    /// Ends a process's input.
    ///
    /// # Errors
    /// There is no such process.
    pub fn close_stdin(&self, id: &str, exec_id: &str) -> Result<(), TaskError> {
        self.container(id)?.process(exec_id)?.close_stdin();
        Ok(())
    }

    /// The figures of a container: new ones if the guest answers in time, else the last.
    ///
    /// # Errors
    /// There is no such container, or there have never been any.
    pub async fn figures(&self, id: &str) -> Result<StatsResponse, TaskError> {
        let container = self.container(id)?;
        let Some(vm) = container.vm() else {
            return Ok(StatsResponse::default());
        };
        let asked = Arc::clone(&container);
        // Never two at a time: a guest that does not answer is asked once.
        if let Ok(turn) = Arc::clone(&container.asking).try_lock_owned() {
            let asking = tokio::spawn(async move {
                let answer = vm.agent().stats(&asked.id).await;
                if let Ok(mut figures) = answer {
                    figures.io.truncate(DEVICES_MAX);
                    *locked(&asked.figures) = Some(figures);
                }
                drop(turn);
            });
            // What comes too late is for the next one who asks.
            let _in_time = tokio::time::timeout(Duration::from_millis(ANSWER_MS), asking).await;
        }
        let figures = locked(&container.figures).clone();
        figures.ok_or_else(|| refuse(Code::UNAVAILABLE, "the guest has not told any figures yet"))
    }
}

async fn freeze(container: &Container, frozen: bool) -> Result<(), TaskError> {
    let Some(vm) = container.vm() else {
        let text = format!("container {} is not in its VM", container.id);
        return Err(refuse(Code::FAILED_PRECONDITION, text));
    };
    Ok(vm.agent().freeze(&container.id, frozen).await?)
}
