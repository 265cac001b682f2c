//! The memory device against a driver, an honest one and others.

mod turns;

use super::{Backing, Block, Mem, MemHandle};
use crate::GuestMemory;
use crate::event::Poller;
use crate::testing::{Buffer, Driver, any_descriptor, memory_with_blocks, sweep, written_down};
use crate::virtio::device::RestoreError;
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _};

const START: u64 = 1 << 30;
const BLOCK: u64 = 2 << 20;
const BLOCKS: u64 = 8;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;
const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

/// What the guest's CPUs could reach.
#[derive(Default)]
struct Slots {
    mapped: Mutex<BTreeSet<u32>>,
    /// Calls until one fails, and all after it.
    fails_after: AtomicU64,
    /// Only one fails.
    once: AtomicBool,
}

impl Slots {
    fn mapped(&self) -> Vec<u32> {
        self.mapped.lock().unwrap().iter().copied().collect()
    }

    /// One call fails, after so many.
    fn refuses_once_after(&self, calls: u64) {
        self.once.store(true, Ordering::Relaxed);
        self.fails_after.store(calls, Ordering::Relaxed);
    }

    fn step(&self, block: &Block<'_>) -> io::Result<()> {
        assert_eq!(block.address, START + u64::from(block.number) * BLOCK);
        assert_eq!(block.memory.len() as u64, BLOCK);
        let left = self.fails_after.load(Ordering::Relaxed);
        if left == 0 {
            if self.once.swap(false, Ordering::Relaxed) {
                self.fails_after.store(u64::MAX, Ordering::Relaxed);
            }
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.fails_after.store(left - 1, Ordering::Relaxed);
        Ok(())
    }
}

impl Backing for Slots {
    fn map(&self, block: Block<'_>) -> io::Result<()> {
        self.step(&block)?;
        assert!(self.mapped.lock().unwrap().insert(block.number));
        Ok(())
    }

    fn unmap(&self, block: Block<'_>) -> io::Result<()> {
        self.step(&block)?;
        assert!(self.mapped.lock().unwrap().remove(&block.number));
        Ok(())
    }
}

struct Guest {
    driver: Driver,
    handle: MemHandle,
    slots: Arc<Slots>,
    poller: Arc<Poller>,
}

impl Guest {
    fn up() -> Guest {
        Guest::up_of(BLOCKS)
    }

    /// The same with so many blocks.
    fn up_of(blocks: u64) -> Guest {
        let mut guest = Guest::fresh_of(blocks);
        guest.driver.negotiate(1 << 1);
        guest.driver.setup_queue(0, 16);
        guest.driver.start();
        guest
    }

    /// One whose driver has done nothing yet.
    fn fresh() -> Guest {
        Guest::fresh_of(BLOCKS)
    }

    /// The same with so many blocks.
    fn fresh_of(blocks: u64) -> Guest {
        let poller = Arc::new(Poller::new().unwrap());
        let pluggable = (START, (blocks * BLOCK) as usize);
        let memory = memory_with_blocks(&[(0, 16 << 20)], pluggable, BLOCK);
        let slots = Arc::new(Slots {
            fails_after: AtomicU64::new(u64::MAX),
            ..Slots::default()
        });
        let max = blocks * BLOCK;
        let mem = Mem::new(&memory, max, slots.clone(), poller.clone()).unwrap();
        let handle = mem.handle();
        Guest {
            driver: Driver::with_memory(Box::new(mem), memory),
            handle,
            slots,
            poller,
        }
    }

    /// A guest that was granted as many blocks.
    fn granted(blocks: u64) -> Guest {
        let guest = Guest::up();
        guest.handle.request(blocks * BLOCK).unwrap();
        guest
    }

    fn memory(&self) -> &GuestMemory {
        self.driver.memory()
    }

    /// Asks for something about blocks and returns the type and the state of the answer.
    fn ask(&mut self, kind: u16, block: u64, blocks: u16) -> (u16, u16) {
        let bytes = request(kind, START + block * BLOCK, blocks);
        self.ask_raw(&bytes)
    }

