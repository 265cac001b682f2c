//! Reads a tar stream: ustar, pax (`x`) and GNU (`L`, `K`, base-256) as image builders write them.
//!
//! The stream is hostile. Each header is parsed once into an [`Entry`]; names, extended headers and the number of
//! entries are bounded before anything is stored. Sparse files and unknown entry types are refused.
//! Formats: POSIX.1-2017 `pax`, and the GNU tar manual, "Basic Tar Format".

use std::io::{self, Read, Seek, SeekFrom};

/// Size of a tar block, in bytes.
const BLOCK_BYTES: usize = 512;
/// Longest path or link target, in bytes (`PATH_MAX`).
pub(crate) const PATH_MAX_BYTES: usize = 4096;
/// Longest set of extended headers of one entry, in bytes; a 64 KiB xattr and a few names fit many times.
const EXTENDED_MAX_BYTES: u64 = 1024 * 1024;
/// Most entries of one stream; the largest published images have some hundred thousand files.
const ENTRIES_MAX: u64 = 4_000_000;
/// Most extended headers in a row before an entry.
const EXTENDED_MAX_HEADERS: u32 = 16;

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A regular file; its bytes follow.
    File,
    /// A directory.
    Directory,
    /// A symbolic link with its target.
    Symlink(Vec<u8>),
    /// One more name of an earlier entry.
    HardLink(Vec<u8>),
    /// A named pipe.
    Fifo,
    /// A character or block device.
    Device,
}

/// One entry. Paths are as written, not yet checked against a root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Modification time, seconds and nanoseconds.
    pub(crate) mtime: (i64, u32),
    /// Bytes that follow, for a file.
    pub(crate) size: u64,
    /// Extended attributes, name and value.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// Where the entry's bytes begin in the stream.
    pub(crate) data_offset: u64,
}

/// Why a stream was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    #[error("the archive is cut short at byte {0}")]
    Truncated(u64),
    #[error("reading the archive at byte {position}")]
    Read {
        position: u64,
        #[source]
        cause: io::Error,
    },
    #[error("byte {0} does not begin a tar header")]
    Checksum(u64),
    #[error("the tar header at byte {position} has a bad {field}")]
    Field { position: u64, field: &'static str },
    #[error("the {what} at byte {position} is longer than {max} bytes")]
    TooLong {
        position: u64,
        what: &'static str,
        max: u64,
    },
    #[error("the entry at byte {0} is sparse, which image layers are not")]
    Sparse(u64),
    #[error("the entry at byte {position} has unknown type {kind:#04x}")]
    UnknownKind { position: u64, kind: u8 },
    #[error("the archive has more than {ENTRIES_MAX} entries")]
    TooManyEntries,
}

/// What extended headers say of the entry that follows them.
#[derive(Default)]
struct Extended {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<(i64, u32)>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A tar stream. Between two calls of [`TarReader::next_entry`] the bytes of the entry are read through [`Read`].
pub(crate) struct TarReader<R> {
    inner: R,
    position: u64,
    /// Bytes of the current entry not yet read.
    left: u64,
    /// Padding behind them.
    padding: u64,
    entries: u64,
}

impl<R: Read> TarReader<R> {
    /// A reader at the beginning of the stream.
    pub(crate) fn new(inner: R) -> Self {
        TarReader {
            inner,
            position: 0,
            left: 0,
            padding: 0,
            entries: 0,
        }
    }

    /// The stream behind the entries.
    pub(crate) fn into_inner(self) -> R {
        self.inner
    }

