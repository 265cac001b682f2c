//! A layer of an image, unpacked. The first byte says what the rest is: a stream as it is, or the steps of a maker of archives
//! whose headers are whole, and how that is compressed.

use crate::allocations::Bounds;
use crate::cell::{INSIDE, Lazy, Work};
use crate::program::Reader;
use rustix::fs::{CWD, Mode, OFlags, openat};
use std::io::Write;

pub(crate) const BOUNDS: Bounds = Bounds {
    growth: 8 << 20,
    // The extended headers of one entry.
    largest: 2 << 20,
};
const BLOCK_BYTES: usize = 512;
/// Most entries of a made archive.
const ENTRIES_MAX: usize = 64;

/// What the first byte says.
pub(crate) mod form {
    /// A stream as it is.
    pub(crate) const RAW: u8 = 0;
    /// Steps of the maker; the archive is not compressed.
    pub(crate) const PLAIN: u8 = 1;
    /// By gzip.
    pub(crate) const GZIP: u8 = 2;
    /// By zstd.
    pub(crate) const ZSTD: u8 = 3;
    pub(crate) const KINDS: u8 = ZSTD + 1;
}

static CELL: Lazy = Lazy::new();

pub(crate) fn run(input: &[u8]) {
    CELL.run(input, |_| -> Work { Box::new(unpack) });
}

fn unpack(input: &[u8]) {
    let Some((form, rest)) = input.split_first() else {
        return;
    };
    let made = || archive(&mut Reader::new(rest));
    let blob = match form % form::KINDS {
        form::RAW => rest.to_vec(),
        form::PLAIN => made(),
        form::GZIP => {
            let level = flate2::Compression::fast();
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
            encoder.write_all(&made()).expect("in memory");
            encoder.finish().expect("in memory")
        }
        _ => zstd::encode_all(made().as_slice(), 1).expect("in memory"),
    };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat(CWD, INSIDE, flags, Mode::empty()).expect("a directory");
    if let Err(reason) = capsid::strangers::unpack_layer(&blob, root) {
        assert!(!reason.is_empty());
    }
}

/// One entry of an archive as the maker takes it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Entry {
    pub(crate) kind: u8,
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u16,
    /// Added to the length of the data: what the header says.
    pub(crate) lie: u16,
    pub(crate) data: Vec<u8>,
}

impl Entry {
    fn read(reader: &mut Reader<'_>) -> Option<Entry> {
        Some(Entry {
            kind: reader.u8()?,
            path: reader.short()?,
            link: reader.short()?,
            mode: reader.u16()?,
            lie: reader.u16()?,
            data: reader.long()?,
        })
    }

    /// Writes what [`Entry::read`] reads.
    #[cfg(test)]
    pub(crate) fn write(&self, to: &mut Vec<u8>) {
        to.push(self.kind);
        for text in [&self.path, &self.link] {
            to.push(text.len() as u8);
            to.extend(text);
        }
        to.extend(self.mode.to_le_bytes());
        to.extend(self.lie.to_le_bytes());
        to.extend((self.data.len() as u16).to_le_bytes());
        to.extend(&self.data);
    }

    /// The header and the data (POSIX.1-2017 pax, "ustar Interchange Format").
    fn put(&self, archive: &mut Vec<u8>) {
        let mut header = [0u8; BLOCK_BYTES];
        let mut field = |at: usize, most: usize, text: &[u8]| {
            let length = text.len().min(most);
            header[at..at + length].copy_from_slice(&text[..length]);
        };
        let size = self.data.len() + usize::from(self.lie);
        field(0, 100, &self.path);
        field(100, 8, format!("{:07o}", self.mode & 0o7777).as_bytes());
        field(108, 8, b"0001750");
        field(116, 8, b"0001750");
        field(124, 12, format!("{size:011o}").as_bytes());
        field(136, 12, b"14000000000");
        field(148, 8, b"        ");
        field(156, 1, &[self.kind]);
        field(157, 100, &self.link);
        field(257, 8, b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        archive.extend(header);
        archive.extend(&self.data);
        archive.resize(archive.len().next_multiple_of(BLOCK_BYTES), 0);
    }
}

fn archive(reader: &mut Reader<'_>) -> Vec<u8> {
    let mut archive = Vec::new();
    let entries = std::iter::from_fn(|| Entry::read(reader)).take(ENTRIES_MAX);
    entries.for_each(|entry| entry.put(&mut archive));
    archive.resize(archive.len() + 2 * BLOCK_BYTES, 0);
    archive
}
