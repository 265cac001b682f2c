//! Credit of one connection (virtio 1.2 section 5.10.6.3): how much each side may still send.
//!
//! Trusts nothing of what the guest says of its window: a lie makes the guest's own stream stall or its own
//! buffer overflow. What the guest sends beyond ours is refused. All counters run modulo 2^32, as on the wire.

use super::packet::Window;

/// The host's window is told again when the guest knows of this part of it less than is free: a quarter.
/// More often costs a packet each, less often lets the sender run dry.
const TELL_AFTER_PART: u32 = 4;

/// The guest sent more than the window it was told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overrun;

/// Both directions' credit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credit {
    /// Size of the host's receive buffer.
    buf_alloc: u32,
    /// Bytes that came from the guest.
    received: u32,
    /// Bytes of them that the host's socket has taken.
    forwarded: u32,
    /// `forwarded` as the guest was last told.
    told: u32,
    /// Bytes sent to the guest.
    sent: u32,
    /// The guest's receive buffer as it last told.
    guest: Window,
}

impl Credit {
    /// A new connection: `buf_alloc` is the size of the buffer the host keeps for it in bytes.
    pub fn new(buf_alloc: u32, guest: Window) -> Credit {
        Credit {
            buf_alloc,
            received: 0,
            forwarded: 0,
            told: 0,
            sent: 0,
            guest,
        }
    }

    /// Takes in what a packet says of the guest's buffer.
    pub fn update(&mut self, guest: Window) {
        self.guest = guest;
    }

    /// Bytes that may be sent to the guest now. Zero also when the guest shrank its buffer below what is
    /// under way, or tells counters that make no sense.
    pub fn room(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest.fwd_cnt);
        self.guest.buf_alloc.saturating_sub(under_way)
    }

    /// Counts bytes sent to the guest; the caller stayed within [`Credit::room`].
    pub fn send(&mut self, bytes: u32) {
        debug_assert!(bytes <= self.room());
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// Counts a payload from the guest.
    ///
    /// # Errors
    /// It does not fit into the buffer that the host has for the connection; nothing is counted.
    pub fn receive(&mut self, bytes: u32) -> Result<(), Overrun> {
        if bytes > self.buf_alloc.saturating_sub(self.held()) {
            return Err(Overrun);
        }
        self.received = self.received.wrapping_add(bytes);
        Ok(())
    }

    /// Counts bytes that the host's socket took.
    pub fn forward(&mut self, bytes: u32) {
        debug_assert!(bytes <= self.held());
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// Bytes that came from the guest and wait for the host's socket; never more than the buffer.
    pub fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Whether the guest should be told that room was made.
    pub fn owes_update(&self) -> bool {
        let untold = self.forwarded.wrapping_sub(self.told);
        untold >= (self.buf_alloc / TELL_AFTER_PART).max(1)
    }

    /// The host's window for a packet that is about to be sent.
    pub fn tell(&mut self) -> Window {
        self.told = self.forwarded;
        Window {
            buf_alloc: self.buf_alloc,
            fwd_cnt: self.forwarded,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KIB: u32 = 1024;

    #[test]
    fn a_guest_that_shrinks_its_buffer_or_lies_gets_nothing() {
        let mut credit = Credit::new(
            KIB,
            Window {
                buf_alloc: 100,
                fwd_cnt: 0,
            },
        );
        credit.send(60);
        assert_eq!(credit.room(), 40);
        credit.update(Window {
            buf_alloc: 50,
            fwd_cnt: 0,
        });
        assert_eq!(credit.room(), 0);
        // Claims to have taken more than was ever sent.
        credit.update(Window {
            buf_alloc: 100,
            fwd_cnt: 61,
        });
        assert_eq!(credit.room(), 0);
        credit.update(Window {
            buf_alloc: u32::MAX,
            fwd_cnt: 60,
        });
        assert_eq!(credit.room(), u32::MAX);
    }

    #[test]
    fn what_exceeds_the_buffer_is_refused_until_room_is_made() {
        let mut credit = Credit::new(KIB, Window::default());
        assert_eq!(credit.receive(KIB), Ok(()));
        assert_eq!(credit.receive(1), Err(Overrun));
        credit.forward(1);
        assert_eq!(credit.receive(1), Ok(()));
        assert_eq!(credit.receive(u32::MAX), Err(Overrun));
        assert_eq!(credit.held(), KIB);
    }

    #[test]
    fn an_update_is_owed_after_a_quarter_and_paid_by_any_packet() {
        let mut credit = Credit::new(KIB, Window::default());
        credit.receive(KIB).unwrap();
        credit.forward(KIB / 4 - 1);
        assert!(!credit.owes_update());
        credit.forward(1);
        assert!(credit.owes_update());
        assert_eq!(
            credit.tell(),
            Window {
                buf_alloc: KIB,
                fwd_cnt: KIB / 4
            }
        );
        assert!(!credit.owes_update());
    }

    /// A side in 64-bit arithmetic, which never wraps here.
    #[derive(Default)]
    struct Model {
        received: u64,
        forwarded: u64,
        sent: u64,
        taken: u64,
        told_taken: u64,
    }

    proptest! {
        /// Both directions against a model that cannot wrap, over several times 2^32 bytes.
        #[test]
        fn credit_agrees_with_counters_that_never_wrap(steps in proptest::collection::vec((0u8..5, any::<u32>()), 1..400)) {
            let (ours, theirs) = (1u32 << 30, 3u32 << 30);
            let mut credit = Credit::new(ours, Window { buf_alloc: theirs, fwd_cnt: 0 });
            let mut model = Model::default();
            for (step, amount) in steps {
                let bytes = u64::from(amount);
                match step {
                    0 => {
                        let fits = model.received - model.forwarded + bytes <= u64::from(ours);
                        prop_assert_eq!(credit.receive(amount).is_ok(), fits);
                        model.received += if fits { bytes } else { 0 };
                    }
                    1 => {
                        let taken = bytes.min(model.received - model.forwarded);
                        credit.forward(u32::try_from(taken).unwrap());
                        model.forwarded += taken;
                    }
                    2 => {
                        let sends = amount.min(credit.room());
                        credit.send(sends);
                        model.sent += u64::from(sends);
                        prop_assert!(model.sent - model.told_taken <= u64::from(theirs));
                    }
                    3 => model.taken += bytes.min(model.sent - model.taken),
                    _ => {
                        model.told_taken = model.taken;
                        #[allow(clippy::cast_possible_truncation)]
                        credit.update(Window { buf_alloc: theirs, fwd_cnt: model.taken as u32 });
                    }
                }
                prop_assert_eq!(u64::from(credit.held()), model.received - model.forwarded);
                prop_assert_eq!(u64::from(credit.room()), u64::from(theirs) - (model.sent - model.told_taken));
            }
        }
    }
}

#[cfg(test)]
#[path = "credit_proofs.rs"]
mod proofs;
