//! MSI-X (PCI 3.0 section 6.8.2): the table and the pending bits, and who may be interrupted.
//!
//! Where a message goes (irqfd, GSI routing) is the VMM's business: [`MsiRoutes`]. The guest writes the
//! table; a message that makes no sense goes to KVM, which refuses or drops it, and harms only this guest.

use crate::state::Foreign;
use serde::{Deserialize, Serialize};
use std::io;
use std::sync::Arc;

/// Bytes of one table entry.
pub const ENTRY_BYTES: usize = 16;
/// The most vectors of one function; PCI allows 2048, no device here needs more.
pub const VECTORS_MAX: u16 = 256;
/// Bytes of the capability's body behind id and next pointer.
pub const CAPABILITY_BODY_BYTES: usize = 10;
/// Id of the capability.
pub const CAPABILITY_ID: u8 = 0x11;
/// Bits of message control's high byte that the guest may write: enable and function mask.
pub const CONTROL_HIGH_WRITABLE: u8 = CONTROL_HIGH_ENABLE | CONTROL_HIGH_MASK;

const CONTROL_HIGH_ENABLE: u8 = 1 << 7;
const CONTROL_HIGH_MASK: u8 = 1 << 6;
const ENTRY_MASKED: u32 = 1;

/// What a function writes to interrupt a CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Where to, on x86 0xFEEx_xxxx with the destination in it.
    pub address: u64,
    /// What, on x86 the vector and its delivery mode.
    pub data: u32,
}

/// The VMM's side of one function's vectors. Called with the function's interrupt state locked: it must not
/// block and must not call back.
pub trait MsiRoutes: Send + Sync {
    /// From now on [`MsiRoutes::trigger`] of `vector` sends `message`; with `None` the guest has disabled
    /// MSI-X and the route can go. A vector is not triggered before its first message; masking a vector is
    /// no change of its route, it is just not triggered meanwhile.
    ///
    /// # Errors
    /// The route could not be set. The vector then stays silent and pending and is tried again when the guest
    /// unmasks it; the implementor reports the reason, since no guest could.
    fn update(&self, vector: u16, message: Option<MsiMessage>) -> io::Result<()>;

    /// Sends the message of `vector`.
    ///
    /// # Errors
    /// It could not be sent; the vector becomes pending.
    fn trigger(&self, vector: u16) -> io::Result<()>;
}

/// One entry of the table, as the guest wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixEntry {
    /// Address, data and control words in the order of the table.
    words: [u32; 4],
    /// An interrupt came while it was masked.
    pending: bool,
}

impl MsixEntry {
    fn masked(&self) -> bool {
        let [_, _, _, control] = self.words;
        control & ENTRY_MASKED != 0
    }

    fn message(&self) -> MsiMessage {
        let [low, high, data, _] = self.words;
        MsiMessage {
            address: u64::from(high) << 32 | u64::from(low),
            data,
        }
    }
}

/// The guest-visible state. Plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    entries: Vec<MsixEntry>,
    enabled: bool,
    function_masked: bool,
}

/// The MSI-X of one function.
pub struct Msix {
    state: MsixState,
    /// What the VMM was told, so that it is told only of changes.
    routed: Vec<Option<MsiMessage>>,
    routes: Arc<dyn MsiRoutes>,
}

impl Msix {
    /// `vectors` masked entries (1 to [`VECTORS_MAX`]; more are cut), MSI-X disabled.
    pub fn new(vectors: u16, routes: Arc<dyn MsiRoutes>) -> Msix {
        let vectors = usize::from(vectors.clamp(1, VECTORS_MAX));
        let entry = MsixEntry {
            words: [0, 0, 0, ENTRY_MASKED],
            pending: false,
        };
        Msix {
            state: MsixState {
                entries: vec![entry; vectors],
                enabled: false,
                function_masked: false,
            },
            routed: vec![None; vectors],
            routes,
        }
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        self.state.entries.len() as u16
    }

    /// What the guest sees.
    pub fn state(&self) -> &MsixState {
        &self.state
    }

    /// Takes the state of another one, whose message control ended with the byte `high`: sets its routes, and sends what is pending.
    ///
    /// # Errors
    /// It is not one of this function.
    pub fn restore(&mut self, state: &MsixState, high: u8) -> Result<(), Foreign> {
        let possible = |entry: &MsixEntry| {
            let [low, _, _, control] = entry.words;
            low & 3 == 0 && control & !ENTRY_MASKED == 0
        };
        if state.entries.len() != self.state.entries.len() || !state.entries.iter().all(possible) {
            return Err(Foreign("MSI-X table"));
        }
        let enabled = high & CONTROL_HIGH_ENABLE != 0;
        let masked = high & CONTROL_HIGH_MASK != 0;
        if (state.enabled, state.function_masked) != (enabled, masked) {
            return Err(Foreign("MSI-X message control"));
        }
        self.state.entries.clone_from(&state.entries);
        self.set_control(high);
        Ok(())
    }

