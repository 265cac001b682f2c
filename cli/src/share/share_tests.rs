//! Trees made for real: these need root and a kernel with overlayfs; what lacks them fails by name.

use super::*;
use crate::testing::Scratch;
use std::fs;
use std::path::Path;

fn plan(root: Root, volumes: Vec<Volume>) -> Plan {
    Plan {
        id: "c1".into(),
        root,
        volumes,
        files: vec![("hostname", "c1\n".into())],
        host_memory_bytes: 1 << 30,
    }
}

/// A path inside a detached tree.
fn inside(share: &Share, path: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", share.tree.as_raw_fd())).join(path)
}

fn layers(scratch: &Scratch) -> Vec<PathBuf> {
    let (low, high) = (scratch.path().join("low"), scratch.path().join("high"));
    fs::create_dir(&low).expect("writable");
    fs::create_dir(&high).expect("writable");
    fs::write(low.join("from-low"), "low").expect("writable");
    fs::write(low.join("both"), "low").expect("writable");
    fs::write(high.join("both"), "high").expect("writable");
    vec![low, high]
}

fn volume(source: &Path, read_only: bool) -> Volume {
    Volume {
        source: source.to_owned(),
        destination: "/data".into(),
        read_only,
    }
}

#[test]
fn layers_are_stacked_and_writes_stay_off_them() {
    let scratch = Scratch::new("share");
    let layers = layers(&scratch);
    let share = make(&plan(Root::Layers(layers.clone()), vec![])).expect("mounted");
    let root = inside(&share, "c1/rootfs");
    assert_eq!(fs::read(root.join("both")).expect("there"), b"high");
    assert_eq!(fs::read(root.join("from-low")).expect("there"), b"low");
    fs::write(root.join("from-low"), "written").expect("writable");
    assert_eq!(fs::read(layers[0].join("from-low")).expect("there"), b"low");
    assert_eq!(
        fs::read(inside(&share, "c1/etc/hostname")).expect("there"),
        b"c1\n"
    );
}

#[test]
fn no_mount_of_a_share_is_the_host_s() {
    let scratch = Scratch::new("share");
    let mounts = || {
        fs::read_to_string("/proc/self/mountinfo")
            .expect("/proc")
            .lines()
            .count()
    };
    let before = mounts();
    let share = make(&plan(Root::Layers(layers(&scratch)), vec![])).expect("mounted");
    assert_eq!(mounts(), before);
    drop(share);
    assert_eq!(mounts(), before);
}

#[test]
fn a_read_only_volume_cannot_be_written_by_the_host_s_kernel() {
    let scratch = Scratch::new("share");
    let data = scratch.path().join("data");
    fs::create_dir(&data).expect("writable");
    let root = Root::Layers(layers(&scratch));
    let volumes = vec![volume(&data, true), volume(&data, false)];
    let share = make(&plan(root, volumes)).expect("mounted");
    let error = fs::write(inside(&share, "c1/volumes/0/x"), "x").expect_err("read-only");
    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    fs::write(inside(&share, "c1/volumes/1/x"), "x").expect("writable");
    assert_eq!(fs::read(data.join("x")).expect("written through"), b"x");
}

#[test]
fn a_file_is_a_volume_too() {
    let scratch = Scratch::new("share");
    let file = scratch.path().join("one");
    fs::write(&file, "one").expect("writable");
    let share = make(&plan(
        Root::Layers(layers(&scratch)),
        vec![volume(&file, false)],
    ))
    .expect("mounted");
    assert_eq!(
        fs::read(inside(&share, "c1/volumes/0")).expect("there"),
        b"one"
    );
}

#[test]
fn a_volume_that_is_not_there_is_named() {
    let scratch = Scratch::new("share");
    let volumes = vec![volume(Path::new("/no/such"), false)];
    let error = make(&plan(Root::Layers(layers(&scratch)), volumes)).expect_err("not there");
    assert!(error.to_string().contains("/no/such"), "{error}");
}

#[test]
fn a_socket_is_no_volume() {
    let scratch = Scratch::new("share");
    let path = scratch.path().join("socket");
    let _socket = std::os::unix::net::UnixListener::bind(&path).expect("writable");
    let error = make(&plan(
        Root::Layers(layers(&scratch)),
        vec![volume(&path, false)],
    ));
    assert!(matches!(error, Err(ShareError::VolumeKind(_))));
}

#[test]
fn a_rootfs_directory_is_used_in_place_unless_it_is_read_only() {
    let scratch = Scratch::new("share");
    let path = scratch.path().join("root");
    fs::create_dir(&path).expect("writable");
    let in_place = Root::Directory {
        path: path.clone(),
        read_only: false,
    };
    let share = make(&plan(in_place, vec![])).expect("mounted");
    fs::write(inside(&share, "c1/rootfs/written"), "x").expect("writable");
    assert!(path.join("written").exists());
    let read_only = Root::Directory {
        path: path.clone(),
        read_only: true,
    };
    let share = make(&plan(read_only, vec![])).expect("mounted");
    assert!(inside(&share, "c1/rootfs/written").exists());
    fs::write(inside(&share, "c1/rootfs/other"), "x").expect("into the overlay");
    assert!(!path.join("other").exists());
}

#[test]
fn a_device_of_the_tree_cannot_be_opened_on_the_host() {
    let scratch = Scratch::new("share");
    let root = Root::Layers(layers(&scratch));
    let share = make(&plan(root, vec![volume(Path::new("/dev"), false)])).expect("mounted");
    let error = fs::File::open(inside(&share, "c1/volumes/0/null")).expect_err("nodev");
    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
}

#[test]
fn a_rootfs_that_is_not_there_or_no_directory_is_named() {
    for path in ["/no/such/root", "/etc/passwd"] {
        for read_only in [false, true] {
            let root = Root::Directory {
                path: path.into(),
                read_only,
            };
            let error = make(&plan(root, vec![])).expect_err("no directory");
            assert!(matches!(error, ShareError::Root { .. }), "{error:?}");
            assert!(error.to_string().contains(path), "{error}");
        }
    }
}
