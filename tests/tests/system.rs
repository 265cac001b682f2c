//! The whole system, seen from outside: one binary, so that it can be carried to the host under test.
//!
//! Each test boots VMs of its own. Run them one at a time (`--test-threads=1`): the ledger counts the host.

#[path = "system/budget.rs"]
mod budget;
#[path = "system/cpus.rs"]
mod cpus;
#[path = "system/disks.rs"]
mod disks;
#[path = "system/exits.rs"]
mod exits;
#[path = "system/faults.rs"]
mod faults;
#[path = "system/hotplug.rs"]
mod hotplug;
#[path = "system/images.rs"]
mod images;
#[path = "system/leaks.rs"]
mod leaks;
#[path = "system/ledger.rs"]
mod ledger;
#[path = "system/memory.rs"]
mod memory;
#[path = "system/nics.rs"]
mod nics;
#[path = "system/pauses.rs"]
mod pauses;
#[path = "system/phases.rs"]
mod phases;
#[path = "system/refusals.rs"]
mod refusals;
#[path = "system/run.rs"]
mod run;
#[path = "system/share.rs"]
mod share;
#[path = "system/streams.rs"]
mod streams;
#[path = "system/tty.rs"]
mod tty;
#[path = "system/volumes.rs"]
mod volumes;
