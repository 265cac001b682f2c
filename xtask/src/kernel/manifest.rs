//! The manifest beside a built kernel: what it was made from, and the hash of each file.
//!
//! Written by the build and read by people and by whoever installs a kernel; nothing in here is trusted for anything but a
//! comparison with the file itself.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The version of this format.
pub const FORMAT: u32 = 1;

/// What a kernel was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// The cache key: fragments, source, recipe, compiler.
    pub key: String,
    /// Package and version, or the hash of a tarball or directory.
    pub source: String,
    /// `uname -r` of the guest.
    pub release: String,
    /// First line of the compiler's and the linker's `--version`.
    pub tools: Vec<String>,
    /// Symbols that the fragments ask for; all were verified.
    pub symbols: usize,
    /// By file name.
    pub files: BTreeMap<String, FileEntry>,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Of its contents, in hex.
    pub sha256: String,
    /// Its size.
    pub bytes: u64,
}

impl FileEntry {
    /// Describes a file.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn of(path: &Path) -> std::io::Result<Self> {
        let contents = std::fs::read(path)?;
        let hash = Sha256::digest(&contents);
        Ok(Self {
            sha256: hash.iter().map(|byte| format!("{byte:02x}")).collect(),
            bytes: contents.len() as u64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_described_by_its_contents() {
        let path = std::env::temp_dir().join(format!("xtask-manifest-{}", std::process::id()));
        std::fs::write(&path, "abc").expect("written");
        let entry = FileEntry::of(&path).expect("read");
        std::fs::remove_file(&path).expect("removed");
        // FIPS 180-2, appendix B.1.
        assert_eq!(
            (entry.sha256.as_str(), entry.bytes),
            (
                "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
                3
            )
        );
    }
}
