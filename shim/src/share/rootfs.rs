//! The root file system of a container, as containerd describes it: a list of mounts (api/types/mount.proto), of which each is made on top of
//! the one before; or the directory of the bundle, where somebody else (Docker) has mounted it already.
//!
//! Taken: `overlay`, `bind`. Anything else is refused by name: the kernel that would have to read it is the host's, and the bytes are the image's.

use capsid_owner::mounts::{
    MountAttrFlags, OPTIONS_MAX_BYTES, attach, clone_tree, make_directory, mount_overlay,
    set_attributes, tmpfs,
};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{OpenTreeFlags, UnmountFlags};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Most mounts of one root file system.
const MOUNTS_MAX: usize = 64;
/// Most lower layers of one overlay (`OVL_MAX_STACK`, fs/overlayfs/params.h).
const LAYERS_MAX: usize = 500;
/// Where an overlay is made before it is detached.
const MERGED: &str = "merged";

/// What the root file system is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Root {
    /// These, one on top of the other.
    Mounts(Vec<Mount>),
    /// A directory of the host, with all that is mounted in it.
    Directory(PathBuf),
    /// None: the pause container. An empty directory stands for it.
    Empty,
}

/// One mount of containerd's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mount {
    /// Its type.
    pub kind: String,
    /// Its source.
    pub source: String,
    /// Where below the root it belongs; empty: the root itself.
    pub target: String,
    /// As in fstab(5).
    pub options: Vec<String>,
}

/// Why there is no root file system.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// A kind that is not taken.
    #[error(
        "root file system: mount type {0:?} is not supported; use a snapshotter whose mounts are overlay or bind (overlayfs, native)"
    )]
    Kind(String),
    /// A mount below another.
    #[error("root file system: a mount with the target {0:?} is not supported")]
    Target(String),
    /// No mount, too many of them, or more than one.
    #[error("root file system: {0} mounts, expected one")]
    Count(usize),
    /// An option that is none, or would be ignored.
    #[error("root file system: overlay option {0:?}: {1}")]
    Option(String, &'static str),
    /// A directory that cannot be opened.
    #[error("root file system {path}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The mount itself.
    #[error("cannot mount the root file system")]
    Mount(#[source] io::Error),
}

/// A root file system as two detached mounts: a detached mount cannot be copied (before Linux 6.15), and one for the guest is not fit for the host.
#[derive(Debug)]
pub(super) struct Opened {
    /// For the guest: to be restricted and attached to the tree.
    pub(super) guest: OwnedFd,
    /// For the host, as it is.
    pub(super) host: OwnedFd,
}

/// Opens the root file system.
///
/// # Errors
/// It cannot be had; nothing is left mounted.
pub(super) fn open(root: &Root, scratch: &OwnedFd) -> Result<Opened, RootError> {
    match root {
        Root::Empty => detach(scratch, |place| {
            let empty = tmpfs(4096, 1)?;
            attach(&empty, CWD, place)
        }),
        Root::Directory(path) => directory(path, &[]),
        Root::Mounts(mounts) => match mounts.as_slice() {
            [mount] => one(mount, scratch),
            other => Err(RootError::Count(other.len().min(MOUNTS_MAX + 1))),
        },
    }
}

fn one(mount: &Mount, scratch: &OwnedFd) -> Result<Opened, RootError> {
    if !mount.target.is_empty() {
        return Err(RootError::Target(mount.target.clone()));
    }
    match mount.kind.as_str() {
        "overlay" => overlay(&Overlay::parse(&mount.options)?, scratch),
        "bind" | "rbind" => directory(Path::new(&mount.source), &mount.options),
        other => Err(RootError::Kind(other.chars().take(64).collect())),
    }
}

fn directory(path: &Path, options: &[String]) -> Result<Opened, RootError> {
    let failed = |cause| RootError::Directory {
        path: path.to_owned(),
        cause,
    };
    // Opened as a directory first: a file can be cloned as well.
    open_directory(path)?;
    let opened = Opened {
        guest: clone_mount(path, true).map_err(failed)?,
        host: clone_mount(path, true).map_err(failed)?,
    };
    opened.read_only(options.iter().any(|option| option == "ro"))
}

impl Opened {
    fn read_only(self, wanted: bool) -> Result<Opened, RootError> {
        if wanted {
            for mount in [&self.guest, &self.host] {
                set_attributes(mount, MountAttrFlags::MOUNT_ATTR_RDONLY)
                    .map_err(RootError::Mount)?;
            }
        }
        Ok(self)
    }
}

/// Has something mounted at a place in the scratch directory, and takes it from there.
fn detach(
    scratch: &OwnedFd,
    mount: impl FnOnce(&Path) -> io::Result<()>,
) -> Result<Opened, RootError> {
    let merged = Path::new(MERGED);
    match make_directory(scratch, merged) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(RootError::Mount(error));
        }
        _ => {}
    }
    let place = format!("/proc/thread-self/fd/{}/{MERGED}", scratch.as_raw_fd());
    mount(Path::new(&place)).map_err(RootError::Mount)?;
    let opened = clone_tree(scratch.as_fd(), merged)
        .and_then(|guest| Ok((guest, clone_tree(scratch.as_fd(), merged)?)));
    rustix::mount::unmount(&place, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
        .map_err(|error| RootError::Mount(error.into()))?;
    let (guest, host) = opened.map_err(RootError::Mount)?;
    Ok(Opened { guest, host })
}

