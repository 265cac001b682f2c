//! The balloon against a driver, an honest one and others.

use super::server::{FRAMES_MAX, REPORT_MAX_BYTES};
use super::{Balloon, BalloonHandle};
use crate::GuestMemory;
use crate::event::Poller;
use crate::memory::Region;
use crate::testing::{
    Buffer, Driver, RawDescriptor, any_descriptor, memory, memory_with_blocks, sweep, written_down,
};
use proptest::prelude::*;
use std::sync::Arc;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// Where Linux 6.12 puts the reporting queue, and where the specification does.
const REPORTING: [u16; 2] = [2, 4];
const PAGE_REPORTING: u64 = 1 << 5;
const WRITE: u16 = 2;
const NEXT: u16 = 1;
const MIB: u64 = 1 << 20;

/// Two regions with a hole between, of which the first is the driver's own up to its half.
fn regions() -> GuestMemory {
    memory(&[(0, 16 << 20), (32 << 20, 16 << 20)])
}

fn up(queues: &[u16]) -> (Driver, BalloonHandle, Arc<Poller>) {
    up_with(regions(), queues)
}

fn up_with(memory: GuestMemory, queues: &[u16]) -> (Driver, BalloonHandle, Arc<Poller>) {
    let poller = Arc::new(Poller::new().unwrap());
    let balloon = Balloon::new(&memory, poller.clone());
    let handle = balloon.handle();
    let mut driver = Driver::with_memory(Box::new(balloon), memory);
    driver.negotiate(PAGE_REPORTING);
    for queue in queues {
        let size = driver.queue_max(*queue);
        driver.setup_queue(*queue, size);
    }
    driver.start();
    assert!(!driver.needs_reset());
    (driver, handle, poller)
}

fn fill(driver: &Driver, page: u64) {
    driver
        .memory()
        .write_slice(&[7; 4096], GuestAddress(page << 12))
        .unwrap();
}

fn is_gone(driver: &Driver, page: u64) -> bool {
    let mut bytes = [0; 4096];
    driver
        .memory()
        .read_slice(&mut bytes, GuestAddress(page << 12))
        .unwrap();
    let (first, last) = (bytes[0], bytes[4095]);
    assert_eq!(first, last, "a part of a page is gone");
    first == 0
}

fn frames(frames: &[u32]) -> Vec<u8> {
    frames
        .iter()
        .flat_map(|frame| frame.to_le_bytes())
        .collect()
}

fn send(driver: &mut Driver, poller: &Poller, queue: u16, named: &[u32]) {
    let bytes = frames(named);
    let head = driver.add(queue, &[Buffer::Readable(&bytes)]);
    driver.kick(queue);
    let used = driver.wait_used(queue, Some(poller));
    assert_eq!((used.head, used.len), (head, 0));
}

/// A chain of free ranges; pages, then bytes.
fn reported(ranges: &[(u64, u32)]) -> Vec<RawDescriptor> {
    let count = ranges.len();
    let descriptor = |(index, (page, len)): (usize, &(u64, u32))| RawDescriptor {
        addr: page << 12,
        len: *len,
        flags: if index + 1 < count {
            WRITE | NEXT
        } else {
            WRITE
        },
        next: index as u16 + 1,
    };
    ranges.iter().enumerate().map(descriptor).collect()
}

fn report(driver: &mut Driver, poller: &Poller, queue: u16, ranges: &[(u64, u32)]) {
    driver.add_raw(queue, 0, &reported(ranges));
    driver.kick(queue);
    driver.wait_used(queue, Some(poller));
}

