//! Tests of the transport by a driver, hostile or not, see `pci.rs`. The B numbers are those of the threat
//! model's table "guest kernel to VMM".

use super::*;
use crate::testing::{Buffer, Driver, sweep};
use crate::virtio::device::{Busy, Interrupt, RestoreError};
use crate::virtio::queue::{BadSettings, Positions, QueuePosition, positions};
use proptest::prelude::*;

#[path = "loud_tests.rs"]
mod loud;
#[path = "queue_tests.rs"]
mod queues;
#[path = "retire_tests.rs"]
mod retire;
#[path = "suspend_tests.rs"]
mod suspend;

/// A device of the test's making: it keeps its queues and answers when the test says so.
#[derive(Default)]
struct Model {
    activations: usize,
    resets: usize,
    active: Option<Activation>,
    refuse_activate: bool,
    refuse_reset: bool,
    busy: bool,
    config: Option<u8>,
}

#[derive(Clone, Default)]
struct Device(Arc<Mutex<Model>>);

const CONFIG: [u8; 6] = [1, 2, 3, 4, 5, 6];

impl Device {
    fn model(&self) -> MutexGuard<'_, Model> {
        self.0.lock().unwrap()
    }

    fn interrupt(&self) -> Arc<dyn Interrupt> {
        self.model().active.as_ref().unwrap().interrupt.clone()
    }

    /// Serves queue 0 as a device does on a kick.
    fn serve(&self) -> Result<usize, crate::virtio::queue::ServeError> {
        let mut model = self.model();
        let active = model.active.as_mut().unwrap();
        let queue = active.queues[0].as_mut().unwrap();
        let mut served = 0;
        let result = queue.serve(&active.memory, &*active.interrupt, |_| {
            served += 1;
            0
        });
        result.map(|()| served)
    }
}

impl VirtioDevice for Device {
    fn device_type(&self) -> u16 {
        42
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 64, 16]
    }
    fn features(&self) -> u64 {
        1 << 3
    }
    fn config(&self) -> Vec<u8> {
        let mut config = CONFIG.to_vec();
        config[0] = self.model().config.unwrap_or(config[0]);
        config
    }
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let mut model = self.model();
        assert!(model.active.is_none(), "activated twice without a reset");
        model.activations += 1;
        if model.refuse_activate {
            return Err(DeviceError::QueueMissing(9));
        }
        model.active = Some(activation);
        Ok(())
    }
    fn suspend(&mut self, _: &Arc<EventFd>) -> Result<Positions, Busy> {
        let mut model = self.model();
        if model.busy {
            return Err(Busy);
        }
        let active = model.active.take();
        let queues = active
            .iter()
            .flat_map(|active| active.queues.iter().flatten());
        Ok(positions(queues))
    }
    fn reset(&mut self) -> Result<(), DeviceError> {
        let mut model = self.model();
        model.resets += 1;
        model.active = None;
        if model.refuse_reset {
            return Err(DeviceError::QueueMissing(9));
        }
        Ok(())
    }
}

fn new() -> (Driver, Device) {
    let device = Device::default();
    (Driver::new(Box::new(device.clone())), device)
}

fn up() -> (Driver, Device) {
    let device = Device::default();
    (Driver::up(Box::new(device.clone()), 1 << 3), device)
}

#[test]
fn a_driver_finds_all_structures_inside_the_bar() {
    let (driver, _) = new();
    assert_eq!(driver.read_config(2, 2), 0x1040 + 42);
    assert_eq!(driver.read_config(8, 1), 1);
    assert!(driver.read_config(0x2e, 2) >= 0x40);
    assert_eq!(driver.read_config(0x3d, 1), 0, "no INTx");
    let regions = [
        driver.common,
        driver.notify,
        driver.isr,
        driver.config,
        driver.table,
    ];
    for region in regions {
        assert!(region.length > 0 && region.offset + region.length <= u64::from(BAR_BYTES));
        assert_eq!(region.offset % 0x1000, 0);
    }
    // Linux maps no less than struct virtio_pci_common_cfg.
    assert!(driver.common.length >= 56);
    assert_eq!(driver.table.length, 4 * 16);
    assert_eq!(driver.config.length, 8);
}

