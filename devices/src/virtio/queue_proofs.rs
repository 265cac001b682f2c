//! Proof: at every size and wherever its wrapping indices stand, a queue gives out each available chain once and in order, never has more
//! of them in flight than it is long, shows the driver each one that came back and nothing else, and asks for and sends notifications
//! exactly where sections 2.7.7 and 2.7.10 do.
//!
//! The model counts chains since the beginning of time, in 64 bits, and keeps the rings as lists. Sequences of operations are enumerated
//! on small queues from indices around each wrap; the answers to a single question over all 2^16 indices.

use super::*;
use crate::memory::{load, read, write};
use crate::testing::memory;
use proptest::prelude::*;
use std::collections::VecDeque;

const DESCRIPTORS: u64 = 0x10_0000;
const AVAILABLE: u64 = 0x20_0000;
const USED: u64 = 0x30_0000;
const LONGEST: u16 = 1 << 15;

/// A queue, and the driver's hand in its memory.
struct Rings {
    memory: GuestMemory,
    queue: ActiveQueue,
}

impl Rings {
    fn new(size: u16, features: u64) -> Rings {
        let memory = memory(&[(0, 0x40_0000)]);
        let settings = QueueSettings {
            max_size: LONGEST,
            size,
            enabled: true,
            vector: 0,
            descriptors: DESCRIPTORS,
            available: AVAILABLE,
            used: USED,
        };
        let kick = Arc::new(EventFd::new(0).unwrap());
        let queue = ActiveQueue::new(0, &settings, features, &memory, kick).unwrap();
        Rings { memory, queue }
    }

    fn with_event_idx(size: u16) -> Rings {
        Rings::new(size, 1 << VIRTIO_RING_F_EVENT_IDX)
    }

    /// Both sides have used `index` entries already, and none is in flight.
    fn stand_at(&mut self, index: u16) {
        self.queue.go_on_at(QueuePosition {
            next_available: index,
            next_used: index,
        });
        self.available(index);
        self.put(USED + 2, index);
    }

    fn put(&self, address: u64, value: u16) {
        write(&self.memory, address, &value.to_le_bytes()).unwrap();
    }

    /// The driver's index.
    fn available(&self, index: u16) {
        self.put(AVAILABLE + 2, index);
    }

    /// The driver names a head in the entry of this index.
    fn name(&self, index: u16, head: u16) {
        let entry = u64::from(index % self.queue.size());
        self.put(AVAILABLE + 4 + 2 * entry, head);
    }

    fn used_event(&self) -> u64 {
        AVAILABLE + 4 + 2 * u64::from(self.queue.size())
    }

    fn avail_event(&self) -> u16 {
        let at = USED + 4 + 8 * u64::from(self.queue.size());
        load(&self.memory, at).unwrap()
    }

    /// Where the device stands in the available and the used ring.
    fn stands(&self) -> (u16, u16) {
        let position = self.queue.position();
        (position.next_available, position.next_used)
    }

    fn pop(&mut self) -> Result<Option<u16>, BrokenQueue> {
        let chain = self.queue.pop(&self.memory)?;
        Ok(chain.map(|chain| chain.head_index()))
    }
}

fn sizes() -> impl Iterator<Item = u16> {
    (0..16).map(|power| 1 << power)
}

