//! Proof: what is sent never exceeds the window that the guest last told, whatever it tells and however the counters wrap; what is held
//! for the host's socket never exceeds our buffer; a guest that keeps to the windows it was told is never refused; and one that waits for
//! room is told of it.
//!
//! The model counts bytes in 64 bits from counters near each wrap and computes windows from the definitions of section 5.10.6.3. All
//! histories of some steps on buffers of a few bytes are enumerated, equal states once; the one formula over edges crossed.

use super::*;
use crate::testing::{EDGES, around};
use proptest::prelude::*;
use std::collections::HashSet;

/// Where counters start: so that each wrap lies within a few bytes.
const STARTS: [u32; 4] = [0, 0x7fff_fffe, u32::MAX - 2, u32::MAX];
/// Steps of a history.
const STEPS: usize = 9;
/// The guest's largest buffer in the enumeration.
const GUEST_MAX: u64 = 3;

/// What both sides did, in bytes since a start that is below the first wrap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Model {
    /// Size of our buffer.
    buffer: u64,
    /// From the guest: sent by it, taken by the host's socket, and how far it was told that they are.
    received: u64,
    forwarded: u64,
    told: u64,
    /// To the guest: sent to it, what it says it took, and how large it says its buffer is.
    sent: u64,
    taken: u64,
    window: u64,
}

impl Model {
    fn new(buffer: u64, start: u32) -> Model {
        let start = u64::from(start);
        Model {
            buffer,
            received: start,
            forwarded: start,
            told: start,
            sent: start,
            taken: start,
            window: 0,
        }
    }

    /// The same state as the code has it.
    fn credit(&self) -> Credit {
        Credit {
            buf_alloc: self.buffer as u32,
            received: self.received as u32,
            forwarded: self.forwarded as u32,
            told: self.told as u32,
            sent: self.sent as u32,
            guest: self.guest(),
        }
    }

    fn guest(&self) -> Window {
        Window {
            buf_alloc: self.window as u32,
            fwd_cnt: self.taken as u32,
        }
    }

    /// What the guest allows, by the definition: its buffer less what is on the way to it or lies in it.
    fn room(&self) -> u64 {
        (self.taken + self.window).saturating_sub(self.sent)
    }

    /// What the guest may still send by what it was told.
    fn guest_room(&self) -> u64 {
        (self.told + self.buffer).saturating_sub(self.received)
    }

    /// Compares, and what holds in every state.
    fn check(&self, credit: &Credit) {
        assert_eq!(*credit, self.credit());
        assert_eq!(u64::from(credit.room()), self.room(), "{self:?}");
        let held = u64::from(credit.held());
        assert_eq!(held, self.received - self.forwarded);
        assert!(held <= self.buffer, "{self:?}");
        if self.buffer > 0 && self.guest_room() == 0 && held == 0 {
            assert!(credit.owes_update(), "the guest waits for ever: {self:?}");
        }
    }

    /// What a guest may say whose buffer grows and shrinks, below what is on the way to it too.
    fn told_windows(&self) -> Vec<(Model, Credit)> {
        let mut all = Vec::new();
        for window in 0..=GUEST_MAX {
            for taken in self.taken..=self.sent {
                let next = Model {
                    window,
                    taken,
                    ..*self
                };
                let mut credit = self.credit();
                credit.update(next.guest());
                all.push((next, credit));
            }
        }
        all
    }

    /// Every state that is one step on, by both ways.
    fn next(&self) -> Vec<Model> {
        let mut all = Vec::new();
        let mut add = |next: Model, credit: Credit| {
            next.check(&credit);
            all.push(next);
        };
        for bytes in (0..=self.buffer + 2).chain([u64::from(u32::MAX)]) {
            let mut credit = self.credit();
            let accepted = credit.receive(bytes as u32).is_ok();
            assert_eq!(
                accepted,
                self.received - self.forwarded + bytes <= self.buffer,
                "{self:?} + {bytes}"
            );
            assert!(
                accepted || bytes > self.guest_room(),
                "refused what was allowed: {self:?}"
            );
            let received = self.received + if accepted { bytes } else { 0 };
            add(Model { received, ..*self }, credit);
        }
        for bytes in 1..=self.received - self.forwarded {
            let mut credit = self.credit();
            credit.forward(bytes as u32);
            add(
                Model {
                    forwarded: self.forwarded + bytes,
                    ..*self
                },
                credit,
            );
        }
        for bytes in 1..=self.room() {
            let mut credit = self.credit();
            credit.send(bytes as u32);
            let sent = Model {
                sent: self.sent + bytes,
                ..*self
            };
            assert!(
                sent.sent - sent.taken <= sent.window,
                "more than was allowed: {self:?}"
            );
            add(sent, credit);
        }
        for (next, credit) in self.told_windows() {
            add(next, credit);
        }
        let mut credit = self.credit();
        let told = credit.tell();
        assert_eq!(
            (told.buf_alloc, told.fwd_cnt),
            (self.buffer as u32, self.forwarded as u32)
        );
        assert!(!credit.owes_update());
        add(
            Model {
                told: self.forwarded,
                ..*self
            },
            credit,
        );
        all
    }
}

