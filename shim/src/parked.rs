//! The process that stands for a container on the host: a parked thread of the shim, whose number is the task's pid.
//!
//! Tools look at a container through `/proc/<pid>`: `nerdctl cp` at `root`, Docker (26 and later) and CNI at `ns/net`. So the thread is in the pod's
//! network namespace, and its root is the container's root file system as the host has it, or an empty directory; it is never the host's.
//! It runs nothing. A number is unique as long as its thread lives, and that is as long as the container is known.

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{Mode, OFlags};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use tokio::sync::oneshot;

/// Stack of a parked thread, in bytes: it makes some system calls and then waits.
const STACK_BYTES: usize = 64 << 10;

/// Which network namespace a container has on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Network {
    /// One of its own, which ends with it.
    New,
    /// The one at this path.
    Path(PathBuf),
}

/// Why there is no such thread.
#[derive(Debug, thiserror::Error)]
pub enum ParkError {
    /// The namespace at a path.
    #[error("network namespace {path}")]
    Network {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// A step.
    #[error("cannot {what}")]
    Step {
        /// Which.
        what: &'static str,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> ParkError {
    move |cause| ParkError::Step {
        what,
        cause: cause.into(),
    }
}

/// A parked thread; dropped, it ends.
#[derive(Debug)]
pub struct Parked {
    tid: u32,
    netns: OwnedFd,
    // Closed before the thread is waited for.
    stay: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Parked {
    /// Parks a thread in `network`, with `root` as its root directory.
    ///
    /// # Errors
    /// The namespace is not there, or the kernel's; nothing is left.
    pub async fn start(network: Network, root: OwnedFd) -> Result<Parked, ParkError> {
        let (stay, wait) = mpsc::channel::<()>();
        let (told, answer) = oneshot::channel();
        let thread = thread::Builder::new()
            .name("parked".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let entered = enter(&network, &root);
                let goes_on = entered.is_ok();
                if told.send(entered).is_ok() && goes_on {
                    // Ends when the other end is dropped; nothing is ever sent.
                    let _dropped = wait.recv();
                }
            })
            .map_err(step("start a thread"))?;
        let gone = || ParkError::Step {
            what: "park a thread",
            cause: io::Error::other("it panicked"),
        };
        let (tid, netns) = answer.await.unwrap_or_else(|_| Err(gone()))?;
        Ok(Parked {
            tid,
            netns,
            stay: Some(stay),
            thread: Some(thread),
        })
    }

    /// Its number in the host's PID namespace: the task's pid.
    pub fn pid(&self) -> u32 {
        self.tid
    }

    /// Its network namespace.
    pub fn netns(&self) -> &OwnedFd {
        &self.netns
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        drop(self.stay.take());
        if let Some(thread) = self.thread.take() {
            // It does nothing that could panic once it is parked, and ends at once.
            let _ended = thread.join();
        }
    }
}

fn enter(network: &Network, root: &OwnedFd) -> Result<(u32, OwnedFd), ParkError> {
    // The root and working directory are the process's until then.
    unshare(CloneFlags::CLONE_FS).map_err(step("have a root directory of its own"))?;
    match network {
        Network::New => {
            unshare(CloneFlags::CLONE_NEWNET).map_err(step("make a network namespace"))?;
        }
        Network::Path(path) => {
            let failed = |cause: io::Error| ParkError::Network {
                path: path.clone(),
                cause,
            };
            let netns = open_namespace(path).map_err(failed)?;
            setns(netns, CloneFlags::CLONE_NEWNET).map_err(|error| failed(error.into()))?;
        }
    }
    let netns = open_namespace(Path::new("/proc/thread-self/ns/net"))
        .map_err(step("open its network namespace"))?;
    rustix::process::fchdir(root).map_err(step("enter the root file system"))?;
    rustix::process::chroot(".").map_err(step("make the container's root its own"))?;
    let tid = rustix::thread::gettid().as_raw_nonzero().get();
    Ok((tid.unsigned_abs(), netns))
}

/// Opens what may be anything: a pipe must not hold us.
fn open_namespace(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    fn root() -> OwnedFd {
        fs::File::open("/tmp").expect("a directory").into()
    }

    fn inode(path: &str) -> u64 {
        fs::metadata(path).expect(path).ino()
    }

    #[tokio::test]
    async fn a_task_s_pid_shows_its_root_and_its_network_and_not_the_host_s() {
        let parked = Parked::start(Network::New, root()).await.expect("root");
        let proc = format!("/proc/{}", parked.pid());
        assert_eq!(inode(&format!("{proc}/root/.")), inode("/tmp"));
        assert_ne!(inode(&format!("{proc}/ns/net")), inode("/proc/self/ns/net"));
        let other = Parked::start(Network::Path(format!("{proc}/ns/net").into()), root())
            .await
            .expect("root");
        assert_ne!(other.pid(), parked.pid());
        assert_eq!(
            inode(&format!("/proc/{}/ns/net", other.pid())),
            inode(&format!("{proc}/ns/net"))
        );
        // The process itself is where it was.
        assert_ne!(inode("/proc/self/root/."), inode("/tmp"));
    }

    #[tokio::test]
    async fn a_dropped_one_is_gone_and_its_namespace_with_it() {
        let parked = Parked::start(Network::New, root()).await.expect("root");
        let proc = format!("/proc/{}", parked.pid());
        drop(parked);
        assert!(!Path::new(&proc).exists());
    }

    #[tokio::test]
    async fn a_namespace_that_is_not_there_is_named() {
        for path in ["/no/such/netns", "/etc/passwd"] {
            let error = Parked::start(Network::Path(path.into()), root()).await;
            let error = error.expect_err("no namespace").to_string();
            assert_eq!(error, format!("network namespace {path}"));
        }
    }
}
