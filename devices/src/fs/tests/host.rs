//! What the host does to a share, or lacks, while a guest uses it.

use super::*;
use rustix::fs::{RenameFlags, renameat_with};
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::UnshareFlags;
use std::sync::atomic::AtomicBool;

/// A tree in whose `full` there is room for so many bytes, made where no host mount is left behind.
fn tree_with_little_room(dir: &Dir, bytes: usize) -> OwnedFd {
    let root = dir.0.clone();
    std::thread::spawn(move || {
        unshare(UnshareFlags::FS | UnshareFlags::NEWNS).unwrap();
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).unwrap();
        let options = std::ffi::CString::new(format!("size={bytes}")).unwrap();
        mount(
            "full",
            root.join("full"),
            "tmpfs",
            MountFlags::empty(),
            &*options,
        )
        .unwrap();
        tree_of(&root)
    })
    .join()
    .unwrap()
}

#[test]
fn a_link_that_the_host_swaps_for_a_directory_all_the_time_is_never_gone_through() {
    needs_root!();
    // B3.2, B3.3.
    const LOOKS: usize = 3_000;
    let (dir, outside) = (Dir::new(), Dir::new());
    std::fs::create_dir(dir.path("place")).unwrap();
    dir.write("place/file", b"inside");
    outside.write("file", b"outside");
    std::os::unix::fs::symlink(&outside.0, dir.path("link")).unwrap();
    let mut guest = Guest::mounted(&dir);
    let (over, swaps) = (AtomicBool::new(false), AtomicU32::new(0));
    let mut read = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (place, link) = (dir.path("place"), dir.path("link"));
            while !over.load(Ordering::Relaxed) {
                renameat_with(CWD, &place, CWD, &link, RenameFlags::EXCHANGE).unwrap();
                swaps.fetch_add(1, Ordering::Relaxed);
            }
        });
        for _ in 0..LOOKS {
            if let Some(content) = look(&mut guest) {
                assert_eq!(content, b"inside");
                read += 1;
            }
        }
        over.store(true, Ordering::Relaxed);
    });
    let swaps = swaps.into_inner();
    assert!(read > 0 && swaps > 100, "{read} reads, {swaps} swaps");
    // Nor was anything made there.
    let names = std::fs::read_dir(&outside.0).unwrap().flatten();
    let names: Vec<_> = names.map(|entry| entry.file_name()).collect();
    assert_eq!(names, ["file"]);
    assert_eq!(outside.read("file"), b"outside");
    assert!(guest.getattr(1).is_ok());
}

/// What is in the file of `place`, if the guest gets so far; it makes another beside it.
fn look(guest: &mut Guest) -> Option<Vec<u8>> {
    let place = guest.lookup(1, "place").ok()?.node;
    if let Ok((made, fh)) = guest.create(place, "made", 0o600) {
        guest.release(opcode::RELEASE, made.node, fh).unwrap();
    }
    let file = guest.lookup(place, "file").ok()?.node;
    let fh = guest.open(file, libc::O_RDWR).ok()?;
    let content = guest.read(file, fh, 0, 100).ok();
    guest.release(opcode::RELEASE, file, fh).unwrap();
    content
}

#[test]
fn a_host_without_room_is_an_error_in_the_guest_and_the_share_goes_on() {
    needs_root!();
    // B3.9.
    const ROOM: usize = 1 << 20;
    let dir = Dir::new();
    std::fs::create_dir(dir.path("full")).unwrap();
    let mut guest = Guest::new(setup(tree_with_little_room(&dir, ROOM)));
    guest.init();
    let full = guest.lookup(1, "full").unwrap().node;
    let (file, fh) = guest.create(full, "file", 0o600).unwrap();
    let piece = vec![7; 64 << 10];
    let (mut written, mut refused) = (0, None);
    while refused.is_none() && written <= ROOM {
        match guest.write(file.node, fh, written as u64, &piece) {
            Ok(bytes) => written += bytes as usize,
            Err(errno) => refused = Some(errno),
        }
    }
    assert_eq!(refused, Some(libc::ENOSPC), "after {written} bytes");
    assert_eq!(guest.read(file.node, fh, 0, 4).unwrap(), [7; 4]);
    let args = setattr_args(abi::fattr::SIZE, 0, 0, 0, (0, 0));
    guest.ask(opcode::SETATTR, file.node, &args, 104).unwrap();
    assert_eq!(guest.write(file.node, fh, 0, &piece), Ok(64 << 10));
    assert!(guest.getattr(1).is_ok());
}
