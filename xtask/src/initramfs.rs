//! The guest's initramfs: the agent as `/init` and the directories it mounts on, as one newc cpio archive.
//!
//! The format is the kernel's (Documentation/driver-api/early-userspace/buffer-format.rst). The archive is a function of the
//! agent alone: no times, no owners, numbers in order. It is not compressed: the VMM places it, nobody has to unpack it twice.

use std::io;
use std::path::{Path, PathBuf};

/// What the kernel takes from an entry.
const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
/// Devices that must be there before the agent can mount anything, with mode and numbers
/// (Documentation/admin-guide/devices.txt). The kernel opens the console for init. Where there is none, init starts with
/// descriptors 0 to 2 closed; Rust's runtime then opens /dev/null in their place, and aborts if it cannot.
const DEVICES: [(&str, u32, (u32, u32)); 2] = [
    ("dev/console", 0o020_600, (5, 1)),
    ("dev/null", 0o020_666, (1, 3)),
];
/// newc without a checksum.
const MAGIC: &str = "070701";
const TRAILER: &str = "TRAILER!!!";
/// Headers and contents begin at multiples of this.
const ALIGN_BYTES: usize = 4;
/// Directories that the agent mounts on.
const DIRECTORIES: [&str; 5] = ["dev", "proc", "run", "sys", "tmp"];

/// Why there is no initramfs.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// A file could not be read or written.
    #[error("{doing} {}", path.display())]
    Io {
        /// `reading` or `writing`.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// The format has 32 bits for it.
    #[error("{} is too large for an initramfs", path.display())]
    TooLarge {
        /// The agent.
        path: PathBuf,
    },
}

/// Writes the initramfs with this agent to `to`; what was there stays whole until the new one is.
///
/// # Errors
/// The agent cannot be read, or the archive cannot be written.
pub fn write(agent: &Path, to: &Path) -> Result<(), InitramfsError> {
    let failed = |doing, path: &Path| {
        let path = path.to_owned();
        move |cause| InitramfsError::Io { doing, path, cause }
    };
    let program = std::fs::read(agent).map_err(failed("reading", agent))?;
    let archive = archive(&program).ok_or_else(|| InitramfsError::TooLarge {
        path: agent.to_owned(),
    })?;
    if std::fs::read(to).is_ok_and(|there| there == archive) {
        return Ok(());
    }
    let temporary = to.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&temporary, archive).map_err(failed("writing", &temporary))?;
    std::fs::rename(&temporary, to).map_err(failed("writing", to))
}

/// The archive with `program` as `/init`; `None` if it is over the format's 4 GiB.
pub fn archive(program: &[u8]) -> Option<Vec<u8>> {
    let mut archive = Archive {
        bytes: Vec::new(),
        entries: 0,
    };
    for directory in DIRECTORIES {
        archive.add(directory, DIRECTORY, (0, 0), &[])?;
    }
    for (device, mode, numbers) in DEVICES {
        archive.add(device, mode, numbers, &[])?;
    }
    archive.add("init", PROGRAM, (0, 0), program)?;
    archive.add(TRAILER, 0, (0, 0), &[])?;
    Some(archive.bytes)
}

struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn add(
        &mut self,
        name: &str,
        mode: u32,
        (major, minor): (u32, u32),
        content: &[u8],
    ) -> Option<()> {
        let size = u32::try_from(content.len()).ok()?;
        let name_size = u32::try_from(name.len() + 1).ok()?;
        self.entries += 1;
        let links = if mode == DIRECTORY { 2 } else { 1 };
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            major,
            minor,
            name_size,
            0,
        ];
        self.bytes.extend_from_slice(MAGIC.as_bytes());
        for field in fields {
            self.bytes
                .extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
        Some(())
    }

    fn align(&mut self) {
        self.bytes
            .resize(self.bytes.len().next_multiple_of(ALIGN_BYTES), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::query;
    use std::process::Command;

    #[test]
    fn the_same_agent_gives_the_same_archive() {
        assert_eq!(archive(b"agent"), archive(b"agent"));
        assert_ne!(archive(b"agent"), archive(b"other"));
    }

    #[test]
    fn every_entry_is_aligned_and_the_archive_ends_with_the_trailer() {
        let bytes = archive(b"12345").expect("fits");
        assert_eq!(bytes.len() % ALIGN_BYTES, 0);
        let magics = bytes
            .windows(MAGIC.len())
            .enumerate()
            .filter(|(_, window)| window == &MAGIC.as_bytes());
        let places: Vec<usize> = magics.map(|(place, _)| place).collect();
        assert_eq!(places.len(), DIRECTORIES.len() + DEVICES.len() + 2);
        assert!(
            places.iter().all(|place| place % ALIGN_BYTES == 0),
            "{places:?}"
        );
        assert!(
            bytes
                .windows(TRAILER.len())
                .any(|window| window == TRAILER.as_bytes())
        );
    }

    /// A reader that is not ours agrees.
    #[test]
    fn cpio_lists_what_was_put_in() {
        let dir = std::env::temp_dir().join(format!("xtask-initramfs-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("dir");
        let (agent, file) = (dir.join("agent"), dir.join("initramfs"));
        std::fs::write(&agent, "agent").expect("agent");
        write(&agent, &file).expect("written");
        let list = query(
            Command::new("sh")
                .args(["-c", "cpio -it --quiet < \"$0\""])
                .arg(&file),
        );
        std::fs::remove_dir_all(&dir).expect("remove");
        let (status, names) = list.expect("sh runs");
        if status.code() == Some(127) {
            eprintln!("SKIPPED cpio_lists_what_was_put_in: cpio is not installed");
            return;
        }
        assert_eq!(
            String::from_utf8_lossy(&names),
            "dev\nproc\nrun\nsys\ntmp\ndev/console\ndev/null\ninit\n"
        );
    }
}
