//! Every guest-physical address and interrupt line that the VMM decides on, in one place. Overlaps do not
//! compile.
//!
//! ```text
//! 0x0000_0500  GDT that the entry state names        0x000a_0000  hole of a PC: a copy of PCI configuration space
//! 0x0000_6000  start info (PVH) and its module       0x0010_0000  kernel, initramfs, free memory
//! 0x0000_7000  memory map (PVH), zero page (bzImage) 0xc000_0000  hole: PCI BARs, then IOAPIC, LAPIC, KVM's own
//! 0x0002_0000  command line                          0x1_0000_0000  the memory that the hole pushed up
//! 0x0009_fc00  MP table                              behind it: memory that is plugged later, from a multiple of 2 GiB on
//! ```

use crate::memory::PAGE_BYTES;
use capsid_devices::pci::{COPY, COPY_BYTES, COPY_MARK};
use std::ops::Range;

/// The GDT that the entry state points to; the bzImage boot protocol demands one in memory.
pub const GDT_START: u64 = 0x500;
/// Room for the GDT, in bytes.
pub const GDT_BYTES: u64 = 0x40;
/// `struct hvm_start_info` of the PVH boot protocol, followed by its one module entry.
pub const START_INFO: u64 = 0x6000;
/// Room for both, in bytes.
pub const START_INFO_BYTES: u64 = 0x100;
/// The PVH memory map; for a bzImage the zero page (`struct boot_params`).
pub const BOOT_PARAMS: u64 = 0x7000;
/// Size of the zero page, in bytes.
pub const BOOT_PARAMS_BYTES: u64 = 0x1000;
/// The kernel's command line.
pub const CMDLINE: u64 = 0x2_0000;
/// The longest command line with its NUL, in bytes (`COMMAND_LINE_SIZE` of Linux on x86).
pub const CMDLINE_BYTES: u64 = 2048;
/// The MP table: the last KiB of base memory is one of the places where an OS looks for it
/// (MultiProcessor Specification 1.4, section 4).
pub const MP_TABLE: u64 = 0x9_fc00;
/// Room for the MP table, in bytes.
pub const MP_TABLE_BYTES: u64 = 0x400;
/// End of base memory; from here to [`KERNEL_MIN`] a PC has no memory, and ours the copy of PCI configuration space ([`PCI_COPY`]).
pub const BASE_MEMORY_END: u64 = 0xa_0000;
/// Nothing of the kernel or the initramfs may lie below.
pub const KERNEL_MIN: u64 = 0x10_0000;

/// Where memory ends and the hole begins.
pub const HOLE_START: u64 = 3 << 30;
/// Where memory goes on above the hole.
pub const HOLE_END: u64 = 4 << 30;
/// Where the VMM places PCI BARs.
pub const PCI_WINDOW: u64 = HOLE_START;
/// Size of the window for PCI BARs, in bytes.
pub const PCI_WINDOW_BYTES: u64 = 512 << 20;
/// The IOAPIC's registers (in the kernel of the host).
pub const IOAPIC: u64 = 0xfec0_0000;
/// The local APIC's registers (in the kernel of the host).
pub const LOCAL_APIC: u64 = 0xfee0_0000;
/// One page that KVM on Intel needs for a page table of its own (`KVM_SET_IDENTITY_MAP_ADDR`, its default).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM on Intel needs for a task state segment of its own (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS: u64 = 0xfffb_d000;

/// The interrupt line of the serial port.
pub const SERIAL_GSI: u32 = 4;
/// First port of the serial port (COM1).
pub const SERIAL_PORT: u64 = 0x3f8;
/// Ports of the serial port.
pub const SERIAL_PORTS: u64 = 8;

/// The address register of PCI configuration mechanism 1. Writing it does nothing until its data register,
/// which follows, is used.
pub const PCI_ADDRESS_PORT: u64 = 0xcf8;
/// Size of the address register, in bytes.
pub const PCI_ADDRESS_BYTES: u32 = 4;
/// Ports of the address and the data register.
pub const PCI_PORTS: Range<u16> = 0xcf8..0xd00;

