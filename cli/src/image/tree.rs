//! Changes below one directory that a stranger names, without ever leaving it.
//!
//! A path of an image is split and checked here, then resolved by the kernel with the directory as its root
//! (`openat2(2)`, `RESOLVE_IN_ROOT`): `..` and absolute symbolic links stay inside, magic links are refused. Every
//! change is made relative to the parent directory's fd and never follows the last component.

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::tar::PATH_MAX_BYTES;

/// Longest component of a path, in bytes (`NAME_MAX`).
const NAME_MAX_BYTES: usize = 255;

/// A path below a root: at least no `..`, no NUL, no empty component; empty for the root itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Below(Vec<Vec<u8>>);

/// Why a path was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadPath {
    #[error("leads out of the image's root")]
    Escapes,
    #[error("is longer than a path may be")]
    TooLong,
    #[error("contains a NUL byte")]
    Nul,
}

impl Below {
    /// Takes a path as an image writes it: relative to the root whether or not it begins with `/`.
    ///
    /// # Errors
    /// `..` above the root, NUL bytes and names beyond the kernel's limits are refused.
    pub(crate) fn new(path: &[u8]) -> Result<Below, BadPath> {
        if path.len() > PATH_MAX_BYTES {
            return Err(BadPath::TooLong);
        }
        if path.contains(&0) {
            return Err(BadPath::Nul);
        }
        let mut names: Vec<Vec<u8>> = Vec::new();
        for name in path.split(|byte| *byte == b'/') {
            match name {
                b"" | b"." => {}
                b".." => {
                    names.pop().ok_or(BadPath::Escapes)?;
                }
                name if name.len() > NAME_MAX_BYTES => return Err(BadPath::TooLong),
                name => names.push(name.to_vec()),
            }
        }
        Ok(Below(names))
    }

    /// The last name, or `None` for the root.
    pub(crate) fn name(&self) -> Option<&[u8]> {
        self.0.last().map(Vec::as_slice)
    }

    fn parents(&self) -> &[Vec<u8>] {
        self.0.split_last().map_or(&[], |(_, parents)| parents)
    }

    fn joined(names: &[Vec<u8>]) -> PathBuf {
        if names.is_empty() {
            return PathBuf::from(".");
        }
        names.iter().map(|name| OsStr::from_bytes(name)).collect()
    }
}

/// Owner, mode and time of something in the tree.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Attributes {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mode: u32,
    pub(crate) mtime: (i64, u32),
}

/// A directory that is the root of everything done through it.
pub(crate) struct Tree {
    root: OwnedFd,
}

impl Tree {
    /// The tree below `root`.
    pub(crate) fn new(root: OwnedFd) -> Tree {
        Tree { root }
    }

    /// The root's fd.
    pub(crate) fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Opens `path` with the tree as root, following symbolic links inside it.
    ///
    /// # Errors
    /// The kernel's; `ELOOP` for a loop of links or a magic link.
    pub(crate) fn open(&self, path: &Below, flags: OFlags) -> io::Result<OwnedFd> {
        self.open_names(&path.0, flags)
    }

    fn open_names(&self, names: &[Vec<u8>], flags: OFlags) -> io::Result<OwnedFd> {
        Ok(rustix::fs::openat2(
            &self.root,
            Below::joined(names),
            flags | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
        )?)
    }

    /// The parent directory of `path`, made (mode 0755, root's) where it is missing.
    ///
    /// # Errors
    /// A component is no directory, or a link that leads nowhere.
    pub(crate) fn parent(&self, path: &Below) -> io::Result<OwnedFd> {
        self.directories(path.parents())
    }

    /// The directory `path` itself, made in the same way.
    ///
    /// # Errors
    /// As for [`Tree::parent`].
    pub(crate) fn directory(&self, path: &Below) -> io::Result<OwnedFd> {
        self.directories(&path.0)
    }

    fn directories(&self, all: &[Vec<u8>]) -> io::Result<OwnedFd> {
        let directory = OFlags::PATH | OFlags::DIRECTORY;
        match self.open_names(all, directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            found => return found,
        }
        let mut parent = self.open_names(&[], directory)?;
        for end in 1..=all.len() {
            let names = all.get(..end).unwrap_or_default();
            parent = match self.open_names(names, directory) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    let name = names.last().map(Vec::as_slice).unwrap_or_default();
                    rustix::fs::mkdirat(&parent, name, Mode::from_raw_mode(0o755))?;
                    self.open_names(names, directory)?
                }
                found => found?,
            };
        }
        Ok(parent)
    }
}

