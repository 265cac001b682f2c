//! What the guest sees of this host: one directory tree, made of mounts that no other process can see.
//!
//! ```text
//! /<id>/rootfs        overlay of the image's layers with a tmpfs on top, or the directory of --rootfs or a bundle
//! /<id>/volumes/<n>   one bind mount for each volume, a directory or a file
//! /<id>/etc/<name>    hosts, hostname, resolv.conf of our making
//! ```
//!
//! The mounts are made on a thread of its own in a private mount namespace, then the whole tree is cloned into one
//! detached mount (`open_tree(2)`, Linux 5.2), which is all that leaves the thread. The namespace goes with the
//! thread and the detached mount with its fd: whatever kills this process, no mount stays.
//! Read-only is `mount_setattr(2)` on the host, recursively: the guest's opinion does not matter. Decision 0003 says
//! why the writable layer is a tmpfs.

use crate::image::tree::Tree;
use crate::volume::Volume;
use capsid_owner::mounts::{
    MountAttrFlags, OPTIONS_MAX_BYTES, attach, clone_tree, enter_private_namespace, make_directory,
    make_file, mount_overlay, open_at, put, set_attributes, tmpfs,
};
use rustix::fs::CWD;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;

/// Size of the tmpfs that holds the tree's own directories and small files, in bytes.
const TREE_MAX_BYTES: u64 = 4 << 20;
/// Largest writable layer of an image's container, as a share of the host's memory, and at most this, in bytes.
const WRITABLE_MAX_BYTES: u64 = 16 << 30;
/// The writable layer takes at most one part in this many of the host's memory.
const WRITABLE_PART_OF_MEMORY: u64 = 2;
/// Most files of a writable layer: a file without content still takes about 1 KiB of the host's memory.
const WRITABLE_MAX_INODES: u64 = 1 << 20;

/// What the root file system is made of.
#[derive(Clone, Debug)]
pub(crate) enum Root {
    /// Layers of an image, the lowest first, under a writable layer that is forgotten.
    Layers(Vec<PathBuf>),
    /// A directory, used in place; when it must not be written, as the lower layer of an overlay.
    Directory { path: PathBuf, read_only: bool },
}

/// What the tree is made of.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) id: String,
    pub(crate) root: Root,
    pub(crate) volumes: Vec<Volume>,
    /// Small files of our own, by name, in `/<id>/etc`.
    pub(crate) files: Vec<(&'static str, String)>,
    /// The host's memory in bytes, which bounds the writable layer.
    pub(crate) host_memory_bytes: u64,
}

/// The finished tree.
#[derive(Debug)]
pub(crate) struct Share {
    /// The detached mount, for the VMM.
    pub(crate) tree: OwnedFd,
    /// The root file system in it.
    rootfs: OwnedFd,
}

impl Share {
    /// The root file system, to look names up in.
    pub(crate) fn rootfs(&self) -> io::Result<Tree> {
        Ok(Tree::new(self.rootfs.try_clone()?))
    }
}

