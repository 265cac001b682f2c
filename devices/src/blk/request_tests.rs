//! Every way to ask a disk for what it has not got, see `request.rs`.

use super::*;
use crate::GuestMemory;
use crate::testing::memory;
use crate::virtio::chain::{Buffers, Table};
use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

const SECTORS: u64 = 100;
const LIMITS: Limits = Limits {
    sectors: SECTORS,
    read_only: false,
    discard: true,
    write_zeroes: true,
};
const READ_ONLY: Limits = Limits {
    read_only: true,
    ..LIMITS
};

/// Parses a chain whose readable part is `bytes`.
fn parse(bytes: &[u8], room: usize, limits: Limits) -> Result<Request, Status> {
    let memory: GuestMemory = memory(&[(0, 1 << 20)]);
    let descriptor = Descriptor::new(0x1_0000, bytes.len() as u32, 0, 0);
    memory.write_slice(bytes, GuestAddress(0x1_0000)).unwrap();
    memory.write_obj(descriptor, GuestAddress(0x1000)).unwrap();
    let queue = Table {
        address: 0x1000,
        size: 8,
        indirect: false,
    };
    let mut chain = Buffers::walk(&memory, queue, 0).expect("a chain");
    Request::parse(&mut chain.readable, room, limits)
}

fn asked(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend_from_slice(&[0xaa; 4]); // reserved: nobody looks at it
    bytes.extend_from_slice(&sector.to_le_bytes());
    bytes
}

fn with_ranges(kind: u32, ranges: &[(u64, u32, u32)]) -> Vec<u8> {
    let mut bytes = asked(kind, 0);
    for (sector, count, flags) in ranges {
        bytes.extend_from_slice(&sector.to_le_bytes());
        bytes.extend_from_slice(&count.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
    }
    bytes
}

fn extent(sector: u64, sectors: u64) -> Extent {
    Extent {
        offset: sector * SECTOR_BYTES,
        length: sectors * SECTOR_BYTES,
    }
}

#[test]
fn a_transfer_up_to_the_last_sector_is_inside() {
    let read = parse(&asked(kind::IN, 98), 1024, LIMITS);
    assert_eq!(read, Ok(Request::Read(extent(98, 2))));
    let mut write = asked(kind::OUT, 99);
    write.extend_from_slice(&[1; 512]);
    assert_eq!(parse(&write, 0, LIMITS), Ok(Request::Write(extent(99, 1))));
    // Nothing at the very end is nothing outside.
    let nothing = parse(&asked(kind::IN, 100), 0, LIMITS);
    assert_eq!(nothing, Ok(Request::Read(extent(100, 0))));
}

#[test]
fn a_transfer_that_leaves_the_disk_is_refused() {
    // V15.
    for (sector, room) in [
        (99, 1024),
        (100, 512),
        (101, 0),
        (1 << 63, 512),
        (u64::MAX, 512),
        (u64::MAX, 0),
        (1 << 55, 512), // as bytes it would be 0
        (0, 101 * 512),
    ] {
        let read = parse(&asked(kind::IN, sector), room, LIMITS);
        assert_eq!(read, Err(Status::IoError), "sector {sector}, {room} bytes");
    }
}

#[test]
fn a_part_of_a_sector_is_refused() {
    for room in [1, 511, 513] {
        let read = parse(&asked(kind::IN, 0), room, LIMITS);
        assert_eq!(read, Err(Status::IoError));
        let mut write = asked(kind::OUT, 0);
        write.resize(16 + room, 0);
        assert_eq!(parse(&write, 0, LIMITS), Err(Status::IoError));
    }
}

#[test]
fn a_header_cut_short_is_refused() {
    for length in [1, 4, 15] {
        let cut = &asked(kind::FLUSH, 0)[..length];
        assert_eq!(parse(cut, 0, LIMITS), Err(Status::IoError));
    }
}

#[test]
fn unknown_types_are_unsupported() {
    // SCSI pass-through (2, 3), the legacy barrier bit, lifetime, secure erase, zoned commands.
    for unknown in [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 1 << 31, u32::MAX] {
        let answer = parse(&asked(unknown, 0), 512, LIMITS);
        assert_eq!(answer, Err(Status::Unsupported), "type {unknown}");
    }
}

#[test]
fn nothing_changes_a_read_only_disk() {
    let mut write = asked(kind::OUT, 0);
    write.extend_from_slice(&[0; 512]);
    let discard = with_ranges(kind::DISCARD, &[(0, 1, 0)]);
    let zeroes = with_ranges(kind::WRITE_ZEROES, &[(0, 1, 0)]);
    for change in [write, discard, zeroes] {
        assert_eq!(parse(&change, 0, READ_ONLY), Err(Status::IoError));
    }
    assert_eq!(
        parse(&asked(kind::FLUSH, 0), 0, READ_ONLY),
        Ok(Request::Flush)
    );
}

#[test]
fn ranges_are_taken_as_they_are() {
    let discard = with_ranges(kind::DISCARD, &[(1, 2, 0), (50, 50, 0)]);
    assert_eq!(
        parse(&discard, 0, LIMITS),
        Ok(Request::Discard(vec![extent(1, 2), extent(50, 50)]))
    );
    let zeroes = with_ranges(kind::WRITE_ZEROES, &[(1, 2, 1), (50, 0, 0)]);
    let expected = vec![(extent(1, 2), true), (extent(50, 0), false)];
    assert_eq!(
        parse(&zeroes, 0, LIMITS),
        Ok(Request::WriteZeroes(expected))
    );
}

#[test]
fn a_bad_range_refuses_all_of_them() {
    // B2.14.
    let fine = (0, 1, 0);
    let far = WRITE_ZEROES_SECTORS_MAX.max(DISCARD_SECTORS_MAX) + 1;
    for bad in [
        (99, 2, 0),
        (u64::MAX, 1, 0),
        (1 << 55, 1, 0),
        (0, far, 0),
        (0, u32::MAX, 0),
    ] {
        for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
            let request = with_ranges(kind, &[fine, bad]);
            assert_eq!(parse(&request, 0, LIMITS), Err(Status::IoError), "{bad:?}");
        }
    }
    let too_many = vec![fine; RANGES_MAX + 1];
    let cut = &with_ranges(kind::DISCARD, &[fine, fine])[..16 + 17];
    for request in [
        &with_ranges(kind::DISCARD, &too_many)[..],
        cut,
        &asked(kind::DISCARD, 0),
    ] {
        assert_eq!(parse(request, 0, LIMITS), Err(Status::IoError));
    }
}

