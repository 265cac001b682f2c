//! Opens what containerd names as containerd-shim-runc-v2 does (its process/io.go): an output's fifo for writing and for reading, so that a
//! reader who goes away and comes back loses nothing; the input's fifo for reading and for writing, so that it has no end before CloseIO.

use super::pumps::Sink;
use rustix::fs::{FileType, Mode, OFlags, fstat, major, minor, open};
use rustix::io::Errno;
use std::fs::DirBuilder;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// How long an output's fifo may be without a reader, in ms; as long as with containerd's own shim.
const READER_TIMEOUT_MS: u64 = 30_000;

/// What a thread that waits for a reader is called.
const THREAD: &str = "fifo-reader";

/// A terminal that is named does not become ours, and no descriptor is inherited.
const QUIETLY: OFlags = OFlags::CLOEXEC.union(OFlags::NOCTTY);
/// For reading; waits for no writer.
const READ: OFlags = QUIETLY.union(OFlags::RDONLY).union(OFlags::NONBLOCK);
/// For writing; waits for a reader. A file is appended to.
const WRITE_PATIENTLY: OFlags = QUIETLY.union(OFlags::WRONLY).union(OFlags::APPEND);
/// For writing; a fifo without a reader is ENXIO.
const WRITE: OFlags = WRITE_PATIENTLY.union(OFlags::NONBLOCK);

/// Why a path cannot be a stream.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// What is there takes no stream.
    #[error("it is neither a fifo nor a regular file")]
    Kind,
    /// Nobody opened a fifo for reading.
    #[error("nobody opened it for reading within {READER_TIMEOUT_MS} ms")]
    NoReader,
    /// As open(2).
    #[error(transparent)]
    Failed(#[from] io::Error),
}

/// The input's fifo, which has no end as long as we write to it ourselves.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) reader: pipe::Receiver,
    pub(super) own_writer: OwnedFd,
}

/// Opens the input; nothing for /dev/null. Its writer may come later.
///
/// # Errors
/// It is not there, or not a fifo.
pub(super) fn input(path: &Path) -> Result<Option<Input>, OpenError> {
    let reader = open(path, READ, Mode::empty()).map_err(io::Error::from)?;
    match kind(&reader)? {
        Kind::Fifo => {}
        Kind::Null => return Ok(None),
        Kind::Regular | Kind::Other => return Err(OpenError::Kind),
    }
    let own_writer = reopen(&reader, WRITE)?;
    let reader = pipe::Receiver::from_owned_fd(reader)?;
    Ok(Some(Input { reader, own_writer }))
}

/// Opens an output that is there already, a fifo once somebody reads it; nothing for /dev/null.
///
/// # Errors
/// It is not there, takes no stream, or nobody reads it.
pub(super) async fn existing(path: &Path) -> Result<Option<Sink>, OpenError> {
    match open(path, WRITE, Mode::empty()) {
        Err(Errno::NXIO) => sink(once_read(path).await?),
        opened => sink(opened.map_err(io::Error::from)?),
    }
}

/// Opens a file to append to it, and makes it and the directories above it if they are not there; with the permissions that containerd's own
/// shim gives them.
///
/// # Errors
/// It cannot be made or opened, or takes no stream.
pub(super) async fn file(path: &Path) -> Result<Option<Sink>, OpenError> {
    let path = path.to_owned();
    // A file system may take its time.
    let opened = spawn_blocking(move || {
        if let Some(above) = path.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(above)?;
        }
        let opened = open(
            &path,
            WRITE.union(OFlags::CREATE),
            Mode::from_raw_mode(0o644),
        );
        opened.map_err(io::Error::from)
    });
    sink(opened.await.map_err(io::Error::other)??)
}

/// What an open output is written with.
fn sink(fd: OwnedFd) -> Result<Option<Sink>, OpenError> {
    match kind(&fd)? {
        Kind::Fifo => Ok(Some(Sink::Pipe {
            // Without any reader a writer gets an error, and what the pipe holds is lost.
            _second_reader: Some(reopen(&fd, READ)?),
            writer: pipe::Sender::from_owned_fd(fd)?,
        })),
        Kind::Regular => Ok(Some(Sink::File(Arc::new(fd.into())))),
        Kind::Null => Ok(None),
        Kind::Other => Err(OpenError::Kind),
    }
}

/// Opens a fifo for writing once it has a reader. That is the one wait of open(2) which is an event, so it happens on a thread: one of its
/// own, since those of the pool are few and for what is short.
async fn once_read(path: &Path) -> Result<OwnedFd, OpenError> {
    let fifo = open(path, QUIETLY.union(OFlags::PATH), Mode::empty()).map_err(io::Error::from)?;
    let fifo = Arc::new(fifo);
    let waiting = Waiting {
        fifo: Arc::clone(&fifo),
        reader: Arc::default(),
    };
    let until = Arc::clone(&waiting.reader);
    let (tell, opened) = oneshot::channel();
    let opening = move || {
        let opened = reopen(&fifo, WRITE_PATIENTLY);
        drop(until);
        // Nobody listens if it came too late.
        let _late = tell.send(opened);
    };
    thread::Builder::new()
        .name(THREAD.to_owned())
        .spawn(opening)?;
    match timeout(Duration::from_millis(READER_TIMEOUT_MS), opened).await {
        Ok(opened) => Ok(opened.map_err(io::Error::other)??),
        Err(_elapsed) => Err(OpenError::NoReader),
    }
}

/// A thread that waits for a reader. Dropped, it gets one, which stays until the thread has returned: however late it comes to wait.
struct Waiting {
    fifo: Arc<OwnedFd>,
    reader: Arc<Mutex<Option<OwnedFd>>>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        // Without a descriptor for it the thread waits on for somebody else; nothing else waits for the thread.
        let reader = reopen(&self.fifo, READ).ok();
        *self.reader.lock().unwrap_or_else(PoisonError::into_inner) = reader;
    }
}

/// Opens the same file again, whatever has its name by now.
fn reopen(fd: impl AsFd, flags: OFlags) -> io::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    Ok(open(path, flags, Mode::empty())?)
}

enum Kind {
    Fifo,
    Regular,
    /// /dev/null (Documentation/admin-guide/devices.txt: 1, 3).
    Null,
    Other,
}

fn kind(fd: impl AsFd) -> io::Result<Kind> {
    let stat = fstat(fd)?;
    Ok(match FileType::from_raw_mode(stat.st_mode) {
        FileType::Fifo => Kind::Fifo,
        FileType::RegularFile => Kind::Regular,
        FileType::CharacterDevice if (major(stat.st_rdev), minor(stat.st_rdev)) == (1, 3) => {
            Kind::Null
        }
        _ => Kind::Other,
    })
}
