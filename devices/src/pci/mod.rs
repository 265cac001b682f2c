//! PCI as this machine has it (design: one bus, no bridges, no INTx): configuration space type 0, access
//! mechanism 1 at ports 0xCF8 and 0xCFC, 32-bit memory BARs, MSI-X. Conventional PCI 3.0 is the source of
//! section numbers.
//!
//! The guest may read and write anything at any time; nothing in here trusts an order, a width or a value.

mod config;
mod copy;
pub mod msix;
mod root;

pub use config::{BARS, CONFIG_BYTES, ConfigSpace, ConfigState, Identity, LayoutError};
pub use copy::{COPY, COPY_BYTES, COPY_MARK};
pub use root::{
    CONFIG_PORT, CONFIG_PORT_BYTES, FUNCTIONS, PciRoot, PciRootState, Place, PlaceError, SLOTS,
};

/// One function of the bus. Called from any vCPU thread.
pub trait PciFunction: Send + Sync {
    /// Fills `data`, 1, 2 or 4 bytes inside one aligned dword, from configuration space at `offset`.
    fn config_read(&self, offset: u8, data: &mut [u8]);
    /// All of its configuration space as it stands; unlike a read by the guest this does nothing.
    fn config_space(&self) -> [u8; CONFIG_BYTES];
    /// Takes a write of 1, 2 or 4 bytes inside one aligned dword at `offset`; what is read-only stays.
    fn config_write(&self, offset: u8, data: &[u8]);
}
