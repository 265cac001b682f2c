//! One container: its state, its init, its execs, its directories and its cgroup. Locks here are held
//! for a look or a move, never over anything that waits.

use crate::cgroup::Cgroup;
use crate::events::OomWatch;
use crate::process::Process;
use crate::state::{Refusal, State, Verb};
use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most execs of one container at a time, ended ones that nobody deleted included.
const EXECS_MAX_COUNT: usize = 1024;

/// The directories of a container on the guest's tmpfs; removed with it.
#[derive(Debug)]
pub struct Directories {
    /// config.json, sockets, exec processes.
    pub bundle: PathBuf,
    /// Under which libcontainer makes a directory named like the container.
    pub state_root: PathBuf,
    state: PathBuf,
}

impl Directories {
    /// Makes them for container `id` under `run`.
    ///
    /// # Errors
    /// No room, or leftovers of a container with that id.
    pub fn make(run: &Path, id: &str) -> io::Result<Directories> {
        let directories = Directories {
            bundle: run.join("bundles").join(id),
            state_root: run.join("state"),
            state: run.join("state").join(id),
        };
        fs::create_dir_all(&directories.state_root)?;
        fs::create_dir_all(run.join("bundles"))?;
        fs::create_dir(&directories.bundle)?;
        Ok(directories)
    }

    /// The socket on which libcontainer's init waits to be started.
    pub fn notify_socket(&self) -> PathBuf {
        self.state.join("notify.sock")
    }
}

impl Drop for Directories {
    fn drop(&mut self) {
        for path in [&self.bundle, &self.state] {
            match fs::remove_dir_all(path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    crate::last_words::warn(&format!("removing {}: {e}", path.display()));
                }
                _ => {}
            }
        }
    }
}

/// An exec that is being made, or that is there.
#[derive(Debug)]
enum Exec {
    Starting,
    There(Arc<Process>),
}

/// A container with an init process.
#[derive(Debug)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Its root file system; the pause container has none.
    pub root: Option<PathBuf>,
    /// Its limits and figures.
    pub cgroup: Cgroup,
    /// Its directories.
    pub directories: Directories,
    /// The process that is the container.
    pub init: Process,
    /// Watches for OOM kills.
    pub oom: OomWatch,
    /// On which the init says how its start went; taken by Start. The pause container has said it already.
    report: Mutex<Option<OwnedFd>>,
    state: Mutex<State>,
    execs: Mutex<HashMap<String, Exec>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Container {
    /// A container just created.
    pub fn new(
        (id, root): (String, Option<PathBuf>),
        (cgroup, directories): (Cgroup, Directories),
        (init, report): (Process, Option<OwnedFd>),
        oom: OomWatch,
    ) -> Container {
        Container {
            id,
            root,
            cgroup,
            directories,
            init,
            oom,
            report: Mutex::new(report),
            state: Mutex::new(State::Created),
            execs: Mutex::default(),
        }
    }

    /// Where it is now. The kernel's news (the init has ended) comes before any verb.
    pub fn state(&self) -> State {
        self.settle(&mut locked(&self.state))
    }

    /// Makes the move for `verb`, or refuses it.
    ///
    /// # Errors
    /// The table of `state.rs` says no.
    pub fn advance(&self, verb: Verb) -> Result<State, Refusal> {
        let mut state = locked(&self.state);
        let before = self.settle(&mut state);
        *state = before.after(verb)?;
        Ok(before)
    }

    /// Takes a move back that could not be carried out.
    pub fn retreat(&self, to: State) {
        *locked(&self.state) = to;
    }

    fn settle(&self, state: &mut State) -> State {
        if self.init.exited().is_some() {
            if let Ok(stopped) = state.after(Verb::Exit) {
                *state = stopped;
            }
        }
        *state
    }

    /// The init's report pipe; once.
    pub fn take_report(&self) -> Option<OwnedFd> {
        locked(&self.report).take()
    }

    /// Reserves an exec id.
    ///
    /// # Errors
    /// `None` if it is taken, else why there is no room.
    pub fn reserve_exec(self: &Arc<Self>, id: &str) -> Result<ExecPlace, Option<String>> {
        let mut execs = locked(&self.execs);
        if execs.contains_key(id) {
            return Err(None);
        }
        if execs.len() >= EXECS_MAX_COUNT {
            let why = format!("container {} has {EXECS_MAX_COUNT} execs already", self.id);
            return Err(Some(why));
        }
        execs.insert(id.into(), Exec::Starting);
        Ok(ExecPlace {
            container: Arc::clone(self),
            id: Some(id.into()),
        })
    }

    /// The exec with this id, if it was started.
    pub fn exec(&self, id: &str) -> Option<Arc<Process>> {
        match locked(&self.execs).get(id) {
            Some(Exec::There(process)) => Some(Arc::clone(process)),
            Some(Exec::Starting) | None => None,
        }
    }

    /// Forgets an exec.
    pub fn forget_exec(&self, id: &str) {
        locked(&self.execs).remove(id);
    }
}

/// A reserved exec id: given back unless the exec comes to be.
#[derive(Debug)]
pub struct ExecPlace {
    container: Arc<Container>,
    id: Option<String>,
}

impl ExecPlace {
    /// The exec is there.
    pub fn fill(mut self, process: Process) {
        if let Some(id) = self.id.take() {
            let there = Exec::There(Arc::new(process));
            locked(&self.container.execs).insert(id, there);
        }
    }
}

impl Drop for ExecPlace {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            self.container.forget_exec(id);
        }
    }
}
