//! Ctrl-C, SIGTERM and SIGHUP, in whatever phase they come: the process groups we started are killed, the temporary
//! directories we made are removed, and we end with 128+n. A session with the testbed takes the signals itself and forwards
//! them (`Taken`).
//!
//! Trusts only ourselves. What SIGKILL leaves behind is dealt with elsewhere: children carry a parent-death signal
//! (`command`), temporaries are removed by the next build of the same kind (`cache`).

use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, Signal, kill_process_group};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;

/// A directory whose writers were just killed may need a second look before it is empty.
const REMOVE_TRIES: u32 = 100;

static REGISTRY: Mutex<Registry> = Mutex::new(Registry {
    next: 0,
    entries: Vec::new(),
    taken: None,
});

struct Registry {
    next: u64,
    entries: Vec<(u64, Undo)>,
    taken: Option<Sender<i32>>,
}

enum Undo {
    KillGroup(Pid),
    Remove(PathBuf),
}

/// While it lives, an interruption undoes what it stands for.
#[derive(Debug)]
pub struct Undone(u64);

impl Drop for Undone {
    fn drop(&mut self) {
        registry().entries.retain(|(id, _)| *id != self.0);
    }
}

/// While it lives, signals arrive here as numbers instead of ending the process.
#[derive(Debug)]
pub struct Taken {
    /// The signals, in the order they came.
    pub signals: Receiver<i32>,
}

impl Drop for Taken {
    fn drop(&mut self) {
        registry().taken = None;
    }
}

/// Starts the thread that waits for the signals. Called once, before anything else.
///
/// # Errors
/// The handlers could not be installed.
pub fn install() -> std::io::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGWINCH])?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            on_signal(signal);
        }
    });
    Ok(())
}

/// Kill this process group when we are interrupted.
pub fn kill_group(leader: Pid) -> Undone {
    register(Undo::KillGroup(leader))
}

/// Remove this file or directory when we are interrupted.
pub fn remove(path: PathBuf) -> Undone {
    register(Undo::Remove(path))
}

/// From now on signals are handed to the caller.
pub fn take() -> Taken {
    let (sender, signals) = channel();
    registry().taken = Some(sender);
    Taken { signals }
}

fn registry() -> MutexGuard<'static, Registry> {
    REGISTRY.lock().unwrap_or_else(PoisonError::into_inner)
}

fn register(undo: Undo) -> Undone {
    let mut registry = registry();
    let id = registry.next;
    registry.next += 1;
    registry.entries.push((id, undo));
    Undone(id)
}

fn on_signal(signal: i32) {
    let registry = registry();
    if let Some(taker) = &registry.taken {
        // A taker that is gone dropped its receiver a moment ago; then the signal is ours after all.
        if taker.send(signal).is_ok() {
            return;
        }
    }
    if signal == SIGWINCH {
        return;
    }
    // The lock is held until the process ends, so nobody starts anything new behind our back.
    for (_, undo) in &registry.entries {
        if let Undo::KillGroup(leader) = undo {
            // It may have ended by itself.
            let _ = kill_process_group(*leader, Signal::KILL);
        }
    }
    for (_, undo) in &registry.entries {
        if let Undo::Remove(path) = undo {
            remove_now(path);
        }
    }
    eprintln!("xtask: interrupted");
    std::process::exit(128 + signal);
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
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Err(_) => {}
        }
    }
    eprintln!(
        "xtask: could not remove {}; the next build of it will",
        path.display()
    );
}
