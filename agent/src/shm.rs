//! The shared memory of a pod: one tmpfs that every container of it which asks for it binds onto its /dev/shm.

use crate::spec::ContainerSpec;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::io;
use std::path::{Path, PathBuf};
use tokio::sync::OnceCell;

/// Where it is, below the agent's directory.
const PLACE: &str = "pod/shm";
/// Its size and mode, as a container engine gives a pod's.
const OPTIONS: &std::ffi::CStr = c"mode=1777,size=64m";

/// Why there is none.
#[derive(Debug, thiserror::Error)]
#[error("mounting the pod's shared memory on {at}")]
pub struct ShmError {
    at: String,
    #[source]
    cause: io::Error,
}

/// The pod's shared memory, mounted or not yet.
#[derive(Debug)]
pub struct Shm {
    at: PathBuf,
    mounted: OnceCell<()>,
}

impl Shm {
    /// That of an agent whose directory is `run`.
    pub fn below(run: &Path) -> Shm {
        Shm {
            at: run.join(PLACE),
            mounted: OnceCell::new(),
        }
    }

    /// Mounts it if the container binds it and nobody has mounted it yet. It goes with the machine.
    ///
    /// # Errors
    /// It cannot be mounted.
    pub async fn mounted_for(&self, container: &ContainerSpec) -> Result<(), ShmError> {
        if !container.binds(&self.at) {
            return Ok(());
        }
        let at = self.at.clone();
        let mount = async move {
            let work = tokio::task::spawn_blocking(move || mount_at(&at));
            work.await.unwrap_or_else(|e| Err(io::Error::other(e)))
        };
        let mounted = self.mounted.get_or_try_init(|| mount).await;
        mounted.copied().map_err(|cause| ShmError {
            at: self.at.display().to_string(),
            cause,
        })
    }

    /// Takes it away, if it was mounted, where the machine does not end with the agent.
    ///
    /// # Errors
    /// As umount2(2).
    pub fn unmount(&self) -> io::Result<()> {
        match self.mounted.initialized() {
            true => Ok(unmount(&self.at, UnmountFlags::DETACH)?),
            false => Ok(()),
        }
    }
}

fn mount_at(target: &Path) -> io::Result<()> {
    std::fs::create_dir_all(target)?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    Ok(mount("tmpfs", target, "tmpfs", flags, Some(OPTIONS))?)
}
