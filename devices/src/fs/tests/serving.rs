//! What an honest guest asks for, and gets.

use super::super::abi::fattr;
use super::*;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

#[test]
fn the_device_shows_its_tag_and_one_request_queue() {
    needs_root!();
    let dir = Dir::new();
    let guest = Guest::new(setup(tree_of(&dir.0)));
    let config = guest.driver.device_config();
    assert_eq!(&config[..7], b"capsid\0");
    assert_eq!(u32_at(&config, 36), 1);
    assert_eq!(config.len(), 40);
}

#[test]
fn init_answers_what_both_sides_can() {
    needs_root!();
    let dir = Dir::new();
    let mut guest = Guest::new(setup(tree_of(&dir.0)));
    let reply = guest.init();
    assert_eq!(reply.len(), 64);
    assert_eq!(u32_at(&reply, 0), 7);
    let flags = u64::from(u32_at(&reply, 12));
    assert_eq!(
        flags & abi::init::HANDLE_KILLPRIV_V2,
        abi::init::HANDLE_KILLPRIV_V2
    );
    assert_eq!(flags & (1 << 16), 0, "WRITEBACK_CACHE is not announced");
    assert_eq!(flags & (1 << 1 | 1 << 10), 0, "locks are not announced");
    assert_eq!(u32_at(&reply, 20), 1 << 20, "max_write");
}

#[test]
fn a_file_is_created_written_and_read() {
    needs_root!();
    let dir = Dir::new();
    let mut guest = Guest::mounted(&dir);
    let (file, fh) = guest.create(1, "new", 0o640).unwrap();
    let data: Vec<u8> = (0..300_000u32).map(|n| n as u8).collect();
    assert_eq!(guest.write(file.node, fh, 0, &data), Ok(300_000));
    assert_eq!(dir.read("new"), data);
    assert_eq!(
        guest.read(file.node, fh, 100, 1000).unwrap(),
        &data[100..1100]
    );
    assert_eq!(
        guest.read(file.node, fh, 299_999, 4096).unwrap(),
        &data[299_999..]
    );
    assert_eq!(guest.read(file.node, fh, 300_000, 4096).unwrap(), b"");
    assert_eq!(guest.getattr(file.node).unwrap().size, 300_000);
    let fsync: Vec<u8> = [fh.to_le_bytes(), [1, 0, 0, 0, 0, 0, 0, 0]].concat();
    assert_eq!(guest.ask(opcode::FSYNC, file.node, &fsync, 0), Ok(vec![]));
    let mut flush = fh.to_le_bytes().to_vec();
    flush.put_zeros(16);
    assert_eq!(guest.ask(opcode::FLUSH, file.node, &flush, 0), Ok(vec![]));
    assert_eq!(guest.ask(opcode::SYNCFS, 1, &[0; 8], 0), Ok(vec![]));
    guest.release(opcode::RELEASE, file.node, fh).unwrap();
    assert_eq!(guest.read(file.node, fh, 0, 10), Err(libc::EBADF));
    assert_eq!(dir.path("new").metadata().unwrap().mode() & 0o7777, 0o640);
}

#[test]
fn create_without_excl_opens_what_is_there() {
    needs_root!();
    let dir = Dir::new();
    dir.write("old", b"content");
    let mut guest = Guest::mounted(&dir);
    let mut args = Vec::new();
    args.put_u32((libc::O_RDONLY | libc::O_CREAT) as u32);
    args.put_u32(libc::S_IFREG | 0o600);
    args.put_u64(0);
    args.extend(name("old"));
    let reply = guest.ask(opcode::CREATE, 1, &args, 144).unwrap();
    let (node, fh) = (entry(&reply).node, u64_at(&reply, 128));
    assert_eq!(guest.read(node, fh, 0, 100).unwrap(), b"content");
    assert_eq!(guest.create(1, "old", 0o600).unwrap_err(), libc::EEXIST);
}

