//! One vCPU of KVM: how it starts, and what an exit to userspace means.
#![allow(unsafe_code)] // `struct kvm_run` is a union in memory shared with the kernel.

use super::vm::Vm;
use super::{KvmError, failed};
use crate::arch::{lapic, msr, registers};
use crate::boot::Entry;
use crate::layout;
use kvm_bindings::{
    CpuId, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_IO_IN,
    KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, Msrs, kvm_cpuid_entry2,
};
use kvm_ioctls::VcpuFd;
use rustix::io::Errno;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Why `KVM_RUN` came back, with what is needed to go on.
pub enum Exit<'a> {
    /// `out`: elements of `width` bytes, one behind the other, all to `port`.
    PortWrite {
        /// The port.
        port: u16,
        /// 1, 2 or 4.
        width: usize,
        /// The elements.
        data: &'a [u8],
    },
    /// `in`: to be filled before the next run.
    PortRead {
        /// The port.
        port: u16,
        /// 1, 2 or 4.
        width: usize,
        /// The elements.
        data: &'a mut [u8],
    },
    /// A write where there is no memory.
    MmioWrite {
        /// Guest-physical address.
        address: u64,
        /// Up to 8 bytes.
        data: &'a [u8],
    },
    /// A read where there is no memory: to be filled before the next run.
    MmioRead {
        /// Guest-physical address.
        address: u64,
        /// Up to 8 bytes.
        data: &'a mut [u8],
    },
    /// A signal, or the wish for an immediate exit.
    Interrupted,
    /// The vCPU halted although the kernel has its local APIC.
    Halt,
    /// Triple fault.
    Shutdown,
    /// KVM could not go on: `suberror` of the KVM API.
    InternalError {
        /// 1: emulation, 2: simultaneous exceptions, 3: delivery of an event, 4: unexpected exit.
        suberror: u32,
    },
    /// The CPU refused the guest's state.
    FailEntry {
        /// What the hardware said.
        reason: u64,
    },
    /// `KVM_EXIT_SYSTEM_EVENT`.
    SystemEvent {
        /// Type of the event.
        kind: u32,
    },
    /// An exit that nobody asked for.
    Other(u32),
}

/// Makes a vCPU leave `KVM_RUN` at once, from another thread, together with a signal to its thread.
///
/// The byte is in memory shared with the kernel, which looks at it before it enters the guest: a signal that
/// comes too early, between the thread's last look at its orders and `KVM_RUN`, is not lost.
#[derive(Clone, Default)]
pub struct ImmediateExit(Arc<Mutex<Option<RunByte>>>);

struct RunByte(*const AtomicU8);

// SAFETY: it points to one byte of a shared mapping that is only ever accessed atomically from this process,
// and it is taken away, under the lock, before the mapping goes (`Vcpu`'s drop).
unsafe impl Send for RunByte {}

impl ImmediateExit {
    /// Asks for it; nothing happens if the vCPU is gone.
    pub fn request(&self) {
        self.set(1);
    }

    /// Lets the vCPU enter the guest again.
    pub fn withdraw(&self) {
        self.set(0);
    }

    fn set(&self, wanted: u8) {
        let byte = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(RunByte(byte)) = &*byte {
            // SAFETY: the mapping is there as long as the pointer is, and we hold the lock.
            unsafe { &**byte }.store(wanted, Ordering::SeqCst);
        }
    }
}

