//! Seeds that honest drivers and makers of images make. `cargo test -p capsid-fuzz -- --ignored` writes them anew; the others in
//! `seeds/` are real documents and kernels, or inputs that once found something.

use crate::layer::{Entry, form};
use crate::program::{Act, shape};
use crate::vsock::packet;
use crate::{TARGETS, run};
use std::fs;
use std::path::{Path, PathBuf};

/// The file name of a target's seed that is made here.
type Made = (&'static str, &'static str, Vec<u8>);

fn made() -> Vec<Made> {
    [queue(), blk(), net(), vsock(), share(), layer()].concat()
}

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds")
}

#[test]
fn every_seed_holds() {
    for (name, ..) in TARGETS {
        let mut count = 0;
        for seed in fs::read_dir(directory().join(name)).expect("seeds of each target") {
            run(
                name,
                &fs::read(seed.expect("a seed").path()).expect("a file"),
            );
            count += 1;
        }
        assert!(count > 0, "{name} has no seeds");
    }
}

#[test]
fn seeds_of_targets_that_change_files_can_be_tried() {
    if !crate::cell::possible() {
        eprintln!("SKIPPED: fs and layer: a place to change files in takes root");
    }
}

#[test]
fn seeds_are_what_honest_drivers_make() {
    for (target, name, bytes) in made() {
        let kept = fs::read(directory().join(target).join(name));
        assert!(
            kept.is_ok_and(|kept| kept == bytes),
            "{target}/{name} is to be written anew"
        );
    }
}

#[test]
#[ignore = "it writes the seeds"]
fn write_the_seeds() {
    for (target, name, bytes) in made() {
        let directory = directory().join(target);
        fs::create_dir_all(&directory).expect("a directory");
        fs::write(directory.join(name), bytes).expect("a file");
    }
}

fn program(acts: &[Act]) -> Vec<u8> {
    let mut bytes = Vec::new();
    acts.iter().for_each(|act| act.write(&mut bytes));
    bytes
}

fn up(size_log: u8) -> Act {
    Act::Up {
        features: u64::MAX,
        queues: u32::MAX,
        size_log,
    }
}

fn chain(queue: u8, readable: &[u8], writable: &[u16]) -> Act {
    shaped(queue, shape::KICK, readable, writable)
}

fn shaped(queue: u8, shape: u8, readable: &[u8], writable: &[u16]) -> Act {
    Act::Chain {
        queue,
        shape,
        readable: readable.to_vec(),
        writable: writable.to_vec(),
    }
}

fn own(kind: u8, bytes: &[u8]) -> Act {
    Act::Own {
        kind,
        bytes: bytes.to_vec(),
    }
}

/// Descriptors one by one, and then an index that no driver has.
fn raw() -> Vec<Act> {
    vec![
        up(3),
        Act::Descriptor {
            queue: 0,
            slot: 0,
            address: 0x5000,
            length: 64,
            flags: 1,
            next: 1,
        },
        Act::Descriptor {
            queue: 0,
            slot: 1,
            address: 0x1_0000,
            length: 0x100,
            flags: 2,
            next: 0,
        },
        Act::Poke {
            address: 0x5000,
            bytes: vec![9; 64],
        },
        Act::Publish { queue: 0, head: 0 },
        Act::Kick(0),
        Act::Settle,
        Act::Index {
            queue: 0,
            index: 40,
        },
        Act::Kick(0),
        Act::Settle,
    ]
}

