//! The chapters: what is the same for every virtio device (`registers`, `negotiation`, `settings`,
//! `rings`, `storms`, `interrupts`, `places`), and one file for what only one device has;
//! `machine` is about all that is no virtio device.

mod balloon;
mod blk;
mod fs;
mod interrupts;
mod machine;
mod mem;
mod negotiation;
mod net;
mod places;
mod registers;
mod rings;
mod rng;
mod serial;
mod settings;
mod storms;
mod vsock;

use crate::pci::Function;
use crate::report::{At, Outcome, Why, chapter, say};
use crate::ring::Ring;
use crate::virtio::Device;
use crate::{cpu, pci};
use core::ops::Range;

/// Entries of the queues that an honest driver makes: no queue is smaller.
const QUEUE_SIZE: u16 = 8;

/// A driver that means well: how a device is brought up and asked something, before and after it was abused.
pub(crate) trait Honest {
    /// Its device.
    fn device(&self) -> Device;

    /// Which of its features the driver uses, besides those of the transport.
    fn features(&self) -> u64 {
        0
    }

    /// The queues, which the device sees from [`Honest::up`] on.
    fn rings(&mut self) -> &mut [Ring];

    /// The queue whose chains the driver breaks: one that the device serves when it is notified.
    fn victim(&mut self) -> &mut Ring {
        &mut self.rings()[0]
    }

    /// Bytes of the configuration that are the driver's.
    fn writable_config(&self) -> Range<u64> {
        0..0
    }

    /// What makes the device look at its victim, if a notification alone does not.
    fn provoke(&mut self) -> Outcome {
        Ok(())
    }

    /// A request, and whether its answer is right. Anything that it needs in a queue, it puts there.
    fn ask(&mut self) -> Outcome;

    /// Resets the device and tells it of empty queues, up to the moment before it runs, with `features` of the transport.
    fn prepare(&mut self, features: u64) -> Outcome {
        let (device, features) = (self.device(), self.features() | features);
        device.negotiate(features)?;
        for ring in self.rings() {
            ring.renew();
            device.queue(ring);
        }
        Ok(())
    }

    /// The same, and then it runs.
    fn up(&mut self, features: u64) -> Outcome {
        self.prepare(features)?;
        self.device().go()
    }

    /// Whether it is as new.
    fn recovers(&mut self) -> Outcome {
        self.up(0)?;
        self.ask()
    }
}

/// Empty queues with these numbers.
fn queues<const N: usize>() -> [Ring; N] {
    core::array::from_fn(|number| Ring::new(number as u16, QUEUE_SIZE))
}

/// Something that a chapter does, by the chapter's name.
type Named<H> = (&'static str, fn(&mut H) -> Outcome);

/// Plays the chapters of one device, and then sleeps; the host measures the VMM at `ready` and from `idle` on.
pub(crate) fn play(name: &[u8]) {
    match name {
        b"balloon" => with(balloon::Balloon::new(), &balloon::CHAPTERS),
        b"blk" => with(blk::Blk::new(), &blk::CHAPTERS),
        b"blk-read-only" => with(blk::Blk::new(), &blk::READ_ONLY_CHAPTERS),
        b"fs" => with(fs::Fs::new(), &fs::CHAPTERS),
        b"machine" => with(rng::Rng::new(), &machine::CHAPTERS),
        b"mem" => with(mem::Mem::new(), &mem::CHAPTERS),
        b"net" => with(net::Net::new(), &net::CHAPTERS),
        b"rng" => with(rng::Rng::new(), &rng::CHAPTERS),
        b"serial" => with(rng::Rng::new(), &serial::CHAPTERS),
        b"storm" => {
            if let Err(why) = storms::for_ever() {
                chapter("a storm for ever", Err(why));
            }
        }
        b"vsock" => with(vsock::Vsock::new(), &vsock::CHAPTERS),
        _ => say(format_args!("there are no such chapters")),
    }
}

fn with<H: Honest>(subject: Outcome<H>, chapters: &[Named<H>]) {
    let mut subject = match subject {
        Ok(subject) => subject,
        Err(why) => return chapter("the device", Err(why)),
    };
    chapter("an honest request at first", subject.recovers());
    say(format_args!("ready"));
    for (name, play) in chapters {
        let outcome = play(&mut subject);
        let after = subject.recovers().at("an honest request after it", 0);
        chapter(name, outcome.and(after));
    }
    say(format_args!("idle"));
    cpu::halt()
}

/// Ends the machine.
pub(crate) fn power_off() -> ! {
    const SHUTDOWN: u8 = 4;
    if let Ok(pvpanic) = Function::find(0x1b36, 0x0011) {
        pvpanic.write(pci::COMMAND, pci::COMMAND_ON);
        cpu::store(pvpanic.bar(), SHUTDOWN);
    }
    cpu::halt()
}

/// How many chapters every virtio device has.
const COMMON_COUNT: usize = 10;

/// The chapters that every virtio device has, and then its own.
macro_rules! chapters_of {
    ($honest:ty, $own:expr) => {{
        use super::*;
        const OWN: &[Named<$honest>] = $own;
        const COMMON: [Named<$honest>; COMMON_COUNT] = [
            ("registers of any width and offset", registers::play),
            ("features and the status in any order", negotiation::play),
            ("settings that are no queue", settings::bad),
            ("settings after activation", settings::late),
            ("what is no chain", rings::direct),
            ("indirect tables that are none", rings::indirect),
            ("notifications without end", storms::play),
            ("messages of every kind", interrupts::msix),
            ("events that are none", interrupts::events),
            ("a device in another place", places::play),
        ];
        let mut all = [COMMON[0]; COMMON_COUNT + OWN.len()];
        let mut at = 0;
        while at < all.len() {
            all[at] = match at {
                0..COMMON_COUNT => COMMON[at],
                _ => OWN[at - COMMON_COUNT],
            };
            at += 1;
        }
        all
    }};
}
use chapters_of;

/// Nothing that the device says at all.
fn impossible<T>(what: &'static str) -> Outcome<T> {
    Err(Why::new(what))
}
