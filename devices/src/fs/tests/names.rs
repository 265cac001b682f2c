//! Names: made, found, moved, removed, and changed by the host meanwhile.

use super::*;
use std::os::unix::fs::MetadataExt;

#[test]
fn links_and_directories_are_made_and_found() {
    needs_root!();
    let dir = Dir::new();
    let mut guest = Guest::mounted(&dir);
    let sub = guest.mkdir(1, "sub", 0o1775).unwrap();
    assert_eq!(sub.mode, libc::S_IFDIR | 0o1775);
    let mut args = name("link");
    args.extend(name("/etc/shadow"));
    let link = guest.ask(opcode::SYMLINK, sub.node, &args, 128).unwrap();
    let link = entry(&link);
    assert_eq!(link.mode & libc::S_IFMT, libc::S_IFLNK);
    let target = guest.ask(opcode::READLINK, link.node, &[], 4096).unwrap();
    assert_eq!(target, b"/etc/shadow");
    let (file, _) = guest.create(sub.node, "file", 0o600).unwrap();
    let mut args = file.node.to_le_bytes().to_vec();
    args.extend(name("again"));
    let again = guest.ask(opcode::LINK, 1, &args, 128).unwrap();
    assert_eq!(entry(&again).node, file.node, "one file, one node");
    assert_eq!(dir.path("again").metadata().unwrap().nlink(), 2);
    assert_eq!(guest.walk("sub/file").unwrap().node, file.node);
    assert_eq!(guest.walk("sub/none").unwrap_err(), libc::ENOENT);
}

#[test]
fn a_new_file_belongs_to_who_made_it() {
    needs_root!();
    let dir = Dir::new();
    let mut guest = Guest::mounted(&dir);
    (guest.uid, guest.gid) = (1000, 2000);
    guest.create(1, "file", 0o600).unwrap();
    guest.mkdir(1, "dir", 0o700).unwrap();
    guest.mknod(1, "fifo", libc::S_IFIFO | 0o600, 0).unwrap();
    let mut args = name("link");
    args.extend(name("file"));
    guest.ask(opcode::SYMLINK, 1, &args, 128).unwrap();
    (guest.uid, guest.gid) = (0, 0);
    guest.create(1, "root", 0o600).unwrap();
    for made in ["file", "dir", "fifo", "link"] {
        let st = dir.path(made).symlink_metadata().unwrap();
        assert_eq!((st.uid(), st.gid()), (1000, 2000), "{made}");
    }
    let st = dir.path("root").metadata().unwrap();
    assert_eq!((st.uid(), st.gid()), (0, 0));
    guest.uid = u32::MAX;
    assert_eq!(guest.create(1, "nobody", 0o600).unwrap_err(), libc::EINVAL);
    assert!(!dir.path("nobody").exists());
}

#[test]
fn a_user_makes_files_where_only_its_groups_may() {
    needs_root!();
    // Which groups a process has only the guest's kernel knows, and it has checked them.
    let dir = Dir::new();
    let mut guest = Guest::mounted(&dir);
    guest.mkdir(1, "roots", 0o700).unwrap();
    (guest.uid, guest.gid) = (1000, 1000);
    let node = guest.lookup(1, "roots").unwrap().node;
    assert!(guest.create(node, "file", 0o644).is_ok());
}

