//! The init of the benchmarks of devices: does what the kernel's command line names, with marks on the console, then resets.

use capsid_tests::bench::inside::{FAILED, run, say};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use std::fs::OpenOptions;
use std::io;

fn main() -> io::Result<()> {
    let none = None::<&str>;
    mount(none, "/dev", Some("devtmpfs"), MsFlags::empty(), none)?;
    let mut log = OpenOptions::new().write(true).open("/dev/kmsg")?;
    if let Err(error) = run(&mut log) {
        say(&mut log, &format!("{FAILED}{error}"))?;
    }
    match reboot(RebootMode::RB_AUTOBOOT)? {}
}
