//! Where the parts of an image are: files of an OCI layout directory, or members of an archive. An archive is indexed
//! once and then read at offsets; a compressed archive is unpacked to an unnamed temporary file first.

use super::ImageError;
use super::compression::{self, Compression};
use super::digest::HashReader;
use super::tar::{Kind, TarReader};
use crate::abort::Abort;
use crate::escape::Line;
use rustix::fs::{Mode, OFlags};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Most members of an image archive: three for each layer, and some documents.
const MEMBERS_MAX: usize = 4096;
/// Largest image archive after decompression, in bytes.
const ARCHIVE_MAX_BYTES: u64 = 256 << 30;
/// Size of the buffer in front of the archive while its headers are read, in bytes.
const INDEX_BUFFER_BYTES: usize = 64 * 1024;

/// A range of a file.
#[derive(Clone, Debug)]
pub(crate) struct Blob {
    file: Arc<File>,
    offset: u64,
    left: u64,
}

impl Blob {
    /// Bytes left.
    pub(crate) fn len(&self) -> u64 {
        self.left
    }
}

impl Read for Blob {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX);
        let wanted = wanted.min(buffer.len());
        let buffer = buffer.get_mut(..wanted).unwrap_or_default();
        if buffer.is_empty() {
            return Ok(0);
        }
        let count = self.file.read_at(buffer, self.offset)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.offset += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

/// The parts of one image, by the names the format gives them.
#[derive(Debug)]
pub(crate) enum Store {
    /// A directory.
    Directory(PathBuf),
    /// An archive: its file, its members, and members that are links to others.
    Archive {
        file: Arc<File>,
        members: HashMap<String, (u64, u64)>,
        links: HashMap<String, String>,
    },
}

impl Store {
    /// Opens an image's directory or archive; `temporary` is where a compressed archive is unpacked.
    pub(crate) fn open(path: &Path, temporary: &Path, abort: &Abort) -> Result<Store, ImageError> {
        let shown = || path.display().to_string();
        let file = open_regular_or_directory(path).map_err(|cause| ImageError::Open {
            path: shown(),
            cause,
        })?;
        let kind = file.metadata().map_err(|cause| ImageError::Open {
            path: shown(),
            cause,
        })?;
        if kind.is_dir() {
            return Ok(Store::Directory(path.to_owned()));
        }
        let file = decompressed(file, path, temporary, abort)?;
        index(file, path, abort)
    }

    /// The part `name`, or `None` if there is none.
    pub(crate) fn get(&self, name: &str) -> Result<Option<Blob>, ImageError> {
        match self {
            Store::Directory(directory) => {
                let path = directory.join(name);
                match open_regular_or_directory(&path) {
                    Ok(file) => whole(file).map(Some),
                    Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
                    Err(cause) => Err(cause),
                }
                .map_err(|cause| ImageError::Open {
                    path: path.display().to_string(),
                    cause,
                })
            }
            Store::Archive {
                file,
                members,
                links,
            } => {
                let name = links.get(name).map_or(name, String::as_str);
                Ok(members.get(name).map(|(offset, size)| Blob {
                    file: Arc::clone(file),
                    offset: *offset,
                    left: *size,
                }))
            }
        }
    }
}

/// Opens without waiting for the other end of a named pipe, and refuses everything but files and directories.
fn open_regular_or_directory(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let kind = file.metadata()?;
    if !kind.is_file() && !kind.is_dir() {
        return Err(io::Error::other("it is neither a file nor a directory"));
    }
    Ok(file)
}

fn whole(file: File) -> io::Result<Blob> {
    let kind = file.metadata()?;
    if !kind.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    Ok(Blob {
        left: kind.len(),
        offset: 0,
        file: Arc::new(file),
    })
}

