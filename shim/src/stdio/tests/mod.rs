//! Both sides of a process's streams are played here: containerd's client with real fifos, the guest with socket pairs.

mod files;
mod flow;
mod loggers;
mod outputs_done;

use super::{GuestEnds, Pumps, Stdio, StdioError, Urls};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A directory of one test, gone with it.
struct Place(PathBuf);

impl Place {
    fn new() -> Place {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("shim-stdio-{}-{count}", std::process::id()));
        std::fs::create_dir(&path).expect("a directory");
        Place(path)
    }

    /// The name of something in it, whether it is there or not.
    fn name(&self, name: &str) -> String {
        self.0.join(name).to_str().expect("a plain path").to_owned()
    }

    fn fifo(&self, name: &str) -> String {
        let path = self.name(name);
        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a fifo");
        path
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).expect("ours");
    }
}

/// Opens a fifo for reading as containerd does: without a wait for its writer.
fn reader(path: impl AsRef<Path>) -> File {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    let file = file.expect("a fifo");
    rustix::io::ioctl_fionbio(&file, false).expect("a fifo");
    file
}

/// Opens a fifo for writing; its reader must be there.
fn writer(path: impl AsRef<Path>) -> File {
    let mut options = OpenOptions::new();
    let file = options
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    let file = file.expect("a fifo with a reader");
    rustix::io::ioctl_fionbio(&file, false).expect("a fifo");
    file
}

/// Until the pumps have done all that they can do now.
async fn pumps_turn() {
    // More than the turns between two looks at the descriptors.
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
}

/// The guest's far ends of the streams.
#[derive(Default)]
struct Guest {
    stdin: Option<UnixStream>,
    stdout: Option<UnixStream>,
    stderr: Option<UnixStream>,
}

impl Guest {
    fn stdin(&mut self) -> UnixStream {
        self.stdin.take().expect("wanted")
    }

    fn stdout(&mut self) -> UnixStream {
        self.stdout.take().expect("wanted")
    }

    fn stderr(&mut self) -> UnixStream {
        self.stderr.take().expect("wanted")
    }
}

const NONE: Urls<'static> = Urls {
    stdin: "",
    stdout: "",
    stderr: "",
    terminal: false,
    id: "container",
    namespace: "k8s.io",
};

/// Only an output, as this names it.
fn stdout_to(url: &str) -> Urls<'_> {
    Urls {
        stdout: url,
        ..NONE
    }
}

/// Opens them and dials what they want.
async fn joined(urls: Urls<'_>) -> Result<(Pumps, Guest), StdioError> {
    let stdio = Stdio::open(urls).await?;
    let wanted = stdio.wanted();
    let (mut guest, mut ends) = (Guest::default(), GuestEnds::default());
    for (wanted, far, near) in [
        (wanted.stdin, &mut guest.stdin, &mut ends.stdin),
        (wanted.stdout, &mut guest.stdout, &mut ends.stdout),
        (wanted.stderr, &mut guest.stderr, &mut ends.stderr),
    ] {
        if wanted {
            let (one, other) = UnixStream::pair().expect("sockets");
            (*far, *near) = (Some(one), Some(other));
        }
    }
    Ok((stdio.join(ends)?, guest))
}

/// Runs what blocks beside the event loop.
async fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.expect("no panic")
}

fn read_all(mut from: impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    from.read_to_end(&mut all).expect("a stream");
    all
}

/// Bytes of which none is where a chunk of any power of two would put it.
fn bytes(count: u32) -> Vec<u8> {
    (0..count).map(|n| (n % 251) as u8).collect()
}

/// Long enough for anything that happens at all.
const LONG: Duration = Duration::from_secs(60);
