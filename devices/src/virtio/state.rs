//! The one state machine of a virtio device: status, feature negotiation, queue settings (virtio 1.2
//! sections 2.1, 2.2, 3.1 and 4.1.4.3). Pure: registers in, [`Effect`]s out; it knows no device, no thread
//! and no interrupt.
//!
//! The driver is hostile. What it may do depends on the status alone:
//!
//! | status                      | may be written                                                     |
//! |-----------------------------|--------------------------------------------------------------------|
//! | 0, ACKNOWLEDGE              | selectors, vectors, the next status bit                            |
//! | + DRIVER                    | also the driver's features                                         |
//! | + FEATURES_OK               | also the queues' sizes, addresses, enable; a queue freezes when enabled |
//! | + DRIVER_OK                 | selectors, vectors; the queues are frozen until a completed reset (CVE-2026-5747) |
//! | FAILED or a reset that failed | selectors; FAILED ends with a reset, a failed reset never ends    |
//!
//! Status bits come one by one in the order of section 3.1.1; none is ever taken back but by a reset. A
//! write that breaks these rules is dropped and counted. Vectors stay free after DRIVER_OK because section
//! 4.1.5.1.2 sets no end to it and a vector is only an index that is looked up.

use crate::state::Foreign;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

/// `VIRTIO_CONFIG_S_*`, the bits of the device status (section 2.1).
pub mod status {
    /// The guest has seen the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest can drive the device.
    pub const DRIVER: u8 = 2;
    /// The driver is ready: queues are live.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed.
    pub const FEATURES_OK: u8 = 8;
    /// Set by the device: only a reset mends it.
    pub const NEEDS_RESET: u8 = 0x40;
    /// The driver gave up, or the device could not be reset.
    pub const FAILED: u8 = 0x80;
}

/// No vector (section 4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;
/// Length of the common configuration structure in bytes (virtio 1.2: up to queue_reset).
pub const COMMON_BYTES: usize = 0x40;

// Offsets in struct virtio_pci_common_cfg, section 4.1.4.3.
const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const NUM_QUEUES: u64 = 0x12;
const STATUS: u64 = 0x14;
const GENERATION: u64 = 0x15;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_NOTIFY_OFF: u64 = 0x1e;
const QUEUE_DESC: u64 = 0x20;
const QUEUE_DRIVER: u64 = 0x28;
const QUEUE_DEVICE: u64 = 0x30;

/// What the transport has to do after a register write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// DRIVER_OK was set: check the queues, activate the device, then call [`DeviceState::needs_reset`] if
    /// that failed.
    Activate,
    /// A reset was asked for: stop the device, then call [`DeviceState::finish_reset`]. `active` tells
    /// whether there was an [`Effect::Activate`] since the last reset.
    Reset {
        /// Whether the device may be at work.
        active: bool,
    },
}

/// What the driver set for one queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueSettings {
    /// The largest size, a power of two.
    pub max_size: u16,
    /// The size chosen, a power of two up to `max_size`.
    pub size: u16,
    /// Whether the driver enabled it.
    pub enabled: bool,
    /// MSI-X vector or [`NO_VECTOR`].
    pub vector: u16,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
}

impl QueueSettings {
    fn new(max_size: u16) -> QueueSettings {
        QueueSettings {
            max_size,
            size: max_size,
            enabled: false,
            vector: NO_VECTOR,
            descriptors: 0,
            available: 0,
            used: 0,
        }
    }
}

/// The state of one device as its driver sees it. Plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceState {
    offered: u64,
    vectors: u16,
    status: u8,
    /// An activation was asked for since the last completed reset.
    active: bool,
    /// The device could not be reset: FAILED for ever.
    dead: bool,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    /// The driver wanted a feature beyond bit 63, of which none is offered.
    features_beyond: bool,
    config_vector: u16,
    generation: u8,
    isr: u8,
    queue_select: u16,
    queues: Vec<QueueSettings>,
    /// Writes that were dropped because they broke the rules. Saturates.
    refused: u64,
}

