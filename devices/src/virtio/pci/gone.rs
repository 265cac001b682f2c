//! In the place of a device that was taken out: one that nobody can activate.

use crate::virtio::device::{Activation, Busy, DeviceError, VirtioDevice};
use crate::virtio::queue::Positions;
use std::io;
use std::sync::Arc;
use vmm_sys_util::eventfd::EventFd;

pub(super) struct Gone;

impl VirtioDevice for Gone {
    fn device_type(&self) -> u16 {
        // Reserved (section 5).
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[]
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn activate(&mut self, _activation: Activation) -> Result<(), DeviceError> {
        Err(DeviceError::Io {
            what: "use a device that was detached",
            cause: io::ErrorKind::NotFound.into(),
        })
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    fn suspend(&mut self, _: &Arc<EventFd>) -> Result<Positions, Busy> {
        Ok(Positions::new())
    }
}
