//! The board: the guest's buses and the devices on them. PCI places are given out in the order of the calls, which is the order
//! in which Linux finds them, each with a window of its own for its BAR.

use crate::end::{End, Ends};
use crate::kvm::KvmError;
use crate::kvm::vm::Vm;
use crate::layout;
use crate::machine::machine_events;
use crate::slots::{Label, LaterBars, Slots, WINDOW_BYTES, WINDOWS, transport};
use crate::vcpus::Buses;
use capsid_devices::GuestMemory;
use capsid_devices::bus::{Bus, BusDevice, BusError};
use capsid_devices::event::Poller;
use capsid_devices::i8042::{I8042, I8042_PORT, I8042_PORT_BYTES};
use capsid_devices::memory::NotMemory;
use capsid_devices::pci::{
    CONFIG_PORT, CONFIG_PORT_BYTES, FUNCTIONS, LayoutError, PciFunction, PciRoot, Place,
    PlaceError, SLOTS,
};
use capsid_devices::pvpanic::{PVPANIC_BAR_BYTES, PvPanic};
use capsid_devices::serial::{InterruptLine, SERIAL_IRQ, SERIAL_PORT, SERIAL_PORT_BYTES, Serial};
use capsid_devices::virtio::device::VirtioDevice;
use capsid_devices::virtio::pci::{BAR_BYTES, BarAddress, TransportError, VirtioPci};
use capsid_protocol::exit::VmmExit;
use std::os::fd::OwnedFd;
use std::sync::Arc;

const _: () = {
    assert!(BAR_BYTES as u64 <= WINDOW_BYTES && PVPANIC_BAR_BYTES as u64 <= WINDOW_BYTES);
    assert!(WINDOWS as u64 * WINDOW_BYTES <= layout::PCI_WINDOW_BYTES);
    assert!(CONFIG_PORT == layout::PCI_ADDRESS_PORT);
    assert!(SERIAL_PORT == layout::SERIAL_PORT && SERIAL_IRQ == layout::SERIAL_GSI);
};

