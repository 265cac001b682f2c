//! Devices that come and go while a guest runs: the VMM puts them on the bus, the agent finds them and lets go of them, and only then does
//! the VMM take them away.

use capsid_protocol::agent::{DiskRequest, NicRequest};
use capsid_protocol::control::{MachineState, NewDisk, NewNic, Reply, Request};
use capsid_protocol::machine::{Mac, MemoryMib};
use capsid_tests::bundle::Scratch;
use capsid_tests::control::Control;
use capsid_tests::guest::{Guest, context};
use capsid_tests::ledger::Ledger;
use capsid_tests::tap::taps;
use capsid_tests::vmm::Disk;
use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use ttrpc::Code;

/// Behind pvpanic, the entropy device, vsock, memory to be plugged and the balloon.
const FIRST_DISK: &str = "0000:00:06.0";

/// How long a guest may take to give memory back or to take it.
const RESIZE_TIMEOUT: Duration = Duration::from_secs(120);

pub(crate) fn disk(pci_address: &str, id: &str) -> DiskRequest {
    DiskRequest {
        pci_address: pci_address.to_owned(),
        id: id.to_owned(),
        ..Default::default()
    }
}

#[track_caller]
fn code<T: std::fmt::Debug>(answer: ttrpc::Result<T>) -> Code {
    match answer {
        Err(ttrpc::Error::RpcStatus(status)) => status.code(),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

fn file(scratch: &Scratch, mib: u64) -> File {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true);
    let file = file
        .open(scratch.join(&format!("data-{mib}")))
        .expect("a file");
    file.set_len(mib << 20).expect("its size");
    file
}

fn state(guest: &mut Guest) -> MachineState {
    match guest.control.ask(&Request::State, &[]) {
        Reply::State(state) => state,
        reply => panic!("{reply:?}"),
    }
}

/// Whether a driver of the guest works with its last device.
fn in_use(guest: &mut Guest) -> bool {
    state(guest).devices.pop().expect("a device").in_use
}

#[test]
fn disks_come_and_go_as_often_as_they_like() {
    let scratch = Scratch::new("hotplug-disks");
    let before = Ledger::now();
    let files: Vec<File> = (1..=3).map(|mib| file(&scratch, mib)).collect();
    let mut guest = Guest::start(1, 1, &[]);
    guest.sleeper("c1");
    for round in 0..3 {
        let mut there = Vec::new();
        for (mib, file) in (1..).zip(&files) {
            let id = format!("disk-{mib}");
            let new = Request::AttachDisk(NewDisk {
                id: id.clone(),
                read_only: mib == 2,
                queues: 1,
            });
            let pci = guest.control.attach(&new, &[file]).to_string();
            let found = guest.agent.attach_disk(context(), &disk(&pci, &id));
            let name = found
                .unwrap_or_else(|error| panic!("round {round}: {error}"))
                .device_name;
            assert!(in_use(&mut guest));
            let said =
                format!("cat /sys/block/{name}/size /sys/block/{name}/ro /sys/block/{name}/serial");
            let expected = format!("{}\n{}\n{id}", mib * 2048, u8::from(mib == 2));
            assert_eq!(guest.exec("c1", &said), expected);
            there.push((pci, id));
        }
        let (_, used) = &there[0];
        let refused = guest
            .control
            .refused(&Request::DetachDisk { id: used.clone() }, &[]);
        assert!(refused.contains("still uses"), "{refused}");
        for (pci, id) in there {
            guest
                .agent
                .detach_disk(context(), &disk(&pci, &id))
                .expect("gone");
            guest.control.done(&Request::DetachDisk { id });
        }
        assert_eq!(guest.exec("c1", "ls /sys/block"), "");
    }
    drop(guest);
    before.balances();
}

#[test]
fn a_network_card_comes_and_goes() {
    let before = Ledger::now();
    // A network namespace of its own, with the tap device in it.
    let test = || {
        let mut guest = Guest::start(1, 1, &[]);
        guest.sleeper("c1");
        for _ in 0..2 {
            let taps: Vec<OwnedFd> = taps(1, 1400).expect("a tap device");
            let mac = "02:00:00:00:00:2b";
            let mac_of = || Mac::try_from(mac.to_owned()).expect("an address");
            let new = Request::AttachNic(NewNic {
                mac: mac_of(),
                mtu: 1400,
            });
            let pci = guest.control.attach(&new, &taps).to_string();
            drop(taps);
            let card = NicRequest {
                pci_address: pci,
                mac: mac.to_owned(),
                ..Default::default()
            };
            let found = guest.agent.attach_nic(context(), &card).expect("a card");
            let said = format!(
                "cat /sys/class/net/{0}/address /sys/class/net/{0}/mtu",
                found.interface_name
            );
            assert_eq!(guest.exec("c1", &said), format!("{mac}\n1400"));
            guest.control.done(&Request::SetLink {
                mac: mac_of(),
                up: false,
            });
            guest.control.done(&Request::SetLink {
                mac: mac_of(),
                up: true,
            });
            guest.agent.detach_nic(context(), &card).expect("gone");
            guest.control.done(&Request::DetachNic { mac: mac_of() });
        }
    };
    std::thread::spawn(test).join().expect("the test");
    before.balances();
}

#[test]
fn a_guest_is_paused_and_goes_on_and_grows_and_shrinks_when_asked() {
    let before = Ledger::now();
    let mut guest = Guest::start(1, 1, &[]);
    guest.sleeper("c1");
    let numbers: Vec<String> = (1..=20_000).map(|number: u32| number.to_string()).collect();
    // All the time all devices let go of their queues and take them back.
    let mut control = std::mem::replace(&mut guest.control, Control::pair().0);
    let over = AtomicBool::new(false);
    let pauses = std::thread::scope(|scope| {
        let pausing = scope.spawn(|| {
            let mut pauses = 0;
            while !over.load(Ordering::Relaxed) {
                control.done(&Request::Pause);
                control.done(&Request::Resume);
                // The guest is to have some of the time.
                std::thread::sleep(Duration::from_millis(20));
                pauses += 1;
            }
            pauses
        });
        for _ in 0..3 {
            assert_eq!(guest.exec("c1", "seq 1 20000"), numbers.join("\n"));
        }
        over.store(true, Ordering::Relaxed);
        pausing.join().expect("pauses")
    });
    guest.control = control;
    assert!(pauses > 3, "{pauses} pauses");
    assert!(
        state(&mut guest)
            .devices
            .iter()
            .all(|device| !device.broken)
    );
    let boot = state(&mut guest).memory.boot_mib;
    for (mib, plugged, balloon) in [
        (boot + 128, 128, 0),
        (boot - 64, 0, 64),
        (boot + 256, 256, 0),
        (boot, 0, 0),
    ] {
        let memory_mib = MemoryMib::try_from(mib).expect("memory");
        guest.control.done(&Request::Resize { memory_mib });
        let since = Instant::now();
        loop {
            let memory = state(&mut guest).memory;
            if (memory.plugged_mib, memory.balloon_mib) == (plugged, balloon) {
                break;
            }
            assert!(since.elapsed() < RESIZE_TIMEOUT, "{mib} MiB: {memory:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let more = Request::Resize {
        memory_mib: MemoryMib::try_from(boot + 1024).expect("memory"),
    };
    let why = guest.control.refused(&more, &[]);
    assert!(why.contains("this guest can have"), "{why}");
    drop(guest);
    before.balances();
}

#[test]
fn a_disk_is_answered_with_its_name_and_let_go_of_by_its_id() {
    let scratch = Scratch::new("hotplug");
    let before = Ledger::now();
    let file = file(&scratch, 1);
    let mut guest = Guest::start(
        1,
        1,
        &[Disk {
            id: "data-1",
            file: &file,
            read_only: false,
            queues: 1,
        }],
    );
    guest.sleeper("c1");
    let data = disk(FIRST_DISK, "data-1");
    let there = guest.agent.attach_disk(context(), &data).expect("there");
    assert_eq!(there.device_name, "vda");
    let other = disk(FIRST_DISK, "data-2");
    let wrong = guest.agent.detach_disk(context(), &other);
    assert_eq!(code(wrong), Code::FAILED_PRECONDITION);
    assert_eq!(guest.exec("c1", "ls /sys/block"), "vda");

    guest.agent.detach_disk(context(), &data).expect("gone");
    assert_eq!(guest.exec("c1", "ls /sys/block"), "");
    let again = guest.agent.detach_disk(context(), &data);
    assert_eq!(code(again), Code::NOT_FOUND);
    drop(guest);
    before.balances();
}
