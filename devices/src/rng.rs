//! Entropy (virtio 1.2 section 5.4): the driver gives writable buffers, the device fills them with random
//! bytes of the host's getrandom(2), on the event loop.
//!
//! A guest may ask for 4 GiB with one descriptor, or for the same bytes a hundred times over. What is
//! made for one chain is capped by [`REQUEST_MAX_BYTES`] (Firecracker's limit after its own 4 GiB entropy
//! bug, FC 4392a8d19), which section 5.4.6 allows: a device fills "one or more" bytes. Readable buffers are
//! ignored.

use crate::GuestMemory;
use crate::counters::{Counters, counters};
use crate::event::{EventLoop, Interest, Readiness, Subscriber};
use crate::virtio::chain::Writable;
use crate::virtio::device::{Activation, Busy, DeviceError, Interrupt, VirtioDevice};
use crate::virtio::queue::{ActiveQueue, Positions, positions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use vmm_sys_util::eventfd::EventFd;

/// The most random bytes made for one chain. Linux asks for at most a page at a time.
pub const REQUEST_MAX_BYTES: usize = 64 * 1024;
/// The most chains of a kick, so that the loop's thread is never away for long: with the cap above 1 MiB of
/// random bytes, some 3 ms.
const QUEUE_SIZE: u16 = 16;
/// Device type (section 5.4.1).
const DEVICE_TYPE: u16 = 4;
/// Bytes made at once: getrandom(2) is not interrupted by signals up to 256.
const BLOCK_BYTES: usize = 256;

counters! {
    /// What the driver got.
    RngCounters {
        /// Random bytes.
        bytes,
    }
}

/// The device.
pub struct Rng {
    counters: Arc<RngCounters>,
    event_loop: Arc<dyn EventLoop>,
    /// What the loop calls between activation and reset, and for what.
    active: Option<(Arc<Mutex<Server>>, Arc<EventFd>)>,
}

struct Server {
    counters: Arc<RngCounters>,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    /// Gone after a reset and after the driver broke it.
    queue: Option<ActiveQueue>,
}

impl Rng {
    /// A device that will work on `event_loop`.
    pub fn new(event_loop: Arc<dyn EventLoop>) -> Rng {
        Rng {
            counters: Arc::default(),
            event_loop,
            active: None,
        }
    }
}

impl Rng {
    /// Takes its queue away.
    fn stop(&mut self) -> Option<ActiveQueue> {
        let (server, kick) = self.active.take()?;
        self.event_loop.forget(kick.as_raw_fd());
        // Waits for a kick that is being served; after it nothing touches guest memory.
        let mut server = server.lock().unwrap_or_else(PoisonError::into_inner);
        server.queue.take()
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn counters(&self) -> Arc<dyn Counters> {
        self.counters.clone()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let queue = activation.queues.into_iter().next().flatten();
        let queue = queue.ok_or(DeviceError::QueueMissing(0))?;
        let kick = Arc::clone(&queue.kick);
        let server = Arc::new(Mutex::new(Server {
            counters: self.counters.clone(),
            memory: activation.memory,
            interrupt: activation.interrupt,
            queue: Some(queue),
        }));
        self.event_loop
            .watch(kick.as_raw_fd(), Interest::KICK, 0, server.clone())
            .map_err(|cause| DeviceError::Io {
                what: "watch the kicks of the entropy queue",
                cause,
            })?;
        self.active = Some((server, kick));
        Ok(())
    }

    fn suspend(&mut self, _: &Arc<EventFd>) -> Result<Positions, Busy> {
        Ok(positions(&self.stop()))
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.stop();
        Ok(())
    }
}

impl Subscriber for Server {
    fn ready(&mut self, _token: u64, _readiness: Readiness) {
        let Some(queue) = &mut self.queue else {
            return;
        };
        let served = queue.serve(&self.memory, &*self.interrupt, |mut buffers| {
            fill(&mut buffers.writable);
            let written = buffers.writable.written();
            self.counters.bytes.add(u64::from(written));
            written
        });
        if served.is_err() {
            self.queue = None;
            self.interrupt.needs_reset();
        }
    }
}

fn fill(writable: &mut Writable<'_>) {
    let mut left = writable.remaining().min(REQUEST_MAX_BYTES);
    let mut block = [0; BLOCK_BYTES];
    while left > 0 {
        let want = left.min(BLOCK_BYTES);
        let Some(bytes) = block.get_mut(..want) else {
            return;
        };
        // Fails only before the host's pool is seeded at its boot; what is not there is not sent.
        if fill_block(bytes).is_err() || writable.write_all(bytes).is_err() {
            return;
        }
        left -= want;
    }
}

fn fill_block(bytes: &mut [u8]) -> rustix::io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        match rustix::rand::getrandom(&mut *rest, rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => rest = rest.get_mut(count..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::Poller;
    use crate::testing::{Buffer, Driver, RawDescriptor, written_down};
    use std::time::Duration;

    fn up() -> (Driver, Arc<Poller>) {
        let poller = Arc::new(Poller::new().unwrap());
        (Driver::up(Box::new(Rng::new(poller.clone())), 0), poller)
    }

    #[test]
    fn a_chain_comes_back_full_of_random_bytes() {
        let (mut driver, poller) = up();
        for add in [Driver::add, Driver::add_indirect] {
            let head = add(
                &mut driver,
                0,
                &[Buffer::Writable(100), Buffer::Writable(28)],
            );
            driver.kick(0);
            let used = driver.wait_used(0, Some(&poller));
            assert_eq!((used.head, used.len), (head, 128));
            assert!(used.data.iter().any(|byte| *byte != used.data[0]));
        }
        assert_eq!(driver.interrupts(0), 2);
        assert_eq!(driver.status(), 0x0f);
    }

    #[test]
    fn one_request_makes_at_most_64_kib() {
        // B2.6, V17.
        let (mut driver, poller) = up();
        driver.add(0, &[Buffer::Writable(4 << 20)]);
        driver.kick(0);
        assert_eq!(driver.wait_used(0, Some(&poller)).len, 64 * 1024);
    }

    #[test]
    fn a_chain_without_room_comes_back_empty() {
        let (mut driver, poller) = up();
        driver.add(0, &[Buffer::Readable(b"hello")]);
        driver.kick(0);
        assert_eq!(driver.wait_used(0, Some(&poller)).len, 0);
    }

    #[test]
    fn a_broken_chain_asks_for_a_reset_and_a_reset_mends_it() {
        let (mut driver, poller) = up();
        let outside = RawDescriptor {
            addr: 1 << 40,
            len: 16,
            flags: 2,
            next: 0,
        };
        driver.add_raw(0, 0, &[outside]);
        driver.kick(0);
        poller.turn(Some(Duration::ZERO)).unwrap();
        assert!(driver.needs_reset());
        assert_eq!(driver.config_interrupts(), 1);
        assert_eq!(driver.used_index(0), 0);
        // A kick of a broken queue is taken and not answered: the loop does not spin on it (B2.11).
        driver.kick(0);
        assert_eq!(poller.turn(Some(Duration::ZERO)).unwrap(), 1);
        assert_eq!(poller.turn(Some(Duration::ZERO)).unwrap(), 0);
        driver.reset();
        assert_eq!(driver.status(), 0);
        driver.negotiate(0);
        driver.setup_queue(0, 8);
        driver.start();
        driver.add(0, &[Buffer::Writable(8)]);
        driver.kick(0);
        assert_eq!(driver.wait_used(0, Some(&poller)).len, 8);
    }

    #[test]
    fn without_its_queue_it_asks_for_a_reset() {
        // B2.10.
        let poller = Arc::new(Poller::new().unwrap());
        let mut driver = Driver::new(Box::new(Rng::new(poller.clone())));
        driver.negotiate(0);
        driver.start();
        assert_eq!(driver.status(), 0x4f);
        assert!(driver.transport.take_failure().is_some());
        driver.reset();
        assert_eq!((driver.status(), poller.watched()), (0, 0));
    }

    #[test]
    fn a_suspended_device_answers_nobody_until_it_resumes_in_whatever_process() {
        let (mut driver, poller) = up();
        driver.add(0, &[Buffer::Writable(16)]);
        driver.kick(0);
        let state = written_down(&driver);
        assert_eq!(poller.watched(), 0);
        poller.turn(Some(Duration::ZERO)).unwrap();
        assert_eq!(driver.used_index(0), 0);
        driver.transport.resume();
        assert_eq!(driver.wait_used(0, Some(&poller)).len, 16);
        // Another process has not seen that and answers the same.
        driver.carry_over(Box::new(Rng::new(poller.clone())), &state);
        poller.turn(Some(Duration::ZERO)).unwrap();
        assert_eq!((driver.used_index(0), driver.status()), (1, 0x0f));
    }

    #[test]
    fn after_a_reset_nothing_is_watched_and_nothing_is_written() {
        let (mut driver, poller) = up();
        driver.add(0, &[Buffer::Writable(64)]);
        driver.kick(0);
        driver.set_status(0);
        assert_eq!(driver.status(), 0);
        assert_eq!(poller.watched(), 0);
        poller.turn(Some(Duration::ZERO)).unwrap();
        assert_eq!(driver.used_index(0), 0);
        assert_eq!(driver.interrupts(0), 0);
    }
}