/// Why a device could not be put on the board.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// KVM refused an interrupt or a notification.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Two devices in one place; a defect of the layout.
    #[error("cannot place a device on its bus")]
    Bus(#[from] BusError),
    /// A place taken twice, or more devices than places.
    #[error("cannot place a device on the PCI bus")]
    Place(#[from] PlaceError),
    /// No memory where the copy of configuration space goes; a defect of the layout.
    #[error("cannot place the copy of PCI configuration space")]
    Copy(#[from] NotMemory),
    /// A device's configuration space; a defect.
    #[error("cannot lay out a PCI device")]
    Layout(#[from] LayoutError),
    /// All places of the bus are taken, or none was kept for later.
    #[error("the PCI bus has no place for one more device")]
    Full,
    /// A virtio device.
    #[error(transparent)]
    Transport(#[from] TransportError),
}

/// The serial port's line into the interrupt controllers.
struct SerialLine {
    vm: Vm,
    ends: Ends,
}

impl InterruptLine for SerialLine {
    fn set(&self, up: bool) {
        if let Err(error) = self.vm.set_line(layout::SERIAL_GSI, up) {
            self.ends.report(End::from_error(VmmExit::KvmError, &error));
        }
    }
}

/// The buses while devices are put on them.
pub struct Board<'a> {
    vm: &'a Vm,
    memory: &'a GuestMemory,
    port: Bus,
    mmio: Bus,
    pci: Arc<PciRoot>,
    /// Functions placed so far.
    placed: usize,
    /// How many go into one slot.
    per_slot: usize,
    /// Others may come while the guest runs.
    later: bool,
    virtio: Vec<(Label, Place, Arc<VirtioPci>)>,
}

impl<'a> Board<'a> {
    /// An empty board of `vm`, for so many PCI functions, with room for others that come `later`.
    pub fn new(vm: &'a Vm, memory: &'a GuestMemory, functions: usize, later: bool) -> Board<'a> {
        Board {
            vm,
            memory,
            port: Bus::new(),
            mmio: Bus::new(),
            pci: Arc::new(PciRoot::new()),
            placed: 0,
            per_slot: per_slot(functions, later),
            later,
            virtio: Vec::new(),
        }
    }

    /// The VM that this is the board of.
    pub fn vm(&self) -> &Vm {
        self.vm
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
        let line: Option<Arc<dyn InterruptLine>> = Some(Arc::new(SerialLine {
            vm: self.vm.clone(),
            ends: ends.clone(),
        }));
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
        let (place, address) = self.place();
        let pvpanic = Arc::new(PvPanic::new(address, machine_events(ends.clone()))?);
        self.add_function(
            place,
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
        label: Label,
        device: Box<dyn VirtioDevice>,
    ) -> Result<(), BoardError> {
        let (place, address) = self.place();
        let bar = BarAddress::InRegister(address);
        let transport = transport(self.vm, self.memory, label.kind, device, bar)?;
        for notify in transport.notify_addresses() {
            self.vm.add_ioeventfd(notify.address, &notify.kick)?;
        }
        self.virtio.push((label, place, Arc::clone(&transport)));
        self.add_function(
            place,
            address,
            u64::from(BAR_BYTES),
            transport.clone(),
            transport,
        )
    }

    fn add_function(
        &mut self,
        place: Place,
        address: u64,
        bytes: u64,
        function: Arc<dyn PciFunction>,
        bar: Arc<dyn BusDevice>,
    ) -> Result<(), BoardError> {
        self.mmio.insert(address, bytes, bar)?;
        Ok(self.pci.insert(place, function)?)
    }

    fn place(&mut self) -> (Place, u64) {
        let place = place(self.placed, self.per_slot);
        self.placed += 1;
        let window = self.placed as u64 * WINDOW_BYTES;
        (place, layout::PCI_WINDOW + window)
    }

    /// The buses, with all that was put on them, and the virtio devices once more.
    ///
    /// # Errors
    /// See [`BoardError`].
    pub fn finish(mut self) -> Result<(Arc<Buses>, Slots), BoardError> {
        let later = self.later.then(|| {
            let first_slot = 1 + self.placed.div_ceil(self.per_slot);
            Arc::new(LaterBars::new(first_slot, self.placed))
        });
        if let Some(bars) = &later {
            self.pci.keep_for_later(bars.first_slot());
            self.mmio.insert(bars.start(), bars.bytes(), bars.clone())?;
        }
        self.pci.keep_copy(Arc::clone(self.memory))?;
        let (vm, memory) = (self.vm.clone(), Arc::clone(self.memory));
        let mut slots = Slots::new(vm, memory, self.pci.clone(), later);
        for (label, place, transport) in self.virtio {
            slots.began_with(label, place, transport);
        }
        self.port.insert(CONFIG_PORT, CONFIG_PORT_BYTES, self.pci)?;
        let buses = Buses {
            port: self.port,
            mmio: self.mmio,
        };
        Ok((Arc::new(buses), slots))
    }
}

/// How many of `functions` go into one slot: one as long as there are slots, since a guest looks at all functions of a slot that
/// has a second one.
/// With `later` some have to be left over.
fn per_slot(functions: usize, later: bool) -> usize {
    let most = if later { SLOTS / 2 } else { SLOTS };
    if functions < most { 1 } else { FUNCTIONS }
}

/// Where the `number`th function goes. Slot 0 is the host bridge's. One beyond the last is no place, and the bus refuses it.
fn place(number: usize, per_slot: usize) -> Place {
    Place {
        slot: u8::try_from(1 + number / per_slot).unwrap_or(u8::MAX),
        function: (number % per_slot) as u8,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_placed_in_the_order_in_which_they_are_found() {
        let at = |slot, function| Place { slot, function };
        assert_eq!((place(0, 1), place(30, 1)), (at(1, 0), at(31, 0)));
        assert_eq!((place(7, 8), place(8, 8)), (at(1, 7), at(2, 0)));
        assert_eq!((place(247, 8), place(248, 8)), (at(31, 7), at(32, 0)));
        assert_eq!((per_slot(31, false), per_slot(32, false)), (1, 8));
        assert_eq!((per_slot(15, true), per_slot(16, true)), (1, 8));
    }
}
