//! The machine under the guest: ports, device registers, its own memory. The only module that touches
//! an address; what it is given is checked against where that may be, so that a mistake of the guest's own is a panic that is
//! told and not a wild write.
#![allow(unsafe_code)] // Port and register accesses are instructions, and memory is addresses.

use core::arch::asm;
use core::ops::Range;

/// Memory that the drivers use: behind the image, up to the end of the 64 MiB that this guest is given.
pub(crate) const RAM: Range<u64> = 0x20_0000..0x400_0000;
/// What the loader wrote: start info and command line.
const BOOT: Range<u64> = 0x6000..0x2_1000;
/// Where devices answer, and the hole around them.
const DEVICES: Range<u64> = 0xc000_0000..0x1_0000_0000;

/// A plain number as it lies in memory and in registers, little-endian.
pub(crate) trait Number: Copy {
    /// Its bits as the lowest of 64.
    fn wide(self) -> u64;
    /// The lowest bits of 64.
    fn narrow(bits: u64) -> Self;
}

macro_rules! number {
    ($($kind:ty)*) => {$(
        impl Number for $kind {
            fn wide(self) -> u64 {
                u64::from(self)
            }
            fn narrow(bits: u64) -> $kind {
                bits as $kind
            }
        }
    )*};
}
number!(u8 u16 u32 u64);

/// Writes a port; `T` is 1, 2 or 4 bytes wide.
pub(crate) fn out<T: Number>(port: u16, value: T) {
    let value = value.wide() as u32;
    // SAFETY: port accesses touch no memory of this program; all devices behind them are the VMM's.
    unsafe {
        match size_of::<T>() {
            1 => asm!("out dx, al", in("dx") port, in("al") value as u8, options(nomem, nostack)),
            2 => asm!("out dx, ax", in("dx") port, in("ax") value as u16, options(nomem, nostack)),
            _ => asm!("out dx, eax", in("dx") port, in("eax") value, options(nomem, nostack)),
        }
    }
}

/// Reads a port; `T` is 1, 2 or 4 bytes wide.
pub(crate) fn inp<T: Number>(port: u16) -> T {
    let mut value: u32 = 0;
    // SAFETY: as in `out`.
    unsafe {
        match size_of::<T>() {
            1 => asm!("in al, dx", in("dx") port, inout("eax") value, options(nomem, nostack)),
            2 => asm!("in ax, dx", in("dx") port, inout("eax") value, options(nomem, nostack)),
            _ => asm!("in eax, dx", in("dx") port, inout("eax") value, options(nomem, nostack)),
        }
    }
    T::narrow(u64::from(value))
}

/// Writes bytes to a port, one after the other, by one instruction.
pub(crate) fn out_many(port: u16, bytes: &[u8]) {
    // SAFETY: the instruction reads `bytes` and nothing else.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rcx") bytes.len() => _, inout("rsi") bytes.as_ptr() => _,
             options(nostack, preserves_flags, readonly));
    }
}

/// Reads a device's register.
pub(crate) fn load<T: Number>(address: u64) -> T {
    assert!(DEVICES.contains(&address), "no device at {address:#x}");
    // SAFETY: no Rust object lies there; the pages are mapped, and the access is one instruction of this width.
    unsafe { read(address) }
}

/// Writes a device's register.
pub(crate) fn store<T: Number>(address: u64, value: T) {
    assert!(DEVICES.contains(&address), "no device at {address:#x}");
    // SAFETY: as in `load`.
    unsafe { write(address, value) }
}

/// Writes a device's register so many times, as fast as this CPU can.
pub(crate) fn store_many(address: u64, value: u16, times: u32) {
    assert!(DEVICES.contains(&address), "no device at {address:#x}");
    if times > 0 {
        // SAFETY: as in `load`; the loop ends at zero.
        unsafe {
            asm!("2:", "mov [{}], ax", "dec ecx", "jnz 2b", in(reg) address, in("ax") value, inout("ecx") times => _,
                 options(nostack));
        }
    }
}