#[test]
fn appending_writes_go_to_the_end_whatever_their_offset() {
    needs_root!();
    let dir = Dir::new();
    dir.write("log", b"first ");
    let mut guest = Guest::mounted(&dir);
    let file = guest.lookup(1, "log").unwrap();
    let fh = guest
        .open(file.node, libc::O_WRONLY | libc::O_APPEND)
        .unwrap();
    let args = io_args(fh, 0, 6, 0, libc::O_APPEND as u32);
    guest
        .ask_with(opcode::WRITE, file.node, &args, b"second", 8)
        .unwrap();
    assert_eq!(dir.read("log"), b"first second");
}

#[test]
fn attributes_are_set_and_kept() {
    needs_root!();
    let dir = Dir::new();
    dir.write("file", b"0123456789");
    let mut guest = Guest::mounted(&dir);
    let node = guest.lookup(1, "file").unwrap().node;
    let all = fattr::MODE | fattr::UID | fattr::GID | fattr::SIZE | fattr::ATIME | fattr::MTIME;
    let args = setattr_args(all, 0, 4, 0o4755, (1234, 5678));
    let reply = guest.ask(opcode::SETATTR, node, &args, 104).unwrap();
    assert_eq!(attr(node, &reply[16..]).size, 4);
    let st = dir.path("file").metadata().unwrap();
    assert_eq!((st.uid(), st.gid(), st.size()), (1234, 5678, 4));
    assert_eq!((st.atime(), st.atime_nsec()), (1_000_000_000, 111));
    assert_eq!((st.mtime(), st.mtime_nsec()), (2_000_000_000, 222));
    // chown takes setuid off, as on any file system; alone, chmod puts it there.
    let args = setattr_args(fattr::MODE, 0, 0, 0o6755, (0, 0));
    guest.ask(opcode::SETATTR, node, &args, 104).unwrap();
    assert_eq!(dir.path("file").metadata().unwrap().mode() & 0o7777, 0o6755);
}

#[test]
fn setuid_goes_when_an_unprivileged_process_writes_and_stays_when_root_does() {
    needs_root!();
    let dir = Dir::new();
    dir.write("tool", b"x");
    let mode = || dir.path("tool").metadata().unwrap().mode() & 0o7777;
    let mut guest = Guest::mounted(&dir);
    let node = guest.lookup(1, "tool").unwrap().node;
    std::fs::set_permissions(dir.path("tool"), PermissionsExt::from_mode(0o4755)).unwrap();
    let fh = guest.open(node, libc::O_WRONLY).unwrap();
    guest.write(node, fh, 0, b"root").unwrap();
    assert_eq!(mode(), 0o4755);
    let args = io_args(fh, 0, 4, abi::WRITE_KILL_SUIDGID, 0);
    guest
        .ask_with(opcode::WRITE, node, &args, b"user", 8)
        .unwrap();
    assert_eq!(mode(), 0o755);
    std::fs::set_permissions(dir.path("tool"), PermissionsExt::from_mode(0o4755)).unwrap();
    let mut args = Vec::new();
    args.put_u32((libc::O_WRONLY | libc::O_TRUNC) as u32);
    args.put_u32(abi::OPEN_KILL_SUIDGID);
    guest.ask(opcode::OPEN, node, &args, 16).unwrap();
    assert_eq!(mode(), 0o755);
    // And the privilege came back.
    std::fs::set_permissions(dir.path("tool"), PermissionsExt::from_mode(0o4755)).unwrap();
    guest.write(node, fh, 0, b"root").unwrap();
    assert_eq!(mode(), 0o4755);
    let args = setattr_args(fattr::SIZE | fattr::KILL_SUIDGID, 0, 1, 0, (0, 0));
    guest.ask(opcode::SETATTR, node, &args, 104).unwrap();
    assert_eq!(mode(), 0o755);
}

