//! What the threads gave up, read back from outside; and what the host's mounts protect.

use super::super::abi::fattr;
use super::*;
use rustix::mount::{
    MountFlags, MountPropagationFlags, mount, mount_bind, mount_change, mount_remount,
};
use rustix::thread::UnshareFlags;

/// A tree with `rw` and, read-only, `ro` in it, made where no host mount is left behind.
fn tree_with_read_only(dir: &Dir) -> OwnedFd {
    std::fs::create_dir_all(dir.path("root/ro")).unwrap();
    std::fs::create_dir_all(dir.path("volume/dir")).unwrap();
    dir.write("volume/file", b"protected");
    let (root, volume) = (dir.path("root"), dir.path("volume"));
    std::thread::spawn(move || {
        unshare(UnshareFlags::FS | UnshareFlags::NEWNS).unwrap();
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).unwrap();
        mount_bind(&volume, root.join("ro")).unwrap();
        let flags = MountFlags::BIND | MountFlags::RDONLY;
        mount_remount(root.join("ro"), flags, "").unwrap();
        tree_of(&root)
    })
    .join()
    .unwrap()
}

#[test]
fn a_read_only_volume_is_read_only_whatever_the_guest_asks() {
    needs_root!();
    let dir = Dir::new();
    let mut guest = Guest::new(setup(tree_with_read_only(&dir)));
    guest.init();
    let ro = guest.lookup(1, "ro").unwrap();
    assert_eq!(ro.flags & abi::ATTR_SUBMOUNT, abi::ATTR_SUBMOUNT);
    let file = guest.lookup(ro.node, "file").unwrap();
    let erofs = Err(libc::EROFS);
    assert_eq!(guest.open(file.node, libc::O_RDWR), erofs);
    assert_eq!(guest.open(file.node, libc::O_RDONLY | libc::O_TRUNC), erofs);
    let fh = guest.open(file.node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(file.node, fh, 0, 100).unwrap(), b"protected");
    assert_eq!(guest.write(file.node, fh, 0, b"x"), Err(libc::EBADF));
    assert_eq!(
        guest.create(ro.node, "new", 0o600).map(|_| 0),
        erofs.map(|_: u64| 0)
    );
    assert_eq!(guest.mkdir(ro.node, "new", 0o700).unwrap_err(), libc::EROFS);
    let fifo = guest.mknod(ro.node, "new", libc::S_IFIFO, 0);
    assert_eq!(fifo.unwrap_err(), libc::EROFS);
    let mut args = name("new");
    args.extend(name("target"));
    let plain = |result: Result<Vec<u8>, i32>| result.unwrap_err();
    assert_eq!(
        plain(guest.ask(opcode::SYMLINK, ro.node, &args, 128)),
        libc::EROFS
    );
    assert_eq!(
        plain(guest.ask(opcode::UNLINK, ro.node, &name("file"), 0)),
        libc::EROFS
    );
    assert_eq!(
        plain(guest.ask(opcode::RMDIR, ro.node, &name("dir"), 0)),
        libc::EROFS
    );
    let renamed = guest.rename((ro.node, "file"), (ro.node, "other"), 0);
    assert_eq!(renamed.unwrap_err(), libc::EROFS);
    let moved = guest.rename((ro.node, "file"), (1, "other"), 0);
    assert_eq!(moved.unwrap_err(), libc::EXDEV);
    let mut args = file.node.to_le_bytes().to_vec();
    args.extend(name("hard"));
    assert_eq!(
        plain(guest.ask(opcode::LINK, ro.node, &args, 128)),
        libc::EROFS
    );
    for valid in [fattr::MODE, fattr::UID, fattr::SIZE, fattr::MTIME] {
        let args = setattr_args(valid, 0, 0, 0o777, (5, 5));
        assert_eq!(
            plain(guest.ask(opcode::SETATTR, file.node, &args, 104)),
            libc::EROFS
        );
        let args = setattr_args(valid | fattr::FH, fh, 0, 0o777, (5, 5));
        assert_eq!(
            plain(guest.ask(opcode::SETATTR, file.node, &args, 104)),
            libc::EROFS
        );
    }
    let mut args = vec![1, 0, 0, 0, 0, 0, 0, 0];
    args.extend(name("user.x"));
    args.push(1);
    assert_eq!(
        plain(guest.ask(opcode::SETXATTR, file.node, &args, 0)),
        libc::EROFS
    );
    let args = name("user.x");
    assert_eq!(
        plain(guest.ask(opcode::REMOVEXATTR, file.node, &args, 0)),
        libc::EROFS
    );
    let mut args = Vec::new();
    args.put_u64(fh);
    args.put_u64(0);
    args.put_u64(4096);
    args.put_u64(0);
    assert_eq!(
        plain(guest.ask(opcode::FALLOCATE, file.node, &args, 0)),
        libc::EBADF
    );
    assert_eq!(dir.read("volume/file"), b"protected");
    // The rest of the share is writable.
    assert!(guest.create(1, "new", 0o600).is_ok());
}

