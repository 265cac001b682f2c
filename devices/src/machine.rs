//! What a guest may ask of the machine as a whole. A device only says that it was asked; what follows is
//! the VMM's decision.

use std::sync::Arc;

/// A request of the guest that ends the run of its machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum MachineEvent {
    /// The guest asked for a reset (i8042 command 0xFE).
    Reset,
    /// The guest asked to be powered off (pvpanic `PVPANIC_SHUTDOWN`).
    PowerOff,
    /// The guest's kernel said that it panicked (pvpanic `PVPANIC_PANICKED`).
    Panicked,
}

/// Where a device puts a [`MachineEvent`]. Called on the vCPU thread that made the access, as often as the
/// guest likes: it must be cheap, must not block and must bear repetition.
pub type MachineEvents = Arc<dyn Fn(MachineEvent) + Send + Sync>;
