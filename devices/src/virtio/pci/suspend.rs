//! A transport whose device stands still, and its state as plain data.
//!
//! Suspended, a device has let go of its queues and knows where it stood in them; nothing of it touches guest memory. From there it resumes,
//! or another process takes its state: that of a device which was made alike, and which resumes then by the same step. Each pause of a VM
//! goes this way into the queues and out of them; that state is written down and taken over waits for snapshots.
//!
//! State that is taken over is hostile; what it says of the rings is checked like what a driver says.

use super::{Core, VirtioPci};
use crate::pci::ConfigState;
use crate::pci::msix::MsixState;
use crate::state::{Foreign, Version};
use crate::virtio::device::{Busy, DeviceData, DeviceError, RestoreError};
use crate::virtio::queue::Positions;
use crate::virtio::state::DeviceState;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vmm_sys_util::eventfd::EventFd;

/// The driver-visible state of a transport: plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TransportState {
    /// Configuration space.
    pub config: ConfigState,
    /// Status, features, queue settings.
    pub device: DeviceState,
    /// MSI-X table and pending bits.
    pub msix: MsixState,
}

/// All that a virtio device is to its driver: plain data, with a version. Guest memory, and what the host has behind the device, are
/// no part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VirtioState {
    version: Version<1>,
    /// Device type (virtio 1.2 section 5).
    device_type: u16,
    transport: TransportState,
    /// Where the device stands in the queues that it had.
    queues: Positions,
    /// What its own configuration space said to the driver.
    config: Vec<u8>,
    data: DeviceData,
}

/// A device that is suspended.
pub(super) struct Standing {
    queues: Positions,
    /// Its configuration space when it was last active.
    config: Vec<u8>,
}

impl VirtioPci {
    /// What the driver sees, as plain data.
    pub fn transport_state(&self) -> TransportState {
        let _core = self.core();
        self.registers()
    }

    /// The same for whoever holds `core`, so that no register changes meanwhile.
    fn registers(&self) -> TransportState {
        let config = self.config().state();
        let inner = self.shared.lock();
        TransportState {
            config,
            device: inner.state.clone(),
            msix: inner.msix.state().clone(),
        }
    }

    /// Whether the device is suspended.
    pub fn is_suspended(&self) -> bool {
        self.core().standing.is_some()
    }

    /// Has the device let go of its queues, if it has some. To be called while no vCPU runs.
    ///
    /// # Errors
    /// It has begun to, but is not there yet; `idle` is signalled when it is worth asking again. Until then, or until
    /// [`VirtioPci::resume`], it takes nothing more off its queues.
    pub fn suspend(&self, idle: &Arc<EventFd>) -> Result<(), Busy> {
        let mut core = self.core();
        if core.standing.is_none() && self.in_use() {
            self.asked.store(true, Ordering::SeqCst);
            let config = core.device.config();
            let queues = core.device.suspend(idle)?;
            self.shared.disarm();
            core.standing = Some(Standing { queues, config });
        }
        Ok(())
    }

    /// Has a suspended device go on where it stands, and one that was only asked to stand still keep on. One that cannot is marked
    /// DEVICE_NEEDS_RESET, as one that cannot be activated. For any other device this does nothing, and waits for nobody: a
    /// vCPU that resets it may wait for the thread that asks.
    pub fn resume(&self) {
        // What stands still was asked to while no vCPU ran, and none has run since.
        if !self.asked.swap(false, Ordering::SeqCst) {
            return;
        }
        let mut core = self.core();
        let Some(standing) = core.standing.take() else {
            core.device.keep_on();
            return self.kick_all();
        };
        // One that waits for its reset does nothing but that.
        if self.broken() {
            return;
        }
        if let Err(error) = self.go_on(&mut core, &standing) {
            core.failure = Some(error);
            self.shared.lock().needs_reset();
        }
    }

    /// Of what came while a device took nothing off its queues no event may be left.
    fn kick_all(&self) {
        for kick in &self.kicks {
            // Fails only when the counter is full, and then the fd is readable anyway.
            let _ = kick.write(1);
        }
    }

    fn go_on(&self, core: &mut Core, standing: &Standing) -> Result<(), DeviceError> {
        let activation = self.activation(|index, queue| {
            let position = standing.queues.get(&index);
            position.map(|position| queue.go_on_at(*position)).is_some()
        })?;
        let interrupt = activation.interrupt.clone();
        core.device.resume(activation)?;
        if core.device.config() != standing.config {
            interrupt.config_changed();
        }
        self.kick_all();
        Ok(())
    }

    /// All of the device's state. `None` while it works: it has to be suspended first, or not in use.
    pub fn state(&self) -> Option<VirtioState> {
        let core = self.core();
        if core.standing.is_none() && self.in_use() {
            return None;
        }
        let (queues, config) = match &core.standing {
            Some(standing) => (standing.queues.clone(), standing.config.clone()),
            None => (Positions::new(), core.device.config()),
        };
        Some(VirtioState {
            version: Version,
            device_type: core.device.device_type(),
            transport: self.registers(),
            queues,
            config,
            data: core.device.data(),
        })
    }

    /// Takes the state of another device, which was made alike, and is suspended as it was. To be called before a driver has seen
    /// this one; after an error the device is of no more use.
    ///
    /// # Errors
    /// See [`RestoreError`].
    pub fn restore(&self, state: &VirtioState) -> Result<(), RestoreError> {
        let mut core = self.core();
        if state.device_type != core.device.device_type() {
            return Err(Foreign("device type").into());
        }
        if state.config.len() != core.device.config().len() {
            return Err(Foreign("device configuration").into());
        }
        core.device.restore(&state.data)?;
        let mut control = [0];
        {
            let mut config = self.config();
            config.restore(&state.transport.config)?;
            config.read(self.msix_control, &mut control);
        }
        let [control] = control;
        let mut inner = self.shared.lock();
        inner.state.restore(&state.transport.device)?;
        inner.msix.restore(&state.transport.msix, control)?;
        if inner.state.live() {
            self.asked.store(true, Ordering::SeqCst);
            core.standing = Some(Standing {
                queues: state.queues.clone(),
                config: state.config.clone(),
            });
        }
        Ok(())
    }
}