/// The archive itself, or an unnamed file with what it holds.
fn decompressed(
    file: File,
    path: &Path,
    temporary: &Path,
    abort: &Abort,
) -> Result<File, ImageError> {
    let shown = || path.display().to_string();
    let read = |cause| ImageError::Read {
        what: shown(),
        cause,
    };
    let (compression, reader) = compression::detect(file).map_err(read)?;
    let compression = compression.ok_or_else(|| ImageError::NoArchive { path: shown() })?;
    if compression == Compression::None {
        let mut file = reader.into_inner();
        file.seek(SeekFrom::Start(0)).map_err(read)?;
        return Ok(file);
    }
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    let mut unpacked = rustix::fs::open(temporary, flags, Mode::from_raw_mode(0o600))
        .map(File::from)
        .map_err(|error| ImageError::Open {
            path: temporary.display().to_string(),
            cause: error.into(),
        })?;
    let stream = compression::decompress(compression, reader).map_err(read)?;
    let (mut stream, _) = HashReader::new(stream, ARCHIVE_MAX_BYTES, abort);
    io::copy(&mut stream, &mut unpacked).map_err(|cause| ImageError::Read {
        what: format!("decompressing {}", shown()),
        cause,
    })?;
    unpacked.seek(SeekFrom::Start(0)).map_err(read)?;
    Ok(unpacked)
}

/// Reads the headers of an archive and remembers where its members are.
fn index(file: File, path: &Path, abort: &Abort) -> Result<Store, ImageError> {
    let broken = |cause| ImageError::Archive {
        path: path.display().to_string(),
        cause,
    };
    let mut archive = TarReader::new(BufReader::with_capacity(INDEX_BUFFER_BYTES, file));
    let mut members = HashMap::new();
    let mut links = HashMap::new();
    while let Some(entry) = archive.next_entry().map_err(broken)? {
        abort.check()?;
        archive.seek_past().map_err(broken)?;
        let Some(name) = member_name(&entry.path) else {
            continue;
        };
        match &entry.kind {
            Kind::File => {
                members.insert(name, (entry.data_offset, entry.size));
            }
            // docker wrote a layer that two images share once, and links to it (moby `image/tarexport`).
            Kind::Symlink(target) => {
                let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
                let target = [directory.as_bytes(), b"/", target].concat();
                links.extend(member_name(&target).map(|target| (name, target)));
            }
            Kind::HardLink(target) => {
                links.extend(member_name(target).map(|target| (name, target)));
            }
            Kind::Directory | Kind::Fifo | Kind::Device => {}
        }
        if members.len() + links.len() > MEMBERS_MAX {
            return Err(ImageError::TooMany {
                what: "members in the archive",
                max: MEMBERS_MAX,
            });
        }
    }
    let file = archive.into_inner().into_inner();
    Ok(Store::Archive {
        file: Arc::new(file),
        members,
        links,
    })
}

/// The lexically cleaned name of a member; `None` for what cannot be one of an image.
fn member_name(path: &[u8]) -> Option<String> {
    let path = std::str::from_utf8(path).ok()?;
    let mut names: Vec<&str> = Vec::new();
    for name in path.split('/') {
        match name {
            "" | "." => {}
            ".." => {
                names.pop()?;
            }
            name => names.push(name),
        }
    }
    (!names.is_empty()).then(|| names.join("/"))
}

/// Reads the whole of a JSON document.
pub(crate) fn document(blob: &mut Blob, name: &str, max_bytes: u64) -> Result<Vec<u8>, ImageError> {
    if blob.len() > max_bytes {
        return Err(ImageError::DocumentTooLong {
            name: Line(name.as_bytes()).to_string(),
            length: blob.len(),
            max_bytes,
        });
    }
    let mut bytes = Vec::new();
    blob.read_to_end(&mut bytes)
        .map_err(|cause| ImageError::Read {
            what: Line(name.as_bytes()).to_string(),
            cause,
        })?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn member_names_are_cleaned() {
        assert_eq!(
            member_name(b"./blobs//sha256/x").as_deref(),
            Some("blobs/sha256/x")
        );
        assert_eq!(
            member_name(b"a/../b/layer.tar").as_deref(),
            Some("b/layer.tar")
        );
        assert_eq!(member_name(b"../x"), None);
        assert_eq!(member_name(b"./"), None);
    }
}
