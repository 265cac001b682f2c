//! A device that is taken out while the guest runs.

use super::*;

#[test]
fn a_device_that_a_driver_works_with_cannot_be_taken_out() {
    let device = Device::default();
    let mut driver = Driver::up(Box::new(device.clone()), 0);
    assert!(driver.transport.in_use());
    assert_eq!(driver.transport.retire().err(), Some(InUse));
    driver.reset();
    assert!(!driver.transport.in_use());
    assert!(driver.transport.retire().is_ok());
    assert_eq!(device.model().resets, 1);
}

#[test]
fn a_driver_that_comes_too_late_finds_a_device_that_needs_a_reset() {
    let device = Device::default();
    let mut driver = Driver::new(Box::new(device.clone()));
    driver.negotiate(0);
    for queue in 0..driver.queue_count() {
        driver.setup_queue(queue, 16);
    }
    drop(driver.transport.retire());
    assert_eq!(
        Arc::strong_count(&device.0),
        1,
        "nobody has the device any more"
    );
    driver.start();
    assert!(driver.needs_reset() && driver.transport.broken());
    assert_eq!(device.model().activations, 0);
    driver.kick(0);
    driver.reset();
    assert_eq!(driver.status(), 0);
}
