//! The host's share: one virtio-fs device with the tag `capsid`, mounted when the first caller wants it.
//!
//! What is a mount in the share on the host is one in the guest, too, which the kernel makes by itself when somebody first walks there
//! (FUSE_ATTR_SUBMOUNT, fuse_dentry_automount in fs/fuse/dir.c) and never takes away. So the agent does, with the container that the
//! mount is for: with it the kernel forgets every file of it, and the host's mount is held by the guest no longer.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
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

    /// Unmounts all that lies in the share below `/id`. Blocking.
    ///
    /// # Errors
    /// The mounts cannot be read, or one cannot be unmounted.
    pub fn forget(&self, id: &str) -> io::Result<()> {
        let Some(at) = &self.at else {
            return Ok(());
        };
        let text = std::fs::read("/proc/self/mountinfo")?;
        for mount in mounts_below(&text, &at.join(id)) {
            match rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH) {
                // It went with the mount that it was in.
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {}
                result => result?,
            }
        }
        Ok(())
    }

    /// Where it belongs.
    pub fn place(&self) -> Option<&Path> {
        self.at.as_deref()
    }
}

/// The mount points below `directory` in the text of a mountinfo file (proc_pid_mountinfo(5)), the outer ones first.
fn mounts_below(mountinfo: &[u8], directory: &Path) -> Vec<PathBuf> {
    let lines = mountinfo.split(|byte| *byte == b'\n');
    let points = lines.filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    let paths = points.map(|point| PathBuf::from(OsString::from_vec(unescaped(point))));
    let mut below: Vec<PathBuf> = paths
        .filter(|path| path.starts_with(directory) && path != directory)
        .collect();
    below.sort_unstable();
    below
}

/// A path as the kernel writes it: space, tab, newline and backslash as a backslash and three octal digits (mangle(), fs/seq_file.c).
fn unescaped(path: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path;
    while let Some((&byte, behind)) = rest.split_first() {
        let code = match (byte, behind) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..]) => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        bytes.push(code.unwrap_or(byte));
        let read = if code.is_some() { 3 } else { 0 };
        rest = behind.get(read..).unwrap_or_default();
    }
    bytes
}

fn mount_at(target: &Path) -> io::Result<()> {
    use rustix::mount::{MountFlags, mount};
    std::fs::create_dir_all(target)?;
    Ok(mount(TAG, target, c"virtiofs", MountFlags::empty(), None)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStrExt;

    const SHARE: &str = "/run/capsid/share";

    fn line(point: &str) -> String {
        format!("36 35 0:31 / {point} rw,nosuid shared:7 - virtiofs capsid rw\n")
    }

    fn below(text: &str, id: &str) -> Vec<PathBuf> {
        mounts_below(text.as_bytes(), &Path::new(SHARE).join(id))
    }

    #[test]
    fn the_mounts_of_one_container_are_found_outer_ones_first() {
        let text: String = [
            "/",
            SHARE,
            "/run/capsid/share/c1/volumes/0/in\\040it",
            "/run/capsid/share/c1/rootfs",
            "/run/capsid/share/c10/rootfs",
            "/run/capsid/share/c1/volumes/0",
        ]
        .map(line)
        .concat();
        let found = [
            "/run/capsid/share/c1/rootfs",
            "/run/capsid/share/c1/volumes/0",
            "/run/capsid/share/c1/volumes/0/in it",
        ];
        assert_eq!(below(&text, "c1"), found.map(PathBuf::from));
    }

    #[test]
    fn the_share_itself_is_no_containers() {
        assert!(below(&line(SHARE), "c1").is_empty());
        assert!(below("", "c1").is_empty());
    }

    #[test]
    fn a_backslash_without_its_digits_stays() {
        assert_eq!(unescaped(b"a\\8\\04\\134"), b"a\\8\\04\\");
    }

    proptest! {
        #[test]
        fn any_text_is_read(text: Vec<u8>) {
            prop_assert!(mounts_below(&text, Path::new("/run")).iter().all(|path| path.starts_with("/run")));
        }

        #[test]
        fn every_path_is_read_as_it_was_written(name in proptest::collection::vec(1u8.., 1..64)) {
            let escape = |byte: &u8| match byte {
                b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
                other => vec![*other],
            };
            let written: Vec<u8> = name.iter().flat_map(escape).collect();
            prop_assert_eq!(unescaped(&written), std::ffi::OsStr::from_bytes(&name).as_bytes());
        }
    }
}
