//! One VM of KVM: memory, interrupt controllers, ioeventfds, interrupts.
#![allow(unsafe_code)] // KVM_SET_USER_MEMORY_REGION hands the kernel a range of our address space; the VM's fd is lent.

use super::{KvmError, failed};
use crate::layout;
use capsid_devices::mem::{Backing, Block};
use capsid_devices::memory::{GuestMemory, Region, slice_of};
use kvm_bindings::{
    KVM_CAP_DISABLE_QUIRKS2, KVM_MSI_VALID_DEVID, KVM_X86_QUIRK_SLOT_ZAP_ALL, kvm_enable_cap,
    kvm_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex};
use vm_memory::{GuestMemory as _, GuestMemoryRegion, VolatileSlice};
use vmm_sys_util::eventfd::EventFd;

/// How often `KVM_CREATE_VM` is tried when a signal interrupts it; it undoes itself wholly each time.
const CREATE_VM_TRIES: u32 = 8;

/// What hands memory to KVM.
const SET_MEMORY: &str = "KVM_SET_USER_MEMORY_REGION";

/// A VM with its memory and its interrupt controllers. Clones are the same VM.
#[derive(Clone)]
pub struct Vm {
    fd: Arc<VmFd>,
    /// Held by the vCPU that empties the ring of collected writes, if this KVM collects any.
    collected: Option<Arc<Mutex<()>>>,
    /// Keeps the memory mapped as long as KVM may write to it.
    memory: GuestMemory,
}

impl Vm {
    /// Makes a VM of this memory. The order is that of the module text of [`super`].
    ///
    /// # Errors
    /// An ioctl failed.
    pub fn new(kvm: &Kvm, memory: GuestMemory) -> Result<Vm, KvmError> {
        let fd = create(kvm)?;
        set_memory(&fd, &memory)?;
        if memory.iter().any(|region| region.blocks().is_some()) {
            keep_mappings(&fd);
        }
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
            memory,
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

    /// Moves a line of the 8259 and the IOAPIC, before it returns: an irqfd would leave that to a worker of the kernel, for a line that is
    /// no message, and the guest goes on meanwhile.
    ///
    /// # Errors
    /// KVM refused.
    pub fn set_line(&self, gsi: u32, up: bool) -> Result<(), KvmError> {
        self.fd
            .set_irq_line(gsi, up)
            .map_err(failed("KVM_IRQ_LINE"))
    }
}

impl AsFd for Vm {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: it stays open as long as `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) }
    }
}

/// Each block that is plugged is a slot: the guest reaches no other.
impl Backing for Vm {
    fn map(&self, block: Block<'_>) -> io::Result<()> {
        self.set_block(&block, block.memory.len() as u64)
    }

    fn unmap(&self, block: Block<'_>) -> io::Result<()> {
        self.set_block(&block, 0)
    }
}

impl Vm {
    fn set_block(&self, block: &Block<'_>, bytes: u64) -> io::Result<()> {
        let slot = boot_regions(&self.memory).count() as u32 + block.number;
        set_slot(&self.fd, slot, block.address, &block.memory, bytes).map_err(io::Error::other)
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

/// Boot memory; blocks that are plugged later get slots behind it.
fn set_memory(fd: &VmFd, memory: &GuestMemory) -> Result<(), KvmError> {
    for (slot, region) in boot_regions(memory).enumerate() {
        let start = region.start_addr().0;
        let host = slice_of(memory, start, region.len() as usize).map_err(|_| KvmError::Ioctl {
            what: SET_MEMORY,
            cause: Errno::INVAL,
        })?;
        set_slot(fd, slot as u32, start, &host, region.len())?;
    }
    Ok(())
}

fn boot_regions(memory: &GuestMemory) -> impl Iterator<Item = &Region> {
    memory.iter().filter(|region| region.blocks().is_none())
}

/// Puts the first `bytes` of `host` at `address`; 0 takes them away again.
fn set_slot(
    fd: &VmFd,
    slot: u32,
    address: u64,
    host: &VolatileSlice<'_>,
    bytes: u64,
) -> Result<(), KvmError> {
    let region = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: address,
        memory_size: bytes.min(host.len() as u64),
        userspace_addr: host.ptr_guard_mut().as_ptr() as u64,
    };
    // SAFETY: the range is inside one region of guest memory, which stays mapped as long as the process
    // (`memory.rs`); the guest may write it at any time, and nothing in this process holds a reference
    // into it.
    unsafe { fd.set_user_memory_region(region) }.map_err(failed(SET_MEMORY))
}

/// Without this, KVM drops all mappings of the guest whenever one slot goes (KVM_X86_QUIRK_SLOT_ZAP_ALL, Linux 6.12; before, it does so
/// always). Then the guest faults them in again, which takes time and nothing else.
fn keep_mappings(fd: &VmFd) {
    let quirk = KVM_X86_QUIRK_SLOT_ZAP_ALL;
    let known = fd.check_extension_raw(KVM_CAP_DISABLE_QUIRKS2.into());
    if known > 0 && known as u32 & quirk != 0 {
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_DISABLE_QUIRKS2,
            ..kvm_enable_cap::default()
        };
        cap.args[0] = quirk.into();
        // What it says it can, it can; and it is about speed alone.
        let _ = fd.enable_cap(&cap);
    }
}
