//! What only this device has to bear. Numbers in brackets are those of the catalogue.

use super::request::*;
use super::{DATA, FILE, FORGETS, Fs, NOTHING, REPLY, REQUEST, REQUESTS, ROOM, wanted};
use crate::chapters::{Honest, rings};
use crate::cpu::{peek, poke};
use crate::report::{At, Outcome, same};
use crate::ring::{readable, writable};

/// Every operation that has a meaning, but those that begin and end a session or have no answer.
const OPERATIONS: [u32; 33] = [
    LOOKUP,
    GETATTR,
    SETATTR,
    READLINK,
    SYMLINK,
    MKNOD,
    MKDIR,
    UNLINK,
    RMDIR,
    RENAME,
    LINK,
    OPEN,
    READ,
    WRITE,
    STATFS,
    RELEASE,
    FSYNC,
    SETXATTR,
    GETXATTR,
    LISTXATTR,
    REMOVEXATTR,
    FLUSH,
    OPENDIR,
    READDIR,
    RELEASEDIR,
    FSYNCDIR,
    CREATE,
    FALLOCATE,
    READDIRPLUS,
    RENAME2,
    LSEEK,
    COPY_FILE_RANGE,
    SYNCFS,
];
/// Such as have none here: locks, ioctl, poll, bmap, DAX, and numbers that nobody gave.
const UNKNOWN: [u32; 19] = [
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
    53,
    100,
    4096,
    u32::MAX,
];

/// As with requests, and the other way round.
pub(super) fn forgets(fs: &mut Fs) -> Outcome {
    fs.victim = FORGETS;
    let outcome = rings::direct(fs).and_then(|()| rings::indirect(fs));
    fs.victim = REQUESTS;
    outcome
}

/// Headers that are not whole, lengths that are not those of the chain, operations that nobody knows, arguments that are not
/// theirs, no room for the answer (U1, U11).
pub(super) fn requests(fs: &mut Fs) -> Outcome {
    const ATTRIBUTES: u32 = 104;
    fs.recovers()?;
    let attributes = Arguments::of(&[0, 0]);
    let whole = fs.put(GETATTR, ROOT, &attributes);
    for bytes in [1, 4, 8, IN_HEADER - 1] {
        let written = fs.send(REQUESTS, &[readable(REQUEST, bytes), writable(REPLY, ROOM)])?;
        same("bytes written", written, 0u32).at("a part of a header", bytes.into())?;
    }
    let written = fs.send(REQUESTS, &[writable(REPLY, ROOM)])?;
    same("bytes written", written, 0u32).at("no header", 0)?;
    for length in [
        0,
        IN_HEADER - 1,
        IN_HEADER,
        whole - 1,
        whole + 1,
        0x8000_0000,
        u32::MAX,
    ] {
        fs.put(GETATTR, ROOT, &attributes);
        poke(REQUEST, length);
        let error = fs.reply(&[readable(REQUEST, whole), writable(REPLY, ROOM)])?;
        wanted(error, EINVAL).at("a length", length.into())?;
    }
    for operation in UNKNOWN {
        let error = fs.call(operation, ROOT, &attributes)?;
        wanted(error, ENOSYS).at("an operation", operation.into())?;
    }
    // None, one byte, too few and too many; whoever takes none takes no more either.
    for operation in OPERATIONS {
        for length in [1, 3, 7, 500] {
            let arguments = Arguments::none().bytes(&[0xff; 500][..length]);
            let error = fs.call(operation, ROOT, &arguments)?;
            same("refused", error != OK, true).at("operation", operation.into())?;
        }
    }
    fs.put(GETATTR, ROOT, &attributes);
    poke(REQUEST + 36, 1u16);
    let error = fs.reply(&[readable(REQUEST, whole), writable(REPLY, ROOM)])?;
    wanted(error, EINVAL).at("extensions", 0)?;
    let large = 1 << 20;
    fs.put(LOOKUP, ROOT, &Arguments::none());
    poke(REQUEST, IN_HEADER + large);
    let error = fs.reply(&[
        readable(REQUEST, IN_HEADER),
        readable(DATA, large),
        writable(REPLY, ROOM),
    ])?;
    wanted(error, E2BIG).at("a large request", 0)?;
    for room in [1, 4, OUT_HEADER - 1] {
        fs.put(GETATTR, ROOT, &attributes);
        let written = fs.send(REQUESTS, &[readable(REQUEST, whole), writable(REPLY, room)])?;
        same("bytes written", written, 0u32).at("room", room.into())?;
        same("the answer", peek::<u64>(REPLY), NOTHING).at("room", room.into())?;
    }
    let written = fs.send(REQUESTS, &[readable(REQUEST, whole)])?;
    same("bytes written", written, 0u32).at("no room", 0)?;
    for room in [OUT_HEADER, OUT_HEADER + ATTRIBUTES - 1] {
        fs.put(GETATTR, ROOT, &attributes);
        let error = fs.reply(&[readable(REQUEST, whole), writable(REPLY, room)])?;
        wanted(error, EINVAL).at("room for a part", room.into())?;
    }
    fs.ask()
}

