//! Files of the shared directory. Nothing of it is in the guest's caches when a round begins.

use super::super::load::Accesses;
use super::Task;
use super::disk::access;
use nix::mount::{MsFlags, mount};
use rustix::fs::{Advice, fadvise};
use std::fs::{self, File};
use std::io;
use std::path::Path;

/// The share's tag.
pub const TAG: &str = "share";
/// What the host puts into it: a file of [`super::super::load::STORE_BYTES`].
pub const FILE: &str = "file";
/// An archive.
pub const ARCHIVE: &str = "archive.tar";
/// Directories with files in them.
pub const TREE: &str = "tree";

const MOUNT: &str = "/tmp";
/// Where the archive is unpacked.
const UNPACKED: &str = "/tmp/unpacked";

fn mount_share() -> io::Result<()> {
    let none = None::<&str>;
    Ok(mount(
        Some(TAG),
        MOUNT,
        Some("virtiofs"),
        MsFlags::empty(),
        none,
    )?)
}

/// Pages, names and attributes alike (Documentation/admin-guide/sysctl/vm.rst).
fn drop_caches() -> io::Result<()> {
    fs::write("/proc/sys/vm/drop_caches", "3")
}

/// The file.
pub struct StoredFile(Accesses);

impl StoredFile {
    /// Mounts the share.
    ///
    /// # Errors
    /// There is none.
    pub fn open(accesses: Accesses) -> io::Result<StoredFile> {
        mount_share()?;
        Ok(StoredFile(accesses))
    }
}

impl Task for StoredFile {
    fn prepare(&mut self) -> io::Result<()> {
        drop_caches()
    }

    fn round(&mut self) -> io::Result<()> {
        let file = File::open(Path::new(MOUNT).join(FILE))?;
        if self.0.random {
            // What is read ahead would be what is read later.
            fadvise(&file, 0, None, Advice::Random)?;
        }
        access(&file, self.0)
    }
}

/// The archive.
pub struct Untar;

impl Untar {
    /// Mounts the share.
    ///
    /// # Errors
    /// There is none.
    pub fn open() -> io::Result<Untar> {
        mount_share()?;
        Ok(Untar)
    }
}

impl Task for Untar {
    fn prepare(&mut self) -> io::Result<()> {
        match fs::remove_dir_all(UNPACKED) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        drop_caches()
    }

    fn round(&mut self) -> io::Result<()> {
        let archive = File::open(Path::new(MOUNT).join(ARCHIVE))?;
        tar::Archive::new(io::BufReader::with_capacity(1 << 16, archive)).unpack(UNPACKED)
    }
}

/// The tree.
pub struct Find;

impl Find {
    /// Mounts the share.
    ///
    /// # Errors
    /// There is none.
    pub fn open() -> io::Result<Find> {
        mount_share()?;
        Ok(Find)
    }
}

impl Task for Find {
    fn prepare(&mut self) -> io::Result<()> {
        drop_caches()
    }

    fn round(&mut self) -> io::Result<()> {
        match walk(&Path::new(MOUNT).join(TREE))? {
            0 => Err(io::Error::other("the tree has no files")),
            _ => Ok(()),
        }
    }
}

fn walk(directory: &Path) -> io::Result<usize> {
    let mut files = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        // One `lstat` each, as `find -size` makes.
        match entry.metadata()?.is_dir() {
            true => files += walk(&entry.path())?,
            false => files += 1,
        }
    }
    Ok(files)
}
