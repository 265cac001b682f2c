//! Tests of the walk: every way to get a chain wrong, see `chain.rs`.

use super::*;
use crate::testing::{RawDescriptor, memory};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

/// Two regions with a hole between them; the table is at the start of the first.
const FIRST: (u64, usize) = (0, 0x10000);
const SECOND: (u64, usize) = (0x20000, 0x1000);
const SIZE: u16 = 8;
const TABLE: Table = Table {
    address: 0x1000,
    size: SIZE,
    indirect: true,
};

fn guest() -> GuestMemory {
    memory(&[FIRST, SECOND])
}

fn descriptor(addr: u64, len: u32, flags: u16, next: u16) -> RawDescriptor {
    RawDescriptor {
        addr,
        len,
        flags,
        next,
    }
}

fn place(memory: &GuestMemory, address: u64, table: &[RawDescriptor]) {
    for (at, raw) in (address..).step_by(16).zip(table) {
        let descriptor = Descriptor::new(raw.addr, raw.len, raw.flags, raw.next);
        memory.write_obj(descriptor, GuestAddress(at)).unwrap();
    }
}

fn walk<'m>(memory: &'m GuestMemory, table: &[RawDescriptor]) -> Result<Buffers<'m>, BadChain> {
    place(memory, TABLE.address, table);
    Buffers::walk(memory, TABLE, 0)
}

fn refused(table: &[RawDescriptor]) -> BadChain {
    let memory = guest();
    walk(&memory, table)
        .err()
        .unwrap_or_else(|| panic!("accepted {table:?}"))
}

#[test]
fn a_chain_is_read_and_written_in_its_order() {
    let memory = guest();
    memory.write_slice(b"hello ", GuestAddress(0x2000)).unwrap();
    memory
        .write_slice(b"world!", GuestAddress(0x20000))
        .unwrap();
    let mut chain = walk(
        &memory,
        &[
            descriptor(0x2000, 6, NEXT, 3),
            descriptor(0x3000, 4, WRITE | NEXT, 2),
            descriptor(0x20ff0, 16, WRITE, 0),
            descriptor(0x20000, 6, NEXT, 1),
        ],
    )
    .unwrap();
    assert_eq!(
        (chain.readable.remaining(), chain.writable.remaining()),
        (12, 20)
    );
    let mut text = String::new();
    chain.readable.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello world!");
    assert_eq!(chain.writable.write(&[7; 30]).unwrap(), 20);
    assert_eq!(chain.writable.written(), 20);
    let mut back = [0; 4];
    memory.read_slice(&mut back, GuestAddress(0x3000)).unwrap();
    assert_eq!(back, [7; 4]);
    let last: u8 = memory.read_obj(GuestAddress(0x20fff)).unwrap();
    assert_eq!(last, 7);
}

#[test]
fn structures_are_read_and_written_whole_or_not_at_all() {
    let memory = guest();
    let mut chain = walk(
        &memory,
        &[
            descriptor(0x2000, 3, NEXT, 1),
            descriptor(0x2003, 2, NEXT, 2),
            descriptor(0x3000, 6, WRITE, 0),
        ],
    )
    .unwrap();
    memory
        .write_slice(&[1, 2, 3, 4, 5], GuestAddress(0x2000))
        .unwrap();
    assert_eq!(chain.readable.read_struct::<u32>().unwrap(), 0x0403_0201);
    let error = chain.readable.read_struct::<u32>().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(chain.readable.remaining(), 1);
    chain.writable.write_struct(&5u32).unwrap();
    assert!(chain.writable.write_struct(&5u32).is_err());
    assert_eq!(
        (chain.writable.written(), chain.writable.remaining()),
        (4, 2)
    );
}

#[test]
fn pieces_end_where_buffers_do() {
    let memory = guest();
    let mut chain = walk(
        &memory,
        &[descriptor(0x2000, 10, NEXT, 1), descriptor(0x3000, 5, 0, 0)],
    )
    .unwrap();
    let mut lengths = Vec::new();
    while let Some(piece) = chain.readable.next_piece(4) {
        lengths.push(piece.len());
    }
    assert_eq!(lengths, [4, 4, 2, 4, 1]);
    assert!(chain.readable.next_piece(0).is_none());
}