#[test]
fn the_device_gets_what_the_driver_agreed_on() {
    let (mut driver, device) = new();
    assert_eq!(driver.offered(), 1 << 3 | TRANSPORT_FEATURES);
    driver.negotiate(1 << 3);
    assert_eq!(driver.queue_count(), 3);
    driver.setup_queue(0, 128);
    driver.setup_queue(2, 16);
    driver.start();
    assert_eq!(driver.status(), 0x0f);
    let model = device.model();
    let active = model.active.as_ref().unwrap();
    assert_eq!(active.features, 1 << 3 | TRANSPORT_FEATURES);
    let sizes: Vec<Option<u16>> = active
        .queues
        .iter()
        .map(|queue| queue.as_ref().map(ActiveQueue::size))
        .collect();
    assert_eq!(sizes, [Some(128), None, Some(16)]);
}

#[test]
fn a_kick_signals_its_queues_eventfd_and_no_other() {
    let (driver, _) = up();
    let addresses = driver.transport.notify_addresses();
    driver.kick(1);
    let counts: Vec<u64> = addresses
        .iter()
        .map(|address| address.kick.read().unwrap_or(0))
        .collect();
    assert_eq!(counts, [0, 1, 0]);
    let base = driver.transport.address() + driver.notify.offset;
    let at: Vec<u64> = addresses.iter().map(|address| address.address).collect();
    assert_eq!(at, [base, base + 4, base + 8]);
}

#[test]
fn a_kick_of_a_queue_that_is_not_there_does_nothing() {
    // V9.
    let (driver, _) = up();
    for queue in [3u16, 100, 0x3ff] {
        driver.kick(queue);
    }
    for address in driver.transport.notify_addresses() {
        assert!(address.kick.read().is_err());
    }
}

#[test]
fn each_interrupt_goes_to_its_vector() {
    let (driver, device) = up();
    let interrupt = device.interrupt();
    interrupt.used(1);
    interrupt.used(1);
    interrupt.config_changed();
    assert_eq!((driver.interrupts(0), driver.interrupts(1)), (0, 2));
    assert_eq!(driver.config_interrupts(), 1);
    assert_eq!(driver.read(driver.common, 0x15, 1), 1);
    assert_eq!(driver.read(driver.isr, 0, 1), 3);
    assert_eq!(driver.read(driver.isr, 0, 1), 0, "reading clears it");
}

#[test]
fn a_queue_without_a_vector_interrupts_nobody() {
    let (driver, device) = up();
    driver.write(driver.common, 0x16, 2, 1);
    driver.write(driver.common, 0x1a, 2, 0xffff);
    device.interrupt().used(1);
    device.interrupt().used(77);
    assert_eq!(driver.routes.total(), 0);
}

#[test]
fn the_interrupt_of_an_earlier_life_is_silent() {
    let (mut driver, device) = up();
    let old = device.interrupt();
    driver.reset();
    driver.negotiate(0);
    driver.setup_queue(0, 16);
    driver.start();
    old.used(0);
    old.config_changed();
    old.needs_reset();
    assert_eq!((driver.status(), driver.routes.total()), (0x0f, 0));
}

#[test]
fn settings_after_driver_ok_change_nothing_that_the_device_uses() {
    // B2.2, CVE-2026-5747, by the BAR.
    let (mut driver, device) = up();
    let before = driver.transport.transport_state().device.queues().to_vec();
    for queue in 0..3 {
        driver.write(driver.common, 0x16, 2, queue);
        driver.write(driver.common, 0x18, 2, 4);
        for offset in [0x20, 0x28, 0x30] {
            driver.write(driver.common, offset, 8, 0x8000);
        }
        driver.write(driver.common, 0x1c, 2, 0);
    }
    assert_eq!(driver.transport.transport_state().device.queues(), before);
    driver.add(0, &[Buffer::Readable(b"x")]);
    assert_eq!(device.serve().unwrap(), 1);
    assert!(driver.used(0).is_some());
}