/// What `name` in `parent` is, without following it; `None` if it is not there.
pub(crate) fn kind_of(parent: &OwnedFd, name: &[u8]) -> io::Result<Option<rustix::fs::Stat>> {
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Removes `name` from `parent` with everything in it.
pub(crate) fn remove(parent: &OwnedFd, name: &[u8], is_directory: bool) -> io::Result<()> {
    if is_directory {
        // The parent is pinned by its fd; the standard library removes without following links.
        let path = PathBuf::from(format!("/proc/self/fd/{}", parent.as_raw_fd()));
        return std::fs::remove_dir_all(path.join(OsStr::from_bytes(name)));
    }
    Ok(rustix::fs::unlinkat(parent, name, AtFlags::empty())?)
}

/// Creates the file `name`, which must not exist, open for writing.
pub(crate) fn create_file(parent: &OwnedFd, name: &[u8]) -> io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o600))?.into())
}

/// Opens the directory `name` itself, not a link to one.
pub(crate) fn open_directory(parent: &OwnedFd, name: &[u8]) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

/// Makes a whiteout as overlayfs knows it: a character device 0:0 (kernel, `filesystems/overlayfs.rst`).
pub(crate) fn whiteout(parent: &OwnedFd, name: &[u8]) -> io::Result<()> {
    Ok(rustix::fs::mknodat(
        parent,
        name,
        FileType::CharacterDevice,
        Mode::empty(),
        0,
    )?)
}

/// Whether this is a whiteout.
pub(crate) fn is_whiteout(stat: &rustix::fs::Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Hides what lower layers have in this directory.
pub(crate) fn make_opaque(directory: impl AsFd) -> io::Result<()> {
    Ok(rustix::fs::fsetxattr(
        directory,
        "trusted.overlay.opaque",
        b"y",
        XattrFlags::empty(),
    )?)
}

/// Sets owner, then mode (a change of owner clears setuid), then time, of an open file or directory.
pub(crate) fn set_attributes(fd: impl AsFd, attributes: &Attributes) -> io::Result<()> {
    let (uid, gid) = owner(attributes);
    rustix::fs::fchown(&fd, uid, gid)?;
    rustix::fs::fchmod(&fd, Mode::from_raw_mode(attributes.mode))?;
    Ok(rustix::fs::futimens(&fd, &times(attributes.mtime))?)
}

/// Sets owner and time, and the mode where it has one, of `name` itself.
pub(crate) fn set_attributes_at(
    parent: &OwnedFd,
    name: &[u8],
    attributes: &Attributes,
    has_mode: bool,
) -> io::Result<()> {
    let (uid, gid) = owner(attributes);
    rustix::fs::chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
    if has_mode {
        let mode = Mode::from_raw_mode(attributes.mode);
        rustix::fs::chmodat(parent, name, mode, AtFlags::empty())?;
    }
    let times = times(attributes.mtime);
    Ok(rustix::fs::utimensat(
        parent,
        name,
        &times,
        AtFlags::SYMLINK_NOFOLLOW,
    )?)
}

fn owner(attributes: &Attributes) -> (Option<Uid>, Option<Gid>) {
    (
        Some(Uid::from_raw(attributes.uid)),
        Some(Gid::from_raw(attributes.gid)),
    )
}

fn times((seconds, nanos): (i64, u32)) -> Timestamps {
    let time = Timespec {
        tv_sec: seconds,
        tv_nsec: nanos.into(),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_path_above_the_root_is_refused() {
        for path in ["../x", "a/../../x", "/..", "./../"] {
            assert_eq!(Below::new(path.as_bytes()), Err(BadPath::Escapes), "{path}");
        }
    }

    #[test]
    fn a_path_is_relative_to_the_root_however_it_is_written() {
        let plain = Below::new(b"etc/passwd");
        assert_eq!(Below::new(b"/etc//./passwd/"), plain);
        assert_eq!(Below::new(b"x/../etc/passwd"), plain);
    }

    #[test]
    fn the_root_has_no_name() {
        assert_eq!(Below::new(b"./").expect("valid").name(), None);
    }

    #[test]
    fn a_name_longer_than_the_kernel_takes_is_refused() {
        assert_eq!(Below::new(&[b'x'; 256]), Err(BadPath::TooLong));
    }

    proptest! {
        #[test]
        fn no_accepted_path_has_a_component_that_climbs(path: Vec<u8>) {
            if let Ok(below) = Below::new(&path) {
                for name in &below.0 {
                    prop_assert!(!name.is_empty() && name != b"." && name != b"..");
                    prop_assert!(!name.contains(&b'/') && !name.contains(&0));
                }
            }
        }
    }
}
