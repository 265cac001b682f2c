//! Trees made for real: these need root and overlayfs; what lacks them fails by name.

use super::*;
use std::fs;
use std::path::PathBuf;

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("capsid-shim-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("writable");
        Scratch(path)
    }

    fn directory(&self, name: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::create_dir_all(&path).expect("writable");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).expect("ours");
    }
}

fn overlay(scratch: &Scratch) -> Root {
    let [low, up, work] = ["low", "up", "work"].map(|name| scratch.directory(name));
    fs::write(low.join("from-low"), "low").expect("writable");
    Root::Mounts(vec![Mount {
        kind: "overlay".into(),
        source: "overlay".into(),
        target: String::new(),
        options: vec![
            format!("lowerdir={}", low.display()),
            format!("upperdir={}", up.display()),
            format!("workdir={}", work.display()),
        ],
    }])
}

fn placement(id: &str, root: Root) -> Placement {
    Placement {
        id: id.into(),
        root,
        volumes: Vec::new(),
    }
}

fn inside(tree: &OwnedFd, path: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", tree.as_raw_fd())).join(path)
}

/// A copy of the tree where it can arrive what is mounted later: attached in a namespace of this thread, as in a VMM.
fn attached(copy: &OwnedFd) {
    enter_private_namespace().expect("root");
    attach(copy, CWD, Path::new("/")).expect("a detached tree");
}

fn mounts() -> usize {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("/proc");
    mounts.lines().count()
}

#[tokio::test]
async fn a_container_that_comes_later_is_seen_in_the_vmm_s_copy_until_it_leaves() {
    let scratch = Scratch::new("later");
    let tree = Tree::make().await.expect("root");
    let copy = tree.copy().await.expect("a tree");
    attached(&copy);
    let placed = tree.add(placement("c1", overlay(&scratch))).await;
    let placed = placed.expect("mounted");
    let file = inside(&copy, "c1/rootfs/from-low");
    assert_eq!(fs::read(&file).expect("there"), b"low");
    drop(placed);
    // The unmounting comes before the next answer.
    drop(tree.copy().await.expect("a tree"));
    assert!(!file.exists());
    assert!(!inside(&copy, "c1").exists());
}

#[tokio::test]
async fn no_mount_of_a_tree_is_the_host_s() {
    let scratch = Scratch::new("host");
    let before = mounts();
    let tree = Tree::make().await.expect("root");
    let mut placed = tree.add(placement("c1", overlay(&scratch))).await;
    let root = placed.as_mut().expect("mounted").take_root();
    assert_eq!(mounts(), before);
    let root = root.expect("once");
    assert_eq!(fs::read(inside(&root, "from-low")).expect("there"), b"low");
}

#[tokio::test]
async fn what_the_guest_gets_is_neither_program_nor_device_nor_link_to_the_host() {
    let scratch = Scratch::new("restricted");
    let tree = Tree::make().await.expect("root");
    let copy = tree.copy().await.expect("a tree");
    attached(&copy);
    let _placed = tree
        .add(placement("c1", overlay(&scratch)))
        .await
        .expect("mounted");
    let flags = rustix::fs::statvfs(inside(&copy, "c1/rootfs"))
        .expect("there")
        .f_flag;
    use rustix::fs::StatVfsMountFlags as Flags;
    assert!(
        flags.contains(Flags::NODEV | Flags::NOSUID | Flags::NOEXEC),
        "{flags:?}"
    );
    std::os::unix::fs::symlink("/etc", scratch.0.join("up/link")).expect("writable");
    assert!(fs::read_dir(inside(&copy, "c1/rootfs/link")).is_err());
}

#[tokio::test]
async fn a_read_only_volume_cannot_be_written_in_the_vmm_s_copy() {
    let scratch = Scratch::new("volumes");
    let data = scratch.directory("data");
    let volume = |read_only| Volume {
        source: data.clone(),
        read_only,
        recursive: true,
    };
    let tree = Tree::make().await.expect("root");
    let copy = tree.copy().await.expect("a tree");
    attached(&copy);
    let mut with_volumes = placement("c1", Root::Empty);
    with_volumes.volumes = vec![volume(true), volume(false)];
    let _placed = tree.add(with_volumes).await.expect("mounted");
    let error = fs::write(inside(&copy, "c1/volumes/0/x"), "x").expect_err("read-only");
    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    fs::write(inside(&copy, "c1/volumes/1/x"), "x").expect("writable");
    assert_eq!(fs::read(data.join("x")).expect("written through"), b"x");
}

#[tokio::test]
async fn a_source_that_cannot_be_shown_is_named_and_leaves_nothing() {
    let scratch = Scratch::new("refused");
    let socket = scratch.0.join("socket");
    let _socket = std::os::unix::net::UnixListener::bind(&socket).expect("writable");
    let tree = Tree::make().await.expect("root");
    for source in [socket, PathBuf::from("/no/such")] {
        let mut refused = placement("c1", overlay(&scratch));
        refused.volumes = vec![Volume {
            source: source.clone(),
            read_only: false,
            recursive: false,
        }];
        let error = tree.add(refused).await.expect_err("refused").to_string();
        assert!(error.contains(&source.display().to_string()), "{error}");
    }
    // The id is free and the layers are not in use.
    let _placed = tree
        .add(placement("c1", overlay(&scratch)))
        .await
        .expect("mounted");
}

#[tokio::test]
async fn a_thousand_containers_leave_nothing_in_the_tree() {
    let scratch = Scratch::new("thousand");
    let tree = Tree::make().await.expect("root");
    let copy = tree.copy().await.expect("a tree");
    attached(&copy);
    let before = mounts();
    for round in 0..1000 {
        let placed = tree
            .add(placement(&format!("c{round}"), overlay(&scratch)))
            .await;
        drop(placed.expect("mounted"));
    }
    drop(tree.copy().await.expect("a tree"));
    assert_eq!(mounts(), before);
    assert_eq!(
        fs::read_dir(inside(&copy, ""))
            .expect("a directory")
            .count(),
        0
    );
}

#[tokio::test]
async fn what_the_host_mounts_later_is_found_by_a_container_that_comes_later() {
    let scratch = Scratch::new("host-mounts");
    // Of another thread: a test's host. It is shared, as systemd makes it.
    let (data, from) = (scratch.directory("data"), scratch.directory("from"));
    std::thread::scope(|scope| {
        let host = scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("root");
            use rustix::mount::{MountPropagationFlags as Flags, mount_bind, mount_change};
            mount_change("/", Flags::PRIVATE | Flags::REC).expect("a namespace of its own");
            mount_bind(&scratch.0, &scratch.0).expect("a mount");
            mount_change(&scratch.0, Flags::SHARED).expect("a mount");
            let runtime = tokio::runtime::Builder::new_current_thread().build();
            runtime.expect("a loop").block_on(async {
                let tree = Tree::make().await.expect("root");
                let copy = tree.copy().await.expect("a tree");
                fs::write(from.join("later"), "x").expect("writable");
                mount_bind(&from, &data).expect("a mount");
                let mut with_volume = placement("c1", Root::Empty);
                with_volume.volumes = vec![Volume {
                    source: data.clone(),
                    read_only: false,
                    recursive: true,
                }];
                let _placed = tree.add(with_volume).await.expect("mounted");
                attached(&copy);
                let copy = tree.copy().await.expect("a tree");
                attached(&copy);
                assert!(inside(&copy, "c1/volumes/0/later").exists());
            });
        });
        host.join().expect("the host");
    });
}
