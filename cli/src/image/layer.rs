//! Unpacks one layer into a directory in the form that overlayfs stacks.
//!
//! The layer is hostile: its paths stay below the directory ([`super::tree`]), its headers are bounded
//! ([`super::tar`]), device nodes are not made on the host, and of its extended attributes only those are kept that
//! mean something to the container and nothing to overlayfs. OCI whiteouts (image-spec, "Representing Changes")
//! become overlayfs whiteouts.

use super::tar::{Entry, Kind, TarError, TarReader};
use super::tree::{self, Attributes, BadPath, Below, Tree};
use crate::escape::Line;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};

/// Size of the buffer between archive and file, in bytes.
const COPY_BUFFER_BYTES: usize = 256 * 1024;
/// A name with this in front removes the rest of the name from the layers below.
const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// This name hides everything that the layers below have in its directory.
const OPAQUE_NAME: &[u8] = b".wh..wh..opq";
/// Other names of this form were AUFS's own bookkeeping.
const AUFS_PREFIX: &[u8] = b".wh..wh.";

/// Why a layer was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LayerError {
    #[error("the layer is not a tar archive that can be read")]
    Tar(#[from] TarError),
    #[error("the layer's path {path} {reason}")]
    Path { path: String, reason: BadPath },
    #[error("the layer's hard link {path} names {target}, which {reason}")]
    Link {
        path: String,
        target: String,
        reason: &'static str,
    },
    #[error("the layer's path {path} runs into a loop of symbolic links")]
    Loop { path: String },
    #[error("the layer has a device node at {path}; images bring no devices")]
    Device { path: String },
    #[error("unpacking {path}")]
    Write {
        path: String,
        #[source]
        cause: io::Error,
    },
}

/// What was unpacked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Unpacked {
    /// Extended attributes that the cache's file system cannot hold, or that are none of an image's business.
    pub(crate) dropped_xattrs: u64,
}

/// Unpacks the layer `archive` into `root` and gives back the rest of the stream behind the archive's end.
///
/// # Errors
/// The first entry that is refused ends it; the caller removes the directory.
pub(crate) fn unpack<R: Read>(archive: R, root: OwnedFd) -> Result<(Unpacked, R), LayerError> {
    let mut layer = Layer {
        tree: Tree::new(root),
        directories: Vec::new(),
        unpacked: Unpacked::default(),
        buffer: vec![0; COPY_BUFFER_BYTES],
    };
    let mut reader = TarReader::new(archive);
    while let Some(entry) = reader.next_entry()? {
        layer.entry(&entry, &mut reader)?;
    }
    layer.finish()?;
    Ok((layer.unpacked, reader.into_inner()))
}

struct Layer {
    tree: Tree,
    /// Directories whose time is set at the end, after what is put into them.
    directories: Vec<(Below, (i64, u32))>,
    unpacked: Unpacked,
    buffer: Vec<u8>,
}

impl Layer {
    fn entry<R: Read>(&mut self, entry: &Entry, data: &mut TarReader<R>) -> Result<(), LayerError> {
        let shown = || Line(&entry.path).to_string();
        let path = Below::new(&entry.path).map_err(|reason| LayerError::Path {
            path: shown(),
            reason,
        })?;
        let Some(name) = path.name() else {
            return self
                .root(entry)
                .map_err(|cause| write_error(shown(), cause));
        };
        let parent = self
            .tree
            .parent(&path)
            .map_err(|cause| write_error(shown(), cause))?;
        if let Some(removed) = name.strip_prefix(WHITEOUT_PREFIX) {
            return hide(&parent, name, removed).map_err(|cause| write_error(shown(), cause));
        }
        if entry.kind == Kind::Device {
            return device(entry);
        }
        self.make(entry, &path, &parent, name, data)
    }

    /// The root's own entry has an owner, a mode and a time, and must be a directory.
    fn root(&mut self, entry: &Entry) -> io::Result<()> {
        if entry.kind != Kind::Directory {
            return Err(Errno::NOTDIR.into());
        }
        tree::set_attributes(self.tree.root(), &attributes(entry))?;
        self.unpacked.dropped_xattrs += set_xattrs(self.tree.root(), &entry.xattrs)?;
        self.directories
            .push((Below::new(b"").map_err(io::Error::other)?, entry.mtime));
        Ok(())
    }