    /// The next entry; `None` at the end mark or at the end of the stream. What was not read of the entry before is
    /// skipped.
    ///
    /// # Errors
    /// [`TarError`] says where the stream is not a tar that we read.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        let mut extended = Extended::default();
        let mut extended_bytes = 0u64;
        for _ in 0..=EXTENDED_MAX_HEADERS {
            self.skip_data()?;
            let at = self.position;
            let Some(block) = self.block()? else {
                return Ok(None);
            };
            self.entries += 1;
            if self.entries > ENTRIES_MAX {
                return Err(TarError::TooManyEntries);
            }
            let header = Header { block: &block, at };
            header.verify()?;
            let kind = header.kind();
            let size = header.number(124, 12, "size")?;
            match kind {
                b'x' | b'L' | b'K' => {
                    extended_bytes = extended_bytes.saturating_add(size);
                    if extended_bytes > EXTENDED_MAX_BYTES {
                        return Err(TarError::TooLong {
                            position: at,
                            what: "extended header",
                            max: EXTENDED_MAX_BYTES,
                        });
                    }
                    let text = self.text(size)?;
                    extended.take(kind, text, at)?;
                }
                // A comment for the whole archive (git writes one); nothing in it is for us.
                b'g' => self.begin_data(size),
                _ => return self.entry(&header, kind, size, extended).map(Some),
            }
        }
        Err(TarError::Field {
            position: self.position,
            field: "number of extended headers",
        })
    }

    fn entry(
        &mut self,
        header: &Header<'_>,
        kind: u8,
        size: u64,
        extended: Extended,
    ) -> Result<Entry, TarError> {
        let at = header.at;
        let path = extended.path.unwrap_or_else(|| header.path());
        let link = extended.link.unwrap_or_else(|| header.text(157, 100));
        for text in [&path, &link] {
            if text.len() > PATH_MAX_BYTES {
                return Err(TarError::TooLong {
                    position: at,
                    what: "path",
                    max: PATH_MAX_BYTES as u64,
                });
            }
        }
        let kind = match kind {
            b'0' | 0 | b'7' if path.ends_with(b"/") => Kind::Directory,
            b'0' | 0 | b'7' => Kind::File,
            b'1' => Kind::HardLink(link),
            b'2' => Kind::Symlink(link),
            b'3' | b'4' => Kind::Device,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            b'S' => return Err(TarError::Sparse(at)),
            kind => return Err(TarError::UnknownKind { position: at, kind }),
        };
        let id = |given: Option<u64>, offset, field| {
            let id = match given {
                Some(id) => id,
                None => header.number(offset, 8, field)?,
            };
            u32::try_from(id).map_err(|_| TarError::Field {
                position: at,
                field,
            })
        };
        let size = match kind {
            Kind::File => extended.size.unwrap_or(size),
            _ => 0,
        };
        let mtime = match extended.mtime {
            Some(mtime) => mtime,
            None => (header.seconds(136, 12)?, 0),
        };
        let mode = header.number(100, 8, "mode")?;
        let entry = Entry {
            kind,
            mode: (mode & 0o7777) as u32,
            uid: id(extended.uid, 108, "uid")?,
            gid: id(extended.gid, 116, "gid")?,
            mtime,
            size,
            xattrs: extended.xattrs,
            path,
            data_offset: self.position,
        };
        self.begin_data(size);
        Ok(entry)
    }

    fn begin_data(&mut self, size: u64) {
        self.left = size;
        self.padding = (BLOCK_BYTES as u64 - size % BLOCK_BYTES as u64) % BLOCK_BYTES as u64;
    }

    /// The bytes of an extended header; `size` was bounded by the caller.
    fn text(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        self.begin_data(size);
        let mut text = Vec::new();
        let position = self.position;
        self.read_to_end(&mut text)
            .map_err(|cause| TarError::from_io(position, cause))?;
        Ok(text)
    }

    fn skip_data(&mut self) -> Result<(), TarError> {
        let mut waste = [0u8; 8192];
        loop {
            let position = self.position;
            match self.read(&mut waste) {
                Ok(0) => break,
                Ok(_) => {}
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
                Err(cause) => return Err(TarError::from_io(position, cause)),
            }
        }
        let padding = std::mem::take(&mut self.padding);
        let mut block = [0u8; BLOCK_BYTES];
        // `begin_data` keeps the padding below one block.
        let short = block
            .get_mut(..padding as usize)
            .map_or(Ok(0), |padding| self.fill(padding))?;
        if (short as u64) < padding {
            return Err(TarError::Truncated(self.position));
        }
        Ok(())
    }