/// ISR status bit 0: a queue was used (section 4.1.4.5).
pub const ISR_QUEUE: u8 = 1;
/// ISR status bit 1: the configuration changed.
pub const ISR_CONFIG: u8 = 2;

impl DeviceState {
    /// A device after reset that offers `offered` and has queues of these largest sizes and `vectors`
    /// MSI-X vectors.
    pub fn new(offered: u64, queue_sizes: &[u16], vectors: u16) -> DeviceState {
        DeviceState {
            offered,
            vectors,
            status: 0,
            active: false,
            dead: false,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            features_beyond: false,
            config_vector: NO_VECTOR,
            generation: 0,
            isr: 0,
            queue_select: 0,
            queues: queue_sizes
                .iter()
                .map(|size| QueueSettings::new(*size))
                .collect(),
            refused: 0,
        }
    }

    /// Takes the state of another device of the same features, queues and vectors.
    ///
    /// # Errors
    /// It was of others, or what it says cannot be.
    pub fn restore(&mut self, state: &DeviceState) -> Result<(), Foreign> {
        let alike = |a: &QueueSettings, b: &QueueSettings| a.max_size == b.max_size;
        if state.offered != self.offered {
            return Err(Foreign("features"));
        }
        let mut pairs = state.queues.iter().zip(&self.queues);
        if state.queues.len() != self.queues.len() || !pairs.all(|(a, b)| alike(a, b)) {
            return Err(Foreign("queues"));
        }
        if state.vectors != self.vectors || !state.vectors_exist() {
            return Err(Foreign("vectors"));
        }
        if !state.possible() {
            return Err(Foreign("status"));
        }
        self.clone_from(state);
        Ok(())
    }

    fn vectors_exist(&self) -> bool {
        let queues = self.queues.iter().map(|queue| queue.vector);
        let mut all = queues.chain([self.config_vector]);
        all.all(|vector| self.valid_vector(vector) == vector)
    }

    /// Whether a driver can have brought it there.
    fn possible(&self) -> bool {
        use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};
        let steps = self.status & !(NEEDS_RESET | FAILED);
        let agreed = steps & FEATURES_OK != 0;
        let in_order = [0, 1, 3, 0x0b, 0x0f].contains(&steps);
        debug_assert_eq!(0x0f, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        let sizes = |queue: &QueueSettings| {
            queue.size.is_power_of_two()
                && queue.size <= queue.max_size
                && (agreed || !queue.enabled)
        };
        let live = match self.dead {
            // It could not be reset, and may be at work.
            true => self.status & FAILED != 0 && steps == 0,
            false => self.active == (steps & DRIVER_OK != 0),
        };
        in_order && live && (!agreed || self.features_legal()) && self.queues.iter().all(sizes)
    }

    /// The status register.
    pub fn status(&self) -> u8 {
        self.status
    }

    /// The features agreed on; meaningful from FEATURES_OK.
    pub fn features(&self) -> u64 {
        self.driver_features
    }

    /// The queues' settings, in order.
    pub fn queues(&self) -> &[QueueSettings] {
        &self.queues
    }

    /// The vector of a configuration change.
    pub fn config_vector(&self) -> u16 {
        self.config_vector
    }

    /// How many writes were dropped because the rules forbid them.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Whether the driver has set DRIVER_OK and no reset completed since.
    pub fn live(&self) -> bool {
        self.active
    }

    /// The device used buffers of a queue: sets the ISR bit and returns the queue's vector.
    pub fn queue_used(&mut self, queue: u16) -> u16 {
        self.isr |= ISR_QUEUE;
        let settings = self.queues.get(usize::from(queue));
        settings.map_or(NO_VECTOR, |queue| queue.vector)
    }

    /// The configuration space changed: a new generation, the ISR bit; returns the vector.
    pub fn config_changed(&mut self) -> u16 {
        self.generation = self.generation.wrapping_add(1);
        self.isr |= ISR_CONFIG;
        self.config_vector
    }

