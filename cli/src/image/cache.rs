//! The layer cache: one directory for each unpacked layer, named by the digest of its tar.
//!
//! A layer is unpacked in a directory under `tmp/` and renamed into `layers/` when it is whole, so that a layer
//! that is there is a good one, whatever was killed on the way. Each temporary directory is locked by its maker
//! (`flock(2)`, released by the kernel when the process ends); the next run removes those that nobody holds.

use super::digest::Digest;
use rustix::fs::{FlockOperation, Mode, OFlags};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Where the cache is, unless `$CAPSID_CACHE` says otherwise.
pub(crate) const DEFAULT_DIRECTORY: &str = "/var/cache/capsid";
/// Largest layer after decompression, in bytes.
pub(crate) const LAYER_MAX_BYTES: u64 = 64 << 30;
/// Most left-over temporary directories that one run removes.
const STALE_MAX: usize = 1024;
/// Tries to find a name nobody else has.
const NAME_TRIES_MAX: u32 = 64;

/// What the cache could not do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CacheError {
    /// A directory of the cache cannot be made or opened.
    #[error("cannot use the image cache at {path} (set CAPSID_CACHE to another directory)")]
    Use {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// A layer could not be put into its place.
    #[error("cannot store a layer in the image cache at {path}")]
    Store {
        /// The layer's place.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

/// The cache.
#[derive(Debug)]
pub(crate) struct Cache {
    layers: PathBuf,
    temporary: PathBuf,
}

impl Cache {
    /// Opens the cache in `directory`, making it where it is missing, and removes what dead runs have left.
    ///
    /// # Errors
    /// The directory cannot be made or written.
    pub(crate) fn open(directory: &Path) -> Result<Cache, CacheError> {
        let cache = Cache {
            layers: directory.join("layers"),
            temporary: directory.join("tmp"),
        };
        for path in [&cache.layers, &cache.temporary] {
            let made = fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path);
            made.map_err(|cause| use_error(path, cause))?;
        }
        cache
            .sweep()
            .map_err(|cause| use_error(&cache.temporary, cause))?;
        Ok(cache)
    }

    /// A directory on the cache's file system, for unnamed temporary files.
    pub(crate) fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Where the layer is, or will be.
    pub(crate) fn path(&self, diff_id: &Digest) -> PathBuf {
        self.layers.join(diff_id.hex())
    }

    /// Whether the layer is there.
    pub(crate) fn has(&self, diff_id: &Digest) -> bool {
        self.path(diff_id).is_dir()
    }

    /// Begins to unpack a layer.
    ///
    /// # Errors
    /// No directory can be made.
    pub(crate) fn begin(&self) -> Result<Unpacking, CacheError> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        for _ in 0..NAME_TRIES_MAX {
            let unique = NEXT.fetch_add(1, Ordering::Relaxed);
            let name = format!("{}-{unique}", std::process::id());
            let path = self.temporary.join(name);
            match fs::DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(cause) => return Err(use_error(&path, cause)),
            }
            // The guard comes first: whatever fails now removes the directory.
            let mut unpacking = Unpacking { path, lock: None };
            unpacking.lock =
                lock(&unpacking.path).map_err(|cause| use_error(&unpacking.path, cause))?;
            if unpacking.lock.is_none() {
                continue; // a sweep of another run came between; the name is gone
            }
            let root = unpacking.root();
            fs::DirBuilder::new()
                .mode(0o755)
                .create(&root)
                .map_err(|cause| use_error(&root, cause))?;
            return Ok(unpacking);
        }
        Err(use_error(
            &self.temporary,
            io::ErrorKind::AlreadyExists.into(),
        ))
    }

    /// Puts an unpacked layer into its place; where another run was faster, its layer stays.
    ///
    /// # Errors
    /// It cannot be written out or renamed.
    pub(crate) fn finish(&self, unpacking: &Unpacking, diff_id: &Digest) -> Result<(), CacheError> {
        let path = self.path(diff_id);
        let stored = || -> io::Result<()> {
            // A layer that is there is good even after a power cut: its files reach the disk before its name.
            rustix::fs::syncfs(open_directory(&unpacking.root())?)?;
            match fs::rename(unpacking.root(), &path) {
                Ok(()) => Ok(()),
                Err(_) if path.is_dir() => Ok(()),
                Err(error) => Err(error),
            }
        };
        stored().map_err(|cause| CacheError::Store {
            path: path.clone(),
            cause,
        })
    }

    /// Removes the temporary directories whose makers are gone.
    fn sweep(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.temporary)?.take(STALE_MAX) {
            let path = entry?.path();
            match lock(&path) {
                Ok(Some(_lock)) => remove(&path)?,
                Ok(None) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// A layer being unpacked; the directory is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct Unpacking {
    path: PathBuf,
    lock: Option<OwnedFd>,
}

impl Unpacking {
    fn root(&self) -> PathBuf {
        self.path.join("root")
    }

    /// The root of the layer.
    ///
    /// # Errors
    /// It cannot be opened.
    pub(crate) fn directory(&self) -> Result<OwnedFd, CacheError> {
        open_directory(&self.root()).map_err(|cause| use_error(&self.root(), cause))
    }
}

impl Drop for Unpacking {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            eprintln!(
                "capsid: cannot remove {}, the next run will: {error}",
                self.path.display()
            );
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Locks a temporary directory; `None` if somebody else holds it, or if it was removed meanwhile.
fn lock(path: &Path) -> io::Result<Option<OwnedFd>> {
    let directory = match open_directory(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    match rustix::fs::flock(directory.as_fd(), FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let is_there = rustix::fs::fstat(&directory)?.st_nlink > 0 && path.exists();
    Ok(is_there.then_some(directory))
}

fn use_error(path: &Path, cause: io::Error) -> CacheError {
    CacheError::Use {
        path: path.to_owned(),
        cause,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scratch;

    fn digest() -> Digest {
        Digest::of(b"a layer")
    }

    fn left_behind(scratch: &Scratch) -> usize {
        fs::read_dir(scratch.path().join("tmp"))
            .expect("the cache is open")
            .count()
    }

    #[test]
    fn a_layer_appears_only_when_it_is_whole() {
        let scratch = Scratch::new("cache");
        let cache = Cache::open(scratch.path()).expect("writable");
        let unpacking = cache.begin().expect("writable");
        assert!(!cache.has(&digest()));
        cache.finish(&unpacking, &digest()).expect("renamed");
        drop(unpacking);
        assert!(cache.has(&digest()));
        assert_eq!(left_behind(&scratch), 0);
    }

    #[test]
    fn an_unpacking_given_up_leaves_nothing() {
        let scratch = Scratch::new("cache");
        let cache = Cache::open(scratch.path()).expect("writable");
        drop(cache.begin().expect("writable"));
        assert_eq!(left_behind(&scratch), 0);
    }

    #[test]
    fn what_a_killed_run_left_is_swept_and_what_a_live_one_holds_stays() {
        let scratch = Scratch::new("cache");
        let cache = Cache::open(scratch.path()).expect("writable");
        let live = cache.begin().expect("writable");
        fs::create_dir_all(scratch.path().join("tmp/1-0/root/etc")).expect("a dead run's");
        Cache::open(scratch.path()).expect("writable");
        assert_eq!(left_behind(&scratch), 1);
        assert!(live.path.exists());
    }

    #[test]
    fn the_second_of_two_runs_keeps_the_first_one_s_layer() {
        let scratch = Scratch::new("cache");
        let cache = Cache::open(scratch.path()).expect("writable");
        let first = cache.begin().expect("writable");
        let second = cache.begin().expect("writable");
        fs::write(first.root().join("mark"), "first").expect("writable");
        cache.finish(&first, &digest()).expect("renamed");
        cache.finish(&second, &digest()).expect("kept");
        drop((first, second));
        assert!(cache.path(&digest()).join("mark").exists());
        assert_eq!(left_behind(&scratch), 0);
    }
}