#[test]
fn every_history_on_small_buffers_keeps_to_both_windows() {
    for start in STARTS {
        for buffer in [0, 1, 2, 5] {
            let mut seen = HashSet::from([Model::new(buffer, start)]);
            let mut frontier: Vec<Model> = seen.iter().copied().collect();
            for _ in 0..STEPS {
                let next = frontier.iter().flat_map(Model::next);
                frontier = next.filter(|state| seen.insert(*state)).collect();
            }
            assert!(buffer == 0 || seen.len() > 1000, "{}", seen.len());
        }
    }
}

#[test]
fn the_room_is_what_is_left_of_the_window_for_edges_crossed() {
    let edges = around(EDGES)
        .into_iter()
        .filter_map(|edge| u32::try_from(edge).ok());
    let edges: Vec<u32> = edges.chain([2, 0x1000, u32::MAX - 1]).collect();
    for sent in &edges {
        for fwd_cnt in &edges {
            for buf_alloc in &edges {
                let window = Window {
                    buf_alloc: *buf_alloc,
                    fwd_cnt: *fwd_cnt,
                };
                let credit = Credit {
                    sent: *sent,
                    ..Credit::new(0, window)
                };
                // Bytes on the way: the one count below 2^32 that turns what was taken into what was sent. A guest that
                // says it took more than was sent has nearly 2^32 on the way, by its own word.
                let under_way = (u64::from(*sent) + (1 << 32) - u64::from(*fwd_cnt)) % (1 << 32);
                let left = u64::from(*buf_alloc).saturating_sub(under_way);
                assert_eq!(u64::from(credit.room()), left, "{sent} {window:?}");
                assert!(
                    u64::from(credit.room()) + under_way.min(u64::from(*buf_alloc))
                        <= u64::from(*buf_alloc)
                );
            }
        }
    }
}

#[test]
fn the_buffer_takes_what_fits_for_edges_crossed() {
    let edges = around(EDGES)
        .into_iter()
        .filter_map(|edge| u32::try_from(edge).ok());
    let edges: Vec<u32> = edges.collect();
    for buf_alloc in &edges {
        for held in edges.iter().filter(|held| *held <= buf_alloc) {
            for forwarded in &edges {
                for bytes in &edges {
                    let before = Credit {
                        received: forwarded.wrapping_add(*held),
                        forwarded: *forwarded,
                        ..Credit::new(*buf_alloc, Window::default())
                    };
                    let mut credit = before;
                    let fits = u64::from(*held) + u64::from(*bytes) <= u64::from(*buf_alloc);
                    assert_eq!(credit.receive(*bytes).is_ok(), fits);
                    let expected = u64::from(*held) + if fits { u64::from(*bytes) } else { 0 };
                    assert_eq!(u64::from(credit.held()), expected);
                    assert!(fits || credit == before, "a refused payload was counted");
                }
            }
        }
    }
}

proptest! {
    /// The guest lies as it likes; each side's bound holds by what it was told last.
    #[test]
    fn no_guest_gets_more_than_it_said_or_makes_us_hold_more_than_the_buffer(
        buffer in prop_oneof![0u32..16, any::<u32>()],
        start in any::<u32>(),
        steps in proptest::collection::vec((0u8..4, any::<u32>(), any::<u32>()), 0..100),
    ) {
        let mut credit = Model::new(buffer.into(), start).credit();
        let mut told = credit.guest;
        for (step, a, b) in steps {
            match step {
                0 => {
                    let before = credit.held();
                    let fits = u64::from(before) + u64::from(a) <= u64::from(buffer);
                    prop_assert_eq!(credit.receive(a).is_ok(), fits);
                }
                1 => credit.forward(a.min(credit.held())),
                2 => {
                    told = Window { buf_alloc: a, fwd_cnt: b };
                    credit.update(told);
                }
                _ => {
                    let bytes = a.min(credit.room());
                    credit.send(bytes);
                    let under_way = credit.sent.wrapping_sub(told.fwd_cnt);
                    prop_assert!(bytes == 0 || under_way <= told.buf_alloc);
                }
            }
            prop_assert!(credit.held() <= buffer && credit.room() <= told.buf_alloc);
        }
    }
}
