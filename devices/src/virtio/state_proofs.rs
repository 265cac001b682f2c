//! Proof: whatever a driver writes, in whatever order and however often, the status goes only where sections 2.1 and 3.1.1 let it go; and
//! from DRIVER_OK until a reset is complete no write changes a queue's settings, but for its vector.
//!
//! The states that a small device can be brought into are enumerated until there are no new ones: with every value of the status register,
//! with features that are right and wrong, with queue settings, device errors, and resets that work and that do not. So each sequence of
//! any length is among them. The model is the spec's table, by hand: it knows no register.

use super::*;
use proptest::prelude::*;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const OFFERED: u64 = VERSION_1 | 1;

/// What the spec says of a device, without its registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Spec {
    /// How far the driver got: 0 nothing, 1 ACKNOWLEDGE, 2 DRIVER, 3 FEATURES_OK, 4 DRIVER_OK.
    stage: u8,
    needs_reset: bool,
    failed: bool,
    /// A reset did not end.
    dead: bool,
}

/// What the driver makes of the status register by a write.
#[derive(Debug, PartialEq, Eq)]
enum Asked {
    Reset,
    Stage(u8),
    Failed,
    /// What it has already, or what no driver may ask for.
    Nothing,
}

/// The status of each stage: section 3.1.1 sets one bit after the other, FEATURES_OK (8) before DRIVER_OK (4).
const STAGES: [u8; 5] = [0, 1, 1 | 2, 1 | 2 | 8, 1 | 2 | 8 | 4];

impl Spec {
    fn status(self) -> u8 {
        if self.dead {
            return 0x80 | if self.needs_reset { 0x40 } else { 0 };
        }
        let stage = STAGES[usize::from(self.stage)];
        stage | if self.needs_reset { 0x40 } else { 0 } | if self.failed { 0x80 } else { 0 }
    }

    /// Reads a write: section 2.1.1 lets a driver add the next bit, give up, or write 0; bit 6 is the device's own.
    fn asked(self, value: u8) -> Asked {
        if self.dead {
            return Asked::Nothing;
        }
        if value == 0 {
            return Asked::Reset;
        }
        let driver = value & 0xbf;
        let stage = STAGES[usize::from(self.stage)];
        if self.failed || driver == stage {
            Asked::Nothing
        } else if driver == stage | 0x80 {
            Asked::Failed
        } else if STAGES.get(usize::from(self.stage) + 1) == Some(&driver) {
            Asked::Stage(self.stage + 1)
        } else {
            Asked::Nothing
        }
    }

    /// The status after a write; `legal` features are accepted (sections 2.2.2 and 6.1).
    fn written(self, value: u8, legal: bool) -> Spec {
        match self.asked(value) {
            Asked::Stage(3) if !legal => self,
            // Section 2.1.2: what needs a reset does not begin to work.
            Asked::Stage(4) if self.needs_reset => self,
            Asked::Stage(stage) => Spec { stage, ..self },
            Asked::Failed => Spec {
                failed: true,
                ..self
            },
            // 0 is read when the reset is complete (section 2.4.2), not when it is asked for.
            Asked::Reset | Asked::Nothing => self,
        }
    }

    fn reset(self, done: bool) -> Spec {
        Spec {
            stage: 0,
            needs_reset: false,
            failed: false,
            dead: !done,
        }
    }
}

/// A state with its model. `live`: DRIVER_OK was set and no reset has completed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Pair {
    state: DeviceState,
    spec: Spec,
    live: bool,
}

fn start() -> Pair {
    Pair {
        state: DeviceState::new(OFFERED, &[4], 1),
        spec: Spec {
            stage: 0,
            needs_reset: false,
            failed: false,
            dead: false,
        },
        live: false,
    }
}

/// Writes that are no status: selectors that exist and that do not, features that are right and wrong, each of a queue's settings.
const WRITES: [(u64, usize, u64); 12] = [
    (DRIVER_FEATURE_SELECT, 4, 0),
    (DRIVER_FEATURE_SELECT, 4, 1),
    (DRIVER_FEATURE_SELECT, 4, 2),
    (DRIVER_FEATURE, 4, 0),
    (DRIVER_FEATURE, 4, 1),
    (DRIVER_FEATURE, 4, 2),
    (QUEUE_SELECT, 2, 0),
    (QUEUE_SELECT, 2, 1),
    (QUEUE_SIZE, 2, 2),
    (QUEUE_ENABLE, 2, 1),
    (QUEUE_DESC, 8, 0x1000),
    (QUEUE_DEVICE, 4, 0x2000),
];

impl Pair {
    fn write(&mut self, offset: u64, width: usize, value: u64) -> Effect {
        let bytes = value.to_le_bytes();
        self.state.write_common(offset, &bytes[..width])
    }

    /// What the transport keeps: counts are no part of the state machine, and grow for ever.
    fn settled(mut self) -> Pair {
        self.state.refused = 0;
        self.state.isr = 0;
        self
    }

    fn check(&self, from: &Pair, what: &str) {
        assert_eq!(
            self.state.status(),
            self.spec.status(),
            "{what} in {from:?}"
        );
        assert_eq!(self.state.live(), self.live, "{what} in {from:?}");
        let legal = self.state.features() & !OFFERED == 0 && self.state.features() & VERSION_1 != 0;
        assert!(
            self.spec.dead || self.spec.stage < 3 || legal,
            "{what} in {from:?}"
        );
        // Bits are taken back by a completed reset alone.
        let reset = self.spec.stage == 0 && !self.live || self.spec.dead;
        assert!(
            reset || from.state.status() & !self.state.status() == 0,
            "{what} in {from:?}"
        );
        // A reset that failed forgets what the driver set; nothing is ever made of it again.
        if self.live && from.live && self.spec.dead == from.spec.dead {
            assert_eq!(
                frozen(&self.state),
                frozen(&from.state),
                "{what} in {from:?}"
            );
            assert_eq!(
                self.state.features(),
                from.state.features(),
                "{what} in {from:?}"
            );
        }
    }

