//! A device that interrupts while its transport is at work.

use super::*;

/// A device with a thread that interrupts without end, which its reset waits for.
#[derive(Default)]
struct Loud {
    stop: Arc<std::sync::atomic::AtomicBool>,
    worker: Option<std::thread::JoinHandle<()>>,
}

impl VirtioDevice for Loud {
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
        vec![1; 4]
    }
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        use std::sync::atomic::Ordering::SeqCst;
        self.stop.store(false, SeqCst);
        let stop = Arc::clone(&self.stop);
        self.worker = Some(std::thread::spawn(move || {
            while !stop.load(SeqCst) {
                activation.interrupt.used(0);
                activation.interrupt.config_changed();
            }
        }));
        Ok(())
    }
    fn suspend(&mut self, _: &Arc<EventFd>) -> Result<Positions, Busy> {
        Err(Busy)
    }
    fn reset(&mut self) -> Result<(), DeviceError> {
        self.stop.store(true, std::sync::atomic::Ordering::SeqCst);
        if let Some(worker) = self.worker.take() {
            worker.join().unwrap();
        }
        Ok(())
    }
}

#[test]
fn a_device_may_interrupt_while_the_driver_resets_masks_and_reads() {
    let mut driver = Driver::new(Box::<Loud>::default());
    for _ in 0..50 {
        driver.negotiate(0);
        driver.setup_queue(0, 16);
        driver.start();
        let seen = driver.routes.total();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        assert!(driver.routes.wait_beyond(seen, deadline).is_some());
        for masked in [1, 0, 1, 0] {
            driver.write(driver.table, 16 + 12, 4, masked);
            driver.read(driver.isr, 0, 1);
            driver.device_config();
        }
        driver.reset();
        let after = driver.routes.total();
        assert_eq!(driver.status(), 0);
        assert_eq!(driver.routes.total(), after);
    }
}
