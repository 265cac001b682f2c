//! Proof: of every size, the guest's memory is all there and none of it twice; no region, no slot and no block that is plugged later
//! touches the hole with its BARs and interrupt controllers; what the guest is told is its memory and what the VMM keeps in it is not
//! called free; kernel, initramfs and boot parameters lie inside and apart; and the blocks begin behind it all, aligned, and hold all that may
//! be plugged.
//!
//! The model is the PC's map written down again below, in 128 bits. Every size of 1 MiB steps up to 8 GiB is tried, and the largest ones; with
//! each, memory to plug from one MiB to all that a configuration admits.

use super::*;
use crate::slots::{LaterBars, WINDOW_BYTES, WINDOWS};
use capsid_protocol::machine::MemoryMib;
use vm_memory::{GuestMemory as _, GuestMemoryRegion};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// What no memory may touch: from the first BAR to the end of the 32-bit addresses.
const DEVICES: Range<u64> = 0xc000_0000..0x1_0000_0000;

/// The parts of the hole, each with its length.
const IN_THE_HOLE: [(u64, u64); 5] = [
    (PCI_WINDOW, PCI_WINDOW_BYTES),
    (IOAPIC, 0x1000),
    (LOCAL_APIC, 0x1000),
    (KVM_IDENTITY_MAP, 0x1000),
    (KVM_TSS, 0x3000),
];

/// What the VMM writes below the kernel, each with its length.
const KEPT: [(u64, u64); 5] = [
    (GDT_START, GDT_BYTES),
    (START_INFO, START_INFO_BYTES),
    (BOOT_PARAMS, BOOT_PARAMS_BYTES),
    (CMDLINE, CMDLINE_BYTES),
    (MP_TABLE, MP_TABLE_BYTES),
];

/// Every size in MiB up to 8 GiB, and the last ones.
fn sizes() -> impl Iterator<Item = u64> {
    let last = MemoryMib::MAX - 1025..=MemoryMib::MAX;
    (MemoryMib::MIN..=8192).chain(last).map(|mib| mib * MIB)
}

fn length(range: &Range<u64>) -> u128 {
    u128::from(range.end) - u128::from(range.start)
}

fn apart(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.end <= b.start || b.end <= a.start
}

fn ascending(ranges: &[Range<u64>]) -> bool {
    let ordered = ranges.windows(2).all(|pair| pair[0].end <= pair[1].start);
    ordered && ranges.iter().all(|range| range.start < range.end)
}

fn placed((start, bytes): (u64, u64)) -> Range<u64> {
    start..start + bytes
}

/// Of the map, what is memory that the guest may use.
fn ram(bytes: u64) -> Vec<Range<u64>> {
    let map = memory_map(bytes).into_iter();
    let ram = map.filter(|(_, kind)| *kind == MapKind::Ram);
    ram.map(|(range, _)| range).collect()
}

#[test]
fn memory_of_every_size_is_whole_ascending_and_outside_the_hole() {
    for bytes in sizes() {
        let ranges = memory_ranges(bytes);
        assert!(ascending(&ranges), "{bytes:#x}: {ranges:x?}");
        assert_eq!(ranges.iter().map(length).sum::<u128>(), u128::from(bytes));
        assert_eq!(ranges.first().map(|range| range.start), Some(0));
        assert!(
            ranges.iter().all(|range| apart(range, &DEVICES)),
            "{bytes:#x}: {ranges:x?}"
        );
        for range in &ranges {
            // Slots of KVM are whole pages; huge pages need the same alignment on both sides.
            assert!(
                range.start % (2 * MIB) == 0 && length(range) % 4096 == 0,
                "{ranges:x?}"
            );
        }
        assert_eq!(low_memory_end(bytes), ranges[0].end);
    }
}

#[test]
fn the_map_of_every_size_tells_all_memory_but_what_a_pc_has_not() {
    for bytes in sizes() {
        let (ranges, ram) = (memory_ranges(bytes), ram(bytes));
        let map: Vec<Range<u64>> = memory_map(bytes)
            .into_iter()
            .map(|(range, _)| range)
            .collect();
        assert!(ascending(&map), "{bytes:#x}: {map:x?}");
        for told in &map {
            let inside = |range: &Range<u64>| range.start <= told.start && told.end <= range.end;
            assert_eq!(
                ranges.iter().filter(|range| inside(range)).count(),
                1,
                "{told:x?}"
            );
        }
        // What is not told free is what lies between the MP table and the kernel, and no more.
        let kept = u128::from(KERNEL_MIN - MP_TABLE);
        assert_eq!(
            ram.iter().map(length).sum::<u128>() + kept,
            u128::from(bytes)
        );
        assert!(
            ram.iter()
                .all(|range| apart(range, &(MP_TABLE..KERNEL_MIN)))
        );
        // A map that the guest's formats have room for: 128 entries in the zero page.
        assert!(map.len() <= 4);
    }
}