    fn make<R: Read>(
        &mut self,
        entry: &Entry,
        path: &Below,
        parent: &OwnedFd,
        name: &[u8],
        data: &mut TarReader<R>,
    ) -> Result<(), LayerError> {
        let failed = |cause| write_error(Line(&entry.path).to_string(), cause);
        let attributes = attributes(entry);
        // The target is looked up first: a link may name what it replaces.
        let link_target = match &entry.kind {
            Kind::HardLink(target) => Some(self.link_target(&entry.path, target)?),
            _ => None,
        };
        let before = clear_the_way(parent, name, &entry.kind).map_err(failed)?;
        match &entry.kind {
            Kind::Directory => {
                let dropped = make_directory(parent, name, before, &attributes, &entry.xattrs)
                    .map_err(failed)?;
                self.unpacked.dropped_xattrs += dropped;
                self.directories.push((path.clone(), entry.mtime));
            }
            Kind::File => {
                let mut file = tree::create_file(parent, name).map_err(failed)?;
                self.copy(entry, data, &mut file)?;
                let dropped = set_xattrs(&file, &entry.xattrs).map_err(failed)?;
                self.unpacked.dropped_xattrs += dropped;
                tree::set_attributes(&file, &attributes).map_err(failed)?;
            }
            Kind::Symlink(target) => {
                rustix::fs::symlinkat(target.as_slice(), parent, name)
                    .map_err(|error| failed(error.into()))?;
                tree::set_attributes_at(parent, name, &attributes, false).map_err(failed)?;
            }
            Kind::HardLink(_) => {
                if let Some(target) = link_target {
                    let from = rustix::fs::linkat(&target, "", parent, name, AtFlags::EMPTY_PATH);
                    from.map_err(|error| failed(error.into()))?;
                }
            }
            Kind::Fifo => {
                let mode = Mode::from_raw_mode(0o600);
                rustix::fs::mknodat(parent, name, FileType::Fifo, mode, 0)
                    .map_err(|error| failed(error.into()))?;
                tree::set_attributes_at(parent, name, &attributes, true).map_err(failed)?;
            }
            Kind::Device => return device(entry),
        }
        Ok(())
    }

    /// Copies the entry's bytes; a stream that ends before them is told apart from a disk that is full.
    fn copy<R: Read>(
        &mut self,
        entry: &Entry,
        data: &mut TarReader<R>,
        file: &mut std::fs::File,
    ) -> Result<(), LayerError> {
        loop {
            let count = match data.read(&mut self.buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => count,
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => continue,
                Err(cause) => return Err(TarError::from_io(entry.data_offset, cause).into()),
            };
            let bytes = self.buffer.get(..count).unwrap_or_default();
            file.write_all(bytes)
                .map_err(|cause| write_error(Line(&entry.path).to_string(), cause))?;
        }
    }

    /// The file that a hard link names, opened inside the layer, not followed if it is a symbolic link.
    fn link_target(&self, path: &[u8], target: &[u8]) -> Result<OwnedFd, LayerError> {
        let refuse = |reason| LayerError::Link {
            path: Line(path).to_string(),
            target: Line(target).to_string(),
            reason,
        };
        let below = Below::new(target).map_err(|_| refuse("leads out of the image's root"))?;
        let found = self.tree.open(&below, OFlags::PATH | OFlags::NOFOLLOW);
        let fd = found.map_err(|error| match Errno::from_io_error(&error) {
            Some(Errno::LOOP) => LayerError::Loop {
                path: Line(path).to_string(),
            },
            Some(Errno::NOENT) => refuse("is not in the layer"),
            _ => write_error(Line(path).to_string(), error),
        })?;
        let stat = rustix::fs::fstat(&fd).map_err(|_| refuse("cannot be looked at"))?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Err(refuse("is a directory")),
            _ => Ok(fd),
        }
    }

    /// Sets the directories' times, the deepest first: setting one changes no other.
    fn finish(&mut self) -> Result<(), LayerError> {
        for (path, mtime) in self.directories.iter().rev() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
            // A later entry may have replaced the directory by something else.
            let Ok(directory) = self.tree.open(path, flags) else {
                continue;
            };
            let stat =
                rustix::fs::fstat(&directory).map_err(|e| write_error(".".into(), e.into()))?;
            let attributes = Attributes {
                uid: stat.st_uid,
                gid: stat.st_gid,
                mode: stat.st_mode & 0o7777,
                mtime: *mtime,
            };
            tree::set_attributes(&directory, &attributes)
                .map_err(|cause| write_error(".".into(), cause))?;
        }
        Ok(())
    }
}