    fn ask_raw(&mut self, bytes: &[u8]) -> (u16, u16) {
        self.driver
            .add(0, &[Buffer::Readable(bytes), Buffer::Writable(10)]);
        self.driver.kick(0);
        let used = self.driver.wait_used(0, Some(&self.poller));
        assert_eq!(used.len, 10);
        assert_eq!(used.data[2..8], [0; 6]);
        let field = |at: usize| u16::from_le_bytes([used.data[at], used.data[at + 1]]);
        (field(0), field(8))
    }

    fn plug(&mut self, block: u64, blocks: u16) -> u16 {
        self.ask(PLUG, block, blocks).0
    }

    fn unplug(&mut self, block: u64, blocks: u16) -> u16 {
        self.ask(UNPLUG, block, blocks).0
    }

    /// The blocks of which a device gets a slice.
    fn reachable(&self) -> Vec<u64> {
        let slice = |block: &u64| {
            self.memory()
                .get_slice(GuestAddress(START + block * BLOCK), BLOCK as usize)
        };
        let blocks = self.config(3) / BLOCK;
        (0..blocks).filter(|block| slice(block).is_ok()).collect()
    }

    /// All that is told about what is plugged is the same.
    #[track_caller]
    fn has(&self, blocks: &[u32]) {
        assert_eq!(self.slots.mapped(), blocks);
        let reachable: Vec<u32> = self
            .reachable()
            .into_iter()
            .map(|block| block as u32)
            .collect();
        assert_eq!(reachable, blocks);
        assert_eq!(self.handle.plugged(), blocks.len() as u64 * BLOCK);
    }