/// Indices around which something wraps, for a queue of `size`.
fn turns(size: u16) -> Vec<u16> {
    let turns = [0, 1 << 15, size];
    let mut all: Vec<u16> = turns
        .into_iter()
        .flat_map(|turn| {
            [
                turn.wrapping_sub(2),
                turn.wrapping_sub(1),
                turn,
                turn.wrapping_add(1),
            ]
        })
        .collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Indices that the driver may show to a device that stands at `start`: all where a queue is shortest, usual or longest, elsewhere those
/// around each wrap and each bound.
fn indices(size: u16, start: u16) -> Vec<u16> {
    if [1, 256, LONGEST].contains(&size) {
        return (0..=u16::MAX).collect();
    }
    let from_start = turns(size).into_iter().map(|turn| start.wrapping_add(turn));
    from_start.chain(turns(size)).collect()
}

#[test]
fn an_available_index_is_taken_exactly_if_it_is_no_more_than_the_size_ahead() {
    for size in sizes() {
        let mut rings = Rings::new(size, 0);
        for start in turns(size) {
            rings.stand_at(start);
            for index in indices(size, start) {
                rings.available(index);
                let ahead = (u32::from(index) + 0x1_0000 - u32::from(start)) % 0x1_0000;
                match rings.pop() {
                    Ok(None) => assert_eq!(ahead, 0, "{size}: {start} to {index}"),
                    Ok(Some(_)) => {
                        assert!(
                            (1..=u32::from(size)).contains(&ahead),
                            "{size}: {start} to {index}"
                        );
                        rings.queue.undo_pop();
                    }
                    Err(_) => assert!(ahead > u32::from(size), "{size}: {start} to {index}"),
                }
                assert_eq!(rings.stands(), (start, start));
            }
        }
    }
}

#[test]
fn a_full_queue_gives_out_each_chain_once_and_no_more_until_one_comes_back() {
    for size in sizes() {
        for start in [0, 0u16.wrapping_sub(size / 2 + 1)] {
            let mut rings = Rings::new(size, 0);
            rings.stand_at(start);
            for number in 0..size {
                rings.name(start.wrapping_add(number), size - 1 - number);
            }
            rings.available(start.wrapping_add(size));
            for number in 0..size {
                assert_eq!(rings.pop().unwrap(), Some(size - 1 - number));
            }
            assert_eq!(rings.pop().unwrap(), None);
            // The driver makes one available that it cannot have: all are in flight.
            rings.available(start.wrapping_add(size).wrapping_add(1));
            assert!(rings.pop().is_err(), "{size} from {start}");
            rings.queue.push_used(&rings.memory, 0, 1).unwrap();
            assert!(rings.pop().unwrap().is_some(), "{size} from {start}");
        }
    }
}

/// What device and driver may do next.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The driver makes one more available, whether it has one left or not.
    Offer,
    /// The device takes one.
    Pop,
    /// It gives back the one taken last, unread.
    Undo,
    /// It hands back one, or several at once.
    Push(u64),
}

const STEPS: [Step; 6] = [
    Step::Offer,
    Step::Pop,
    Step::Undo,
    Step::Push(1),
    Step::Push(2),
    Step::Push(3),
];

/// Both sides' books: counts since the beginning of time and what each entry should hold.
struct Model {
    size: u64,
    start: u64,
    offered: u64,
    taken: u64,
    returned: u64,
    /// Heads that are in flight, oldest first.
    in_flight: VecDeque<u16>,
    /// What was written to the entries of the used ring, by position.
    used: Vec<(u32, u32)>,
}

/// The head that is named at a count: so that neighbours differ, and entries of the ring written over.
fn head(count: u64, size: u64) -> u16 {
    (count * 7 % size) as u16
}

impl Model {
    fn new(size: u16, start: u16) -> Model {
        let count = u64::from(start);
        Model {
            size: size.into(),
            start: count,
            offered: count,
            taken: count,
            returned: count,
            in_flight: VecDeque::new(),
            used: vec![(0, 0); size.into()],
        }
    }