#[test]
fn flags_that_a_range_cannot_have_are_unsupported() {
    for (kind, flags) in [
        (kind::DISCARD, 1),
        (kind::DISCARD, 2),
        (kind::WRITE_ZEROES, 2),
        (kind::WRITE_ZEROES, 0x8000_0001),
    ] {
        let request = with_ranges(kind, &[(0, 1, flags)]);
        assert_eq!(parse(&request, 0, LIMITS), Err(Status::Unsupported));
    }
}

#[test]
fn what_was_not_agreed_on_is_unsupported() {
    let without = Limits {
        discard: false,
        write_zeroes: false,
        ..LIMITS
    };
    for kind in [kind::DISCARD, kind::WRITE_ZEROES] {
        let request = with_ranges(kind, &[(0, 1, 0)]);
        assert_eq!(parse(&request, 0, without), Err(Status::Unsupported));
    }
}

proptest! {
    /// Whatever is asked, what comes of it lies inside the disk.
    #[test]
    fn nothing_leaves_the_disk(
        kind in prop_oneof![0u32..16, any::<u32>()],
        sector in prop_oneof![0..2 * SECTORS, any::<u64>()],
        rest in prop::collection::vec(any::<u8>(), 0..2048),
        room in prop_oneof![0usize..100_000, (0usize..200).prop_map(|sectors| sectors * 512)],
    ) {
        let mut bytes = asked(kind, sector);
        bytes.extend_from_slice(&rest);
        let extents = match parse(&bytes, room, LIMITS) {
            Ok(Request::Read(extent) | Request::Write(extent)) => vec![extent],
            Ok(Request::Discard(extents)) => extents,
            Ok(Request::WriteZeroes(extents)) => extents.into_iter().map(|(e, _)| e).collect(),
            Ok(Request::Flush | Request::Identify) | Err(_) => vec![],
        };
        for extent in extents {
            let end = extent.offset.checked_add(extent.length);
            prop_assert!(end.is_some_and(|end| end <= SECTORS * SECTOR_BYTES));
            prop_assert_eq!(extent.length % SECTOR_BYTES, 0);
        }
    }
}