    fn config(&self, field: usize) -> u64 {
        let config = self.driver.device_config();
        u64::from_le_bytes(config[8 * field..][..8].try_into().unwrap())
    }
}

fn request(kind: u16, address: u64, blocks: u16) -> Vec<u8> {
    let mut bytes = vec![0; 24];
    bytes[..2].copy_from_slice(&kind.to_le_bytes());
    bytes[8..16].copy_from_slice(&address.to_le_bytes());
    bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
    bytes
}

#[test]
fn a_guest_grows_as_it_is_asked_to_and_shrinks_again() {
    let mut guest = Guest::up();
    guest.has(&[]);
    guest.handle.request(3 * BLOCK).unwrap();
    assert_eq!(guest.driver.config_interrupts(), 1);
    assert_eq!(
        (0..7).map(|field| guest.config(field)).collect::<Vec<_>>(),
        [
            BLOCK,
            0,
            START,
            BLOCKS * BLOCK,
            BLOCKS * BLOCK,
            0,
            3 * BLOCK
        ]
    );
    assert_eq!((guest.plug(1, 2), guest.plug(4, 1)), (ACK, ACK));
    guest.has(&[1, 2, 4]);
    assert_eq!(guest.config(5), 3 * BLOCK);
    guest.handle.request(BLOCK).unwrap();
    assert_eq!(guest.driver.config_interrupts(), 2);
    assert_eq!((guest.unplug(2, 1), guest.unplug(4, 1)), (ACK, ACK));
    guest.has(&[1]);
    assert_eq!(guest.handle.counters().refused.get(), 0);
}

#[test]
fn more_than_was_granted_is_not_plugged() {
    let mut guest = Guest::granted(2);
    assert_eq!((guest.plug(0, 3), guest.plug(0, 2)), (NACK, ACK));
    assert_eq!(guest.plug(2, 1), NACK);
    guest.has(&[0, 1]);
    // Less is wanted than it has: it may only unplug.
    guest.handle.request(0).unwrap();
    assert_eq!((guest.plug(2, 1), guest.unplug(1, 1)), (NACK, ACK));
    guest.has(&[0]);
}

#[test]
fn requests_are_of_whole_blocks_and_no_more_than_the_region() {
    let guest = Guest::up();
    guest.handle.request(2 * BLOCK - 1).unwrap();
    assert_eq!(guest.handle.requested(), BLOCK);
    let max = BLOCKS * BLOCK;
    let error = guest.handle.request(max + 1).unwrap_err();
    let text = format!(
        "{} bytes of memory to plug: this guest can have {max}",
        max + 1
    );
    assert_eq!(error.to_string(), text);
    assert_eq!(guest.handle.requested(), BLOCK);
}

#[test]
fn blocks_are_plugged_once_and_unplugged_once() {
    // M4: unplug twice.
    let mut guest = Guest::granted(BLOCKS);
    assert_eq!(
        (guest.plug(2, 2), guest.plug(3, 2), guest.plug(2, 1)),
        (ACK, ERROR, ERROR)
    );
    guest.has(&[2, 3]);
    assert_eq!((guest.unplug(1, 2), guest.unplug(3, 2)), (ERROR, ERROR));
    assert_eq!((guest.unplug(2, 2), guest.unplug(2, 2)), (ACK, ERROR));
    guest.has(&[]);
    assert_eq!(guest.handle.counters().refused.get(), 5);
}

#[test]
fn the_state_of_blocks_is_told() {
    let mut guest = Guest::granted(BLOCKS);
    guest.plug(2, 2);
    let states: Vec<(u16, u16)> = [(2, 2), (4, 2), (1, 2), (0, 8)]
        .into_iter()
        .map(|(block, blocks)| guest.ask(STATE, block, blocks))
        .collect();
    assert_eq!(states, [(ACK, 0), (ACK, 1), (ACK, 2), (ACK, 2)]);
    assert_eq!(guest.ask(STATE, 8, 1).0, ERROR);
}

#[test]
fn what_is_unplugged_is_gone_and_new_when_it_is_plugged_again() {
    let mut guest = Guest::granted(2);
    guest.plug(0, 2);
    let place = GuestAddress(START + BLOCK);
    guest.memory().write_obj(7u64, place).unwrap();
    guest.unplug(1, 1);
    assert!(guest.memory().read_obj::<u64>(place).is_err());
    guest.plug(1, 1);
    assert_eq!(guest.memory().read_obj::<u64>(place).unwrap(), 0);
}

#[test]
fn what_a_device_writes_into_a_block_after_it_was_unplugged_is_not_there_later() {
    let mut guest = Guest::granted(1);
    guest.plug(0, 1);
    let memory = Arc::clone(guest.memory());
    let slice = memory.get_slice(GuestAddress(START), 8).unwrap();
    guest.unplug(0, 1);
    slice.copy_from(&[7u8; 8]);
    guest.plug(0, 1);
    assert_eq!(memory.read_obj::<u64>(GuestAddress(START)).unwrap(), 0);
}

#[test]
fn all_blocks_are_unplugged_at_once() {
    let mut guest = Guest::granted(BLOCKS);
    assert_eq!(guest.ask(UNPLUG_ALL, 0, 0).0, ACK);
    guest.plug(0, 1);
    guest.plug(5, 3);
    assert_eq!(guest.ask(UNPLUG_ALL, 99, 7).0, ACK);
    guest.has(&[]);
}

#[test]
fn requests_that_are_none_are_answered_as_errors() {
    let mut guest = Guest::granted(BLOCKS);
    for (kind, address, blocks) in [
        (PLUG, START, 0),
        (PLUG, START + 4096, 1),
        (PLUG, 0, 1),
        (PLUG, START - BLOCK, 1),
        (UNPLUG, START, u16::MAX),
        (PLUG, u64::MAX - BLOCK + 1, 2),
        (4, START, 1),
        (u16::MAX, START, 1),
    ] {
        assert_eq!(guest.ask_raw(&request(kind, address, blocks)).0, ERROR);
    }
    assert_eq!(guest.ask_raw(&request(PLUG, START, 1)[..23]).0, ERROR);
    guest.has(&[]);
    assert!(!guest.driver.needs_reset());
}

#[test]
fn without_room_for_the_answer_nothing_is_done() {
    let mut guest = Guest::granted(BLOCKS);
    let bytes = request(PLUG, START, 1);
    for buffers in [
        &[Buffer::Readable(&bytes)][..],
        &[Buffer::Readable(&bytes), Buffer::Writable(9)],
    ] {
        guest.driver.add(0, buffers);
        guest.driver.kick(0);
        assert_eq!(guest.driver.wait_used(0, Some(&guest.poller)).len, 0);
    }
    guest.has(&[]);
    assert_eq!(guest.handle.counters().refused.get(), 2);
}

#[test]
fn a_host_that_cannot_map_blocks_is_busy_and_nothing_has_changed() {
    let mut guest = Guest::granted(BLOCKS);
    guest.plug(0, 2);
    // The second of three cannot be mapped; the first is unmapped again, for which there is one call more.
    guest.slots.fails_after.store(1, Ordering::Relaxed);
    assert_eq!(guest.plug(4, 3), BUSY);
    assert_eq!(guest.handle.counters().errors.get(), 2);
    // It could not be unmapped either: the guest's CPUs reach it, devices do not.
    assert_eq!(
        (guest.slots.mapped(), guest.reachable()),
        (vec![0, 1, 4], vec![0, 1])
    );
    guest.slots.mapped.lock().unwrap().remove(&4);
    guest.slots.fails_after.store(0, Ordering::Relaxed);
    assert_eq!(guest.unplug(0, 2), BUSY);
    guest.has(&[0, 1]);
    guest.slots.fails_after.store(u64::MAX, Ordering::Relaxed);
    assert_eq!((guest.unplug(0, 2), guest.plug(4, 3)), (ACK, ACK));
    guest.has(&[4, 5, 6]);
}

#[test]
fn a_block_that_could_be_unmapped_but_not_mapped_again_is_gone() {
    let mut guest = Guest::granted(BLOCKS);
    guest.plug(0, 3);
    guest.slots.fails_after.store(1, Ordering::Relaxed);
    assert_eq!(guest.unplug(0, 3), BUSY);
    guest.has(&[1, 2]);
}

#[test]
fn what_is_plugged_outlives_a_reset_of_the_device() {
    let mut guest = Guest::granted(2);
    guest.plug(0, 2);
    guest.driver.reset();
    guest.has(&[0, 1]);
    assert_eq!(guest.poller.watched(), 0);
    guest.driver.negotiate(0);
    guest.driver.setup_queue(0, 8);
    guest.driver.start();
    assert_eq!(guest.config(5), 2 * BLOCK);
    assert_eq!(guest.ask(UNPLUG_ALL, 0, 0).0, ACK);
    guest.has(&[]);
}

#[test]
fn a_ring_in_a_block_that_is_unplugged_asks_for_a_reset() {
    let mut guest = Guest::granted(2);
    guest.plug(0, 1);
    guest.driver.reset();
    guest.driver.negotiate(0);
    // The available ring lies in the block; the driver unplugs it by the queue that it is of.
    let common = guest.driver.common;
    guest.driver.write(common, 0x16, 2, 0);
    for (offset, address) in [(0x20, 0x10_0000), (0x28, START), (0x30, 0x10_2000)] {
        guest.driver.write(common, offset, 8, address);
    }
    guest.driver.write(common, 0x18, 2, 8);
    guest.driver.write(common, 0x1c, 2, 1);
    guest.driver.start();
    assert!(!guest.driver.needs_reset());
    let memory = Arc::clone(guest.memory());
    let descriptor = |addr: u64, len: u32, flags: u16, next: u16| {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        bytes
    };
    let mut chain = descriptor(0x10_4000, 24, 1, 1);
    chain.extend(descriptor(0x10_5000, 10, 2, 0));
    memory.write_slice(&chain, GuestAddress(0x10_0000)).unwrap();
    memory
        .write_slice(&request(UNPLUG, START, 1), GuestAddress(0x10_4000))
        .unwrap();
    memory.write_obj(1u16, GuestAddress(START + 2)).unwrap();
    guest.driver.kick(0);
    guest.poller.turn(Some(Duration::ZERO)).unwrap();
    assert!(guest.driver.needs_reset());
    guest.has(&[]);
    // The turn that the queue asked for itself.
    guest.poller.turn(Some(Duration::ZERO)).unwrap();
    assert_eq!(guest.poller.turn(Some(Duration::ZERO)).unwrap(), 0);
}

#[test]
fn without_its_queue_it_asks_for_a_reset() {
    let mut guest = Guest::up();
    guest.driver.reset();
    guest.driver.negotiate(0);
    guest.driver.start();
    assert!(guest.driver.needs_reset() && guest.driver.transport.take_failure().is_some());
}

#[test]
fn memory_without_a_pluggable_region_has_no_such_device() {
    let poller = Arc::new(Poller::new().unwrap());
    let memory = crate::testing::memory(&[(0, 1 << 20)]);
    let made = Mem::new(&memory, BLOCK, Arc::<Slots>::default(), poller);
    assert!(made.is_err());
}

#[test]
fn every_access_to_its_registers_is_answered() {
    for value in [0, u64::MAX, 0x0f0f_0f0f_0f0f_0f0f] {
        sweep(&Guest::granted(2).driver, value);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_is_in_the_ring_the_device_lives_on(
        chains in proptest::collection::vec(proptest::collection::vec(any_descriptor(), 1..8), 1..8),
    ) {
        let mut guest = Guest::granted(2);
        for descriptors in &chains {
            guest.driver.add_raw(0, 0, descriptors);
            guest.driver.kick(0);
            guest.poller.turn(Some(Duration::ZERO)).unwrap();
        }
        guest.driver.reset();
        prop_assert_eq!((guest.driver.status(), guest.poller.watched()), (0, 0));
        prop_assert!(guest.handle.plugged() <= 2 * BLOCK);
    }

    #[test]
    fn in_whatever_order_a_guest_never_has_more_than_was_granted(
        steps in proptest::collection::vec((0u16..4, 0u64..10, 0u16..5, 0u64..5), 1..40),
    ) {
        let mut guest = Guest::up();
        let mut model: BTreeSet<u32> = BTreeSet::new();
        for (kind, block, blocks, granted) in steps {
            guest.handle.request(granted * BLOCK).unwrap();
            let before = guest.handle.plugged();
            let (answer, _) = guest.ask(kind, block, blocks);
            let range = block as u32..block as u32 + u32::from(blocks);
            if answer == ACK {
                match kind {
                    PLUG => model.extend(range),
                    UNPLUG => model.retain(|block| !range.contains(block)),
                    UNPLUG_ALL => model.clear(),
                    _ => {}
                }
            }
            guest.has(&model.iter().copied().collect::<Vec<_>>());
            let after = guest.handle.plugged();
            prop_assert!(after <= before || after <= granted * BLOCK);
        }
    }
}

#[test]
fn what_is_plugged_stays_so_over_a_suspension_and_in_another_process() {
    let mut guest = Guest::granted(5);
    assert_eq!((guest.plug(1, 2), guest.plug(6, 1)), (ACK, ACK));
    let state = written_down(&guest.driver);
    guest.driver.transport.resume();
    assert_eq!(guest.slots.mapped(), [1, 2, 6]);
    assert_eq!(guest.unplug(6, 1), ACK);
    // The other one has the state of before, and memory of its own.
    let other = Guest::fresh();
    other.driver.transport.restore(&state).unwrap();
    other.driver.transport.resume();
    other.has(&[1, 2, 6]);
    assert_eq!(other.handle.requested(), 5 * BLOCK);
    assert_eq!(other.driver.status(), 0x0f);
}

#[test]
fn a_host_that_refuses_a_block_is_an_error_of_its_own() {
    let mut guest = Guest::granted(5);
    assert_eq!(guest.plug(0, 5), ACK);
    let state = written_down(&guest.driver);
    let other = Guest::fresh();
    other.slots.fails_after.store(3, Ordering::Relaxed);
    let refused = other.driver.transport.restore(&state);
    assert!(matches!(refused, Err(RestoreError::Memory(_))));
    // It takes none back either, and all that is told is still the same.
    other.has(&[0, 1, 2]);
}

#[test]
fn blocks_that_cannot_be_are_not_taken_over() {
    let mut guest = Guest::granted(5);
    assert_eq!(guest.plug(0, 2), ACK);
    let state = written_down(&guest.driver);
    for (field, value) in [
        ("plugged", serde_json::json!([1, 0])),
        ("plugged", serde_json::json!([1, 1])),
        ("plugged", serde_json::json!([8])),
        ("requested", (9 * BLOCK).into()),
        ("requested", (BLOCK + 1).into()),
        ("block_bytes", (2 * BLOCK).into()),
    ] {
        let mut json = serde_json::to_value(&state).unwrap();
        json["data"]["mem"][field] = value;
        let impossible = serde_json::from_value(json).unwrap();
        let other = Guest::fresh();
        assert!(
            other.driver.transport.restore(&impossible).is_err(),
            "{field}"
        );
        other.has(&[]);
    }
}