    /// Every state that is one step on.
    fn next(&self) -> Vec<Pair> {
        let mut all = Vec::new();
        let mut add = |next: Pair, what: &str| {
            next.check(self, what);
            let next = next.settled();
            // Most writes change nothing.
            if next != *self {
                all.push(next);
            }
        };
        let agreed = self.state.driver_features;
        let legal =
            agreed & !OFFERED == 0 && agreed & VERSION_1 != 0 && !self.state.features_beyond;
        for value in 0..=u8::MAX {
            let mut next = self.clone();
            let effect = next.write(STATUS, 1, value.into());
            next.spec = self.spec.written(value, legal);
            let begins = next.spec.stage == 4 && self.spec.stage < 4;
            next.live |= begins;
            let what = format!("status {value:#x}");
            match effect {
                Effect::Activate => assert!(begins, "{what} in {self:?}"),
                Effect::Reset { active } => {
                    assert_eq!((self.spec.asked(value), active), (Asked::Reset, self.live));
                    for done in [true, false] {
                        let mut ended = next.clone();
                        ended.state.finish_reset(done);
                        ended.spec = self.spec.reset(done);
                        // What could not be stopped is still at work.
                        ended.live = self.live && !done;
                        add(ended, &format!("{what}, reset {done}"));
                    }
                }
                Effect::None => {
                    let silent = !begins && self.spec.asked(value) != Asked::Reset;
                    assert!(silent, "{what} in {self:?}");
                }
            }
            add(next, &what);
        }
        for (offset, width, value) in WRITES {
            let mut next = self.clone();
            assert_eq!(next.write(offset, width, value), Effect::None);
            add(next, &format!("{value:#x} to {offset:#x}"));
        }
        let mut next = self.clone();
        next.spec.needs_reset = true;
        let told = next.state.needs_reset();
        assert_eq!(told.is_some(), !self.spec.needs_reset);
        add(next, "needs reset");
        all
    }
}

/// A queue's settings but for its vector, which stays free (section 4.1.5.1.2).
fn frozen(state: &DeviceState) -> Vec<QueueSettings> {
    let unvectored = |queue: &QueueSettings| QueueSettings {
        vector: NO_VECTOR,
        ..queue.clone()
    };
    state.queues().iter().map(unvectored).collect()
}

/// All states that there are.
fn reachable() -> Vec<Pair> {
    let mut seen = vec![start()];
    let mut at = 0;
    while let Some(pair) = seen.get(at) {
        for next in pair.next() {
            if !seen.contains(&next) {
                seen.push(next);
            }
        }
        at += 1;
    }
    seen
}

#[test]
fn in_every_state_that_can_be_reached_every_status_goes_where_the_spec_says() {
    let all = reachable();
    for status in STAGES {
        for more in [0, 0x40, 0x80, 0xc0] {
            let found = all.iter().any(|pair| pair.state.status() == status | more);
            assert!(found, "{:#x} was not reached", status | more);
        }
    }
    assert!(all.iter().any(|pair| pair.spec.dead && pair.live));
}

#[test]
fn in_every_live_state_every_write_of_every_width_leaves_the_queues_alone() {
    let values = [0, 1, 2, 4, 0x1000, 0x8000, u64::MAX];
    let live: Vec<Pair> = reachable().into_iter().filter(|pair| pair.live).collect();
    for pair in &live {
        let before = frozen(&pair.state);
        for offset in 0..COMMON_BYTES as u64 + 8 {
            for width in [1, 2, 3, 4, 8] {
                for value in values {
                    let mut next = pair.clone();
                    next.write(offset, width, value);
                    assert_eq!(
                        frozen(&next.state),
                        before,
                        "{value:#x} to {offset:#x}/{width}"
                    );
                }
            }
        }
    }
    assert!(live.iter().any(|pair| pair.state.queues()[0].enabled));
}

proptest! {
    /// The same for long histories of a device with the sizes of a real one.
    #[test]
    fn any_history_agrees_with_the_spec(
        steps in proptest::collection::vec((
            prop_oneof![6 => Just(STATUS), 1 => 0u64..0x40],
            prop_oneof![Just(1usize), Just(2), Just(4), Just(8)],
            prop_oneof![proptest::sample::select(vec![0u64, 1, 3, 0x0b, 0x0f, 0x4f, 0x8f]), any::<u64>()],
            any::<bool>(),
        ), 0..300),
    ) {
        let mut pair = Pair { state: DeviceState::new(OFFERED, &[256, 64], 3), ..start() };
        for (offset, width, value, works) in steps {
            if pair.state.status() == 3 {
                pair.write(DRIVER_FEATURE_SELECT, 4, 1);
                pair.write(DRIVER_FEATURE, 4, 1);
            }
            let before = pair.clone();
            let features = pair.state.features();
            let legal = features & !OFFERED == 0 && features & VERSION_1 != 0 && !pair.state.features_beyond;
            let width = if offset == STATUS { 1 } else { width };
            let effect = pair.write(offset, width, value);
            if offset == STATUS {
                pair.spec = before.spec.written(value as u8, legal);
                pair.live |= pair.spec.stage == 4 && before.spec.stage < 4;
                if let Effect::Reset { .. } = effect {
                    pair.state.finish_reset(works);
                    pair.spec = before.spec.reset(works);
                    pair.live &= !works;
                }
            }
            pair.check(&before, "a step");
        }
    }
}
