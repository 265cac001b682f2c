//! The split queue: chains are taken, kept, given back later, together, in another order or unread, while the driver does
//! what it wants with its rings.

use crate::allocations::Bounds;
use crate::guest::{ACTS_MAX, Guest};
use crate::plain::{Core, Plain, Serve, lock};
use crate::program::{Act, Reader};
use capsid_devices::GuestMemory;
use capsid_devices::event::Poller;
use capsid_devices::virtio::chain::Buffers;
use capsid_devices::virtio::device::Interrupt;
use capsid_devices::virtio::queue::ActiveQueue;
use std::io::{Read, Write};
use std::sync::Arc;

pub(crate) const BOUNDS: Bounds = Bounds {
    growth: 2 << 20,
    largest: 1 << 20,
};
const QUEUE_SIZES: [u16; 2] = [64, 8];

/// A chain that was taken and not given back.
struct Kept {
    queue: u16,
    head: u16,
    room: u32,
}

/// A device that keeps what it takes if it is told so.
struct Hoard {
    /// 0: answers at once. Else so many chains of a kick are taken and kept.
    keeps: u8,
    kept: Vec<Kept>,
}

impl Serve for Hoard {
    fn kicked(
        &mut self,
        queue: &mut ActiveQueue,
        memory: &GuestMemory,
        interrupt: &dyn Interrupt,
    ) -> Option<()> {
        if self.keeps == 0 {
            return queue.serve(memory, interrupt, use_buffers).ok();
        }
        queue.disable_kicks(memory).ok()?;
        for _ in 0..self.keeps {
            let Some(chain) = queue.pop(memory).ok()? else {
                break;
            };
            let (index, head) = (queue.index, chain.head_index());
            // As every device that keeps chains has to.
            if self.kept.iter().any(|k| (k.queue, k.head) == (index, head)) {
                return None;
            }
            let room = use_buffers(queue.open(memory, &chain).ok()?);
            self.kept.push(Kept {
                queue: index,
                head,
                room,
            });
        }
        assert!(self.kept.len() <= QUEUE_SIZES.iter().map(|size| usize::from(*size)).sum());
        queue.enable_kicks(memory).ok()?;
        Some(())
    }

    fn is_busy(&self) -> bool {
        !self.kept.is_empty()
    }

    fn reset(&mut self) {
        self.kept.clear();
    }
}

/// Reads and fills all buffers of a chain, some by copies and some in place; how many bytes were filled.
fn use_buffers(mut buffers: Buffers<'_>) -> u32 {
    let (reads, writes) = (buffers.readable.remaining(), buffers.writable.remaining());
    assert!(u32::try_from(reads + writes).is_ok());
    let mut first = [0; 24];
    let read = buffers.readable.read(&mut first).expect("in memory");
    assert_eq!(read, reads.min(first.len()));
    let header = buffers.readable.read_struct::<u64>();
    assert_eq!(header.is_ok(), reads >= read + 8);
    let mut left = buffers.readable.remaining();
    while let Some(piece) = buffers.readable.next_piece(100) {
        assert!((1..=100).contains(&piece.len()));
        left -= piece.len();
    }
    assert_eq!(left, 0);
    let written = buffers.writable.write(&first).expect("in memory");
    assert_eq!(written, writes.min(first.len()));
    assert_eq!(buffers.writable.written() as usize, written);
    let value = buffers.writable.write_struct(&u32::MAX);
    assert_eq!(value.is_ok(), writes >= written + 4);
    while let Some(piece) = buffers.writable.next_piece(usize::MAX) {
        let filled = vec![0x5a; piece.len()];
        piece.copy_from(&filled);
    }
    assert_eq!(buffers.writable.written() as usize, writes);
    buffers.writable.written()
}

/// The target's own steps, by their kinds.
mod own {
    /// Keep so many chains of each kick.
    pub(super) const KEEP: u8 = 0;
    /// Give one back.
    pub(super) const ANSWER: u8 = 1;
    /// Give back so many of one queue together.
    pub(super) const ANSWER_TOGETHER: u8 = 2;
    /// Take one and give it back unread.
    pub(super) const UNDO: u8 = 3;
    pub(super) const KINDS: u8 = UNDO + 1;
}

pub(crate) fn run(input: &[u8]) {
    let poller = Arc::new(Poller::new().expect("a loop"));
    let core = Core::new(Hoard {
        keeps: 0,
        kept: Vec::new(),
    });
    let device = Plain::new(core.clone(), poller.clone(), &QUEUE_SIZES);
    let mut guest = Guest::new(Box::new(device), poller);
    let mut reader = Reader::new(input);
    for _ in 0..ACTS_MAX {
        let Some(act) = Act::read(&mut reader) else {
            break;
        };
        let Act::Own { kind, bytes } = &act else {
            guest.play(&act);
            continue;
        };
        let argument = bytes.first().copied().unwrap_or_default();
        guest.offer();
        let mut core = lock(&core);
        own_step(&mut core, kind % own::KINDS, argument);
        drop(core);
        guest.look();
    }
    guest.leave();
}

fn own_step(core: &mut Core<Hoard>, kind: u8, argument: u8) {
    let kept = &mut core.serve.kept;
    match kind {
        own::KEEP => core.serve.keeps = argument,
        own::ANSWER if !kept.is_empty() => {
            let answer = kept.swap_remove(usize::from(argument) % kept.len());
            core.with_queue(answer.queue.into(), |_, queue, memory, interrupt| {
                queue.push_used(memory, answer.head, answer.room).ok()?;
                tell(queue, memory, interrupt)
            });
        }
        own::ANSWER_TOGETHER => {
            let index = u16::from(argument & 1);
            let (mut now, later): (Vec<_>, Vec<_>) =
                kept.drain(..).partition(|kept| kept.queue == index);
            let rest = now.split_off(now.len().min(usize::from(argument >> 1)));
            kept.extend(later);
            kept.extend(rest);
            let chains: Vec<_> = now.iter().map(|kept| (kept.head, kept.room)).collect();
            core.with_queue(index.into(), |_, queue, memory, interrupt| {
                queue.push_used_together(memory, &chains).ok()?;
                tell(queue, memory, interrupt)
            });
        }
        own::UNDO => core.with_queue(usize::from(argument & 1), |_, queue, memory, _| {
            let before = queue.position();
            if queue.pop(memory).ok()?.is_some() {
                queue.undo_pop();
            }
            assert_eq!(queue.position(), before);
            Some(())
        }),
        _ => {}
    }
}

fn tell(queue: &mut ActiveQueue, memory: &GuestMemory, interrupt: &dyn Interrupt) -> Option<()> {
    if queue.needs_notification(memory).ok()? {
        interrupt.used(queue.index);
    }
    Some(())
}
