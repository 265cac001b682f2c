//! The driver itself: finds the device on the bus, negotiates, sets up queues, kicks and waits.

use super::queue::{Allocator, Buffer, DriverQueue, RawDescriptor, Used, write_table};
use super::{FakeRoutes, memory};
use crate::GuestMemory;
use crate::bus::{Bus, BusDevice};
use crate::event::Poller;
use crate::pci::{CONFIG_PORT, CONFIG_PORT_BYTES, PciRoot, Place};
use crate::virtio::device::{Busy, VirtioDevice};
use crate::virtio::pci::{BAR_BYTES, BarAddress, TRANSPORT_FEATURES, VirtioPci, VirtioState};
use crate::virtio::state::status;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// The longest wait for a device in a test, in ms.
pub const WAIT_MS: u64 = 10_000;

const BAR_ADDRESS: u64 = 0xc000_0000;
/// The driver's own memory inside the first region: rings and buffers. The first page stays free, so that
/// address 0 is never a buffer.
const HEAP_START: u64 = 0x1000;
const SLOT: u8 = 3;

/// A structure of the transport inside the BAR, as its capability says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Region {
    /// Offset in the BAR.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// A driver of one device.
pub struct Driver {
    /// The transport under test.
    pub transport: Arc<VirtioPci>,
    /// Where its interrupts go.
    pub routes: Arc<FakeRoutes>,
    /// The common configuration.
    pub common: Region,
    /// The notification structure.
    pub notify: Region,
    /// The ISR status.
    pub isr: Region,
    /// The device's configuration; empty if it has none.
    pub config: Region,
    /// The MSI-X table.
    pub table: Region,
    ports: Bus,
    mmio: Bus,
    memory: GuestMemory,
    allocator: Allocator,
    queues: Vec<Option<DriverQueue>>,
    notify_multiplier: u64,
    msix_capability: u8,
    window: u8,
    features: u64,
    idle: Arc<EventFd>,
}

/// A device on a machine of its own: its transport, where its interrupts go, and the two buses.
fn machine(
    device: Box<dyn VirtioDevice>,
    memory: &GuestMemory,
) -> (Arc<VirtioPci>, Arc<FakeRoutes>, Bus, Bus) {
    let routes = Arc::new(FakeRoutes::default());
    let bar = BarAddress::InRegister(BAR_ADDRESS);
    let transport = VirtioPci::new("virtio-test", device, memory.clone(), routes.clone(), bar);
    let transport = Arc::new(transport.expect("a transport"));
    let root = PciRoot::new();
    let place = Place {
        slot: SLOT,
        function: 0,
    };
    root.insert(place, transport.clone()).unwrap();
    let mut ports = Bus::new();
    ports
        .insert(CONFIG_PORT, CONFIG_PORT_BYTES, Arc::new(root))
        .unwrap();
    let mut mmio = Bus::new();
    mmio.insert(BAR_ADDRESS, u64::from(BAR_BYTES), transport.clone())
        .unwrap();
    (transport, routes, ports, mmio)
}

impl Driver {
    /// A driver with 16 MiB of memory, which has found the device and done nothing more.
    pub fn new(device: Box<dyn VirtioDevice>) -> Driver {
        Driver::with_memory(device, memory(&[(0, 16 << 20)]))
    }

    /// The same with memory of your own; the driver takes rings and buffers from the region at 0.
    pub fn with_memory(device: Box<dyn VirtioDevice>, memory: GuestMemory) -> Driver {
        use vm_memory::{GuestMemory as _, GuestMemoryRegion};
        let (transport, routes, ports, mmio) = machine(device, &memory);
        let end = memory.iter().next().expect("a region of memory").len();
        let mut driver = Driver {
            transport,
            routes,
            common: Region::default(),
            notify: Region::default(),
            isr: Region::default(),
            config: Region::default(),
            table: Region::default(),
            ports,
            mmio,
            memory,
            allocator: Allocator::new(HEAP_START, end),
            queues: Vec::new(),
            notify_multiplier: 0,
            msix_capability: 0,
            window: 0,
            features: 0,
            idle: Arc::new(EventFd::new(EFD_NONBLOCK).expect("an eventfd")),
        };
        driver.find_capabilities();
        driver.decode();
        driver.enable_msix();
        driver
    }

    /// A device that is wholly up: the wanted device features, every queue at its largest size up to 256,
    /// a vector for each, DRIVER_OK.
    pub fn up(device: Box<dyn VirtioDevice>, features: u64) -> Driver {
        let mut driver = Driver::new(device);
        driver.negotiate(features);
        for queue in 0..driver.queue_count() {
            let max = driver.queue_max(queue);
            driver.setup_queue(queue, max.min(256));
        }
        driver.start();
        driver
    }