/// What `file` below `/proc/self/task/<tid>` says of each sealed thread.
pub(super) fn of_each_thread(file: &str) -> Vec<String> {
    let mut found = Vec::new();
    for task in std::fs::read_dir("/proc/self/task").unwrap() {
        let task = task.unwrap().path();
        // A thread of another test may have ended meanwhile.
        let (Ok(status), Ok(content)) = (
            std::fs::read_to_string(task.join("status")),
            std::fs::read_to_string(task.join(file)),
        ) else {
            continue;
        };
        if status.starts_with("Name:\tfs") && status.contains("\nSeccomp:\t2\n") {
            found.push(content);
        }
    }
    found
}

fn field(status: &str, name: &str) -> String {
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line[name.len()..].trim().to_owned()
}

#[test]
fn the_threads_keep_nothing_but_what_they_need() {
    needs_root!();
    let dir = Dir::new();
    let guest = Guest::mounted(&dir);
    let kept = format!("{:016x}", KEPT_CAPABILITIES.bits());
    let id = format!("{JAIL_ID}\t{JAIL_ID}\t{JAIL_ID}\t0");
    let statuses = of_each_thread("status");
    assert!(statuses.len() >= SHARE_THREADS);
    for (name, expected) in [
        ("CapEff:", kept.as_str()),
        ("CapPrm:", kept.as_str()),
        ("CapInh:", "0000000000000000"),
        ("CapBnd:", "0000000000000000"),
        ("CapAmb:", "0000000000000000"),
        ("NoNewPrivs:", "1"),
        ("Uid:", id.as_str()),
        ("Gid:", id.as_str()),
        ("Groups:", ""),
    ] {
        for status in &statuses {
            let mut value = field(status, name);
            if name.ends_with("id:") {
                // The last one, the file id, moves while a parallel test makes a file for a user.
                let real: Vec<&str> = value.split('\t').take(3).chain(["0"]).collect();
                value = real.join("\t");
            }
            // CAP_FSETID comes and goes while a parallel test writes to a setuid file.
            if name != "CapEff:" {
                assert_eq!(value, expected, "{name}");
            }
        }
    }
    drop(guest);
}

#[test]
fn the_threads_see_no_mount_but_the_share() {
    needs_root!();
    let dir = Dir::new();
    let guest = Guest::mounted(&dir);
    let all = of_each_thread("mountinfo");
    assert!(all.len() >= SHARE_THREADS);
    for mounts in all {
        for mount in mounts.lines() {
            let options = mount.split(' ').nth(5).unwrap();
            for option in ["nosuid", "nodev", "noexec", "nosymfollow"] {
                assert!(options.split(',').any(|has| has == option), "{mount}");
            }
        }
    }
    drop(guest);
}

#[test]
fn the_rest_of_the_process_changes_in_nothing() {
    needs_root!();
    let before = std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let cwd = std::env::current_dir().unwrap();
    let dir = Dir::new();
    let guest = Guest::mounted(&dir);
    drop(guest);
    assert_eq!(
        std::fs::read_to_string("/proc/thread-self/mountinfo").unwrap(),
        before
    );
    assert_eq!(std::env::current_dir().unwrap(), cwd);
    assert!(rustix::process::geteuid().is_root());
}

