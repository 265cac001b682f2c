//! The serial port (catalogue B2.12, V18). The entropy device is asked whether the machine still works.

use super::Named;
use super::rng::Rng;
use crate::cpu::{inp, out, out_many};
use crate::report::{At, Outcome, same};

pub(super) const CHAPTERS: [Named<Rng>; 3] = [
    ("registers of the serial port", registers),
    ("the interrupt of the serial port", interrupts),
    ("a flood of the serial port", flood),
];

const PORT: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = PORT + 1;
const FIFO_CONTROL: u16 = PORT + 2;
const LINE_CONTROL: u16 = PORT + 3;
const MODEM_CONTROL: u16 = PORT + 4;
const LINE_STATUS: u16 = PORT + 5;
const SCRATCH: u16 = PORT + 7;
/// The latch of the divisor is where data was.
const LATCH: u8 = 0x80;
/// What is sent is received.
const LOOP: u8 = 0x10;
const READY: u8 = 0x60;

/// Every value in every register, in every width; nothing of it is sent.
fn registers(_rng: &mut Rng) -> Outcome {
    /// As the port was found.
    const FOUND: [(u16, u8); 4] = [
        (INTERRUPT_ENABLE, 0),
        (FIFO_CONTROL, 0),
        (LINE_CONTROL, 0),
        (MODEM_CONTROL, 0),
    ];
    for value in 0..=u8::MAX {
        for port in INTERRUPT_ENABLE..=SCRATCH {
            out(port, value);
            let _any: u8 = inp(port);
        }
        same("the scratch register", inp::<u8>(SCRATCH), value)?;
        out(LINE_CONTROL, LATCH);
        out(PORT, value);
        same("the latch", inp::<u8>(PORT), value)?;
        out(LINE_CONTROL, 0u8);
    }
    looped()?;
    FOUND.into_iter().for_each(|(port, value)| out(port, value));
    for port in PORT..=SCRATCH {
        out(port, u16::MAX);
        out(port, u32::MAX);
        same("nothing", inp::<u16>(port), u16::MAX).at("port", port.into())?;
        same("nothing", inp::<u32>(port), u32::MAX).at("port", port.into())?;
    }
    same("the line's status", inp::<u8>(LINE_STATUS), READY)
}

/// What goes round is kept up to the size of the FIFO.
fn looped() -> Outcome {
    const SENT: [u8; 100] = [0x55; 100];
    const FIFO_BYTES: usize = 16;
    out(MODEM_CONTROL, LOOP);
    out_many(PORT, &SENT);
    let came = SENT.iter().filter(|_| inp::<u8>(PORT) == 0x55).count();
    same("bytes that went round", came as u64, FIFO_BYTES as u64)
}

/// The first interrupt controller (8259A): it is asked for interrupts, the guest takes none.
const PIC: u16 = 0x20;
const PIC_DATA: u16 = PIC + 1;
/// Whether an interrupt waits, and which; that one is begun by the question.
const POLL: u8 = 0x0c;
const POLLED: u8 = 0x80;
const END: u8 = 0x20;
const LINE: u8 = 4;

/// It is there when the access is over, so that a guest which sends its last words and powers off has sent them.
fn interrupts(_rng: &mut Rng) -> Outcome {
    const ROUNDS: u64 = 1000;
    const EMPTY_ENABLED: u8 = 0x02;
    const OUT2: u8 = 0x08;
    const INTERRUPT_ID: u16 = FIFO_CONTROL;
    // Edges, a second controller at line 2, vectors from 0x20 on, no automatic end; and no line but that of the port.
    out(PIC, 0x11u8);
    [0x20, 0x04, 0x01, !(1 << LINE)]
        .into_iter()
        .for_each(|word: u8| out(PIC_DATA, word));
    out(MODEM_CONTROL, OUT2);
    let polled = || {
        out(PIC, POLL);
        inp::<u8>(PIC)
    };
    for round in 0..ROUNDS {
        out(INTERRUPT_ENABLE, EMPTY_ENABLED);
        same("an interrupt", polled(), POLLED | LINE).at("round", round)?;
        out(PIC, END);
        same("no other", polled() & POLLED, 0u8).at("round", round)?;
        same("empty", inp::<u8>(INTERRUPT_ID) & 0x0f, 2u8).at("round", round)?;
        out(INTERRUPT_ENABLE, 0u8);
    }
    out(MODEM_CONTROL, 0u8);
    out(PIC_DATA, u8::MAX);
    Ok(())
}

/// 96 KiB of what moves a terminal's cursor, in lines of a page: more than the VMM keeps.
fn flood(_rng: &mut Rng) -> Outcome {
    const PAGES: usize = 24;
    let mut page = [0x1b; 4096];
    page[4095] = b'\n';
    out(PORT, b'\n');
    (0..PAGES).for_each(|_| out_many(PORT, &page));
    same("the line's status", inp::<u8>(LINE_STATUS), READY)
}