#[test]
fn a_buffer_is_wholly_in_one_region_or_refused() {
    // B2.1, CVE-2019-18960, V6.
    for (addr, len) in [
        (0xfff8u64, 16u32), // begins in memory, ends outside
        (0xffff, 2),        // the last byte and one more
        (0x10000, 1),       // the first byte behind a region
        (0x1fff8, 16),      // begins in the hole
        (0xfff8, 0x2_0000), // spans the hole
        (0x20fff, 2),       // ends behind the last region
        (u64::MAX, 1),      // the last address
        (u64::MAX - 7, 16), // wraps
        (0x2000, u32::MAX), // longer than memory
        (0x2000, 0),        // empty
    ] {
        for flags in [0, WRITE] {
            let expected = BadChain::Buffer {
                address: addr,
                length: len,
            };
            assert_eq!(refused(&[descriptor(addr, len, flags, 0)]), expected);
        }
    }
    let memory = guest();
    assert!(walk(&memory, &[descriptor(0xffff, 1, 0, 0)]).is_ok());
    assert!(walk(&memory, &[descriptor(0x20fff, 1, WRITE, 0)]).is_ok());
}

#[test]
fn readable_behind_writable_is_refused() {
    // V5.
    let table = [
        descriptor(0x2000, 1, WRITE | NEXT, 1),
        descriptor(0x2000, 1, 0, 0),
    ];
    assert_eq!(refused(&table), BadChain::Order);
}

#[test]
fn a_loop_ends_at_the_size_of_the_queue() {
    // B2.5, V3.
    assert_eq!(
        refused(&[descriptor(0x2000, 1, NEXT, 0)]),
        BadChain::TooLong
    );
    let two = [
        descriptor(0x2000, 1, NEXT, 1),
        descriptor(0x2000, 1, NEXT, 0),
    ];
    assert_eq!(refused(&two), BadChain::TooLong);
}

#[test]
fn an_index_beyond_the_table_is_refused() {
    let expected = |index| BadChain::Index {
        index,
        size: u32::from(SIZE),
    };
    assert_eq!(
        refused(&[descriptor(0x2000, 1, NEXT, SIZE)]),
        expected(SIZE)
    );
    assert_eq!(
        refused(&[descriptor(0x2000, 1, NEXT, 0xffff)]),
        expected(0xffff)
    );
    let memory = guest();
    for head in [SIZE, 0xffff] {
        let error = Buffers::walk(&memory, TABLE, head).err();
        assert_eq!(error, Some(expected(head)));
    }
}

#[test]
fn an_indirect_table_gives_its_chain() {
    let memory = guest();
    place(
        &memory,
        0x4000,
        &[
            descriptor(0x2000, 2, NEXT, 2),
            descriptor(0x3000, 4, WRITE, 0),
            descriptor(0x2100, 3, NEXT, 1),
        ],
    );
    // Also behind a direct descriptor, as section 2.7.5.3.2 wants a device to bear.
    let table = [
        descriptor(0x2200, 1, NEXT, 1),
        descriptor(0x4000, 48, INDIRECT, 0),
    ];
    let chain = walk(&memory, &table).unwrap();
    assert_eq!(
        (chain.readable.remaining(), chain.writable.remaining()),
        (6, 4)
    );
}

#[test]
fn an_indirect_descriptor_that_breaks_a_rule_is_refused() {
    // V4.
    for length in [0u32, 1, 15, 17, 40, u32::MAX] {
        let table = [descriptor(0x4000, length, INDIRECT, 0)];
        assert_eq!(refused(&table), BadChain::Indirect { length });
    }
    let with_next = [
        descriptor(0x4000, 16, INDIRECT | NEXT, 1),
        descriptor(0x2000, 1, 0, 0),
    ];
    assert_eq!(refused(&with_next), BadChain::Indirect { length: 16 });
    // Zeroed memory: an empty buffer at address 0.
    assert!(matches!(
        refused(&[descriptor(0x4000, 16, INDIRECT, 0)]),
        BadChain::Buffer { .. }
    ));
    for outside in [0x10000u64, 0xfff8, u64::MAX - 8, u64::MAX] {
        assert!(matches!(
            refused(&[descriptor(outside, 16, INDIRECT, 0)]),
            BadChain::Table { .. }
        ));
    }
}