    /// Does one step on both; `None` if the device would not do that, or the queue is broken as it should be.
    fn step(&mut self, rings: &mut Rings, step: Step) -> Option<()> {
        match step {
            Step::Offer => {
                rings.name(self.offered as u16, head(self.offered, self.size));
                self.offered += 1;
                rings.available(self.offered as u16);
            }
            Step::Pop => {
                let waiting = self.offered - self.taken;
                let full = self.in_flight.len() as u64 == self.size;
                let popped = rings.pop();
                if waiting > self.size || waiting > 0 && full {
                    assert!(popped.is_err(), "more than there can be");
                    return None;
                }
                let expected = (waiting > 0).then(|| head(self.taken, self.size));
                assert_eq!(popped.unwrap(), expected);
                self.in_flight.extend(expected);
                self.taken += u64::from(expected.is_some());
            }
            Step::Undo => {
                self.in_flight.pop_back()?;
                rings.queue.undo_pop();
                self.taken -= 1;
            }
            Step::Push(count) => {
                let mut chains = Vec::new();
                for _ in 0..count {
                    // Bytes that tell the entries apart.
                    let bytes = (self.returned * 3 + 1) as u32;
                    let head = self.in_flight.pop_front()?;
                    self.used[(self.returned % self.size) as usize] = (head.into(), bytes);
                    self.returned += 1;
                    chains.push((head, bytes));
                }
                match chains[..] {
                    [(head, bytes)] => rings.queue.push_used(&rings.memory, head, bytes),
                    _ => rings.queue.push_used_together(&rings.memory, &chains),
                }
                .unwrap();
            }
        }
        Some(())
    }

    /// Compares what the driver sees and where the device stands.
    fn check(&self, rings: &Rings) {
        let shown = load(&rings.memory, USED + 2).unwrap();
        assert_eq!(shown, self.returned as u16);
        assert_eq!(rings.stands(), (self.taken as u16, self.returned as u16));
        assert_eq!(self.taken - self.returned, self.in_flight.len() as u64);
        assert!(self.in_flight.len() as u64 <= self.size);
        for (entry, expected) in (0u64..).zip(&self.used) {
            let [head, bytes] = [0, 4].map(|field| {
                let at = USED + 4 + 8 * entry + field;
                u32::from_le_bytes(read(&rings.memory, at).unwrap())
            });
            // An entry that nothing came back in since the start is as it was.
            if entry_written(entry, self) {
                assert_eq!((head, bytes), *expected);
            }
        }
    }
}

fn entry_written(entry: u64, model: &Model) -> bool {
    (model.start..model.returned).any(|count| count % model.size == entry)
}

/// All sequences of `STEPS` up to a length, each from the beginning.
fn sequences(longest: u32) -> impl Iterator<Item = Vec<Step>> {
    let count = STEPS.len().pow(longest);
    (0..count).map(move |number| {
        let digit = |place: u32| STEPS[number / STEPS.len().pow(place) % STEPS.len()];
        (0..longest).map(digit).collect()
    })
}

#[test]
fn every_sequence_of_steps_agrees_with_counters_that_never_wrap() {
    let mut broken = 0;
    for (size, longest) in [(1, 5), (2, 6), (4, 5)] {
        let mut rings = Rings::new(size, 0);
        for start in [0, 0u16.wrapping_sub(size), 0x7fff] {
            // Two chains in flight already, where there is room: the sequences need not begin with that.
            for early in [0, 2.min(size)] {
                for steps in sequences(longest) {
                    rings.stand_at(start);
                    let mut model = Model::new(size, start);
                    for _ in 0..early {
                        model.step(&mut rings, Step::Offer).unwrap();
                        model.step(&mut rings, Step::Pop).unwrap();
                    }
                    let done = steps
                        .iter()
                        .try_for_each(|step| model.step(&mut rings, *step));
                    match done {
                        Some(()) => model.check(&rings),
                        None => broken += 1,
                    }
                }
            }
        }
    }
    assert!(broken > 100);
}

proptest! {
    #[test]
    fn any_long_sequence_agrees_with_counters_that_never_wrap(
        power in 0u32..9,
        start in any::<u16>(),
        steps in proptest::collection::vec(prop_oneof![
            4 => Just(Step::Offer), 4 => Just(Step::Pop), 1 => Just(Step::Undo), 3 => (1u64..9).prop_map(Step::Push)
        ], 0..2000),
    ) {
        let size = 1 << power;
        let mut rings = Rings::new(size, 0);
        rings.stand_at(start);
        let mut model = Model::new(size, start);
        for step in steps {
            let possible = match step {
                // A driver that has none left offers none; the rest is in the sequences above.
                Step::Offer => model.offered - model.returned < model.size,
                Step::Push(count) => count <= model.in_flight.len() as u64,
                Step::Undo => !model.in_flight.is_empty(),
                Step::Pop => true,
            };
            if possible {
                model.step(&mut rings, step).unwrap();
            }
        }
        model.check(&rings);
    }
}

