//! A device that stands still, goes on, or is carried over into another process.

use super::*;
use crate::testing::written_down;
use std::sync::mpsc;

/// Activations and resets.
fn counts(device: &Device) -> (usize, usize) {
    let model = device.model();
    (model.activations, model.resets)
}

fn changed(
    state: &VirtioState,
    change: impl FnOnce(&mut serde_json::Value),
) -> Option<VirtioState> {
    let mut json = serde_json::to_value(state).unwrap();
    change(&mut json);
    serde_json::from_value(json).ok()
}

#[test]
fn a_suspended_device_has_let_go_of_its_queues_and_goes_on_where_it_stood() {
    let device = Device::default();
    let mut driver = Driver::up(Box::new(device.clone()), 0);
    driver.add(0, &[Buffer::Readable(b"one")]);
    assert_eq!(device.serve().unwrap(), 1);
    let head = driver.add(0, &[Buffer::Readable(b"two")]);
    driver.suspend().unwrap();
    driver.suspend().unwrap();
    assert!(driver.transport.is_suspended() && device.model().active.is_none());
    driver.transport.resume();
    driver.transport.resume();
    assert!(!driver.transport.is_suspended());
    assert_eq!(counts(&device), (2, 0));
    // Whatever it was told of before, it is kicked.
    let kick = driver.transport.notify_addresses().remove(0).kick;
    assert!(kick.read().is_ok());
    assert_eq!(device.serve().unwrap(), 1);
    driver.used(0).unwrap();
    assert_eq!(driver.used(0).unwrap().head, head);
    assert_eq!(driver.status(), 0x0f);
}

#[test]
fn interrupts_from_before_a_suspension_are_silent() {
    let device = Device::default();
    let driver = Driver::up(Box::new(device.clone()), 0);
    let old = device.interrupt();
    driver.suspend().unwrap();
    driver.transport.resume();
    old.used(0);
    old.needs_reset();
    assert_eq!((driver.interrupts(0), driver.status()), (0, 0x0f));
    device.interrupt().used(0);
    assert_eq!(driver.interrupts(0), 1);
}

#[test]
fn a_device_that_is_busy_works_on() {
    let device = Device::default();
    let driver = Driver::up(Box::new(device.clone()), 0);
    device.model().busy = true;
    assert!(matches!(driver.suspend(), Err(Busy)));
    assert!(!driver.transport.is_suspended() && driver.transport.state().is_none());
    assert!(device.model().active.is_some());
}

#[test]
fn a_device_that_no_driver_uses_has_nothing_to_let_go_of() {
    let device = Device::default();
    let driver = Driver::new(Box::new(device.clone()));
    let state = written_down(&driver);
    assert!(!driver.transport.is_suspended());
    driver.transport.resume();
    assert_eq!(device.model().activations, 0);
    let mut driver = driver;
    let next = Device::default();
    driver.carry_over(Box::new(next.clone()), &state);
    driver.negotiate(0);
    driver.start();
    assert_eq!((next.model().activations, driver.status()), (1, 0x0f));
}

#[test]
fn a_driver_goes_on_with_another_device_that_took_the_state() {
    let mut driver = Driver::up(Box::new(Device::default()), 1 << 3);
    driver.write(driver.table, 2 * 16 + 12, 4, 1);
    let head = driver.add(0, &[Buffer::Readable(b"one")]);
    let before = driver.transport.transport_state();
    let state = written_down(&driver);
    let next = Device::default();
    driver.carry_over(Box::new(next.clone()), &state);
    assert_eq!(driver.transport.transport_state(), before);
    assert_eq!(driver.read(driver.table, 2 * 16 + 12, 4), 1);
    assert_eq!(next.serve().unwrap(), 1);
    assert_eq!(driver.used(0).unwrap().head, head);
    assert_eq!(driver.interrupts(0), 1);
    driver.reset();
    assert_eq!((driver.status(), next.model().resets), (0, 1));
}

#[test]
fn what_was_pending_is_sent_where_the_state_is_taken_over() {
    let device = Device::default();
    let mut driver = Driver::up(Box::new(device.clone()), 0);
    let vector = driver.read(driver.common, 0x1a, 2);
    driver.write_config(driver.msix_capability() + 2, 2, 0xc000);
    for queue in 0..3 {
        device.interrupt().used(queue);
    }
    let state = written_down(&driver);
    driver.carry_over(Box::new(Device::default()), &state);
    assert_eq!(driver.routes.total(), 0, "all of the function is masked");
    driver.write_config(driver.msix_capability() + 2, 2, 0x8000);
    assert_eq!(driver.routes.total(), 3, "{vector}");
}

#[test]
fn a_configuration_that_changed_meanwhile_is_told() {
    let device = Device::default();
    let driver = Driver::up(Box::new(device.clone()), 0);
    driver.suspend().unwrap();
    driver.transport.resume();
    assert_eq!(driver.config_interrupts(), 0);
    driver.suspend().unwrap();
    device.model().config = Some(99);
    driver.transport.resume();
    assert_eq!(driver.config_interrupts(), 1);
    assert_eq!(driver.device_config()[0], 99);
}

#[test]
fn a_reset_ends_a_suspension() {
    let device = Device::default();
    let mut driver = Driver::up(Box::new(device.clone()), 0);
    driver.suspend().unwrap();
    driver.reset();
    driver.transport.resume();
    assert_eq!((driver.status(), device.model().activations), (0, 1));
}