/// The mark and the copy of PCI configuration space behind it (`devices/src/pci/copy.rs`), where no memory map has memory.
pub const PCI_COPY: Range<u64> = COPY_MARK..COPY + COPY_BYTES as u64;

const fn ends_before(start: u64, bytes: u64, next: u64) -> bool {
    start + bytes <= next
}

const _: () = {
    assert!(ends_before(GDT_START, GDT_BYTES, START_INFO));
    assert!(ends_before(START_INFO, START_INFO_BYTES, BOOT_PARAMS));
    assert!(ends_before(BOOT_PARAMS, BOOT_PARAMS_BYTES, CMDLINE));
    assert!(ends_before(CMDLINE, CMDLINE_BYTES, MP_TABLE));
    assert!(ends_before(MP_TABLE, MP_TABLE_BYTES, BASE_MEMORY_END));
    assert!(BASE_MEMORY_END <= PCI_COPY.start && PCI_COPY.end <= KERNEL_MIN);
    assert!(KERNEL_MIN < HOLE_START);
    assert!(ends_before(PCI_WINDOW, PCI_WINDOW_BYTES, IOAPIC));
    assert!(ends_before(IOAPIC, 0x1000, LOCAL_APIC));
    assert!(ends_before(LOCAL_APIC, 0x1000, KVM_IDENTITY_MAP));
    assert!(ends_before(KVM_IDENTITY_MAP, 0x1000, KVM_TSS));
    assert!(ends_before(KVM_TSS, 0x3000, HOLE_END));
};

/// The guest-physical ranges of `bytes` of memory: one, or two around the hole.
pub fn memory_ranges(bytes: u64) -> Vec<Range<u64>> {
    let low = 0..low_memory_end(bytes);
    let high = HOLE_END..HOLE_END + (bytes - low.end);
    [low, high]
        .into_iter()
        .filter(|range| !range.is_empty())
        .collect()
}

/// End of the memory below the hole.
pub fn low_memory_end(bytes: u64) -> u64 {
    bytes.min(HOLE_START)
}

/// Where an initramfs of `bytes` goes: at the last page of `room`, memory behind the kernel, from which on it fits; `None` if it does not.
pub fn initramfs_start(room: &Range<u64>, bytes: u64) -> Option<u64> {
    let start = room.end.checked_sub(bytes)? & !(PAGE_BYTES - 1);
    (start >= room.start).then_some(start)
}

/// Where the region of virtio-mem begins, at a multiple of this: the largest memory block of Linux on x86, by which it adds memory.
const PLUGGABLE_ALIGN: u64 = 2 << 30;
/// The length of the region is a multiple of this: the usual memory block of Linux on x86 (section size).
const PLUGGABLE_UNIT: u64 = 128 << 20;
/// Least size of a block: that of a huge page, so that unplugging takes none apart.
const BLOCK_MIN_BYTES: u64 = 2 << 20;
/// Most blocks: each that is plugged is a memory slot of KVM, which has 32,764 at most.
const BLOCKS_MAX: u64 = 4096;

/// Guest-physical address space for memory that is plugged while the guest runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pluggable {
    /// Behind all other memory, in whole memory blocks of Linux.
    pub range: Range<u64>,
    /// Size of the blocks that are plugged, a power of two, in bytes.
    pub block_bytes: u64,
    /// How much of it may ever be plugged, in bytes.
    pub max_bytes: u64,
}

/// What may be plugged into a guest that begins with `bytes` of memory and has at most `max`.
pub fn pluggable(bytes: u64, max: u64) -> Pluggable {
    let end = memory_ranges(bytes).last().map_or(0, |range| range.end);
    let start = end.max(HOLE_END).next_multiple_of(PLUGGABLE_ALIGN);
    let max_bytes = max.saturating_sub(bytes);
    let length = max_bytes.next_multiple_of(PLUGGABLE_UNIT);
    let block_bytes = length.div_ceil(BLOCKS_MAX).next_power_of_two();
    Pluggable {
        range: start..start + length,
        block_bytes: block_bytes.max(BLOCK_MIN_BYTES),
        max_bytes,
    }
}

