//! Pauses that do not come about: what a disk's file does not answer keeps guest memory in use, and nobody waits for it without end.
//!
//! The file is on a file system that is frozen (`FIFREEZE`): a write to it waits in the kernel until it is thawed.

use crate::disks::{NoRing, disk, new_file, on_host};
use capsid_protocol::control::{Reply, Request, RunState};
use capsid_protocol::exit::VmmExit;
use capsid_tests::bundle::Scratch;
use capsid_tests::control::Control;
use capsid_tests::guest::{Guest, has_heard};
use capsid_tests::ledger::Ledger;
use capsid_tests::vmm;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
/// What a pause may take before it is refused (`vmm/src/control.rs`, PAUSE_TIMEOUT_MS).
const PAUSE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a request of the guest may take to reach its disk.
const WRITE_TIMEOUT: Duration = Duration::from_secs(60);

/// A file system that can be frozen, on a file, until this is dropped.
struct Icebox {
    at: String,
}

/// It is frozen until this is dropped.
struct Frozen<'a>(&'a Icebox);

impl Icebox {
    fn new(scratch: &Scratch) -> Icebox {
        let (image, at) = (scratch.join("icebox.img"), scratch.join("icebox"));
        drop(new_file(&image, 32 * MIB));
        on_host("mke2fs", &["-q", "-F", "-t", "ext4", &image]);
        std::fs::create_dir(&at).expect("a directory");
        on_host("mount", &["-o", "loop", &image, &at]);
        Icebox { at }
    }

    /// A file in it that is a disk's.
    fn file(&self) -> File {
        new_file(&format!("{}/data", self.at), 4 * MIB)
    }

    fn freeze(&self) -> Frozen<'_> {
        on_host("fsfreeze", &["--freeze", &self.at]);
        Frozen(self)
    }
}

impl Drop for Icebox {
    fn drop(&mut self) {
        on_host("umount", &[&self.at]);
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        on_host("fsfreeze", &["--unfreeze", &self.0.at]);
    }
}

/// Asks for pauses until one is refused, which the guest's request on its way to the disk brings about sooner or later; why, and how
/// long that one took.
#[track_caller]
fn refused(control: &mut Control) -> (String, Duration) {
    let begun = Instant::now();
    loop {
        let asked = Instant::now();
        match control.ask(&Request::Pause, &[]) {
            Reply::Done => control.done(&Request::Resume),
            Reply::Refused { why } => return (why, asked.elapsed()),
            reply => panic!("{reply:?}"),
        }
        assert!(begun.elapsed() < WRITE_TIMEOUT, "no pause is refused");
    }
}

/// Asks for a pause and waits until that was `heard`, but for no reply.
fn begin_pause(control: &Control, heard: impl Fn() -> bool) {
    let pause = Request::Pause.to_frame().expect("a request");
    control.socket().write_all(&pause).expect("sent");
    while !heard() {
        std::thread::yield_now();
    }
}

#[track_caller]
fn runs(control: &mut Control) -> bool {
    match control.ask(&Request::State, &[]) {
        Reply::State(state) => state.run == RunState::Running,
        reply => panic!("{reply:?}"),
    }
}

