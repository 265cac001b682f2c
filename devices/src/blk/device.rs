//! The block device (virtio 1.2 section 5.2).

use super::backing::{Backing, BackingError};
use super::engine::{DISKS_MAX, DiskIo};
use super::request::{
    DISCARD_SECTORS_MAX, ID_BYTES, Limits, RANGES_MAX, SECTOR_BYTES, WRITE_ZEROES_SECTORS_MAX,
};
use super::server::{DiskCounters, Results, Server, Terms, lock, wait_until_idle};
use crate::counters::Counters;
use crate::event::{EventLoop, Interest};
use crate::virtio::device::{Activation, Busy, DeviceError, VirtioDevice};
use crate::virtio::queue::Positions;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use vmm_sys_util::eventfd::EventFd;

/// Device type 2: block device.
const DEVICE_TYPE: u16 = 2;
/// Most request queues.
pub const DISK_QUEUES_MAX: u8 = 16;
/// The largest size of each.
const QUEUE_SIZE: u16 = 256;
const QUEUE_SIZES: [u16; DISK_QUEUES_MAX as usize] = [QUEUE_SIZE; DISK_QUEUES_MAX as usize];
/// Buffers of one request: a chain is not longer than its queue, and two are the header and the status.
const SEGMENTS_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// How long a reset waits for what the host's disk holds up.
const RESET_TIMEOUT_MS: u64 = 2_000;

const fn feature(bit: u32) -> u64 {
    1 << bit
}

/// Everything that a disk is made of.
#[derive(Debug)]
pub struct DiskSetup {
    /// A regular file or a block device, open for reading, and for writing unless `read_only`. Whoever opened it sees to it
    /// that nobody else writes it.
    pub file: File,
    /// The guest may not change it.
    pub read_only: bool,
    /// Request queues, 1 to [`DISK_QUEUES_MAX`].
    pub queues: u8,
    /// What the guest knows it by (`/dev/disk/by-id`), at most 20 bytes of printable ASCII.
    pub id: String,
}