    /// The capability's body for a table and pending bits in BAR `bar` at these offsets (multiples of 8).
    pub fn capability(&self, bar: u8, table: u32, pending: u32) -> [u8; CAPABILITY_BODY_BYTES] {
        let bir = u32::from(bar & 7);
        let [a, b] = (self.vectors() - 1).to_le_bytes();
        let [c, d, e, f] = (table & !7 | bir).to_le_bytes();
        let [g, h, i, j] = (pending & !7 | bir).to_le_bytes();
        [a, b, c, d, e, f, g, h, i, j]
    }

    /// Takes the high byte of message control after the guest wrote it.
    pub fn set_control(&mut self, high: u8) {
        self.state.enabled = high & CONTROL_HIGH_ENABLE != 0;
        self.state.function_masked = high & CONTROL_HIGH_MASK != 0;
        for vector in 0..self.vectors() {
            if self.state.enabled {
                self.settle(vector);
            } else {
                self.disable(vector);
            }
        }
    }

    /// Fills `data` from the table at `offset`; zero beyond its end.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let words = self.state.entries.iter().flat_map(|entry| entry.words);
        fill(data, offset, words.flat_map(u32::to_le_bytes));
    }

    /// Takes a write to the table; only whole aligned dwords and qwords are (PCI 3.0 section 6.8.2), the
    /// rest is dropped.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let width = data.len() as u64;
        if !matches!(width, 4 | 8) || offset % width != 0 {
            return;
        }
        let Ok(vector) = usize::try_from(offset / ENTRY_BYTES as u64) else {
            return;
        };
        let Some(entry) = self.state.entries.get_mut(vector) else {
            return;
        };
        let first = (offset as usize % ENTRY_BYTES) / 4;
        let words = entry.words.iter_mut().enumerate().skip(first);
        for ((index, word), new) in words.zip(data.chunks_exact(4)) {
            let new = new
                .iter()
                .rev()
                .fold(0, |value, byte| value << 8 | u32::from(*byte));
            // Of vector control only the mask bit exists, of the low address bits 1:0 are zero.
            *word = match index {
                0 => new & !3,
                3 => new & ENTRY_MASKED,
                _ => new,
            };
        }
        self.settle(vector as u16);
    }

    /// Fills `data` from the pending bits at `offset`; zero beyond their end. The guest cannot write them.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.state.entries.chunks(8).map(|entries| {
            let bits = entries.iter().rev();
            bits.fold(0, |byte, entry| byte << 1 | u8::from(entry.pending))
        });
        fill(data, offset, bytes);
    }

    /// Interrupts by `vector`: at once, when it is unmasked, or never if MSI-X is disabled or there is no
    /// such vector.
    pub fn trigger(&mut self, vector: u16) {
        if !self.state.enabled {
            return;
        }
        if let Some(entry) = self.state.entries.get_mut(usize::from(vector)) {
            entry.pending = true;
            self.deliver(vector);
        }
    }

    /// Brings the route of `vector` up to date if it is unmasked, and delivers what is pending.
    fn settle(&mut self, vector: u16) {
        let index = usize::from(vector);
        let (Some(entry), Some(routed)) =
            (self.state.entries.get(index), self.routed.get_mut(index))
        else {
            return;
        };
        if !self.state.enabled || self.state.function_masked || entry.masked() {
            return;
        }
        let message = Some(entry.message());
        if *routed != message {
            // A vector without a route stays pending: see MsiRoutes::update.
            *routed = match self.routes.update(vector, message) {
                Ok(()) => message,
                Err(_) => None,
            };
        }
        self.deliver(vector);
    }

    fn deliver(&mut self, vector: u16) {
        let index = usize::from(vector);
        let (Some(entry), Some(Some(_))) =
            (self.state.entries.get_mut(index), self.routed.get(index))
        else {
            return;
        };
        if entry.pending && !self.state.function_masked && !entry.masked() {
            entry.pending = self.routes.trigger(vector).is_err();
        }
    }

    fn disable(&mut self, vector: u16) {
        let index = usize::from(vector);
        if let Some(entry) = self.state.entries.get_mut(index) {
            entry.pending = false;
        }
        if let Some(routed) = self.routed.get_mut(index) {
            if routed.take().is_some() {
                // The route is gone for us whatever the VMM makes of it: nothing triggers it any more.
                let _ = self.routes.update(vector, None);
            }
        }
    }
}

/// Fills `data` with what is in `bytes` from `offset` on, and zeros beyond.
fn fill(data: &mut [u8], offset: u64, bytes: impl Iterator<Item = u8>) {
    let mut bytes = bytes.skip(usize::try_from(offset).unwrap_or(usize::MAX));
    data.fill_with(|| bytes.next().unwrap_or(0));
}

#[cfg(test)]
#[path = "msix_tests.rs"]
mod tests;
