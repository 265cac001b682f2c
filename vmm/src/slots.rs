//! The virtio devices of a VM once it is put together: those that it began with, and those that come and go by the control channel
//! while it runs.
//!
//! A function that comes later gets a slot that no function of the start has, as long as there is one, because a guest that has looked at a
//! slot without finding further functions does not look again. Its registers have a fixed address (`devices/src/pci/config.rs`)
//! in the part of the PCI window behind those of the start, where [`LaterBars`] finds them.
//!
//! Used by the event loop's thread alone. A vCPU may be inside a device that leaves; it keeps the transport, but not the device.

use crate::board::BoardError;
use crate::kvm::irq::Messages;
use crate::kvm::vm::Vm;
use crate::layout;
use capsid_devices::GuestMemory;
use capsid_devices::bus::BusDevice;
use capsid_devices::net::Link;
use capsid_devices::pci::{FUNCTIONS, PciRoot, Place, SLOTS};
use capsid_devices::virtio::device::{Busy, VirtioDevice};
use capsid_devices::virtio::pci::{BarAddress, InUse, NotifyAddress, TransportError, VirtioPci};
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use vmm_sys_util::eventfd::EventFd;

/// Guest-physical address space that each PCI function gets for its BAR, in bytes.
pub const WINDOW_BYTES: u64 = 0x8000;
/// Windows for BARs; number 0 is nobody's.
pub const WINDOWS: usize = SLOTS * FUNCTIONS;

/// What a device is to whoever talks of it.
#[derive(Clone)]
pub struct Label {
    /// Its kind, for instance `virtio-blk`.
    pub kind: &'static str,
    /// What tells it from others of its kind; empty where there is one.
    pub id: String,
    /// Its cable, if it is a network card.
    pub link: Option<Link>,
}

impl Label {
    /// Of the one device of a kind.
    pub fn only(kind: &'static str) -> Label {
        Label {
            kind,
            id: String::new(),
            link: None,
        }
    }
}

/// A virtio device on the bus.
pub struct Slot {
    /// What it is.
    pub label: Label,
    /// Where it is.
    pub place: Place,
    /// Its transport.
    pub transport: Arc<VirtioPci>,
    /// Of one that came later: the number of its window. One that was there at the start stays.
    later: Option<usize>,
}

/// Where a device's kicks are registered; undone when it is dropped.
struct Kicks {
    vm: Vm,
    addresses: Vec<NotifyAddress>,
}

impl Kicks {
    fn new(vm: &Vm, transport: &VirtioPci) -> Result<Kicks, BoardError> {
        let mut kicks = Kicks {
            vm: vm.clone(),
            addresses: Vec::new(),
        };
        for notify in transport.notify_addresses() {
            kicks.vm.add_ioeventfd(notify.address, &notify.kick)?;
            kicks.addresses.push(notify);
        }
        Ok(kicks)
    }
}

impl Drop for Kicks {
    fn drop(&mut self) {
        for notify in &self.addresses {
            // Fails only if it is not there, and that is what is wanted.
            let _ = self.vm.remove_ioeventfd(notify.address, &notify.kick);
        }
    }
}

/// Why a device cannot leave.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// There is none of this name.
    #[error("there is no {kind} {id:?}")]
    Unknown {
        /// Its kind.
        kind: &'static str,
        /// The name.
        id: String,
    },
    /// It was there when the guest started.
    #[error("{kind} {id:?} was there when the VM started, and stays as long as it")]
    Permanent {
        /// Its kind.
        kind: &'static str,
        /// Its name.
        id: String,
    },
    /// A driver has it.
    #[error(transparent)]
    InUse(#[from] InUse),
}

/// A device does not stand still.
#[derive(Debug, thiserror::Error)]
#[error("{kind} {id:?} does not stand still")]
pub struct Restless {
    /// Its kind.
    pub kind: &'static str,
    /// Its name.
    pub id: String,
    /// Why.
    #[source]
    pub cause: Busy,
}

/// All virtio devices, and room for more.
pub struct Slots {
    vm: Vm,
    memory: GuestMemory,
    pci: Arc<PciRoot>,
    later: Option<Arc<LaterBars>>,
    devices: Vec<Slot>,
    kicks: BTreeMap<usize, Kicks>,
}