#[test]
fn rings_that_are_not_in_memory_are_refused_at_driver_ok() {
    // V2, B2.1.
    let good = (0x10_0000u64, 0x10_2000u64, 0x10_4000u64);
    let end = 16u64 << 20;
    for (descriptors, available, used) in [
        (0, good.1, good.2),
        (good.0, 0, good.2),
        (good.0, good.1, 0),
        (good.0 + 8, good.1, good.2),
        (good.0, good.1 + 1, good.2),
        (good.0, good.1, good.2 + 2),
        (end - 16 * 256 + 16, good.1, good.2),
        (good.0, end - 4, good.2),
        (good.0, good.1, end - 8),
        (end, good.1, good.2),
        (0xc000_0000, good.1, good.2),
        (u64::MAX - 15, good.1, good.2),
        (good.0, u64::MAX - 1, good.2),
        (good.0, good.1, u64::MAX - 3),
        (good.0, good.0 + 16, good.2),
        (good.0, good.1, good.1),
    ] {
        let (mut driver, device) = new();
        driver.negotiate(0);
        driver.write(driver.common, 0x20, 8, descriptors);
        driver.write(driver.common, 0x28, 8, available);
        driver.write(driver.common, 0x30, 8, used);
        driver.write(driver.common, 0x1c, 2, 1);
        driver.start();
        assert_eq!(
            driver.status(),
            0x4f,
            "{descriptors:#x} {available:#x} {used:#x}"
        );
        assert_eq!(device.model().activations, 0);
        assert_eq!(driver.config_interrupts(), 1);
        assert!(matches!(
            driver.transport.take_failure(),
            Some(DeviceError::Queue {
                index: 0,
                cause: BadSettings::Part { .. } | BadSettings::Overlap
            })
        ));
    }
}

#[test]
fn rings_at_the_very_end_of_memory_are_accepted() {
    let (mut driver, _) = new();
    let end = 16u64 << 20;
    driver.negotiate(0);
    driver.write(driver.common, 0x18, 2, 16);
    driver.write(driver.common, 0x20, 8, end - 256);
    driver.write(driver.common, 0x28, 8, end - 512);
    driver.write(driver.common, 0x30, 8, end - 1024);
    driver.write(driver.common, 0x1c, 2, 1);
    driver.start();
    assert_eq!(driver.status(), 0x0f);
}

#[test]
fn a_device_that_cannot_activate_needs_a_reset_and_gets_one() {
    // B2.10.
    let (mut driver, device) = new();
    device.model().refuse_activate = true;
    driver.negotiate(0);
    driver.setup_queue(0, 16);
    driver.start();
    assert_eq!(driver.status(), 0x4f);
    driver.set_status(0x0f);
    assert_eq!(device.model().activations, 1);
    device.model().refuse_activate = false;
    driver.reset();
    assert_eq!((driver.status(), device.model().resets), (0, 1));
    driver.negotiate(0);
    driver.setup_queue(0, 16);
    driver.start();
    assert_eq!(driver.status(), 0x0f);
}

#[test]
fn a_device_that_cannot_reset_stays_failed() {
    // B2.3, FC dcdcd800d.
    let (mut driver, device) = up();
    device.model().refuse_reset = true;
    driver.reset();
    assert_eq!(driver.status(), 0x80);
    device.model().refuse_reset = false;
    for value in 0..=0xff {
        driver.set_status(value);
        assert_eq!(driver.status(), 0x80);
    }
    let model = device.model();
    assert_eq!((model.resets, model.activations), (1, 1));
}

#[test]
fn a_thousand_resets_leave_a_working_device() {
    // V10.
    let (mut driver, device) = new();
    for round in 1..=1000 {
        driver.negotiate(0);
        driver.setup_queue(0, 16);
        driver.start();
        driver.add(0, &[Buffer::Writable(4)]);
        assert_eq!(device.serve().unwrap(), 1);
        driver.reset();
        assert_eq!((driver.status(), device.model().resets), (0, round));
    }
}

#[test]
fn the_configuration_cannot_be_written() {
    // B2.9.
    let (driver, _) = up();
    let before = driver.device_config();
    assert_eq!(before[..6], CONFIG);
    for offset in 0..16 {
        for width in [1, 2, 4, 8] {
            driver.write(driver.config, offset, width, u64::MAX);
        }
    }
    assert_eq!(driver.device_config(), before);
    assert_eq!(driver.read(driver.config, 4, 8), 0x0605);
}

