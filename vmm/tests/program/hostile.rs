//! The hostile guest (`tests/hostile`) against the real program under its filters: the guest abuses a device and says how that
//! answered; here is seen to that the VMM lives, answers its owner all the time, did not grow, does not spin, and ends when
//! it is told to.

use crate::control::channel::Control;
use crate::harness::{Ended, Running, Vmm, can_run, inherited};
use crate::host_side::{ECHOES, HostSide, NEVER_READS, NEVER_STOPS};
use crate::jail::tap;
use crate::owner;
use crate::usage::{busy, busy_since, open_fds, own_memory_kib};
use capsid_protocol::control::{REPLY_TIMEOUT_MS, Reply, Request};
use capsid_protocol::exit::VmmExit;
use capsid_protocol::machine::SHARES_MAX;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::mount::{OpenTreeFlags, open_tree};
use rustix::process::Signal;
use std::fs::{File, create_dir_all, read_dir};
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Where the guest is; `cargo xtask test --suite vmm` builds it and says so.
const GUEST: &str = "CAPSID_HOSTILE_GUEST";
/// How much the VMM may have grown after all that was done to it, in KiB.
const GROWTH_MAX_KIB: u64 = 8 * 1024;
/// How much it may say about a guest.
const LOG_MAX_BYTES: usize = 64 * 1024;
/// How many fds more it may have: those with which a device is brought up, and of the last honest question.
const FDS_MORE: usize = 8;
/// How long anything that is not the guest's may take, whatever that does: ten times as long as an owner waits for an answer, as in
/// [`Control`], because tests run on emulated hosts.
const ANSWER_MAX: Duration = Duration::from_millis(10 * REPLY_TIMEOUT_MS);
/// How often the owner asks while the chapters are played.
const ASKED_EVERY: Duration = Duration::from_millis(5);
/// How long the VMM of a guest that sleeps is watched.
const WATCHED: Duration = Duration::from_millis(500);
/// How much of it the VMM may run.
const BUSY_MAX: Duration = Duration::from_millis(25);
/// Size of the disks.
const DISK_BYTES: u64 = 1 << 20;
/// Everybody on the link.
const BROADCAST: &str = "10.9.0.255";

/// The guest's file, or a loud word that the test cannot run.
fn guest(test: &str) -> Option<Vec<u8>> {
    if !can_run(test) {
        return None;
    }
    let Some(path) = std::env::var_os(GUEST) else {
        eprintln!("SKIPPED {test}: needs {GUEST}, which `cargo xtask test --suite vmm` sets");
        return None;
    };
    Some(std::fs::read(path).expect("the hostile guest"))
}

/// Words of the guest that are no chapter's end.
const MARKS: [&str; 3] = ["ready", "flood", "idle"];

/// A VMM whose guest plays the chapters of one device, and what was seen of it so far.
struct Play {
    name: &'static str,
    running: Running,
    control: Control,
    /// Memory of its own when the chapters began, in KiB.
    before: u64,
    /// Open fds then.
    fds: usize,
    /// The longest that its owner waited for an answer.
    slowest: Duration,
}

impl Play {
    /// Starts it, up to the guest's first honest request.
    fn begin(mut vmm: Vmm, name: &'static str) -> Play {
        let (control, theirs) = Control::pair();
        vmm.more += &format!(
            r#","cmdline":"hostile={name}","control_fd":{}"#,
            theirs.as_raw_fd()
        );
        let mut running = vmm.start();
        running.printed("ready\n");
        // The guest goes on meanwhile, by what its first chapter does in as long as this takes.
        let (before, fds) = (own_memory_kib(&running), open_fds(&running));
        Play {
            name,
            running,
            control,
            before,
            fds,
            slowest: Duration::ZERO,
        }
    }

    /// Waits for a word of the guest, and asks the VMM meanwhile.
    fn until(&mut self, text: &str) {
        let (control, slowest) = (&mut self.control, &mut self.slowest);
        self.running.printed_while(text, || {
            *slowest = asked(control).max(*slowest);
            std::thread::sleep(ASKED_EVERY);
        });
    }

