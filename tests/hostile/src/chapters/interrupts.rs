//! MSI-X in every way, and EVENT_IDX (virtio 1.2 sections 4.1.4.5 and 2.7.7; PCI 3.0 section 6.8.2; catalogue B2.7, V9, V12).
//!
//! The guest takes no interrupts: a message that came shows in the local APIC's request register, for ever. So each
//! message that is looked for has a vector that none had before.

use super::Honest;
use crate::cpu::{Number, Patience, peek, poke, read_msr, write_msr};
use crate::report::{At, Outcome, Why, same};
use crate::ring::Ring;
use crate::virtio::{
    CONFIG_VECTOR, Device, F_EVENT_IDX, MSIX_PENDING, MSIX_TABLE, NUM_QUEUES, QUEUE_SELECT,
    QUEUE_VECTOR, RUNNING, leave,
};

const CAPABILITY: u8 = 0x11;
/// Message control, behind the capability's beginning.
const CONTROL: u8 = 2;
const ENABLED: u16 = 1 << 15;
const FUNCTION_MASKED: u16 = 1 << 14;
const NO_VECTOR: u16 = 0xffff;
/// Bytes of an entry of the table, and where in it its parts are.
const ENTRY: u64 = 16;
const DATA: u64 = 8;
const VECTOR_CONTROL: u64 = 12;
const MASKED: u32 = 1;
/// The only CPU's local APIC, by its registers in x2APIC mode.
const APIC: u64 = 0xfee0_0000;
const SPURIOUS: u32 = 0x80f;
const SPURIOUS_ON: u32 = 0x1ff;
const REQUESTS: u32 = 0x820;
/// Vectors for a chapter's own messages: the first of them, and one that nobody looks for.
const MSIX_FIRST: u8 = 0x30;
const EVENTS_FIRST: u8 = 0x80;
const ANY: u8 = 0x2f;
/// Looks until a message is there that has been sent.
const MESSAGE_LOOKS: u32 = 10_000;

/// Whether a message with this vector ever came.
fn came(vector: u8) -> bool {
    let word = read_msr(REQUESTS + u32::from(vector / 32));
    word & 1 << (vector % 32) != 0
}

/// Waits for a message.
fn comes(vector: u8) -> Outcome {
    let mut patience = Patience::looks(MESSAGE_LOOKS);
    while !came(vector) && patience.lasts() {
        leave();
    }
    same("a message", came(vector), true)
}

/// A device with its table, and vectors that were not used yet.
struct Messages {
    device: Device,
    control: u8,
    next: u8,
}

impl Messages {
    fn of(device: Device, first: u8) -> Outcome<Messages> {
        write_msr(SPURIOUS, SPURIOUS_ON);
        let control = device.function.capability(CAPABILITY)? + CONTROL;
        Ok(Messages {
            device,
            control,
            next: first,
        })
    }

    fn control(&self, value: u16) {
        self.device.function.write(self.control, value);
    }

    /// Writes an entry, unmasked.
    fn entry(&self, entry: u64, address: u64, data: u32) {
        let at = MSIX_TABLE + entry * ENTRY;
        self.device.set(at, address);
        self.device.set(at + DATA, data);
        self.device.set(at + VECTOR_CONTROL, 0u32);
    }

    /// Gives entry 0 a vector that none had.
    fn fresh(&mut self) -> u8 {
        let vector = self.next;
        self.next += 1;
        self.entry(0, APIC, vector.into());
        vector
    }

    /// Entry 0 masked or not.
    fn mask(&self, masked: bool) {
        self.device
            .set(MSIX_TABLE + VECTOR_CONTROL, u32::from(masked) * MASKED);
    }

    fn pending(&self) -> bool {
        self.device.get::<u8>(MSIX_PENDING) & 1 != 0
    }
}

/// Lets all queues and the configuration have this entry.
fn route<H: Honest>(honest: &mut H, entry: u16) {
    let device = honest.device();
    device.set(CONFIG_VECTOR, entry);
    for ring in honest.rings() {
        device.set(QUEUE_SELECT, ring.number);
        device.set(QUEUE_VECTOR, entry);
    }
}

