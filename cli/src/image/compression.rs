//! How a stream is compressed, told by its first bytes and not by what its name or media type claims: plain tar, gzip
//! or zstd. Everything else is refused.

use flate2::bufread::MultiGzDecoder;
use std::io::{self, BufReader, Read};

/// Size of the buffer in front of a decompressor, in bytes.
const BUFFER_BYTES: usize = 128 * 1024;
/// Offset of the `ustar` mark in a tar header.
const USTAR_OFFSET: usize = 257;
/// Largest window of a zstd frame that we decode, as a power of two: 128 MiB, the zstd tool's own limit.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// A form of compression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    /// A plain tar.
    None,
    /// gzip (RFC 1952).
    Gzip,
    /// Zstandard (RFC 8878).
    Zstd,
}

/// A stream whose first bytes were looked at; they will be read again.
pub(crate) struct Looked<R> {
    head: Vec<u8>,
    read: usize,
    inner: R,
}

impl<R> Looked<R> {
    /// The stream behind the head.
    pub(crate) fn into_inner(self) -> R {
        self.inner
    }
}

impl<R: Read> Read for Looked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let head = self.head.get(self.read..).unwrap_or_default();
        if head.is_empty() {
            return self.inner.read(buffer);
        }
        let count = head.len().min(buffer.len());
        if let (Some(to), Some(from)) = (buffer.get_mut(..count), head.get(..count)) {
            to.copy_from_slice(from);
        }
        self.read += count;
        Ok(count)
    }
}

/// Tells the compression by the first bytes; `None` for a form that is not ours.
pub(crate) fn detect<R: Read>(mut stream: R) -> io::Result<(Option<Compression>, Looked<R>)> {
    let mut head = Vec::with_capacity(USTAR_OFFSET + 5);
    stream
        .by_ref()
        .take(USTAR_OFFSET as u64 + 5)
        .read_to_end(&mut head)?;
    let compression = recognise(&head);
    let looked = Looked {
        head,
        read: 0,
        inner: stream,
    };
    Ok((compression, looked))
}

fn recognise(head: &[u8]) -> Option<Compression> {
    if head.starts_with(&[0x1f, 0x8b]) {
        return Some(Compression::Gzip);
    }
    if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        return Some(Compression::Zstd);
    }
    // An empty layer is two blocks of zeros.
    let is_tar = head.get(USTAR_OFFSET..) == Some(b"ustar")
        || (head.len() == USTAR_OFFSET + 5 && head.iter().all(|byte| *byte == 0));
    is_tar.then_some(Compression::None)
}

/// The plain bytes of a stream.
pub(crate) fn decompress<'a, R: Read + 'a>(
    compression: Compression,
    stream: R,
) -> io::Result<Box<dyn Read + 'a>> {
    let buffered = BufReader::with_capacity(BUFFER_BYTES, stream);
    Ok(match compression {
        Compression::None => Box::new(buffered),
        Compression::Gzip => Box::new(MultiGzDecoder::new(buffered)),
        Compression::Zstd => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(buffered)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
            Box::new(decoder)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::super::tar::tests::TarMaker;
    use super::*;
    use std::io::Write;

    fn plain(stream: &[u8]) -> Option<Vec<u8>> {
        let (compression, stream) = detect(stream).expect("in memory");
        let mut bytes = Vec::new();
        decompress(compression?, stream)
            .expect("a decoder")
            .read_to_end(&mut bytes)
            .expect("valid");
        Some(bytes)
    }

    #[test]
    fn plain_gzip_and_zstd_are_told_by_their_first_bytes() {
        let tar = TarMaker::default().file("f", b"x").done();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&tar).expect("in memory");
        let gzip = gzip.finish().expect("in memory");
        let zstd = zstd::encode_all(tar.as_slice(), 1).expect("in memory");
        assert_eq!(plain(&tar), Some(tar.clone()));
        assert_eq!(plain(&gzip), Some(tar.clone()));
        assert_eq!(plain(&zstd), Some(tar));
    }

    #[test]
    fn an_unknown_compression_is_refused() {
        assert_eq!(plain(b"\xfd7zXZ\0 an xz stream"), None);
        assert_eq!(plain(b""), None);
    }

    #[test]
    fn an_empty_layer_is_two_blocks_of_zeros() {
        assert_eq!(plain(&[0; 1024]), Some(vec![0; 1024]));
    }
}
