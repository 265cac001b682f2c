//! What a hostile guest sends: every test ends with a share that still serves.

use super::*;
use proptest::prelude::*;

/// The share still works.
fn serves(guest: &mut Guest) {
    assert!(!guest.driver.needs_reset());
    let known = guest.getattr(1);
    assert!(known.is_ok() || known.is_err_and(|errno| errno == libc::EPROTO));
}

#[test]
fn special_files_are_never_opened_and_devices_never_made() {
    needs_root!();
    let dir = Dir::new();
    let mut guest = Guest::mounted(&dir);
    // A device node that an image brought along.
    let device = rustix::fs::makedev(1, 5);
    let made = rustix::fs::mknodat(
        CWD,
        dir.path("zero"),
        rustix::fs::FileType::CharacterDevice,
        rustix::fs::Mode::from_raw_mode(0o666),
        device,
    );
    made.unwrap();
    guest.mknod(1, "fifo", libc::S_IFIFO | 0o666, 0).unwrap();
    guest.mknod(1, "socket", libc::S_IFSOCK | 0o666, 0).unwrap();
    let whiteout = guest.mknod(1, "whiteout", libc::S_IFCHR, 0).unwrap();
    assert_eq!(whiteout.mode & libc::S_IFMT, libc::S_IFCHR);
    let mut args = name("link");
    args.extend(name("zero"));
    guest.ask(opcode::SYMLINK, 1, &args, 128).unwrap();
    for special in ["zero", "fifo", "socket", "whiteout", "link"] {
        let node = guest.lookup(1, special).unwrap().node;
        for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_WRONLY | libc::O_TRUNC] {
            assert_eq!(guest.open(node, flags), Err(libc::EPERM), "{special}");
        }
        assert_eq!(guest.opendir(node), Err(libc::ENOTDIR));
        let mut args = Vec::new();
        args.put_u32(libc::O_RDWR as u32);
        args.put_zeros(12);
        args.extend(name(special));
        assert_eq!(guest.ask(opcode::CREATE, 1, &args, 144), Err(libc::EPERM));
        let args = setattr_args(abi::fattr::SIZE, 0, 0, 0, (0, 0));
        assert_eq!(
            guest.ask(opcode::SETATTR, node, &args, 104),
            Err(libc::EINVAL)
        );
    }
    for kind in [libc::S_IFCHR, libc::S_IFBLK] {
        assert_eq!(
            guest.mknod(1, "device", kind | 0o666, 0x103).unwrap_err(),
            libc::EPERM
        );
    }
    assert_eq!(
        guest.mknod(1, "device", libc::S_IFBLK, 0).unwrap_err(),
        libc::EPERM
    );
    assert_eq!(
        guest.mknod(1, "device", libc::S_IFDIR, 0).unwrap_err(),
        libc::EINVAL
    );
    assert!(!dir.path("device").exists());
    serves(&mut guest);
}

#[test]
fn names_that_are_more_than_a_name_are_refused() {
    needs_root!();
    let dir = Dir::new();
    std::fs::create_dir(dir.path("sub")).unwrap();
    dir.write("sub/file", b"");
    let mut guest = Guest::mounted(&dir);
    let sub = guest.lookup(1, "sub").unwrap().node;
    for bad in [
        "",
        ".",
        "..",
        "/",
        "sub/file",
        "../x",
        "/etc/passwd",
        "file/",
        "x/",
    ] {
        let einval = Err(libc::EINVAL);
        let bytes = name(bad);
        assert_eq!(guest.ask(opcode::LOOKUP, 1, &bytes, 128), einval, "{bad:?}");
        assert_eq!(guest.ask(opcode::UNLINK, sub, &bytes, 0), einval, "{bad:?}");
        assert_eq!(guest.ask(opcode::RMDIR, sub, &bytes, 0), einval, "{bad:?}");
        assert_eq!(
            guest.mkdir(sub, bad, 0o700).unwrap_err(),
            libc::EINVAL,
            "{bad:?}"
        );
        assert_eq!(
            guest.create(sub, bad, 0o700).unwrap_err(),
            libc::EINVAL,
            "{bad:?}"
        );
        assert_eq!(
            guest.rename((sub, "file"), (1, bad), 0),
            Err(libc::EINVAL),
            "{bad:?}"
        );
        assert_eq!(
            guest.rename((sub, bad), (1, "x"), 0),
            Err(libc::EINVAL),
            "{bad:?}"
        );
    }
    let long = "n".repeat(256);
    assert_eq!(guest.lookup(1, &long).unwrap_err(), libc::ENAMETOOLONG);
    assert_eq!(guest.lookup(1, &long[..255]).unwrap_err(), libc::ENOENT);
    for bytes in [&b"no end"[..], b"inner\0nul\0", b"x\0trailing"] {
        assert_eq!(guest.ask(opcode::LOOKUP, 1, bytes, 128), Err(libc::EINVAL));
    }
    let invalid_utf8 = b"\xff\xfe\x80\0";
    let mut args = vec![0; 8];
    args.extend(invalid_utf8);
    guest.ask(opcode::MKDIR, 1, &args, 128).unwrap();
    assert!(guest.ask(opcode::LOOKUP, 1, invalid_utf8, 128).is_ok());
    serves(&mut guest);
}