#[test]
fn a_balloon_is_as_full_after_a_suspension_and_in_another_process() {
    let (mut driver, handle, poller) = up(&[INFLATE, DEFLATE]);
    handle.set_target(20).unwrap();
    driver.write(driver.config, 4, 4, 12);
    send(&mut driver, &poller, INFLATE, &[3001]);
    let state = written_down(&driver);
    assert_eq!(poller.watched(), 0);
    driver.transport.resume();
    assert_eq!((handle.target(), handle.actual()), (20, 12));
    send(&mut driver, &poller, INFLATE, &[3002]);
    let state_now = written_down(&driver);
    assert_ne!(state_now, state);
    let balloon = Balloon::new(driver.memory(), poller.clone());
    let handle = balloon.handle();
    driver.carry_over(Box::new(balloon), &state_now);
    assert_eq!((handle.target(), handle.actual()), (20, 12));
    send(&mut driver, &poller, DEFLATE, &[3002]);
    // A new target is told to the driver that came with the state.
    let before = driver.config_interrupts();
    handle.set_target(1).unwrap();
    assert_eq!(driver.config_interrupts(), before + 1);
}

#[test]
fn a_target_beyond_the_guest_s_memory_is_not_taken_over() {
    let (driver, _, poller) = up(&[INFLATE, DEFLATE]);
    let mut json = serde_json::to_value(written_down(&driver)).unwrap();
    json["data"]["balloon"]["target"] = u32::MAX.into();
    let state = serde_json::from_value(json).unwrap();
    let balloon = Balloon::new(driver.memory(), poller);
    let other = Driver::with_memory(Box::new(balloon), regions());
    assert!(other.transport.restore(&state).is_err());
}

#[test]
fn pages_put_into_the_balloon_are_gone_and_their_neighbours_are_not() {
    let (mut driver, handle, poller) = up(&[INFLATE, DEFLATE]);
    for page in 3000..3010 {
        fill(&driver, page);
    }
    send(&mut driver, &poller, INFLATE, &[3005, 3001, 3004, 3001]);
    let gone: Vec<u64> = (3000..3010)
        .filter(|page| is_gone(&driver, *page))
        .collect();
    assert_eq!(gone, [3001, 3004, 3005]);
    assert_eq!(driver.interrupts(INFLATE), 1);
    let counters = handle.counters();
    assert_eq!(
        (
            counters.inflated_bytes.get(),
            counters.refused_bytes.get(),
            counters.errors.get()
        ),
        (3 * 4096, 0, 0)
    );
}

#[test]
fn pages_taken_back_are_there_again() {
    let (mut driver, handle, poller) = up(&[INFLATE, DEFLATE]);
    send(&mut driver, &poller, INFLATE, &[3001]);
    send(&mut driver, &poller, DEFLATE, &[3001]);
    fill(&driver, 3001);
    assert!(!is_gone(&driver, 3001));
    assert_eq!(handle.counters().inflated_bytes.get(), 4096);
}

#[test]
fn free_ranges_are_gone_wherever_the_driver_puts_their_queue() {
    for queue in REPORTING {
        let (mut driver, handle, poller) = up(&[INFLATE, DEFLATE, queue]);
        let pages: Vec<u64> = (2048..2560).chain(8192..8704).collect();
        for page in &pages {
            fill(&driver, *page);
        }
        let ranges = [(2048, 2 << 20), (8192, 1 << 20)];
        report(&mut driver, &poller, queue, &ranges);
        let gone = pages.iter().filter(|page| is_gone(&driver, **page)).count();
        assert_eq!(gone, 512 + 256);
        assert!(!is_gone(&driver, 8448));
        let counters = handle.counters();
        assert_eq!(
            (counters.reports.get(), counters.reported_bytes.get()),
            (1, 3 * MIB)
        );
    }
}

#[test]
fn without_reporting_agreed_on_its_queue_gives_nothing_back() {
    let poller = Arc::new(Poller::new().unwrap());
    let memory = regions();
    let balloon = Balloon::new(&memory, poller.clone());
    let handle = balloon.handle();
    let mut driver = Driver::with_memory(Box::new(balloon), memory);
    driver.negotiate(0);
    for queue in [INFLATE, DEFLATE, 2] {
        driver.setup_queue(queue, 16);
    }
    driver.start();
    driver.add_raw(2, 0, &reported(&[(2048, 2 << 20)]));
    driver.kick(2);
    assert_eq!(poller.turn(Some(Duration::ZERO)).unwrap(), 0);
    assert_eq!(handle.counters().reports.get(), 0);
}