    /// Asks the VMM.
    fn ask(&mut self) {
        self.slowest = asked(&mut self.control).max(self.slowest);
    }

    /// Plays the rest and holds the VMM against its bounds. Returns the chapters, which all went well.
    fn end(self) -> Vec<String> {
        self.end_with(|_| {})
    }

    /// The same, with a look at what the VMM and its guest said.
    fn end_with(mut self, look: impl FnOnce(&Ended)) -> Vec<String> {
        self.until("idle\n");
        let (busy, since) = (busy(&self.running), Instant::now());
        std::thread::sleep(WATCHED);
        let busy = busy_since(&self.running, busy);
        let watched = since.elapsed();
        let after = own_memory_kib(&self.running);
        let fds = open_fds(&self.running);
        self.control.done(&Request::Stop);
        let ended = self.running.wait();
        let (lines, wrong): (Vec<&str>, Vec<&str>) = ended
            .serial
            .lines()
            .filter(|line| !MARKS.contains(line) && !line.trim_matches('\x1b').is_empty())
            .partition(|line| line.ends_with(": ok"));
        assert!(wrong.is_empty(), "{wrong:#?}: {}", ended.stderr);
        assert_eq!(ended.exit, Some(VmmExit::Stopped), "{}", ended.stderr);
        // What it says itself is little, whatever the guest does, and moves no cursor.
        assert!(ended.stderr.len() <= LOG_MAX_BYTES, "{}", ended.stderr);
        assert!(!ended.stderr.contains('\x1b'));
        look(&ended);
        let (before, slowest) = (self.before, self.slowest);
        assert!(
            after <= before + GROWTH_MAX_KIB,
            "it grew from {before} to {after} KiB"
        );
        assert!(
            busy <= BUSY_MAX,
            "{busy:?} of {watched:?} with a guest that sleeps"
        );
        assert!(
            fds <= self.fds + FDS_MORE,
            "it had {} fds, and then {fds}",
            self.fds
        );
        assert!(slowest <= ANSWER_MAX, "an answer took {slowest:?}");
        println!(
            "{}: {before} KiB, then {after} KiB; busy for {busy:?} of {watched:?}; slowest answer {slowest:?}",
            self.name
        );
        lines.into_iter().map(str::to_owned).collect()
    }
}

/// Asks a VMM for its state; how long that took.
fn asked(control: &mut Control) -> Duration {
    let since = Instant::now();
    let reply = control.ask(&Request::State, &[]);
    assert!(matches!(reply, Reply::State(_)), "{reply:?}");
    since.elapsed()
}

/// Plays the chapters of one device from begin to end.
fn play(vmm: Vmm, name: &'static str) -> Vec<String> {
    Play::begin(vmm, name).end()
}

/// What all virtio devices have to bear, in order.
const COMMON: [&str; 11] = [
    "an honest request at first",
    "registers of any width and offset",
    "features and the status in any order",
    "settings that are no queue",
    "settings after activation",
    "what is no chain",
    "indirect tables that are none",
    "notifications without end",
    "messages of every kind",
    "events that are none",
    "a device in another place",
];

fn chapters(own: &[&str]) -> Vec<String> {
    COMMON
        .iter()
        .chain(own)
        .map(|name| format!("{name}: ok"))
        .collect()
}

#[test]
fn the_entropy_device_bears_a_hostile_driver() {
    let Some(guest) = guest("the_entropy_device_bears_a_hostile_driver") else {
        return;
    };
    let own = ["buffers without end", "buffers that cannot be filled"];
    assert_eq!(play(Vmm::new(&guest), "rng"), chapters(&own));
}