/// A detached copy of what is mounted at `path`, with what is mounted below it if `recursive`.
pub(super) fn clone_mount(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    if recursive {
        return clone_tree(CWD, path);
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(rustix::mount::open_tree(CWD, path, flags)?)
}

fn open_directory(path: &Path) -> Result<OwnedFd, RootError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map_err(|error| RootError::Directory {
        path: path.to_owned(),
        cause: error.into(),
    })
}

/// An overlay, taken apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Overlay {
    lower: Vec<PathBuf>,
    upper_and_work: Option<(PathBuf, PathBuf)>,
    read_only: bool,
    /// What goes to the kernel as it is.
    rest: Vec<String>,
}

impl Overlay {
    fn parse(options: &[String]) -> Result<Overlay, RootError> {
        let mut overlay = Overlay::default();
        let (mut upper, mut work) = (None, None);
        for option in options {
            match option.split_once('=') {
                Some(("lowerdir", layers)) => overlay.lower = split_layers(layers),
                Some(("upperdir", path)) => upper = Some(PathBuf::from(path)),
                Some(("workdir", path)) => work = Some(PathBuf::from(path)),
                Some(("uidmap" | "gidmap", _)) => {
                    return Err(bad(option, "user namespaces are not supported yet"));
                }
                _ if option.contains([',', '\0']) => {
                    return Err(bad(option, "has a comma or a zero byte"));
                }
                _ => match option.as_str() {
                    "ro" => overlay.read_only = true,
                    // Of the host's mount, which has stricter ones.
                    "rw" | "nosuid" | "nodev" | "noexec" | "noatime" | "relatime" => {}
                    _ => overlay.rest.push(option.clone()),
                },
            }
        }
        if !(1..=LAYERS_MAX).contains(&overlay.lower.len()) {
            return Err(bad("lowerdir", "must name 1 to 500 layers"));
        }
        overlay.upper_and_work = match (upper, work) {
            (Some(upper), Some(work)) => Some((upper, work)),
            (None, None) => None,
            _ => return Err(bad("upperdir", "goes with workdir")),
        };
        Ok(overlay)
    }