#[test]
fn the_driver_is_told_of_a_target_and_tells_what_it_gave() {
    let (mut driver, handle, _poller) = up(&[INFLATE, DEFLATE]);
    assert_eq!((handle.target(), handle.actual()), (0, 0));
    let generation = driver.read(driver.common, 0x15, 1);
    handle.set_target(0x0123).unwrap();
    assert_eq!(driver.config_interrupts(), 1);
    assert_ne!(driver.read(driver.common, 0x15, 1), generation);
    assert_eq!(driver.device_config(), [0x23, 0x01, 0, 0, 0, 0, 0, 0]);
    driver.write(driver.config, 4, 4, 0x0102);
    assert_eq!(handle.actual(), 0x0102);
    assert_eq!(driver.device_config()[4..], [2, 1, 0, 0]);
    driver.reset();
    assert_eq!((handle.target(), handle.actual()), (0x0123, 0));
    // Nobody is there to be told.
    handle.set_target(0).unwrap();
    assert_eq!(driver.config_interrupts(), 1);
}

#[test]
fn a_target_of_more_than_the_guest_has_is_refused() {
    let (_driver, handle, _poller) = up(&[INFLATE, DEFLATE]);
    let max = 32 << 8;
    handle.set_target(max).unwrap();
    let error = handle.set_target(max + 1).unwrap_err();
    assert_eq!(
        error.to_string(),
        "a balloon of 8193 pages: the guest has only 8192"
    );
    assert_eq!(handle.target(), max);
}

#[test]
fn the_driver_writes_nothing_but_what_it_gave_and_is_not_believed_more_than_it_has() {
    // CH 65073259c: actual 0xffffffff.
    let (driver, handle, _poller) = up(&[INFLATE, DEFLATE]);
    for (offset, width) in [(0, 8), (0, 4), (2, 1), (8, 4), (4088, 8)] {
        driver.write(driver.config, offset, width, u64::MAX);
    }
    assert_eq!((handle.target(), handle.actual()), (0, 32 << 8));
    driver.write(driver.config, 5, 1, 0);
    driver.write(driver.config, 6, 2, 0);
    assert_eq!(handle.actual(), 255);
}

#[test]
fn pages_on_both_sides_of_an_unplugged_block_are_given_back_and_its_own_are_not() {
    const BLOCK: u64 = 64 << 10;
    let first = (32 << 20) >> 12;
    let blocks_bytes = 3 * BLOCK as usize;
    let memory = memory_with_blocks(&[(0, 16 << 20)], (32 << 20, blocks_bytes), BLOCK);
    let blocks = memory.iter().find_map(Region::blocks).unwrap();
    let blocks = Arc::clone(blocks);
    let (mut driver, handle, poller) = up_with(memory, &[INFLATE, DEFLATE]);
    (0..3).for_each(|number| blocks.set(number, true));
    (first..first + 48).for_each(|page| fill(&driver, page));
    blocks.set(1, false);
    let named: Vec<u32> = (first as u32..).take(48).collect();
    send(&mut driver, &poller, INFLATE, &named);
    blocks.set(1, true);
    for page in 0..48 {
        assert_eq!(is_gone(&driver, first + page), page / 16 != 1, "{page}");
    }
    let counters = handle.counters();
    assert_eq!(
        (counters.inflated_bytes.get(), counters.refused_bytes.get()),
        (2 * BLOCK, BLOCK)
    );
}

#[test]
fn pages_that_are_no_memory_are_counted_and_left_alone() {
    let (mut driver, handle, poller) = up(&[INFLATE, DEFLATE]);
    fill(&driver, 4095);
    fill(&driver, 8192);
    // The end of a region, the hole, both ends of the other, and what is beyond everything.
    let named = [
        4095,
        4096,
        5000,
        8191,
        8192,
        12287,
        12288,
        u32::MAX,
        u32::MAX - 1,
    ];
    send(&mut driver, &poller, INFLATE, &named);
    assert!(is_gone(&driver, 4095) && !driver.needs_reset());
    let counters = handle.counters();
    let bytes = counters.inflated_bytes.get() + counters.refused_bytes.get();
    assert_eq!(bytes, named.len() as u64 * 4096, "{counters:?}");
    assert_eq!(counters.errors.get(), 0);
}

