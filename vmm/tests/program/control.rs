//! The control channel of the real program under its filters, while a guest of a few instructions runs.

#[path = "../../../tests/src/control.rs"]
#[allow(unreachable_pub)] // It is public in the other package.
pub(crate) mod channel;

use crate::harness::{Code, Ended, Running, Vmm, can_run, inherited};
use capsid_protocol::control::{MachineCounters, MachineState, NewDisk, Reply, Request, RunState};
use capsid_protocol::exit::VmmExit;
use capsid_protocol::machine::MemoryMib;
use channel::Control;
use rustix::process::Signal;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

/// The slots that such a VM has taken: host bridge, pvpanic, entropy, balloon. The next is the first one for later.
const NEXT_SLOT: u8 = 4;
/// Least time in which a guest that runs prints something, on any machine.
const A_WHILE: Duration = Duration::from_millis(300);

fn start(code: &Code) -> (Running, Control) {
    start_with(code, "")
}

fn start_with(code: &Code, more: &str) -> (Running, Control) {
    let (control, theirs) = Control::pair();
    let mut vmm = Vmm::of(code);
    vmm.more = format!(r#","control_fd":{}{more}"#, theirs.as_raw_fd());
    (vmm.start(), control)
}

fn state(control: &mut Control) -> MachineState {
    match control.ask(&Request::State, &[]) {
        Reply::State(state) => state,
        reply => panic!("{reply:?}"),
    }
}

fn counters(control: &mut Control) -> MachineCounters {
    match control.ask(&Request::Counters, &[]) {
        Reply::Counters(counters) => counters,
        reply => panic!("{reply:?}"),
    }
}

pub(crate) fn new_disk(id: &str) -> Request {
    Request::AttachDisk(NewDisk {
        id: id.to_owned(),
        read_only: false,
        queues: 1,
    })
}

fn detach(id: &str) -> Request {
    Request::DetachDisk { id: id.to_owned() }
}

fn stop(running: Running, mut control: Control) -> Ended {
    control.done(&Request::Stop);
    running.wait()
}

#[test]
fn a_vm_tells_its_state_and_what_it_counted_and_stops_when_told() {
    if !can_run("a_vm_tells_its_state_and_what_it_counted_and_stops_when_told") {
        return;
    }
    let (mut running, mut control) = start(&Code::default().print("up").halt());
    running.printed("up");
    let state = state(&mut control);
    assert_eq!((state.id.as_str(), state.run), ("test", RunState::Running));
    assert_eq!((state.memory.boot_mib, state.memory.plugged_mib), (64, 0));
    let kinds: Vec<_> = state
        .devices
        .iter()
        .map(|device| device.kind.as_str())
        .collect();
    assert_eq!(kinds, ["virtio-rng", "virtio-balloon"]);
    assert!(
        state
            .devices
            .iter()
            .all(|device| !device.in_use && !device.broken)
    );
    let counters = counters(&mut control);
    assert_eq!(counters.vcpus.len(), 1);
    assert_eq!(counters.vcpus[0]["io:serial"], 2);
    assert_eq!(counters.devices["virtio-rng"]["bytes"], 0);
    let ended = stop(running, control);
    assert_eq!(ended.exit, Some(VmmExit::Stopped), "{}", ended.stderr);
    assert!(ended.stderr.contains("control channel"), "{}", ended.stderr);
}

#[test]
fn a_paused_guest_does_nothing_until_it_is_resumed() {
    if !can_run("a_paused_guest_does_nothing_until_it_is_resumed") {
        return;
    }
    let (mut running, mut control) = start(&Code::default().print_config_for_ever(0x8000_0000));
    running.printed("6");
    for _ in 0..3 {
        control.done(&Request::Pause);
        assert_eq!(state(&mut control).run, RunState::Paused);
        let printed = running.bytes().len();
        std::thread::sleep(A_WHILE);
        assert_eq!(running.bytes().len(), printed);
        control.done(&Request::Pause);
        control.done(&Request::Resume);
        assert_eq!(state(&mut control).run, RunState::Running);
        let since = Instant::now();
        while running.bytes().len() == printed {
            assert!(
                since.elapsed() < Duration::from_secs(60),
                "it does not go on"
            );
            std::thread::yield_now();
        }
    }
    control.done(&Request::Pause);
    let ended = stop(running, control);
    assert_eq!(ended.exit, Some(VmmExit::Stopped), "{}", ended.stderr);
}

#[test]
fn pauses_and_resumptions_without_a_moment_between_them_lose_nothing() {
    if !can_run("pauses_and_resumptions_without_a_moment_between_them_lose_nothing") {
        return;
    }
    let (mut running, mut control) =
        start_with(&Code::default().print_config_for_ever(0x8000_0000), "");
    running.printed("6");
    let since = Instant::now();
    for _ in 0..200 {
        control.done(&Request::Pause);
        control.done(&Request::Resume);
    }
    // Each pause that is lost takes until its deadline of 3 s.
    assert!(since.elapsed() < Duration::from_secs(60));
    let printed = running.bytes().len();
    while running.bytes().len() == printed {
        assert!(since.elapsed() < Duration::from_secs(120), "it stands");
        std::thread::yield_now();
    }
    let ended = stop(running, control);
    assert_eq!(ended.exit, Some(VmmExit::Stopped), "{}", ended.stderr);
}

#[test]
fn an_owner_that_goes_away_leaves_a_vm_that_runs() {
    if !can_run("an_owner_that_goes_away_leaves_a_vm_that_runs") {
        return;
    }
    let (mut running, mut control) = start(&Code::default().print_config_for_ever(0x8000_0000));
    running.printed("6");
    control.done(&Request::Pause);
    let printed = running.bytes().len();
    drop(control);
    let since = Instant::now();
    while running.bytes().len() == printed {
        assert!(
            since.elapsed() < Duration::from_secs(60),
            "it does not go on"
        );
        std::thread::yield_now();
    }
    running.signal(Signal::TERM);
    assert_eq!(running.wait().exit, Some(VmmExit::Stopped));
}

#[test]
fn a_disk_comes_and_goes_while_the_guest_looks() {
    if !can_run("a_disk_comes_and_goes_while_the_guest_looks") {
        return;
    }
    // The low byte of the vendor of the next slot, over and over: nobody, then virtio's.
    let slot = 0x8000_0000 | u32::from(NEXT_SLOT) << 11;
    let (running, mut control) = start(&Code::default().print_config_for_ever(slot));
    let last = |wanted: u8| {
        let since = Instant::now();
        while running.bytes().last() != Some(&wanted) {
            assert!(since.elapsed() < Duration::from_secs(60), "no {wanted:#x}");
            std::thread::yield_now();
        }
    };
    last(0xff);
    let file = inherited(&[7; 4096]);
    // More often than there are places.
    for _ in 0..3 {
        let pci = control.attach(&new_disk("data"), &[&file]);
        assert_eq!((pci.slot(), pci.function()), (NEXT_SLOT, 0));
        last(0xf4);
        let found = state(&mut control).devices.pop().unwrap();
        assert_eq!(
            (found.kind.as_str(), found.id.as_str()),
            ("virtio-blk", "data")
        );
        assert_eq!((found.pci, found.in_use), (pci, false));
        assert_eq!(
            counters(&mut control).devices["virtio-blk/data"]["reads"],
            0
        );
        let again = control.refused(&new_disk("data"), &[file.as_fd()]);
        assert!(again.contains("already"), "{again}");
        control.done(&detach("data"));
        last(0xff);
        let gone = control.refused(&detach("data"), &[]);
        assert!(gone.contains("no virtio-blk \"data\""), "{gone}");
    }
    let ended = stop(running, control);
    assert_eq!(ended.exit, Some(VmmExit::Stopped), "{}", ended.stderr);
}

#[test]
fn all_places_of_the_bus_can_be_taken_and_one_more_is_refused() {
    if !can_run("all_places_of_the_bus_can_be_taken_and_one_more_is_refused") {
        return;
    }
    let (running, mut control) = start(&Code::default().print("up").halt());
    let file = inherited(&[7; 4096]);
    let mut places = Vec::new();
    for number in 0..64 {
        places.push(control.attach(&new_disk(&format!("d{number}")), &[&file]));
    }
    places.sort_unstable();
    places.dedup();
    assert_eq!(places.len(), 64);
    let more = control.refused(&new_disk("more"), &[file.as_fd()]);
    assert!(more.contains("at most 64"), "{more}");
    for number in 0..64 {
        control.done(&detach(&format!("d{number}")));
    }
    control.attach(&new_disk("more"), &[&file]);
    let ended = stop(running, control);
    assert_eq!(ended.exit, Some(VmmExit::Stopped), "{}", ended.stderr);
}

#[test]
fn what_cannot_be_is_refused_by_name_and_changes_nothing() {
    if !can_run("what_cannot_be_is_refused_by_name_and_changes_nothing") {
        return;
    }
    let file = inherited(&[7; 4096]);
    let disk = format!(r#","disks":[{{"fd":{},"id":"boot"}}]"#, file.as_raw_fd());
    let (running, mut control) = start_with(&Code::default().print("up").halt(), &disk);
    let before = state(&mut control);
    let directory = std::fs::File::open("/").unwrap();
    for (request, fd, named) in [
        (
            new_disk("data"),
            Some(directory.as_fd()),
            "not open for writing",
        ),
        (new_disk("data"), None, "0 fds"),
        (new_disk("boot"), Some(file.as_fd()), "already"),
        (detach("boot"), None, "when the VM started"),
        (Request::Pause, Some(file.as_fd()), "1 fds"),
        (
            Request::Resize {
                memory_mib: MemoryMib::try_from(128).unwrap(),
            },
            None,
            "memory_max_mib",
        ),
    ] {
        let fds: Vec<_> = fd.into_iter().collect();
        let why = control.refused(&request, &fds);
        assert!(why.contains(named), "{request:?}: {why}");
    }
    assert_eq!(state(&mut control), before);
    let ended = stop(running, control);
    assert_eq!(ended.exit, Some(VmmExit::Stopped), "{}", ended.stderr);
}

#[test]
fn bytes_that_are_no_message_end_the_vm_and_bad_messages_do_not() {
    if !can_run("bytes_that_are_no_message_end_the_vm_and_bad_messages_do_not") {
        return;
    }
    // A length that none has, and a message that never ends.
    for bytes in [&[0xff; 4][..], &[5, 0, 0, 0, b'"'][..]] {
        let (mut running, mut control) = start(&Code::default().print("up").halt());
        running.printed("up");
        let nonsense = *b"\x07\0\0\0\"dance\"";
        control.socket().write_all(&nonsense).unwrap();
        assert!(matches!(control.reply(), Reply::Refused { why } if why.contains("dance")));
        control.socket().write_all(bytes).unwrap();
        let ended = running.wait();
        assert_eq!(ended.exit, Some(VmmExit::BadConfig), "{}", ended.stderr);
        assert!(ended.stderr.contains("control channel"), "{}", ended.stderr);
    }
}
