//! Small looks into an image, which is hostile: every path is resolved inside its root by the kernel
//! (openat2(2) RESOLVE_IN_ROOT), only regular files are read, and only their start.

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat2};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

/// Most of a file that is read, in bytes (CVE-2026-47262: an image with a 100 MB /etc/group).
const FILE_MAX_BYTES: u64 = 1 << 20;

/// The start of a text file of the image; bytes that are no UTF-8 are replaced.
///
/// # Errors
/// It is not there, or not a regular file.
pub fn read_small(root: &Path, path: &str) -> io::Result<String> {
    let directory = rustix::fs::open(
        root,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    // A fifo must not hold the agent.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = openat2(&directory, path, flags, Mode::empty(), resolve)?;
    if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut bytes = Vec::new();
    File::from(file)
        .take(FILE_MAX_BYTES)
        .read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    fn root(name: &str) -> PathBuf {
        let root = std::env::temp_dir().join(format!("capsid-{name}-{}", std::process::id()));
        fs::create_dir_all(root.join("etc")).expect("made");
        root
    }

    #[test]
    fn a_link_is_followed_inside_the_root_only() {
        let root = root("link");
        fs::write(root.join("inside"), "image").expect("written");
        symlink("/../../../inside", root.join("etc/passwd")).expect("linked");
        let read = read_small(&root, "etc/passwd");
        fs::remove_dir_all(&root).expect("removed");
        assert_eq!(read.expect("resolved in the root"), "image");
    }

    #[test]
    fn a_directory_is_no_file() {
        let root = root("directory");
        fs::create_dir_all(root.join("etc/passwd")).expect("made");
        let read = read_small(&root, "etc/passwd");
        fs::remove_dir_all(&root).expect("removed");
        assert!(read.is_err());
    }

    #[test]
    fn a_large_file_is_read_to_the_bound() {
        let root = root("large");
        fs::write(root.join("etc/passwd"), vec![b'x'; 3 << 20]).expect("written");
        let read = read_small(&root, "etc/passwd");
        fs::remove_dir_all(&root).expect("removed");
        assert_eq!(read.expect("read").len() as u64, FILE_MAX_BYTES);
    }
}
