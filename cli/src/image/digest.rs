//! Content digests: `sha256:` and 64 lower-case hex digits, nothing else (OCI image-spec, "Digests"). A [`Digest`]
//! is safe as a file name.

use crate::abort::Abort;
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::cell::RefCell;
use std::fmt;
use std::io::{self, Read};
use std::rc::Rc;

/// A sha256 digest.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Digest(String);

/// Not a digest that we know.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a sha256 digest")]
pub(crate) struct BadDigest(String);

impl Digest {
    /// The digest of some bytes.
    pub(crate) fn of(bytes: &[u8]) -> Digest {
        let mut tally = Tally::default();
        tally.hasher.update(bytes);
        tally.digest()
    }

    /// The 64 hex digits.
    pub(crate) fn hex(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Digest {
    type Error = BadDigest;

    fn try_from(text: String) -> Result<Self, BadDigest> {
        match text.strip_prefix("sha256:") {
            Some(hex)
                if hex.len() == 64
                    && hex
                        .bytes()
                        .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) =>
            {
                Ok(Digest(hex.to_owned()))
            }
            _ => Err(BadDigest(text.chars().take(80).collect())),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

/// What has gone through a [`HashReader`].
#[derive(Default)]
pub(crate) struct Tally {
    hasher: Sha256,
    bytes: u64,
}

impl Tally {
    /// The digest of what has gone through so far.
    pub(crate) fn digest(&self) -> Digest {
        let sum = self.hasher.clone().finalize();
        Digest(sum.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// Reads through, hashing; ends with an error beyond `max_bytes` and when the run is aborted.
pub(crate) struct HashReader<R> {
    inner: R,
    tally: Rc<RefCell<Tally>>,
    max_bytes: u64,
    abort: Abort,
}

impl<R> HashReader<R> {
    /// A reader and the tally of it.
    pub(crate) fn new(inner: R, max_bytes: u64, abort: &Abort) -> (Self, Rc<RefCell<Tally>>) {
        let tally = Rc::new(RefCell::new(Tally::default()));
        let reader = HashReader {
            inner,
            tally: Rc::clone(&tally),
            max_bytes,
            abort: abort.clone(),
        };
        (reader, tally)
    }
}

impl<R: Read> Read for HashReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.abort.check().map_err(io::Error::other)?;
        let count = self.inner.read(buffer)?;
        let mut tally = self.tally.borrow_mut();
        tally.hasher.update(buffer.get(..count).unwrap_or_default());
        tally.bytes += count as u64;
        if tally.bytes > self.max_bytes {
            return Err(io::Error::other(format!(
                "more than {} bytes",
                self.max_bytes
            )));
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_that_is_a_path_is_refused() {
        for text in [
            "sha256:../../etc/passwd",
            "sha256:00",
            "md5:00",
            "",
            "sha256:AA0db2bb14fc5a1b0b3bd6fdcd7b9dd5b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1b1",
        ] {
            assert!(Digest::try_from(text.to_owned()).is_err(), "{text}");
        }
    }

    #[test]
    fn the_tally_is_the_digest_of_the_bytes() {
        let (mut reader, tally) = HashReader::new(&b"abc"[..], 3, &Abort::default());
        reader
            .read_to_end(&mut Vec::new())
            .expect("within the limit");
        assert_eq!(
            tally.borrow().digest().hex(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn more_bytes_than_allowed_are_refused() {
        let (mut reader, _) = HashReader::new(&b"abcd"[..], 3, &Abort::default());
        assert!(reader.read_to_end(&mut Vec::new()).is_err());
    }

    #[test]
    fn an_aborted_run_stops_reading() {
        let abort = Abort::default();
        abort.raise(2);
        let (mut reader, _) = HashReader::new(&b"abcd"[..], 9, &abort);
        assert!(reader.read_to_end(&mut Vec::new()).is_err());
    }
}