/// The spec's words: the event index lies behind `old` and was passed on the way to `new`.
fn passed(event: u16, old: u16, new: u16) -> bool {
    let ahead = |of: u16| (u32::from(of) + 0x1_0000 - u32::from(old)) % 0x1_0000;
    let first_beyond = (ahead(event) + 1) % 0x1_0000;
    first_beyond != 0 && first_beyond <= ahead(new)
}

/// The formula of `vring_need_event` as it stands in the header of appendix A, in integers that do not wrap.
fn formula(event: u16, old: u16, new: u16) -> bool {
    let [event, old, new] = [event, old, new].map(i32::from);
    (new - event - 1).rem_euclid(0x1_0000) < (new - old).rem_euclid(0x1_0000)
}

#[test]
fn an_event_is_needed_exactly_if_the_index_passed_it() {
    for old in turns(256) {
        for new in turns(256) {
            for event in 0..=u16::MAX {
                let needed = needs_event(event, old, new);
                assert_eq!(needed, passed(event, old, new), "{event} in {old}..{new}");
                assert_eq!(needed, formula(event, old, new), "{event} in {old}..{new}");
            }
        }
    }
}

#[test]
#[cfg_attr(
    debug_assertions,
    ignore = "2^33 answers: `cargo test --release` takes some seconds"
)]
fn an_event_is_needed_exactly_if_the_index_passed_it_for_every_pair_of_indices() {
    for old in [0, 0xffff] {
        for new in 0..=u16::MAX {
            for event in 0..=u16::MAX {
                let needed = needs_event(event, old, new);
                assert!(needed == passed(event, old, new), "{event} in {old}..{new}");
            }
        }
    }
}

#[test]
fn the_driver_is_told_exactly_if_it_wants_to_be() {
    for size in [1, 256, LONGEST] {
        let mut rings = Rings::with_event_idx(size);
        let mut plain = Rings::new(size, 0);
        let at = rings.used_event();
        for old in [0u16, 0x7fff, 0xffff] {
            for pushed in [0, 1, 2, size] {
                let new = old.wrapping_add(pushed);
                for event in 0..=u16::MAX {
                    rings.put(at, event);
                    rings.queue.told = old;
                    rings.queue.queue.set_next_used(new);
                    let told = rings.queue.needs_notification(&rings.memory).unwrap();
                    assert_eq!(told, passed(event, old, new), "{event} in {old}..{new}");
                    // Asked once more, nothing was pushed since.
                    assert!(!rings.queue.needs_notification(&rings.memory).unwrap());
                }
                for flags in 0..4 {
                    plain.put(AVAILABLE, flags);
                    plain.queue.told = old;
                    plain.queue.queue.set_next_used(new);
                    let told = plain.queue.needs_notification(&plain.memory).unwrap();
                    assert_eq!(told, pushed > 0 && flags & 1 == 0);
                }
            }
        }
    }
}

#[test]
fn no_chain_that_comes_after_the_device_looked_comes_without_a_kick() {
    for size in sizes() {
        let mut rings = Rings::with_event_idx(size);
        for start in turns(size) {
            rings.stand_at(start);
            for index in indices(size, start) {
                rings.available(index);
                let more = rings.queue.enable_kicks(&rings.memory).unwrap();
                assert_eq!(more, index != start, "{size}: {start} to {index}");
            }
            // The device saw nothing and sleeps: a driver that adds chains and follows the rules wakes it.
            assert_eq!(rings.avail_event(), start);
            for added in [1, 2, size] {
                assert!(passed(
                    rings.avail_event(),
                    start,
                    start.wrapping_add(added)
                ));
            }
        }
    }
}