/// MSI-X.
pub(super) fn msix<H: Honest>(honest: &mut H) -> Outcome {
    let mut messages = Messages::of(honest.device(), MSIX_FIRST)?;
    let outcome = table(honest, &mut messages)
        .and_then(|()| vectors(honest, &mut messages))
        .and_then(|()| masks(honest, &mut messages))
        .and_then(|()| nonsense(honest, &mut messages))
        .and_then(|()| controls(honest, &mut messages));
    messages.control(0);
    outcome
}

/// Whole aligned dwords and qwords are written; nothing else is, and nothing behind the last entry.
fn table<H: Honest>(honest: &mut H, messages: &mut Messages) -> Outcome {
    let device = honest.device();
    let entries = u64::from(device.get::<u16>(NUM_QUEUES)) + 1;
    honest.up(0)?;
    for at in (0..entries * ENTRY).step_by(4) {
        device.set(MSIX_TABLE + at, 0u32);
        for odd in 0..8 {
            partial::<u8>(device, at, odd)?;
            partial::<u16>(device, at, odd)?;
            partial::<u32>(device, at, odd)?;
            partial::<u64>(device, at, odd)?;
        }
    }
    for at in [entries * ENTRY, 0x800, 0xff8] {
        device.set(MSIX_TABLE + at, u64::MAX);
        same("nothing", device.get::<u64>(MSIX_TABLE + at), 0u64).at("behind the table", at)?;
    }
    for at in [0, 8, 0xff8] {
        device.set(MSIX_PENDING + at, u64::MAX);
        same("nothing", device.get::<u64>(MSIX_PENDING + at), 0u64).at("pending bits", at)?;
    }
    for entry in 0..entries {
        messages.entry(entry, APIC, ANY.into());
    }
    Ok(())
}

/// A write around a dword of the table that must not change it.
fn partial<T: Number>(device: Device, dword: u64, odd: u64) -> Outcome {
    let width = size_of::<T>() as u64;
    let at = MSIX_TABLE + dword + odd;
    if width >= 4 && at % width == 0 {
        return Ok(());
    }
    device.set(at, T::narrow(u64::MAX));
    let _any: T = device.get(at);
    same("a dword", device.get::<u32>(MSIX_TABLE + dword), 0u32).at("a partial write", at)
}

/// Entries that are not there are none; one that is there serves all queues.
fn vectors<H: Honest>(honest: &mut H, messages: &mut Messages) -> Outcome {
    let device = honest.device();
    let entries = device.get::<u16>(NUM_QUEUES) + 1;
    messages.control(ENABLED);
    let vector = messages.fresh();
    for entry in [entries, entries + 1, 0x100, 0x7fff, 0xfffe, NO_VECTOR] {
        route(honest, entry);
        for ring in honest.rings() {
            device.set(QUEUE_SELECT, ring.number);
            same("the vector", device.get::<u16>(QUEUE_VECTOR), NO_VECTOR)
                .at("no entry", entry.into())?;
        }
        honest.ask().at("no entry", entry.into())?;
    }
    same("a message", came(vector), false).at("no entry", 0)?;
    route(honest, 0);
    honest.ask()?;
    comes(vector).at("the same entry for all queues", 0)
}

/// What comes while it is masked comes behind it, however often that changes.
fn masks<H: Honest>(honest: &mut H, messages: &mut Messages) -> Outcome {
    const STORM: u32 = 250;
    let vector = messages.fresh();
    messages.mask(true);
    honest.ask()?;
    waits_for_pending(messages)?;
    same("a message", came(vector), false).at("masked", 0)?;
    messages.mask(false);
    comes(vector).at("unmasked", 0)?;
    same("pending", messages.pending(), false).at("unmasked", 0)?;
    let vector = messages.fresh();
    messages.control(ENABLED | FUNCTION_MASKED);
    honest.ask()?;
    waits_for_pending(messages)?;
    same("a message", came(vector), false).at("all masked", 0)?;
    messages.control(ENABLED);
    comes(vector).at("none masked", 0)?;
    for round in 0..4 {
        for time in 0..STORM {
            messages.mask(time % 2 == 0);
        }
        honest.ask().at("masked and unmasked", round)?;
    }
    let vector = messages.fresh();
    honest.ask()?;
    comes(vector).at("behind the storm", 0)
}

