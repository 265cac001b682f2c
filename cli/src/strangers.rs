//! What reads a stranger's bytes, by itself: for the fuzz targets. What is refused is told in one line, as a person would read
//! it.

use crate::abort::Abort;
use crate::chain;
use crate::image;
use crate::image::manifest::{ArchiveImage, ConfigDocument, IndexOrManifest, choose};
use crate::spec::bundle;
use std::os::fd::OwnedFd;
use std::path::Path;

/// Unpacks a layer, compressed or not, into `root`.
///
/// # Errors
/// Why it was refused; `root` has a part of it.
pub fn unpack_layer(blob: &[u8], root: OwnedFd) -> Result<(), String> {
    let found = image::unpack_into(blob, "fuzzed", root, &Abort::default());
    found.map(|_| ()).map_err(|error| chain(&error))
}

/// Reads one of an image's JSON documents as each of those that it may be: docker-archive's list, an index or a manifest, a
/// config. As how many it could be read.
pub fn read_documents(json: &[u8]) -> usize {
    let archive = serde_json::from_slice::<Vec<ArchiveImage>>(json).is_ok();
    let config = serde_json::from_slice::<ConfigDocument>(json).is_ok();
    let index = serde_json::from_slice::<IndexOrManifest>(json);
    if let Some(manifests) = index
        .as_ref()
        .ok()
        .and_then(|index| index.manifests.as_ref())
    {
        choose(manifests);
    }
    usize::from(archive) + usize::from(config) + usize::from(index.is_ok())
}

/// Reads the `config.json` of a bundle in `directory`.
///
/// # Errors
/// Why it was refused.
pub fn read_bundle(json: &[u8], directory: &Path) -> Result<(), String> {
    let bundle = bundle::parse(json, directory.join("config.json"), directory);
    bundle.map(|_| ()).map_err(|error| chain(&error))
}
