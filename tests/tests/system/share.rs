//! A pod's share, in which mounts of containers come and go while the guest runs: none is held by what the guest's kernel still knows.

use capsid_tests::bundle::{Scratch, unpack_busybox};
use capsid_tests::guest::{Guest, spec};
use capsid_tests::tree::{Backing, Gone, Tree};
use serde_json::{Value, json};
use std::path::PathBuf;

/// Containers, one after another.
const ROUNDS: usize = 100;
/// Rounds until everything that comes once is there.
const WARM_UP_ROUNDS: usize = 5;

/// A container of the share whose volume is at /data, with a line for its shell.
fn in_share(id: &str, line: &str) -> Value {
    let mut spec = spec();
    let below = format!("/run/capsid/share/{id}");
    spec["root"] = json!({"path": format!("{below}/rootfs"), "readonly": false});
    spec["process"]["args"] = json!(["sh", "-c", line]);
    let volume = json!({"destination": "/data", "type": "bind", "source": format!("{below}/volumes/0"), "options": ["rbind", "rw"]});
    spec["mounts"].as_array_mut().expect("mounts").push(volume);
    spec
}

/// Descriptors and mounts of all threads of a process: each thread of a share has its own.
fn held(pid: u32) -> (usize, usize) {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("a process");
    let of_task = tasks.map(|task| {
        let task = task.expect("a thread").path();
        let fds = std::fs::read_dir(task.join("fd")).expect("its descriptors");
        let mounts = std::fs::read_to_string(task.join("mountinfo")).expect("its mounts");
        (fds.count(), mounts.lines().count())
    });
    of_task.fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1))
}

/// What a container leaves on the host until it is gone.
struct Left {
    rootfs: Gone,
    backing: Gone,
}

/// Mounts a container's root and volume in the share.
fn mount(tree: &Tree, id: &str, lower: PathBuf, at: PathBuf) -> Left {
    let id = id.to_owned();
    tree.with(move |mounts| {
        let backing = Backing::at(at.clone());
        std::fs::write(backing.file("in"), &id).expect("written");
        mounts.directory(&id);
        mounts.directory(&format!("{id}/volumes"));
        mounts.put(&backing.overlay(&lower), &format!("{id}/rootfs"));
        mounts.put(&backing.volume(), &format!("{id}/volumes/0"));
        Left {
            rootfs: Gone::watch(&mounts.path(&format!("{id}/rootfs"))),
            backing: Gone::watch(&at),
        }
    })
}

/// Takes them away again; what the container wrote into its volume.
fn unmount(tree: &Tree, id: &str, at: PathBuf) -> String {
    let id = id.to_owned();
    tree.with(move |mounts| {
        let written = std::fs::read_to_string(at.join("volume/out")).expect("written");
        mounts.take(&format!("{id}/rootfs"));
        mounts.take(&format!("{id}/volumes/0"));
        for directory in [format!("{id}/volumes"), id] {
            std::fs::remove_dir(mounts.path(&directory)).expect("empty");
        }
        Backing::of(at).unmount().expect("not in use");
        written
    })
}

#[test]
fn mounts_of_deleted_containers_are_held_by_nobody() {
    let scratch = Scratch::new("share");
    let (lower, at) = (
        PathBuf::from(scratch.join("lower")),
        PathBuf::from(scratch.join("backing")),
    );
    unpack_busybox(&lower);
    std::fs::create_dir(&at).expect("a directory");
    let tree = Tree::new();
    let mut guest = Guest::with_share(&tree.clone_for_vmm());
    let mut warm = None;
    for round in 0..ROUNDS {
        // Every other one has an id that was there before.
        let id = format!("c{}", round / 2 * (round % 2));
        let left = mount(&tree, &id, lower.clone(), at.clone());
        let line = "cat /data/in; ls -lR /bin /etc >/new 2>/dev/null; cat /new >/data/out; exit 7";
        let ran = guest.run(&id, &in_share(&id, line));
        assert_eq!(ran, (7, id.clone()), "round {round}");
        let listed = unmount(&tree, &id, at.clone());
        assert!(listed.contains("busybox"), "{listed}");
        assert!(left.rootfs.wait(), "round {round}: its root is held");
        assert!(left.backing.wait(), "round {round}: its volume is held");
        if round + 1 == WARM_UP_ROUNDS {
            warm = Some(held(guest.vmm()));
        }
    }
    assert_eq!(Some(held(guest.vmm())), warm);
}

#[test]
fn a_container_that_could_not_be_created_holds_no_mounts() {
    let scratch = Scratch::new("share");
    let (lower, at) = (
        PathBuf::from(scratch.join("lower")),
        PathBuf::from(scratch.join("backing")),
    );
    unpack_busybox(&lower);
    std::fs::create_dir(&at).expect("a directory");
    let tree = Tree::new();
    let guest = Guest::with_share(&tree.clone_for_vmm());
    let left = mount(&tree, "c1", lower, at.clone());
    let mut spec = in_share("c1", "true");
    spec["process"]["args"] = json!(["no-such-program"]);
    assert!(guest.create("c1", &spec, 0).is_err());
    tree.with(move |mounts| {
        mounts.take("c1/rootfs");
        mounts.take("c1/volumes/0");
        Backing::of(at).unmount().expect("not in use");
    });
    assert!(left.rootfs.wait(), "its root is held");
    assert!(left.backing.wait(), "its volume is held");
}
