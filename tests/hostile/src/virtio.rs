//! A virtio device over PCI from its driver's side (virtio 1.2 sections 3.1 and 4.1).

use crate::cpu::{self, Number, Patience};
use crate::pci::Function;
use crate::report::{Outcome, Why, same};
use crate::ring::Ring;

/// Bits of the status.
pub(crate) const ACKNOWLEDGE: u8 = 1;
pub(crate) const DRIVER: u8 = 2;
pub(crate) const DRIVER_OK: u8 = 4;
pub(crate) const FEATURES_OK: u8 = 8;
pub(crate) const NEEDS_RESET: u8 = 0x40;
pub(crate) const FAILED: u8 = 0x80;
/// A device that runs.
pub(crate) const RUNNING: u8 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK;

/// The driver knows indirect descriptors.
pub(crate) const F_INDIRECT: u64 = 1 << 28;
/// Who is told when is said by indices.
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
/// The driver is a modern one.
pub(crate) const F_VERSION_1: u64 = 1 << 32;

/// Offsets in the common configuration (section 4.1.4.3), which is at the beginning of the BAR.
pub(crate) const DEVICE_FEATURE_SELECT: u64 = 0x00;
pub(crate) const DEVICE_FEATURE: u64 = 0x04;
pub(crate) const DRIVER_FEATURE_SELECT: u64 = 0x08;
pub(crate) const DRIVER_FEATURE: u64 = 0x0c;
pub(crate) const CONFIG_VECTOR: u64 = 0x10;
pub(crate) const NUM_QUEUES: u64 = 0x12;
pub(crate) const STATUS: u64 = 0x14;
pub(crate) const QUEUE_SELECT: u64 = 0x16;
pub(crate) const QUEUE_SIZE: u64 = 0x18;
pub(crate) const QUEUE_VECTOR: u64 = 0x1a;
pub(crate) const QUEUE_ENABLE: u64 = 0x1c;
pub(crate) const QUEUE_DESCRIPTORS: u64 = 0x20;
pub(crate) const QUEUE_AVAILABLE: u64 = 0x28;
pub(crate) const QUEUE_USED: u64 = 0x30;
/// Bytes of all of them.
pub(crate) const COMMON_BYTES: u64 = 0x40;
/// Pages of the BAR, as this VMM lays them out; a driver that means well reads the capabilities.
pub(crate) const ISR: u64 = 0x1000;
pub(crate) const CONFIG: u64 = 0x2000;
pub(crate) const NOTIFY: u64 = 0x3000;
pub(crate) const MSIX_TABLE: u64 = 0x4000;
pub(crate) const MSIX_PENDING: u64 = 0x5000;
pub(crate) const BAR_BYTES: u64 = 0x8000;

/// Looks at memory until the device has taken too long for anything; some seconds on a slow host.
const ANSWER_LOOKS: u32 = 200_000;
/// Looks at a register likewise; each is an exit to the VMM.
const STATUS_LOOKS: u32 = 100_000;
/// A port at which nothing answers.
const NOBODYS_PORT: u16 = 0x80;

/// A device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Device {
    /// Its place on the bus.
    pub(crate) function: Function,
    bar: u64,
}

impl Device {
    /// The first device of this type (section 5).
    pub(crate) fn find(kind: u16) -> Outcome<Device> {
        let function = Function::find(0x1af4, 0x1040 + kind)?;
        let bar = function.bar();
        Ok(Device { function, bar })
    }

    /// Reads a register of the BAR.
    pub(crate) fn get<T: Number>(self, offset: u64) -> T {
        cpu::load(self.bar + offset)
    }

    /// Writes a register of the BAR.
    pub(crate) fn set<T: Number>(self, offset: u64, value: T) {
        cpu::store(self.bar + offset, value);
    }

    pub(crate) fn status(self) -> u8 {
        self.get(STATUS)
    }

    pub(crate) fn set_status(self, status: u8) {
        self.set(STATUS, status);
    }

