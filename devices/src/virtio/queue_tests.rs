//! Tests of a live queue by a driver that breaks its ring, see `queue.rs`.

use super::*;
use crate::testing::RawDescriptor;

#[test]
fn a_jump_of_the_available_index_is_a_broken_queue() {
    // B2.5, V8.
    for index in [257u16, 0x8000, 0xffff] {
        let (mut driver, device) = up();
        driver.set_available_index(0, index);
        assert!(device.serve().is_err(), "{index}");
        assert_eq!(driver.used_index(0), 0);
    }
}

#[test]
fn one_kick_serves_at_most_the_queues_size_and_kicks_again() {
    // B2.5, B2.11: the driver refills while the device works.
    let (mut driver, device) = up();
    let loop_of_one = RawDescriptor {
        addr: 0x1000,
        len: 1,
        flags: 0,
        next: 0,
    };
    driver.add_raw(0, 0, &[loop_of_one]);
    driver.set_available_index(0, 256); // all name head 0: one head, many times in flight (B2.4, V7)
    assert_eq!(device.serve().unwrap(), 256);
    let kick = &driver.transport.notify_addresses()[0].kick;
    assert_eq!(kick.read().unwrap(), 1);
    assert_eq!(device.serve().unwrap(), 0);
    assert!(kick.read().is_err());
    assert_eq!(driver.used_index(0), 256);
    assert_eq!(driver.status(), 0x0f);
}

#[test]
fn a_bad_chain_is_told_and_nothing_of_it_is_used() {
    let (mut driver, device) = up();
    let endless = RawDescriptor {
        addr: 0x1000,
        len: 1,
        flags: 1,
        next: 0,
    };
    driver.add_raw(0, 0, &[endless]);
    assert!(device.serve().is_err());
    assert_eq!(driver.used_index(0), 0);
    let (mut driver, device) = up();
    driver.add_raw(0, 256, &[]);
    assert!(device.serve().is_err());
}

#[test]
fn event_idx_spares_kicks_and_interrupts() {
    let (mut driver, device) = up();
    driver.add(0, &[Buffer::Writable(1)]);
    assert!(driver.wants_kick(0));
    driver.add(0, &[Buffer::Writable(1)]);
    assert!(!driver.wants_kick(0), "the device knows of the first");
    assert_eq!(device.serve().unwrap(), 2);
    assert_eq!(driver.interrupts(0), 1, "one for both");
    driver.add(0, &[Buffer::Writable(1)]);
    assert!(driver.wants_kick(0));
    assert_eq!(device.serve().unwrap(), 1);
    assert_eq!(driver.interrupts(0), 1, "the driver has not looked yet");
}

#[test]
fn without_event_idx_flags_rule() {
    let (mut driver, device) = new();
    driver.negotiate_exactly(1 << VIRTIO_F_VERSION_1);
    driver.setup_queue(0, 16);
    driver.start();
    driver.add(0, &[Buffer::Writable(1)]);
    assert!(driver.wants_kick(0));
    assert_eq!(device.serve().unwrap(), 1);
    assert!(driver.wants_kick(0));
    assert_eq!(driver.interrupts(0), 1);
    // Indirect tables were not agreed on.
    driver.add_indirect(0, &[Buffer::Writable(1)]);
    assert!(device.serve().is_err());
}
