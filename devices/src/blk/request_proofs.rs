//! Proof: a request to read or to write is accepted if and only if it has whole sectors and all of them are on the disk; one to discard or
//! to zero if and only if that holds for each of its 1 to 16 ranges and none is longer than was told; and what is accepted is exactly the
//! bytes that were asked for.
//!
//! The model adds and multiplies in 128 bits. Every request to every disk of up to eight sectors is enumerated, and on disks of all sizes
//! the edges of all numbers are crossed.

use super::*;
use crate::GuestMemory;
use crate::memory::write;
use crate::testing::{EDGES, around, memory};
use crate::virtio::chain::{Buffers, Table};
use proptest::prelude::*;

/// The most sectors of a disk: its bytes are a file's, at most `i64::MAX`.
const SECTORS_MAX: u64 = i64::MAX as u64 / SECTOR_BYTES;
/// Where the descriptor and what the driver sends are.
const TABLE: u64 = 0x1000;
const SENT: u64 = 0x1_0000;
/// The small disks' most sectors.
const SMALL: u64 = 8;

fn limits(sectors: u64) -> Limits {
    Limits {
        sectors,
        read_only: false,
        discard: true,
        write_zeroes: true,
    }
}

/// What the driver sends, in a chain that is used again and again.
struct Driver(GuestMemory);

impl Driver {
    fn new() -> Driver {
        Driver(memory(&[(0, 1 << 20)]))
    }

    fn parse(&self, sent: &[u8], room: u64, limits: Limits) -> Result<Request, Status> {
        let mut descriptor = SENT.to_le_bytes().to_vec();
        descriptor.extend((sent.len() as u64).to_le_bytes());
        write(&self.0, TABLE, &descriptor).unwrap();
        write(&self.0, SENT, sent).unwrap();
        let queue = Table {
            address: TABLE,
            size: 1,
            indirect: false,
        };
        let mut chain = Buffers::walk(&self.0, queue, 0).unwrap();
        Request::parse(&mut chain.readable, room as usize, limits)
    }
}

fn asked(kind: u32, sector: u64, rest: usize) -> Vec<u8> {
    let mut sent = u64::from(kind).to_le_bytes().to_vec();
    sent.extend(sector.to_le_bytes());
    sent.resize(sent.len() + rest, 0);
    sent
}

fn with_ranges(kind: u32, ranges: &[(u64, u32, u32)]) -> Vec<u8> {
    let mut sent = asked(kind, 0, 0);
    for (sector, count, flags) in ranges {
        sent.extend(sector.to_le_bytes());
        sent.extend(count.to_le_bytes());
        sent.extend(flags.to_le_bytes());
    }
    sent
}

/// The property for one range of bytes, and the bytes if it holds.
fn on_disk(sectors: u64, sector: u64, bytes: u64) -> Option<Extent> {
    let (start, length) = (u128::from(sector) * 512, u128::from(bytes));
    let inside = start + length <= u128::from(sectors) * 512;
    (inside && bytes % 512 == 0).then(|| Extent {
        offset: start.try_into().unwrap(),
        length: bytes,
    })
}

fn ranges_on_disk(
    sectors: u64,
    ranges: &[(u64, u32, u32)],
    longest: u32,
    flags_known: u32,
) -> Option<Vec<(Extent, bool)>> {
    let one = |(sector, count, flags): &(u64, u32, u32)| {
        let extent = on_disk(sectors, *sector, u64::from(*count) * 512)?;
        let fine = *count <= longest && flags & !flags_known == 0;
        fine.then_some((extent, flags & 1 == 1))
    };
    let all: Option<Vec<_>> = ranges.iter().map(one).collect();
    all.filter(|all| (1..=16).contains(&all.len()))
}

/// Asks both ways for the same bytes; whether they were given.
fn transfer(driver: &Driver, sectors: u64, sector: u64, bytes: u64) -> bool {
    let expected = on_disk(sectors, sector, bytes);
    let read = driver.parse(&asked(kind::IN, sector, 0), bytes, limits(sectors));
    let told = format!("{bytes} bytes at {sector} of {sectors}");
    assert_eq!(
        read,
        expected.map(Request::Read).ok_or(Status::IoError),
        "{told}"
    );
    // What is written lies in memory, of which there is less.
    if bytes <= 2 * SMALL * 512 {
        let sent = asked(kind::OUT, sector, bytes as usize);
        let written = driver.parse(&sent, 0, limits(sectors));
        assert_eq!(
            written,
            expected.map(Request::Write).ok_or(Status::IoError),
            "{told}"
        );
    }
    expected.is_some()
}

/// Asks to discard and to zero; whether the first was done.
fn give_up(driver: &Driver, sectors: u64, ranges: &[(u64, u32, u32)]) -> bool {
    let told = format!("{ranges:?} of {sectors}");
    let sent = with_ranges(kind::DISCARD, ranges);
    let discarded = driver.parse(&sent, 0, limits(sectors)).ok();
    let expected = ranges_on_disk(sectors, ranges, 1 << 22, 0);
    let extents = |all: Vec<(Extent, bool)>| all.into_iter().map(|(extent, _)| extent).collect();
    assert_eq!(
        discarded,
        expected.clone().map(extents).map(Request::Discard),
        "{told}"
    );
    let sent = with_ranges(kind::WRITE_ZEROES, ranges);
    let zeroed = driver.parse(&sent, 0, limits(sectors)).ok();
    let zeroes = ranges_on_disk(sectors, ranges, 1 << 17, 1);
    assert_eq!(zeroed, zeroes.map(Request::WriteZeroes), "{told}");
    expected.is_some()
}

