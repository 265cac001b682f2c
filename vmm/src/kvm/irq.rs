//! Message signalled interrupts of one PCI function, sent straight to KVM.
//!
//! `KVM_SIGNAL_MSI` needs no routing table: the guest may set up a hundred vectors without a single
//! `KVM_SET_GSI_ROUTING`, each of which replaces the whole table and waits for an SRCU grace period.

use super::vm::Vm;
use capsid_devices::pci::msix::{MsiMessage, MsiRoutes};
use std::io;
use std::sync::{Mutex, PoisonError};

/// The vectors of one function.
pub struct Messages {
    vm: Vm,
    by_vector: Mutex<Vec<Option<MsiMessage>>>,
}

impl Messages {
    /// `vectors` vectors, all silent.
    pub fn new(vm: Vm, vectors: u16) -> Messages {
        Messages {
            vm,
            by_vector: Mutex::new(vec![None; usize::from(vectors)]),
        }
    }
}

impl MsiRoutes for Messages {
    fn update(&self, vector: u16, message: Option<MsiMessage>) -> io::Result<()> {
        let mut by_vector = self
            .by_vector
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let place = by_vector
            .get_mut(usize::from(vector))
            .ok_or(io::ErrorKind::InvalidInput)?;
        *place = message;
        Ok(())
    }

    fn trigger(&self, vector: u16) -> io::Result<()> {
        let message = self
            .by_vector
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(usize::from(vector))
            .copied()
            .flatten()
            .ok_or(io::ErrorKind::NotFound)?;
        self.vm
            .signal_msi(message.address, message.data)
            .map_err(io::Error::other)
    }
}