impl Slots {
    /// Those that the board was made with. `later`, if devices may come later, is on the MMIO bus already.
    pub fn new(
        vm: Vm,
        memory: GuestMemory,
        pci: Arc<PciRoot>,
        later: Option<Arc<LaterBars>>,
    ) -> Slots {
        Slots {
            vm,
            memory,
            pci,
            later,
            devices: Vec::new(),
            kicks: BTreeMap::new(),
        }
    }

    /// All of them, in the order in which they came.
    pub fn all(&self) -> &[Slot] {
        &self.devices
    }

    /// The device of this kind and name.
    pub fn find(&self, kind: &str, id: &str) -> Option<&Slot> {
        let named = |slot: &&Slot| slot.label.kind == kind && slot.label.id == id;
        self.devices.iter().find(named)
    }

    /// Has all devices let go of guest memory, while no vCPU runs.
    ///
    /// # Errors
    /// One does not stand still yet, though all were asked to. `idle` is signalled when it is worth asking again.
    pub fn suspend(&self, idle: &Arc<EventFd>) -> Result<(), Restless> {
        let mut result = Ok(());
        for Slot {
            label, transport, ..
        } in &self.devices
        {
            if let Err(cause) = transport.suspend(idle) {
                result = Err(Restless {
                    kind: label.kind,
                    id: label.id.clone(),
                    cause,
                });
            }
        }
        result
    }

    /// Has those that stand still, or were asked to, go on.
    pub fn resume(&self) {
        for slot in &self.devices {
            slot.transport.resume();
        }
    }

    /// Notes a device of the start.
    pub fn began_with(&mut self, label: Label, place: Place, transport: Arc<VirtioPci>) {
        self.devices.push(Slot {
            label,
            place,
            transport,
            later: None,
        });
    }

    /// Puts a device on the bus; where the guest finds it when it looks again.
    ///
    /// # Errors
    /// There is no place, or KVM refused its kicks. Nothing of it is left then.
    pub fn attach(
        &mut self,
        label: Label,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Place, BoardError> {
        let later = self.later.clone().ok_or(BoardError::Full)?;
        let taken: Vec<Place> = self.devices.iter().map(|slot| slot.place).collect();
        let place = free_place(later.first_slot, &taken).ok_or(BoardError::Full)?;
        let window = later.free().ok_or(BoardError::Full)?;
        let address = layout::PCI_WINDOW + window as u64 * WINDOW_BYTES;
        let bar = BarAddress::Fixed(address);
        let transport = transport(&self.vm, &self.memory, label.kind, device, bar)?;
        let kicks = Kicks::new(&self.vm, &transport)?;
        later.insert(window, transport.clone());
        if let Err(taken) = self.pci.insert(place, transport.clone()) {
            later.remove(window);
            return Err(taken.into());
        }
        self.kicks.insert(window, kicks);
        self.devices.push(Slot {
            label,
            place,
            transport,
            later: Some(window),
        });
        Ok(place)
    }

    /// Takes a device off the bus.
    ///
    /// # Errors
    /// See [`DetachError`]; then nothing has changed.
    pub fn detach(&mut self, kind: &'static str, id: &str) -> Result<(), DetachError> {
        let id = id.to_owned();
        let named = |slot: &Slot| slot.label.kind == kind && slot.label.id == id;
        let Some(index) = self.devices.iter().position(named) else {
            return Err(DetachError::Unknown { kind, id });
        };
        let found = self.devices.get(index).map(|slot| (slot.later, slot.place));
        let Some((Some(window), place)) = found else {
            return Err(DetachError::Permanent { kind, id });
        };
        let slot = self.devices.get(index).ok_or(InUse)?;
        let device = slot.transport.retire()?;
        self.pci.remove(place);
        if let Some(later) = &self.later {
            later.remove(window);
        }
        self.kicks.remove(&window);
        self.devices.remove(index);
        // Last: nobody finds the way to it any more.
        drop(device);
        Ok(())
    }
}

/// Puts a device behind a transport of this VM.
///
/// # Errors
/// See [`TransportError`].
pub fn transport(
    vm: &Vm,
    memory: &GuestMemory,
    kind: &'static str,
    device: Box<dyn VirtioDevice>,
    bar: BarAddress,
) -> Result<Arc<VirtioPci>, TransportError> {
    // One vector a queue and one for the configuration.
    let vectors = device.queue_sizes().len() as u16 + 1;
    let routes = Arc::new(Messages::new(vm.clone(), vectors));
    let transport = VirtioPci::new(kind, device, Arc::clone(memory), routes, bar)?;
    Ok(Arc::new(transport))
}

/// The first place for one more function behind those of the start: a slot of its own if there is one, else beside a function 0.
fn free_place(first_slot: usize, taken: &[Place]) -> Option<Place> {
    let slots = || (first_slot..SLOTS).filter_map(|slot| u8::try_from(slot).ok());
    let own = slots().map(|slot| Place { slot, function: 0 });
    let beside =
        slots().flat_map(|slot| (1..FUNCTIONS as u8).map(move |function| Place { slot, function }));
    // If no slot has a free function 0, all of them have one.
    own.chain(beside).find(|place| !taken.contains(place))
}

/// The BARs of functions that come later: one device on the MMIO bus for all of them, because the bus itself never changes.
pub struct LaterBars {
    /// The first slot for them.
    first_slot: usize,
    /// Number of the first window for them.
    first: usize,
    by_window: RwLock<BTreeMap<usize, Arc<VirtioPci>>>,
}

impl LaterBars {
    /// Behind `placed` functions, which fill the slots before `first_slot`; they have the windows 1 to `placed`.
    pub fn new(first_slot: usize, placed: usize) -> LaterBars {
        LaterBars {
            first_slot,
            first: placed + 1,
            by_window: RwLock::default(),
        }
    }