fn queue() -> Vec<Made> {
    let text = [0x33; 48];
    let pieces = shape::KICK | shape::PIECES;
    let echo = [
        up(3),
        chain(0, &text, &[8, 100]),
        Act::Settle,
        shaped(0, pieces | shape::INDIRECT, &text, &[40, 4, 4]),
        shaped(1, pieces, &text, &[]),
        Act::Events {
            queue: 0,
            flags: 1,
            event: 2,
        },
        chain(0, &[], &[16]),
        Act::Settle,
        Act::Reset,
        up(0),
        chain(0, &text, &[]),
        Act::Turn,
    ];
    let later = [
        up(4),
        own(0, &[4]),
        shaped(0, 0, &text, &[20]),
        shaped(0, shape::INDIRECT, &[], &[30, 5]),
        chain(0, &text, &[]),
        Act::Settle,
        own(1, &[1]),
        Act::Pause,
        own(3, &[0]),
        own(2, &[4]),
        Act::Settle,
        chain(1, &text, &[1]),
        Act::Turn,
        Act::Reset,
        own(1, &[0]),
    ];
    vec![
        ("queue", "echo", program(&echo)),
        ("queue", "later", program(&later)),
        ("queue", "raw", program(&raw())),
    ]
}

/// A request of a disk (section 5.2.6): type, sector, data.
fn request(kind: u32, sector: u64, data: &[u8]) -> Vec<u8> {
    let mut request = kind.to_le_bytes().to_vec();
    request.extend([0; 4]);
    request.extend(sector.to_le_bytes());
    request.extend(data);
    request
}

/// A range to discard or to zero.
fn range(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    let mut range = sector.to_le_bytes().to_vec();
    range.extend(count.to_le_bytes());
    range.extend(flags.to_le_bytes());
    range
}

fn blk() -> Vec<Made> {
    let work = own(0, &[0]);
    let with = |form: u8, acts: &[Act]| [&[form][..], &program(acts)].concat();
    let serving = [
        up(6),
        chain(0, &request(0, 3, &[]), &[512, 1]),
        chain(1, &request(1, 5, &[0xcc; 512]), &[1]),
        chain(0, &request(4, 0, &[]), &[1]),
        chain(0, &request(8, 0, &[]), &[20, 1]),
        Act::Settle,
        work.clone(),
        Act::Settle,
        Act::Pause,
        shaped(
            0,
            shape::KICK | shape::INDIRECT | shape::PIECES,
            &request(1, 9, &[0xdd; 1024]),
            &[1],
        ),
        Act::Settle,
        own(0, &[1]),
        Act::Settle,
    ];
    let ranges = [range(8, 4, 0), range(20, 8, 1)].concat();
    let giving_up = [
        up(5),
        chain(0, &request(11, 0, &range(2, 3, 0)), &[1]),
        chain(0, &request(13, 0, &ranges), &[1]),
        Act::Settle,
        work.clone(),
        Act::Settle,
        work.clone(),
        Act::Settle,
    ];
    let pause = [
        up(5),
        chain(0, &request(0, 0, &[]), &[512, 1]),
        Act::Settle,
        Act::Pause,
        chain(0, &request(1, 7, &[1; 512]), &[1]),
        Act::Settle,
        own(1, &[]),
        chain(1, &request(4, 0, &[]), &[1]),
        Act::Settle,
        work.clone(),
    ];
    let reset = [
        up(5),
        chain(0, &request(0, 0, &[]), &[2048, 1]),
        chain(0, &request(1, 0, &[1; 512]), &[1]),
        Act::Settle,
        own(0, &[1]),
        Act::Reset,
        up(4),
        chain(0, &request(0, 0, &[]), &[1024, 1]),
        Act::Settle,
        work,
    ];
    vec![
        ("blk", "serving", with(0, &serving)),
        ("blk", "read-only", with(1, &serving)),
        ("blk", "giving-up", with(0, &giving_up)),
        ("blk", "pause", with(0, &pause)),
        ("blk", "reset-under-way", with(0, &reset)),
    ]
}

/// A packet: the header of virtio, two addresses, a type, a text.
fn frame() -> Vec<u8> {
    let mut packet = vec![0; 12];
    packet.extend([0xff; 6]);
    packet.extend([2, 0, 0, 0, 0, 7, 8, 0]);
    packet.extend(b"a packet");
    packet
}

