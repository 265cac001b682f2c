//! The socket of a pod's server: its path, who may have it, and whether somebody answers there.
//!
//! The path is a digest of containerd's address, the namespace and the group's name (pkg/shim/util_unix.go, `CreateSocketAddress`), so
//! all containers of a pod find the same server. A socket whose server is gone is replaced. Nobody else is expected in the directory: it
//! is root's.

use rustix::fs::{FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use sha2::{Digest, Sha256};
use std::fmt::Write;
use std::fs::{DirBuilder, File};
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Component, Path, PathBuf};

/// The directory, where containerd names none: the one that every shim uses, because paths of sockets must be short.
pub const DEFAULT_DIRECTORY: &str = "/run/containerd/s";
/// The environment variable that names another directory to `start`, where containerd names none.
pub const DIRECTORY_VARIABLE: &str = "CAPSID_SOCKET_DIR";
/// The longest path of a socket in bytes: what containerd takes (`socketPathLimit`), one less than the kernel.
const PATH_MAX_BYTES: usize = 106;
/// Connections that wait to be accepted: the server takes them as soon as it runs, containerd opens one for each container.
const BACKLOG_MAX: i32 = 128;
/// How containerd writes an address.
const SCHEME: &str = "unix://";
/// Only its owner reaches a server.
const DIRECTORY_MODE: u32 = 0o700;
const SOCKET_MODE: u32 = 0o600;

/// What is wrong with a socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// A relative directory, or one with `..`.
    #[error("the directory for sockets, {0}, is not a plain absolute path")]
    Directory(PathBuf),
    /// Too long for an address.
    #[error(
        "the socket's path {0} is longer than {PATH_MAX_BYTES} bytes; a shorter directory is needed"
    )]
    TooLong(PathBuf),
    /// A step failed.
    #[error("cannot {what} {path}")]
    Io {
        /// The step.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

fn failed(what: &'static str, path: &Path) -> impl Fn(Errno) -> SocketError {
    let path = path.to_owned();
    move |cause| SocketError::Io {
        what,
        path: path.clone(),
        cause: cause.into(),
    }
}

/// The path of a group's socket.
///
/// # Errors
/// The directory is none that a socket can be in.
pub fn path(
    directory: &Path,
    grpc_address: &str,
    namespace: &str,
    group: &str,
) -> Result<PathBuf, SocketError> {
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    if !directory.is_absolute() || !directory.components().all(plain) {
        return Err(SocketError::Directory(directory.to_owned()));
    }
    // Joined as text: an absolute name would replace what is before it in a path, and be another group's.
    let parts = [grpc_address, namespace, group].map(str::as_bytes);
    let digest = Sha256::digest(parts.join(&b'/'));
    let mut name = String::with_capacity(2 * digest.len());
    for byte in digest {
        // Writing to a string cannot fail.
        let _written = write!(name, "{byte:02x}");
    }
    let path = directory.join(name);
    match path.as_os_str().len() {
        0..=PATH_MAX_BYTES => Ok(path),
        _ => Err(SocketError::TooLong(path)),
    }
}

/// The path as containerd writes an address.
pub fn address(path: &Path) -> String {
    format!("{SCHEME}{}", path.display())
}

/// The path in a bundle's `address`, if there is one: all that the action `delete` is left with.
///
/// # Errors
/// It cannot be read.
pub fn of_bundle(bundle: &Path) -> Result<Option<PathBuf>, SocketError> {
    let file = bundle.join("address");
    let mut address = String::new();
    let longest = (SCHEME.len() + PATH_MAX_BYTES) as u64;
    let read = File::open(&file).and_then(|it| it.take(longest).read_to_string(&mut address));
    match read {
        Ok(_) => {}
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => {
            let (what, path) = ("read", file);
            return Err(SocketError::Io { what, path, cause });
        }
    }
    let path = address.strip_prefix(SCHEME).map(PathBuf::from);
    Ok(path.filter(|path| path.is_absolute()))
}

/// Whether a server listens at `path`. One that is stopped, or has more to accept than it can, does.
///
/// # Errors
/// It can not be told.
pub fn answers(path: &Path) -> Result<bool, SocketError> {
    let failed = failed("connect to", path);
    let address = SocketAddrUnix::new(path).map_err(&failed)?;
    let socket = stream().map_err(&failed)?;
    match rustix::net::connect(&socket, &address) {
        // AGAIN: the backlog is full (unix_stream_connect, net/unix/af_unix.c); whoever opened it lives.
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Err(cause) => Err(failed(cause)),
    }
}

fn stream() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

/// Who has a socket.
#[derive(Debug)]
pub enum Claim {
    /// A server that listens there already.
    Answered,
    /// We, from now on.
    Ours(Claimed),
}

/// A socket that listens. Dropped, its file goes with it, unless it was left to a server.
#[derive(Debug)]
pub struct Claimed {
    listener: UnixListener,
    path: PathBuf,
    left: bool,
}

impl Claimed {
    /// The socket.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Leaves the file to a server, which has the duty to remove it.
    pub fn leave(mut self) {
        self.left = true;
    }
}

impl Drop for Claimed {
    fn drop(&mut self) {
        if !self.left {
            // On the way out of an error that is being told; a file that stays is replaced by the next start.
            let _stays = std::fs::remove_file(&self.path);
        }
    }
}

/// Listens at `path`, unless somebody does. Of any number of callers at once, one gets it; the directory's lock, held for the few system
/// calls of this function, decides.
///
/// # Errors
/// The directory or the socket cannot be made.
pub fn claim(path: &Path) -> Result<Claim, SocketError> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let made = DirBuilder::new()
        .recursive(true)
        .mode(DIRECTORY_MODE)
        .create(directory);
    made.map_err(|cause| SocketError::Io {
        what: "make directory",
        path: directory.to_owned(),
        cause,
    })?;
    let _lock = lock(directory)?;
    if answers(path)? {
        return Ok(Claim::Answered);
    }
    remove(path)?;
    listen(path)
        .map(Claim::Ours)
        .map_err(failed("listen at", path))
}

