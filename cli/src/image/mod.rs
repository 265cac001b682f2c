//! Container images from files: docker-archive (`docker save`) and OCI image layouts, as a directory or an archive.
//!
//! An image is a stranger's. It is read in one direction: store (where the parts are) -> documents (bounded, typed,
//! digests checked) -> layers (unpacked into the cache, digests checked). Nothing of it names a path of the host.

pub(crate) mod cache;
mod compression;
mod digest;
mod layer;
pub(crate) mod manifest;
mod store;
pub(crate) mod tar;
pub(crate) mod tree;

pub(crate) use manifest::ImageConfig;

use crate::abort::{Abort, Aborted};
use crate::escape::Line;
use cache::{Cache, CacheError};
use digest::{Digest, HashReader};
use manifest::{
    ArchiveImage, Choice, ConfigDocument, DOCUMENT_MAX_BYTES, IndexOrManifest, LAYERS_MAX,
    MANIFESTS_MAX,
};
use serde::de::DeserializeOwned;
use std::fmt::Write as _;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use store::{Blob, Store};

/// Most indexes inside each other.
const INDEX_MAX_DEPTH: u32 = 4;
/// Most names of images that a message lists.
const NAMES_SHOWN_MAX: usize = 8;

/// Why an image was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    /// It cannot be opened.
    #[error("cannot open image {path}")]
    Open {
        /// What.
        path: String,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// It cannot be read.
    #[error("cannot read image: {what}")]
    Read {
        /// What.
        what: String,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// Neither tar nor gzip nor zstd.
    #[error(
        "{path} is no image: expected a docker-archive or an OCI layout, as a directory, tar, tar.gz or tar.zst"
    )]
    NoArchive {
        /// The file.
        path: String,
    },
    /// The archive's tar structure is broken.
    #[error("image archive {path} is broken")]
    Archive {
        /// The file.
        path: String,
        /// How.
        #[source]
        cause: tar::TarError,
    },
    /// Neither `index.json` nor `manifest.json`.
    #[error(
        "{path} is no image: it has neither index.json (OCI layout) nor manifest.json (docker-archive); for a root file system use --rootfs"
    )]
    NoManifest {
        /// The image.
        path: String,
    },
    /// A part is missing.
    #[error("the image lacks {0}, which it names")]
    Missing(String),
    /// A document is not what it should be.
    #[error("the image's {name} is not valid")]
    Document {
        /// The document.
        name: String,
        /// Where and how.
        #[source]
        cause: serde_json::Error,
    },
    /// A document is too long.
    #[error("the image's {name} is {length} bytes long, at most {max_bytes} are read")]
    DocumentTooLong {
        /// The document.
        name: String,
        /// Its length.
        length: u64,
        /// The limit.
        max_bytes: u64,
    },
    /// Too many of something.
    #[error("the image has more than {max} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        max: usize,
    },
    /// A blob is not what its digest says.
    #[error("the image is damaged: {what} should be {expected} and is {found}")]
    Digest {
        /// The blob.
        what: String,
        /// The digest that names it.
        expected: String,
        /// The digest it has.
        found: String,
    },
    /// Not for linux/amd64.
    #[error("the image is for {0}; capsid runs linux/amd64")]
    Platform(String),
    /// Several images.
    #[error("the archive holds several images ({0}); save one alone")]
    Several(String),
    /// No image in it.
    #[error("the archive holds no image")]
    Empty,
    /// No layers.
    #[error("the image has no layers, so it has no root file system")]
    NoLayers,
    /// As many layers as digests must be there.
    #[error("the image has {layers} layers but {diff_ids} layer digests")]
    LayerCount {
        /// Layers.
        layers: usize,
        /// Digests.
        diff_ids: usize,
    },
    /// Indexes too deep.
    #[error("the image's indexes are nested deeper than {INDEX_MAX_DEPTH}")]
    TooDeep,
    /// A layer's compression is not known.
    #[error("layer {0} is neither a tar nor compressed with gzip or zstd")]
    Compression(String),
    /// A layer was refused.
    #[error("cannot unpack layer {digest}")]
    Layer {
        /// Which.
        digest: String,
        /// Why.
        #[source]
        cause: layer::LayerError,
    },
    /// The cache failed.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A signal asked to stop.
    #[error(transparent)]
    Aborted(#[from] Aborted),
}

/// An image ready to be mounted.
#[derive(Debug)]
pub(crate) struct Image {
    /// What it says of the process.
    pub config: ImageConfig,
    /// The directories of its layers in the cache, the lowest first.
    pub layers: Vec<PathBuf>,
    /// Extended attributes that could not be kept.
    pub dropped_xattrs: u64,
}