/// Why a disk cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Not a number of queues.
    #[error("a disk has 1 to {DISK_QUEUES_MAX} queues, not {0}")]
    Queues(u8),
    /// Not a name.
    #[error("disk id {0:?} is longer than {ID_BYTES} bytes or not printable ASCII")]
    Id(String),
    /// The file.
    #[error(transparent)]
    Backing(#[from] BackingError),
    /// The engine.
    #[error("cannot take the disk in; a VM has at most {DISKS_MAX}")]
    Attach(#[source] io::Error),
}

/// A block device.
pub struct Disk {
    backing: Backing,
    read_only: bool,
    queues: u8,
    id: [u8; ID_BYTES],
    io: Arc<DiskIo>,
    /// The disk's number in the engine.
    number: u8,
    event_loop: Arc<dyn EventLoop>,
    counters: Arc<DiskCounters>,
    active: Option<Active>,
}

/// A disk between activation and reset.
struct Active {
    server: Arc<Mutex<Server>>,
    number: u8,
    /// Those that are watched.
    kicks: Vec<Arc<EventFd>>,
    io: Arc<DiskIo>,
    event_loop: Arc<dyn EventLoop>,
}

impl Disk {
    /// A disk whose requests are taken on `event_loop` and done by `io`.
    ///
    /// # Errors
    /// See [`DiskError`].
    pub fn new(
        setup: DiskSetup,
        io: Arc<DiskIo>,
        event_loop: Arc<dyn EventLoop>,
    ) -> Result<Disk, DiskError> {
        if !(1..=DISK_QUEUES_MAX).contains(&setup.queues) {
            return Err(DiskError::Queues(setup.queues));
        }
        let mut id = [0; ID_BYTES];
        let printable = setup.id.bytes().all(|byte| (b' '..=b'~').contains(&byte));
        match id.get_mut(..setup.id.len()) {
            Some(place) if printable => place.copy_from_slice(setup.id.as_bytes()),
            _ => return Err(DiskError::Id(setup.id)),
        }
        let backing = Backing::new(&setup.file, setup.read_only)?;
        let number = io.attach(setup.file).map_err(DiskError::Attach)?;
        Ok(Disk {
            backing,
            read_only: setup.read_only,
            queues: setup.queues,
            id,
            io,
            number,
            event_loop,
            counters: Arc::default(),
            active: None,
        })
    }
}

impl VirtioDevice for Disk {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
            .get(..usize::from(self.queues))
            .unwrap_or(&QUEUE_SIZES)
    }

    fn features(&self) -> u64 {
        let always = feature(VIRTIO_BLK_F_SEG_MAX)
            | feature(VIRTIO_BLK_F_BLK_SIZE)
            | feature(VIRTIO_BLK_F_FLUSH)
            | feature(VIRTIO_BLK_F_TOPOLOGY)
            | feature(VIRTIO_BLK_F_MQ);
        let changes = feature(VIRTIO_BLK_F_DISCARD) | feature(VIRTIO_BLK_F_WRITE_ZEROES);
        match self.read_only {
            true => always | feature(VIRTIO_BLK_F_RO),
            false => always | changes,
        }
    }

    /// `struct virtio_blk_config` (section 5.2.4) up to `write_zeroes_may_unmap` and its padding.
    fn config(&self) -> Vec<u8> {
        let blocks = |bytes: u32| bytes / self.backing.block_bytes;
        let sectors = |bytes: u32| bytes / SECTOR_BYTES as u32;
        let physical = blocks(self.backing.physical_bytes);
        let alignment = sectors(self.backing.block_bytes);
        let mut config = Vec::with_capacity(60);
        config.extend_from_slice(&self.backing.sectors.to_le_bytes());
        config.extend_from_slice(&0u32.to_le_bytes()); // size_max: not offered
        config.extend_from_slice(&SEGMENTS_MAX.to_le_bytes());
        config.extend_from_slice(&[0; 4]); // geometry: not offered
        config.extend_from_slice(&self.backing.block_bytes.to_le_bytes());
        config.push(physical.ilog2() as u8); // physical_block_exp
        config.push(0); // alignment_offset
        config.extend_from_slice(&(physical as u16).to_le_bytes()); // min_io_size, at most 8
        config.extend_from_slice(&0u32.to_le_bytes()); // opt_io_size: none is better than another
        config.push(0); // writeback: not offered
        config.push(0);
        config.extend_from_slice(&u16::from(self.queues).to_le_bytes());
        config.extend_from_slice(&DISCARD_SECTORS_MAX.to_le_bytes());
        config.extend_from_slice(&(RANGES_MAX as u32).to_le_bytes());
        config.extend_from_slice(&alignment.to_le_bytes());
        config.extend_from_slice(&WRITE_ZEROES_SECTORS_MAX.to_le_bytes());
        config.extend_from_slice(&(RANGES_MAX as u32).to_le_bytes());
        config.extend_from_slice(&[1, 0, 0, 0]); // write_zeroes_may_unmap
        config
    }

    fn counters(&self) -> Arc<dyn Counters> {
        self.counters.clone()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let has = |bit| activation.features & feature(bit) != 0;
        let mq = has(VIRTIO_BLK_F_MQ);
        let limits = Limits {
            sectors: self.backing.sectors,
            read_only: self.read_only,
            discard: has(VIRTIO_BLK_F_DISCARD),
            write_zeroes: has(VIRTIO_BLK_F_WRITE_ZEROES),
        };
        let terms = Terms {
            limits,
            durable: !has(VIRTIO_BLK_F_FLUSH),
            id: self.id,
            counters: self.counters.clone(),
        };
        let mut queues = activation.queues;
        if !mq {
            // Section 5.2.5: then there is the first queue only.
            queues.truncate(1);
        }
        // A driver may leave queues out, as long as it has one.
        if queues.iter().all(Option::is_none) {
            return Err(DeviceError::QueueMissing(0));
        }
        let server = Arc::new(Mutex::new(Server::new(
            activation.memory,
            activation.interrupt,
            queues,
            terms,
            (self.io.clone(), self.number),
        )));
        let results = Arc::new(Results(server.clone()));
        self.io.serve(self.number, Some(results));
        let kicks = lock(&server).kicks();
        // From here on a reset has something to undo, also if this fails half-way.
        let active = self.active.insert(Active {
            server,
            number: self.number,
            kicks: Vec::with_capacity(kicks.len()),
            io: self.io.clone(),
            event_loop: self.event_loop.clone(),
        });
        for (index, kick) in kicks {
            self.event_loop
                .watch(
                    kick.as_raw_fd(),
                    Interest::KICK,
                    index,
                    active.server.clone(),
                )
                .map_err(|cause| DeviceError::Io {
                    what: "watch the kicks of a disk",
                    cause,
                })?;
            active.kicks.push(kick);
        }
        Ok(())
    }

    fn suspend(&mut self, idle: &Arc<EventFd>) -> Result<Positions, Busy> {
        let Some(active) = &self.active else {
            return Ok(Positions::new());
        };
        let positions = lock(&active.server).hold(idle)?;
        self.active = None;
        Ok(positions)
    }

    fn keep_on(&mut self) {
        if let Some(active) = &self.active {
            lock(&active.server).keep_on();
        }
    }

    /// Ends within [`RESET_TIMEOUT_MS`] whatever the host's disk does. If a request is under way even then, the device is of
    /// no more use: that request may still write the guest's memory.
    fn reset(&mut self) -> Result<(), DeviceError> {
        let Some(active) = &mut self.active else {
            return Ok(());
        };
        active.stop();
        #[cfg(any(test, feature = "testing"))]
        self.io.harvest_here();
        let patience = match self.io.is_left() {
            false => Duration::from_millis(RESET_TIMEOUT_MS),
            true => Duration::ZERO,
        };
        if !wait_until_idle(&active.server, patience) {
            return Err(DeviceError::Io {
                what: "stop a request that the host's disk holds up",
                cause: io::ErrorKind::TimedOut.into(),
            });
        }
        self.active = None;
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.active = None;
        self.io.detach(self.number);
    }
}

impl Active {
    fn stop(&mut self) {
        for kick in self.kicks.drain(..) {
            self.event_loop.forget(kick.as_raw_fd());
        }
        lock(&self.server).stop();
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.stop();
        // The engine keeps the buffers of what is still under way, and drops its results.
        self.io.serve(self.number, None);
    }
}
