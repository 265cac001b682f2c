//! What is on the host's side of a disk and of a share, made once for all systems. It is to be in the page cache, and whoever runs this
//! sees to it that nothing is written back meanwhile.

use super::inside::files::{ARCHIVE, FILE, TREE};
use super::load::{ARCHIVE_FILES, SMALL_FILE_BYTES, STORE_BYTES, Work};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

/// Files of one directory of the tree.
const DIRECTORY_FILES: usize = 100;

/// Writes the disk's file.
///
/// # Errors
/// There is no room for it.
pub fn write_store(path: &Path) -> io::Result<()> {
    let mut file = File::create(path)?;
    let piece = vec![b's'; 1 << 20];
    for _ in 0..STORE_BYTES / piece.len() {
        file.write_all(&piece)?;
    }
    Ok(())
}

/// Writes what `work` wants to find in a directory to be shared; its tree has `files` files.
///
/// # Errors
/// There is no room for it.
pub fn fill(directory: &Path, work: Work, files: usize) -> io::Result<()> {
    match work {
        Work::File(_) => write_store(&directory.join(FILE)),
        Work::Untar => write_archive(&directory.join(ARCHIVE)),
        Work::Find => write_tree(&directory.join(TREE), files),
        Work::Disk(_) | Work::Exchange(_) | Work::Ping { .. } => Ok(()),
    }
}

fn write_archive(path: &Path) -> io::Result<()> {
    let content = vec![b'f'; SMALL_FILE_BYTES];
    let mut archive = tar::Builder::new(File::create(path)?);
    for number in 0..ARCHIVE_FILES {
        let mut header = tar::Header::new_ustar();
        header.set_mode(0o644);
        header.set_size(content.len() as u64);
        archive.append_data(&mut header, place(number), content.as_slice())?;
    }
    archive.finish()
}

fn write_tree(directory: &Path, files: usize) -> io::Result<()> {
    for number in 0..files {
        let path = directory.join(place(number));
        if number % DIRECTORY_FILES == 0 {
            fs::create_dir_all(path.parent().unwrap_or(directory))?;
        }
        File::create(path)?;
    }
    Ok(())
}

fn place(number: usize) -> String {
    format!("{}/{number}", number / DIRECTORY_FILES)
}
