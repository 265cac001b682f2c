//! The bounded read of a bundle's config.json (runtime-spec, `bundle.md`).

use super::SPEC_MAX_BYTES;
use oci_spec::runtime::Spec;
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Why a bundle has no spec.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// Too long.
    #[error("{path} is longer than {SPEC_MAX_BYTES} bytes")]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// Not a runtime-spec.
    #[error("{path} is not a valid OCI runtime spec")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and how.
        #[source]
        cause: serde_json::Error,
    },
}

/// Reads the spec of the bundle in this directory.
///
/// # Errors
/// It cannot be read, is longer than [`SPEC_MAX_BYTES`] or no spec.
pub fn read(bundle: &Path) -> Result<Spec, ReadError> {
    let path = bundle.join("config.json");
    let bytes = read_bounded(&path).map_err(|cause| ReadError::Read {
        path: path.clone(),
        cause,
    })?;
    if bytes.len() > SPEC_MAX_BYTES {
        return Err(ReadError::TooLong { path });
    }
    serde_json::from_slice(&bytes).map_err(|cause| ReadError::Json { path, cause })
}

/// At most one byte more than is taken.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    // A named pipe must not hold us.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(SPEC_MAX_BYTES as u64 + 1)
        .read_to_end(&mut bytes)?;
    Ok(bytes)
}