#[test]
fn a_nested_indirect_table_is_refused() {
    let memory = guest();
    place(&memory, 0x4000, &[descriptor(0x4000, 16, INDIRECT, 0)]);
    let error = walk(&memory, &[descriptor(0x4000, 16, INDIRECT, 0)]).err();
    assert_eq!(error, Some(BadChain::Indirect { length: 16 }));
}

#[test]
fn an_indirect_table_that_was_not_agreed_on_is_refused() {
    let memory = guest();
    place(&memory, 0x4000, &[descriptor(0x2000, 2, 0, 0)]);
    place(
        &memory,
        TABLE.address,
        &[descriptor(0x4000, 16, INDIRECT, 0)],
    );
    let table = Table {
        indirect: false,
        ..TABLE
    };
    let error = Buffers::walk(&memory, table, 0).err();
    assert_eq!(error, Some(BadChain::Indirect { length: 16 }));
}

#[test]
fn an_indirect_chain_is_no_longer_than_the_queue_either() {
    // 2.7.5.3.1: the table may be, the chain may not.
    let memory = guest();
    let long: Vec<RawDescriptor> = (1..=0x200u16)
        .map(|next| descriptor(0x2000, 1, NEXT, next))
        .collect();
    place(&memory, 0x4000, &long);
    let table = [descriptor(0x4000, 16 * 0x200, INDIRECT, 0)];
    assert_eq!(walk(&memory, &table).err(), Some(BadChain::TooLong));
    let last = descriptor(0x2000, 1, 0, 0);
    place(&memory, 0x4000 + 16 * (u64::from(SIZE) - 1), &[last]);
    let chain = walk(&memory, &table).unwrap();
    assert_eq!(chain.readable.remaining(), usize::from(SIZE));
}

#[test]
fn a_chain_of_4_gib_is_refused() {
    // One buffer of memory again and again: more bytes than the used ring can count.
    let big = memory(&[(0, 3 << 30)]);
    let table = [
        descriptor(0x2000, 0x8000_0000, NEXT, 1),
        descriptor(0x2000, 0x8000_0000, 0, 0),
    ];
    assert_eq!(walk(&big, &table).err(), Some(BadChain::TooLarge));
}

#[test]
fn a_descriptor_table_outside_memory_is_refused() {
    let memory = guest();
    for address in [0x10000u64, 0xfff8, u64::MAX - 15] {
        let table = Table { address, ..TABLE };
        let error = Buffers::walk(&memory, table, 0).err();
        assert!(matches!(error, Some(BadChain::Table { .. })));
    }
}

fn any_descriptor() -> impl Strategy<Value = RawDescriptor> {
    let address = prop_oneof![
        4 => 0x1000u64..0x1100,
        4 => 0xff00u64..0x10010,
        2 => 0x1fff0u64..0x21010,
        1 => any::<u64>(),
    ];
    let length = prop_oneof![
        4 => 0u32..64,
        2 => (0u32..20).prop_map(|count| 16 * count),
        1 => any::<u32>(),
    ];
    (
        address,
        length,
        0u16..8,
        prop_oneof![4 => 0u16..10, 1 => any::<u16>()],
    )
        .prop_map(|(addr, len, flags, next)| descriptor(addr, len, flags, next))
}

proptest! {
    #[test]
    fn whatever_lies_in_memory_the_walk_ends_and_its_bytes_are_the_guests(
        table in proptest::collection::vec(any_descriptor(), 1..16),
        head in 0u16..10,
    ) {
        let memory = guest();
        place(&memory, TABLE.address, &table);
        if let Ok(mut chain) = Buffers::walk(&memory, TABLE, head) {
            let (readable, writable) = (chain.readable.remaining(), chain.writable.remaining());
            let all = FIRST.1 + SECOND.1;
            prop_assert!(readable + writable <= all * usize::from(SIZE));
            let mut bytes = Vec::new();
            prop_assert_eq!(chain.readable.read_to_end(&mut bytes).unwrap(), readable);
            chain.writable.write_all(&vec![0x5a; writable]).unwrap();
            prop_assert_eq!(chain.writable.written() as usize, writable);
            prop_assert_eq!(chain.writable.remaining(), 0);
        }
    }
}
