//! Fuzz targets: what a stranger writes, against the code that reads it. `cargo xtask test --suite fuzz` runs each for a while.
//!
//! The layout is cargo-fuzz's. A target is a function of this library, so that its seeds run as unit tests too, with no
//! compiler of C++; `fuzz_targets/` makes programs of them, with the feature `libfuzzer`. Trusts nothing and touches nothing of
//! the host: files are in memory. A target checks what has to hold afterwards, not only that nothing panics, and that no input
//! makes it allocate more than its bounds.
//!
//! | file | what |
//! |---|---|
//! | `config.rs`, `control.rs`, `kernel.rs`, `layer.rs` | targets that read bytes |
//! | `transport.rs`, `queue.rs`, `blk.rs`, `net.rs`, `vsock.rs`, `fs.rs` | targets that a hostile driver drives |
//! | `program.rs` | what such a driver does, as bytes |
//! | `guest.rs`, `ring.rs` | who does it, and what has to hold whatever it does |
//! | `plain.rs` | a device for what is none by itself |
//! | `cell.rs` | where files may be changed |
//! | `allocations.rs` | what is allocated |
//! | `seeds.rs` | how the seeds are made that honest drivers make |

mod allocations;
mod blk;
mod cell;
mod config;
mod control;
mod fs;
mod guest;
mod kernel;
mod layer;
mod net;
mod plain;
mod program;
mod queue;
mod ring;
#[cfg(test)]
mod seeds;
mod transport;
mod vsock;

use allocations::{Bounds, Watch};

/// A target: one input, which is the stranger's.
type Target = fn(&[u8]);

/// Each target by its name, which is that of its file in `fuzz_targets/` and of its directory in `seeds/`, with what one input
/// may make it allocate.
const TARGETS: [(&str, Target, Bounds); 10] = [
    ("blk", blk::run, blk::BOUNDS),
    ("config", config::run, config::BOUNDS),
    ("control", control::run, control::BOUNDS),
    ("fs", fs::run, fs::BOUNDS),
    ("kernel", kernel::run, kernel::BOUNDS),
    ("layer", layer::run, layer::BOUNDS),
    ("net", net::run, net::BOUNDS),
    ("queue", queue::run, queue::BOUNDS),
    ("transport", transport::run, transport::BOUNDS),
    ("vsock", vsock::run, vsock::BOUNDS),
];

/// Runs a target on one input.
///
/// # Panics
/// Something did not hold; or there is no such target.
pub fn run(target: &str, input: &[u8]) {
    let found = TARGETS.iter().find(|(name, ..)| *name == target);
    let (_, run, bounds) = found.expect("a target of this name");
    let watch = Watch::begin();
    run(input);
    watch.end(*bounds);
}