/// Before a session and behind it nothing is served; versions that are none begin none, and none begins twice (U2).
pub(super) fn time(fs: &mut Fs) -> Outcome {
    const FLAGS: u32 = u32::MAX;
    fs.up(0)?;
    nothing_is_served(fs)?;
    for (major, minor) in [(0, 0), (6, 38), (7, 0), (7, 30)] {
        let error = fs.call(INIT, 0, &Arguments::init(major, minor, FLAGS))?;
        wanted(error, EPROTO).at("version", u64::from(major) << 32 | u64::from(minor))?;
    }
    for major in [8, u32::MAX] {
        fs.well(INIT, 0, &Arguments::init(major, 0, FLAGS))?;
        same(
            "the version",
            peek::<u32>(REPLY + u64::from(OUT_HEADER)),
            7u32,
        )?;
    }
    nothing_is_served(fs)?;
    fs.well(INIT, 0, &Arguments::init(7, u32::MAX, FLAGS))?;
    for _ in 0..3 {
        let error = fs.call(INIT, 0, &Arguments::init(7, 38, 0))?;
        wanted(error, EPROTO).at("a second session", 0)?;
    }
    let node = fs.lookup(FILE)?;
    let handle = fs.open(node)?;
    fs.well(DESTROY, 0, &Arguments::none())?;
    nothing_is_served(fs)?;
    fs.well(INIT, 0, &Arguments::init(7, 31, 0))?;
    // Nodes and handles were those of the session.
    let error = fs.call(GETATTR, node, &Arguments::of(&[0, 0]))?;
    wanted(error, ESTALE).at("a node of before", 0)?;
    let error = fs.call(READ, node, &Arguments::io(handle, 0, 8))?;
    wanted(error, EBADF).at("a handle of before", 0)?;
    fs.ask()
}

fn nothing_is_served(fs: &mut Fs) -> Outcome {
    let requests = [
        (GETATTR, Arguments::of(&[0, 0])),
        (LOOKUP, Arguments::named(FILE)),
        (OPEN, Arguments::of(&[0])),
        (OPENDIR, Arguments::of(&[0])),
        (READ, Arguments::io(1, 0, 8)),
        (STATFS, Arguments::none()),
        (MKDIR, Arguments::of(&[0]).name(b"none")),
        (UNLINK, Arguments::named(FILE)),
        (RELEASE, Arguments::of(&[1, 0, 0])),
        (SYNCFS, Arguments::of(&[0])),
    ];
    for (operation, arguments) in requests {
        let error = fs.call(operation, ROOT, &arguments)?;
        wanted(error, EPROTO).at("out of time", operation.into())?;
    }
    fs.forget(ROOT, 1)
}

