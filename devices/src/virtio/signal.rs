//! What a device and its transport share while both run: the driver-visible state and the MSI-X table,
//! under one lock that is a leaf. Nobody calls a device, or waits, with it held, so a device may interrupt
//! from any thread, even while the transport is inside its `activate` or `reset`.

use super::device::Interrupt;
use super::state::{DeviceState, NO_VECTOR};
use crate::pci::msix::Msix;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(super) struct Inner {
    pub(super) state: DeviceState,
    pub(super) msix: Msix,
    /// Counts activations, so that an [`Interrupt`] of an earlier one falls silent.
    epoch: u64,
}

impl Inner {
    fn trigger(&mut self, vector: u16) {
        if vector != NO_VECTOR {
            self.msix.trigger(vector);
        }
    }

    /// DEVICE_NEEDS_RESET, and the driver told.
    pub(super) fn needs_reset(&mut self) {
        if let Some(vector) = self.state.needs_reset() {
            self.trigger(vector);
        }
    }
}

pub(super) struct Shared(Mutex<Inner>);

impl Shared {
    pub(super) fn new(state: DeviceState, msix: Msix) -> Arc<Shared> {
        Arc::new(Shared(Mutex::new(Inner {
            state,
            msix,
            epoch: 0,
        })))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The interrupt of a new activation.
    pub(super) fn arm(self: &Arc<Shared>) -> Arc<dyn Interrupt> {
        let mut inner = self.lock();
        inner.epoch += 1;
        Arc::new(Signal {
            epoch: inner.epoch,
            shared: Arc::clone(self),
        })
    }

    /// Silences the interrupts given out so far.
    pub(super) fn disarm(&self) {
        self.lock().epoch += 1;
    }
}

struct Signal {
    shared: Arc<Shared>,
    epoch: u64,
}

impl Signal {
    fn with(&self, act: impl FnOnce(&mut Inner)) {
        let mut inner = self.shared.lock();
        if inner.epoch == self.epoch {
            act(&mut inner);
        }
    }
}

impl Interrupt for Signal {
    fn used(&self, queue: u16) {
        self.with(|inner| {
            let vector = inner.state.queue_used(queue);
            inner.trigger(vector);
        });
    }

    fn config_changed(&self) {
        self.with(|inner| {
            let vector = inner.state.config_changed();
            inner.trigger(vector);
        });
    }

    fn needs_reset(&self) {
        self.with(Inner::needs_reset);
    }
}
