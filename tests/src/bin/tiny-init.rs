//! The tiny init of the boot benchmark: one byte to the serial port, then a reset.
//!
//! It goes through the kernel's own driver (`8250.nr_uarts=1`), because a kernel may have no other way to a port. The command
//! line says by what means (`reboot=`), one that the VMM understands.

use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use std::fs::OpenOptions;
use std::io::{self, Write};

/// What the parent waits for.
const MARK: &[u8] = b"i";

fn main() -> io::Result<()> {
    let none = None::<&str>;
    mount(none, "/dev", Some("devtmpfs"), MsFlags::empty(), none)?;
    let mut serial = OpenOptions::new().write(true).open("/dev/ttyS0")?;
    serial.write_all(MARK)?;
    drop(serial); // waits until the byte is out
    match reboot(RebootMode::RB_AUTOBOOT)? {}
}