/// One layer: its blob, the blob's digest where the format gives one, and the digest of its tar.
struct Layer {
    name: String,
    blob: Blob,
    digest: Option<Digest>,
    diff_id: Digest,
}

/// Reads the image at `path` and unpacks what is not in the cache yet.
///
/// # Errors
/// The first thing wrong; nothing is left in the cache but whole layers.
pub(crate) fn open(path: &Path, cache: &Cache, abort: &Abort) -> Result<Image, ImageError> {
    let store = Store::open(path, cache.temporary(), abort)?;
    let (config, layers) = if store.get("index.json")?.is_some() {
        oci_layout(&store)?
    } else if store.get("manifest.json")?.is_some() {
        docker_archive(&store)?
    } else {
        return Err(ImageError::NoManifest {
            path: path.display().to_string(),
        });
    };
    let mut image = Image {
        config,
        layers: Vec::new(),
        dropped_xattrs: 0,
    };
    for layer in layers {
        abort.check()?;
        let path = cache.path(&layer.diff_id);
        if !cache.has(&layer.diff_id) {
            image.dropped_xattrs += unpack(layer, cache, abort)?;
        }
        image.layers.push(path);
    }
    Ok(image)
}

/// Unpacks one layer into the cache, checking both digests before it appears there. How many extended attributes were
/// dropped.
fn unpack(layer: Layer, cache: &Cache, abort: &Abort) -> Result<u64, ImageError> {
    let unpacking = cache.begin()?;
    let found = unpack_into(layer.blob, &layer.name, unpacking.directory()?, abort)?;
    same("the unpacked layer", &layer.diff_id, &found.unpacked)?;
    if let Some(digest) = &layer.digest {
        same("the layer's blob", digest, &found.blob)?;
    }
    cache.finish(&unpacking, &layer.diff_id)?;
    Ok(found.dropped_xattrs)
}

/// What a blob was found to be.
pub(crate) struct Found {
    blob: Digest,
    unpacked: Digest,
    dropped_xattrs: u64,
}

/// Unpacks the blob of a layer into a directory, whatever its digests.
///
/// # Errors
/// What is wrong with it; the directory has a part of it.
pub(crate) fn unpack_into(
    blob: impl Read,
    name: &str,
    directory: OwnedFd,
    abort: &Abort,
) -> Result<Found, ImageError> {
    let read = |cause| ImageError::Read {
        what: format!("layer {name}"),
        cause,
    };
    let (blob, blob_tally) = HashReader::new(blob, u64::MAX, abort);
    let (compression, stream) = compression::detect(blob).map_err(read)?;
    let compression = compression.ok_or_else(|| ImageError::Compression(name.to_owned()))?;
    let stream = compression::decompress(compression, stream).map_err(read)?;
    let (stream, tar_tally) = HashReader::new(stream, cache::LAYER_MAX_BYTES, abort);
    let (unpacked, mut rest) = layer::unpack(stream, directory).map_err(|cause| {
        // A run that was stopped shows as a read that failed.
        abort
            .check()
            .map_or_else(ImageError::from, |()| ImageError::Layer {
                digest: name.to_owned(),
                cause,
            })
    })?;
    io::copy(&mut rest, &mut io::sink()).map_err(read)?;
    drop(rest);
    let (blob, unpacked_digest) = (blob_tally.borrow().digest(), tar_tally.borrow().digest());
    Ok(Found {
        blob,
        unpacked: unpacked_digest,
        dropped_xattrs: unpacked.dropped_xattrs,
    })
}

fn same(what: &str, expected: &Digest, found: &Digest) -> Result<(), ImageError> {
    if expected == found {
        return Ok(());
    }
    Err(ImageError::Digest {
        what: what.to_owned(),
        expected: expected.to_string(),
        found: found.to_string(),
    })
}

/// `manifest.json`: one image, its config and its layers by member name.
fn docker_archive(store: &Store) -> Result<(ImageConfig, Vec<Layer>), ImageError> {
    let mut images: Vec<ArchiveImage> = named(store, "manifest.json")?;
    if images.len() > 1 {
        return Err(ImageError::Several(list(images.iter().map(|image| {
            image
                .tags
                .iter()
                .flatten()
                .next()
                .cloned()
                .unwrap_or_default()
        }))));
    }
    let image = images.pop().ok_or(ImageError::Empty)?;
    let document: ConfigDocument = named(store, &image.config)?;
    let names = image.layers.unwrap_or_default();
    let diff_ids = check_layers(&document, names.len())?;
    let mut layers = Vec::new();
    for (name, diff_id) in names.into_iter().zip(diff_ids) {
        layers.push(Layer {
            blob: part(store, &name)?,
            name: Line(name.as_bytes()).to_string(),
            digest: None,
            diff_id,
        });
    }
    Ok((document.config.unwrap_or_default(), layers))
}