#[test]
fn a_bar_that_does_not_decode_answers_nothing() {
    // V14.
    let (driver, device) = up();
    driver.write_config(4, 2, 0);
    assert_eq!(driver.status(), 0xff);
    driver.set_status(0);
    driver.kick(0);
    driver.write_config(4, 2, 2);
    assert_eq!((driver.status(), device.model().resets), (0x0f, 0));
    // Sized, moved, put back.
    driver.write_config(0x10, 4, 0xffff_ffff);
    assert_eq!(driver.read_config(0x10, 4), u64::from(!(BAR_BYTES - 1)));
    assert_eq!(driver.status(), 0xff);
    driver.write_config(0x10, 4, 0xd000_0000);
    assert_eq!(driver.status(), 0xff);
    driver.write_config(0x10, 4, driver.transport.address());
    assert_eq!(driver.status(), 0x0f);
    // An interrupt is no access to the BAR.
    driver.write_config(4, 2, 0);
    device.interrupt().used(0);
    assert_eq!(driver.interrupts(0), 1);
}

#[test]
fn the_configuration_window_reaches_the_bar() {
    // Section 4.1.4.9: bar, offset and length name what pci_cfg_data accesses.
    let (driver, device) = up();
    let window = driver.window();
    let open = |offset: u64, length: u64| {
        driver.write_config(window + 4, 1, 0);
        driver.write_config(window + 8, 4, offset);
        driver.write_config(window + 12, 4, length);
    };
    driver.write_config(4, 2, 0); // also while the BAR does not decode
    open(driver.common.offset + 0x14, 1);
    assert_eq!(driver.read_config(window + 16, 1), 0x0f);
    open(driver.config.offset, 4);
    assert_eq!(driver.read_config(window + 16, 4), 0x0403_0201);
    open(driver.notify.offset + 4, 2);
    driver.write_config(window + 16, 2, 1);
    let kick = &driver.transport.notify_addresses()[1].kick;
    assert_eq!(kick.read().unwrap(), 1);
    open(driver.common.offset + 0x14, 1);
    driver.write_config(window + 16, 1, 0);
    assert_eq!(device.model().resets, 1);
}

#[test]
fn what_the_configuration_says_is_told_without_an_access_by_its_window() {
    let (driver, _) = up();
    let window = driver.window();
    driver.write_config(window + 8, 4, driver.common.offset + 0x14);
    driver.write_config(window + 12, 4, 1);
    let data = usize::from(window + 16);
    assert_eq!(driver.transport.config_space()[data], 0);
    assert_eq!(driver.read_config(window + 16, 1), 0x0f);
    assert_eq!(driver.transport.config_space()[data], 0x0f);
}

#[test]
fn configuration_space_is_there_while_a_reset_waits_for_the_host() {
    let (driver, device) = up();
    let (transport, status) = (&driver.transport, driver.common.offset + 0x14);
    // Who looks there may be the one that the reset waits for.
    let held = device.model();
    std::thread::scope(|scope| {
        scope.spawn(|| BusDevice::write(&**transport, status, &[0]));
        while transport.core.try_lock().is_ok() {
            std::thread::yield_now();
        }
        let command = transport.config_space()[4];
        transport.config_write(4, &[command]);
        let mut read = [0];
        transport.config_read(4, &mut read);
        assert_eq!(read, [command]);
        drop(held);
    });
    assert_eq!(device.model().resets, 1);
}

#[test]
fn a_window_that_makes_no_sense_reaches_nothing() {
    // V14: PCI cfg cap length 0 and 9.
    let (driver, device) = up();
    let window = driver.window();
    for (bar, offset, length) in [
        (0u64, 0x14u64, 0u64),
        (0, 0x14, 3),
        (0, 0x14, 8),
        (0, 0x14, 9),
        (0, 0x14, 0xffff_ffff),
        (0, 0x15, 2),
        (0, 0x8000, 1),
        (0, 0xffff_fffc, 4),
        (1, 0x14, 1),
        (255, 0x14, 1),
    ] {
        driver.write_config(window + 4, 1, bar);
        driver.write_config(window + 8, 4, offset);
        driver.write_config(window + 12, 4, length);
        driver.write_config(window + 16, 4, 0);
        assert_eq!(driver.read_config(window + 16, 4), 0);
    }
    assert_eq!((driver.status(), device.model().resets), (0x0f, 0));
}

