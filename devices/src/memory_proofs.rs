//! Proof: a range is given as a slice if and only if it has a byte and all of it is memory of one region, never a byte of a hole or of an
//! unplugged block, whatever sum wraps; and the slice is exactly the bytes asked for.
//!
//! The model is a list of extents, each as long as it can be, in arithmetic that does not wrap. All ranges of a memory of 64 addresses are
//! enumerated under every set of plugged blocks; on a memory as large as a real one, all edges of it and of the numbers themselves are crossed.

use super::*;
use crate::testing::{EDGES, around, memory_with_blocks};
use proptest::prelude::*;
use std::ops::Range;

/// Memory in one piece: all of a boot region, or neighbouring plugged blocks.
type Extents = Vec<Range<u128>>;

/// A memory and what the model needs to know of it.
struct Shape {
    boot: &'static [(u64, usize)],
    pluggable: (u64, usize),
    block_bytes: u64,
}

/// Boot memory with a hole and with two regions that touch, then four blocks and half a one.
const SMALL: Shape = Shape {
    boot: &[(0, 8), (16, 8), (24, 4)],
    pluggable: (40, 18),
    block_bytes: 4,
};
const SMALL_END: u64 = 64;

/// A PC's memory, its last region at the end of the address space.
const LARGE: Shape = Shape {
    boot: &[(0, 3 << 30), (4 << 30, 1 << 30), (LARGE_LAST, 4096)],
    pluggable: (6 << 30, 64 << 20),
    block_bytes: 2 << 20,
};
/// The last page of the address space can be no region: its end would be 2^64.
const LARGE_LAST: u64 = u64::MAX - 8191;

impl Shape {
    fn memory(&self) -> (GuestMemory, Arc<Blocks>) {
        // In order, wherever the blocks are.
        let (before, behind): (Vec<_>, Vec<_>) = self
            .boot
            .iter()
            .partition(|(start, _)| *start < self.pluggable.0);
        let mut memory = (*memory_with_blocks(&before, self.pluggable, self.block_bytes)).clone();
        for (start, length) in behind {
            let region = Region::boot(start, MmapRegion::new(length).unwrap()).unwrap();
            memory = memory.insert_region(Arc::new(region)).unwrap();
        }
        let blocks = memory.iter().find_map(Region::blocks).map(Arc::clone);
        (Arc::new(memory), blocks.unwrap())
    }

    fn blocks(&self) -> u64 {
        self.pluggable.1 as u64 / self.block_bytes
    }

    fn extents(&self, plugged: impl Fn(u64) -> bool) -> Extents {
        let range = |start: u64, length: u64| {
            let start = u128::from(start);
            start..start + u128::from(length)
        };
        let boot = self.boot.iter();
        let mut extents: Extents = boot.map(|(at, bytes)| range(*at, *bytes as u64)).collect();
        let mut last: Option<Range<u128>> = None;
        for number in 0..self.blocks() {
            let start = self.pluggable.0 + number * self.block_bytes;
            last = match (last, plugged(number)) {
                (Some(before), true) => {
                    Some(before.start..before.end + u128::from(self.block_bytes))
                }
                (None, true) => Some(range(start, self.block_bytes)),
                (before, false) => {
                    extents.extend(before);
                    None
                }
            };
        }
        extents.extend(last);
        extents
    }
}

/// The property itself.
fn granted(extents: &Extents, address: u64, bytes: usize) -> bool {
    let (start, bytes) = (u128::from(address), bytes as u128);
    let inside = |extent: &Range<u128>| extent.start <= start && start + bytes <= extent.end;
    bytes > 0 && extents.iter().any(inside)
}

/// What is written to each address of the small memory, so that a slice tells where it lies.
fn mark(address: u64) -> u8 {
    0x80 | address as u8
}

