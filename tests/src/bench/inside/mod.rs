//! The guest's half of the benchmarks of devices: what `load-init` does, round after round, with a mark on the console before and
//! after each.
//!
//! A mark is a line in the kernel's log, which is on the console before `write` returns. A byte for the serial port's own driver waits
//! for an interrupt, and came at the end of all rounds.
//!
//! The kernel's command line says what: a word that the kernel does not know is its init's environment.

mod disk;
pub mod files;
pub mod link;

use super::load::{Load, Work};
use nix::mount::{MsFlags, mount};
use std::io::{self, Write};

/// The name of the load.
pub const LOAD: &str = "LOAD";
/// How many rounds.
pub const ROUNDS: &str = "ROUNDS";
/// A round begins.
pub const BEGIN: &str = "b";
/// A round is done.
pub const END: &str = "e";
/// What follows is why there is no round.
pub const FAILED: &str = "!";

/// A load with everything that its rounds need.
trait Task {
    /// What comes before a round and is no part of it.
    ///
    /// # Errors
    /// It cannot be done.
    fn prepare(&mut self) -> io::Result<()> {
        Ok(())
    }

    /// One round.
    ///
    /// # Errors
    /// It cannot be done.
    fn round(&mut self) -> io::Result<()>;
}

/// What the kernel is told besides, so that the console has the marks, all of them, and whatever it says when it panics.
pub const CMDLINE: &str = "console=ttyS0 loglevel=1 printk.time=0 printk.devkmsg=on";

/// Writes one line of the most urgent level, which no `loglevel` but 0 leaves out.
///
/// # Errors
/// The kernel has no log.
pub fn say(log: &mut impl Write, line: &str) -> io::Result<()> {
    // One call is one line.
    log.write_all(format!("<0>{line}\n").as_bytes())
}

/// Does what the environment says and marks it in `log`.
///
/// # Errors
/// The environment says nothing that can be done, or it cannot be done.
pub fn run(log: &mut impl Write) -> io::Result<()> {
    let none = None::<&str>;
    for (kind, place) in [("proc", "/proc"), ("sysfs", "/sys")] {
        mount(none, place, Some(kind), MsFlags::empty(), none)?;
    }
    let word = |name| std::env::var(name).map_err(io::Error::other);
    let load = Load::named(&word(LOAD)?).ok_or(io::ErrorKind::Unsupported)?;
    let rounds: usize = word(ROUNDS)?.parse().map_err(io::Error::other)?;
    let mut task = task(load.work)?;
    for _ in 0..rounds {
        task.prepare()?;
        say(log, BEGIN)?;
        task.round()?;
        say(log, END)?;
    }
    Ok(())
}

fn task(work: Work) -> io::Result<Box<dyn Task>> {
    Ok(match work {
        Work::Disk(accesses) => Box::new(disk::Disk::open(accesses)?),
        Work::File(accesses) => Box::new(files::StoredFile::open(accesses)?),
        Work::Exchange(exchange) => Box::new(link::Stream::connect(exchange)?),
        Work::Ping { count } => Box::new(link::Ping::open(count)?),
        Work::Untar => Box::new(files::Untar::open()?),
        Work::Find => Box::new(files::Find::open()?),
    })
}
