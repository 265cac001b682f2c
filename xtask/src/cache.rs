//! The cache of what takes long to make: guest kernel, testbed image, saved testbed, tools.
//!
//! An entry is a directory `ROOT/KIND/KEY`, where the key is the SHA-256 of everything that made it. It is built in a
//! sibling `KEY.tmp` under a lock of its own, flushed, then renamed: what has the final name is whole, however the build or
//! the machine ended. Two runs at once wait for each other; what a killed run left is removed by the next build of that kind.
//! Trusts whoever may write below ROOT (by default root alone).

mod key;

use std::error::Error;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};

use crate::interrupt;
pub use key::{Key, KeyBuilder};

/// Where the cache is, unless this names another directory.
pub const ROOT_VARIABLE: &str = "CAPSID_CACHE";
const ROOT_DEFAULT: &str = "/var/cache/capsid";

/// An entry that nobody asked for in so long is removed when another of its kind is built.
const KEEP_UNUSED_DAYS: u64 = 14;

/// Why an entry is not there.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The file system said no.
    #[error("{doing} {}", path.display())]
    Io {
        /// What we were doing, e.g. `creating`.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// The disk is full. Nothing is left of the entry.
    #[error("the disk of the cache {} is full: free some space, or set {ROOT_VARIABLE} to a directory on another disk", root.display())]
    Full {
        /// The cache's root.
        root: PathBuf,
    },
    /// The disk has too little room for what is about to be built. Nothing was begun.
    #[error("the disk of the cache {} has too little room: {needed_mib} MiB are needed, {free_mib} MiB are free; free some space, or set {ROOT_VARIABLE} to a directory on another disk", root.display())]
    TooLittle {
        /// The cache's root.
        root: PathBuf,
        /// What is needed in MiB.
        needed_mib: u64,
        /// What there is in MiB.
        free_mib: u64,
    },
    /// The cache's root cannot be written.
    #[error("the cache {} cannot be written: run as root, or set {ROOT_VARIABLE} to a directory of your own", root.display())]
    NotAllowed {
        /// The cache's root.
        root: PathBuf,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// The build itself failed. Nothing is left of the entry.
    #[error("building {kind}")]
    Build {
        /// What was being built.
        kind: String,
        /// Why it failed.
        #[source]
        cause: Box<dyn Error>,
    },
}

/// The cache.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens the cache that the environment names, making it where it is not there yet.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open() -> Result<Self, CacheError> {
        let root = std::env::var_os(ROOT_VARIABLE).filter(|value| !value.is_empty());
        Self::at(root.as_ref().map_or(Path::new(ROOT_DEFAULT), Path::new))
    }

    /// Opens the cache at a given place.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn at(root: &Path) -> Result<Self, CacheError> {
        let root = std::path::absolute(root).map_err(io_error("finding", root))?;
        match std::fs::create_dir_all(&root) {
            Ok(()) => Ok(Self { root }),
            Err(cause) => Err(refusal(&root, cause, "creating")),
        }
    }

    /// Where the cache is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The entry, if it is there.
    pub fn get(&self, kind: &str, key: &Key) -> Option<PathBuf> {
        let entry = self.root.join(kind).join(key.as_str());
        let dir = File::open(&entry).ok().filter(|_| entry.is_dir())?;
        // Says that it is in use (see `remove_unused`). Whoever may only read the cache cannot say so.
        let _ = dir.set_modified(SystemTime::now());
        Some(entry)
    }

    /// The entry; built by `build` into the directory it is given, if it is not there.
    ///
    /// # Errors
    /// The build failed, the disk is full, or the file system refused; nothing is left then.
    pub fn get_or_build(
        &self,
        kind: &str,
        key: &Key,
        build: impl FnOnce(&Path) -> Result<(), Box<dyn Error>>,
    ) -> Result<PathBuf, CacheError> {
        if let Some(entry) = self.get(kind, key) {
            return Ok(entry);
        }
        let room = self.root.join(kind);
        std::fs::create_dir_all(&room).map_err(|cause| refusal(&self.root, cause, "creating"))?;
        let _lock = Lock::wait(&room.join(format!("{}.lock", key.as_str())))
            .map_err(|cause| refusal(&self.root, cause, "locking"))?;
        // Another run may have built it while we waited.
        if let Some(entry) = self.get(kind, key) {
            return Ok(entry);
        }
        remove_stale(&room, key)?;
        let temporary = Temporary::create(room.join(format!("{}.tmp", key.as_str())))
            .map_err(|cause| refusal(&self.root, cause, "creating"))?;
        if let Err(cause) = build(&temporary.path) {
            return Err(if is_full(cause.as_ref()) || self.has_no_space() {
                CacheError::Full {
                    root: self.root.clone(),
                }
            } else {
                CacheError::Build {
                    kind: kind.to_owned(),
                    cause,
                }
            });
        }
        flush(&temporary.path).map_err(|cause| refusal(&self.root, cause, "flushing"))?;
        let entry = room.join(key.as_str());
        std::fs::rename(&temporary.path, &entry).map_err(io_error("renaming to", &entry))?;
        File::open(&room)
            .and_then(|dir| dir.sync_all())
            .map_err(io_error("flushing", &room))?;
        remove_unused(&room, SystemTime::now());
        Ok(entry)
    }

    /// A directory for one run, removed when dropped; what killed runs of this kind left is removed first.
    ///
    /// # Errors
    /// The file system refused.
    pub fn scratch(&self, kind: &str) -> Result<Scratch, CacheError> {
        let room = self.root.join(kind);
        let refused = |cause| refusal(&self.root, cause, "making a directory in");
        std::fs::create_dir_all(&room).map_err(refused)?;
        // Held until the new directory is locked: an unlocked one is a stale one.
        let _door = Lock::wait(&self.root.join(format!("{kind}.lock"))).map_err(refused)?;
        for entry in std::fs::read_dir(&room).map_err(refused)? {
            let path = entry.map_err(refused)?.path();
            if Lock::of_dir(&path).map_err(refused)?.is_some() {
                remove_dir(&path).map_err(refused)?;
            }
        }
        let temporary = Temporary::create(room.join(scratch_name())).map_err(refused)?;
        let lock = Lock::of_dir(&temporary.path).map_err(refused)?;
        Ok(Scratch {
            temporary,
            _lock: lock,
        })
    }

    /// Refuses before a build begins that cannot fit.
    ///
    /// # Errors
    /// There is less room than that.
    pub fn require_room(&self, needed_mib: u64) -> Result<(), CacheError> {
        // A file system that does not say how much is free is not asked twice.
        let free = rustix::fs::statvfs(&self.root)
            .map_or(u64::MAX, |fs| fs.f_bavail.saturating_mul(fs.f_frsize));
        let free_mib = free >> 20;
        if free_mib < needed_mib {
            return Err(CacheError::TooLittle {
                root: self.root.clone(),
                needed_mib,
                free_mib,
            });
        }
        Ok(())
    }

    /// A program that fails on a full disk says so only in its own words; the file system's word is what counts.
    fn has_no_space(&self) -> bool {
        rustix::fs::statvfs(&self.root)
            .is_ok_and(|fs| fs.f_bavail * fs.f_frsize < FULL_BYTES || fs.f_favail == 0)
    }
}

