//! Mounts that come and go while the share is served: by propagation, since nobody can mount anything in the threads' namespace.

use super::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsmount, fsopen, mount_change, move_mount, unmount,
};
use rustix::thread::UnshareFlags;

/// What the owner gives to every mount that comes later.
const ATTRIBUTES: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC)
    .union(MountAttrFlags::MOUNT_ATTR_NOSYMFOLLOW);
/// No wait of these tests takes longer, but for a hang, in seconds.
const PATIENCE_S: i64 = 60;

/// Runs `body` on a thread that has `tree` of `dir` as a shared mount of its own namespace, which ends with it.
fn with_shared_tree(body: impl FnOnce(&Path, Guest) + Send + 'static) {
    let dir = Dir::new();
    let tree = dir.path("tree");
    std::fs::create_dir(&tree).unwrap();
    std::thread::spawn(move || {
        unshare(UnshareFlags::FS | UnshareFlags::NEWNS).unwrap();
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).unwrap();
        put(&tree, MountAttrFlags::empty());
        mount_change(&tree, MountPropagationFlags::SHARED).unwrap();
        let mut guest = Guest::new(setup(tree_of(&tree)));
        guest.init();
        body(&tree, guest);
    })
    .join()
    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

/// Mounts a file system of its own at `place`.
fn put(place: &Path, attributes: MountAttrFlags) {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    fsconfig_create(&context).unwrap();
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).unwrap();
    let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&mount, "", CWD, place, empty).unwrap();
}

/// Tells when the file system that has `path` is gone: nothing holds it any more.
struct Gone(OwnedFd);

impl Gone {
    fn watch(path: &Path) -> Gone {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let watch = inotify::init(flags).unwrap();
        inotify::add_watch(&watch, path, inotify::WatchFlags::DELETE_SELF).unwrap();
        Gone(watch)
    }

    fn is_there(&self, patience_s: i64) -> bool {
        let limit = Timespec {
            tv_sec: patience_s,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        poll(&mut fds, Some(&limit)).unwrap() == 1
    }
}

/// How long the guest may believe the name that a LOOKUP has found.
fn name_valid_seconds(guest: &mut Guest, parent: u64, file: &str) -> u64 {
    let reply = guest.ask(opcode::LOOKUP, parent, &name(file), 128).unwrap();
    let node = u64_at(&reply, 0);
    guest.forget(node, 1);
    u64_at(&reply, 16)
}

#[test]
fn a_mount_that_comes_later_is_served_and_goes_when_the_guest_forgets_it() {
    needs_root!();
    with_shared_tree(|tree, mut guest| {
        let place = tree.join("rootfs");
        std::fs::create_dir(&place).unwrap();
        // More rounds than the descriptors that the share may keep.
        for round in 0..FD_BUDGET_MIN {
            put(&place, ATTRIBUTES);
            std::fs::write(place.join("file"), round.to_string()).unwrap();
            let gone = Gone::watch(&place);
            let rootfs = guest.lookup(1, "rootfs").unwrap();
            assert_eq!(rootfs.flags & abi::ATTR_SUBMOUNT, abi::ATTR_SUBMOUNT);
            let file = guest.lookup(rootfs.node, "file").unwrap();
            let fh = guest.open(file.node, libc::O_RDONLY).unwrap();
            let read = guest.read(file.node, fh, 0, 100).unwrap();
            assert_eq!(read, round.to_string().as_bytes());
            guest.release(opcode::RELEASE, file.node, fh).unwrap();
            let busy = unmount(&place, UnmountFlags::empty());
            assert_eq!(busy, Err(rustix::io::Errno::BUSY));
            unmount(&place, UnmountFlags::DETACH).unwrap();
            assert!(!gone.is_there(0), "the guest has it still");
            guest.forget(file.node, 1);
            guest.forget(rootfs.node, 1);
            assert!(gone.is_there(PATIENCE_S), "round {round}: it is held");
            let bare = guest.lookup(1, "rootfs").unwrap();
            assert_eq!(bare.flags & abi::ATTR_SUBMOUNT, 0);
            guest.forget(bare.node, 1);
        }
        let session = guest.pool.facts().session().unwrap();
        assert_eq!(session.table().len(), 1);
    });
}

#[test]
fn a_mount_that_is_forgotten_first_is_unmounted_without_force() {
    needs_root!();
    with_shared_tree(|tree, mut guest| {
        let place = tree.join("rootfs");
        std::fs::create_dir(&place).unwrap();
        put(&place, ATTRIBUTES);
        let gone = Gone::watch(&place);
        let rootfs = guest.lookup(1, "rootfs").unwrap();
        guest.getattr(rootfs.node).unwrap();
        guest.forget(rootfs.node, 1);
        unmount(&place, UnmountFlags::empty()).unwrap();
        assert!(gone.is_there(PATIENCE_S));
    });
}

#[test]
fn names_of_the_tree_itself_are_not_kept() {
    needs_root!();
    with_shared_tree(|tree, mut guest| {
        std::fs::create_dir_all(tree.join("c1/rootfs")).unwrap();
        put(&tree.join("c1/rootfs"), ATTRIBUTES);
        std::fs::create_dir(tree.join("c1/rootfs/etc")).unwrap();
        assert_eq!(name_valid_seconds(&mut guest, 1, "c1"), 0);
        let c1 = guest.lookup(1, "c1").unwrap();
        assert_eq!(name_valid_seconds(&mut guest, c1.node, "rootfs"), 0);
        let rootfs = guest.lookup(c1.node, "rootfs").unwrap();
        assert_eq!(name_valid_seconds(&mut guest, rootfs.node, "etc"), 1);
    });
}

#[test]
fn a_mount_without_the_attributes_of_a_share_is_refused() {
    needs_root!();
    with_shared_tree(|tree, mut guest| {
        for lacking in ATTRIBUTES.iter() {
            let place = tree.join("rootfs");
            std::fs::create_dir_all(&place).unwrap();
            put(&place, ATTRIBUTES - lacking);
            assert_eq!(guest.lookup(1, "rootfs"), Err(libc::EACCES), "{lacking:?}");
            unmount(&place, UnmountFlags::DETACH).unwrap();
        }
    });
}

#[test]
fn nothing_that_the_threads_see_goes_back_to_the_owner() {
    needs_root!();
    with_shared_tree(|tree, mut guest| {
        std::fs::create_dir(tree.join("rootfs")).unwrap();
        guest.lookup(1, "rootfs").unwrap();
        let ours = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
        let tree = tree.to_str().unwrap();
        let line = ours.lines().find(|line| line.contains(tree)).unwrap();
        let group = line.split("shared:").nth(1).unwrap();
        let group = group.split(' ').next().unwrap();
        let theirs: Vec<String> = super::privileges::of_each_thread("mountinfo");
        let roots: Vec<_> = theirs
            .iter()
            .filter(|all| all.contains(&format!("master:{group} ")))
            .collect();
        assert!(!roots.is_empty(), "{theirs:?}");
        assert!(
            theirs.iter().all(|all| !all.contains("shared:")),
            "{theirs:?}"
        );
    });
}
