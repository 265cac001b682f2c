//! Devices that do what no device may, each of which the guest has to find out.

use super::*;
use crate::plain::{Core, Plain, Serve};
use capsid_devices::virtio::device::Interrupt;
use capsid_devices::virtio::queue::ActiveQueue;

/// What a bad device does with a queue that was kicked.
type Crime = fn(&mut ActiveQueue, &GuestMemory) -> Option<()>;

struct Bad(Crime);

impl Serve for Bad {
    fn kicked(
        &mut self,
        queue: &mut ActiveQueue,
        memory: &GuestMemory,
        _interrupt: &dyn Interrupt,
    ) -> Option<()> {
        (self.0)(queue, memory)
    }

    fn reset(&mut self) {}
}

/// A guest that has lent a buffer of 16 bytes to such a device.
fn guest(crime: Crime) -> Guest {
    let poller = Arc::new(Poller::new().expect("a loop"));
    let core = Core::new(Bad(crime));
    let device = Plain::new(core, poller.clone(), &[8]);
    let mut guest = Guest::new(Box::new(device), poller);
    guest.play(&Act::Up {
        features: u64::MAX,
        queues: 1,
        size_log: 3,
    });
    guest.play(&lend());
    guest
}

fn lend() -> Act {
    Act::Chain {
        queue: 0,
        shape: shape::KICK,
        readable: vec![1; 20],
        writable: vec![16],
    }
}

fn head(queue: &mut ActiveQueue, memory: &GuestMemory) -> Option<u16> {
    Some(queue.pop(memory).ok()??.head_index())
}

#[test]
fn a_device_that_does_as_it_should_is_left_alone() {
    let mut guest = guest(|queue, memory| {
        let chain = queue.pop(memory).ok()??;
        let mut buffers = queue.open(memory, &chain).ok()?;
        buffers.writable.write_struct(&[7u8; 16]).ok()?;
        queue.push_used(memory, chain.head_index(), 16).ok()
    });
    guest.settle();
    assert_eq!(guest.rings[0].used_ring().0, RINGS_START + USED);
    guest.play(&lend());
    guest.leave();
}

#[test]
#[should_panic(expected = "which it was not lent")]
fn a_byte_in_front_of_what_was_lent_is_found() {
    guest(|_, memory| {
        let at = ARENA.start + 32 - 1;
        write(memory, at, &[0xff]).ok()
    })
    .settle();
}

#[test]
#[should_panic(expected = "which it was not lent")]
fn a_write_after_the_reset_is_found() {
    let mut guest = guest(|_, _| Some(()));
    guest.settle();
    guest.play(&Act::Reset);
    write(&guest.memory, ARENA.start + 32, &[0xff]).expect("memory");
    guest.look();
}

#[test]
#[should_panic(expected = "ahead of what is available")]
fn an_answer_to_nothing_is_found() {
    guest(|queue, memory| {
        let head = head(queue, memory)?;
        queue.push_used(memory, head, 0).ok()?;
        queue.push_used(memory, head, 0).ok()
    })
    .settle();
}

#[test]
#[should_panic(expected = "came back twice")]
fn a_head_that_comes_back_twice_is_found() {
    let mut guest = guest(|queue, memory| {
        let first = head(queue, memory)?;
        head(queue, memory)?;
        queue.push_used(memory, first, 0).ok()?;
        queue.push_used(memory, first, 0).ok()
    });
    guest.play(&lend());
    guest.settle();
}

#[test]
#[should_panic(expected = "which was never lent")]
fn a_head_that_was_never_lent_is_found() {
    guest(|queue, memory| {
        head(queue, memory)?;
        queue.push_used(memory, 5, 0).ok()
    })
    .settle();
}

#[test]
#[should_panic(expected = "17 bytes in room for 16")]
fn more_bytes_than_there_is_room_for_are_found() {
    guest(|queue, memory| {
        let head = head(queue, memory)?;
        queue.push_used(memory, head, 17).ok()
    })
    .settle();
}

#[test]
#[should_panic(expected = "the loop spins")]
fn a_device_that_is_never_done_is_found() {
    guest(|queue, _| queue.kick.write(1).ok()).settle();
}