#[test]
fn a_symbolic_link_is_never_followed_on_the_host() {
    needs_root!();
    let dir = Dir::new();
    std::fs::create_dir(dir.path("real")).unwrap();
    dir.write("real/file", b"x");
    let mut guest = Guest::mounted(&dir);
    for (link, target) in [("abs", "/"), ("up", "../../../.."), ("dir", "real")] {
        let mut args = name(link);
        args.extend(name(target));
        let link = entry(&guest.ask(opcode::SYMLINK, 1, &args, 128).unwrap());
        assert_eq!(guest.lookup(link.node, "file").unwrap_err(), libc::ENOTDIR);
        assert_eq!(guest.opendir(link.node), Err(libc::ENOTDIR));
        assert_eq!(
            guest.create(link.node, "new", 0o600).unwrap_err(),
            libc::ENOTDIR
        );
    }
    // A directory swapped for a link behind the server's back is stale, not followed.
    let real = guest.lookup(1, "real").unwrap();
    std::fs::rename(dir.path("real"), dir.path("moved")).unwrap();
    std::os::unix::fs::symlink("/etc", dir.path("real")).unwrap();
    assert_eq!(guest.lookup(real.node, "passwd").unwrap_err(), libc::ESTALE);
    serves(&mut guest);
}

#[test]
fn nothing_but_init_is_served_before_init() {
    needs_root!();
    let dir = Dir::new();
    dir.write("file", b"");
    let mut guest = Guest::new(setup(tree_of(&dir.0)));
    let eproto = Err(libc::EPROTO);
    assert_eq!(guest.ask(opcode::LOOKUP, 1, &name("file"), 128), eproto);
    assert_eq!(guest.ask(opcode::GETATTR, 1, &[0; 16], 104), eproto);
    assert_eq!(guest.ask(opcode::OPENDIR, 1, &[0; 8], 16), eproto);
    guest.forget(1, 1);
    let mut init = |major: u32, minor: u32, room: u32| {
        let mut args = Vec::new();
        args.put_u32(major);
        args.put_u32(minor);
        args.put_u64(0);
        guest.ask(opcode::INIT, 0, &args, room)
    };
    assert_eq!(init(6, 99, 64), eproto);
    assert_eq!(init(7, 1, 64), eproto);
    assert_eq!(init(7, 41, 63), Err(libc::EINVAL));
    for newer in [8, u32::MAX] {
        assert_eq!(u32_at(&init(newer, 0, 64).unwrap(), 0), 7);
    }
    assert!(init(7, 31, 64).is_ok());
    assert_eq!(init(7, 31, 64), eproto, "twice");
    assert!(guest.lookup(1, "file").is_ok());
}

#[test]
fn lengths_that_lie_are_refused() {
    needs_root!();
    let dir = Dir::new();
    dir.write("file", b"x");
    let mut guest = Guest::mounted(&dir);
    for claimed in [0, 39, 40, 44, 46, 4096, u32::MAX] {
        let mut header = guest.header(opcode::LOOKUP, 1, 5);
        header[..4].copy_from_slice(&u32::to_le_bytes(claimed));
        let buffers = [
            Buffer::Readable(&header),
            Buffer::Readable(b"file\0"),
            Buffer::Writable(144),
        ];
        let used = guest.send(REQUESTS, &buffers);
        assert_eq!(guest.reply(&used), Err(libc::EINVAL), "{claimed}");
    }
    // Cut short before the header's end, or no room to answer: given back.
    let header = guest.header(opcode::GETATTR, 1, 16);
    for cut in [1, 39] {
        let short = [Buffer::Readable(&header[..cut]), Buffer::Writable(120)];
        assert_eq!(guest.send(REQUESTS, &short).len, 0);
    }
    let full = [Buffer::Readable(&header), Buffer::Readable(&[0; 16])];
    assert_eq!(guest.send(REQUESTS, &full).len, 0);
    let small = [full[0], full[1], Buffer::Writable(15)];
    assert_eq!(guest.send(REQUESTS, &small).len, 0);
    assert_eq!(guest.send(REQUESTS, &[Buffer::Writable(64)]).len, 0);
    // Room for a header but not for the answer: nothing is done.
    let mut args = Vec::new();
    args.put_u64(0);
    args.extend(name("made"));
    assert_eq!(guest.ask(opcode::MKDIR, 1, &args, 127), Err(libc::EINVAL));
    assert!(!dir.path("made").exists());
    // A request spread over buffers of one byte is a request.
    let header = guest.header(opcode::LOOKUP, 1, 5);
    let whole = [&header[..], b"file\0"].concat();
    let mut buffers: Vec<Buffer<'_>> = whole.chunks(1).map(Buffer::Readable).collect();
    buffers.extend([Buffer::Writable(1); 144]);
    let used = guest.send(REQUESTS, &buffers);
    assert!(guest.reply(&used).is_ok());
    serves(&mut guest);
}