    /// The device is in trouble. Returns the vector to tell the driver by, which section 2.1.2 demands only
    /// after DRIVER_OK; `None` if it has been said already.
    pub fn needs_reset(&mut self) -> Option<u16> {
        if self.status & status::NEEDS_RESET != 0 {
            return None;
        }
        self.status |= status::NEEDS_RESET;
        self.isr |= ISR_CONFIG;
        Some(self.config_vector)
    }

    /// Reads and clears the ISR status, as section 4.1.4.5 wants.
    pub fn take_isr(&mut self) -> u8 {
        std::mem::take(&mut self.isr)
    }

    /// Ends a reset: with `done` everything is as new and the status reads 0; else the status reads FAILED
    /// and stays so.
    pub fn finish_reset(&mut self, done: bool) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
        let fresh = DeviceState::new(self.offered, &sizes, self.vectors);
        let (generation, refused, active) = (self.generation, self.refused, self.active);
        *self = DeviceState {
            generation,
            refused,
            ..fresh
        };
        if !done {
            self.status = status::FAILED;
            self.dead = true;
            self.active = active;
        }
    }

    /// Fills `data` from the common configuration at `offset`. Any offset and width: what is not a register
    /// reads as zero.
    pub fn read_common(&self, offset: u64, data: &mut [u8]) {
        let image = self.image();
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let mut bytes = image.iter().skip(at);
        data.fill_with(|| bytes.next().copied().unwrap_or(0));
    }

    /// The registers as bytes. Built for each read: it is no hot path, and so every width is defined.
    fn image(&self) -> [u8; COMMON_BYTES] {
        let mut image = [0; COMMON_BYTES];
        let mut put = |offset: u64, bytes: &[u8]| {
            for (to, from) in image.iter_mut().skip(offset as usize).zip(bytes) {
                *to = *from;
            }
        };
        put(
            DEVICE_FEATURE_SELECT,
            &self.device_feature_select.to_le_bytes(),
        );
        put(
            DEVICE_FEATURE,
            &word(self.offered, self.device_feature_select).to_le_bytes(),
        );
        put(
            DRIVER_FEATURE_SELECT,
            &self.driver_feature_select.to_le_bytes(),
        );
        put(
            DRIVER_FEATURE,
            &word(self.driver_features, self.driver_feature_select).to_le_bytes(),
        );
        put(CONFIG_VECTOR, &self.config_vector.to_le_bytes());
        put(NUM_QUEUES, &(self.queues.len() as u16).to_le_bytes());
        put(STATUS, &[self.status]);
        put(GENERATION, &[self.generation]);
        put(QUEUE_SELECT, &self.queue_select.to_le_bytes());
        // A queue that is not there has size 0 (section 4.1.4.3.1) and no vector.
        put(QUEUE_VECTOR, &NO_VECTOR.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(QUEUE_SIZE, &queue.size.to_le_bytes());
            put(QUEUE_VECTOR, &queue.vector.to_le_bytes());
            put(QUEUE_ENABLE, &u16::from(queue.enabled).to_le_bytes());
            put(QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(QUEUE_DESC, &queue.descriptors.to_le_bytes());
            put(QUEUE_DRIVER, &queue.available.to_le_bytes());
            put(QUEUE_DEVICE, &queue.used.to_le_bytes());
        }
        image
    }

    /// Takes a write to the common configuration. Section 4.1.3.1 wants each field written in its own width
    /// (64-bit fields also by halves); everything else is dropped.
    pub fn write_common(&mut self, offset: u64, data: &[u8]) -> Effect {
        let value = data
            .iter()
            .rev()
            .fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        let accepted = match (offset, data.len()) {
            (STATUS, 1) => return self.write_status(value as u8),
            (DEVICE_FEATURE_SELECT, 4) => {
                self.device_feature_select = value as u32;
                true
            }
            (DRIVER_FEATURE_SELECT, 4) => {
                self.driver_feature_select = value as u32;
                true
            }
            (DRIVER_FEATURE, 4) => self.write_features(value as u32),
            (CONFIG_VECTOR, 2) => {
                self.config_vector = self.valid_vector(value as u16);
                true
            }
            (QUEUE_SELECT, 2) => {
                self.queue_select = value as u16;
                true
            }
            (QUEUE_VECTOR, 2) => self.write_queue_vector(value as u16),
            (QUEUE_SIZE | QUEUE_ENABLE, 2) => self.write_queue(offset, value as u16),
            (QUEUE_DESC..=0x37, 4 | 8) => self.write_address(offset, data.len(), value),
            _ => false,
        };
        if !accepted {
            self.refused = self.refused.saturating_add(1);
        }
        Effect::None
    }

    fn write_status(&mut self, value: u8) -> Effect {
        use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};
        if value == 0 && !self.dead {
            return Effect::Reset {
                active: self.active,
            };
        }
        // NEEDS_RESET is the device's own: a driver that writes back what it read neither sets nor clears it.
        let old = self.status & !NEEDS_RESET;
        let new = value & !NEEDS_RESET;
        match (old, new) {
            _ if old == new => return Effect::None,
            (0, ACKNOWLEDGE) | (0x01, 0x03) => {
                debug_assert_eq!(0x03, ACKNOWLEDGE | DRIVER);
                self.status |= new;
                return Effect::None;
            }
            (0x03, 0x0b) if self.features_legal() => {
                self.status |= FEATURES_OK;
                return Effect::None;
            }
            (0x0b, 0x0f) if self.status & NEEDS_RESET == 0 => {
                self.status |= DRIVER_OK;
                self.active = true;
                return Effect::Activate;
            }
            // Giving up is allowed at any time, if no bit is taken back with it.
            _ if new == old | FAILED && old & FAILED == 0 => {
                self.status |= FAILED;
                return Effect::None;
            }
            _ => {}
        }
        self.refused = self.refused.saturating_add(1);
        Effect::None
    }

    /// Section 2.2: a subset of what is offered; section 6.1: a modern device insists on VERSION_1.
    fn features_legal(&self) -> bool {
        self.driver_features & !self.offered == 0
            && !self.features_beyond
            && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn write_features(&mut self, value: u32) -> bool {
        if self.status & !status::NEEDS_RESET != status::ACKNOWLEDGE | status::DRIVER {
            return false;
        }
        let value = u64::from(value);
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => self.features_beyond |= value != 0,
        }
        true
    }

    fn valid_vector(&self, vector: u16) -> u16 {
        if vector < self.vectors {
            vector
        } else {
            NO_VECTOR
        }
    }

    fn write_queue_vector(&mut self, vector: u16) -> bool {
        let vector = self.valid_vector(vector);
        match self.queues.get_mut(usize::from(self.queue_select)) {
            Some(queue) => queue.vector = vector,
            None => return false,
        }
        true
    }

    /// The selected queue, if its settings may be written now.
    fn open_queue(&mut self) -> Option<&mut QueueSettings> {
        let open = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK;
        if self.status & !status::NEEDS_RESET != open {
            return None;
        }
        self.queues
            .get_mut(usize::from(self.queue_select))
            .filter(|queue| !queue.enabled)
    }

    fn write_queue(&mut self, offset: u64, value: u16) -> bool {
        match self.open_queue() {
            Some(queue) if offset == QUEUE_ENABLE => {
                // Section 4.1.4.3.2: a driver must not write 0.
                queue.enabled = value == 1;
                queue.enabled
            }
            Some(queue) if value.is_power_of_two() && value <= queue.max_size => {
                queue.size = value;
                true
            }
            _ => false,
        }
    }

    fn write_address(&mut self, offset: u64, width: usize, value: u64) -> bool {
        let field = offset & !7;
        let Some(queue) = self.open_queue() else {
            return false;
        };
        let address = match field {
            QUEUE_DESC => &mut queue.descriptors,
            QUEUE_DRIVER => &mut queue.available,
            _ => &mut queue.used,
        };
        match (offset - field, width) {
            (0, 8) => *address = value,
            (0, 4) => *address = *address & !0xffff_ffff | value,
            (4, 4) => *address = *address & 0xffff_ffff | value << 32,
            _ => return false,
        }
        true
    }
}

/// The 32 feature bits that `select` names.
fn word(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

#[cfg(test)]
#[path = "state_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "state_proofs.rs"]
mod proofs;
