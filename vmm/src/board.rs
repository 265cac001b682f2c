//! The board: the guest's buses and the devices on them. PCI slots are given out in the order of the calls, each
//! with a window of its own for its BAR.

use crate::end::Ends;
use crate::kvm::KvmError;
use crate::kvm::irq::Messages;
use crate::kvm::vm::Vm;
use crate::layout;
use crate::machine::machine_events;
use crate::vcpus::Buses;
use capsid_devices::GuestMemory;
use capsid_devices::bus::{Bus, BusDevice, BusError};
use capsid_devices::event::Poller;
use capsid_devices::i8042::{I8042, I8042_PORT, I8042_PORT_BYTES};
use capsid_devices::pci::{
    CONFIG_PORT, CONFIG_PORT_BYTES, LayoutError, PciFunction, PciRoot, SlotError,
};
use capsid_devices::pvpanic::{PVPANIC_BAR_BYTES, PvPanic};
use capsid_devices::serial::{SERIAL_IRQ, SERIAL_PORT, SERIAL_PORT_BYTES, Serial};
use capsid_devices::virtio::device::VirtioDevice;
use capsid_devices::virtio::pci::{BAR_BYTES, TransportError, VirtioPci};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Guest-physical address space that each PCI slot gets for its BAR, in bytes.
const SLOT_WINDOW_BYTES: u64 = 0x8000;

const _: () = {
    assert!(BAR_BYTES as u64 <= SLOT_WINDOW_BYTES && PVPANIC_BAR_BYTES as u64 <= SLOT_WINDOW_BYTES);
    assert!(32 * SLOT_WINDOW_BYTES <= layout::PCI_WINDOW_BYTES);
    assert!(CONFIG_PORT == layout::PCI_ADDRESS_PORT);
    assert!(SERIAL_PORT == layout::SERIAL_PORT && SERIAL_IRQ == layout::SERIAL_GSI);
};

/// Why a device could not be put on the board.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// KVM refused an interrupt or a notification.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// No eventfd.
    #[error("cannot make the interrupt of the serial port")]
    Interrupt(#[source] io::Error),
    /// Two devices in one place; a defect of the layout.
    #[error("cannot place a device on its bus")]
    Bus(#[from] BusError),
    /// A slot taken twice; a defect.
    #[error("cannot place a device on the PCI bus")]
    Slot(#[from] SlotError),
    /// A device's configuration space; a defect.
    #[error("cannot lay out a PCI device")]
    Layout(#[from] LayoutError),
    /// A virtio device.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

/// The buses while devices are put on them.
pub struct Board<'a> {
    vm: &'a Vm,
    memory: &'a GuestMemory,
    port: Bus,
    mmio: Bus,
    pci: Arc<PciRoot>,
    next_slot: u8,
    virtio: Vec<Arc<VirtioPci>>,
}

impl<'a> Board<'a> {
    /// An empty board of `vm`.
    pub fn new(vm: &'a Vm, memory: &'a GuestMemory) -> Board<'a> {
        Board {
            vm,
            memory,
            port: Bus::new(),
            mmio: Bus::new(),
            pci: Arc::new(PciRoot::new()),
            next_slot: 1,
            virtio: Vec::new(),
        }
    }

    /// The serial port and the keyboard controller.
    ///
    /// # Errors
    /// See [`BoardError`]; so for the others.
    pub fn add_legacy(
        &mut self,
        output: Option<OwnedFd>,
        ends: &Ends,
        poller: &Arc<Poller>,
    ) -> Result<Arc<Serial>, BoardError> {
        let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(BoardError::Interrupt)?;
        self.vm.add_irqfd(&line, layout::SERIAL_GSI)?;
        let line = Some(Arc::new(line));
        let serial = Arc::new(match output {
            Some(fd) => Serial::with_output(line, fd, poller.clone()),
            None => Serial::new(line),
        });
        self.port
            .insert(SERIAL_PORT, SERIAL_PORT_BYTES, serial.clone())?;
        let keyboard = Arc::new(I8042::new(machine_events(ends.clone())));
        self.port.insert(I8042_PORT, I8042_PORT_BYTES, keyboard)?;
        Ok(serial)
    }

    /// pvpanic: how the guest says that it panicked, or powers off.
    ///
    /// # Errors
    /// See [`BoardError`].
    pub fn add_pvpanic(&mut self, ends: &Ends) -> Result<(), BoardError> {
        let (slot, address) = self.slot();
        let pvpanic = Arc::new(PvPanic::new(address, machine_events(ends.clone()))?);
        self.add_function(
            slot,
            address,
            u64::from(PVPANIC_BAR_BYTES),
            pvpanic.clone(),
            pvpanic,
        )
    }

    /// A virtio device in the next slot, its interrupts and its kicks.
    ///
    /// # Errors
    /// See [`BoardError`].
    pub fn add_virtio(
        &mut self,
        name: &'static str,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), BoardError> {
        let (slot, address) = self.slot();
        // One vector a queue and one for the configuration.
        let vectors = device.queue_sizes().len() as u16 + 1;
        let routes = Arc::new(Messages::new(self.vm.clone(), vectors));
        let transport = VirtioPci::new(name, device, Arc::clone(self.memory), routes, address)?;
        for notify in transport.notify_addresses() {
            self.vm.add_ioeventfd(notify.address, &notify.kick)?;
        }
        let transport = Arc::new(transport);
        self.virtio.push(Arc::clone(&transport));
        self.add_function(
            slot,
            address,
            u64::from(BAR_BYTES),
            transport.clone(),
            transport,
        )
    }

    fn add_function(
        &mut self,
        slot: u8,
        address: u64,
        bytes: u64,
        function: Arc<dyn PciFunction>,
        bar: Arc<dyn BusDevice>,
    ) -> Result<(), BoardError> {
        self.mmio.insert(address, bytes, bar)?;
        Ok(self.pci.insert(slot, function)?)
    }

    fn slot(&mut self) -> (u8, u64) {
        let slot = self.next_slot;
        self.next_slot += 1;
        (
            slot,
            layout::PCI_WINDOW + u64::from(slot) * SLOT_WINDOW_BYTES,
        )
    }

    /// The buses, with all that was put on them, and the virtio devices once more, to be asked what went wrong.
    ///
    /// # Errors
    /// See [`BoardError`].
    pub fn finish(mut self) -> Result<(Arc<Buses>, Vec<Arc<VirtioPci>>), BoardError> {
        self.port.insert(CONFIG_PORT, CONFIG_PORT_BYTES, self.pci)?;
        let buses = Buses {
            port: self.port,
            mmio: self.mmio,
        };
        Ok((Arc::new(buses), self.virtio))
    }
}
