//! A guest that means harm: no kernel, a few KiB on the bare machine, that abuses one device of the VMM after the other in
//! every way that its driver's side of the interface has, and then asks it an honest question.
//!
//! The word `hostile=NAME` of the kernel's command line says which chapters to play. The guest tells by the serial port how each
//! ended, a line each, and then sleeps for ever; after a defect of its own it powers the machine off. Its expectations are those of virtio 1.2: the device answers as its
//! section says, or it asks for a reset; after the reset it is as new.
//!
//! What the host's side of a test sees to: that the VMM lives, does not grow and does not spin
//! (`vmm/tests/program/hostile.rs`). What is covered and what is not: docs/hostile-guest.md.

#![no_std]

mod chapters;
mod cpu;
mod pci;
mod report;
mod ring;
mod virtio;

use report::say;

/// `paddr` of the command line in `struct hvm_start_info`.
const START_INFO_CMDLINE: u64 = 24;
const CMDLINE_MAX_BYTES: usize = 2048;
const WORD: &[u8] = b"hostile=";

/// Plays the chapters that the command line names.
pub fn run(start_info: u64) -> ! {
    let mut line = [0; CMDLINE_MAX_BYTES];
    let address = cpu::peek::<u64>(start_info + START_INFO_CMDLINE);
    for (at, byte) in (address..).zip(&mut line) {
        *byte = cpu::peek(at);
        if *byte == 0 {
            break;
        }
    }
    let words = line.split(|byte| matches!(byte, b' ' | 0));
    let name = words.filter_map(|word| word.strip_prefix(WORD)).next_back();
    match name {
        Some(name) => chapters::play(name),
        None => say(format_args!("the command line has no hostile=NAME")),
    }
    chapters::power_off()
}

/// A defect of the guest's own, or of the machine under it.
pub fn give_up(why: &core::panic::PanicInfo<'_>) -> ! {
    say(format_args!("{why}"));
    chapters::power_off()
}
