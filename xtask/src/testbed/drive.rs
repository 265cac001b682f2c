//! The drive with the programs under test, made anew for each run: a small ext4 file system that the testbed mounts read-only.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command;
use crate::testbed::saved::PROGRAMS_BYTES;

/// A file or directory to put on the drive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Here.
    pub from: PathBuf,
    /// There, below the drive's root.
    pub to: PathBuf,
}

/// Makes the drive in `scratch`.
///
/// # Errors
/// Something to be put on it is not there, or it is too much.
pub fn make(scratch: &Path, items: &[Item]) -> Result<PathBuf, Box<dyn Error>> {
    let stage = scratch.join("stage");
    std::fs::create_dir(&stage)?;
    for item in items {
        let to = stage.join(&item.to);
        if let Some(parent) = to.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let mut copy = Command::new("cp");
        command::quiet(
            copy.args(["-a", "--reflink=auto", "-T", "--"])
                .arg(&item.from)
                .arg(&to),
        )?;
    }
    let drive = scratch.join("programs.img");
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args([
        "-q",
        "-F",
        "-t",
        "ext4",
        "-O",
        "^has_journal,^resize_inode",
        "-m",
        "0",
    ]);
    mke2fs
        .args(["-E", "lazy_itable_init=1,root_owner=0:0", "-d"])
        .arg(&stage)
        .arg(&drive);
    command::quiet(mke2fs.arg(format!("{}K", PROGRAMS_BYTES >> 10)))?;
    std::fs::remove_dir_all(&stage)?;
    Ok(drive)
}