#[test]
fn a_range_goes_on_from_one_region_to_the_next() {
    let poller = Arc::new(Poller::new().unwrap());
    let memory = memory(&[(0, 8 << 20), (8 << 20, 8 << 20)]);
    let balloon = Balloon::new(&memory, poller.clone());
    let handle = balloon.handle();
    let mut driver = Driver::with_memory(Box::new(balloon), memory);
    driver.negotiate(0);
    driver.setup_queue(INFLATE, 16);
    driver.setup_queue(DEFLATE, 16);
    driver.start();
    for page in [2047, 2048] {
        fill(&driver, page);
    }
    send(&mut driver, &poller, INFLATE, &[2048, 2047]);
    assert!(is_gone(&driver, 2047) && is_gone(&driver, 2048));
    assert_eq!(handle.counters().refused_bytes.get(), 0);
}

#[test]
fn a_chain_names_at_most_1024_pages_and_odd_bytes_are_none() {
    // V17: 10^6 PFNs, the same ones over and over.
    let (mut driver, handle, poller) = up(&[INFLATE, DEFLATE]);
    let mut bytes = frames(&[3000; FRAMES_MAX]);
    bytes.extend(frames(&[3001; 7]));
    bytes.extend([1, 2, 3]);
    fill(&driver, 3001);
    driver.add_indirect(
        INFLATE,
        &[Buffer::Readable(&bytes[..5]), Buffer::Readable(&bytes[5..])],
    );
    driver.kick(INFLATE);
    driver.wait_used(INFLATE, Some(&poller));
    assert!(!is_gone(&driver, 3001));
    let counters = handle.counters();
    assert_eq!(
        (counters.inflated_bytes.get(), counters.refused_bytes.get()),
        (4096, 7 * 4096)
    );
}

#[test]
fn a_report_gives_back_at_most_256_mib() {
    let (mut driver, handle, poller) = up(&[INFLATE, DEFLATE, 2]);
    // The same 16 MiB 32 times over.
    report(&mut driver, &poller, 2, &[(8192, 16 << 20); 32]);
    let counters = handle.counters();
    let most = REPORT_MAX_BYTES as u64;
    assert_eq!(
        (counters.reported_bytes.get(), counters.refused_bytes.get()),
        (most, 512 * MIB - most)
    );
    assert!(!driver.needs_reset());
}

#[test]
fn parts_of_pages_in_a_report_stay() {
    let (mut driver, handle, poller) = up(&[INFLATE, DEFLATE, 2]);
    for page in 2048..2051 {
        fill(&driver, page);
    }
    let chain = [RawDescriptor {
        addr: (2048 << 12) + 1,
        len: 3 * 4096 - 2,
        flags: WRITE,
        next: 0,
    }];
    driver.add_raw(2, 0, &chain);
    driver.kick(2);
    driver.wait_used(2, Some(&poller));
    let gone: Vec<u64> = (2048..2051)
        .filter(|page| is_gone(&driver, *page))
        .collect();
    assert_eq!(gone, [2049]);
    assert_eq!(handle.counters().reported_bytes.get(), 4096);
}

#[test]
fn a_flood_is_answered_one_chain_a_turn_and_the_loop_rests_afterwards() {
    let (mut driver, handle, poller) = up(&[INFLATE, DEFLATE]);
    let bytes = frames(&[3000]);
    for _ in 0..16 {
        driver.add(INFLATE, &[Buffer::Readable(&bytes)]);
    }
    driver.kick(INFLATE);
    for answered in 1..=16 {
        assert_eq!(poller.turn(Some(Duration::ZERO)).unwrap(), 1);
        assert_eq!(driver.used_index(INFLATE), answered);
    }
    poller.turn(Some(Duration::ZERO)).unwrap();
    assert_eq!(poller.turn(Some(Duration::ZERO)).unwrap(), 0);
    assert_eq!(handle.counters().inflated_bytes.get(), 16 * 4096);
}