/// What is more than a name, or less (U3, U6).
pub(super) fn names(fs: &mut Fs) -> Outcome {
    const LONG: [u8; 256] = [b'x'; 256];
    const BAD: [(&[u8], i32); 11] = [
        (b"", EINVAL),
        (b".", EINVAL),
        (b"..", EINVAL),
        (b"/", EINVAL),
        (b"/etc", EINVAL),
        (b"a/b", EINVAL),
        (b"../honest", EINVAL),
        (b"honest/", EINVAL),
        (b"./honest", EINVAL),
        // An end within, so that something is behind it.
        (b"honest\0more", EINVAL),
        (&LONG, ENAMETOOLONG),
    ];
    fs.recovers()?;
    for (number, (name, expected)) in (0..).zip(BAD) {
        let requests = [
            (LOOKUP, Arguments::named(name)),
            (UNLINK, Arguments::named(name)),
            (RMDIR, Arguments::named(name)),
            (MKDIR, Arguments::of(&[0o755]).name(name)),
            (MKNOD, Arguments::of(&[0o10_0644, 0]).name(name)),
            (CREATE, Arguments::of(&[0o644 << 32 | 2, 0]).name(name)),
            (LINK, Arguments::of(&[ROOT]).name(name)),
        ];
        for (operation, arguments) in requests {
            let error = fs.call(operation, ROOT, &arguments)?;
            wanted(error, expected).at("a name", number << 32 | u64::from(operation))?;
        }
        // Two names, of which either is none; a third one behind them is refused as well.
        for operation in [RENAME, RENAME2] {
            let start = match operation {
                RENAME => Arguments::of(&[ROOT]),
                _ => Arguments::of(&[ROOT, 0]),
            };
            for arguments in [
                start.clone().name(name).name(b"new"),
                start.name(FILE).name(name),
            ] {
                let error = fs.call(operation, ROOT, &arguments)?;
                wanted(error, expected).at("two names", number << 32 | u64::from(operation))?;
            }
        }
    }
    for operation in [LOOKUP, UNLINK, RMDIR] {
        let error = fs.call(operation, ROOT, &Arguments::none().bytes(FILE))?;
        wanted(error, EINVAL).at("a name without end", operation.into())?;
    }
    let error = fs.call(LOOKUP, ROOT, &Arguments::named(b"CON"))?;
    wanted(error, ENOENT).at("a name that is not there", 0)?;
    // No text, and a name all the same.
    let strange = b"\xff\xfe\x01 \n";
    fs.well(MKDIR, ROOT, &Arguments::of(&[0o755]).name(strange))?;
    let directory = peek::<u64>(REPLY + u64::from(OUT_HEADER));
    let into_itself = Arguments::of(&[directory]).name(strange).name(b"deeper");
    let error = fs.call(RENAME, ROOT, &into_itself)?;
    wanted(error, EINVAL).at("a directory into itself", 0)?;
    fs.well(RMDIR, ROOT, &Arguments::named(strange))?;
    fs.forget(directory, 1)?;
    fs.ask()
}

/// Numbers that were never given, were given back, or are another's (U4).
pub(super) fn nodes(fs: &mut Fs) -> Outcome {
    const GONE: [u64; 6] = [0, 2, 12_345, 1 << 32 | 1, 1 << 63, u64::MAX];
    fs.recovers()?;
    let attributes = Arguments::of(&[0, 0]);
    for node in GONE {
        // The honest file's number is small; it was forgotten.
        let error = fs.call(GETATTR, node, &attributes)?;
        wanted(error, ESTALE).at("a node", node)?;
        let error = fs.call(LOOKUP, node, &Arguments::named(FILE))?;
        wanted(error, ESTALE).at("a parent", node)?;
        let error = fs.call(OPEN, node, &Arguments::of(&[0]))?;
        wanted(error, ESTALE).at("a file", node)?;
        let error = fs.call(
            RENAME,
            ROOT,
            &Arguments::of(&[node]).name(FILE).name(b"new"),
        )?;
        wanted(error, ESTALE).at("a new parent", node)?;
        let error = fs.call(LINK, ROOT, &Arguments::of(&[node]).name(b"new"))?;
        wanted(error, ESTALE).at("a target", node)?;
    }
    let node = fs.lookup(FILE)?;
    handles(fs, node)?;
    // More is given back than was taken; the root is never gone.
    for lookups in [u64::MAX, 1, u64::MAX] {
        fs.forget(node, lookups)?;
        fs.forget(ROOT, lookups)?;
    }
    let error = fs.call(GETATTR, node, &attributes)?;
    wanted(error, ESTALE).at("a forgotten node", 0)?;
    fs.well(GETATTR, ROOT, &attributes)?;
    for count in [0, 1, 2, 3, 0x1000_0001, u32::MAX] {
        // Two are there, whatever it says.
        let two = Arguments::none().u32(count).u32(0);
        let length = fs.put(BATCH_FORGET, 0, &two.u64(ROOT).u64(9).u64(77).u64(u64::MAX));
        let written = fs.send(FORGETS, &[readable(REQUEST, length), writable(REPLY, ROOM)])?;
        same("bytes written", written, 0u32).at("forgets", count.into())?;
    }
    for unique in [0, 1, u64::MAX] {
        let length = fs.put(INTERRUPT, 0, &Arguments::of(&[unique]));
        let written = fs.send(FORGETS, &[readable(REQUEST, length)])?;
        same("bytes written", written, 0u32).at("an interrupt", unique)?;
    }
    fs.ask()
}

