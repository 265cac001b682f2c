//! Whole images made by hand: good ones unpack, broken ones are refused with one sentence and leave nothing.

use super::tar::tests::TarMaker;
use super::*;
use crate::testing::Scratch;
use serde_json::json;
use std::fs;

fn digest_of(bytes: &[u8]) -> String {
    Digest::of(bytes).to_string()
}

fn config(diff_ids: &[String]) -> Vec<u8> {
    json!({"os": "linux", "architecture": "amd64", "config": {"Cmd": ["sh"], "Env": ["A=b"]},
           "rootfs": {"type": "layers", "diff_ids": diff_ids}})
    .to_string()
    .into_bytes()
}

fn archive(layers: &[Vec<u8>]) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|layer| digest_of(layer)).collect();
    let names: Vec<String> = (0..layers.len())
        .map(|index| format!("{index}/layer.tar"))
        .collect();
    let manifest = json!([{"Config": "config.json", "RepoTags": ["t:1"], "Layers": names}]);
    let mut maker = TarMaker::default();
    maker.file("manifest.json", manifest.to_string().as_bytes());
    maker.file("config.json", &config(&diff_ids));
    for (name, layer) in names.iter().zip(layers) {
        maker.file(name, layer);
    }
    maker.done()
}

/// An OCI layout as name and bytes of its files.
fn layout(blob: &[u8], tar: &[u8]) -> Vec<(String, Vec<u8>)> {
    let config = config(&[digest_of(tar)]);
    let manifest =
        json!({"schemaVersion": 2, "config": {"digest": digest_of(&config), "size": config.len()},
                          "layers": [{"digest": digest_of(blob), "size": blob.len()}]})
        .to_string()
        .into_bytes();
    let index = json!({"schemaVersion": 2, "manifests": [
        {"digest": digest_of(b"arm"), "platform": {"os": "linux", "architecture": "arm64"}},
        {"digest": digest_of(&manifest), "platform": {"os": "linux", "architecture": "amd64"}}]});
    let name = |bytes: &[u8]| blob_name(&Digest::of(bytes));
    vec![
        (
            "oci-layout".into(),
            br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec(),
        ),
        ("index.json".into(), index.to_string().into_bytes()),
        (name(&manifest), manifest),
        (name(&config), config),
        (name(blob), blob.to_vec()),
    ]
}

fn open_bytes(scratch: &Scratch, bytes: &[u8]) -> Result<Image, ImageError> {
    let path = scratch.path().join("image.tar");
    fs::write(&path, bytes).expect("writable");
    open_path(scratch, &path)
}

fn open_path(scratch: &Scratch, path: &Path) -> Result<Image, ImageError> {
    let cache = Cache::open(&scratch.path().join("cache")).expect("writable");
    let image = open(path, &cache, &Abort::default());
    let left = fs::read_dir(cache.temporary()).expect("there").count();
    assert_eq!(left, 0, "nothing is left in the cache's tmp");
    image
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

fn refused(bytes: &[u8]) -> String {
    let scratch = Scratch::new("image");
    let error = open_bytes(&scratch, bytes).expect_err("must be refused");
    let layers = fs::read_dir(scratch.path().join("cache/layers")).expect("there");
    assert_eq!(layers.count(), 0, "no layer of a refused image is kept");
    chain(&error)
}

fn one_layer() -> Vec<u8> {
    TarMaker::default()
        .add(b'5', "etc/", "", 0o755, b"")
        .file("etc/motd", b"hello")
        .done()
}

#[test]
fn a_docker_archive_is_unpacked_and_found_again() {
    let scratch = Scratch::new("image");
    let bytes = archive(&[one_layer()]);
    let image = open_bytes(&scratch, &bytes).expect("a good image");
    assert_eq!(image.config.cmd, Some(vec!["sh".into()]));
    let motd = image.layers[0].join("etc/motd");
    assert_eq!(fs::read(&motd).expect("unpacked"), b"hello");
    let inode = fs::metadata(&motd).expect("there");
    open_bytes(&scratch, &bytes).expect("a good image");
    let again = fs::metadata(&motd).expect("there");
    use std::os::unix::fs::MetadataExt;
    assert_eq!(inode.ino(), again.ino(), "the second run unpacks nothing");
}

#[test]
fn a_gzip_archive_is_an_archive() {
    use std::io::Write;
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&archive(&[one_layer()])).expect("in memory");
    let scratch = Scratch::new("image");
    open_bytes(&scratch, &gzip.finish().expect("in memory")).expect("a good image");
}

#[test]
fn an_oci_layout_directory_with_a_zstd_layer_is_unpacked() {
    let scratch = Scratch::new("image");
    let tar = one_layer();
    let blob = zstd::encode_all(tar.as_slice(), 1).expect("in memory");
    let directory = scratch.path().join("layout");
    for (name, bytes) in layout(&blob, &tar) {
        let path = directory.join(name);
        fs::create_dir_all(path.parent().expect("below the layout")).expect("writable");
        fs::write(path, bytes).expect("writable");
    }
    let image = open_path(&scratch, &directory).expect("a good image");
    assert!(image.layers[0].join("etc/motd").exists());
}