/// What was at a place before an entry took it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Before {
    Nothing,
    Whiteout,
    Directory,
}

/// Removes what the entry replaces: everything but a directory under a directory.
fn clear_the_way(parent: &OwnedFd, name: &[u8], kind: &Kind) -> io::Result<Before> {
    let Some(stat) = tree::kind_of(parent, name)? else {
        return Ok(Before::Nothing);
    };
    let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
    if is_directory && *kind == Kind::Directory {
        return Ok(Before::Directory);
    }
    tree::remove(parent, name, is_directory)?;
    Ok(match tree::is_whiteout(&stat) {
        true => Before::Whiteout,
        false => Before::Nothing,
    })
}

fn make_directory(
    parent: &OwnedFd,
    name: &[u8],
    before: Before,
    attributes: &Attributes,
    xattrs: &[(Vec<u8>, Vec<u8>)],
) -> io::Result<u64> {
    if before != Before::Directory {
        rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o700))?;
    }
    let directory = tree::open_directory(parent, name)?;
    if before == Before::Whiteout {
        // Removed and made anew in one layer: nothing of the old directory shines through.
        tree::make_opaque(&directory)?;
    }
    let dropped = set_xattrs(&directory, xattrs)?;
    tree::set_attributes(&directory, attributes)?;
    Ok(dropped)
}

/// A whiteout entry: hides one name of the layers below, or all of a directory.
fn hide(parent: &OwnedFd, name: &[u8], removed: &[u8]) -> io::Result<()> {
    if name == OPAQUE_NAME {
        let directory = tree::open_directory(parent, b".")?;
        return tree::make_opaque(&directory);
    }
    if name.starts_with(AUFS_PREFIX) {
        return Ok(());
    }
    if matches!(removed, b"" | b"." | b"..") {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the whiteout removes no name",
        ));
    }
    // A whiteout is about the layers below: what this layer itself has brought stays.
    match tree::kind_of(parent, removed)? {
        Some(_) => Ok(()),
        None => tree::whiteout(parent, removed),
    }
}

/// Devices below `/dev` are hidden by the container's own `/dev`; anywhere else they are refused.
fn device(entry: &Entry) -> Result<(), LayerError> {
    let path = entry.path.strip_prefix(b"./").unwrap_or(&entry.path);
    let path = path.strip_prefix(b"/").unwrap_or(path);
    if path.starts_with(b"dev/") {
        return Ok(());
    }
    Err(LayerError::Device {
        path: Line(&entry.path).to_string(),
    })
}

/// Sets the attributes that an image may bring; how many were dropped.
fn set_xattrs(fd: impl AsFd, xattrs: &[(Vec<u8>, Vec<u8>)]) -> io::Result<u64> {
    let mut dropped = 0;
    for (name, value) in xattrs {
        if !is_for_images(name) {
            dropped += 1;
            continue;
        }
        match rustix::fs::fsetxattr(&fd, name.as_slice(), value, XattrFlags::empty()) {
            Ok(()) => {}
            Err(Errno::OPNOTSUPP) => dropped += 1,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(dropped)
}

/// File capabilities, ACLs and the user's own attributes; never overlayfs's (`trusted.overlay.*`, `user.overlay.*`),
/// with which an image could redirect a path, and never a security label of the host.
fn is_for_images(name: &[u8]) -> bool {
    match name {
        b"security.capability" => true,
        b"system.posix_acl_access" | b"system.posix_acl_default" => true,
        name => name.starts_with(b"user.") && !name.starts_with(b"user.overlay."),
    }
}

fn attributes(entry: &Entry) -> Attributes {
    Attributes {
        uid: entry.uid,
        gid: entry.gid,
        mode: entry.mode,
        mtime: entry.mtime,
    }
}

fn write_error(path: String, cause: io::Error) -> LayerError {
    match Errno::from_io_error(&cause) {
        Some(Errno::LOOP) => LayerError::Loop { path },
        _ => LayerError::Write { path, cause },
    }
}

#[cfg(test)]
#[path = "layer_tests.rs"]
mod tests;
