//! A hostile or broken image is refused for what is wrong with it, and neither it nor a full disk leaves anything.

use capsid_tests::bundle::{Scratch, image_layers};
use capsid_tests::capsid::{REFUSED, capsid, image, refused};
use capsid_tests::ledger::Ledger;
use serde_json::json;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::slice::from_ref;
use std::thread;

/// Where a hostile layer tries to write on the host.
const OUTSIDE: &str = "/var/tmp/capsid-escaped";

/// The digest of a layer as an image's config names it.
fn diff_id(layer: &[u8]) -> String {
    let mut sum = Command::new("sha256sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("sha256sum");
    let mut pipe = sum.stdin.take().expect("piped");
    pipe.write_all(layer).expect("it reads to the end");
    drop(pipe);
    let out = sum.wait_with_output().expect("our own child");
    let text = String::from_utf8(out.stdout).expect("hex digits");
    format!("sha256:{}", text.split(' ').next().expect("the digest"))
}

/// A docker-archive that is right in everything but what the layers themselves bring.
fn archive(layers: &[Vec<u8>]) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|layer| diff_id(layer)).collect();
    archive_of(layers, &diff_ids)
}

/// A docker-archive with these layers under these digests.
fn archive_of(layers: &[Vec<u8>], diff_ids: &[String]) -> Vec<u8> {
    let names: Vec<String> = (0..layers.len())
        .map(|index| format!("layer{index}.tar"))
        .collect();
    let config = json!({"architecture": "amd64", "os": "linux", "config": {"Cmd": ["sh"]},
                        "rootfs": {"type": "layers", "diff_ids": diff_ids}});
    let manifest = json!([{"Config": "config.json", "RepoTags": ["t:1"], "Layers": names}]);
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |name: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder
            .append_data(&mut header, name, bytes)
            .expect("in memory");
    };
    add("config.json", config.to_string().as_bytes());
    add("manifest.json", manifest.to_string().as_bytes());
    for (name, layer) in names.iter().zip(layers) {
        add(name, layer);
    }
    builder.into_inner().expect("in memory")
}

/// One entry of a layer with a name that `tar` itself would refuse to write.
fn entry(name: &str, kind: tar::EntryType, link: &str, bytes: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_size(bytes.len() as u64);
    header.set_mode(if kind.is_dir() { 0o755 } else { 0o644 });
    header.set_cksum();
    let mut entry = header.as_bytes().to_vec();
    entry.extend_from_slice(bytes);
    entry.resize(entry.len().next_multiple_of(512), 0);
    entry
}

fn file(name: &str, bytes: &[u8]) -> Vec<u8> {
    entry(name, tar::EntryType::Regular, "", bytes)
}

fn link(name: &str, target: &str) -> Vec<u8> {
    entry(name, tar::EntryType::Symlink, target, b"")
}

/// A layer of these entries, ended as a tar is.
fn layer(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut layer = entries.concat();
    layer.extend([0; 1024]);
    layer
}

/// Asserts that this archive is refused with `words`, writes nothing outside and leaves nothing in the cache.
#[track_caller]
fn image_refused(archive: &[u8], words: &[&str]) {
    let scratch = Scratch::new("image");
    let (path, cache) = (scratch.join("image.tar"), scratch.join("cache"));
    fs::write(&path, archive).expect("write");
    let run = capsid(["run", "--image", &path, "--", "true"]).env("CAPSID_CACHE", &cache);
    refused(run, words);
    assert!(!Path::new(OUTSIDE).exists(), "{words:?} escaped");
    assert_eq!(left_in(&cache), [""; 0], "left behind by {words:?}");
}

/// What is in the directories of a cache.
fn left_in(cache: &str) -> Vec<String> {
    ["layers", "tmp"]
        .iter()
        .flat_map(|part| {
            fs::read_dir(Path::new(cache).join(part)).expect("the cache is made in any case")
        })
        .map(|entry| entry.expect("readable").path().display().to_string())
        .collect()
}

#[test]
fn a_layer_that_climbs_out_of_its_root_is_refused() {
    let name = format!("../../../../../../../..{OUTSIDE}");
    let up = layer(&[file(&name, b"x")]);
    image_refused(
        &archive(&[up]),
        &[
            "cannot unpack layer",
            &name,
            "leads out of the image's root",
        ],
    );
}

#[test]
fn a_layer_that_writes_through_a_link_out_of_its_root_is_refused() {
    // Inside the layer /var/tmp is not there, so the link leads nowhere.
    let through = layer(&[link("out", "/var/tmp"), file("out/capsid-escaped", b"x")]);
    image_refused(
        &archive(&[through]),
        &["cannot unpack layer", "out/capsid-escaped", "File exists"],
    );
}

