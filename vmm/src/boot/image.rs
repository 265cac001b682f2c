//! A kernel file as the parsers see it: a length and reads that are checked against it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes that can be read at any offset.
pub(super) trait Image {
    /// Length in bytes.
    fn length(&self) -> u64;
    /// Fills `bytes` from `offset`.
    ///
    /// # Errors
    /// The file ends before, or cannot be read.
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;
}

/// A file whose length was taken once: one that shrinks afterwards fails to read and nothing worse.
pub(super) struct FileImage<'a> {
    file: &'a File,
    length: u64,
}

impl<'a> FileImage<'a> {
    /// Takes the length of `file`, which must be a regular file.
    ///
    /// # Errors
    /// It is not one, or cannot be asked.
    pub(super) fn new(file: &'a File) -> io::Result<FileImage<'a>> {
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is not a regular file",
            ));
        }
        Ok(FileImage {
            file,
            length: metadata.len(),
        })
    }
}

impl Image for FileImage<'_> {
    fn length(&self) -> u64 {
        self.length
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }
}

impl Image for &[u8] {
    fn length(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.get(offset..))
            .and_then(|rest| rest.get(..bytes.len()))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(from);
        Ok(())
    }
}

/// The `N` bytes at `offset` of a header that was read whole; a constant offset beyond it is our mistake.
pub(super) fn field<const N: usize>(header: &[u8], offset: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&header[offset..offset + N]);
    bytes
}
