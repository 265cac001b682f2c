//! The tree of mounts that a pod's share is, as its owner has it: shared, in a private mount namespace, so that what is mounted
//! and unmounted in it while the VM runs comes to the VM and goes.

use capsid_owner::mounts::{self, Propagation};
use rustix::fs::CWD;
use rustix::fs::inotify;
use rustix::mount::UnmountFlags;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;

/// Size of the tree and of each file system that is mounted in it, in bytes.
const MAX_BYTES: u64 = 16 << 20;
/// Most files of each.
const MAX_INODES: u64 = 1 << 12;
/// No wait takes longer, but for a hang, in seconds.
const PATIENCE_S: i64 = 60;

type Work = Box<dyn FnOnce(&Mounts) + Send>;

/// The owner's side: a thread with the namespace, which goes with it.
pub struct Tree {
    work: Option<mpsc::Sender<Work>>,
    thread: Option<JoinHandle<()>>,
}

/// The tree, on that thread. It is mounted at the thread's root.
pub struct Mounts(OwnedFd);

impl Tree {
    /// An empty tree.
    ///
    /// # Panics
    /// It cannot be mounted.
    pub fn new() -> Tree {
        let (work, todo) = mpsc::channel::<Work>();
        let thread = std::thread::spawn(move || {
            mounts::enter_private_namespace().expect("a namespace");
            let tree = mounts::tmpfs(MAX_BYTES, MAX_INODES).expect("a tmpfs");
            mounts::attach(&tree, CWD, Path::new("/")).expect("attached");
            mounts::set_propagation(&tree, Propagation::Shared).expect("shared");
            let mounts = Mounts(tree);
            for work in todo {
                work(&mounts);
            }
        });
        Tree {
            work: Some(work),
            thread: Some(thread),
        }
    }

    /// Does `work` where the tree is.
    ///
    /// # Panics
    /// It panicked.
    pub fn with<T: Send + 'static>(&self, work: impl FnOnce(&Mounts) -> T + Send + 'static) -> T {
        let (answer, answered) = mpsc::channel();
        let work: Work = Box::new(move |mounts| {
            // Whoever asked waits for it.
            let _waited_for = answer.send(work(mounts));
        });
        let queue = self.work.as_ref().expect("open until it is dropped");
        queue.send(work).expect("the thread is there");
        answered.recv().expect("the work was done")
    }

    /// The detached clone for the VMM.
    ///
    /// # Panics
    /// It cannot be cloned.
    pub fn clone_for_vmm(&self) -> OwnedFd {
        self.with(|mounts| {
            let clone = mounts::clone_tree(mounts.0.as_fd(), Path::new("")).expect("a clone");
            mounts::set_propagation(&clone, Propagation::Slave).expect("a slave");
            clone
        })
    }
}

impl Default for Tree {
    fn default() -> Tree {
        Tree::new()
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        drop(self.work.take());
        if let Some(thread) = self.thread.take() {
            // A panic there was told to whoever asked for the work.
            let _told = thread.join();
        }
    }
}

impl Mounts {
    /// A path in the tree, on this thread.
    pub fn path(&self, below: &str) -> PathBuf {
        use std::os::fd::AsRawFd;
        Path::new(&format!("/proc/self/fd/{}", self.0.as_raw_fd())).join(below)
    }

    /// Makes a directory of the tree.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn directory(&self, path: &str) {
        mounts::make_directory(&self.0, Path::new(path)).expect("a directory");
    }

    /// Makes the mount point `place` and attaches `mount` to it, as one that a guest may have.
    ///
    /// # Panics
    /// It cannot be attached.
    pub fn put(&self, mount: &OwnedFd, place: &str) {
        mounts::set_attributes(mount, mounts::SHARE_ATTRIBUTES).expect("restricted");
        mounts::put(mount, &self.0, Path::new(place), true).expect("mounted");
    }

    /// Takes a mount away, and its mount point.
    ///
    /// # Panics
    /// There is none.
    pub fn take(&self, place: &str) {
        rustix::mount::unmount(self.path(place), UnmountFlags::DETACH).expect("unmounted");
        std::fs::remove_dir(self.path(place)).expect("a mount point");
    }
}

/// A tmpfs to back an overlay, attached at `at` of the calling thread's namespace until it is unmounted.
pub struct Backing {
    at: PathBuf,
}

impl Backing {
    /// The one that is mounted there.
    pub fn of(at: PathBuf) -> Backing {
        Backing { at }
    }

    /// Mounts it on an empty directory.
    ///
    /// # Panics
    /// It cannot be mounted.
    pub fn at(at: PathBuf) -> Backing {
        let upper = mounts::tmpfs(MAX_BYTES, MAX_INODES).expect("a tmpfs");
        for directory in ["upper", "work", "merged", "volume"] {
            mounts::make_directory(&upper, Path::new(directory)).expect("a directory");
        }
        mounts::attach(&upper, CWD, &at).expect("attached");
        Backing { at }
    }

    /// A detached overlay of `lower` under it.
    ///
    /// # Panics
    /// It cannot be mounted.
    pub fn overlay(&self, lower: &Path) -> OwnedFd {
        let at = self.at.display();
        let options = format!(
            "lowerdir={},upperdir={at}/upper,workdir={at}/work,xino=auto",
            lower.display()
        );
        let merged = format!("{at}/merged");
        mounts::mount_overlay(&merged, &options).expect("an overlay");
        let detached = mounts::clone_tree(CWD, Path::new(&merged)).expect("a clone");
        rustix::mount::unmount(&merged, UnmountFlags::DETACH).expect("unmounted");
        detached
    }

    /// A detached mount of the directory of it that is a volume.
    ///
    /// # Panics
    /// It cannot be cloned.
    pub fn volume(&self) -> OwnedFd {
        mounts::clone_tree(CWD, &self.at.join("volume")).expect("a clone")
    }

    /// A file of the volume.
    pub fn file(&self, name: &str) -> PathBuf {
        self.at.join("volume").join(name)
    }

    /// Unmounts it, which fails as long as anything of it is in use.
    ///
    /// # Errors
    /// EBUSY.
    pub fn unmount(self) -> io::Result<()> {
        Ok(rustix::mount::unmount(&self.at, UnmountFlags::empty())?)
    }
}

/// Tells when the file system of a directory is gone: nobody holds it any more, on the host or in a guest.
pub struct Gone(OwnedFd);

impl Gone {
    /// Watches the file system that `directory` is in.
    ///
    /// # Panics
    /// It cannot be watched.
    pub fn watch(directory: &Path) -> Gone {
        let watch = inotify::init(inotify::CreateFlags::CLOEXEC).expect("inotify");
        inotify::add_watch(&watch, directory, inotify::WatchFlags::DELETE_SELF).expect("a watch");
        Gone(watch)
    }

    /// Waits for it (IN_UNMOUNT); false if it takes too long.
    ///
    /// # Panics
    /// Nothing can be waited for.
    pub fn wait(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let limit = Timespec {
            tv_sec: PATIENCE_S,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        poll(&mut fds, Some(&limit)).expect("a wait") == 1
    }
}