#[test]
fn a_layer_that_goes_round_in_a_loop_of_links_is_refused() {
    let looped = layer(&[link("a", "b"), link("b", "a"), file("a/file", b"x")]);
    image_refused(
        &archive(&[looped]),
        &["cannot unpack layer", "a/file", "a loop of symbolic links"],
    );
}

#[test]
fn a_layer_cut_short_is_refused() {
    let cut = file("file", &[7; 4096])[..2048].to_vec();
    image_refused(
        &archive(&[cut]),
        &["cannot unpack layer", "the archive is cut short"],
    );
}

#[test]
fn an_archive_cut_short_is_refused() {
    let mut whole = archive(&[layer(&[file("file", &[7; 65536])])]);
    whole.truncate(whole.len() / 2);
    image_refused(&whole, &["layer layer0.tar", "the archive is cut short"]);
}

#[test]
fn a_layer_in_an_unknown_compression_is_refused() {
    let xz = b"\xfd7zXZ\0 an xz stream is no layer of ours".to_vec();
    image_refused(
        &archive(&[xz]),
        &["layer layer0.tar is neither a tar nor compressed with gzip or zstd"],
    );
}

#[test]
fn a_layer_that_is_not_what_its_digest_says_is_refused() {
    let other = diff_id(b"another layer");
    let found = layer(&[file("file", b"x")]);
    let words = ["the image is damaged", &other, &diff_id(&found)];
    image_refused(&archive_of(from_ref(&found), from_ref(&other)), &words);
}

#[test]
fn an_image_without_layers_is_refused() {
    image_refused(&archive(&[]), &["the image has no layers"]);
}

#[test]
fn a_text_is_refused_as_no_image() {
    image_refused(b"no archive at all", &["is no image", "docker-archive"]);
}

#[test]
fn a_link_of_an_image_leads_to_the_image_s_own_directory() {
    let before = Ledger::now();
    let scratch = Scratch::new("link");
    let mut layers = image_layers();
    layers.push(layer(&[
        entry("var", tar::EntryType::Directory, "", b""),
        entry("var/tmp", tar::EntryType::Directory, "", b""),
        link("out", "/var/tmp"),
        file("out/capsid-escaped", b"inside\n"),
    ]));
    let path = scratch.join("image.tar");
    fs::write(&path, archive(&layers)).expect("write");
    let ended = capsid(["run", "--image", &path, "--", "cat", OUTSIDE])
        .env("CAPSID_CACHE", scratch.join("cache"))
        .wait();
    assert!(!Path::new(OUTSIDE).exists(), "it escaped");
    ended.exits(0);
    assert_eq!(ended.text(), "inside\n");
    drop(scratch);
    before.balances();
}

/// Runs the image with a cache on a disk that is too small for it; what is said has `words`.
#[track_caller]
fn refused_on_a_full_disk(image: &Path, words: &[&str]) {
    let scratch = Scratch::new("full");
    let before = Ledger::now();
    let status = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=128k", "capsid-test"])
        .arg(scratch.path())
        .status();
    assert!(status.expect("mount").success());
    let image = image.to_str().expect("utf-8");
    let ended = capsid(["run", "--image", image, "--", "true"])
        .env("CAPSID_CACHE", scratch.path())
        .wait();
    // The mount goes first: a test that fails must not take the other tests with it.
    let left = left_in(&scratch.join(""));
    let status = Command::new("umount").arg(scratch.path()).status();
    assert!(status.expect("umount").success());
    ended.refuses(REFUSED, words);
    assert_eq!(left, [""; 0], "left in the cache");
    before.balances();
}

#[test]
fn a_full_cache_disk_is_said_and_leaves_nothing() {
    refused_on_a_full_disk(
        &image(),
        &["cannot unpack layer", "No space left on device"],
    );
}

#[test]
fn a_cache_disk_too_full_to_decompress_an_archive_is_said_and_leaves_nothing() {
    let scratch = Scratch::new("gzip");
    let path = scratch.path().join("busybox.tar.gz");
    fs::write(&path, gzip(fs::read(image()).expect("the test image"))).expect("write");
    refused_on_a_full_disk(
        &path,
        &["decompressing", "busybox.tar.gz", "No space left on device"],
    );
}

fn gzip(bytes: Vec<u8>) -> Vec<u8> {
    let mut gzip = Command::new("gzip")
        .arg("-1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("gzip");
    let mut pipe = gzip.stdin.take().expect("piped");
    // On a thread of its own, or both pipes could be full with nobody reading.
    let feed = thread::spawn(move || pipe.write_all(&bytes));
    let out = gzip.wait_with_output().expect("our own child");
    feed.join().expect("no panic").expect("it reads to the end");
    assert!(out.stdout.starts_with(&[0x1f, 0x8b]), "no gzip stream");
    out.stdout
}
