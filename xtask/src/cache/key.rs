//! The name of a cache entry: the SHA-256 of everything that made it.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use sha2::{Digest, Sha256};

use super::{CacheError, io_error};

/// File contents are hashed in pieces of this size.
const HASH_PIECE_BYTES: usize = 1 << 20;

/// The name of an entry: the SHA-256, in hex, of everything that made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key(String);

impl Key {
    /// Starts one.
    pub fn builder() -> KeyBuilder {
        KeyBuilder {
            hash: Sha256::new(),
        }
    }

    /// The hex digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Gathers what makes an entry. Each part is hashed with its length in front, so that parts cannot run into each other.
#[derive(Debug, Clone)]
pub struct KeyBuilder {
    hash: Sha256,
}

impl KeyBuilder {
    /// A piece of text or bytes, such as a command line or a version.
    #[must_use]
    pub fn bytes(mut self, part: impl AsRef<[u8]>) -> Self {
        self.add(part.as_ref());
        self
    }

    /// A file's contents, not its name.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn file(mut self, path: &Path) -> Result<Self, CacheError> {
        self.add_file(path).map_err(io_error("reading", path))?;
        Ok(self)
    }

    /// A directory: the names, kinds, modes and contents of everything below it.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn dir(mut self, path: &Path) -> Result<Self, CacheError> {
        self.add_dir(path).map_err(io_error("reading", path))?;
        Ok(self)
    }

    /// The plain SHA-256 of a file in hex, as others compute it.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn plain_sha256(path: &Path) -> Result<String, CacheError> {
        let mut hash = Sha256::new();
        let read = File::open(path).and_then(|mut file| io::copy(&mut file, &mut hash));
        read.map_err(io_error("reading", path))?;
        Ok(hex(hash))
    }

    /// The key.
    pub fn finish(self) -> Key {
        Key(self
            .hash
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect())
    }

    fn add(&mut self, part: &[u8]) {
        self.hash.update((part.len() as u64).to_le_bytes());
        self.hash.update(part);
    }

    fn add_file(&mut self, path: &Path) -> io::Result<()> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        self.hash.update(length.to_le_bytes());
        let mut piece = vec![0; HASH_PIECE_BYTES];
        let mut total = 0;
        loop {
            let read = file.read(&mut piece)?;
            if read == 0 {
                break;
            }
            total += read as u64;
            self.hash.update(piece.get(..read).unwrap_or_default());
        }
        if total == length {
            Ok(())
        } else {
            Err(io::Error::other("the file changed while it was read"))
        }
    }

    fn add_dir(&mut self, path: &Path) -> io::Result<()> {
        let mut names = std::fs::read_dir(path)?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<io::Result<Vec<_>>>()?;
        names.sort();
        self.add(&(names.len() as u64).to_le_bytes());
        for name in names {
            let path = path.join(&name);
            let metadata = std::fs::symlink_metadata(&path)?;
            self.add(name.as_bytes());
            self.add(&metadata.permissions().mode().to_le_bytes());
            if metadata.is_dir() {
                self.add_dir(&path)?;
            } else if metadata.is_symlink() {
                self.add(std::fs::read_link(&path)?.as_os_str().as_bytes());
            } else if metadata.is_file() {
                self.add_file(&path)?;
            } else {
                self.add(&metadata.rdev().to_le_bytes());
            }
        }
        Ok(())
    }
}

fn hex(hash: Sha256) -> String {
    hash.finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_key_do_not_run_into_each_other() {
        let ab_c = Key::builder().bytes("ab").bytes("c").finish();
        let a_bc = Key::builder().bytes("a").bytes("bc").finish();
        assert_ne!(ab_c, a_bc);
        assert_eq!(ab_c.as_str().len(), 64);
    }

    #[test]
    fn a_directory_hash_sees_names_modes_contents_and_links() {
        let dir = std::env::temp_dir().join(format!("xtask-key-{}", std::process::id()));
        let hash = || Key::builder().dir(&dir).expect("hashed").finish();
        std::fs::create_dir_all(dir.join("sub")).expect("dir");
        std::fs::write(dir.join("sub/f"), "1").expect("file");
        let mut seen = vec![hash()];
        std::fs::write(dir.join("sub/f"), "2").expect("file");
        seen.push(hash());
        std::fs::rename(dir.join("sub/f"), dir.join("sub/g")).expect("rename");
        seen.push(hash());
        std::fs::set_permissions(dir.join("sub/g"), std::fs::Permissions::from_mode(0o755))
            .expect("mode");
        seen.push(hash());
        std::os::unix::fs::symlink("sub/g", dir.join("l")).expect("link");
        seen.push(hash());
        for (n, one) in seen.iter().enumerate() {
            assert!(
                !seen.iter().skip(n + 1).any(|other| other == one),
                "change {n} unseen"
            );
        }
        std::fs::remove_dir_all(&dir).expect("remove");
    }
}
