//! What the guest sees of this host: one tree of mounts, in a mount namespace that nobody else has, to which containers are added and
//! from which they are taken while the VM runs.
//!
//! ```text
//! /<container>/rootfs        its root file system
//! /<container>/volumes/<n>   its bind mounts, directories and files
//! ```
//!
//! The namespace belongs to one thread, which makes every mount and every unmount; it ends with the last handle of the tree, and the mounts with
//! it, whatever killed this process. The VMM gets a detached copy of the tree that is a slave of this one
//! (`Documentation/filesystems/sharedsubtree.rst`): what is mounted here later arrives there, nothing comes back. A mount is restricted
//! before it is attached, because what is set on it later would not travel.
//!
//! Trusted: containerd, for the mounts it names. Not trusted: what is in them, of which nothing is opened here but directories.

mod rootfs;

pub use rootfs::{Mount, Root, RootError};

use crate::spec::Volume;

use capsid_owner::mounts::{
    MountAttrFlags, Propagation, SHARE_ATTRIBUTES, attach, clone_tree, enter_private_namespace,
    make_directory, put, set_attributes, set_propagation, tmpfs,
};
use rustix::fs::{AtFlags, CWD};
use rustix::mount::UnmountFlags;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use tokio::sync::oneshot;

/// Size of the tmpfs that holds the tree's own directories and mount points, in bytes.
const TREE_MAX_BYTES: u64 = 16 << 20;
/// Most directories and mount points of it.
const TREE_MAX_INODES: u64 = 64 << 10;
/// Why a container is not in the tree.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// Its root file system.
    #[error(transparent)]
    Root(#[from] RootError),
    /// The source of a bind mount cannot be opened.
    #[error("bind mount source {path}")]
    Volume {
        /// The source.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// It is of a kind that no guest can be shown.
    #[error(
        "bind mount source {0} is neither a directory nor a regular file: sockets, pipes and devices of the host do not exist in a VM"
    )]
    VolumeKind(PathBuf),
    /// A mount of ours failed.
    #[error("cannot {what} (Linux 5.12 or newer and CAP_SYS_ADMIN are needed)")]
    Mount {
        /// Which step.
        what: &'static str,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The mounting thread is not there.
    #[error("the mounting thread ended")]
    Thread,
}

fn step(what: &'static str) -> impl FnOnce(io::Error) -> ShareError {
    move |cause| ShareError::Mount { what, cause }
}

/// What a container adds to the tree.
#[derive(Clone, Debug)]
pub struct Placement {
    /// Its id ([`capsid_protocol::machine::is_id`]).
    pub id: String,
    /// Its root file system.
    pub root: Root,
    /// Its bind mounts, in the order of their numbers.
    pub volumes: Vec<Volume>,
}

enum Job {
    Copy(oneshot::Sender<Result<OwnedFd, ShareError>>),
    Add(Box<Placement>, oneshot::Sender<Result<OwnedFd, ShareError>>),
    Remove(String),
}

/// The tree. Clones share it.
#[derive(Clone, Debug)]
pub struct Tree(mpsc::Sender<Job>);

impl Tree {
    /// An empty one.
    ///
    /// # Errors
    /// The namespace or the first mount could not be made.
    pub async fn make() -> Result<Tree, ShareError> {
        let (jobs, queue) = mpsc::channel();
        let (made, answer) = oneshot::channel();
        let thread = thread::Builder::new().name("mounts".into());
        let spawned = thread.spawn(move || match Mounts::make() {
            Ok(mounts) => {
                // Whoever asked may be gone; then so is the queue's other end.
                let _gone = made.send(Ok(()));
                mounts.serve(&queue);
            }
            Err(error) => drop(made.send(Err(error))),
        });
        spawned.map_err(step("start the mounting thread"))?;
        answer.await.map_err(|_| ShareError::Thread)??;
        Ok(Tree(jobs))
    }

    /// A detached copy, for the VMM, in which arrives what is mounted later.
    ///
    /// # Errors
    /// The kernel's.
    pub async fn copy(&self) -> Result<OwnedFd, ShareError> {
        let (sender, answer) = oneshot::channel();
        self.ask(Job::Copy(sender))?;
        answer.await.map_err(|_| ShareError::Thread)?
    }

    /// Adds a container; it leaves when what is returned is dropped.
    ///
    /// # Errors
    /// The first thing that cannot be mounted; nothing is left then.
    pub async fn add(&self, placement: Placement) -> Result<Placed, ShareError> {
        let id = placement.id.clone();
        let (sender, answer) = oneshot::channel();
        self.ask(Job::Add(Box::new(placement), sender))?;
        let root = answer.await.map_err(|_| ShareError::Thread)??;
        Ok(Placed {
            tree: self.clone(),
            id,
            root: Some(root),
        })
    }

    fn ask(&self, job: Job) -> Result<(), ShareError> {
        self.0.send(job).map_err(|_| ShareError::Thread)
    }
}

/// A container in the tree; dropped, it is taken out.
#[derive(Debug)]
pub struct Placed {
    tree: Tree,
    id: String,
    root: Option<OwnedFd>,
}

impl Placed {
    /// Its root file system as the host has it, detached from everything: of a container without one, an empty directory. Once.
    pub fn take_root(&mut self) -> Option<OwnedFd> {
        self.root.take()
    }
}

impl Drop for Placed {
    fn drop(&mut self) {
        // Without the thread there is no mount either.
        let _ended = self.tree.ask(Job::Remove(std::mem::take(&mut self.id)));
    }
}

