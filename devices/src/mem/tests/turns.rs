//! Requests about more blocks than one turn of the event loop has room for.

use super::*;
use crate::virtio::device::Busy;

/// Blocks of a request that takes four turns, and of its turns.
const MANY: u16 = 200;
const TURNS: [usize; 4] = [64, 128, 192, 200];

impl Guest {
    /// One that was granted [`MANY`] blocks.
    fn of_many() -> Guest {
        let guest = Guest::up_of(u64::from(MANY));
        guest.handle.request(u64::from(MANY) * BLOCK).unwrap();
        guest
    }

    /// Begins a request about all of them.
    fn begin(&mut self, kind: u16) {
        let bytes = request(kind, START, MANY);
        self.driver
            .add(0, &[Buffer::Readable(&bytes), Buffer::Writable(10)]);
        self.driver.kick(0);
    }

    fn turn(&self) {
        self.poller.turn(Some(Duration::ZERO)).unwrap();
    }

    /// How many blocks the guest's CPUs and the devices reach.
    fn reach(&self) -> (usize, usize) {
        (self.slots.mapped().len(), self.reachable().len())
    }

    /// The answer, which is there.
    fn answered(&mut self) -> u16 {
        let used = self.driver.used(0).expect("an answer");
        u16::from_le_bytes([used.data[0], used.data[1]])
    }
}

#[test]
fn a_request_about_many_blocks_takes_turns_and_is_answered_at_its_end() {
    let all = usize::from(MANY);
    let mut guest = Guest::of_many();
    guest.begin(PLUG);
    for mapped in TURNS {
        assert!(guest.driver.used(0).is_none());
        guest.turn();
        // Devices reach none before all are there.
        let reached = if mapped == all { all } else { 0 };
        assert_eq!(guest.reach(), (mapped, reached));
    }
    assert_eq!(guest.answered(), ACK);
    assert_eq!(guest.handle.plugged(), u64::from(MANY) * BLOCK);
    guest.memory().write_obj(7u64, GuestAddress(START)).unwrap();

    guest.begin(UNPLUG);
    for unmapped in TURNS {
        guest.turn();
        assert_eq!(guest.reach(), (all - unmapped, 0));
    }
    // What was in them goes in as many turns.
    for _ in TURNS {
        assert!(guest.driver.used(0).is_none());
        assert_eq!(guest.handle.plugged(), u64::from(MANY) * BLOCK);
        guest.turn();
    }
    assert_eq!(guest.answered(), ACK);
    guest.has(&[]);

    assert_eq!(guest.plug(0, MANY), ACK);
    assert_eq!(
        guest.memory().read_obj::<u64>(GuestAddress(START)).unwrap(),
        0
    );
    guest.begin(UNPLUG_ALL);
    for unplugged in TURNS {
        assert!(guest.driver.used(0).is_none());
        guest.turn();
        assert_eq!(guest.reach(), (all - unplugged, all - unplugged));
        assert_eq!(guest.handle.plugged(), (all - unplugged) as u64 * BLOCK);
    }
    assert_eq!(guest.answered(), ACK);
    // The turn that it asked for itself, and then it rests.
    guest.turn();
    assert_eq!(guest.poller.turn(Some(Duration::ZERO)).unwrap(), 0);
    assert_eq!(guest.handle.counters().refused.get(), 0);
}

#[test]
fn a_host_that_refuses_a_block_in_a_later_turn_is_busy_and_nothing_has_changed() {
    let mut guest = Guest::of_many();
    // What was mapped before the refusal is unmapped again: the model of the host takes that.
    guest.begin(PLUG);
    guest.turn();
    guest.slots.refuses_once_after(10);
    guest.turn();
    assert_eq!(guest.answered(), BUSY);
    guest.has(&[]);
    assert_eq!(guest.plug(0, MANY), ACK);
    guest.memory().write_obj(7u64, GuestAddress(START)).unwrap();
    guest.begin(UNPLUG);
    guest.turn();
    guest.slots.refuses_once_after(10);
    guest.turn();
    assert_eq!(guest.answered(), BUSY);
    guest.has(&(0..u32::from(MANY)).collect::<Vec<_>>());
    assert_eq!(
        guest.memory().read_obj::<u64>(GuestAddress(START)).unwrap(),
        7
    );
}

#[test]
fn a_reset_ends_what_is_under_way() {
    for turns in 1..=TURNS.len() {
        let mut guest = Guest::of_many();
        guest.begin(PLUG);
        (0..turns).for_each(|_| guest.turn());
        guest.driver.reset();
        assert_eq!(guest.poller.watched(), 0);
        guest.has(&(0..u32::from(MANY)).collect::<Vec<_>>());
    }
    for turns in 1..=2 * TURNS.len() {
        let mut guest = Guest::of_many();
        assert_eq!(guest.plug(0, MANY), ACK);
        guest.begin(UNPLUG);
        // The first is the one that the plug has asked for.
        (0..turns).for_each(|_| guest.turn());
        guest.driver.reset();
        guest.has(&[]);
    }
}

#[test]
fn a_device_stands_still_when_its_request_is_answered_and_takes_no_other_before() {
    let mut guest = Guest::of_many();
    guest.begin(PLUG);
    guest.turn();
    assert_eq!(guest.driver.suspend(), Err(Busy));
    guest.begin(UNPLUG_ALL);
    (1..TURNS.len()).for_each(|_| guest.turn());
    assert_eq!(guest.answered(), ACK);
    guest.turn();
    assert_eq!(guest.reach(), (usize::from(MANY), usize::from(MANY)));
    assert_eq!(guest.driver.suspend(), Ok(()));
    guest.driver.transport.resume();
    while guest.handle.plugged() > 0 {
        guest.turn();
    }
    assert_eq!(guest.answered(), ACK);

    // One that is asked no more works on.
    guest.begin(PLUG);
    guest.turn();
    assert_eq!(guest.driver.suspend(), Err(Busy));
    guest.driver.transport.resume();
    assert_eq!(guest.unplug(0, MANY), ACK);
}