/// Says each new word that is at the start of its second disk, and at `wr` writes to its first.
const OBEDIENT: &str = "\
    last=; while true; do
        word=$(dd if=/dev/vdb bs=512 count=1 iflag=direct 2>/dev/null | head -c 2)
        if [ \"$word\" = \"$last\" ]; then usleep 20000; continue; fi
        last=$word; say \"$word\"
        if [ \"$word\" = wr ]; then
            { dd if=/bin/busybox of=/dev/vda bs=4k count=1 oflag=direct 2>/dev/null && say written; } &
        fi
    done";

/// A guest that does what its second disk says.
struct Obedient {
    running: vmm::Running,
    words: File,
    control: Control,
    /// The VMM's end of it.
    vmm_control: OwnedFd,
}

impl Obedient {
    fn start(scratch: &Scratch, icebox: &Icebox) -> Obedient {
        let (data, words) = (icebox.file(), new_file(&scratch.join("words"), MIB));
        let (control, vmm_control) = Control::pair();
        let guest = vmm::Guest {
            script: OBEDIENT,
            disks: &[disk("data", &data), disk("words", &words)],
            control: Some(&vmm_control),
            ..vmm::Guest::default()
        };
        let mut obedient = Obedient {
            running: guest.start(),
            words,
            control,
            vmm_control,
        };
        obedient.hears("up");
        obedient
    }

    /// Gives it a word, which it says.
    fn hears(&mut self, word: &str) {
        let written = self.words.write_all_at(word.as_bytes(), 0);
        written.expect("a file");
        self.running.until_it_says(word);
    }
}

/// A guest writes to a disk that does not answer, and a pause is refused; then the disk answers, and one is not.
fn a_pause_is_refused_and_the_vm_goes_on() {
    let before = Ledger::now();
    let scratch = Scratch::new("frozen");
    let icebox = Icebox::new(&scratch);
    let mut guest = Obedient::start(&scratch, &icebox);
    let frozen = icebox.freeze();
    guest.hears("wr");
    let (why, took) = refused(&mut guest.control);
    assert_eq!(
        why,
        "virtio-blk \"data\" does not stand still: the host has not done what it was asked for"
    );
    assert!(took >= PAUSE_TIMEOUT, "{took:?}");
    assert!(runs(&mut guest.control));
    // So does what waits for no disk of this kind.
    guest.hears("on");
    drop(frozen);
    guest.running.until_it_says("written");
    guest.control.done(&Request::Pause);
    guest.control.done(&Request::Resume);
    guest.hears("by");
    guest.control.done(&Request::Stop);
    let ended = guest.running.end();
    assert_eq!(ended.code, i32::from(VmmExit::Stopped.code()), "{ended:?}");
    drop(icebox);
    drop(scratch);
    before.balances();
}

#[test]
fn a_pause_that_a_disk_keeps_waiting_is_refused_and_the_vm_goes_on() {
    a_pause_is_refused_and_the_vm_goes_on();
}

#[test]
fn so_is_one_on_a_host_without_io_uring() {
    match NoRing::new() {
        Ok(_no_ring) => a_pause_is_refused_and_the_vm_goes_on(),
        Err(error) => eprintln!("SKIPPED so_is_one_on_a_host_without_io_uring: {error}"),
    }
}

#[test]
fn an_owner_that_goes_away_half_way_through_a_pause_leaves_a_vm_that_runs() {
    let before = Ledger::now();
    let scratch = Scratch::new("ownerless");
    let icebox = Icebox::new(&scratch);
    let mut guest = Obedient::start(&scratch, &icebox);
    let frozen = icebox.freeze();
    guest.hears("wr");
    let (why, _) = refused(&mut guest.control);
    assert!(why.contains("does not stand still"), "{why}");
    begin_pause(&guest.control, || has_heard(&guest.vmm_control));
    drop(std::mem::replace(&mut guest.control, Control::pair().0));
    guest.hears("on");
    drop(frozen);
    guest.running.until_it_says("written");
    drop(guest);
    drop(icebox);
    drop(scratch);
    before.balances();
}

#[test]
fn sigterm_half_way_through_a_pause_gives_it_up_and_the_guest_powers_off() {
    let before = Ledger::now();
    let scratch = Scratch::new("half-paused");
    let icebox = Icebox::new(&scratch);
    let data = icebox.file();
    let mut guest = Guest::start(1, 1, &[disk("data", &data)]);
    drop(data);
    guest.sleeper("c1");
    guest.exec(
        "c1",
        "read dev < /sys/block/vda/dev; busybox mknod /dev/vda b ${dev%:*} ${dev#*:} 2>&1",
    );
    let frozen = icebox.freeze();
    guest.exec(
        "c1",
        "busybox dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct >/dev/null 2>&1 &",
    );
    let (why, _) = refused(&mut guest.control);
    assert!(why.contains("\"data\" does not stand still"), "{why}");
    begin_pause(&guest.control, || guest.has_heard());
    let vmm = Pid::from_raw(i32::try_from(guest.vmm()).expect("a pid"));
    kill(vmm, Signal::SIGTERM).expect("the VMM runs");
    match guest.control.reply() {
        Reply::Refused { why } => assert_eq!(why, "SIGTERM came: the VM is to end"),
        reply => panic!("{reply:?}"),
    }
    drop(frozen);
    let (code, said) = guest.end();
    assert_eq!(code, Some(i32::from(VmmExit::Stopped.code())), "{said}");
    assert!(
        said.contains("SIGTERM, and the guest powered off in good order"),
        "{said}"
    );
    drop(icebox);
    drop(scratch);
    before.balances();
}