    /// The option string, from names of the opened directories: a name is short, while a path may be as long as the string may be.
    fn options(&self, lower: &[OwnedFd], upper: Option<&(OwnedFd, OwnedFd)>) -> String {
        let name = |fd: &OwnedFd| format!("/proc/thread-self/fd/{}", fd.as_raw_fd());
        let lower: Vec<String> = lower.iter().map(name).collect();
        let mut options = format!("lowerdir={}", lower.join(":"));
        if let Some((upper, work)) = upper {
            options += &format!(",upperdir={},workdir={}", name(upper), name(work));
        }
        for option in &self.rest {
            options += &format!(",{option}");
        }
        options
    }
}

fn bad(option: &str, why: &'static str) -> RootError {
    RootError::Option(option.chars().take(128).collect(), why)
}

/// Layers are separated by colons; one that belongs to a name has a backslash in front (Documentation/filesystems/overlayfs.rst).
fn split_layers(layers: &str) -> Vec<PathBuf> {
    let mut all = Vec::new();
    let mut layer = String::new();
    let mut chars = layers.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => layer.extend(chars.next()),
            ':' => all.push(std::mem::take(&mut layer)),
            c => layer.push(c),
        }
    }
    all.push(layer);
    let all = all.into_iter().filter(|layer| !layer.is_empty());
    all.map(PathBuf::from).collect()
}

fn overlay(overlay: &Overlay, scratch: &OwnedFd) -> Result<Opened, RootError> {
    let lower = overlay.lower.iter().map(|path| open_directory(path));
    let lower = lower.collect::<Result<Vec<OwnedFd>, RootError>>()?;
    let upper = match &overlay.upper_and_work {
        Some((upper, work)) => Some((open_directory(upper)?, open_directory(work)?)),
        None => None,
    };
    let options = overlay.options(&lower, upper.as_ref());
    if options.len() > OPTIONS_MAX_BYTES {
        return Err(bad("lowerdir", "too many layers for one mount"));
    }
    let opened = detach(scratch, |place| {
        mount_overlay(&place.to_string_lossy(), &options)
    })?;
    opened.read_only(overlay.read_only)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(options: &[&str]) -> Result<Overlay, RootError> {
        let options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
        Overlay::parse(&options)
    }

    #[test]
    fn containerd_s_overlay_is_taken_apart() {
        let overlay = parse(&[
            "index=off",
            "workdir=/s/3/work",
            "upperdir=/s/3/fs",
            "lowerdir=/s/2/fs:/s/1/fs",
        ])
        .expect("an overlay");
        assert_eq!(overlay.lower, [Path::new("/s/2/fs"), Path::new("/s/1/fs")]);
        let upper = overlay.upper_and_work.expect("writable");
        assert_eq!(upper, ("/s/3/fs".into(), "/s/3/work".into()));
        assert_eq!(overlay.rest, ["index=off"]);
    }

    #[test]
    fn a_colon_that_is_part_of_a_layer_s_name_separates_nothing() {
        assert_eq!(
            split_layers(r"/a\:b:/c"),
            [Path::new("/a:b"), Path::new("/c")]
        );
    }

    #[test]
    fn an_option_cannot_smuggle_another_in() {
        assert!(parse(&["lowerdir=/a", "index=off,upperdir=/etc"]).is_err());
    }

    #[test]
    fn an_upper_layer_needs_its_work_directory() {
        assert!(parse(&["lowerdir=/a", "upperdir=/b"]).is_err());
        assert!(parse(&["upperdir=/b", "workdir=/c"]).is_err());
    }

    #[test]
    fn other_types_are_refused_by_name() {
        let error = one(
            &Mount {
                kind: "ext4".into(),
                ..Mount::default()
            },
            &tmpfs_or_null(),
        )
        .expect_err("not taken")
        .to_string();
        assert!(error.contains("\"ext4\""), "{error}");
    }

    fn tmpfs_or_null() -> OwnedFd {
        std::fs::File::open("/dev/null").expect("/dev/null").into()
    }

    proptest! {
        #[test]
        fn any_options_are_parsed_or_refused(options: Vec<String>) {
            let _either = Overlay::parse(&options);
        }
    }
}