#[test]
fn a_device_that_waits_for_its_reset_does_nothing_else_after_a_suspension() {
    let device = Device::default();
    let mut driver = Driver::up(Box::new(device.clone()), 0);
    device.interrupt().needs_reset();
    driver.suspend().unwrap();
    driver.transport.resume();
    assert_eq!((device.model().activations, driver.status()), (1, 0x4f));
    driver.reset();
    assert_eq!(driver.status(), 0);
}

#[test]
fn a_device_that_cannot_go_on_asks_for_a_reset() {
    let device = Device::default();
    let driver = Driver::up(Box::new(device.clone()), 0);
    driver.suspend().unwrap();
    device.model().refuse_activate = true;
    driver.transport.resume();
    assert!(driver.needs_reset() && driver.transport.take_failure().is_some());
}

#[test]
fn the_state_of_another_device_is_refused() {
    let driver = Driver::up(Box::new(Device::default()), 0);
    let state = written_down(&driver);
    type Change = fn(&mut serde_json::Value);
    let changes: [(&str, Change); 12] = [
        ("version", |state| state["version"] = 2.into()),
        ("device type", |state| state["device_type"] = 4.into()),
        ("a field too many", |state| state["more"] = 4.into()),
        ("data of another kind", |state| {
            state["data"] = serde_json::json!({"net": {"pairs": 1, "up": true}});
        }),
        ("read-only configuration space", |state| {
            state["transport"]["config"][0] = 0.into();
        }),
        ("device configuration", |state| {
            state["config"] = serde_json::json!([1]);
        }),
        ("features", |state| {
            state["transport"]["device"]["offered"] = 0.into();
        }),
        ("queues", |state| {
            state["transport"]["device"]["queues"][0]["max_size"] = 128.into();
        }),
        ("queue size", |state| {
            state["transport"]["device"]["queues"][0]["size"] = 3.into();
        }),
        ("vectors", |state| {
            state["transport"]["device"]["config_vector"] = 77.into();
        }),
        ("status", |state| {
            state["transport"]["device"]["status"] = 5.into();
        }),
        ("MSI-X", |state| {
            state["transport"]["msix"]["enabled"] = false.into();
        }),
    ];
    for (what, change) in changes {
        let taken = changed(&state, change).map(|state| {
            let other = Driver::new(Box::new(Device::default()));
            other.transport.restore(&state)
        });
        assert!(
            matches!(taken, None | Some(Err(RestoreError::Foreign(_)))),
            "{what}"
        );
    }
    let other = Driver::new(Box::new(Device::default()));
    other.transport.restore(&state).unwrap();
}

#[test]
fn rings_and_positions_that_cannot_be_are_found_where_they_are_used() {
    let driver = Driver::up(Box::new(Device::default()), 0);
    let state = written_down(&driver);
    let outside = |state: &mut serde_json::Value| {
        state["transport"]["device"]["queues"][0]["descriptors"] = (1u64 << 40).into();
    };
    let mut driver = Driver::new(Box::new(Device::default()));
    driver.carry_over(
        Box::new(Device::default()),
        &changed(&state, outside).unwrap(),
    );
    assert!(driver.needs_reset());
    let nowhere = QueuePosition {
        next_available: 0x8000,
        next_used: 7,
    };
    let nowhere = serde_json::to_value(nowhere).unwrap();
    let elsewhere = |state: &mut serde_json::Value| state["queues"]["0"] = nowhere;
    let device = Device::default();
    driver.carry_over(
        Box::new(device.clone()),
        &changed(&state, elsewhere).unwrap(),
    );
    assert!(device.serve().is_err());
}

proptest! {
    #[test]
    fn whatever_a_driver_did_its_state_is_carried_over(
        writes in proptest::collection::vec((0u64..0x40, prop_oneof![Just(1usize), Just(2), Just(4), Just(8)], any::<u64>()), 0..64),
        statuses in proptest::collection::vec(any::<u8>(), 0..8),
    ) {
        let mut driver = Driver::new(Box::new(Device::default()));
        driver.negotiate(0);
        for (at, width, value) in writes {
            driver.write(driver.common, at, width, value);
        }
        for status in statuses {
            driver.set_status(status);
        }
        let before = driver.transport.transport_state();
        let state = written_down(&driver);
        let other = Driver::new(Box::new(Device::default()));
        other.transport.restore(&state).unwrap();
        prop_assert_eq!(other.transport.transport_state(), before);
    }
}

/// A device whose reset waits for the test.
struct Slow {
    begun: mpsc::Sender<()>,
    go: mpsc::Receiver<()>,
}

impl VirtioDevice for Slow {
    fn device_type(&self) -> u16 {
        42
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16]
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
        self.begun.send(()).unwrap();
        // An end that is gone is a test that failed.
        let _ = self.go.recv();
        Ok(())
    }
}

#[test]
fn a_resumption_of_nothing_waits_for_nobody() {
    let (begun, has_begun) = mpsc::channel();
    let (go, told) = mpsc::channel();
    let mut driver = Driver::up(Box::new(Slow { begun, go: told }), 0);
    let transport = driver.transport.clone();
    let vcpu = std::thread::spawn(move || driver.reset());
    has_begun.recv().unwrap();
    // The vCPU that resets the device may wait for this very thread.
    transport.resume();
    go.send(()).unwrap();
    vcpu.join().unwrap();
}

#[test]
fn a_device_that_was_busy_and_is_asked_no_more_is_kicked() {
    let device = Device::default();
    let driver = Driver::up(Box::new(device.clone()), 0);
    device.model().busy = true;
    assert_eq!(driver.suspend(), Err(Busy));
    driver.transport.resume();
    let kick = driver.transport.notify_addresses().remove(0).kick;
    assert!(kick.read().is_ok());
    assert!(device.model().active.is_some());
}