/// Below this much free space a failed build is told as a full disk.
const FULL_BYTES: u64 = 1 << 20;

/// No two directories of living processes have the same.
fn scratch_name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!(
        "{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    )
}

/// A directory for one run.
#[derive(Debug)]
pub struct Scratch {
    temporary: Temporary,
    _lock: Option<Lock>,
}

impl Scratch {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.temporary.path
    }
}

/// An exclusive lock on a file, released by dropping it.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Waits for the lock. The lock file stays: removing it would let two holders in.
    ///
    /// # Errors
    /// It cannot be made or locked.
    pub fn wait(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        flock(&file, FlockOperation::LockExclusive)?;
        Ok(Self { _file: file })
    }

    fn try_now(path: &Path) -> io::Result<Option<Self>> {
        Self::try_file(OpenOptions::new().create(true).append(true).open(path)?)
    }

    /// The lock of a directory, if it is free; none either when the directory is gone.
    fn of_dir(path: &Path) -> io::Result<Option<Self>> {
        match File::open(path) {
            Ok(file) => Self::try_file(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn try_file(file: File) -> io::Result<Option<Self>> {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self { _file: file })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// A directory that is removed again, unless it was renamed away.
#[derive(Debug)]
struct Temporary {
    path: PathBuf,
    _undone: interrupt::Undone,
}

impl Temporary {
    fn create(path: PathBuf) -> io::Result<Self> {
        let undone = interrupt::remove(path.clone());
        std::fs::create_dir(&path)?;
        Ok(Self {
            path,
            _undone: undone,
        })
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Err(error) = remove_dir(&self.path) {
            eprintln!(
                "xtask: removing {}: {error}; the next build will try again",
                self.path.display()
            );
        }
    }
}

/// Removes the temporaries of this kind whose builder is dead: our own key's, as we hold its lock, and those with a free lock.
fn remove_stale(room: &Path, ours: &Key) -> Result<(), CacheError> {
    let entries = std::fs::read_dir(room).map_err(io_error("reading", room))?;
    for entry in entries {
        let path = entry.map_err(io_error("reading", room))?.path();
        if path.extension() != Some("tmp".as_ref()) {
            continue;
        }
        let lock_path = path.with_extension("lock");
        let free = path.file_stem() == Some(ours.as_str().as_ref())
            || Lock::try_now(&lock_path)
                .map_err(io_error("locking", &lock_path))?
                .is_some();
        if free {
            remove_dir(&path).map_err(io_error("removing", &path))?;
        }
    }
    Ok(())
}

/// Removes the entries of this kind that nobody asked for in a long time: a new one mostly takes the place of an old one.
/// One that cannot be removed costs room, nothing else.
fn remove_unused(room: &Path, now: SystemTime) {
    let keep = Duration::from_secs(KEEP_UNUSED_DAYS * 24 * 60 * 60);
    for entry in std::fs::read_dir(room).into_iter().flatten().flatten() {
        let path = entry.path();
        let used = entry.metadata().and_then(|metadata| metadata.modified());
        let unused =
            used.is_ok_and(|used| now.duration_since(used).is_ok_and(|since| since > keep));
        if unused && path.is_dir() && path.extension().is_none() {
            if let Err(error) = remove_dir(&path) {
                eprintln!(
                    "xtask: removing {}, unused for {KEEP_UNUSED_DAYS} days: {error}",
                    path.display()
                );
            }
        }
    }
}

/// Removes a directory and all below it; one that is gone is fine.
fn remove_dir(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Flushes every file and directory below `path`, then `path`.
fn flush(path: &Path) -> io::Result<()> {
    let kind = std::fs::symlink_metadata(path)?.file_type();
    if kind.is_dir() {
        for entry in std::fs::read_dir(path)? {
            flush(&entry?.path())?;
        }
    }
    if kind.is_dir() || kind.is_file() {
        File::open(path)?.sync_all()?;
    }
    Ok(())
}

fn io_error<'a>(doing: &'static str, path: &'a Path) -> impl Fn(io::Error) -> CacheError + 'a {
    move |cause| CacheError::Io {
        doing,
        path: path.to_owned(),
        cause,
    }
}

fn refusal(root: &Path, cause: io::Error, doing: &'static str) -> CacheError {
    match cause.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => CacheError::Full {
            root: root.to_owned(),
        },
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            CacheError::NotAllowed {
                root: root.to_owned(),
                cause,
            }
        }
        _ => CacheError::Io {
            doing,
            path: root.to_owned(),
            cause,
        },
    }
}

fn is_full(error: &(dyn Error + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            if matches!(
                io.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            ) {
                return true;
            }
        }
        next = error.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    /// A cache in a directory of its own, removed at the end.
    struct Own(Cache);

    impl Own {
        fn new(name: &str) -> Self {
            let root =
                std::env::temp_dir().join(format!("xtask-cache-{}-{name}", std::process::id()));
            Self(Cache::at(&root).expect("cache"))
        }
        fn left(&self, kind: &str) -> Vec<String> {
            let mut names: Vec<String> = std::fs::read_dir(self.0.root().join(kind))
                .expect("kind exists")
                .map(|entry| {
                    entry
                        .expect("entry")
                        .file_name()
                        .to_string_lossy()
                        .into_owned()
                })
                .filter(|name| !name.ends_with(".lock"))
                .collect();
            names.sort();
            names
        }
    }

    impl Drop for Own {
        fn drop(&mut self) {
            std::fs::remove_dir_all(self.0.root()).expect("remove scratch");
        }
    }

    fn key(text: &str) -> Key {
        Key::builder().bytes(text).finish()
    }

    #[test]
    fn a_second_get_builds_nothing() {
        let scratch = Own::new("second");
        let build = |dir: &Path| Ok(std::fs::write(dir.join("f"), "1")?);
        let first = scratch
            .0
            .get_or_build("k", &key("a"), build)
            .expect("built");
        let second = scratch
            .0
            .get_or_build("k", &key("a"), |_| Err("built twice".into()))
            .expect("there");
        assert_eq!(first, second);
        assert_eq!(std::fs::read(second.join("f")).expect("f"), b"1");
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let scratch = Own::new("failed");
        let error = scratch.0.get_or_build("k", &key("a"), |dir| {
            std::fs::write(dir.join("half"), "1")?;
            Err("no".into())
        });
        assert_eq!(error.expect_err("failed").to_string(), "building k");
        assert!(scratch.left("k").is_empty());
    }

    #[test]
    fn a_full_disk_is_one_line_and_leaves_nothing() {
        let scratch = Own::new("full");
        let full = || Box::new(io::Error::from(io::ErrorKind::StorageFull));
        let error = scratch
            .0
            .get_or_build("k", &key("a"), |_| Err(full()))
            .expect_err("full");
        assert!(matches!(error, CacheError::Full { .. }), "{error}");
        assert_eq!(error.to_string().lines().count(), 1);
        assert!(scratch.left("k").is_empty());
    }

    #[test]
    fn a_build_that_cannot_fit_is_not_begun() {
        let own = Own::new("room");
        let error = own
            .0
            .require_room(u64::MAX >> 20)
            .expect_err("no disk is that large");
        assert_eq!(error.to_string().lines().count(), 1);
        own.0.require_room(0).expect("nothing always fits");
    }

    #[test]
    fn an_entry_long_unused_goes_when_another_is_built() {
        let own = Own::new("unused");
        let old = own
            .0
            .get_or_build("k", &key("old"), |_| Ok(()))
            .expect("built");
        let room = own.0.root().join("k");
        let days = |days: u64| Duration::from_secs(days * 24 * 60 * 60);
        remove_unused(&room, SystemTime::now() + days(KEEP_UNUSED_DAYS - 1));
        assert!(old.is_dir());
        remove_unused(&room, SystemTime::now() + days(KEEP_UNUSED_DAYS + 1));
        assert!(!old.exists());
    }

    #[test]
    fn what_a_killed_build_left_is_removed_by_the_next() {
        let scratch = Own::new("killed");
        let room = scratch.0.root().join("k");
        for stem in [
            key("a").as_str().to_owned(),
            key("other").as_str().to_owned(),
        ] {
            std::fs::create_dir_all(room.join(format!("{stem}.tmp")).join("half"))
                .expect("left over");
        }
        scratch
            .0
            .get_or_build("k", &key("a"), |_| Ok(()))
            .expect("built");
        assert_eq!(scratch.left("k"), [key("a").as_str().to_owned()]);
    }

    #[test]
    fn a_build_under_way_is_not_removed() {
        let scratch = Own::new("underway");
        scratch
            .0
            .get_or_build("k", &key("a"), |ours| {
                scratch.0.get_or_build("k", &key("b"), |_| Ok(()))?;
                assert!(ours.is_dir());
                Ok(())
            })
            .expect("both built");
    }

    #[test]
    fn two_runs_at_once_build_once() {
        let scratch = Own::new("twice");
        let built = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let build = |_: &Path| {
                        built.fetch_add(1, Ordering::SeqCst);
                        Ok(())
                    };
                    scratch
                        .0
                        .get_or_build("k", &key("a"), build)
                        .expect("there");
                });
            }
        });
        assert_eq!(built.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn scratch_directories_come_and_go() {
        let own = Own::new("scratch");
        let stale = own.0.root().join("runs/1");
        std::fs::create_dir_all(&stale).expect("left over");
        let scratch = own.0.scratch("runs").expect("scratch");
        assert!(scratch.path().is_dir() && !stale.exists());
        drop(scratch);
        assert!(own.left("runs").is_empty());
    }
}