#[test]
fn extended_attributes_are_set_listed_and_removed() {
    needs_root!();
    let dir = Dir::new();
    dir.write("file", b"");
    std::os::unix::fs::symlink("file", dir.path("link")).unwrap();
    let mut guest = Guest::mounted(&dir);
    let node = guest.lookup(1, "file").unwrap().node;
    let set = |value: &[u8], attribute: &str| {
        let mut args = Vec::new();
        args.put_u32(value.len() as u32);
        args.put_u32(0);
        args.extend(name(attribute));
        args.extend(value);
        args
    };
    let get = |size: u32, attribute: &str| {
        let mut args = Vec::new();
        args.put_u32(size);
        args.put_u32(0);
        args.extend(name(attribute));
        args
    };
    let ok = guest.ask(opcode::SETXATTR, node, &set(b"value", "user.key"), 0);
    if ok == Err(libc::EOPNOTSUPP) {
        eprintln!("SKIPPED: {} has no user.* attributes", dir.0.display());
        return;
    }
    ok.unwrap();
    let reply = guest
        .ask(opcode::GETXATTR, node, &get(100, "user.key"), 100)
        .unwrap();
    assert_eq!(reply, b"value");
    let reply = guest
        .ask(opcode::GETXATTR, node, &get(0, "user.key"), 8)
        .unwrap();
    assert_eq!(u32_at(&reply, 0), 5);
    assert_eq!(
        guest.ask(opcode::GETXATTR, node, &get(2, "user.key"), 2),
        Err(libc::ERANGE)
    );
    assert_eq!(
        guest.ask(opcode::GETXATTR, node, &get(9, "user.none"), 9),
        Err(libc::ENODATA)
    );
    // File capabilities: version 2, cap_net_raw.
    let capability = [
        1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    let args = set(&capability, "security.capability");
    assert_eq!(guest.ask(opcode::SETXATTR, node, &args, 0), Ok(vec![]));
    let list = guest
        .ask(opcode::LISTXATTR, node, &[100, 0, 0, 0, 0, 0, 0, 0], 100)
        .unwrap();
    let mut names: Vec<&[u8]> = list.split(|b| *b == 0).filter(|n| !n.is_empty()).collect();
    names.sort_unstable();
    assert_eq!(names, [&b"security.capability"[..], b"user.key"]);
    let reply = guest.ask(opcode::LISTXATTR, node, &[0; 8], 8).unwrap();
    assert_eq!(u32_at(&reply, 0) as usize, list.len());
    assert_eq!(
        guest.ask(opcode::REMOVEXATTR, node, &name("user.key"), 0),
        Ok(vec![])
    );
    assert_eq!(
        guest.ask(opcode::GETXATTR, node, &get(9, "user.key"), 9),
        Err(libc::ENODATA)
    );
    // Not the guest's business, and a link has none of its own.
    for other in ["trusted.x", "security.selinux", "system.x"] {
        assert_eq!(
            guest.ask(opcode::SETXATTR, node, &set(b"v", other), 0),
            Err(libc::EPERM)
        );
    }
    let args = set(b"v", "system.posix_acl_access");
    assert_eq!(
        guest.ask(opcode::SETXATTR, node, &args, 0),
        Err(libc::EOPNOTSUPP)
    );
    let link = guest.lookup(1, "link").unwrap().node;
    assert_eq!(
        guest.ask(opcode::GETXATTR, link, &get(9, "user.key"), 9),
        Err(libc::ENODATA)
    );
}

#[test]
fn directories_are_listed_both_ways_with_small_and_large_replies() {
    needs_root!();
    let dir = Dir::new();
    let mut expected: Vec<String> = vec![".".into(), "..".into()];
    for number in 0..500 {
        let file = format!("file-{number}-{}", "x".repeat(number % 200));
        dir.write(&file, b"");
        expected.push(file);
    }
    expected.sort();
    let mut guest = Guest::mounted(&dir);
    for (plus, size) in [(false, 512), (false, 65_536), (true, 1024), (true, 1 << 20)] {
        let mut listed = guest.list(1, plus, size).unwrap();
        listed.sort();
        let names: Vec<&String> = listed.iter().map(|(name, _)| name).collect();
        assert_eq!(names, expected.iter().collect::<Vec<_>>(), "{plus} {size}");
        for (name, node) in listed {
            assert_eq!(node != 0, plus && !name.starts_with('.'), "{name}");
        }
    }
}

#[test]
fn a_reply_too_small_for_one_entry_is_an_error_and_not_an_end() {
    needs_root!();
    let dir = Dir::new();
    let mut guest = Guest::mounted(&dir);
    let fh = guest.opendir(1).unwrap();
    let args = io_args(fh, 0, 16, 0, 0);
    assert_eq!(guest.ask(opcode::READDIR, 1, &args, 16), Err(libc::EINVAL));
}

#[test]
fn holes_are_found_made_and_filled() {
    needs_root!();
    let dir = Dir::new();
    let mut guest = Guest::mounted(&dir);
    let (file, fh) = guest.create(1, "sparse", 0o600).unwrap();
    let allocate = |offset: u64, length: u64, mode: u32| {
        let mut args = Vec::new();
        args.put_u64(fh);
        args.put_u64(offset);
        args.put_u64(length);
        args.put_u32(mode);
        args.put_u32(0);
        args
    };
    guest
        .ask(opcode::FALLOCATE, file.node, &allocate(0, 1 << 20, 0), 0)
        .unwrap();
    assert_eq!(guest.getattr(file.node).unwrap().size, 1 << 20);
    let seek = |offset: u64, whence: i32| {
        let mut args = Vec::new();
        args.put_u64(fh);
        args.put_u64(offset);
        args.put_u32(whence as u32);
        args.put_u32(0);
        args
    };
    let reply = guest
        .ask(opcode::LSEEK, file.node, &seek(0, libc::SEEK_HOLE), 8)
        .unwrap();
    assert!(u64_at(&reply, 0) <= 1 << 20);
    assert_eq!(
        guest.ask(opcode::LSEEK, file.node, &seek(0, libc::SEEK_SET), 8),
        Err(libc::EINVAL)
    );
    let args = allocate(0, 1 << 20, 0x40);
    assert_eq!(
        guest.ask(opcode::FALLOCATE, file.node, &args, 0),
        Err(libc::EOPNOTSUPP)
    );
    guest.write(file.node, fh, 0, b"copied").unwrap();
    let (copy, to) = guest.create(1, "copy", 0o600).unwrap();
    let mut args = Vec::new();
    for field in [fh, 0, copy.node, to, 0, 6, 0] {
        args.put_u64(field);
    }
    let reply = guest
        .ask(opcode::COPY_FILE_RANGE, file.node, &args, 8)
        .unwrap();
    assert_eq!(u32_at(&reply, 0), 6);
    assert_eq!(dir.read("copy"), b"copied");
}

#[test]
fn statfs_tells_the_size_of_the_file_system() {
    needs_root!();
    let dir = Dir::new();
    let mut guest = Guest::mounted(&dir);
    let reply = guest.ask(opcode::STATFS, 1, &[], 80).unwrap();
    let host = rustix::fs::statfs(&dir.0).unwrap();
    assert_eq!(u64_at(&reply, 0), host.f_blocks);
    assert_eq!(u32_at(&reply, 44), 255);
}

#[test]
fn a_reset_ends_the_session_and_the_next_mount_works() {
    needs_root!();
    let dir = Dir::new();
    dir.write("file", b"x");
    let mut guest = Guest::mounted(&dir);
    for _ in 0..20 {
        let node = guest.lookup(1, "file").unwrap().node;
        guest.open(node, libc::O_RDONLY).unwrap();
        guest.driver.reset();
        assert_eq!(guest.driver.status(), 0);
        assert!(guest.pool.facts().session().is_none());
        guest.driver.negotiate(0);
        guest.driver.setup_queue(PRIORITY, 16);
        guest.driver.setup_queue(REQUESTS, 64);
        guest.driver.start();
        assert_eq!(guest.getattr(1).unwrap_err(), libc::EPROTO);
        guest.init();
    }
    assert_eq!(guest.ask(opcode::DESTROY, 0, &[], 0), Ok(vec![]));
    assert_eq!(guest.getattr(1).unwrap_err(), libc::EPROTO);
    guest.init();
    assert!(guest.getattr(1).is_ok());
}

#[test]
fn many_requests_in_flight_are_all_answered_once() {
    needs_root!();
    let dir = Dir::new();
    dir.write("file", &vec![7; 1 << 16]);
    let mut guest = Guest::mounted(&dir);
    let node = guest.lookup(1, "file").unwrap().node;
    let fh = guest.open(node, libc::O_RDONLY).unwrap();
    let mut waiting = std::collections::HashSet::new();
    for round in 0..200u64 {
        let header = guest.header(opcode::READ, node, 40);
        let args = io_args(fh, (round * 4096) % (1 << 16), 4096, 0, 0);
        let buffers = [
            Buffer::Readable(&header),
            Buffer::Readable(&args),
            Buffer::Writable(16),
            Buffer::Writable(4096),
        ];
        assert!(waiting.insert(guest.driver.add_indirect(REQUESTS, &buffers)));
        if guest.driver.wants_kick(REQUESTS) {
            guest.driver.kick(REQUESTS);
        }
    }
    for _ in 0..200 {
        let used = guest.driver.wait_used(REQUESTS, None);
        assert!(waiting.remove(&used.head), "a chain came back twice");
        assert_eq!(used.len, 16 + 4096);
        assert!(used.data[16..].iter().all(|byte| *byte == 7));
    }
}

/// The flags of an OPEN's reply.
fn open_flags(guest: &mut Guest, node: u64, flags: i32) -> u32 {
    let mut args = (flags as u32).to_le_bytes().to_vec();
    args.put_u32(0);
    let reply = guest.ask(opcode::OPEN, node, &args, 16).unwrap();
    u32_at(&reply, 8)
}

#[test]
fn what_did_not_change_stays_in_the_guests_cache() {
    needs_root!();
    // A file that has not changed for seconds.
    let mut guest = Guest::new(setup(tree_of(Path::new("/etc"))));
    guest.init();
    let node = guest.lookup(1, "passwd").unwrap().node;
    let (keep, no_flush) = (abi::FOPEN_KEEP_CACHE, abi::FOPEN_NOFLUSH);
    assert_eq!(open_flags(&mut guest, node, libc::O_RDONLY), no_flush);
    assert_eq!(
        open_flags(&mut guest, node, libc::O_RDONLY),
        keep | no_flush
    );
    assert_eq!(
        open_flags(&mut guest, node, libc::O_RDONLY),
        keep | no_flush
    );
    // One that has just changed, and might again at the same time.
    let dir = Dir::new();
    dir.write("new", b"x");
    let mut guest = Guest::mounted(&dir);
    let node = guest.lookup(1, "new").unwrap().node;
    assert_eq!(open_flags(&mut guest, node, libc::O_RDONLY), no_flush);
    assert_eq!(open_flags(&mut guest, node, libc::O_RDWR), 0);
}

#[test]
fn a_mounted_share_goes_on_after_a_suspension() {
    needs_root!();
    let dir = Dir::new();
    let mut guest = Guest::mounted(&dir);
    let (file, fh) = guest.create(1, "file", 0o600).unwrap();
    for round in 0..20u64 {
        let state = written_down(&guest.driver);
        guest.driver.transport.resume();
        assert_eq!(guest.write(file.node, fh, 2 * round, b"ab"), Ok(2));
        // The host's files behind the numbers that this guest knows are not part of it.
        let other = Driver::new(Box::new(
            spawn_share_threads(setup(tree_of(&dir.0))).unwrap(),
        ));
        let refused = other.transport.restore(&state).unwrap_err();
        assert!(matches!(refused, RestoreError::Mounted(_)));
    }
    assert_eq!(dir.read("file"), b"ab".repeat(20));
}

#[test]
fn a_share_that_is_not_mounted_can_be_taken_over_and_mounted_in_another_process() {
    needs_root!();
    let dir = Dir::new();
    dir.write("there", b"");
    let mut guest = Guest::new(setup(tree_of(&dir.0)));
    let state = written_down(&guest.driver);
    let other = spawn_share_threads(setup(tree_of(&dir.0))).unwrap();
    guest.driver.carry_over(Box::new(other), &state);
    guest.init();
    guest.lookup(1, "there").unwrap();
}
