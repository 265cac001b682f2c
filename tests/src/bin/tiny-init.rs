//! The tiny init of the boot benchmark: one byte to the serial port, then a reset.
//!
//! It writes the port itself, so that it needs no driver, no /dev and no console of the kernel, and every VMM
//! gets the same bytes from it. `reboot=k` or `reboot=t` on the command line decides how the reset is made.
#![allow(unsafe_code)] // ioperm(2) and `outb`: there is no other way to a port without a driver

use std::arch::asm;
use std::process::ExitCode;

/// Data register of the first serial port.
const COM1: u16 = 0x3f8;
/// What the parent waits for.
const MARK: u8 = b'i';

fn main() -> ExitCode {
    // SAFETY: ioperm changes only this process's port permissions.
    if unsafe { libc::ioperm(u64::from(COM1), 8, 1) } != 0 {
        eprintln!("tiny-init: ioperm: {}", std::io::Error::last_os_error());
        return ExitCode::FAILURE;
    }
    // SAFETY: the port was opened to this process just above; a write to it touches no memory.
    unsafe {
        asm!("out dx, al", in("dx") COM1, in("al") MARK, options(nomem, nostack, preserves_flags));
    }
    nix::unistd::sync();
    match nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_AUTOBOOT) {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("tiny-init: reboot: {error}");
            ExitCode::FAILURE
        }
    }
}