    /// Asks the device to stand still.
    ///
    /// # Errors
    /// It does not yet.
    pub fn suspend(&self) -> Result<(), Busy> {
        self.transport.suspend(&self.idle)
    }

    /// Has the device stand still, which a device with threads of its own does soon.
    pub fn stand_still(&self) {
        let waiter = Epoll::new().expect("an epoll");
        let event = EpollEvent::new(EventSet::IN, 0);
        let watched = waiter.ctl(ControlOperation::Add, self.idle.as_raw_fd(), event);
        watched.expect("watched");
        while self.suspend().is_err() {
            let mut events = [EpollEvent::default()];
            let ready = waiter.wait(WAIT_MS as i32, &mut events);
            assert_eq!(ready.expect("a wait"), 1, "it does not");
            self.idle.read().expect("it is readable");
        }
    }

    /// Whether a device that was busy has said since that it is worth asking again.
    pub fn was_told_idle(&self) -> bool {
        self.idle.read().is_ok()
    }

    /// The driver goes on, on another machine with the same memory, on which `device` takes the state of the one that it has had
    /// so far, which is dropped. That one must be suspended. Interrupts are counted anew.
    pub fn carry_over(&mut self, device: Box<dyn VirtioDevice>, state: &VirtioState) {
        let (transport, routes, ports, mmio) = machine(device, &self.memory);
        transport.restore(state).expect("a device made alike");
        transport.resume();
        (self.transport, self.routes, self.ports, self.mmio) = (transport, routes, ports, mmio);
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    fn find_capabilities(&mut self) {
        assert_eq!(self.read_config(0, 2), 0x1af4);
        let mut at = self.read_config(0x34, 1) as u8;
        while at != 0 {
            let id = self.read_config(at, 1);
            if id == 0x11 {
                self.msix_capability = at;
                self.table = Region {
                    offset: self.read_config(at + 4, 4) & !7,
                    length: 16 * ((self.read_config(at + 2, 2) & 0x7ff) + 1),
                };
            } else if id == 0x09 {
                let region = Region {
                    offset: self.read_config(at + 8, 4),
                    length: self.read_config(at + 12, 4),
                };
                match self.read_config(at + 3, 1) {
                    1 => self.common = region,
                    2 => {
                        self.notify = region;
                        self.notify_multiplier = self.read_config(at + 16, 4);
                    }
                    3 => self.isr = region,
                    4 => self.config = region,
                    5 => self.window = at,
                    other => panic!("capability of type {other}"),
                }
            }
            at = self.read_config(at + 1, 1) as u8;
        }
    }

    /// Enables MSI-X with each vector unmasked; its message's data is its number.
    fn enable_msix(&mut self) {
        for vector in 0..self.table.length / 16 {
            let entry = Region {
                offset: self.table.offset + 16 * vector,
                length: 16,
            };
            self.write(entry, 0, 4, 0xfee0_0000);
            self.write(entry, 4, 4, 0);
            self.write(entry, 8, 4, vector);
            self.write(entry, 12, 4, 0);
        }
        self.write_config(self.msix_capability + 2, 2, 0x8000);
    }

    /// Puts the BAR back to where it was and makes the device decode it, whatever was written to configuration space.
    pub fn decode(&self) {
        self.write_config(4, 2, 0x0406); // memory, bus master, no INTx
        self.write_config(0x10, 4, BAR_ADDRESS);
    }

    /// Reads configuration space by the ports: 1, 2 or 4 bytes.
    pub fn read_config(&self, offset: u8, width: usize) -> u64 {
        self.select(offset);
        let mut data = [0; 8];
        let port = CONFIG_PORT + 4 + u64::from(offset & 3);
        self.ports.read(port, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    /// Writes configuration space by the ports: 1, 2 or 4 bytes.
    pub fn write_config(&self, offset: u8, width: usize, value: u64) {
        self.select(offset);
        let port = CONFIG_PORT + 4 + u64::from(offset & 3);
        self.ports.write(port, &value.to_le_bytes()[..width]);
    }

    fn select(&self, offset: u8) {
        let address = 1 << 31 | u32::from(SLOT) << 11 | u32::from(offset & !3);
        self.ports.write(CONFIG_PORT, &address.to_le_bytes());
    }

    /// Offset of the PCI configuration access capability (section 4.1.4.9).
    pub fn window(&self) -> u8 {
        self.window
    }

    /// Offset of the MSI-X capability.
    pub fn msix_capability(&self) -> u8 {
        self.msix_capability
    }

    /// Reads `width` bytes (1, 2, 4 or 8) of the BAR.
    pub fn read(&self, region: Region, offset: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        let address = BAR_ADDRESS + region.offset + offset;
        self.mmio.read(address, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    /// Writes `width` bytes (1, 2, 4 or 8) of the BAR.
    pub fn write(&self, region: Region, offset: u64, width: usize, value: u64) {
        let address = BAR_ADDRESS + region.offset + offset;
        self.mmio.write(address, &value.to_le_bytes()[..width]);
    }

    /// The device's configuration space, as long as its capability says.
    pub fn device_config(&self) -> Vec<u8> {
        (0..self.config.length)
            .map(|at| self.read(self.config, at, 1) as u8)
            .collect()
    }

    /// The status register.
    pub fn status(&self) -> u8 {
        self.read(self.common, 0x14, 1) as u8
    }

    /// Writes the status register.
    pub fn set_status(&self, value: u8) {
        self.write(self.common, 0x14, 1, u64::from(value));
    }

    /// Whether the device set DEVICE_NEEDS_RESET.
    pub fn needs_reset(&self) -> bool {
        self.status() & status::NEEDS_RESET != 0
    }

    /// All features that the device offers.
    pub fn offered(&self) -> u64 {
        (0..2).fold(0, |features, select| {
            self.write(self.common, 0, 4, select);
            features | self.read(self.common, 4, 4) << (32 * select)
        })
    }

    /// Agrees on the wanted device features and those of the transport, up to FEATURES_OK.
    pub fn negotiate(&mut self, wanted: u64) {
        self.negotiate_exactly(wanted | TRANSPORT_FEATURES);
        assert_eq!(self.status(), 0x0b, "the device refused the features");
    }

    /// The same with exactly these features, whether or not the device accepts them.
    pub fn negotiate_exactly(&mut self, features: u64) {
        assert_eq!(self.status(), 0, "negotiation starts from a reset device");
        self.set_status(status::ACKNOWLEDGE);
        self.set_status(status::ACKNOWLEDGE | status::DRIVER);
        for select in 0..2 {
            self.write(self.common, 8, 4, select);
            self.write(
                self.common,
                0x0c,
                4,
                features >> (32 * select) & 0xffff_ffff,
            );
        }
        self.set_status(status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
        self.features = features;
    }

    /// How many queues there are.
    pub fn queue_count(&self) -> u16 {
        self.read(self.common, 0x12, 2) as u16
    }

    /// The largest size of a queue, 0 if it is not there; only before it is set up.
    pub fn queue_max(&self, queue: u16) -> u16 {
        self.write(self.common, 0x16, 2, u64::from(queue));
        self.read(self.common, 0x18, 2) as u16
    }

    /// Makes a ring of `size` in guest memory, gives it vector `queue + 1` and enables it.
    pub fn setup_queue(&mut self, queue: u16, size: u16) {
        let ring = DriverQueue::new(&self.memory, &mut self.allocator, size);
        let common = self.common;
        self.write(common, 0x16, 2, u64::from(queue));
        self.write(common, 0x18, 2, u64::from(size));
        self.write(common, 0x1a, 2, u64::from(queue) + 1);
        self.write(common, 0x20, 8, ring.descriptors);
        self.write(common, 0x28, 8, ring.available);
        self.write(common, 0x30, 8, ring.used);
        self.write(common, 0x1c, 2, 1);
        let index = usize::from(queue);
        if self.queues.len() <= index {
            self.queues.resize_with(index + 1, || None);
        }
        self.queues[index] = Some(ring);
    }

    /// Gives the configuration vector 0 and sets DRIVER_OK.
    pub fn start(&mut self) {
        self.write(self.common, 0x10, 2, 0);
        self.set_status(self.status() | status::DRIVER_OK);
    }

    /// Resets the device, forgets its queues and gives their memory up.
    pub fn reset(&mut self) {
        self.set_status(0);
        self.queues.clear();
    }

    /// `length` bytes of guest memory for the test's own use.
    pub fn allocate(&mut self, length: u64) -> u64 {
        self.allocator.take(length)
    }

    fn ring(&mut self, queue: u16) -> &mut DriverQueue {
        self.queues[usize::from(queue)]
            .as_mut()
            .expect("the queue was not set up")
    }

    /// Makes a chain available and returns its head.
    pub fn add(&mut self, queue: u16, buffers: &[Buffer<'_>]) -> u16 {
        self.add_as(queue, buffers, false)
    }

    /// The same by an indirect table.
    pub fn add_indirect(&mut self, queue: u16, buffers: &[Buffer<'_>]) -> u16 {
        self.add_as(queue, buffers, true)
    }

    fn add_as(&mut self, queue: u16, buffers: &[Buffer<'_>], indirect: bool) -> u16 {
        let ring = self.queues[usize::from(queue)]
            .as_mut()
            .expect("the queue was not set up");
        ring.add(&self.memory, &mut self.allocator, buffers, indirect)
    }

    /// Writes these descriptors into the ring from index 0 on and makes `head` available, whatever they say.
    pub fn add_raw(&mut self, queue: u16, head: u16, descriptors: &[RawDescriptor]) {
        let memory = Arc::clone(&self.memory);
        let ring = self.ring(queue);
        for (at, descriptor) in (0..).zip(descriptors) {
            ring.write_descriptor(&memory, at, descriptor);
        }
        ring.publish(&memory, head);
    }

    /// Writes an indirect table and returns its address.
    pub fn raw_table(&mut self, descriptors: &[RawDescriptor]) -> u64 {
        let address = self.allocator.take(16 * descriptors.len() as u64);
        write_table(&self.memory, address, descriptors);
        address
    }

    /// Writes the index of the available ring, whatever it was.
    pub fn set_available_index(&mut self, queue: u16, index: u16) {
        let memory = Arc::clone(&self.memory);
        self.ring(queue).set_available_index(&memory, index);
    }

    /// The index of the used ring.
    pub fn used_index(&mut self, queue: u16) -> u16 {
        let memory = Arc::clone(&self.memory);
        self.ring(queue).used_index(&memory)
    }

    /// Whether the device wants to be kicked for the chain added last.
    pub fn wants_kick(&mut self, queue: u16) -> bool {
        let memory = Arc::clone(&self.memory);
        let event_idx = self.features & 1 << 29 != 0;
        self.ring(queue).wants_kick(&memory, event_idx)
    }

    /// Notifies the device by the queue's address in the BAR, whether or not it wants that.
    pub fn kick(&self, queue: u16) {
        let offset = u64::from(queue) * self.notify_multiplier;
        self.write(self.notify, offset, 2, u64::from(queue));
    }

    /// The next chain that came back, if one did.
    pub fn used(&mut self, queue: u16) -> Option<Used> {
        let ring = self.queues[usize::from(queue)]
            .as_mut()
            .expect("the queue was not set up");
        ring.take_used(&self.memory, &mut self.allocator)
    }

    /// The next chain that comes back within [`WAIT_MS`]: turns the loop meanwhile, or waits for interrupts
    /// of a device with threads of its own.
    pub fn wait_used(&mut self, queue: u16, poller: Option<&Poller>) -> Used {
        let deadline = Instant::now() + Duration::from_millis(WAIT_MS);
        loop {
            let seen = self.routes.total();
            if let Some(used) = self.used(queue) {
                return used;
            }
            let left = deadline
                .checked_duration_since(Instant::now())
                .unwrap_or_else(|| {
                    panic!("queue {queue} used nothing, status {:#x}", self.status())
                });
            match poller {
                Some(poller) => {
                    poller.turn(Some(left)).unwrap();
                }
                None => {
                    let _ = self.routes.wait_beyond(seen, deadline);
                }
            }
        }
    }

    /// How many interrupts a queue sent.
    pub fn interrupts(&self, queue: u16) -> usize {
        self.routes.triggers(queue + 1)
    }

    /// How many interrupts told of a changed configuration or of DEVICE_NEEDS_RESET.
    pub fn config_interrupts(&self) -> usize {
        self.routes.triggers(0)
    }
}

/// Makes every access to the BAR and to configuration space: each offset that could mean something, each
/// width, for some queue selectors, reading and writing `value`. The BAR is put back in between, so that it
/// decodes. Nothing may panic; what the device is afterwards is the caller's to check.
pub fn sweep(driver: &Driver, value: u64) {
    let bar: &VirtioPci = &driver.transport;
    for select in [0u64, 1, 7, 0x7fff, 0xffff] {
        for page in 0..u64::from(BAR_BYTES) / 0x1000 {
            for offset in (0..0x48).chain(0xff8..0x1000) {
                driver.write(driver.common, 0x16, 2, select);
                for width in [1, 2, 4, 8, 3, 0] {
                    let at = Region {
                        offset: page * 0x1000,
                        length: 0,
                    };
                    if width == 3 || width == 0 {
                        let mut data = vec![0; width];
                        bar.read(at.offset + offset, &mut data);
                        bar.write(at.offset + offset, &data);
                    } else {
                        driver.read(at, offset, width);
                        driver.write(at, offset, width, value);
                    }
                }
            }
        }
    }
    for offset in 0..=0xffu8 {
        for width in [1, 2, 4] {
            driver.read_config(offset, width);
            driver.write_config(offset, width, value);
        }
    }
    driver.decode();
}