fn waits_for_pending(messages: &Messages) -> Outcome {
    let mut patience = Patience::looks(MESSAGE_LOOKS);
    while !messages.pending() && patience.lasts() {}
    same("pending", messages.pending(), true)
}

/// Messages to what is no local APIC, and such as no CPU knows. None may be one that this CPU obeys.
fn nonsense<H: Honest>(honest: &mut H, messages: &mut Messages) -> Outcome {
    const NOBODY: u64 = APIC | 0xab << 12;
    const CASES: [(u64, u32); 12] = [
        (0, 0),
        (0x20_0000, ANY as u32),
        (0xc000_0000, ANY as u32),
        (1 << 32 | APIC, ANY as u32),
        (0xffff_ff00_fee0_0000, ANY as u32),
        (u64::MAX, ANY as u32),
        // Illegal vectors, and lines that were never raised.
        (APIC, 0),
        (APIC, 0x0f),
        (APIC, 0x8000 | ANY as u32),
        // SMI, NMI, INIT and start-up to a CPU that is not there.
        (NOBODY, 0x200),
        (NOBODY, 0x400),
        (NOBODY, 0xffff_fd00),
    ];
    for (number, (address, data)) in (0..).zip(CASES) {
        messages.entry(0, address, data);
        honest.ask().at("a message of no sense", number)?;
    }
    let vector = messages.fresh();
    honest.ask()?;
    comes(vector).at("behind messages of no sense", 0)
}

/// Switched off, on and masked over and over; what is off says nothing.
fn controls<H: Honest>(honest: &mut H, messages: &mut Messages) -> Outcome {
    const STORM: u32 = 100;
    let vector = messages.fresh();
    messages.control(0);
    honest.ask()?;
    same("a message", came(vector), false).at("switched off", 0)?;
    for time in 0..STORM {
        messages.control([ENABLED, 0, ENABLED | FUNCTION_MASKED, u16::MAX][time as usize % 4]);
        if time % 25 == 0 {
            honest.ask().at("switched off and on", time.into())?;
        }
    }
    messages.control(ENABLED);
    honest.ask()?;
    comes(vector).at("behind the storm", 0)
}

/// VIRTIO_F_EVENT_IDX with events that are none: whoever asks at the wrong place waits for no interrupt, and is served all the same.
pub(super) fn events<H: Honest>(honest: &mut H) -> Outcome {
    let mut messages = Messages::of(honest.device(), EVENTS_FIRST)?;
    let outcome = with_events(honest, &mut messages);
    messages.control(0);
    outcome
}

fn with_events<H: Honest>(honest: &mut H, messages: &mut Messages) -> Outcome {
    honest.up(F_EVENT_IDX)?;
    messages.control(ENABLED);
    route(honest, 0);
    let quiet = messages.fresh();
    // At an index that is half a round away, in whatever direction.
    for jump in [0x7000u16, 0x8000, 0x9000] {
        for ring in honest.rings() {
            poke(ring.used_event(), ring.used_index().wrapping_add(jump));
        }
        honest.ask().at("an event far away", jump.into())?;
    }
    same("a message", came(quiet), false).at("an event far away", 0)?;
    for value in [0u16, 1, 0x7fff, 0x8000, 0xfffe, u16::MAX] {
        for ring in honest.rings() {
            poke(ring.used_event(), value);
            // The device's own.
            poke(ring.avail_event(), !value);
        }
        honest.ask().at("events of no sense", value.into())?;
    }
    for ring in honest.rings() {
        poke(ring.used_event(), ring.used_index());
    }
    let vector = messages.fresh();
    honest.ask()?;
    comes(vector).at("the event that comes next", 0)?;
    wants_the_next(honest.victim())?;
    same("the status", honest.device().status(), RUNNING)
}

/// A device that has nothing to do says that it wants to be notified of the next chain.
fn wants_the_next(ring: &Ring) -> Outcome {
    let mut patience = Patience::looks(MESSAGE_LOOKS);
    while peek::<u16>(ring.avail_event()) != ring.offered {
        if !patience.lasts() {
            return Err(Why::new("the event that the device wants"));
        }
        leave();
    }
    Ok(())
}