#[test]
fn a_broken_queue_asks_for_a_reset_and_the_loop_does_not_spin_on_it() {
    for queue in [INFLATE, DEFLATE, 2] {
        let (mut driver, handle, poller) = up(&[INFLATE, DEFLATE, 2]);
        // A range that begins in memory and ends outside (B2.1).
        driver.add_raw(queue, 0, &reported(&[(4095, 8192)]));
        fill(&driver, 4095);
        driver.kick(queue);
        poller.turn(Some(Duration::ZERO)).unwrap();
        assert!(driver.needs_reset() && !is_gone(&driver, 4095));
        driver.kick(queue);
        assert_eq!(poller.turn(Some(Duration::ZERO)).unwrap(), 1);
        assert_eq!(poller.turn(Some(Duration::ZERO)).unwrap(), 0);
        driver.reset();
        assert_eq!((driver.status(), poller.watched()), (0, 0));
        assert_eq!(handle.counters().reported_bytes.get(), 0);
    }
}

#[test]
fn a_device_with_its_rings_given_back_goes_on_or_asks_for_a_reset() {
    // The driver names the pages that its rings are in.
    let (mut driver, _handle, poller) = up(&[INFLATE, DEFLATE]);
    let named: Vec<u32> = (0..64).collect();
    let bytes = frames(&named);
    driver.add(INFLATE, &[Buffer::Readable(&bytes)]);
    driver.kick(INFLATE);
    for _ in 0..8 {
        poller.turn(Some(Duration::ZERO)).unwrap();
    }
    assert_eq!(poller.turn(Some(Duration::ZERO)).unwrap(), 0);
    driver.reset();
    assert_eq!((driver.status(), poller.watched()), (0, 0));
}

#[test]
fn without_its_queues_it_asks_for_a_reset() {
    for queues in [&[][..], &[INFLATE], &[DEFLATE]] {
        let poller = Arc::new(Poller::new().unwrap());
        let memory = regions();
        let mut driver =
            Driver::with_memory(Box::new(Balloon::new(&memory, poller.clone())), memory);
        driver.negotiate(0);
        for queue in queues {
            driver.setup_queue(*queue, 8);
        }
        driver.start();
        assert!(driver.needs_reset() && driver.transport.take_failure().is_some());
        driver.reset();
        assert_eq!((driver.status(), poller.watched()), (0, 0));
    }
}

#[test]
fn after_a_reset_nothing_is_given_back() {
    let (mut driver, handle, poller) = up(&[INFLATE, DEFLATE, 2]);
    fill(&driver, 3000);
    let bytes = frames(&[3000]);
    driver.add(INFLATE, &[Buffer::Readable(&bytes)]);
    driver.kick(INFLATE);
    driver.set_status(0);
    assert_eq!(poller.watched(), 0);
    poller.turn(Some(Duration::ZERO)).unwrap();
    assert!(!is_gone(&driver, 3000));
    assert_eq!(handle.counters().inflated_bytes.get(), 0);
}

#[test]
fn every_access_to_its_registers_is_answered() {
    for value in [0, u64::MAX, 0x0f0f_0f0f_0f0f_0f0f] {
        let (driver, _handle, _poller) = up(&[INFLATE, DEFLATE, 2]);
        sweep(&driver, value);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_is_in_a_ring_the_balloon_lives_on(
        chains in proptest::collection::vec((0u16..3, proptest::collection::vec(any_descriptor(), 1..8)), 1..8),
    ) {
        let (mut driver, handle, poller) = up(&[INFLATE, DEFLATE, 2]);
        for (queue, descriptors) in &chains {
            driver.add_raw(*queue, 0, descriptors);
            driver.kick(*queue);
            poller.turn(Some(Duration::ZERO)).unwrap();
        }
        driver.reset();
        prop_assert_eq!((driver.status(), poller.watched()), (0, 0));
        prop_assert_eq!(handle.counters().errors.get(), 0);
    }
}
