//! A share of a hostile driver: its requests, its names and its session, on one thread. What lies beside the share is not its.

use crate::allocations::Bounds;
use crate::cell::{INSIDE, Lazy, Work};
use crate::guest::{ACTS_MAX, Guest};
use crate::plain::{Core, Plain, Serve, lock};
use crate::program::{Act, Reader};
use capsid_devices::GuestMemory;
use capsid_devices::event::Poller;
use capsid_devices::fs::BareShare;
use capsid_devices::virtio::device::Interrupt;
use capsid_devices::virtio::queue::ActiveQueue;
use rustix::fs::{CWD, Mode, OFlags, openat};
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;

pub(crate) const BOUNDS: Bounds = Bounds {
    growth: 8 << 20,
    largest: 2 << 20,
};
/// The priority queue and one of requests.
const QUEUE_SIZES: [u16; 2] = [64, 64];
/// Whom the thread becomes.
const ID: u32 = 65_534;
/// Most descriptors that are open in this process.
const DESCRIPTORS_MAX: usize = 600;

static CELL: Lazy = Lazy::new();

/// The share as a device.
struct Shared(BareShare);

impl Serve for Shared {
    fn kicked(
        &mut self,
        queue: &mut ActiveQueue,
        memory: &GuestMemory,
        interrupt: &dyn Interrupt,
    ) -> Option<()> {
        let served = queue.serve(memory, interrupt, |buffers| self.0.serve(buffers));
        served.ok()
    }

    fn reset(&mut self) {
        self.0.end_session();
    }
}

pub(crate) fn run(input: &[u8]) {
    CELL.run(input, prepare);
}

fn prepare(proc_fds: OwnedFd) -> Work {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = openat(CWD, INSIDE, flags, Mode::empty()).expect("the share's root");
    let count = proc_fds.try_clone().expect("a descriptor");
    let share = BareShare::new(root, proc_fds, ID).expect("a share");
    let core = Core::new(Shared(share));
    Box::new(move |input| {
        furnish().expect("the share's files");
        let before = descriptors(&count);
        let poller = Arc::new(Poller::new().expect("a loop"));
        let device = Plain::new(core.clone(), poller.clone(), &QUEUE_SIZES);
        let mut guest = Guest::new(Box::new(device), poller);
        let mut reader = Reader::new(input);
        for _ in 0..ACTS_MAX {
            let Some(act) = Act::read(&mut reader) else {
                break;
            };
            guest.play(&act);
        }
        assert!(descriptors(&count) <= DESCRIPTORS_MAX);
        guest.leave();
        drop(guest);
        // Also where the device was never activated.
        lock(&core).serve.reset();
        assert_eq!(descriptors(&count), before, "a reset closes what was open");
    })
}

/// A file, a directory with a file, and links that lead out.
fn furnish() -> std::io::Result<()> {
    let inside = Path::new(INSIDE);
    fs::write(inside.join("file"), b"a file of the share's")?;
    fs::create_dir(inside.join("directory"))?;
    fs::write(inside.join("directory/file"), [7; 5000])?;
    symlink("../outside/canary", inside.join("link"))?;
    symlink("/outside", inside.join("directory/link"))
}

/// How many descriptors this process has open.
fn descriptors(proc_fds: &OwnedFd) -> usize {
    let directory = rustix::fs::Dir::read_from(proc_fds).expect("the descriptors");
    directory.count()
}