#[test]
fn no_access_to_any_register_panics() {
    // B2.7, B2.8, CH#7917, V12, V13.
    for value in [
        0u64,
        1,
        u64::MAX,
        0x8000_0000_0000_0000,
        0x0101_0101_0101_0101,
    ] {
        let (mut driver, device) = up();
        sweep(&driver, value);
        // Whatever it is now, a reset makes it new.
        driver.reset();
        assert_eq!(driver.status(), 0);
        driver.negotiate(0);
        driver.setup_queue(0, 16);
        driver.start();
        driver.add(0, &[Buffer::Writable(4)]);
        assert_eq!(device.serve().unwrap(), 1);
    }
}

#[test]
fn masked_interrupts_are_pending_in_the_bar() {
    let (driver, device) = up();
    driver.write(driver.table, 16 + 12, 4, 1);
    device.interrupt().used(0);
    assert_eq!(driver.interrupts(0), 0);
    let pending = crate::testing::Region {
        offset: PENDING_PAGE * PAGE,
        length: 8,
    };
    assert_eq!(driver.read(pending, 0, 8), 0b10);
    driver.write(driver.table, 16 + 12, 4, 0);
    assert_eq!((driver.interrupts(0), driver.read(pending, 0, 8)), (1, 0));
}

#[test]
fn a_transport_that_goes_away_resets_its_device() {
    let (driver, device) = up();
    drop(driver);
    assert_eq!(device.model().resets, 1);
}

#[test]
fn queues_that_no_transport_can_offer_are_refused() {
    struct Odd(Vec<u16>);
    impl VirtioDevice for Odd {
        fn device_type(&self) -> u16 {
            42
        }
        fn queue_sizes(&self) -> &[u16] {
            &self.0
        }
        fn features(&self) -> u64 {
            0
        }
        fn config(&self) -> Vec<u8> {
            Vec::new()
        }
        fn activate(&mut self, _: Activation) -> Result<(), DeviceError> {
            Ok(())
        }
        fn suspend(&mut self, _: &Arc<EventFd>) -> Result<Positions, Busy> {
            Ok(Positions::new())
        }
        fn reset(&mut self) -> Result<(), DeviceError> {
            Ok(())
        }
    }
    for sizes in [vec![0], vec![3], vec![0x8001], vec![4; 256]] {
        let made = VirtioPci::new(
            "odd",
            Box::new(Odd(sizes)),
            crate::testing::memory(&[(0, 0x1000)]),
            Arc::new(crate::testing::FakeRoutes::default()),
            BarAddress::InRegister(0xc000_0000),
        );
        assert!(matches!(made, Err(TransportError::Queues { device: 42 })));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_history_of_accesses_panics_or_breaks_the_alternation_of_activate_and_reset(
        accesses in proptest::collection::vec(
            (0u8..4, 0u64..0x40, 0usize..4, prop_oneof![0u64..0x20, any::<u64>()]), 0..300),
        refuse in any::<(bool, bool)>(),
    ) {
        // The model asserts that it is never activated twice without a reset.
        let (driver, device) = new();
        (device.model().refuse_activate, device.model().refuse_reset) = refuse;
        for (kind, offset, width, value) in accesses {
            let width = 1 << width;
            match kind {
                0 => driver.write(driver.common, offset, width, value),
                1 => driver.set_status([0, 1, 3, 0x0b, 0x0f][offset as usize % 5]),
                2 => driver.write_config((4 * offset) as u8, width.min(4), value),
                _ => driver.write(driver.table, offset, width, value),
            }
            driver.read(driver.common, offset, width);
        }
        let model = device.model();
        let state = driver.transport.transport_state().device;
        prop_assert!(!state.live() || refuse.0 || model.active.is_some() || state.status() & 0xc0 != 0);
        prop_assert!(model.activations <= model.resets + 1);
    }
}