    /// One header block; `None` at the end of the stream or at a block of zeros.
    fn block(&mut self) -> Result<Option<[u8; BLOCK_BYTES]>, TarError> {
        let mut block = [0u8; BLOCK_BYTES];
        match self.fill(&mut block)? {
            0 => Ok(None),
            BLOCK_BYTES if block.iter().all(|byte| *byte == 0) => Ok(None),
            BLOCK_BYTES => Ok(Some(block)),
            _ => Err(TarError::Truncated(self.position)),
        }
    }

    /// Reads until `buffer` is full or the stream ends; how many bytes came.
    fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, TarError> {
        let mut filled = 0;
        while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            match self.inner.read(rest) {
                Ok(0) => break,
                Ok(count) => {
                    filled += count;
                    self.position += count as u64;
                }
                Err(cause) if cause.kind() == io::ErrorKind::Interrupted => {}
                Err(cause) => return Err(TarError::from_io(self.position, cause)),
            }
        }
        Ok(filled)
    }
}

impl<R: Read + Seek> TarReader<R> {
    /// Leaves the bytes of the current entry unread. A file that ends before them shows that when they are read.
    pub(crate) fn seek_past(&mut self) -> Result<(), TarError> {
        let position = self.position;
        let length = self.left.saturating_add(self.padding);
        let field = "size";
        let target = position
            .checked_add(length)
            .filter(|target| i64::try_from(*target).is_ok())
            .ok_or(TarError::Field { position, field })?;
        self.inner
            .seek(SeekFrom::Start(target))
            .map_err(|cause| TarError::Read { position, cause })?;
        (self.left, self.padding, self.position) = (0, 0, target);
        Ok(())
    }
}

impl<R: Read> Read for TarReader<R> {
    /// Bytes of the current entry; 0 at their end. A stream that ends before is `UnexpectedEof`.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX);
        let Some(buffer) = buffer.get_mut(..wanted.min(buffer.len())) else {
            return Ok(0);
        };
        if buffer.is_empty() {
            return Ok(0);
        }
        let count = self.inner.read(buffer)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.position += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

impl TarError {
    pub(crate) fn from_io(position: u64, cause: io::Error) -> TarError {
        match cause.kind() {
            io::ErrorKind::UnexpectedEof => TarError::Truncated(position),
            _ => TarError::Read { position, cause },
        }
    }
}

impl Extended {
    /// Takes over one extended header: a GNU long name or link, or a set of pax records.
    fn take(&mut self, kind: u8, mut text: Vec<u8>, position: u64) -> Result<(), TarError> {
        if kind == b'x' {
            return self.pax(&text, position);
        }
        text.truncate(until_nul(&text).len());
        match kind {
            b'L' => self.path = Some(text),
            _ => self.link = Some(text),
        }
        Ok(())
    }

    /// Records are `LENGTH KEY=VALUE\n`, the length counting itself.
    fn pax(&mut self, mut text: &[u8], position: u64) -> Result<(), TarError> {
        let bad = |field| TarError::Field { position, field };
        while !text.is_empty() {
            let space = text
                .iter()
                .position(|byte| *byte == b' ')
                .ok_or(bad("pax record"))?;
            let length = text
                .get(..space)
                .and_then(decimal)
                .and_then(|length| usize::try_from(length).ok())
                .ok_or(bad("pax record"))?;
            let record = text
                .get(space + 1..length)
                .and_then(|record| record.strip_suffix(b"\n"))
                .ok_or(bad("pax record"))?;
            let equals = record
                .iter()
                .position(|byte| *byte == b'=')
                .ok_or(bad("pax record"))?;
            let (key, value) = record.split_at(equals);
            self.record(key, value.get(1..).unwrap_or_default(), position)?;
            text = text.get(length..).unwrap_or_default();
        }
        Ok(())
    }