#[test]
fn what_the_vmm_keeps_and_what_a_kernel_may_take_lie_apart_in_low_memory() {
    let kept: Vec<Range<u64>> = KEPT.into_iter().map(placed).collect();
    assert!(ascending(&kept), "{kept:x?}");
    for bytes in sizes() {
        let kernel = KERNEL_MIN..low_memory_end(bytes);
        assert!(length(&kernel) >= u128::from(63 * MIB));
        assert!(
            kept.iter()
                .all(|range| apart(range, &kernel) && range.end <= BASE_MEMORY_END)
        );
        assert!(ram(bytes).contains(&kernel));
        assert!(apart(&kernel, &DEVICES) && kernel.end <= memory_ranges(bytes)[0].end);
    }
}

#[test]
fn an_initramfs_lies_at_the_last_page_behind_the_kernel_that_holds_it() {
    // Kernels that end anywhere in a page, memory that ends anywhere too: a bzImage's own bound need not be a page's.
    let edges = |page: u64| [0, 1, 2, 4095].map(|byte| page * 4096 + byte);
    let ends: Vec<u64> = (0..4)
        .flat_map(edges)
        .map(|end| 3 * GIB - 16384 + end)
        .collect();
    for start in &ends {
        for end in &ends {
            for bytes in (0..5).flat_map(edges).chain([3 * GIB, u64::MAX]) {
                let fits = |page: &u64| {
                    u128::from(*page) + u128::from(bytes) <= u128::from(*end) && page >= start
                };
                let pages = (0..=5).map(|page| 3 * GIB - 16384 + page * 4096);
                let expected = pages.filter(fits).max();
                let found = initramfs_start(&(*start..*end), bytes);
                assert_eq!(found, expected, "{bytes:#x} bytes in {start:#x}..{end:#x}");
            }
        }
    }
}

#[test]
fn the_regions_that_are_mapped_are_those_of_the_layout() {
    for mib in [64, 3071, 3072, 3073, 4096, 5000] {
        let plugged = pluggable(mib * MIB, (mib + 300) * MIB);
        let size = MemoryMib::try_from(mib).unwrap();
        // Only what is touched is backed.
        let Ok(memory) = crate::memory::map(size, Some(&plugged)) else {
            eprintln!("SKIPPED the_regions_that_are_mapped of {mib} MiB: this host has less");
            continue;
        };
        let mapped = memory.iter().map(|region| {
            let start = region.start_addr().0;
            (start..start + region.len(), region.blocks().is_some())
        });
        let boot = memory_ranges(mib * MIB).into_iter();
        let expected = boot
            .map(|range| (range, false))
            .chain([(plugged.range.clone(), true)]);
        assert!(mapped.eq(expected), "{mib} MiB");
    }
}

#[test]
fn the_hole_holds_each_device_once() {
    let parts: Vec<Range<u64>> = IN_THE_HOLE.into_iter().map(placed).collect();
    assert!(ascending(&parts), "{parts:x?}");
    let inside = |range: &Range<u64>| DEVICES.start <= range.start && range.end <= DEVICES.end;
    assert!(parts.iter().all(inside));
    assert_eq!((HOLE_START, HOLE_END), (DEVICES.start, DEVICES.end));
    let window = placed((PCI_WINDOW, PCI_WINDOW_BYTES));
    for first in 0..WINDOWS {
        // Devices that come later have the windows behind the `first` ones of the start.
        let later = LaterBars::new(0, first);
        let bars = placed((later.start(), later.bytes()));
        let start = placed((PCI_WINDOW, (first as u64 + 1) * WINDOW_BYTES));
        assert!(
            window.start <= bars.start && bars.end <= window.end,
            "{bars:x?}"
        );
        assert!(start.end <= bars.start);
    }
}

#[test]
fn what_may_be_plugged_into_every_size_begins_behind_it_in_whole_blocks() {
    for bytes in sizes() {
        let last = memory_ranges(bytes).last().map_or(0, |range| range.end);
        let most = MemoryMib::MAX * MIB - bytes;
        let few = [
            0,
            MIB,
            2 * MIB,
            127 * MIB,
            128 * MIB,
            129 * MIB,
            8 * GIB,
            8 * GIB + MIB,
        ];
        for more in few.into_iter().chain([most]).filter(|more| *more <= most) {
            let plugged = pluggable(bytes, bytes + more);
            let (range, block) = (&plugged.range, plugged.block_bytes);
            let told = format!("{bytes:#x} and {more:#x}: {plugged:x?}");
            assert_eq!(plugged.max_bytes, more, "{told}");
            assert!(
                range.start >= last.max(DEVICES.end) && apart(range, &DEVICES),
                "{told}"
            );
            // Linux adds whole memory blocks: 2 GiB where there is much memory, else 128 MiB.
            assert!(
                range.start % (2 * GIB) == 0 && length(range) % u128::from(128 * MIB) == 0,
                "{told}"
            );
            assert!(
                length(range) >= u128::from(more) && length(range) < u128::from(more + 128 * MIB),
                "{told}"
            );
            assert!(
                block.is_power_of_two() && block >= 2 * MIB && range.start % block == 0,
                "{told}"
            );
            let blocks = length(range) / u128::from(block);
            assert!(
                blocks * u128::from(block) == length(range) && blocks <= 4096,
                "{told}"
            );
            // No CPU that runs guests has fewer than 40 address bits: KVM's own limit for 512 GiB and as much to plug.
            assert!(range.end <= 1 << 40, "{told}");
        }
        // A most that is below the size plugs nothing.
        assert!(pluggable(bytes, bytes - MIB).range.is_empty());
    }
}