#[test]
fn a_disk_bears_a_hostile_driver() {
    let Some(guest) = guest("a_disk_bears_a_hostile_driver") else {
        return;
    };
    let disk = inherited(b"");
    disk.set_len(DISK_BYTES).unwrap();
    let mut vmm = Vmm::new(&guest);
    vmm.more = format!(r#","disks":[{{"id":"hostile","fd":{}}}]"#, disk.as_raw_fd());
    let own = [
        "sectors that are not there",
        "ranges that are none",
        "answers that nothing has room for",
        "the same head twice in flight",
        "resets with requests in flight",
    ];
    assert_eq!(play(vmm, "blk"), chapters(&own));
    assert_eq!(disk.metadata().unwrap().len(), DISK_BYTES);
}

#[test]
fn a_read_only_disk_bears_a_hostile_driver_and_is_not_changed() {
    let Some(guest) = guest("a_read_only_disk_bears_a_hostile_driver_and_is_not_changed") else {
        return;
    };
    // The file is open for writing: it is the VMM that does not.
    let disk = inherited(b"");
    disk.set_len(DISK_BYTES).unwrap();
    let mut vmm = Vmm::new(&guest);
    vmm.more = format!(
        r#","disks":[{{"id":"hostile","fd":{},"read_only":true}}]"#,
        disk.as_raw_fd()
    );
    let own = [
        "an honest request at first: ok",
        "sectors that are not there: ok",
        "what would change the disk: ok",
        "answers that nothing has room for: ok",
    ];
    assert_eq!(play(vmm, "blk-read-only"), own);
    let mut bytes = vec![1; DISK_BYTES as usize];
    disk.read_exact_at(&mut bytes, 0).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
    assert_eq!(disk.metadata().unwrap().len(), DISK_BYTES);
}

#[test]
fn the_vsock_device_bears_a_hostile_driver() {
    let Some(guest) = guest("the_vsock_device_bears_a_hostile_driver") else {
        return;
    };
    let (theirs, ours) = owner::channel();
    let _host = HostSide::new(ours);
    let ports = [ECHOES, NEVER_READS, NEVER_STOPS]
        .map(|port| format!(r#"{{"port":{port},"connections":{}}}"#, u32::MAX));
    let mut vmm = Vmm::new(&guest);
    vmm.more = owner::config(&theirs, &ports.join(","));
    let play = Play::begin(vmm, "vsock");
    let own = [
        "no chain to receive to",
        "packets of nobody",
        "lengths that are none",
        "packets out of order",
        "credit that lies",
        "more than was granted",
        "connections without end",
        "resets while data flows",
    ];
    assert_eq!(play.end(), chapters(&own));
}

/// A directory on the host, with a share in it and what is none of the guest's beside it; gone when dropped.
struct Shared(PathBuf);

impl Shared {
    /// Bytes of a file that takes a while to be read.
    const LARGE_BYTES: u64 = 1 << 20;

    fn new() -> Shared {
        let dir = format!("capsid-hostile-{}", std::process::id());
        let dir = Shared(std::env::temp_dir().join(dir));
        let share = dir.0.join("share");
        create_dir_all(&share).unwrap();
        std::fs::write(dir.0.join("secret"), "not for a guest").unwrap();
        std::fs::write(share.join("honest"), [0; 4096]).unwrap();
        let large = File::create(share.join("large")).unwrap();
        large.set_len(Shared::LARGE_BYTES).unwrap();
        let rights = Mode::from_raw_mode(0o600);
        mknodat(CWD, share.join("fifo"), FileType::Fifo, rights, 0).unwrap();
        symlink("../secret", share.join("outside")).unwrap();
        dir
    }

    /// Its mount tree, for a VMM to inherit.
    fn tree(&self) -> OwnedFd {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::AT_RECURSIVE;
        open_tree(CWD, self.0.join("share"), flags).unwrap()
    }

    /// All there is but times and what is in the files of the share, which the guest may change.
    fn contents(&self) -> Vec<String> {
        let mut all = Vec::new();
        let mut directories = vec![self.0.clone()];
        while let Some(directory) = directories.pop() {
            for entry in read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                let found = path.symlink_metadata().unwrap();
                if found.is_dir() {
                    directories.push(path.clone());
                }
                let (mode, owner, bytes) = (found.mode(), found.uid(), found.size());
                let target = path.read_link().unwrap_or_default();
                all.push(format!("{path:?} {mode:o} {owner} {bytes} {target:?}"));
            }
        }
        all.sort();
        all
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // What is left is in a directory for such things.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_share_bears_a_hostile_driver_and_nothing_but_it_is_changed() {
    let Some(guest) = guest("a_share_bears_a_hostile_driver_and_nothing_but_it_is_changed") else {
        return;
    };
    let shared = Shared::new();
    let before = shared.contents();
    // The guest uses the first one; the more there are, the fewer files may be open in each.
    let trees: Vec<OwnedFd> = (0..SHARES_MAX).map(|_| shared.tree()).collect();
    let shares = trees.iter().map(AsRawFd::as_raw_fd);
    let shares = shares.map(|fd| format!(r#"{{"tag":"hostile{fd}","tree_fd":{fd}}}"#));
    let mut vmm = Vmm::new(&guest);
    vmm.more = format!(r#","shares":[{}]"#, shares.collect::<Vec<_>>().join(","));
    let own = [
        "no chain of forgets",
        "requests that are none",
        "requests out of time",
        "names that are none",
        "nodes and handles that are not there",
        "links and special files",
        "sizes and offsets beyond all files",
        "opens without end",
        "resets with requests in flight",
    ];
    assert_eq!(play(vmm, "fs"), chapters(&own));
    assert_eq!(shared.contents(), before);
    let secret = std::fs::read_to_string(shared.0.join("secret")).unwrap();
    assert_eq!(secret, "not for a guest");
}

#[test]
fn the_balloon_bears_a_hostile_driver() {
    let Some(guest) = guest("the_balloon_bears_a_hostile_driver") else {
        return;
    };
    let own = [
        "no chain of reports",
        "frames that are none",
        "the same frame without end",
        "reports that are none",
    ];
    assert_eq!(play(Vmm::new(&guest), "balloon"), chapters(&own));
}

#[test]
fn hotplugged_memory_bears_a_hostile_driver() {
    let Some(guest) = guest("hotplugged_memory_bears_a_hostile_driver") else {
        return;
    };
    let mut vmm = Vmm::new(&guest);
    vmm.more = r#","memory_max_mib":576,"plug_mib":256"#.to_owned();
    let own = [
        "requests that are none",
        "blocks that are not there or not plugged",
        "memory that is not plugged",
        "plugged and unplugged without end",
        "resets in the middle of a request",
    ];
    assert_eq!(play(vmm, "mem"), chapters(&own));
}

#[test]
fn the_serial_port_bears_a_hostile_guest() {
    const FLOOD_BYTES: usize = 24 * 4095;
    let Some(guest) = guest("the_serial_port_bears_a_hostile_guest") else {
        return;
    };
    let all = [
        "an honest request at first: ok",
        "registers of the serial port: ok",
        "the interrupt of the serial port: ok",
        "a flood of the serial port: ok",
    ];
    let played = Play::begin(Vmm::new(&guest), "serial").end_with(|ended| {
        let flood = ended.serial.bytes().filter(|byte| *byte == 0x1b);
        assert_eq!(flood.count(), FLOOD_BYTES);
    });
    assert_eq!(played, all);
}

#[test]
fn while_notifications_storm_the_owner_and_other_devices_are_answered_and_the_vm_ends_at_once() {
    const NAME: &str = "while_notifications_storm_the_owner_and_other_devices_are_answered_and_the_vm_ends_at_once";
    let Some(guest) = guest(NAME) else {
        return;
    };
    for by_signal in [false, true] {
        let mut play = Play::begin(Vmm::new(&guest), "storm");
        let counted = |play: &mut Play| match play.control.ask(&Request::Counters, &[]) {
            Reply::Counters(mut counters) => {
                let mut of = |name: &str| counters.devices.remove(name).unwrap();
                (
                    of("virtio-rng")["bytes"],
                    of("virtio-balloon")["inflated_bytes"],
                )
            }
            reply => panic!("{reply:?}"),
        };
        let (random, given) = counted(&mut play);
        match by_signal {
            true => play.ask(),
            false => play.until("stormed\n"),
        }
        // Both devices had their turns as well.
        let since = Instant::now();
        loop {
            let (random_now, given_now) = counted(&mut play);
            if random_now > random && given_now > given {
                break;
            }
            assert!(since.elapsed() <= ANSWER_MAX, "a device was not served");
        }
        assert!(
            play.slowest <= ANSWER_MAX,
            "an answer took {:?}",
            play.slowest
        );
        let since = Instant::now();
        match by_signal {
            true => play.running.signal(Signal::TERM),
            false => play.control.done(&Request::Stop),
        }
        let ended = play.running.wait();
        assert!(
            since.elapsed() <= ANSWER_MAX,
            "it took {:?}",
            since.elapsed()
        );
        assert_eq!(ended.exit, Some(VmmExit::Stopped), "{}", ended.stderr);
        let said: Vec<&str> = ended.serial.lines().collect();
        assert!(
            matches!(said[..], ["ready"] | ["ready", "stormed"]),
            "{said:?}"
        );
    }
}

#[test]
fn configuration_space_and_ports_bear_a_hostile_guest() {
    let Some(guest) = guest("configuration_space_and_ports_bear_a_hostile_guest") else {
        return;
    };
    let all = [
        "an honest request at first: ok",
        "configuration space of any width and offset: ok",
        "pvpanic of any width and offset: ok",
        "ports of nobody: ok",
    ];
    assert_eq!(play(Vmm::new(&guest), "machine"), all);
}

/// A tap device of two queues in a network namespace of its own, with a socket of its other end.
fn link() -> (Vec<OwnedFd>, UdpSocket) {
    const MTU: u16 = 1500;
    let made = std::thread::spawn(|| {
        let taps = tap::taps(2, MTU).expect("a tap device");
        (taps, UdpSocket::bind((tap::HOST, 0)).expect("a socket"))
    });
    made.join().expect("a link")
}

/// Packets to all on the link, as fast as one thread sends them; until it is dropped.
struct Flood {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
}

impl Flood {
    fn new(socket: UdpSocket) -> Flood {
        let ends = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&ends);
        socket.set_broadcast(true).unwrap();
        let thread = std::thread::spawn(move || {
            let mut sent = 0;
            while !ended.load(Ordering::Relaxed) {
                // What does not fit into the tap's queue is lost.
                sent += u64::from(socket.send_to(&[0; 1000], (BROADCAST, 9)).is_ok());
            }
            sent
        });
        Flood {
            ends,
            thread: Some(thread),
        }
    }

    /// How many packets there were.
    fn end(mut self) -> u64 {
        self.ends.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_network_card_bears_a_hostile_driver_and_a_flood_that_it_does_not_take() {
    /// More than the tap and all buffers hold.
    const FLOOD_MIN: u64 = 10_000;
    let Some(guest) =
        guest("a_network_card_bears_a_hostile_driver_and_a_flood_that_it_does_not_take")
    else {
        return;
    };
    let (taps, socket) = link();
    let mut vmm = Vmm::new(&guest);
    for tap in &taps {
        rustix::io::fcntl_setfd(tap, rustix::io::FdFlags::empty()).unwrap();
    }
    let [a, b] = [taps[0].as_raw_fd(), taps[1].as_raw_fd()];
    vmm.more = format!(r#","nics":[{{"tap_fds":[{a},{b}],"mac":"02:00:00:00:00:07","mtu":1500}}]"#);
    let mut play = Play::begin(vmm, "net");
    play.until("flood\n");
    // It goes on while the guest sleeps, which does not take any packet then.
    let flood = Flood::new(socket);
    let own = [
        "no chain to receive to",
        "packets that are none",
        "headers of no sense",
        "buffers too small to receive to",
        "commands that are none",
        "a flood that nobody takes",
    ];
    assert_eq!(play.end(), chapters(&own));
    let sent = flood.end();
    assert!(sent >= FLOOD_MIN, "no flood: {sent} packets");
}