#[test]
fn sizes_and_offsets_beyond_everything_are_cut_or_refused() {
    needs_root!();
    let dir = Dir::new();
    dir.write("file", b"content");
    let mut guest = Guest::mounted(&dir);
    let node = guest.lookup(1, "file").unwrap().node;
    let fh = guest.open(node, libc::O_RDWR).unwrap();
    let all = guest.ask(opcode::READ, node, &io_args(fh, 0, u32::MAX, 0, 0), 4096);
    assert_eq!(all.unwrap(), b"content");
    for offset in [i64::MAX as u64, 1 << 63, u64::MAX] {
        assert_eq!(guest.read(node, fh, offset, 4096), Err(libc::EINVAL));
        assert_eq!(guest.write(node, fh, offset, b"x"), Err(libc::EFBIG));
    }
    // More claimed than sent, and more sent than a write may have.
    let args = io_args(fh, 0, 100, 0, 0);
    assert_eq!(
        guest.ask_with(opcode::WRITE, node, &args, b"x", 8),
        Err(libc::EINVAL)
    );
    let data = vec![0; (1 << 20) + 1];
    assert_eq!(guest.write(node, fh, 0, &data), Err(libc::EINVAL));
    let args = setattr_args(abi::fattr::SIZE, 0, 1 << 63, 0, (0, 0));
    assert_eq!(
        guest.ask(opcode::SETATTR, node, &args, 104),
        Err(libc::EFBIG)
    );
    let args = setattr_args(abi::fattr::UID, 0, 0, 0, (u32::MAX, 0));
    assert_eq!(
        guest.ask(opcode::SETATTR, node, &args, 104),
        Err(libc::EINVAL)
    );
    let dirfh = guest.opendir(1).unwrap();
    for (offset, size) in [(0, u32::MAX), (u64::MAX, 4096), (1 << 62, 4096)] {
        let args = io_args(dirfh, offset, size, 0, 0);
        let listed = guest.ask(opcode::READDIRPLUS, 1, &args, 1 << 20);
        assert!(listed.is_ok() || listed == Err(libc::EINVAL), "{listed:?}");
    }
    // A file handle is of one node and one kind.
    assert_eq!(guest.read(1, fh, 0, 10), Err(libc::EBADF));
    assert_eq!(guest.read(1, dirfh, 0, 10), Err(libc::EISDIR));
    assert_eq!(guest.read(node, u64::MAX, 0, 10), Err(libc::EBADF));
    let args = io_args(fh, 0, 4096, 0, 0);
    assert_eq!(
        guest.ask(opcode::READDIR, node, &args, 4096),
        Err(libc::ENOTDIR)
    );
    let huge = vec![b'x'; 100 * 1024];
    assert_eq!(guest.ask(opcode::LOOKUP, 1, &huge, 128), Err(libc::E2BIG));
    let mut args = vec![0, 0, 2, 0, 0, 0, 0, 0];
    args.extend(name("user.x"));
    assert_eq!(
        guest.ask(opcode::SETXATTR, node, &args, 0),
        Err(libc::E2BIG)
    );
    assert_eq!(dir.read("file"), b"content");
    serves(&mut guest);
}

#[test]
fn nodes_that_are_none_are_stale_and_forgetting_never_underflows() {
    needs_root!();
    let dir = Dir::new();
    dir.write("file", b"x");
    let mut guest = Guest::mounted(&dir);
    for node in [0, 77, u64::MAX] {
        assert_eq!(guest.getattr(node).unwrap_err(), libc::ESTALE);
        assert_eq!(guest.lookup(node, "file").unwrap_err(), libc::ESTALE);
        assert_eq!(guest.open(node, 0), Err(libc::ESTALE));
        guest.forget(node, u64::MAX);
    }
    guest.forget(1, u64::MAX);
    let file = guest.lookup(1, "file").unwrap().node;
    guest.forget(file, u64::MAX);
    guest.forget(file, 1);
    assert_eq!(guest.getattr(file).unwrap_err(), libc::ESTALE);
    assert!(guest.lookup(1, "file").is_ok());
    for count in [0, 1, u32::MAX] {
        let mut args = Vec::new();
        args.put_u32(count);
        args.put_u32(0);
        let header = guest.header(opcode::BATCH_FORGET, 0, args.len());
        let buffers = [Buffer::Readable(&header), Buffer::Readable(&args)];
        assert_eq!(guest.send(PRIORITY, &buffers).len, 0);
    }
    serves(&mut guest);
}