#[test]
fn a_share_that_cannot_be_is_refused_with_a_reason() {
    needs_root!();
    let dir = Dir::new();
    dir.write("file", b"");
    let refused = |change: fn(&mut ShareSetup<'_>), path: &Path| {
        let mut setup = setup(tree_of(path));
        change(&mut setup);
        match spawn_share_threads(setup) {
            Err(error) => match std::error::Error::source(&error) {
                Some(cause) => format!("{error}: {cause}"),
                None => error.to_string(),
            },
            Ok(_) => panic!("accepted"),
        }
    };
    let text = refused(|setup| setup.tag = "x".repeat(37), &dir.0);
    assert!(text.contains("longer than 36 bytes"), "{text}");
    let text = refused(|setup| setup.gid = 0, &dir.0);
    assert!(text.contains("must not run as user or group 0"), "{text}");
    let text = refused(|setup| setup.fd_budget = 10, &dir.0);
    assert!(text.contains("a budget of 10 descriptors"), "{text}");
    let text = refused(|_| {}, &dir.path("file"));
    assert!(text.contains("use the share's tree as a root"), "{text}");
    let text = refused(
        |setup| setup.seal = Arc::new(|| Err(std::io::ErrorKind::PermissionDenied.into())),
        &dir.0,
    );
    assert!(text.contains("seal a file-system thread"), "{text}");
}

/// What containerd's snapshotter gives: an overlay, whose files move from the lower to the upper layer when
/// they are first written.
fn overlay_tree(dir: &Dir) -> OwnedFd {
    for sub in ["lower/sub", "upper", "work", "merged"] {
        std::fs::create_dir_all(dir.path(sub)).unwrap();
    }
    dir.write("lower/file", b"from the image");
    dir.write("lower/sub/other", b"x");
    dir.write("lower/removed", b"x");
    let base = dir.0.clone();
    std::thread::spawn(move || {
        unshare(UnshareFlags::FS | UnshareFlags::NEWNS).unwrap();
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).unwrap();
        let options = format!(
            "lowerdir={0}/lower,upperdir={0}/upper,workdir={0}/work",
            base.display()
        );
        let options = std::ffi::CString::new(options).unwrap();
        let merged = base.join("merged");
        mount(
            "overlay",
            &merged,
            "overlay",
            MountFlags::empty(),
            &*options,
        )
        .unwrap();
        tree_of(&merged)
    })
    .join()
    .unwrap()
}

#[test]
fn a_file_of_an_overlay_stays_the_same_node_when_it_is_copied_up() {
    needs_root!();
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap();
    if !filesystems.contains("\toverlay") {
        eprintln!("SKIPPED: {}: this kernel has no overlayfs", module_path!());
        return;
    }
    let dir = Dir::new();
    let mut guest = Guest::new(setup(overlay_tree(&dir)));
    guest.init();
    let file = guest.lookup(1, "file").unwrap();
    let other = guest.walk("sub/other").unwrap();
    let before = guest.open(file.node, libc::O_RDONLY).unwrap();
    let fh = guest.open(file.node, libc::O_RDWR).unwrap();
    guest.write(file.node, fh, 0, b"FROM").unwrap();
    assert_eq!(dir.read("upper/file"), b"FROM the image");
    assert_eq!(dir.read("lower/file"), b"from the image");
    assert_eq!(guest.getattr(file.node).unwrap().ino, file.ino);
    assert_eq!(guest.lookup(1, "file").unwrap().node, file.node);
    assert_eq!(guest.read(file.node, fh, 0, 4).unwrap(), b"FROM");
    guest.release(opcode::RELEASE, file.node, before).unwrap();
    let args = setattr_args(fattr::MODE, 0, 0, 0o600, (0, 0));
    guest.ask(opcode::SETATTR, other.node, &args, 104).unwrap();
    assert_eq!(
        guest.getattr(other.node).unwrap().mode,
        libc::S_IFREG | 0o600
    );
    assert_eq!(guest.walk("sub/other").unwrap().node, other.node);
    // A removal leaves a whiteout in the upper layer, for which the host's kernel needs no privilege of ours.
    let removed = guest.lookup(1, "removed").unwrap();
    assert_eq!(
        guest.ask(opcode::UNLINK, 1, &name("removed"), 0),
        Ok(vec![])
    );
    assert_eq!(guest.lookup(1, "removed").unwrap_err(), libc::ENOENT);
    assert_eq!(guest.getattr(removed.node).unwrap().ino, removed.ino);
    guest.rename((1, "sub"), (1, "moved"), 0).map_or_else(
        // Without redirect_dir overlayfs refuses to rename a directory of the lower layer, and says so.
        |errno| assert_eq!(errno, libc::EXDEV),
        |()| assert_eq!(guest.getattr(other.node).unwrap().ino, other.ino),
    );
    let listed = guest.list(1, true, 4096).unwrap();
    assert_eq!(listed.len(), 2 + 2, "{listed:?}");
}