/// What the thread has.
struct Mounts {
    tree: OwnedFd,
    scratch: OwnedFd,
}

impl Mounts {
    fn make() -> Result<Mounts, ShareError> {
        enter_private_namespace().map_err(step("make a private mount namespace"))?;
        let tree =
            tmpfs(TREE_MAX_BYTES, TREE_MAX_INODES).map_err(step("mount the tree's tmpfs"))?;
        // Anywhere: the namespace is private, and everything from here on goes through the fd.
        attach(&tree, CWD, Path::new("/")).map_err(step("attach the tree's tmpfs"))?;
        set_attributes(&tree, SHARE_ATTRIBUTES).map_err(step("restrict the tree"))?;
        set_propagation(&tree, Propagation::Shared).map_err(step("share the tree"))?;
        let scratch = tmpfs(TREE_MAX_BYTES, TREE_MAX_INODES).map_err(step("mount a tmpfs"))?;
        attach(&scratch, CWD, Path::new("/")).map_err(step("attach a tmpfs"))?;
        Ok(Mounts { tree, scratch })
    }

    fn serve(&self, queue: &mpsc::Receiver<Job>) {
        while let Ok(job) = queue.recv() {
            match job {
                // Whoever asked may be gone: what they were to get goes with the answer.
                Job::Copy(answer) => drop(answer.send(self.copy())),
                Job::Add(placement, answer) => {
                    if let Err(unwanted) = answer.send(self.add(&placement)) {
                        if unwanted.is_ok() {
                            self.remove(&placement.id);
                        }
                    }
                }
                Job::Remove(id) => self.remove(&id),
            }
        }
    }

    fn copy(&self) -> Result<OwnedFd, ShareError> {
        let copy = clone_tree(self.tree.as_fd(), Path::new("")).map_err(step("copy the tree"))?;
        set_propagation(&copy, Propagation::Slave).map_err(step("make the copy a slave"))?;
        Ok(copy)
    }

    fn add(&self, placement: &Placement) -> Result<OwnedFd, ShareError> {
        // Sources first: nothing is in the tree when one cannot be had.
        let root = rootfs::open(&placement.root, &self.scratch)?;
        let volumes = placement.volumes.iter().map(open_volume);
        let volumes = volumes.collect::<Result<Vec<_>, ShareError>>()?;
        let added = self.put_all(&placement.id, &root.guest, volumes);
        added.inspect_err(|_| self.remove(&placement.id))?;
        Ok(root.host)
    }

    fn put_all(
        &self,
        id: &str,
        root: &OwnedFd,
        volumes: Vec<(OwnedFd, bool)>,
    ) -> Result<(), ShareError> {
        let directory = Path::new(id);
        make_directory(&self.tree, directory).map_err(step("make the container's directory"))?;
        set_attributes(root, SHARE_ATTRIBUTES).map_err(step("restrict the root file system"))?;
        let place = directory.join("rootfs");
        put(root, &self.tree, &place, true).map_err(step("attach the root file system"))?;
        let directory = directory.join("volumes");
        make_directory(&self.tree, &directory).map_err(step("make the volumes' directory"))?;
        for (index, (mount, is_directory)) in volumes.into_iter().enumerate() {
            let place = directory.join(index.to_string());
            put(&mount, &self.tree, &place, is_directory).map_err(step("attach a bind mount"))?;
        }
        Ok(())
    }

    /// Takes a container out. What a process still holds of its mounts lasts as long as that.
    fn remove(&self, id: &str) {
        let base =
            PathBuf::from(format!("/proc/thread-self/fd/{}", self.tree.as_raw_fd())).join(id);
        let volumes = std::fs::read_dir(base.join("volumes"));
        let volumes = volumes
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path());
        for mounted in volumes.chain([base.join("rootfs")]) {
            let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
            if let Err(cause) = rustix::mount::unmount(&mounted, flags) {
                // Nothing was attached there yet.
                if !matches!(cause, rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) {
                    tracing::warn!(%cause, place = %mounted.display(), "unmounting");
                    // What is mounted must not be emptied.
                    return;
                }
            }
        }
        match std::fs::remove_dir_all(&base) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%cause, container = id, "removing its directories");
            }
            _ => {}
        }
    }
}

/// The detached mount of a volume, restricted, and whether it is a directory.
fn open_volume(volume: &Volume) -> Result<(OwnedFd, bool), ShareError> {
    let failed = |cause| ShareError::Volume {
        path: volume.source.clone(),
        cause,
    };
    let mount = rootfs::clone_mount(&volume.source, volume.recursive).map_err(failed)?;
    // Asked of what was opened: the name may mean something else by now.
    let stat = rustix::fs::statx(
        &mount,
        "",
        AtFlags::EMPTY_PATH,
        rustix::fs::StatxFlags::TYPE,
    );
    let mode = stat.map_err(|error| failed(error.into()))?.stx_mode;
    let kind = rustix::fs::FileType::from_raw_mode(mode.into());
    if !kind.is_dir() && !kind.is_file() {
        return Err(ShareError::VolumeKind(volume.source.clone()));
    }
    let mut attributes = SHARE_ATTRIBUTES;
    if volume.read_only {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    set_attributes(&mount, attributes).map_err(failed)?;
    Ok((mount, kind.is_dir()))
}

#[cfg(test)]
#[path = "share_tests.rs"]
mod tests;
