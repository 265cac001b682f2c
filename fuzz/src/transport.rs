//! The state machine of virtio over PCI: any sequence of register accesses and of a device's own events.

use crate::allocations::Bounds;
use arbitrary::{Result, Unstructured};
use capsid_devices::testing::{Driver, Region, memory};
use capsid_devices::virtio::device::{Activation, Busy, DeviceError, Interrupt, VirtioDevice};
use capsid_devices::virtio::pci::{BAR_BYTES, TRANSPORT_FEATURES};
use capsid_devices::virtio::queue::Positions;
use capsid_devices::virtio::state::{DeviceState, status};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use vmm_sys_util::eventfd::EventFd;

/// Most accesses of one input.
const STEPS_MAX: usize = 512;
const FEATURES: u64 = 0x2f;
const MEMORY_BYTES: usize = 64 << 10;

/// What the device and the target share.
#[derive(Default)]
struct Seen {
    refuse_activation: AtomicBool,
    refuse_reset: AtomicBool,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

/// A device that does nothing and sees to it that it is treated as its contract says.
struct Probe {
    seen: Arc<Seen>,
    active: bool,
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> u16 {
        4
    }

    fn queue_sizes(&self) -> &[u16] {
        &[8, 256, 1]
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn config(&self) -> Vec<u8> {
        vec![1, 2, 3, 4, 5]
    }

    fn activate(&mut self, activation: Activation) -> std::result::Result<(), DeviceError> {
        assert!(!self.active, "activated twice");
        self.active = true;
        assert_eq!(activation.features & !(FEATURES | TRANSPORT_FEATURES), 0);
        for queue in activation.queues.iter().flatten() {
            assert!(queue.size().is_power_of_two() && queue.size() <= 256);
        }
        *self.seen.interrupt.lock().expect("no panic") = Some(activation.interrupt);
        match self.seen.refuse_activation.load(Ordering::Relaxed) {
            true => Err(DeviceError::QueueMissing(0)),
            false => Ok(()),
        }
    }

    fn suspend(&mut self, _: &Arc<EventFd>) -> std::result::Result<Positions, Busy> {
        self.active = false;
        Ok(Positions::new())
    }

    fn reset(&mut self) -> std::result::Result<(), DeviceError> {
        // Also where the queues were refused before it could be activated.
        if self.seen.refuse_reset.load(Ordering::Relaxed) {
            return Err(DeviceError::QueueMissing(1));
        }
        self.active = false;
        Ok(())
    }
}

pub(crate) const BOUNDS: Bounds = Bounds {
    growth: 2 << 20,
    largest: 1 << 20,
};

pub(crate) fn run(input: &[u8]) {
    let seen = Arc::new(Seen::default());
    let probe = Probe {
        seen: seen.clone(),
        active: false,
    };
    let driver = Driver::with_memory(Box::new(probe), memory(&[(0, MEMORY_BYTES)]));
    let mut input = Unstructured::new(input);
    for _ in 0..STEPS_MAX {
        let before = driver.transport.transport_state().device;
        if input.is_empty() || step(&mut input, &driver, &seen).is_err() {
            break;
        }
        check(&before, &driver.transport.transport_state().device);
    }
    // Dropped while the last interrupt is kept: it has to do nothing then.
    drop(driver);
    if let Some(interrupt) = seen.interrupt.lock().expect("no panic").take() {
        interrupt.used(0);
    }
}

/// One access of the driver's, or one event of the device's.
fn step(input: &mut Unstructured<'_>, driver: &Driver, seen: &Seen) -> Result<()> {
    let bar = Region::default();
    let width = |input: &mut Unstructured<'_>| input.choose(&[1, 2, 4, 8]).copied();
    match input.arbitrary::<u8>()? % 8 {
        // The common configuration, where nearly everything happens.
        0..=2 => {
            let offset = u64::from(input.arbitrary::<u8>()? % 0x40);
            let width = width(input)?;
            driver.write(driver.common, offset, width, input.arbitrary()?);
        }
        3 => driver.set_status(input.arbitrary()?),
        4 => {
            let offset = input.arbitrary::<u64>()? % u64::from(BAR_BYTES);
            let width = width(input)?;
            driver.write(bar, offset, width, input.arbitrary()?);
            driver.read(bar, offset, width);
        }
        5 => {
            let (offset, value) = input.arbitrary()?;
            let width = *input.choose(&[1, 2, 4])?;
            driver.write_config(offset, width, value);
            driver.read_config(offset, width);
        }
        6 => {
            let interrupt = seen.interrupt.lock().expect("no panic").clone();
            let (event, queue) = input.arbitrary::<(u8, u16)>()?;
            match (interrupt, event % 3) {
                (Some(interrupt), 0) => interrupt.used(queue),
                (Some(interrupt), 1) => interrupt.config_changed(),
                (Some(interrupt), _) => interrupt.needs_reset(),
                (None, _) => {}
            }
        }
        _ => {
            let (activation, reset) = input.arbitrary()?;
            seen.refuse_activation.store(activation, Ordering::Relaxed);
            seen.refuse_reset.store(reset, Ordering::Relaxed);
        }
    }
    Ok(())
}

/// What one step may have changed, by virtio 1.2 sections 2.1 and 3.1 and CVE-2026-5747.
fn check(before: &DeviceState, after: &DeviceState) {
    let (old, new) = (before.status(), after.status());
    let was_reset = new == 0 || (new == status::FAILED && old != new);
    assert!(
        was_reset || old & !new == 0,
        "status {old:#x} lost bits: {new:#x}"
    );
    if new & status::FEATURES_OK != 0 {
        assert_eq!(after.features() & !(FEATURES | TRANSPORT_FEATURES), 0);
    }
    if old & new & status::FEATURES_OK != 0 {
        assert_eq!(before.features(), after.features());
    }
    if old & new & status::DRIVER_OK != 0 {
        for (was, is) in before.queues().iter().zip(after.queues()) {
            // Only the vector may change.
            let mut frozen = was.clone();
            frozen.vector = is.vector;
            assert_eq!(&frozen, is, "queue settings changed while live");
        }
    }
}