    fn record(&mut self, key: &[u8], value: &[u8], position: u64) -> Result<(), TarError> {
        let bad = |field| TarError::Field { position, field };
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = Some(decimal(value).ok_or(bad("pax size"))?),
            b"uid" => self.uid = Some(decimal(value).ok_or(bad("pax uid"))?),
            b"gid" => self.gid = Some(decimal(value).ok_or(bad("pax gid"))?),
            b"mtime" => self.mtime = Some(pax_time(value).ok_or(bad("pax mtime"))?),
            key if key.starts_with(b"GNU.sparse.") => return Err(TarError::Sparse(position)),
            key => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }
}

/// A header block with its position for messages.
struct Header<'a> {
    block: &'a [u8; BLOCK_BYTES],
    at: u64,
}

impl Header<'_> {
    fn field(&self, offset: usize, length: usize) -> &[u8] {
        self.block.get(offset..offset + length).unwrap_or_default()
    }

    fn kind(&self) -> u8 {
        self.field(156, 1).first().copied().unwrap_or_default()
    }

    fn text(&self, offset: usize, length: usize) -> Vec<u8> {
        until_nul(self.field(offset, length)).to_vec()
    }

    /// The name, behind the prefix of POSIX headers (GNU headers keep other things there).
    fn path(&self) -> Vec<u8> {
        let name = self.text(0, 100);
        let prefix = self.text(345, 155);
        if self.field(257, 6) != b"ustar\0" || prefix.is_empty() {
            return name;
        }
        let mut path = prefix;
        path.push(b'/');
        path.extend(name);
        path
    }

    /// The checksum is the sum of the bytes with its own field taken as spaces.
    fn verify(&self) -> Result<(), TarError> {
        let sum: u64 = self
            .block
            .iter()
            .enumerate()
            .map(|(index, byte)| match index {
                148..156 => u64::from(b' '),
                _ => u64::from(*byte),
            })
            .sum();
        match self.number(148, 8, "checksum") {
            Ok(stored) if stored == sum => Ok(()),
            _ => Err(TarError::Checksum(self.at)),
        }
    }

    fn number(&self, offset: usize, length: usize, field: &'static str) -> Result<u64, TarError> {
        number(self.field(offset, length)).ok_or(TarError::Field {
            position: self.at,
            field,
        })
    }

    /// A time; before 1970 only in base-256.
    fn seconds(&self, offset: usize, length: usize) -> Result<i64, TarError> {
        let field = self.field(offset, length);
        let seconds = if field.first() == Some(&0xff) {
            let low = field.last_chunk::<8>().copied().unwrap_or([0; 8]);
            Some(i64::from_be_bytes(low))
        } else {
            number(field).and_then(|seconds| i64::try_from(seconds).ok())
        };
        seconds.ok_or(TarError::Field {
            position: self.at,
            field: "mtime",
        })
    }
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Octal digits among spaces and NULs, or base-256 behind a set top bit. An empty field is 0.
fn number(field: &[u8]) -> Option<u64> {
    let first = *field.first()?;
    if first & 0x80 != 0 {
        let mut value = u64::from(first & 0x7f);
        for byte in field.iter().skip(1) {
            value = value.checked_mul(256)?.checked_add(u64::from(*byte))?;
        }
        return Some(value);
    }
    let mut value = 0u64;
    let digits = field
        .iter()
        .skip_while(|byte| **byte == b' ')
        .take_while(|byte| !matches!(byte, b' ' | 0));
    for digit in digits {
        if !(b'0'..=b'7').contains(digit) {
            return None;
        }
        value = value.checked_mul(8)?.checked_add(u64::from(digit - b'0'))?;
    }
    Some(value)
}

fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// `[-]SECONDS[.FRACTION]`, the fraction cut to nanoseconds.
fn pax_time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(text) => (true, text),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |byte| *byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let mut nanos = 0u32;
    let mut scale = 100_000_000;
    for digit in parts.next().unwrap_or_default() {
        if !digit.is_ascii_digit() {
            return None;
        }
        nanos += u32::from(digit - b'0') * scale;
        scale /= 10;
    }
    Some(match (negative, nanos) {
        (false, nanos) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        // The kernel's nanoseconds count forward: -0.25 s is second -1 and 0.75 s.
        (true, nanos) => (-seconds - 1, 1_000_000_000 - nanos),
    })
}

#[cfg(test)]
#[path = "tar_tests.rs"]
pub(crate) mod tests;