/// A vCPU, run by one thread.
pub struct Vcpu {
    fd: VcpuFd,
    immediate_exit: ImmediateExit,
    collected: Option<Arc<Mutex<()>>>,
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        *self
            .immediate_exit
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Vcpu {
    /// Makes vCPU `index`; its APIC id is the same.
    ///
    /// # Errors
    /// An ioctl failed.
    pub fn new(vm: &Vm, index: u8) -> Result<Vcpu, KvmError> {
        let mut fd = vm
            .fd()
            .create_vcpu(u64::from(index))
            .map_err(failed("KVM_CREATE_VCPU"))?;
        let collected = vm.collected();
        if collected.is_some() {
            fd.map_coalesced_mmio_ring()
                .map_err(failed("mapping the ring of collected writes"))?;
        }
        let byte: *mut u8 = &raw mut fd.get_kvm_run().immediate_exit;
        let byte = RunByte(byte.cast::<AtomicU8>());
        Ok(Vcpu {
            fd,
            immediate_exit: ImmediateExit(Arc::new(Mutex::new(Some(byte)))),
            collected,
        })
    }

    /// How to make it leave the guest.
    pub fn immediate_exit(&self) -> ImmediateExit {
        self.immediate_exit.clone()
    }

    /// Frequency of its TSC, in kHz.
    ///
    /// # Errors
    /// KVM does not say.
    pub fn tsc_khz(&self) -> Result<u32, KvmError> {
        self.fd.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))
    }

    /// Gives it its CPUID and what a firmware would have set; with an entry it is the one that starts,
    /// without it waits for the start-up interrupt of another.
    ///
    /// # Errors
    /// An ioctl failed.
    pub fn configure(
        &self,
        leaves: &[kvm_cpuid_entry2],
        entry: Option<&Entry>,
    ) -> Result<(), KvmError> {
        let cpuid = CpuId::from_entries(leaves).map_err(|_| KvmError::List)?;
        self.fd
            .set_cpuid2(&cpuid)
            .map_err(failed("KVM_SET_CPUID2"))?;
        let msrs = msr::boot(entry.is_some());
        let list = Msrs::from_entries(&msrs).map_err(|_| KvmError::List)?;
        let set = self.fd.set_msrs(&list).map_err(failed("KVM_SET_MSRS"))?;
        if set != msrs.len() {
            return Err(KvmError::Ioctl {
                what: "KVM_SET_MSRS",
                cause: Errno::INVAL,
            });
        }
        let mut pins = self.fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
        lapic::wire_pins(&mut pins);
        self.fd.set_lapic(&pins).map_err(failed("KVM_SET_LAPIC"))?;
        if let Some(entry) = entry {
            let fresh = self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
            self.fd
                .set_sregs(&registers::system(&fresh))
                .map_err(failed("KVM_SET_SREGS"))?;
            self.fd
                .set_regs(&registers::general(entry))
                .map_err(failed("KVM_SET_REGS"))?;
        }
        Ok(())
    }

    /// Enters the guest until it needs us. Writes to [`layout::PCI_ADDRESS_PORT`] that KVM collected go to
    /// `late` before the access that they are for.
    ///
    /// # Errors
    /// `KVM_RUN` itself failed: the vCPU cannot go on.
    pub fn run(&mut self, late: impl FnMut(u16, &[u8])) -> Result<Exit<'_>, Errno> {
        if let Err(cause) = self.fd.run() {
            return match cause.errno() {
                libc::EINTR | libc::EAGAIN => Ok(Exit::Interrupted),
                errno => Err(Errno::from_raw_os_error(errno)),
            };
        }
        self.deliver_collected(late);
        let run = self.fd.get_kvm_run();
        // SAFETY: `exit_reason` says which part of the union the kernel filled.
        unsafe {
            match run.exit_reason {
                KVM_EXIT_IO => Ok(port_access(run)),
                KVM_EXIT_MMIO => Ok(memory_access(&mut run.__bindgen_anon_1.mmio)),
                KVM_EXIT_HLT => Ok(Exit::Halt),
                KVM_EXIT_SHUTDOWN => Ok(Exit::Shutdown),
                KVM_EXIT_INTERNAL_ERROR => Ok(Exit::InternalError {
                    suberror: run.__bindgen_anon_1.internal.suberror,
                }),
                KVM_EXIT_FAIL_ENTRY => Ok(Exit::FailEntry {
                    reason: run
                        .__bindgen_anon_1
                        .fail_entry
                        .hardware_entry_failure_reason,
                }),
                KVM_EXIT_SYSTEM_EVENT => Ok(Exit::SystemEvent {
                    kind: run.__bindgen_anon_1.system_event.type_,
                }),
                other => Ok(Exit::Other(other)),
            }
        }
    }
}

impl Vcpu {
    fn deliver_collected(&mut self, mut late: impl FnMut(u16, &[u8])) {
        let Some(turn) = &self.collected else {
            return;
        };
        let run = self.fd.get_kvm_run();
        // SAFETY: the exit reason says that this part of the union is filled.
        let is_pci = run.exit_reason == KVM_EXIT_IO
            && layout::PCI_PORTS.contains(unsafe { &run.__bindgen_anon_1.io.port });
        if !is_pci {
            return;
        }
        // The ring is one for all vCPUs.
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        while let Ok(Some(write)) = self.fd.coalesced_mmio_read() {
            let bytes = (write.len as usize).min(write.data.len());
            late(write.phys_addr as u16, &write.data[..bytes]);
        }
    }
}

/// # Safety
/// The exit reason is `KVM_EXIT_IO`.
unsafe fn port_access(run: &mut kvm_bindings::kvm_run) -> Exit<'_> {
    let base = std::ptr::from_mut(run).cast::<u8>();
    // SAFETY: the caller says that this part of the union is filled.
    let io = unsafe { run.__bindgen_anon_1.io };
    let width = usize::from(io.size);
    let bytes = width * io.count as usize;
    // SAFETY: the kernel puts `count` elements of `size` bytes at `data_offset` inside the mapping of this
    // vCPU (KVM API, 5. "struct kvm_run"), which lives as long as the borrow of `run`.
    let data = unsafe { std::slice::from_raw_parts_mut(base.add(io.data_offset as usize), bytes) };
    if u32::from(io.direction) == KVM_EXIT_IO_IN {
        Exit::PortRead {
            port: io.port,
            width,
            data,
        }
    } else {
        Exit::PortWrite {
            port: io.port,
            width,
            data,
        }
    }
}

fn memory_access(mmio: &mut kvm_bindings::kvm_run__bindgen_ty_1__bindgen_ty_6) -> Exit<'_> {
    let address = mmio.phys_addr;
    let is_write = mmio.is_write != 0;
    let bytes = (mmio.len as usize).min(mmio.data.len());
    let data = &mut mmio.data[..bytes];
    if is_write {
        Exit::MmioWrite { address, data }
    } else {
        Exit::MmioRead { address, data }
    }
}