/// Handles that were never given, are another file's, or were given back.
fn handles(fs: &mut Fs, node: u64) -> Outcome {
    let handle = fs.open(node)?;
    for (node, handle) in [
        (node, 0),
        (node, handle + 1),
        (node, u64::MAX),
        (ROOT, handle),
        (0, handle),
        (u64::MAX, handle),
    ] {
        for (operation, arguments) in [
            (READ, Arguments::io(handle, 0, 8)),
            (READDIR, Arguments::io(handle, 0, 512)),
            (RELEASE, Arguments::of(&[handle, 0, 0])),
            (RELEASEDIR, Arguments::of(&[handle, 0, 0])),
            (FLUSH, Arguments::of(&[handle, 0, 0])),
            (FSYNC, Arguments::of(&[handle, 0])),
            (LSEEK, Arguments::of(&[handle, 0, 0])),
            (FALLOCATE, Arguments::of(&[handle, 0, 1, 0])),
        ] {
            let error = fs.call(operation, node, &arguments)?;
            wanted(error, EBADF).at("a handle", u64::from(operation))?;
        }
        let error = fs.write(node, &Arguments::io(handle, 0, 8), 8)?;
        wanted(error, EBADF).at("a handle to write", handle)?;
    }
    fs.well(RELEASE, node, &Arguments::of(&[handle, 0, 0]))?;
    let error = fs.call(RELEASE, node, &Arguments::of(&[handle, 0, 0]))?;
    wanted(error, EBADF).at("released twice", 0)
}

/// Links that lead out, devices, and what is no file (U5, U7; CVE-2020-35517).
pub(super) fn special(fs: &mut Fs) -> Outcome {
    const WAY: &[u8] = b"way";
    const OPENS: [u64; 4] = [0, 1, 2, 0x400_0242];
    fs.recovers()?;
    for target in [
        &b"/etc/shadow"[..],
        b"../../../../etc/shadow",
        b"/proc/1/root",
        b".",
    ] {
        let arguments = Arguments::named(WAY).name(target);
        fs.well(SYMLINK, ROOT, &arguments)?;
        let link = peek::<u64>(REPLY + u64::from(OUT_HEADER));
        not_opened(fs, link, &OPENS)?;
        fs.well(UNLINK, ROOT, &Arguments::named(WAY))?;
        fs.forget(link, 1)?;
    }
    for name in [&b"outside"[..], b"fifo"] {
        let node = fs.lookup(name)?;
        not_opened(fs, node, &OPENS)?;
        // Whoever creates what is there opens it.
        let error = fs.call(
            CREATE,
            ROOT,
            &Arguments::of(&[0o644 << 32 | 2, 0]).name(name),
        )?;
        same("refused", error != OK, true).at("created over", 0)?;
        fs.forget(node, 1)?;
    }
    for (mode, device) in [
        (0o2_0666u64, 0x103u64), // /dev/null
        (0o6_0666, 0x800),       // /dev/sda
        (0o6_0666, 0),
        (0o2_0666, 1),
    ] {
        let arguments = Arguments::of(&[device << 32 | mode, 0]).name(WAY);
        let error = fs.call(MKNOD, ROOT, &arguments)?;
        wanted(error, EPERM).at("a device", device << 32 | mode)?;
    }
    for mode in [0o4_0755u64, 0o12_0777, 0o17_0000] {
        let error = fs.call(MKNOD, ROOT, &Arguments::of(&[mode, 0]).name(WAY))?;
        wanted(error, EINVAL).at("no kind of file", mode)?;
    }
    fs.ask()
}