fn net() -> Vec<Made> {
    let with = |form: u8, acts: &[Act]| [&[form][..], &program(acts)].concat();
    let packet = frame();
    let from_host = |which: u8, length: u16| {
        let mut bytes = vec![which];
        bytes.extend(length.to_le_bytes());
        bytes.extend(&packet);
        own(0, &bytes)
    };
    let both_ways = [
        up(5),
        chain(0, &[], &[1526]),
        chain(0, &[], &[1526]),
        chain(1, &packet, &[]),
        Act::Settle,
        from_host(0, 60),
        Act::Pause,
        from_host(0, 1500),
        Act::Settle,
        own(1, &[0]),
        own(2, &[0]),
        chain(1, &packet, &[]),
        Act::Settle,
        own(2, &[2]),
        from_host(0, 60),
        Act::Settle,
        own(3, &[0]),
        Act::Settle,
    ];
    let merged: Vec<Act> = std::iter::once(up(6))
        .chain((0..20).map(|_| chain(0, &[], &[4096])))
        .chain([Act::Settle, from_host(0, 40_000), Act::Settle])
        .collect();
    let one_by_one = [
        Act::Up {
            features: 1 << 32,
            queues: 3,
            size_log: 3,
        },
        from_host(0, 1000),
        Act::Settle,
        chain(0, &[], &[100]),
        Act::Settle,
        chain(0, &[], &[12, 1514]),
        from_host(0, 1000),
        Act::Settle,
    ];
    let full: Vec<Act> = std::iter::once(up(6))
        .chain((0..20).map(|_| chain(1, &packet, &[])))
        .chain([Act::Settle, own(1, &[0]), Act::Settle, own(1, &[0])])
        .collect();
    let pairs = [
        up(4),
        chain(4, &[4, 0, 2, 0], &[1]),
        chain(2, &[], &[2000]),
        chain(3, &packet, &[]),
        Act::Settle,
        from_host(1, 90),
        Act::Settle,
        own(1, &[1]),
    ];
    vec![
        ("net", "both-ways", with(0, &both_ways)),
        ("net", "merged", with(0, &merged)),
        ("net", "one-by-one", with(0, &one_by_one)),
        ("net", "full", with(0, &full)),
        ("net", "pairs", with(1, &pairs)),
    ]
}

/// Operations of vsock (section 5.10.6).
mod op {
    pub(super) const REQUEST: u16 = 1;
    pub(super) const RESPONSE: u16 = 2;
    pub(super) const RST: u16 = 3;
    pub(super) const SHUTDOWN: u16 = 4;
    pub(super) const RW: u16 = 5;
    pub(super) const CREDIT_REQUEST: u16 = 7;
}

/// Receive buffers, one of which is in two pieces.
fn lend() -> [Act; 2] {
    [chain(0, &[], &[4096]), chain(0, &[], &[44, 1000])]
}

fn guest_connects() -> Vec<Act> {
    let send = |op, flags, payload: &[u8]| chain(1, &packet(op, 1024, 9, flags, payload), &[]);
    [
        vec![up(6)],
        lend().to_vec(),
        vec![chain(2, &[], &[4]), send(op::REQUEST, 0, &[]), Act::Settle],
        lend().to_vec(),
        vec![
            send(op::RW, 0, b"from the guest"),
            own(1, &[0, 20, 0]),
            Act::Settle,
            own(2, &[0]),
            send(op::CREDIT_REQUEST, 0, &[]),
            Act::Settle,
        ],
        lend().to_vec(),
        vec![
            own(3, &[0]),
            Act::Settle,
            send(op::SHUTDOWN, 3, &[]),
            Act::Settle,
            own(4, &[0]),
            Act::Settle,
        ],
    ]
    .concat()
}