#[test]
fn every_transfer_of_every_small_disk_is_accepted_exactly_if_it_is_on_it() {
    let driver = Driver::new();
    let (mut accepted, mut refused) = (0, 0);
    for sectors in 0..=SMALL {
        for sector in 0..=SMALL + 2 {
            for bytes in (0..=(SMALL + 2) * 512).filter(|bytes| matches!(bytes % 512, 0..=1 | 511))
            {
                match transfer(&driver, sectors, sector, bytes) {
                    true => accepted += 1,
                    false => refused += 1,
                }
            }
        }
    }
    assert!(accepted > 100 && refused > 1000, "{accepted} {refused}");
}

#[test]
fn every_length_of_a_transfer_has_whole_sectors_or_is_refused() {
    let driver = Driver::new();
    for bytes in 0..=4 * 512 {
        let accepted = transfer(&driver, 3, 0, bytes);
        assert_eq!(accepted, [0, 512, 1024, 1536].contains(&bytes), "{bytes}");
    }
}

/// Sizes of disks up to the largest there can be.
fn capacities() -> Vec<u64> {
    let sizes = [0, 1, 1 << 17, 1 << 22, 1 << 32, SECTORS_MAX];
    let mut all = around(sizes);
    all.retain(|sectors| *sectors <= SECTORS_MAX);
    all
}

#[test]
fn edges_crossed_with_edges_are_accepted_exactly_if_on_the_disk() {
    let driver = Driver::new();
    let mut accepted = 0;
    for sectors in capacities() {
        let sector_edges = around(EDGES.into_iter().chain([sectors]));
        for sector in &sector_edges {
            // As far as the disk goes from there, and the edges as they are and as sectors.
            let left = sectors.saturating_sub(*sector);
            let as_sectors = EDGES.map(|edge| edge.wrapping_mul(512));
            let lengths = EDGES
                .into_iter()
                .chain(as_sectors)
                .chain([left * 512, left * 512 + 512]);
            for bytes in around(lengths) {
                accepted += u32::from(transfer(&driver, sectors, *sector, bytes));
            }
            let counts = around([0, 1 << 17, 1 << 22, 1 << 31, u64::from(u32::MAX), left]);
            for count in counts
                .into_iter()
                .filter_map(|count| u32::try_from(count).ok())
            {
                for flags in [0, 1, 2, 1 << 31] {
                    accepted += u32::from(give_up(&driver, sectors, &[(*sector, count, flags)]));
                }
            }
        }
    }
    assert!(accepted > 500, "{accepted}");
}

#[test]
fn every_pair_of_ranges_of_every_small_disk_is_accepted_exactly_if_both_are_on_it() {
    let driver = Driver::new();
    let mut accepted = 0;
    for sectors in 0..=3u64 {
        let one = || (0..=sectors + 1).flat_map(|at| (0..=4).map(move |count| (at, count, 0)));
        for first in one() {
            for second in one() {
                accepted += u32::from(give_up(&driver, sectors, &[first, second]));
            }
        }
    }
    assert!(accepted > 100, "{accepted}");
}

#[test]
fn every_number_of_ranges_with_a_bad_one_at_every_place_is_refused() {
    let driver = Driver::new();
    for count in 0..=17 {
        let fine = vec![(1, 1, 0); count];
        assert_eq!(give_up(&driver, 2, &fine), (1..=16).contains(&count));
        for place in 0..count {
            for bad in [(2, 1, 0), (u64::MAX, 1, 0), (0, 3, 0), (0, 1, 2)] {
                let mut ranges = fine.clone();
                ranges[place] = bad;
                assert!(!give_up(&driver, 2, &ranges));
            }
        }
    }
    // A list that is no whole number of ranges.
    for rest in 0..=17 * 16 {
        let accepted = driver
            .parse(&asked(kind::DISCARD, 0, rest), 0, limits(1))
            .is_ok();
        assert_eq!(
            accepted,
            rest % 16 == 0 && (16..=256).contains(&rest),
            "{rest}"
        );
    }
}

proptest! {
    #[test]
    fn any_transfer_is_accepted_exactly_if_it_is_on_the_disk(
        sectors in prop_oneof![0..=SECTORS_MAX, 0u64..1000],
        sector in prop_oneof![any::<u64>(), 0u64..1000],
        bytes in prop_oneof![any::<u64>(), (0u64..1000).prop_map(|sectors| sectors * 512)],
    ) {
        transfer(&Driver::new(), sectors, sector, bytes);
    }

    #[test]
    fn any_ranges_are_accepted_exactly_if_on_the_disk(
        sectors in prop_oneof![0..=SECTORS_MAX, 0u64..1000],
        ranges in proptest::collection::vec(
            (prop_oneof![4 => 0u64..1000, 1 => any::<u64>()], prop_oneof![4 => 0u32..1000, 1 => any::<u32>()], prop_oneof![4 => 0u32..2, 1 => any::<u32>()]),
            0..18),
    ) {
        give_up(&Driver::new(), sectors, &ranges);
    }
}