/// Reads a register of the CPU's own; only such as are always there, or it faults.
pub(crate) fn read_msr(number: u32) -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: reading the local APIC's registers changes nothing.
    unsafe {
        asm!("rdmsr", in("ecx") number, out("eax") low, out("edx") high, options(nomem, nostack));
    }
    u64::from(high) << 32 | u64::from(low)
}

/// Writes a register of the CPU's own.
pub(crate) fn write_msr(number: u32, value: u32) {
    // SAFETY: interrupts are off and stay off, so nothing that the local APIC is told changes what this program does.
    unsafe {
        asm!("wrmsr", in("ecx") number, in("eax") value, in("edx") 0, options(nomem, nostack));
    }
}

/// Reads memory that devices share.
pub(crate) fn peek<T: Number>(address: u64) -> T {
    let boot = BOOT.contains(&address);
    assert!(boot || inside::<T>(address), "no memory at {address:#x}");
    // SAFETY: inside `RAM` or what the loader wrote, where no Rust object lies. x86 keeps the order of reads.
    unsafe { read(address) }
}

/// Writes memory that devices share.
pub(crate) fn poke<T: Number>(address: u64, value: T) {
    assert!(inside::<T>(address), "no memory at {address:#x}");
    // SAFETY: inside `RAM`, where no Rust object lies. x86 keeps the order of writes.
    unsafe { write(address, value) }
}

fn inside<T>(address: u64) -> bool {
    RAM.contains(&address) && RAM.end - address >= size_of::<T>() as u64
}

unsafe fn read<T: Number>(address: u64) -> T {
    let bits: u64;
    // SAFETY: the caller's promise.
    unsafe {
        match size_of::<T>() {
            1 => {
                asm!("movzx eax, byte ptr [{}]", in(reg) address, out("rax") bits, options(nostack));
            }
            2 => {
                asm!("movzx eax, word ptr [{}]", in(reg) address, out("rax") bits, options(nostack));
            }
            4 => asm!("mov eax, [{}]", in(reg) address, out("rax") bits, options(nostack)),
            _ => asm!("mov rax, [{}]", in(reg) address, out("rax") bits, options(nostack)),
        }
    }
    T::narrow(bits)
}

unsafe fn write<T: Number>(address: u64, value: T) {
    let bits = value.wide();
    // SAFETY: the caller's promise.
    unsafe {
        match size_of::<T>() {
            1 => asm!("mov [{}], al", in(reg) address, in("rax") bits, options(nostack)),
            2 => asm!("mov [{}], ax", in(reg) address, in("rax") bits, options(nostack)),
            4 => asm!("mov [{}], eax", in(reg) address, in("rax") bits, options(nostack)),
            _ => asm!("mov [{}], rax", in(reg) address, in("rax") bits, options(nostack)),
        }
    }
}

/// All writes so far are there before any read behind this, as EVENT_IDX demands (virtio 1.2 section 2.7.13.4).
pub(crate) fn fence() {
    // SAFETY: orders memory and does nothing else.
    unsafe { asm!("mfence", options(nostack, preserves_flags)) }
}

/// A wait that ends. It counts looks and not time: the guest has no interrupts and no clock, for a KVM without hardware emulates
/// few of the instructions that they take.
pub(crate) struct Patience(u32);

impl Patience {
    /// So many looks.
    pub(crate) fn looks(looks: u32) -> Patience {
        Patience(looks)
    }

    /// Whether there is another look.
    pub(crate) fn lasts(&mut self) -> bool {
        let left = self.0.checked_sub(1);
        self.0 = left.unwrap_or(0);
        left.is_some()
    }
}

/// Stops for ever.
pub(crate) fn halt() -> ! {
    loop {
        // SAFETY: waits for an interrupt, of which none is let through.
        unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
    }
}