fn host_connects() -> Vec<Act> {
    // The first port that the host's side has.
    let answer = |op, payload: &[u8]| chain(1, &packet(op, 1 << 30, 5, 0, payload), &[]);
    [
        vec![up(6)],
        lend().to_vec(),
        lend().to_vec(),
        vec![
            own(0, &[5]),
            Act::Pause,
            Act::Settle,
            answer(op::RESPONSE, &[]),
            own(1, &[0, 200, 0]),
            Act::Settle,
            answer(op::RW, &[7; 100]),
            Act::Settle,
            own(4, &[0]),
            Act::Settle,
            answer(op::RST, &[]),
            Act::Settle,
        ],
    ]
    .concat()
}

fn vsock() -> Vec<Made> {
    let flood = [
        up(6),
        own(5, &[200, 0, 1]),
        own(5, &[200, 0, 2]),
        Act::Reset,
        up(6),
        own(5, &[20, 0, 1]),
    ];
    vec![
        ("vsock", "guest", program(&guest_connects())),
        ("vsock", "host", program(&host_connects())),
        ("vsock", "flood", program(&flood)),
    ]
}

/// A FUSE request (`include/uapi/linux/fuse.h`): opcode, node, arguments.
fn fuse(opcode: u32, node: u64, arguments: &[u8], room: u16) -> Act {
    let mut request = (40 + arguments.len() as u32).to_le_bytes().to_vec();
    request.extend(opcode.to_le_bytes());
    request.extend(u64::from(opcode).to_le_bytes());
    request.extend(node.to_le_bytes());
    request.extend([0; 16]);
    request.extend(arguments);
    match room {
        0 => chain(0, &request, &[]),
        room => chain(1, &request, &[16, room]),
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn with_text(numbers: &[u32], text: &[u8]) -> Vec<u8> {
    [words(numbers), text.to_vec()].concat()
}

/// `struct fuse_read_in` or the like of a file handle, with what is written.
fn span(handle: u32, offset: u32, size: u32, data: &[u8]) -> Vec<u8> {
    let numbers = [handle, 0, offset, 0, size, 0, 0, 0, 0, 0];
    with_text(&numbers, data)
}

fn reading() -> Vec<Act> {
    vec![
        fuse(1, 1, b"file\0", 128),
        fuse(3, 2, &words(&[0; 4]), 104),
        fuse(14, 2, &words(&[0, 0]), 16),
        Act::Pause,
        fuse(15, 2, &span(1, 0, 100, &[]), 100),
        fuse(46, 2, &words(&[1, 0, 0, 0, 4, 0]), 8),
        fuse(25, 2, &words(&[1, 0, 0, 0, 0, 0]), 0x10),
        fuse(18, 2, &words(&[1, 0, 0, 0, 0, 0]), 0x10),
        Act::Settle,
        fuse(1, 1, b"directory\0", 128),
        fuse(27, 3, &words(&[0, 0]), 16),
        fuse(28, 3, &span(2, 0, 1000, &[]), 1000),
        fuse(44, 3, &span(2, 0, 2000, &[]), 2000),
        fuse(29, 3, &words(&[2, 0, 0, 0, 0, 0]), 0x10),
        fuse(1, 1, b"link\0", 128),
        fuse(5, 4, &[], 100),
        fuse(17, 1, &[], 80),
        fuse(2, 4, &words(&[1, 0]), 0),
        Act::Settle,
    ]
}

fn writing() -> Vec<Act> {
    vec![
        fuse(35, 1, &with_text(&[2, 0o644, 0, 0], b"new\0"), 144),
        fuse(16, 2, &span(1, 10, 300, &[0x77; 300]), 8),
        fuse(43, 2, &words(&[1, 0, 0, 0, 9000, 0, 0, 0]), 0x10),
        fuse(20, 2, &words(&[1, 0, 0, 0]), 0x10),
        Act::Settle,
        fuse(9, 1, &with_text(&[0o755, 0], b"made\0"), 128),
        fuse(45, 1, &with_text(&[3, 0, 0, 0], b"new\0moved\0"), 0x10),
        fuse(6, 3, b"pointer\0../moved\0", 128),
        fuse(8, 3, &with_text(&[0o10644, 0, 0, 0], b"fifo\0"), 128),
        fuse(13, 1, &with_text(&[2, 0], b"again\0"), 128),
        Act::Settle,
        fuse(21, 2, &with_text(&[5, 0], b"user.a\0value"), 0x10),
        fuse(22, 2, &with_text(&[64, 0], b"user.a\0"), 64),
        fuse(23, 2, &words(&[64, 0]), 64),
        fuse(24, 2, b"user.a\0", 0x10),
        fuse(
            4,
            2,
            &words(&[
                9, 0, 1, 0, 20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0o600, 0, 0, 0, 0,
            ]),
            104,
        ),
        fuse(10, 1, b"again\0", 0x10),
        fuse(11, 3, b"made\0", 0x10),
        fuse(50, 1, &words(&[0, 0]), 0x10),
        Act::Settle,
        fuse(42, 0, &words(&[1, 0, 2, 0, 1, 0]), 0),
        Act::Settle,
        fuse(38, 0, &[], 0x10),
        Act::Settle,
    ]
}

fn share() -> Vec<Made> {
    let mut init = vec![7, 38, 1 << 17, u32::MAX, 0];
    init.resize(16, 0);
    let begun = [up(6), fuse(26, 0, &words(&init), 64)];
    vec![
        ("fs", "reading", program(&[&begun[..], &reading()].concat())),
        ("fs", "writing", program(&[&begun[..], &writing()].concat())),
    ]
}

fn layer() -> Vec<Made> {
    let entry = |kind: u8, path: &[u8], link: &[u8], data: &[u8]| Entry {
        kind,
        path: path.to_vec(),
        link: link.to_vec(),
        mode: 0o755,
        lie: 0,
        data: data.to_vec(),
    };
    let tree = [
        entry(b'5', b"usr/", b"", b""),
        entry(b'0', b"usr/file", b"", b"text"),
        entry(b'1', b"hard", b"usr/file", b""),
        entry(b'2', b"lib", b"usr", b""),
        entry(b'0', b"lib/through", b"", &[5; 700]),
        entry(b'6', b"pipe", b"", b""),
        entry(b'3', b"dev/null", b"", b""),
    ];
    let out = [
        entry(b'2', b"out", b"../../outside", b""),
        entry(b'0', b"out/canary", b"", b"a stranger's"),
    ];
    let changes = [
        entry(b'0', b".wh.gone", b"", b""),
        entry(b'5', b"etc", b"", b""),
        entry(b'0', b"etc/.wh..wh..opq", b"", b""),
        entry(b'0', b"etc/.wh.passwd", b"", b""),
        entry(b'5', b"gone", b"", b""),
        entry(b'0', b"etc", b"", b"now a file"),
    ];
    let extended = [
        entry(
            b'x',
            b"pax",
            b"",
            b"17 path=a/longer\n27 mtime=1700000000.500000\n29 SCHILY.xattr.user.a=value\n",
        ),
        entry(b'0', b"short", b"", b"of a longer name"),
        entry(b'L', b"././@LongLink", b"", b"b/name/of/GNU\0"),
        entry(b'0', b"cut", b"", b"x"),
        entry(b'K', b"././@LongLink", b"", b"a/longer\0"),
        entry(b'2', b"symbolic", b"cut", b""),
        entry(b'g', b"comment", b"", b"19 comment=nothing\n"),
    ];
    let made = |form: u8, entries: &[Entry]| {
        let mut bytes = vec![form];
        entries.iter().for_each(|entry| entry.write(&mut bytes));
        bytes
    };
    vec![
        ("layer", "tree", made(form::PLAIN, &tree)),
        ("layer", "out", made(form::PLAIN, &out)),
        ("layer", "changes", made(form::PLAIN, &changes)),
        ("layer", "extended", made(form::PLAIN, &extended)),
        ("layer", "gzip", made(form::GZIP, &tree)),
        ("layer", "zstd", made(form::ZSTD, &changes)),
        ("layer", "nothing", vec![form::RAW; 1025]),
    ]
}