#[test]
fn an_oci_archive_is_unpacked() {
    let tar = one_layer();
    let mut maker = TarMaker::default();
    for (name, bytes) in layout(&tar, &tar) {
        maker.file(&name, &bytes);
    }
    let scratch = Scratch::new("image");
    open_bytes(&scratch, &maker.done()).expect("a good image");
}

#[test]
fn a_damaged_blob_is_refused_by_its_digest() {
    let tar = one_layer();
    let mut maker = TarMaker::default();
    for (name, mut bytes) in layout(&tar, &tar) {
        if bytes == tar {
            bytes[512 + 100] ^= 1; // the mode of etc/motd; the header's checksum is then wrong too
            bytes[512 + 150] = bytes[512 + 150].wrapping_add(0);
        }
        maker.file(&name, &bytes);
    }
    assert!(refused(&maker.done()).contains("tar"));
}

#[test]
fn a_layer_that_is_not_the_one_named_is_refused() {
    let other = TarMaker::default().file("other", b"x").done();
    let manifest = json!([{"Config": "c.json", "Layers": ["l"]}]).to_string();
    let mut maker = TarMaker::default();
    maker.file("manifest.json", manifest.as_bytes());
    maker.file("c.json", &config(&[digest_of(&one_layer())]));
    maker.file("l", &other);
    assert!(refused(&maker.done()).contains("the image is damaged"));
}

#[test]
fn an_image_without_layers_is_refused() {
    assert!(refused(&archive(&[])).contains("no layers"));
}

#[test]
fn an_unknown_compression_is_refused() {
    assert!(refused(&archive(&[b"\xfd7zXZ\0 xz".to_vec()])).contains("gzip or zstd"));
}

#[test]
fn a_layer_cut_short_is_refused() {
    let layer = TarMaker::default().file("f", &[7; 4096]).done()[..2048].to_vec();
    assert!(refused(&archive(&[layer])).contains("cut short"));
}

#[test]
fn an_escaping_path_is_refused() {
    let layer = TarMaker::default().file("../../x", b"").done();
    assert!(refused(&archive(&[layer])).contains("leads out of the image's root"));
}

#[test]
fn a_text_file_is_no_image() {
    assert!(refused(b"no archive at all").contains("is no image"));
}

#[test]
fn an_archive_without_a_manifest_is_no_image() {
    assert!(refused(&one_layer()).contains("neither index.json"));
}

#[test]
fn a_part_that_is_missing_is_named() {
    let manifest = json!([{"Config": "c.json", "Layers": ["l"]}]).to_string();
    let archive = TarMaker::default()
        .file("manifest.json", manifest.as_bytes())
        .done();
    assert!(refused(&archive).contains("lacks c.json"));
}

#[test]
fn a_path_that_is_not_there_is_named() {
    let scratch = Scratch::new("image");
    let error = open_path(&scratch, Path::new("/no/such.tar")).expect_err("not there");
    assert!(error.to_string().contains("/no/such.tar"));
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing() {
    let scratch = Scratch::new("image");
    let layer = TarMaker::default().file("big", &[7; 1 << 20]).done();
    let path = scratch.path().join("image.tar");
    fs::write(&path, archive(&[layer])).expect("writable");
    let directory = scratch.path().join("cache");
    fs::create_dir(&directory).expect("writable");
    // The small disk is seen by this thread alone, and gone with it.
    let full = std::thread::spawn(move || {
        use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("root");
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).expect("root");
        mount(
            "small",
            &directory,
            "tmpfs",
            MountFlags::empty(),
            Some(c"size=256k"),
        )
        .expect("root");
        let cache = Cache::open(&directory).expect("writable");
        let error = open(&path, &cache, &Abort::default()).expect_err("the disk is full");
        for name in ["tmp", "layers"] {
            let left = fs::read_dir(directory.join(name)).expect("there").count();
            assert_eq!(left, 0, "nothing is left in {name}");
        }
        chain(&error)
    });
    let said = full.join().expect("it ends");
    assert!(
        said.contains("No space left") && !said.contains('\n'),
        "{said}"
    );
}

#[test]
fn an_image_given_up_half_way_leaves_nothing() {
    let scratch = Scratch::new("image");
    let path = scratch.path().join("image.tar");
    fs::write(&path, archive(&[one_layer()])).expect("writable");
    let cache = Cache::open(&scratch.path().join("cache")).expect("writable");
    let abort = Abort::default();
    abort.raise(2);
    assert!(open(&path, &cache, &abort).is_err());
    for name in ["tmp", "layers"] {
        let directory = scratch.path().join("cache").join(name);
        assert_eq!(fs::read_dir(directory).expect("there").count(), 0);
    }
}
