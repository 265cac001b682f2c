//! What the agent says of devices on its bus, and how it lets go of them.

use capsid_protocol::agent::DiskRequest;
use capsid_tests::bundle::Scratch;
use capsid_tests::guest::{Guest, context};
use capsid_tests::ledger::Ledger;
use capsid_tests::vmm::Disk;
use std::fs::OpenOptions;
use ttrpc::Code;

/// Behind pvpanic, the entropy device and vsock.
const FIRST_DISK: &str = "0000:00:04.0";

fn disk(pci_address: &str, id: &str) -> DiskRequest {
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

#[test]
fn a_disk_is_answered_with_its_name_and_let_go_of_by_its_id() {
    let scratch = Scratch::new("hotplug");
    let before = Ledger::now();
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true);
    let file = file.open(scratch.join("data")).expect("a file");
    file.set_len(1 << 20).expect("its size");
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
