//! What a guest does in the benchmarks of devices: the one list for the guest's init, which does it, and for the host's side, which
//! serves it and takes its time. Pure.

use serde_json::{Value, json};

/// The disk, and the file that is read through a share, in bytes.
pub const STORE_BYTES: usize = 64 << 20;
/// Bytes of one random access.
const BLOCK_BYTES: usize = 4 << 10;
/// Bytes of one access in order.
const RUN_BYTES: usize = 1 << 20;
/// Bytes of one stream.
const STREAM_BYTES: usize = 32 << 20;
/// Bytes of one ping and its answer.
const PING_BYTES: usize = 64;
/// Random accesses of a round.
const BLOCKS: usize = 2_000;
/// Pings of a round.
const PINGS: usize = 500;
/// Files of the archive.
pub const ARCHIVE_FILES: usize = 500;
/// Bytes of each; those in the tree are empty.
pub const SMALL_FILE_BYTES: usize = 4 << 10;
/// No boot and no round takes longer, in seconds; the clock of an emulated host runs ahead while it waits for its disk.
pub const ROUND_TIMEOUT_SECONDS: i64 = 60;

/// The device whose loads are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Device {
    /// A disk.
    Blk,
    /// A network card.
    Net,
    /// Sockets between guest and host.
    Vsock,
    /// A shared directory.
    Fs,
}

impl Device {
    /// Its name in the results.
    pub fn name(self) -> &'static str {
        match self {
            Device::Blk => "blk",
            Device::Net => "net",
            Device::Vsock => "vsock",
            Device::Fs => "fs",
        }
    }

    /// What is done with it.
    pub fn loads(self) -> &'static [Load] {
        match self {
            Device::Blk => BLK,
            Device::Net => NET,
            Device::Vsock => VSOCK,
            Device::Fs => FS,
        }
    }
}

/// One thing that a guest does again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Its name, which no other load of any device has.
    pub name: &'static str,
    /// What it is.
    pub work: Work,
}

/// What is done in one round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Accesses to the disk past the guest's page cache.
    Disk(Accesses),
    /// Reads of the file in the share, of which nothing is in the guest's page cache when the round begins.
    File(Accesses),
    /// Messages to the host, each answered by it.
    Exchange(Exchange),
    /// ICMP echo requests to the host, one after the other.
    Ping {
        /// How many.
        count: usize,
    },
    /// The archive in the share is unpacked into it.
    Untar,
    /// The directories in the share are walked, and each file's attributes asked for.
    Find,
}

/// Accesses to one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accesses {
    /// At random places, not in order.
    pub random: bool,
    /// Written, not read.
    pub write: bool,
    /// Bytes of each.
    pub bytes: usize,
    /// How many, by all threads together.
    pub count: usize,
    /// Threads, each with one access at a time.
    pub threads: usize,
}

/// Messages and answers on one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// TCP over the network card; else a vsock stream.
    pub tcp: bool,
    /// Bytes of the guest's message.
    pub send: usize,
    /// Bytes of the host's answer.
    pub receive: usize,
    /// How many.
    pub count: usize,
}

const fn blocks(threads: usize) -> Accesses {
    Accesses {
        random: true,
        write: false,
        bytes: BLOCK_BYTES,
        count: BLOCKS,
        threads,
    }
}

const fn in_order(write: bool) -> Accesses {
    Accesses {
        random: false,
        write,
        bytes: RUN_BYTES,
        count: STORE_BYTES / RUN_BYTES,
        threads: 1,
    }
}

const fn exchange(tcp: bool, send: usize, receive: usize, count: usize) -> Work {
    Work::Exchange(Exchange {
        tcp,
        send,
        receive,
        count,
    })
}

const fn load(name: &'static str, work: Work) -> Load {
    Load { name, work }
}

const BLK: &[Load] = &[
    load("random-read", Work::Disk(blocks(1))),
    load("random-read-16", Work::Disk(blocks(16))),
    load("sequential-read", Work::Disk(in_order(false))),
    load("sequential-write", Work::Disk(in_order(true))),
];

const NET: &[Load] = &[
    load("ping", Work::Ping { count: PINGS }),
    load(
        "tcp-ping-pong",
        exchange(true, PING_BYTES, PING_BYTES, PINGS),
    ),
    load("tcp-to-host", exchange(true, STREAM_BYTES, 1, 1)),
    load("tcp-to-guest", exchange(true, 1, STREAM_BYTES, 1)),
];

const VSOCK: &[Load] = &[
    load(
        "vsock-ping-pong",
        exchange(false, PING_BYTES, PING_BYTES, PINGS),
    ),
    load("vsock-to-host", exchange(false, STREAM_BYTES, 1, 1)),
    load("vsock-to-guest", exchange(false, 1, STREAM_BYTES, 1)),
];

const FS: &[Load] = &[
    load("file-sequential", Work::File(in_order(false))),
    load("file-random", Work::File(blocks(1))),
    load("untar", Work::Untar),
    load("find", Work::Find),
];

impl Load {
    /// The load of this name.
    pub fn named(name: &str) -> Option<Load> {
        let all = [BLK, NET, VSOCK, FS].into_iter().flatten();
        all.copied().find(|load| load.name == name)
    }

    /// How many operations a round has and how many bytes it moves, where it is about bytes. `files` are in the share's tree.
    pub fn size(&self, files: usize) -> Value {
        match self.work {
            Work::Disk(accesses) | Work::File(accesses) => {
                json!({"operations": accesses.count, "bytes": accesses.count * accesses.bytes})
            }
            Work::Exchange(exchange) if exchange.count == 1 => {
                json!({"operations": 1, "bytes": exchange.send.max(exchange.receive)})
            }
            Work::Exchange(exchange) => json!({"operations": exchange.count}),
            Work::Ping { count } => json!({"operations": count}),
            Work::Untar => json!({"operations": ARCHIVE_FILES}),
            Work::Find => json!({"operations": files}),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_is_found_by_its_name() {
        let all = [BLK, NET, VSOCK, FS].into_iter().flatten();
        for load in all {
            assert_eq!(Load::named(load.name), Some(*load));
        }
        assert_eq!(Load::named("dance"), None);
    }

    #[test]
    fn threads_share_the_accesses_evenly_and_stay_within_the_disk() {
        for load in BLK.iter().chain(FS) {
            let (Work::Disk(accesses) | Work::File(accesses)) = load.work else {
                continue;
            };
            assert_eq!(accesses.count % accesses.threads, 0, "{}", load.name);
            if !accesses.random {
                assert!(accesses.count * accesses.bytes <= STORE_BYTES);
            }
        }
    }
}
