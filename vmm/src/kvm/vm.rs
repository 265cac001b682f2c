//! One VM of KVM: memory, interrupt controllers, ioeventfds, interrupts.
#![allow(unsafe_code)] // KVM_SET_USER_MEMORY_REGION hands the kernel a range of our address space.

use super::{KvmError, failed};
use crate::layout;
use capsid_devices::GuestMemory;
use kvm_bindings::{KVM_MSI_VALID_DEVID, kvm_msi, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use rustix::io::Errno;
use std::sync::{Arc, Mutex};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion};
use vmm_sys_util::eventfd::EventFd;

/// How often `KVM_CREATE_VM` is tried when a signal interrupts it; it undoes itself wholly each time.
const CREATE_VM_TRIES: u32 = 8;

/// A VM with its memory and its interrupt controllers. Clones are the same VM.
#[derive(Clone)]
pub struct Vm {
    fd: Arc<VmFd>,
    /// Held by the vCPU that empties the ring of collected writes, if this KVM collects any.
    collected: Option<Arc<Mutex<()>>>,
    /// Keeps the memory mapped as long as KVM may write to it.
    _memory: GuestMemory,
}

impl Vm {
    /// Makes a VM of this memory. The order is that of the module text of [`super`].
    ///
    /// # Errors
    /// An ioctl failed.
    pub fn new(kvm: &Kvm, memory: GuestMemory) -> Result<Vm, KvmError> {
        let fd = create(kvm)?;
        set_memory(&fd, &memory)?;
        fd.set_tss_address(layout::KVM_TSS as usize)
            .map_err(failed("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        let collects = kvm.check_extension(Cap::CoalescedPio);
        if collects {
            // Each access to configuration space is a write here and an access to the data register: without
            // the exit of the write, finding the PCI devices costs a guest half.
            let address = IoEventAddress::Pio(layout::PCI_ADDRESS_PORT);
            fd.register_coalesced_mmio(address, layout::PCI_ADDRESS_BYTES)
                .map_err(failed("KVM_REGISTER_COALESCED_MMIO"))?;
        }
        Ok(Vm {
            fd: Arc::new(fd),
            collected: collects.then(Arc::default),
            _memory: memory,
        })
    }

    /// The VM's fd, for what `kvm` makes of it.
    pub(super) fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// What serializes the vCPUs that look at collected writes, if this KVM collects any.
    pub(super) fn collected(&self) -> Option<Arc<Mutex<()>>> {
        self.collected.clone()
    }

    /// Raises a message signalled interrupt (PCI 3.0, section 6.8.3).
    ///
    /// # Errors
    /// KVM refused the message; a message to a CPU that is not there is no error.
    pub fn signal_msi(&self, address: u64, data: u32) -> Result<(), KvmError> {
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..kvm_msi::default()
        };
        debug_assert_eq!(msi.flags & KVM_MSI_VALID_DEVID, 0);
        match self.fd.signal_msi(msi) {
            Ok(_) => Ok(()),
            Err(cause) => Err(failed("KVM_SIGNAL_MSI")(cause)),
        }
    }

    /// Makes each write of the guest to `address`, of any width, signal `event` without an exit.
    ///
    /// # Errors
    /// KVM refused, for instance because another eventfd is there.
    pub fn add_ioeventfd(&self, address: u64, event: &EventFd) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(failed("KVM_IOEVENTFD"))
    }

    /// Undoes [`Vm::add_ioeventfd`].
    ///
    /// # Errors
    /// It was not there.
    pub fn remove_ioeventfd(&self, address: u64, event: &EventFd) -> Result<(), KvmError> {
        self.fd
            .unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch)
            .map_err(failed("KVM_IOEVENTFD"))
    }

    /// Connects `event` to a line of the 8259 and the IOAPIC.
    ///
    /// # Errors
    /// KVM refused.
    pub fn add_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.fd
            .register_irqfd(event, gsi)
            .map_err(failed("KVM_IRQFD"))
    }
}

fn create(kvm: &Kvm) -> Result<VmFd, KvmError> {
    let mut tries = CREATE_VM_TRIES;
    loop {
        tries -= 1;
        match kvm.create_vm() {
            Err(cause) if cause.errno() == libc::EINTR && tries > 0 => {}
            result => return result.map_err(failed("KVM_CREATE_VM")),
        }
    }
}

fn set_memory(fd: &VmFd, memory: &GuestMemory) -> Result<(), KvmError> {
    for (slot, region) in memory.iter().enumerate() {
        let start = region.start_addr();
        let host = memory
            .get_slice(GuestAddress(start.0), region.len() as usize)
            .map_err(|_| KvmError::Ioctl {
                what: "KVM_SET_USER_MEMORY_REGION",
                cause: Errno::INVAL,
            })?;
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: start.0,
            memory_size: region.len(),
            userspace_addr: host.ptr_guard_mut().as_ptr() as u64,
        };
        // SAFETY: the range is exactly one region of guest memory, which stays mapped as long as the process
        // (`memory.rs`); the guest may write it at any time, and nothing in this process holds a reference
        // into it.
        unsafe { fd.set_user_memory_region(region) }
            .map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}