/// What could not be mounted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShareError {
    /// A volume's source cannot be opened.
    #[error("volume source {path}")]
    Volume {
        /// The source.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// A volume's source is neither a directory nor a file.
    #[error("volume source {0} is neither a directory nor a regular file")]
    VolumeKind(PathBuf),
    /// The root directory cannot be used.
    #[error("root file system {path}")]
    Root {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// Too many layers for one mount.
    #[error("{0} layers are more than one overlay mount takes")]
    Layers(usize),
    /// A mount failed.
    #[error("cannot {what} (Linux 5.12 or newer and CAP_SYS_ADMIN are needed)")]
    Mount {
        /// Which step.
        what: &'static str,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The mounting thread could not be started.
    #[error("cannot start the mounting thread")]
    Thread(#[source] io::Error),
}

/// Makes the tree.
///
/// # Errors
/// The first step that fails; no mount is left.
pub(crate) fn make(plan: &Plan) -> Result<Share, ShareError> {
    thread::scope(|scope| {
        let mounting = thread::Builder::new()
            .name("mounts".into())
            .spawn_scoped(scope, || mount_all(plan))
            .map_err(ShareError::Thread)?;
        mounting
            .join()
            .unwrap_or_else(|_| Err(ShareError::Thread(io::Error::other("it panicked"))))
    })
}

fn mount_all(plan: &Plan) -> Result<Share, ShareError> {
    enter_private_namespace().map_err(step("make a private mount namespace"))?;
    // Sources first, while this thread's view of the host is still the host's.
    let mut volumes = Vec::with_capacity(plan.volumes.len());
    for volume in &plan.volumes {
        volumes.push(open_volume(volume)?);
    }
    let root = match &plan.root {
        Root::Layers(layers) => overlay(layers, plan.host_memory_bytes)?,
        Root::Directory {
            path,
            read_only: false,
        } => {
            // Opened as a directory first: a file can be cloned as well.
            open_at(CWD, path).map_err(root_error(path))?;
            clone_tree(CWD, path).map_err(root_error(path))?
        }
        Root::Directory { path, .. } => {
            overlay(std::slice::from_ref(path), plan.host_memory_bytes)?
        }
    };
    let tree = tmpfs(TREE_MAX_BYTES, 4096).map_err(step("mount the share's tmpfs"))?;
    // Anywhere: the namespace is private, and everything from here on goes through the fd.
    attach(&tree, CWD, Path::new("/")).map_err(step("attach the share's tmpfs"))?;
    let rootfs = Path::new(&plan.id).join("rootfs");
    make_directory(&tree, Path::new(&plan.id)).map_err(step("make the share's directory"))?;
    put(&root, &tree, &rootfs, true).map_err(step("mount the root file system"))?;
    put_files(plan, &tree).map_err(step("write the container's /etc files"))?;
    let directory = Path::new(&plan.id).join("volumes");
    make_directory(&tree, &directory).map_err(step("make the volumes' directory"))?;
    for (index, (mount, is_directory)) in volumes.into_iter().enumerate() {
        let place = directory.join(index.to_string());
        put(&mount, &tree, &place, is_directory).map_err(step("mount a volume"))?;
    }
    let tree = clone_tree(tree.as_fd(), Path::new("")).map_err(step("clone the share's tree"))?;
    // The VMM never opens a device or runs a program of the tree; the guest's own kernel serves its devices.
    set_attributes(
        &tree,
        MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID,
    )
    .map_err(step("restrict the share's tree"))?;
    let rootfs = open_at(&tree, &rootfs).map_err(step("open the root file system"))?;
    Ok(Share { tree, rootfs })
}

fn step(what: &'static str) -> impl FnOnce(io::Error) -> ShareError {
    move |cause| ShareError::Mount { what, cause }
}

fn root_error(path: &Path) -> impl FnOnce(io::Error) -> ShareError + '_ {
    move |cause| ShareError::Root {
        path: path.to_owned(),
        cause,
    }
}

/// The detached mount of a volume, read-only where asked for, and whether it is a directory.
fn open_volume(volume: &Volume) -> Result<(OwnedFd, bool), ShareError> {
    let failed = |cause| ShareError::Volume {
        path: volume.source.clone(),
        cause,
    };
    let kind = std::fs::metadata(&volume.source).map_err(failed)?;
    if !kind.is_dir() && !kind.is_file() {
        return Err(ShareError::VolumeKind(volume.source.clone()));
    }
    let mount = clone_tree(CWD, &volume.source).map_err(failed)?;
    if volume.read_only {
        set_attributes(&mount, MountAttrFlags::MOUNT_ATTR_RDONLY).map_err(failed)?;
    }
    Ok((mount, kind.is_dir()))
}

/// A detached overlay of `layers` (the lowest first) under a tmpfs.
fn overlay(layers: &[PathBuf], host_memory_bytes: u64) -> Result<OwnedFd, ShareError> {
    let size = (host_memory_bytes / WRITABLE_PART_OF_MEMORY).min(WRITABLE_MAX_BYTES);
    let failed = step("make the writable layer");
    let upper = tmpfs(size, WRITABLE_MAX_INODES).and_then(|upper| {
        attach(&upper, CWD, Path::new("/"))?;
        make_directory(&upper, Path::new("upper"))?;
        make_directory(&upper, Path::new("work"))?;
        make_directory(&upper, Path::new("merged"))?;
        Ok(upper)
    });
    let upper = upper.map_err(failed)?;
    let mut lower = Vec::with_capacity(layers.len());
    for layer in layers.iter().rev() {
        lower.push(open_at(CWD, layer).map_err(root_error(layer))?);
    }
    // fds, because the option string of a mount is one page and a path may be as long as that alone.
    let names: Vec<String> = lower
        .iter()
        .map(|fd| format!("/proc/self/fd/{}", fd.as_raw_fd()))
        .collect();
    let own = format!("/proc/self/fd/{}", upper.as_raw_fd());
    let options = format!(
        "lowerdir={},upperdir={own}/upper,workdir={own}/work,xino=auto",
        names.join(":")
    );
    if options.len() > OPTIONS_MAX_BYTES {
        return Err(ShareError::Layers(layers.len()));
    }
    mount_overlay(&format!("{own}/merged"), &options).map_err(step("mount the overlay"))?;
    clone_tree(upper.as_fd(), Path::new("merged")).map_err(step("clone the overlay"))
}

/// The small files of the container's `/etc`.
fn put_files(plan: &Plan, tree: &OwnedFd) -> io::Result<()> {
    let directory = Path::new(&plan.id).join("etc");
    make_directory(tree, &directory)?;
    for (name, text) in &plan.files {
        make_file(tree, &directory.join(name))?.write_all(text.as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "share_tests.rs"]
mod tests;
