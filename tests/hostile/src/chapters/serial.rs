//! The serial port (catalogue B2.12, V18). The entropy device is asked whether the machine still works.

use super::Named;
use super::rng::Rng;
use crate::cpu::{inp, out, out_many};
use crate::report::{At, Outcome, same};

pub(super) const CHAPTERS: [Named<Rng>; 2] = [
    ("registers of the serial port", registers),
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

/// 96 KiB of what moves a terminal's cursor, in lines of a page: more than the VMM keeps.
fn flood(_rng: &mut Rng) -> Outcome {
    const PAGES: usize = 24;
    let mut page = [0x1b; 4096];
    page[4095] = b'\n';
    out(PORT, b'\n');
    (0..PAGES).for_each(|_| out_many(PORT, &page));
    same("the line's status", inp::<u8>(LINE_STATUS), READY)
}
