//! Layers made by hand, unpacked into a directory of the test. They need root: an unprivileged run fails by name.

use super::super::tar::tests::TarMaker;
use super::*;
use crate::testing::Scratch;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};

fn unpack_into(scratch: &Scratch, archive: &[u8]) -> Result<Unpacked, LayerError> {
    let root = fs::File::open(scratch.path()).expect("the scratch directory");
    unpack(archive, root.into()).map(|(unpacked, _)| unpacked)
}

fn refused(archive: &[u8]) -> String {
    let scratch = Scratch::new("layer");
    unpack_into(&scratch, archive)
        .expect_err("must be refused")
        .to_string()
}

#[test]
fn files_links_and_modes_are_kept() {
    let scratch = Scratch::new("layer");
    let archive = TarMaker::default()
        .add(b'5', "bin/", "", 0o755, b"")
        .add(b'0', "bin/su", "", 0o4755, b"elf")
        .add(b'1', "bin/sudo", "bin/su", 0o4755, b"")
        .add(b'2', "sh", "/bin/su", 0o777, b"")
        .add(b'6', "pipe", "", 0o600, b"")
        .done();
    unpack_into(&scratch, &archive).expect("a good layer");
    let su = fs::metadata(scratch.path().join("bin/su")).expect("there");
    assert_eq!(su.permissions().mode() & 0o7777, 0o4755);
    assert_eq!((su.nlink(), su.mtime()), (2, 1));
    assert_eq!(
        fs::read_link(scratch.path().join("sh"))
            .expect("a link")
            .to_str(),
        Some("/bin/su")
    );
    let pipe = fs::symlink_metadata(scratch.path().join("pipe")).expect("there");
    assert!(pipe.file_type().is_fifo());
    let bin = fs::metadata(scratch.path().join("bin")).expect("there");
    assert_eq!(
        bin.mtime(),
        1,
        "a directory's time is set after its content"
    );
}

#[test]
fn a_path_that_climbs_out_is_refused() {
    let archive = TarMaker::default().file("../../escaped", b"x").done();
    assert_eq!(
        refused(&archive),
        "the layer's path ../../escaped leads out of the image's root"
    );
}

#[test]
fn a_file_through_an_absolute_link_stays_inside() {
    let scratch = Scratch::new("layer");
    let archive = TarMaker::default()
        .add(b'5', "inside/", "", 0o755, b"")
        .add(b'2', "out", "/inside", 0o777, b"")
        .file("out/file", b"x")
        .done();
    unpack_into(&scratch, &archive).expect("resolved inside the root");
    assert!(scratch.path().join("inside/file").exists());
}

#[test]
fn a_file_through_a_link_that_leads_nowhere_is_refused() {
    let archive = TarMaker::default()
        .add(b'2', "out", "/var/tmp", 0o777, b"")
        .file("out/file", b"x")
        .done();
    assert!(refused(&archive).contains("out/file"));
}

#[test]
fn a_loop_of_links_is_refused() {
    let archive = TarMaker::default()
        .add(b'2', "a", "b", 0o777, b"")
        .add(b'2', "b", "a", 0o777, b"")
        .file("a/file", b"x")
        .done();
    assert!(refused(&archive).contains("loop of symbolic links"));
}

#[test]
fn a_hard_link_out_of_the_root_is_refused() {
    let archive = TarMaker::default()
        .add(b'1', "shadow", "../../etc/shadow", 0o644, b"")
        .done();
    assert!(refused(&archive).contains("leads out of the image's root"));
    let archive = TarMaker::default()
        .add(b'1', "shadow", "/etc/shadow", 0o644, b"")
        .done();
    assert!(refused(&archive).contains("is not in the layer"));
}

#[test]
fn a_device_node_is_refused_but_for_what_dev_hides() {
    let archive = TarMaker::default().add(b'3', "disk", "", 0o666, b"").done();
    assert!(refused(&archive).contains("device node at disk"));
    let scratch = Scratch::new("layer");
    let archive = TarMaker::default()
        .add(b'3', "dev/null", "", 0o666, b"")
        .done();
    unpack_into(&scratch, &archive).expect("hidden");
    assert!(!scratch.path().join("dev/null").exists());
}

#[test]
fn a_layer_cut_short_is_refused() {
    let archive = TarMaker::default().file("f", &[7; 4096]).done();
    let error = unpack_into(&Scratch::new("layer"), &archive[..2048]).expect_err("cut");
    assert!(
        matches!(error, LayerError::Tar(TarError::Truncated(_))),
        "{error:?}"
    );
}

#[test]
fn a_whiteout_becomes_a_character_device_0_0() {
    let scratch = Scratch::new("layer");
    let archive = TarMaker::default().file("etc/.wh.passwd", b"").done();
    unpack_into(&scratch, &archive).expect("a good layer");
    let whiteout = fs::symlink_metadata(scratch.path().join("etc/passwd")).expect("there");
    assert!(whiteout.file_type().is_char_device());
    assert_eq!(whiteout.rdev(), 0);
}

#[test]
fn a_whiteout_hides_nothing_that_its_own_layer_brings() {
    let scratch = Scratch::new("layer");
    let archive = TarMaker::default()
        .file("kept", b"x")
        .file(".wh.kept", b"")
        .file(".wh.made", b"")
        .file("made", b"y")
        .done();
    unpack_into(&scratch, &archive).expect("a good layer");
    assert_eq!(fs::read(scratch.path().join("kept")).expect("there"), b"x");
    assert_eq!(fs::read(scratch.path().join("made")).expect("there"), b"y");
}

#[test]
fn an_opaque_directory_is_marked_for_overlayfs() {
    let scratch = Scratch::new("layer");
    let archive = TarMaker::default()
        .add(b'5', "d/", "", 0o755, b"")
        .file("d/.wh..wh..opq", b"")
        .done();
    unpack_into(&scratch, &archive).expect("a good layer");
    let mut value = [0u8; 4];
    let path = scratch.path().join("d");
    let length =
        rustix::fs::getxattr(&path, "trusted.overlay.opaque", &mut value[..]).expect("set");
    assert_eq!(&value[..length], b"y");
}

#[test]
fn overlayfs_s_own_attributes_cannot_be_brought() {
    assert!(!is_for_images(b"trusted.overlay.redirect"));
    assert!(!is_for_images(b"user.overlay.opaque"));
    assert!(!is_for_images(b"security.selinux"));
    assert!(is_for_images(b"user.colour"));
    assert!(is_for_images(b"security.capability"));
}

#[test]
fn a_file_may_take_the_place_of_a_directory() {
    let scratch = Scratch::new("layer");
    let archive = TarMaker::default()
        .file("d/in", b"x")
        .file("d", b"now a file")
        .done();
    unpack_into(&scratch, &archive).expect("a good layer");
    assert_eq!(
        fs::read(scratch.path().join("d")).expect("there"),
        b"now a file"
    );
}