    /// Resets it; there is no reason for which that should fail.
    pub(crate) fn reset(self) -> Outcome {
        self.set_status(0);
        same("the status after a reset", self.status(), 0u8)
    }

    /// The features that it offers.
    pub(crate) fn offered(self) -> u64 {
        self.set(DEVICE_FEATURE_SELECT, 0u32);
        let low: u32 = self.get(DEVICE_FEATURE);
        self.set(DEVICE_FEATURE_SELECT, 1u32);
        let high: u32 = self.get(DEVICE_FEATURE);
        u64::from(high) << 32 | u64::from(low)
    }

    /// From wherever it is to a driver that has chosen `features` and not said so yet.
    pub(crate) fn choose(self, features: u64) -> Outcome {
        self.reset()?;
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        for (select, word) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            self.set(DRIVER_FEATURE_SELECT, select);
            self.set(DRIVER_FEATURE, word);
        }
        Ok(())
    }

    /// From wherever it is to FEATURES_OK.
    pub(crate) fn negotiate(self, features: u64) -> Outcome {
        self.choose(features | F_VERSION_1)?;
        let agreed = ACKNOWLEDGE | DRIVER | FEATURES_OK;
        self.set_status(agreed);
        same("the status with features", self.status(), agreed)
    }

    /// Tells it of a queue, and enables that.
    pub(crate) fn queue(self, ring: &Ring) {
        self.set(QUEUE_SELECT, ring.number);
        self.set(QUEUE_SIZE, ring.size);
        self.set(QUEUE_DESCRIPTORS, ring.descriptors);
        self.set(QUEUE_AVAILABLE, ring.available);
        self.set(QUEUE_USED, ring.used);
        self.set(QUEUE_ENABLE, 1u16);
    }

    /// The largest size of a queue.
    pub(crate) fn queue_max(self, number: u16) -> u16 {
        self.set(QUEUE_SELECT, number);
        self.get(QUEUE_SIZE)
    }

    /// Sets it to work.
    pub(crate) fn go(self) -> Outcome {
        self.set_status(RUNNING);
        same("the status of a running device", self.status(), RUNNING)
    }

    /// Notifies a queue.
    pub(crate) fn kick(self, queue: u16) {
        self.set(NOTIFY + 4 * u64::from(queue), queue);
    }

    /// Notifies a queue so many times, with a number that need not be its own.
    pub(crate) fn kick_many(self, queue: u16, says: u16, times: u32) {
        cpu::store_many(self.bar + NOTIFY + 4 * u64::from(queue), says, times);
    }

    /// Waits for DEVICE_NEEDS_RESET.
    pub(crate) fn gave_up(self) -> Outcome {
        let mut patience = Patience::looks(STATUS_LOOKS);
        while self.status() & NEEDS_RESET == 0 && patience.lasts() {}
        same(
            "the status of a broken device",
            self.status(),
            RUNNING | NEEDS_RESET,
        )
    }

    /// The next answer of a queue.
    pub(crate) fn answer(self, ring: &mut Ring) -> Outcome<(u32, u32)> {
        self.wait(|| ring.take())
    }

    /// Waits until all that was offered is answered.
    pub(crate) fn all_answers(self, ring: &mut Ring) -> Outcome {
        self.wait(|| ring.take_all().then_some(()))
    }

    fn wait<T>(self, mut look: impl FnMut() -> Option<T>) -> Outcome<T> {
        let mut patience = Patience::looks(ANSWER_LOOKS);
        while patience.lasts() {
            if let Some(answer) = look() {
                return Ok(answer);
            }
            leave();
        }
        same(
            "the status while an answer is awaited",
            self.status(),
            RUNNING,
        )?;
        Err(Why::new("no answer came"))
    }
}

/// Leaves the guest, so that a look takes its time on every machine, and the host's one processor is free for the answer.
pub(crate) fn leave() {
    let _nobody: u8 = cpu::inp(NOBODYS_PORT);
}