/// Removes the socket at `path` if its server is gone.
///
/// # Errors
/// It is still there, and no server.
pub fn remove_dead(path: &Path) -> Result<(), SocketError> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    if !directory.exists() {
        return Ok(());
    }
    let _lock = lock(directory)?;
    match answers(path)? {
        true => Ok(()),
        false => remove(path),
    }
}

/// Whoever has it decides alone whose a socket in this directory is.
fn lock(directory: &Path) -> Result<OwnedFd, SocketError> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let lock = rustix::fs::open(directory, flags, Mode::empty());
    let lock = lock.map_err(failed("open", directory))?;
    let locked = rustix::fs::flock(&lock, FlockOperation::LockExclusive);
    locked.map_err(failed("lock", directory))?;
    Ok(lock)
}

fn remove(path: &Path) -> Result<(), SocketError> {
    let failed = failed("remove the dead socket", path);
    match rustix::fs::lstat(path) {
        Ok(found) if FileType::from_raw_mode(found.st_mode) != FileType::Socket => {
            Err(failed(Errno::NOTSOCK))
        }
        Ok(_) => rustix::fs::unlink(path).map_err(failed),
        Err(Errno::NOENT) => Ok(()),
        Err(cause) => Err(failed(cause)),
    }
}

fn listen(path: &Path) -> rustix::io::Result<Claimed> {
    let socket = stream()?;
    // Before bind(2), which makes the file with this mode (unix_bind_bsd, net/unix/af_unix.c): it is never open to others.
    rustix::fs::fchmod(&socket, Mode::from_raw_mode(SOCKET_MODE))?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    let claimed = Claimed {
        listener: UnixListener::from(socket),
        path: path.to_owned(),
        left: false,
    };
    rustix::net::listen(&claimed.listener, BACKLOG_MAX)?;
    Ok(claimed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scratch;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::sync::Barrier;

    fn ours(path: &Path) -> Claimed {
        match claim(path).expect("a directory of ours") {
            Claim::Ours(claimed) => claimed,
            Claim::Answered => panic!("nobody is there"),
        }
    }

    #[test]
    fn the_path_is_containerd_s_digest() {
        // sha256("/run/containerd/containerd.sock/k8s.io/c1"), by sha256sum.
        let path = path(
            Path::new(DEFAULT_DIRECTORY),
            "/run/containerd/containerd.sock",
            "k8s.io",
            "c1",
        );
        let expected =
            "/run/containerd/s/ccd9e484aa63698a22b33f8964a2eb3d2a5c6e843ccac78fda28f084794782cd";
        assert_eq!(path.expect("short"), Path::new(expected));
        assert_eq!(address(Path::new(expected)), format!("unix://{expected}"));
    }

    #[test]
    fn address_namespace_and_group_all_count_and_an_address_may_be_empty() {
        let of =
            |grpc, namespace, group| path(Path::new("/s"), grpc, namespace, group).expect("short");
        let paths = [
            of("/a", "n", "/a/n/g"),
            of("", "n", "g"),
            of("/a", "n", "g"),
            of("/a", "m", "g"),
            of("/a", "n", "h"),
        ];
        let distinct: std::collections::HashSet<_> = paths.iter().collect();
        assert_eq!(distinct.len(), paths.len());
    }

    #[test]
    fn a_directory_that_no_socket_fits_into_is_refused() {
        let long = Path::new("/run").join("x".repeat(PATH_MAX_BYTES - 64 - 5));
        assert_eq!(
            path(&long, "", "n", "g").map(|p| p.as_os_str().len()).ok(),
            None
        );
        let fits = Path::new("/run").join("x".repeat(PATH_MAX_BYTES - 64 - 6));
        assert_eq!(
            path(&fits, "", "n", "g").map(|p| p.as_os_str().len()).ok(),
            Some(PATH_MAX_BYTES)
        );
        for directory in ["", "s", "/run/../s"] {
            let error = path(Path::new(directory), "", "n", "g").expect_err("not plain");
            assert!(matches!(error, SocketError::Directory(_)), "{error}");
        }
    }

    #[test]
    fn only_root_reaches_a_new_socket() {
        let scratch = Scratch::new("socket");
        let path = scratch.path().join("a/b/socket");
        let claimed = ours(&path);
        let mode =
            |path: &Path| std::fs::metadata(path).expect("there").permissions().mode() & 0o7777;
        assert_eq!(mode(&claimed.path), 0o600);
        assert_eq!(mode(&scratch.path().join("a")), 0o700);
        assert_eq!(mode(&scratch.path().join("a/b")), 0o700);
        assert!(answers(&path).expect("told"));
    }

    #[test]
    fn a_socket_that_was_not_left_to_a_server_is_removed() {
        let scratch = Scratch::new("socket");
        let path = scratch.path().join("socket");
        drop(ours(&path));
        assert!(!path.exists());
        let claimed = ours(&path);
        let server = claimed.listener().try_clone().expect("a descriptor");
        claimed.leave();
        assert!(answers(&path).expect("told"));
        drop(server);
        assert!(path.exists());
    }

    #[test]
    fn a_living_server_keeps_its_socket_even_with_a_full_backlog() {
        let scratch = Scratch::new("socket");
        let path = scratch.path().join("socket");
        let _server = ours(&path);
        let inode = std::fs::metadata(&path).expect("there").ino();
        let mut waiting = Vec::new();
        let full = loop {
            let socket = stream().expect("a socket");
            let address = SocketAddrUnix::new(&path).expect("short");
            match rustix::net::connect(&socket, &address) {
                Ok(()) => waiting.push(socket),
                Err(error) => break error,
            }
        };
        assert_eq!(full, Errno::AGAIN);
        assert!(matches!(claim(&path).expect("told"), Claim::Answered));
        assert_eq!(std::fs::metadata(&path).expect("there").ino(), inode);
    }

    #[test]
    fn a_dead_server_s_socket_is_replaced() {
        let scratch = Scratch::new("socket");
        let path = scratch.path().join("socket");
        ours(&path).leave();
        assert!(path.exists() && !answers(&path).expect("told"));
        let _server = ours(&path);
        assert!(answers(&path).expect("told"));
    }

    #[test]
    fn only_a_dead_socket_is_removed_and_one_that_is_gone_is_no_error() {
        let scratch = Scratch::new("socket");
        let path = scratch.path().join("s/socket");
        remove_dead(&path).expect("no directory");
        let server = ours(&path);
        remove_dead(&path).expect("alive");
        assert!(path.exists());
        server.leave();
        remove_dead(&path).expect("dead");
        assert!(!path.exists());
        remove_dead(&path).expect("gone");
        std::fs::write(&path, "a file").expect("writable");
        let error = remove_dead(&path).expect_err("no socket");
        assert!(path.exists(), "{error}");
    }

    #[test]
    fn a_bundle_knows_its_socket_by_its_address() {
        let bundle = Scratch::new("socket");
        assert_eq!(of_bundle(bundle.path()).expect("none"), None);
        for (text, expected) in [
            ("unix:///run/s/1", Some(Path::new("/run/s/1"))),
            ("unix://run", None),
            ("vsock://2:1", None),
            ("", None),
        ] {
            std::fs::write(bundle.path().join("address"), text).expect("writable");
            let path = of_bundle(bundle.path()).expect("readable");
            assert_eq!(path.as_deref(), expected, "{text}");
        }
    }

    #[test]
    fn of_many_at_once_one_gets_it() {
        let scratch = Scratch::new("socket");
        let path = scratch.path().join("socket");
        for _ in 0..20 {
            let barrier = Barrier::new(8);
            let claims: Vec<Claim> = std::thread::scope(|scope| {
                let claimants: Vec<_> = (0..8)
                    .map(|_| {
                        scope.spawn(|| {
                            barrier.wait();
                            claim(&path).expect("a directory of ours")
                        })
                    })
                    .collect();
                claimants
                    .into_iter()
                    .map(|thread| thread.join().expect("no panic"))
                    .collect()
            });
            let ours = claims.into_iter().filter_map(|claim| match claim {
                Claim::Ours(claimed) => Some(claimed),
                Claim::Answered => None,
            });
            let mut ours: Vec<Claimed> = ours.collect();
            assert_eq!(ours.len(), 1);
            // Its server dies: the next round finds a dead socket.
            ours.pop().into_iter().for_each(Claimed::leave);
        }
    }

    #[test]
    fn what_is_in_the_way_is_named() {
        let scratch = Scratch::new("socket");
        let file = scratch.path().join("file");
        std::fs::write(&file, "").expect("writable");
        let error = claim(&file.join("socket"))
            .expect_err("no directory")
            .to_string();
        assert_eq!(error, format!("cannot make directory {}", file.display()));
    }
}
