//! Ctrl-C, SIGTERM and SIGHUP, in whatever phase they come: what our children started is killed, the temporary directories we
//! made are removed, and we end with 128+n. A session with the testbed takes the signals while it lasts and forwards them
//! (`take`).
//!
//! Trusts only ourselves. What SIGKILL leaves behind is dealt with elsewhere: children carry a parent-death signal
//! (`command`), temporaries are removed by the next build of the same kind (`cache`).

mod processes;

use std::io;
use std::path::PathBuf;
use std::process::Child;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;

/// Our own threads write on while we remove: a directory may need a second look before it is empty.
const REMOVE_TRIES: u32 = 100;
/// What was killed is waited for so long, and what may finish is.
const END_TIMEOUT_MS: u64 = 1000;

static REGISTRY: Mutex<Registry> = Mutex::new(Registry {
    next: 0,
    entries: Vec::new(),
    taken: None,
});

struct Registry {
    next: u64,
    entries: Vec<(u64, Undo)>,
    taken: Option<(u64, Sender<i32>)>,
}

enum Undo {
    Kill(Pid),
    Ask(Pid),
    Remove(PathBuf),
}

/// What happens to a child when we are interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnInterrupt {
    /// It is killed with everything it started.
    Kill,
    /// It is asked to end, and left to finish if it does not: a package installation that is killed half-way breaks the machine.
    Ask,
}

/// While it lives, an interruption undoes what it stands for.
#[derive(Debug)]
pub struct Undone(u64);

impl Drop for Undone {
    fn drop(&mut self) {
        registry().entries.retain(|(id, _)| *id != self.0);
    }
}

/// While it lives, signals are handed to whoever took them instead of ending the process.
#[derive(Debug)]
pub struct Taken(u64);

impl Drop for Taken {
    fn drop(&mut self) {
        let mut registry = registry();
        // Somebody else may have taken them since.
        if registry.taken.as_ref().is_some_and(|(id, _)| *id == self.0) {
            registry.taken = None;
        }
    }
}

/// Starts the thread that waits for the signals. Called once, before anything else.
///
/// # Errors
/// The handlers could not be installed.
pub fn install() -> io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGWINCH])?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            on_signal(signal);
        }
    });
    Ok(())
}

/// Starts a child, the leader of a process group of its own, and says what becomes of it when we are interrupted.
///
/// # Errors
/// It could not be started.
pub fn start(
    on_interrupt: OnInterrupt,
    spawn: impl FnOnce() -> io::Result<Child>,
) -> io::Result<(Child, Undone)> {
    // Locked meanwhile, so that no interruption finds a child that it does not know.
    let mut registry = registry();
    let child = spawn()?;
    let leader = Pid::from_child(&child);
    let undone = registry.add(match on_interrupt {
        OnInterrupt::Kill => Undo::Kill(leader),
        OnInterrupt::Ask => Undo::Ask(leader),
    });
    Ok((child, undone))
}

/// Remove this file or directory when we are interrupted.
pub fn remove(path: PathBuf) -> Undone {
    registry().add(Undo::Remove(path))
}

/// From now on signals are handed to the caller as numbers, in the order they come.
pub fn take() -> (Receiver<i32>, Taken) {
    let (sender, signals) = channel();
    let mut registry = registry();
    let id = registry.number();
    registry.taken = Some((id, sender));
    (signals, Taken(id))
}

fn registry() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Registry {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn add(&mut self, undo: Undo) -> Undone {
        let id = self.number();
        self.entries.push((id, undo));
        Undone(id)
    }
}

fn on_signal(signal: i32) {
    let registry = registry();
    if let Some((_, taker)) = &registry.taken {
        // A taker that is gone dropped its receiver a moment ago; then the signal is ours after all.
        if taker.send(signal).is_ok() {
            return;
        }
    }
    if signal == SIGWINCH {
        return;
    }
    // The lock is held until the process ends, so nobody starts anything new behind our back, and nobody who waits for a child
    // of ours gets to tell how that ended.
    undo(&registry);
    eprintln!("xtask: interrupted");
    std::process::exit(128 + signal);
}

fn undo(registry: &Registry) {
    let deadline = Instant::now() + Duration::from_millis(END_TIMEOUT_MS);
    let undos = || registry.entries.iter().map(|(_, undo)| undo);
    let asked: Vec<_> = undos()
        .filter_map(|undo| match undo {
            Undo::Ask(leader) => Some((*leader, processes::signal(*leader, Signal::INT)?)),
            _ => None,
        })
        .collect();
    let doomed: Vec<Pid> = undos()
        .filter_map(|undo| match undo {
            Undo::Kill(leader) => Some(*leader),
            _ => None,
        })
        .collect();
    processes::kill(&doomed, deadline);
    for (leader, process) in asked {
        if !processes::ended(&process, deadline) {
            eprintln!(
                "xtask: process {leader} is installing packages and goes on until it has: stopped there, it would leave them half installed"
            );
        }
    }
    for path in undos().filter_map(|undo| match undo {
        Undo::Remove(path) => Some(path),
        _ => None,
    }) {
        remove_now(path);
    }
}

fn remove_now(path: &PathBuf) {
    for _ in 0..REMOVE_TRIES {
        let done = if path.is_dir() {
            std::fs::remove_dir_all(path)
        } else {
            std::fs::remove_file(path)
        };
        match done {
            Ok(()) => return,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(_) => {}
        }
    }
    eprintln!(
        "xtask: could not remove {}; the next build of it will",
        path.display()
    );
}
