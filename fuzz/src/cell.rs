//! A place where a stranger may do to files what it can: a thread whose root is a small file system in memory, with nothing of
//! the host in it but the list of its descriptors. What is tried there is kept to one directory, beside which lies what must not change.
//!
//! Needs root.

use nix::sched::{CloneFlags, unshare};
use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, move_mount, open_tree, unmount,
};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind, set_hook, take_hook};
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};
use std::thread;

/// Most bytes and files of the file system: what a stranger can fill.
const SIZE: &str = "16m";
const FILES: &str = "4096";
/// The directory, and what lies beside it.
pub(crate) const INSIDE: &str = "/inside";
const OUTSIDE: &str = "/outside";
const CANARY: &str = "/outside/canary";
/// What code takes for granted that reaches files by their descriptors.
const DESCRIPTORS: &str = "/proc/self/fd";
const SONG: &[u8] = b"not for strangers";

/// Name of the thread.
const THREAD: &str = "cell";

/// A thread in its place; it lives as long as the process.
pub(crate) struct Cell {
    inputs: mpsc::Sender<Vec<u8>>,
    ends: mpsc::Receiver<thread::Result<()>>,
}

/// What a target does with its inputs, on the cell's thread.
pub(crate) type Work = Box<dyn FnMut(&[u8])>;

/// The cell of one target, made when the first input comes; `None`: this process may not make one.
pub(crate) struct Lazy(OnceLock<Option<Mutex<Cell>>>);

impl Lazy {
    pub(crate) const fn new() -> Lazy {
        Lazy(OnceLock::new())
    }

    /// Runs one input. `prepare` is called once, with the descriptor of `/proc/self/fd`.
    ///
    /// # Panics
    /// As the target does; or the canary did not live.
    pub(crate) fn run(&self, input: &[u8], prepare: fn(OwnedFd) -> Work) {
        let cell = self.0.get_or_init(|| Cell::new(prepare).map(Mutex::new));
        let Some(cell) = cell else {
            return;
        };
        let cell = cell.lock().unwrap_or_else(PoisonError::into_inner);
        cell.inputs.send(input.to_vec()).expect("the thread lives");
        if let Err(panic) = cell.ends.recv().expect("the thread lives") {
            resume_unwind(panic);
        }
    }
}

/// Whether this process may make cells.
pub(crate) fn possible() -> bool {
    rustix::process::geteuid().is_root()
}

impl Cell {
    fn new(prepare: fn(OwnedFd) -> Work) -> Option<Cell> {
        if !possible() {
            // A test says that it is skipped; a fuzzer that tries nothing must not look like one that found nothing.
            match cfg!(test) {
                true => return None,
                false => panic!("this target takes root"),
            }
        }
        panic_elsewhere();
        let (inputs, inbox) = mpsc::channel::<Vec<u8>>();
        let (outbox, ends) = mpsc::channel();
        let thread = thread::Builder::new().name(THREAD.into());
        let spawned = thread.spawn(move || {
            let fds = enter().expect("a cell");
            let mut work = prepare(fds);
            for input in inbox {
                let end = catch_unwind(AssertUnwindSafe(|| {
                    furnish();
                    work(&input);
                    check();
                }));
                if outbox.send(end).is_err() {
                    return;
                }
            }
        });
        spawned.expect("a thread");
        Some(Cell { inputs, ends })
    }
}

/// A panic of such a thread is one of the thread that waits for it: libFuzzer aborts where a panic begins, and could not keep
/// the input, for which it needs the host's files.
fn panic_elsewhere() {
    let before = take_hook();
    set_hook(Box::new(move |panic| match thread::current().name() {
        Some(THREAD) => eprintln!("{panic}"),
        _ => before(panic),
    }));
}

/// Gives the calling thread its root. Returns `/proc/self/fd`.
fn enter() -> io::Result<OwnedFd> {
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private)?;
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let fds = open_tree(CWD, DESCRIPTORS, clone)?;
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "size", SIZE)?;
    fsconfig_set_string(&context, "nr_inodes", FILES)?;
    fsconfig_set_string(&context, "mode", "0755")?;
    fsconfig_create(&context)?;
    let nothing_special = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
    let tree = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, nothing_special)?;
    let itself = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&tree, "", CWD, "/", itself)?;
    rustix::process::fchdir(&tree)?;
    rustix::process::pivot_root(".", ".")?;
    // The old root lies over the new one now.
    unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    fs::create_dir(OUTSIDE)?;
    fs::write(CANARY, SONG)?;
    fs::create_dir(INSIDE)?;
    fs::create_dir_all(DESCRIPTORS)?;
    move_mount(&fds, "", CWD, DESCRIPTORS, itself)?;
    Ok(fds)
}

/// The directory as each input finds it: empty.
fn furnish() {
    for entry in fs::read_dir(INSIDE).expect("a directory") {
        let entry = entry.expect("an entry");
        let removed = match entry.file_type().expect("a kind").is_dir() {
            true => fs::remove_dir_all(entry.path()),
            false => fs::remove_file(entry.path()),
        };
        removed.expect("it can be removed");
    }
}

/// # Panics
/// Something beside the directory is not what it was.
fn check() {
    assert_eq!(names("/"), ["inside", "outside", "proc"]);
    assert_eq!(names(OUTSIDE), ["canary"]);
    assert_eq!(fs::read(CANARY).expect("the canary"), SONG);
}

fn names(directory: impl AsRef<Path>) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("a directory");
    let mut names: Vec<String> = entries
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into()
        })
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cell whose inputs are paths that it writes.
    fn write(path: &str) {
        static CELL: Lazy = Lazy::new();
        if !possible() {
            eprintln!("SKIPPED: {}: it takes root", module_path!());
            return;
        }
        let prepare = |_| -> Work {
            Box::new(|input| fs::write(String::from_utf8_lossy(input).as_ref(), "x").expect("room"))
        };
        CELL.run(path.as_bytes(), prepare);
    }

    #[test]
    fn what_is_changed_beside_the_directory_is_found() {
        write("/inside/file");
        if possible() {
            let beside = catch_unwind(|| write("/outside/more"));
            assert!(beside.is_err());
            fs::metadata("/outside").expect_err("the host has no such directory");
        }
    }
}