/// What a memory map entry says of its range; the numbers of the e820 interface and of PVH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MapKind {
    /// The OS may use it.
    Ram = 1,
    /// The OS must leave it alone.
    Reserved = 2,
}

/// The memory map that the guest is told, in ascending order.
pub fn memory_map(bytes: u64) -> Vec<(Range<u64>, MapKind)> {
    let mut map = vec![
        (0..MP_TABLE, MapKind::Ram),
        (MP_TABLE..BASE_MEMORY_END, MapKind::Reserved),
        (KERNEL_MIN..low_memory_end(bytes), MapKind::Ram),
    ];
    if bytes > HOLE_START {
        map.push((HOLE_END..HOLE_END + (bytes - HOLE_START), MapKind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_up_to_the_hole_is_one_range() {
        let ranges = memory_ranges(3 * GIB);
        assert_eq!((ranges.len(), &ranges[0]), (1, &(0..3 * GIB)));
        assert_eq!(memory_map(3 * GIB).len(), 3);
    }

    #[test]
    fn memory_beyond_the_hole_goes_on_above_it_and_none_is_lost() {
        let bytes = 3 * GIB + (1 << 20);
        assert_eq!(
            memory_ranges(bytes),
            [0..3 * GIB, 4 * GIB..4 * GIB + (1 << 20)]
        );
        assert_eq!(
            memory_ranges(bytes)
                .iter()
                .map(|range| range.end - range.start)
                .sum::<u64>(),
            bytes
        );
        assert_eq!(
            memory_map(bytes).last(),
            Some(&(4 * GIB..4 * GIB + (1 << 20), MapKind::Ram))
        );
    }

    #[test]
    fn the_map_never_calls_the_mp_table_or_the_hole_free_memory() {
        for (range, kind) in memory_map(512 * GIB) {
            if kind == MapKind::Ram {
                assert!(range.end <= MP_TABLE || range.start >= KERNEL_MIN);
                assert!(range.end <= HOLE_START || range.start >= HOLE_END);
            }
        }
    }

    #[test]
    fn what_is_plugged_lies_behind_all_memory_in_whole_memory_blocks() {
        const MIB: u64 = 1 << 20;
        let small = pluggable(256 * MIB, 1024 * MIB);
        assert_eq!(
            small,
            Pluggable {
                range: 4 * GIB..4 * GIB + 768 * MIB,
                block_bytes: 2 * MIB,
                max_bytes: 768 * MIB,
            }
        );
        let above = pluggable(5 * GIB, 5 * GIB + 3 * MIB);
        assert_eq!(above.range, 6 * GIB..6 * GIB + 128 * MIB);
        assert_eq!(above.max_bytes, 3 * MIB);
    }

    #[test]
    fn every_size_has_few_blocks_that_fill_the_region() {
        for bytes in [64 << 20, 3 * GIB, 3 * GIB + (1 << 20), 300 * GIB] {
            for more in [1 << 20, 8 * GIB, 8 * GIB + (1 << 20), 100 * GIB, 512 * GIB] {
                let pluggable = pluggable(bytes, bytes + more);
                let length = pluggable.range.end - pluggable.range.start;
                let block = pluggable.block_bytes;
                assert!(length % block == 0 && length / block <= BLOCKS_MAX);
                assert!(block.is_power_of_two() && block <= PLUGGABLE_UNIT);
                assert!(length >= more && pluggable.range.start % block == 0);
                let last = memory_ranges(bytes).last().unwrap().end;
                assert!(pluggable.range.start >= last.max(HOLE_END));
            }
        }
    }
}

#[cfg(test)]
#[path = "layout_proofs.rs"]
mod proofs;