#[test]
fn opcodes_that_are_not_served_are_unknown() {
    needs_root!();
    let dir = Dir::new();
    let mut guest = Guest::mounted(&dir);
    // Locks, ioctl, poll, DAX, and what is no opcode at all.
    for code in [
        0,
        7,
        19,
        31,
        32,
        33,
        34,
        37,
        39,
        40,
        41,
        48,
        49,
        51,
        52,
        4096,
        u32::MAX,
    ] {
        for size in [0, 8, 64] {
            let args = vec![0; size];
            assert_eq!(guest.ask(code, 1, &args, 128), Err(libc::ENOSYS), "{code}");
        }
    }
    serves(&mut guest);
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_the_share_works_after_it() {
    needs_root!();
    let dir = Dir::new();
    let mut guest = Guest::mounted(&dir);
    guest.driver.set_available_index(REQUESTS, 5000);
    guest.driver.kick(REQUESTS);
    guest
        .driver
        .routes
        .wait_beyond(0, std::time::Instant::now() + WAIT);
    let deadline = std::time::Instant::now() + WAIT;
    while !guest.driver.needs_reset() {
        assert!(
            std::time::Instant::now() < deadline,
            "the device did not ask for a reset"
        );
        std::thread::yield_now();
    }
    guest.driver.reset();
    guest.driver.negotiate(0);
    guest.driver.setup_queue(PRIORITY, 128);
    guest.driver.setup_queue(REQUESTS, 128);
    guest.driver.start();
    guest.init();
    serves(&mut guest);
}

const WAIT: std::time::Duration = std::time::Duration::from_secs(10);

fn request() -> impl Strategy<Value = (u32, u64, Vec<u8>, Vec<u32>)> {
    let small = || 0..4u64;
    let fields = prop::collection::vec(
        prop_oneof![small().prop_map(|n| n as u32), any::<u32>()],
        0..24,
    );
    let arguments = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        (fields, prop::option::of("[a-z./\\x00]{0,8}")).prop_map(|(fields, name)| {
            let mut bytes: Vec<u8> = fields
                .iter()
                .flat_map(|field| field.to_le_bytes())
                .collect();
            if let Some(name) = name {
                bytes.extend(name.as_bytes());
                bytes.push(0);
            }
            bytes
        }),
    ];
    let rooms = prop::collection::vec(1..5000u32, 0..4);
    let node = prop_oneof![small(), any::<u64>()];
    (0..60u32, node, arguments, rooms)
}

#[test]
fn any_request_comes_back_and_the_share_lives() {
    needs_root!();
    let dir = Dir::new();
    dir.write("a", b"content");
    std::fs::create_dir(dir.path("b")).unwrap();
    let guest = std::cell::RefCell::new(Guest::mounted(&dir));
    let fuzz = |requests: Vec<(u32, u64, Vec<u8>, Vec<u32>)>| {
        let guest = &mut *guest.borrow_mut();
        let _there_or_not = guest.lookup(1, "a");
        for (code, node, args, rooms) in requests {
            let header = guest.header(code, node, args.len());
            let mut buffers = vec![Buffer::Readable(&header)];
            if !args.is_empty() {
                buffers.push(Buffer::Readable(&args));
            }
            buffers.extend(rooms.iter().map(|room| Buffer::Writable(*room)));
            let used = guest.send(REQUESTS, &buffers);
            let room: u32 = rooms.iter().sum();
            assert!(used.len == 0 || (16..=room).contains(&used.len));
            if used.len > 0 {
                assert_eq!(u32_at(&used.data, 0), used.len);
                let errno = -(u32_at(&used.data, 4) as i32);
                assert!((0..134).contains(&errno));
            }
        }
        if guest.pool.facts().session().is_none() {
            guest.init();
        }
        serves(guest);
    };
    proptest!(ProptestConfig::with_cases(200), |(requests in prop::collection::vec(request(), 1..20))| {
        fuzz(requests);
    });
}

#[test]
fn any_bytes_come_back() {
    needs_root!();
    let dir = Dir::new();
    let guest = std::cell::RefCell::new(Guest::mounted(&dir));
    proptest!(ProptestConfig::with_cases(300), |(bytes in prop::collection::vec(any::<u8>(), 1..300), room in 1..300u32)| {
        let guest = &mut *guest.borrow_mut();
        let used = guest.send(REQUESTS, &[Buffer::Readable(&bytes), Buffer::Writable(room)]);
        assert!(used.len <= room);
    });
    serves(&mut guest.borrow_mut());
}