/// Neither opened nor gone through, in whatever way.
fn not_opened(fs: &mut Fs, node: u64, opens: &[u64]) -> Outcome {
    for flags in opens {
        let error = fs.call(OPEN, node, &Arguments::of(&[*flags]))?;
        wanted(error, EPERM).at("opened", *flags)?;
    }
    let requests = [
        (OPENDIR, Arguments::of(&[0])),
        (LOOKUP, Arguments::named(b"passwd")),
        (CREATE, Arguments::of(&[0o644 << 32 | 2, 0]).name(b"new")),
        (MKDIR, Arguments::of(&[0o755]).name(b"new")),
        (UNLINK, Arguments::named(b"passwd")),
        // Its size.
        (
            SETATTR,
            Arguments::of(&[1 << 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ),
    ];
    for (operation, arguments) in requests {
        let error = fs.call(operation, node, &arguments)?;
        same("refused", error != OK, true).at("operation", operation.into())?;
    }
    Ok(())
}

/// Sums that overflow, sizes that nobody has, ends that no file has (U8 to U10).
pub(super) fn sizes(fs: &mut Fs) -> Outcome {
    const MAX: u64 = i64::MAX as u64;
    fs.recovers()?;
    let node = fs.lookup(FILE)?;
    let handle = fs.open(node)?;
    for (offset, size, expected) in [
        (0, u32::MAX, OK),
        (1 << 40, u32::MAX, OK),
        (MAX - 8, 8, OK),
        (MAX, 8, EINVAL),
        (MAX, u32::MAX, EINVAL),
        (1 << 63, 1, EINVAL),
        (u64::MAX, u32::MAX, EINVAL),
    ] {
        let error = fs.call(READ, node, &Arguments::io(handle, offset, size))?;
        wanted(error, expected).at("read at", offset)?;
    }
    for (offset, size, data, expected) in [
        (0, 0, 8, EINVAL),
        (0, 9, 8, EINVAL),
        (0, u32::MAX, 8, EINVAL),
        (0, 8, 2 << 20, EINVAL),
        (0, 2 << 20, 2 << 20, EINVAL),
        (MAX, 8, 8, EFBIG),
        (1 << 63, 8, 8, EFBIG),
        (u64::MAX, 8, 8, EFBIG),
    ] {
        let error = fs.write(node, &Arguments::io(handle, offset, size), data)?;
        wanted(error, expected).at("written at", offset)?;
    }
    let setattr = |valid: u64, size: u64, owner: u64| {
        Arguments::of(&[valid, 0, size, 0, 0, 0, 0, 0, 0, owner, owner])
    };
    for (number, arguments, expected) in [
        (0, setattr(1 << 3, 1 << 63, 0), EFBIG),
        (1, setattr(1 << 3, u64::MAX, 0), EFBIG),
        // Of uid and gid -1 means "leave it" to the host.
        (2, setattr(1 << 1, 0, u64::MAX), EINVAL),
        (3, setattr(1 << 2, 0, u64::MAX), EINVAL),
    ] {
        let error = fs.call(SETATTR, node, &arguments)?;
        wanted(error, expected).at("attributes", number)?;
    }
    for (offset, length) in [(0, 1 << 63), (MAX, MAX), (u64::MAX, 1), (0, u64::MAX)] {
        let error = fs.call(
            FALLOCATE,
            node,
            &Arguments::of(&[handle, offset, length, 0]),
        )?;
        wanted(error, EFBIG).at("allocated at", offset)?;
    }
    for whence in [5, 0x8000_0000, u32::MAX] {
        let arguments = Arguments::of(&[handle, 0]).u32(whence).u32(0);
        let error = fs.call(LSEEK, node, &arguments)?;
        wanted(error, EINVAL).at("whence", whence.into())?;
    }
    let copy = [handle, MAX, node, handle, MAX, u64::MAX, 0];
    let error = fs.call(COPY_FILE_RANGE, node, &Arguments::of(&copy))?;
    same("refused", error != OK, true).at("copied beyond", 0)?;
    directories(fs)?;
    attributes(fs, node)?;
    fs.well(RELEASE, node, &Arguments::of(&[handle, 0, 0]))?;
    fs.ask()
}

/// Room for no entry, and places that no directory has.
fn directories(fs: &mut Fs) -> Outcome {
    fs.well(OPENDIR, ROOT, &Arguments::of(&[0]))?;
    let handle = peek::<u64>(REPLY + u64::from(OUT_HEADER));
    for operation in [READDIR, READDIRPLUS] {
        for offset in [0, 1, 1 << 62, i64::MAX as u64, 1 << 63, u64::MAX] {
            for size in [0, 1, 23, 512, u32::MAX] {
                // Whether that is an error is the host's file system's to say.
                fs.call(operation, ROOT, &Arguments::io(handle, offset, size))?;
                let bytes = peek::<u32>(REPLY);
                let most = OUT_HEADER.saturating_add(size).min(ROOM);
                same("no more than wanted", bytes <= most, true).at("directory at", offset)?;
            }
        }
    }
    fs.well(RELEASEDIR, ROOT, &Arguments::of(&[handle, 0, 0]))
}

/// Extended attributes that are too long, or not the guest's to have.
fn attributes(fs: &mut Fs, node: u64) -> Outcome {
    const LONG: [u8; 300] = [b'x'; 300];
    for (number, name, size) in [
        (0, &b"trusted.overlay.opaque"[..], 8u32),
        (1, b"user.honest", 0x1_0001),
        (2, b"user.honest", u32::MAX),
        (3, b"", 8),
        (4, &LONG, 8),
        (5, b"honest", 8),
    ] {
        let arguments = Arguments::none().u32(size).u32(0).name(name);
        let error = fs.call(SETXATTR, node, &arguments.bytes(&[0; 8]))?;
        same("refused", error != OK, true).at("an attribute", number)?;
    }
    for size in [1, 0x1_0001, u32::MAX] {
        let arguments = Arguments::none().u32(size).u32(0);
        let error = fs.call(GETXATTR, node, &arguments.clone().name(b"user.none"))?;
        same("refused", error != OK, true).at("no attribute", size.into())?;
        fs.call(LISTXATTR, node, &arguments)?;
        same("an answer", peek::<u32>(REPLY) <= ROOM, true).at("attributes", size.into())?;
    }
    Ok(())
}

/// As many files as the share may have open, and one more; they all go with the session (B3.6).
pub(super) fn opens(fs: &mut Fs) -> Outcome {
    const MORE_THAN_ANY: u32 = 20_000;
    fs.recovers()?;
    let node = fs.lookup(FILE)?;
    let length = fs.put(OPEN, node, &Arguments::of(&[0]));
    let mut opened = 0;
    let mut error = OK;
    while error == OK {
        // As many at once as the queue holds, in each of two entries.
        let ring = &mut fs.rings[REQUESTS];
        let reply = |head: u16| REPLY + u64::from(ROOM) * u64::from(head);
        for head in (0..ring.size).step_by(2) {
            ring.chain(
                head,
                &[readable(REQUEST, length), writable(reply(head), ROOM)],
            );
            ring.offer(head);
        }
        fs.device.kick(REQUESTS as u16);
        for _ in (0..fs.rings[REQUESTS].size).step_by(2) {
            let (head, _) = fs.device.answer(&mut fs.rings[REQUESTS])?;
            match peek::<u32>(reply(head as u16) + 4).wrapping_neg() as i32 {
                OK => opened += 1,
                other => error = other,
            }
        }
        same("fewer than all", opened < MORE_THAN_ANY, true)?;
    }
    wanted(error, ENFILE).at("opened", opened.into())?;
    // What needs no handle still works.
    fs.well(GETATTR, node, &Arguments::of(&[0, 0]))?;
    fs.well(DESTROY, 0, &Arguments::none())?;
    fs.ask()
}

/// When a reset is done, nothing writes the driver's memory any more.
pub(super) fn resets(fs: &mut Fs) -> Outcome {
    const ROUNDS: u64 = 20;
    const BYTES: u32 = 1 << 20;
    const LOOKS: u32 = 100;
    let last = REPLY + u64::from(OUT_HEADER + BYTES) - 8;
    for round in 0..ROUNDS {
        fs.up(0)?;
        fs.begin()?;
        let node = fs.lookup(b"large")?;
        fs.well(OPEN, node, &Arguments::of(&[0]))?;
        let handle = peek::<u64>(REPLY + u64::from(OUT_HEADER));
        let length = fs.put(READ, node, &Arguments::io(handle, 0, BYTES));
        let ring = &mut fs.rings[REQUESTS];
        for head in (0..ring.size).step_by(2) {
            let chain = [
                readable(REQUEST, length),
                writable(REPLY, OUT_HEADER + BYTES),
            ];
            ring.chain(head, &chain);
            ring.offer(head);
        }
        fs.device.kick(REQUESTS as u16);
        fs.device.reset().at("round", round)?;
        let used = fs.rings[REQUESTS].used_index();
        for place in [REPLY, last] {
            poke(place, NOTHING);
        }
        for _ in 0..LOOKS {
            for place in [REPLY, last] {
                same("memory after a reset", peek::<u64>(place), NOTHING).at("round", round)?;
            }
        }
        same("the used index", fs.rings[REQUESTS].used_index(), used).at("round", round)?;
    }
    Ok(())
}