#[test]
fn every_range_of_a_small_memory_is_given_exactly_if_all_of_it_is_granted() {
    let (memory, blocks) = SMALL.memory();
    (0..SMALL.blocks()).for_each(|number| blocks.set(number, true));
    for address in 0..SMALL_END {
        let _ = write(&memory, address, &[mark(address)]);
    }
    let (mut given, mut refused) = (0, 0);
    // Of the half block too, and of one behind it: they are never memory.
    let numbers = SMALL.blocks() + 2;
    for set in 0..1u64 << numbers {
        let plugged = |number: u64| set >> number & 1 == 1;
        (0..numbers).for_each(|number| blocks.set(number, plugged(number)));
        let extents = SMALL.extents(plugged);
        for address in 0..SMALL_END {
            for bytes in 0..=SMALL_END as usize {
                let slice = slice_of(&memory, address, bytes);
                let expected = granted(&extents, address, bytes);
                assert_eq!(slice.is_ok(), expected, "{set:#b}: {address}+{bytes}");
                let Ok(slice) = slice else {
                    refused += 1;
                    continue;
                };
                given += 1;
                let mut seen = vec![0; bytes + 1];
                assert_eq!((slice.len(), slice.copy_to(&mut seen)), (bytes, bytes));
                let marks = (address..).take(bytes).map(mark);
                assert!(
                    seen.iter().copied().take(bytes).eq(marks),
                    "{address}+{bytes}"
                );
            }
        }
    }
    // Neither side of the property is empty.
    assert!(given > 1000 && refused > 1000, "{given} {refused}");
}

#[test]
fn structures_writes_and_fields_are_given_exactly_as_their_slices_are() {
    let (memory, blocks) = SMALL.memory();
    blocks.set(1, true);
    for address in around((0..SMALL_END).chain(EDGES)) {
        let given = |bytes| slice_of(&memory, address, bytes).is_ok();
        assert_eq!(
            read::<u64>(&memory, address).is_ok(),
            given(8),
            "{address:#x}"
        );
        assert_eq!(
            read::<u8>(&memory, address).is_ok(),
            given(1),
            "{address:#x}"
        );
        let whole = load(&memory, address).is_ok();
        assert_eq!(whole, given(2) && address % 2 == 0, "{address:#x}");
        for bytes in 0..10 {
            let before = contents(&memory);
            let new: Vec<u8> = (0..bytes as u8)
                .map(|byte| byte ^ address as u8 | 0x40)
                .collect();
            assert_eq!(write(&memory, address, &new).is_ok(), given(bytes));
            let mut expected = before;
            let places = given(bytes).then(|| expected.iter_mut().skip(address as usize));
            places
                .into_iter()
                .flatten()
                .zip(&new)
                .for_each(|(place, byte)| *place = Some(*byte));
            assert_eq!(contents(&memory), expected, "{address:#x}+{bytes}");
        }
    }
}

/// Each address of the small memory, byte by byte.
fn contents(memory: &GuestMemory) -> Vec<Option<u8>> {
    (0..SMALL_END)
        .map(|address| read(memory, address).ok())
        .collect()
}

/// Blocks of which both neighbours, one or none is plugged, and the first and the last.
fn plugged_in_large(number: u64) -> bool {
    number % 5 < 2 || number == LARGE.blocks() - 1
}

#[test]
fn edges_of_memory_and_of_numbers_crossed_are_given_exactly_if_granted() {
    let (memory, blocks) = LARGE.memory();
    (0..LARGE.blocks()).for_each(|number| blocks.set(number, plugged_in_large(number)));
    let extents = LARGE.extents(plugged_in_large);
    let ends = extents
        .iter()
        .flat_map(|extent| [extent.start as u64, extent.end as u64]);
    let places = around(ends.chain(EDGES));
    let mut given = 0;
    for address in &places {
        // Up to and beyond each other edge, backwards too, where the sum wraps; and each edge as a length.
        let lengths = places
            .iter()
            .map(|end| end.wrapping_sub(*address))
            .chain(EDGES);
        for bytes in around(lengths) {
            let slice = slice_of(&memory, *address, bytes as usize);
            let expected = granted(&extents, *address, bytes as usize);
            assert_eq!(slice.is_ok(), expected, "{address:#x}+{bytes:#x}");
            if let Ok(slice) = slice {
                assert_eq!(slice.len() as u64, bytes);
                given += 1;
            }
        }
    }
    assert!(given > 100, "{given}");
}

proptest! {
    #[test]
    fn any_range_is_given_exactly_if_granted(
        address in prop_oneof![any::<u64>(), 0u64..8 << 30, (6u64 << 30)..(6 << 30) + (64 << 20)],
        bytes in prop_oneof![any::<usize>(), 0usize..4 << 30, 0usize..5 << 20],
        set in any::<u32>(),
    ) {
        let (memory, blocks) = LARGE.memory();
        let plugged = |number: u64| set >> number & 1 == 1;
        (0..LARGE.blocks()).for_each(|number| blocks.set(number, plugged(number)));
        let given = slice_of(&memory, address, bytes).is_ok();
        prop_assert_eq!(given, granted(&LARGE.extents(plugged), address, bytes));
    }
}