/// `index.json`: down to the manifest for our platform, every blob by its digest.
fn oci_layout(store: &Store) -> Result<(ImageConfig, Vec<Layer>), ImageError> {
    let mut current: IndexOrManifest = named(store, "index.json")?;
    for _ in 0..INDEX_MAX_DEPTH {
        let Some(manifests) = current.manifests.take() else {
            return oci_manifest(store, current);
        };
        if manifests.len() > MANIFESTS_MAX {
            return Err(ImageError::TooMany {
                what: "manifests in one index",
                max: MANIFESTS_MAX,
            });
        }
        current = match manifest::choose(&manifests) {
            Choice::One(digest) => addressed(store, digest)?,
            Choice::NoneOfOurs(platforms) if platforms.is_empty() => {
                return Err(ImageError::Empty);
            }
            Choice::NoneOfOurs(platforms) => {
                return Err(ImageError::Platform(list(platforms.into_iter())));
            }
            Choice::Several(names) => return Err(ImageError::Several(list(names.into_iter()))),
        };
    }
    Err(ImageError::TooDeep)
}

fn oci_manifest(
    store: &Store,
    manifest: IndexOrManifest,
) -> Result<(ImageConfig, Vec<Layer>), ImageError> {
    let config = manifest
        .config
        .ok_or_else(|| ImageError::Missing("a config".to_owned()))?;
    let document: ConfigDocument = addressed(store, &config.digest)?;
    let diff_ids = check_layers(&document, manifest.layers.len())?;
    let mut layers = Vec::new();
    for (descriptor, diff_id) in manifest.layers.into_iter().zip(diff_ids) {
        let name = blob_name(&descriptor.digest);
        layers.push(Layer {
            blob: part(store, &name)?,
            name: descriptor.digest.to_string(),
            digest: Some(descriptor.digest),
            diff_id,
        });
    }
    Ok((document.config.unwrap_or_default(), layers))
}

/// The digests of the unpacked layers, one for each layer, of an image for our platform.
fn check_layers(document: &ConfigDocument, layers: usize) -> Result<Vec<Digest>, ImageError> {
    let platform = &document.platform;
    if !platform.is_ours() {
        return Err(ImageError::Platform(list(
            [format!("{}/{}", platform.os, platform.architecture)].into_iter(),
        )));
    }
    let diff_ids = document.rootfs.diff_ids.clone();
    if layers == 0 && diff_ids.is_empty() {
        return Err(ImageError::NoLayers);
    }
    if layers != diff_ids.len() {
        return Err(ImageError::LayerCount {
            layers,
            diff_ids: diff_ids.len(),
        });
    }
    if layers > LAYERS_MAX {
        return Err(ImageError::TooMany {
            what: "layers",
            max: LAYERS_MAX,
        });
    }
    Ok(diff_ids)
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn part(store: &Store, name: &str) -> Result<Blob, ImageError> {
    store
        .get(name)?
        .ok_or_else(|| ImageError::Missing(Line(name.as_bytes()).to_string()))
}

/// A document by its name.
fn named<T: DeserializeOwned>(store: &Store, name: &str) -> Result<T, ImageError> {
    let bytes = store::document(&mut part(store, name)?, name, DOCUMENT_MAX_BYTES)?;
    parse(name, &bytes)
}

/// A document by its digest, which it must have.
fn addressed<T: DeserializeOwned>(store: &Store, digest: &Digest) -> Result<T, ImageError> {
    let name = blob_name(digest);
    let bytes = store::document(&mut part(store, &name)?, &name, DOCUMENT_MAX_BYTES)?;
    same(&name, digest, &Digest::of(&bytes))?;
    parse(&name, &bytes)
}

fn parse<T: DeserializeOwned>(name: &str, bytes: &[u8]) -> Result<T, ImageError> {
    serde_json::from_slice(bytes).map_err(|cause| ImageError::Document {
        name: Line(name.as_bytes()).to_string(),
        cause,
    })
}

/// Some words of a stranger in a row.
fn list(words: impl Iterator<Item = String>) -> String {
    let mut text = String::new();
    for (index, word) in words.enumerate() {
        if index == NAMES_SHOWN_MAX {
            text.push_str(", …");
            break;
        }
        let separator = if index == 0 { "" } else { ", " };
        // Writing to a string does not fail.
        let _infallible = write!(text, "{separator}{}", Line(word.as_bytes()));
    }
    text
}

#[cfg(test)]
#[path = "image_tests.rs"]
mod tests;
