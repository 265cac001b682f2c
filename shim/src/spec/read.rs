//! The bounded read of a bundle's config.json (runtime-spec, `bundle.md`).

use super::SPEC_MAX_BYTES;
use oci_spec::runtime::Spec;
use rustix::fs::{Mode, OFlags};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::collections::HashMap;
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
    parsed(bundle)
}

/// Reads the annotations of that spec, and looks at nothing else in it.
///
/// # Errors
/// As for [`read`].
pub fn annotations(bundle: &Path) -> Result<HashMap<String, String>, ReadError> {
    #[derive(Deserialize)]
    struct Annotated {
        annotations: Option<HashMap<String, String>>,
    }
    let spec: Annotated = parsed(bundle)?;
    Ok(spec.annotations.unwrap_or_default())
}

fn parsed<T: DeserializeOwned>(bundle: &Path) -> Result<T, ReadError> {
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

#[cfg(test)]
mod tests {
    use super::super::engines;
    use super::*;
    use crate::testing::Scratch;

    #[test]
    fn a_config_that_is_missing_broken_or_huge_is_named() {
        let directory =
            std::env::temp_dir().join(format!("capsid-shim-spec-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("made");
        let missing = read(&directory.join("none")).expect_err("missing");
        assert!(missing.to_string().starts_with("cannot read"));
        let path = directory.join("config.json");
        let said = |bytes: &[u8]| {
            std::fs::write(&path, bytes).expect("written");
            read(&directory).expect_err("refused").to_string()
        };
        assert!(said(b"").ends_with("is not a valid OCI runtime spec"));
        assert!(said("[".repeat(100_000).as_bytes()).ends_with("is not a valid OCI runtime spec"));
        assert!(said(&vec![b' '; SPEC_MAX_BYTES + 1]).ends_with("is longer than 2097152 bytes"));
        std::fs::write(&path, engines::ctr().to_string()).expect("written");
        let good = read(&directory);
        std::fs::remove_file(&path).expect("removed");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o600.into()).expect("a pipe");
        let pipe = read(&directory);
        std::fs::remove_dir_all(&directory).expect("removed");
        assert_eq!(good.expect("a spec").version(), "1.2.0");
        assert!(
            matches!(pipe, Err(ReadError::Read { .. })),
            "a pipe does not hold us"
        );
    }

    #[test]
    fn the_annotations_of_a_bundle_are_read_and_the_rest_is_left() {
        let bundle = Scratch::new("read");
        let config = bundle.path().join("config.json");
        std::fs::write(&config, r#"{"annotations":{"a":"b"},"process":7}"#).expect("writable");
        let read = annotations(bundle.path()).expect("annotations");
        assert_eq!(read.get("a").map(String::as_str), Some("b"));
        std::fs::write(&config, "{}").expect("writable");
        assert!(annotations(bundle.path()).expect("none").is_empty());
        std::fs::write(&config, "{").expect("writable");
        let error = annotations(bundle.path()).expect_err("broken").to_string();
        assert!(
            error.ends_with("config.json is not a valid OCI runtime spec"),
            "{error}"
        );
    }
}