    /// Guest-physical address of the first one.
    pub fn start(&self) -> u64 {
        layout::PCI_WINDOW + self.first as u64 * WINDOW_BYTES
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> u64 {
        WINDOWS.saturating_sub(self.first) as u64 * WINDOW_BYTES
    }

    /// The first slot for them.
    pub fn first_slot(&self) -> usize {
        self.first_slot
    }

    fn free(&self) -> Option<usize> {
        let taken = self
            .by_window
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        (self.first..WINDOWS).find(|window| !taken.contains_key(window))
    }

    fn insert(&self, window: usize, transport: Arc<VirtioPci>) {
        let mut all = self
            .by_window
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        all.insert(window, transport);
    }

    fn remove(&self, window: usize) {
        let mut all = self
            .by_window
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        all.remove(&window);
    }

    /// Whose window `offset` is in, and where. The lock is gone when the device is called: a reset may wait for the thread that
    /// wants to change the list.
    fn at(&self, offset: u64) -> Option<(Arc<VirtioPci>, u64)> {
        let window = self.first + usize::try_from(offset / WINDOW_BYTES).ok()?;
        let all = self
            .by_window
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        Some((all.get(&window)?.clone(), offset % WINDOW_BYTES))
    }
}

impl BusDevice for LaterBars {
    fn name(&self) -> &'static str {
        "virtio-later"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        match self.at(offset) {
            Some((transport, offset)) if ends_inside(offset, data) => transport.read(offset, data),
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match self.at(offset) {
            Some((transport, offset)) if ends_inside(offset, data) => transport.write(offset, data),
            _ => {}
        }
    }
}

/// An access across the end of a window is one to nothing, as on the bus itself.
fn ends_inside(offset: u64, data: &[u8]) -> bool {
    offset + data.len() as u64 <= WINDOW_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_of_their_own_are_given_out_before_further_functions_of_one() {
        let mut taken = Vec::new();
        while let Some(place) = free_place(29, &taken) {
            taken.push(place);
        }
        let at = |slot, function| Place { slot, function };
        assert_eq!(taken.len(), 3 * FUNCTIONS);
        assert_eq!(taken[..4], [at(29, 0), at(30, 0), at(31, 0), at(29, 1)]);
        // A function 0 that has left is the first to be given out again: without one nobody looks for the others.
        taken.retain(|place| *place != at(30, 0) && *place != at(29, 1));
        assert_eq!(free_place(29, &taken), Some(at(30, 0)));
        assert_eq!(free_place(SLOTS, &[]), None);
    }

    #[test]
    fn windows_behind_those_of_the_start_are_empty_until_somebody_comes() {
        let bars = LaterBars::new(6, 5);
        assert_eq!(bars.start(), layout::PCI_WINDOW + 6 * WINDOW_BYTES);
        assert_eq!(bars.bytes(), 250 * WINDOW_BYTES);
        assert_eq!(bars.free(), Some(6));
        let mut data = [0; 4];
        bars.read(0, &mut data);
        assert_eq!(data, [0xff; 4]);
        bars.write(0, &data);
        assert!(ends_inside(WINDOW_BYTES - 4, &data) && !ends_inside(WINDOW_BYTES - 3, &data));
    }
}
