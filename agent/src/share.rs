//! The host's share: one virtio-fs device with the tag `capsid`, mounted when the first caller wants it.

use std::io;
use std::path::{Path, PathBuf};
use tokio::sync::OnceCell;

/// The tag of the device (protocol: `MachineConfig::shares`).
const TAG: &str = "capsid";

/// Why the share is not there.
#[derive(Debug, thiserror::Error)]
#[error("mounting the host's share (virtio-fs tag {TAG}) on {at}")]
pub struct ShareError {
    at: String,
    #[source]
    cause: io::Error,
}

/// The share, mounted or not yet.
#[derive(Debug)]
pub struct Share {
    at: Option<PathBuf>,
    mounted: OnceCell<()>,
}

impl Share {
    /// The share that belongs at `at`; `None`: there is none here.
    pub fn at(at: Option<PathBuf>) -> Share {
        Share {
            at,
            mounted: OnceCell::new(),
        }
    }

    /// Mounts the share if `path` is in it and nobody has mounted it yet.
    ///
    /// # Errors
    /// There is no such device, or it does not answer.
    pub async fn mounted_for(&self, path: &Path) -> Result<(), ShareError> {
        match &self.at {
            Some(at) if path.starts_with(at) => self.mount(at).await,
            _ => Ok(()),
        }
    }

    /// Mounts it ahead of the first wish; a failure waits for that.
    pub async fn mount_early(&self) {
        if let Some(at) = &self.at {
            // Told to whoever needs it.
            let _ = self.mount(at).await;
        }
    }

    async fn mount(&self, at: &Path) -> Result<(), ShareError> {
        let target = at.to_owned();
        let mount = async move {
            let work = tokio::task::spawn_blocking(move || mount_at(&target));
            work.await.unwrap_or_else(|e| Err(io::Error::other(e)))
        };
        let error = |cause| ShareError {
            at: at.display().to_string(),
            cause,
        };
        let mounted = self.mounted.get_or_try_init(|| mount).await;
        mounted.copied().map_err(error)
    }

    /// Unmounts it, so that the host sees every write before the end. Blocking.
    pub fn unmount(at: &Path) -> io::Result<()> {
        match rustix::mount::unmount(at, rustix::mount::UnmountFlags::DETACH) {
            // Not mounted.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
            result => Ok(result?),
        }
    }

    /// Where it belongs.
    pub fn place(&self) -> Option<&Path> {
        self.at.as_deref()
    }
}

fn mount_at(target: &Path) -> io::Result<()> {
    use rustix::mount::{MountFlags, mount};
    std::fs::create_dir_all(target)?;
    Ok(mount(TAG, target, c"virtiofs", MountFlags::empty(), None)?)
}