#[test]
fn renames_move_replace_and_exchange() {
    needs_root!();
    let dir = Dir::new();
    for file in ["a", "b", "c"] {
        dir.write(file, file.as_bytes());
    }
    let mut guest = Guest::mounted(&dir);
    let a = guest.lookup(1, "a").unwrap();
    let b = guest.lookup(1, "b").unwrap();
    let sub = guest.mkdir(1, "sub", 0o755).unwrap();
    guest.rename((1, "a"), (sub.node, "moved"), 0).unwrap();
    assert_eq!(guest.getattr(a.node).unwrap().ino, a.ino);
    guest.rename((1, "b"), (sub.node, "moved"), 1).unwrap_err();
    guest.rename((1, "b"), (sub.node, "moved"), 0).unwrap();
    assert_eq!(dir.read("sub/moved"), b"b");
    // The one replaced is still there for who has it open.
    assert_eq!(guest.getattr(a.node).unwrap().ino, a.ino);
    assert_eq!(guest.getattr(b.node).unwrap().ino, b.ino);
    guest.rename((1, "c"), (sub.node, "moved"), 2).unwrap();
    assert_eq!(
        (dir.read("c"), dir.read("sub/moved")),
        (b"b".to_vec(), b"c".to_vec())
    );
    assert_eq!(guest.getattr(b.node).unwrap().ino, b.ino);
    assert_eq!(guest.rename((1, "c"), (1, "d"), 8), Err(libc::EINVAL));
    // A directory into itself.
    let moved = guest.rename((1, "sub"), (sub.node, "sub"), 0);
    assert_eq!(moved, Err(libc::EINVAL));
    assert_eq!(guest.walk("sub/moved").unwrap().size, 1);
}

#[test]
fn a_removed_file_is_served_as_long_as_the_guest_knows_it() {
    needs_root!();
    let dir = Dir::new();
    dir.write("file", b"still here");
    let mut guest = Guest::mounted(&dir);
    let file = guest.lookup(1, "file").unwrap();
    assert_eq!(
        guest.ask(opcode::RMDIR, 1, &name("file"), 0),
        Err(libc::ENOTDIR)
    );
    let fh = guest.open(file.node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.ask(opcode::UNLINK, 1, &name("file"), 0), Ok(vec![]));
    assert!(!dir.path("file").exists());
    assert_eq!(guest.getattr(file.node).unwrap().size, 10);
    assert_eq!(guest.read(file.node, fh, 0, 100).unwrap(), b"still here");
    guest.release(opcode::RELEASE, file.node, fh).unwrap();
    guest.forget(file.node, 1);
    assert_eq!(guest.getattr(file.node).unwrap_err(), libc::ESTALE);
    guest.mkdir(1, "empty", 0o700).unwrap();
    assert_eq!(guest.ask(opcode::RMDIR, 1, &name("empty"), 0), Ok(vec![]));
}

#[test]
fn a_file_that_the_host_replaced_is_stale_and_found_again() {
    needs_root!();
    let dir = Dir::new();
    dir.write("file", b"old");
    let mut guest = Guest::mounted(&dir);
    let old = guest.lookup(1, "file").unwrap();
    dir.write("new", b"newer");
    std::fs::rename(dir.path("new"), dir.path("file")).unwrap();
    assert_eq!(guest.getattr(old.node).unwrap_err(), libc::ESTALE);
    assert_eq!(guest.open(old.node, libc::O_RDONLY), Err(libc::ESTALE));
    let new = guest.lookup(1, "file").unwrap();
    assert_ne!(new.node, old.node);
    assert_eq!(new.size, 5);
    std::fs::remove_file(dir.path("file")).unwrap();
    assert_eq!(guest.getattr(new.node).unwrap_err(), libc::ESTALE);
}

#[test]
fn nodes_follow_a_directory_that_moves() {
    needs_root!();
    let dir = Dir::new();
    std::fs::create_dir_all(dir.path("a/b/c")).unwrap();
    dir.write("a/b/c/file", b"x");
    let mut guest = Guest::mounted(&dir);
    let file = guest.walk("a/b/c/file").unwrap();
    guest.rename((1, "a"), (1, "z"), 0).unwrap();
    assert_eq!(guest.getattr(file.node).unwrap().ino, file.ino);
    let fh = guest.open(file.node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(file.node, fh, 0, 10).unwrap(), b"x");
}

#[test]
fn inode_numbers_used_again_are_new_nodes() {
    needs_root!();
    let dir = Dir::new();
    let mut guest = Guest::mounted(&dir);
    let mut seen = std::collections::HashMap::new();
    for _ in 0..50 {
        dir.write("file", b"");
        let file = guest.lookup(1, "file").unwrap();
        if let Some(before) = seen.insert(file.ino, file.node) {
            assert_ne!(before, file.node, "another file behind a known node");
        }
        std::fs::remove_file(dir.path("file")).unwrap();
    }
}
