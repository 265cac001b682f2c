//! What a disk does for a driver that keeps the rules.

use super::*;

#[test]
fn what_is_written_is_read_back_and_is_in_the_file() {
    with_each_engine(|kind| {
        let Some(mut guest) = Guest::new(kind, file(64 * SECTOR), false, ALL) else {
            return;
        };
        let text: Vec<u8> = (0..4 * SECTOR).map(|at| at as u8 ^ 0x5a).collect();
        assert_eq!(guest.ask(OUT, 60, &text, 0), (OK, 1, vec![]));
        assert_eq!(guest.on_host(60, 4), text);
        let read = guest.ask(IN, 60, &[], 4 * SECTOR);
        assert_eq!(read, (OK, 4 * SECTOR as u32 + 1, text));
        assert_eq!(guest.status(FLUSH, 0, &[], 0), OK);
        assert_eq!(guest.on_host(0, 60), vec![0; 60 * SECTOR]);
    });
}

#[test]
fn a_driver_that_does_not_flush_gets_the_same() {
    with_each_engine(|kind| {
        let Some(mut guest) = Guest::new(kind, file(64 * SECTOR), false, ALL & !F_FLUSH) else {
            return;
        };
        assert_eq!(guest.status(OUT, 1, &[7; SECTOR], 0), OK);
        assert_eq!(guest.status(WRITE_ZEROES, 0, &range(2, 2, 0), 0), OK);
        assert_eq!(guest.on_host(1, 1), [7; SECTOR]);
    });
}

#[test]
fn a_request_in_many_pieces_is_whole() {
    with_each_engine(|kind| {
        let Some(mut guest) = Guest::new(kind, file(64 * SECTOR), false, ALL) else {
            return;
        };
        let text: Vec<u8> = (0..3 * SECTOR).map(|at| (at / 7) as u8).collect();
        let (first, rest) = text.split_at(100);
        let header = super::header(OUT, 5);
        let pieces = [&header[..3], &header[3..], first, rest];
        let mut buffers: Vec<_> = pieces.map(Buffer::Readable).to_vec();
        buffers.push(Buffer::Writable(1));
        guest.driver.add_indirect(0, &buffers);
        guest.driver.kick(0);
        let written = guest.driver.wait_used(0, Some(&guest.poller));
        assert_eq!((written.len, written.data), (1, vec![OK]));
        let header = super::header(IN, 5);
        guest.driver.add(
            0,
            &[
                Buffer::Readable(&header),
                Buffer::Writable(1),
                Buffer::Writable(1000),
                Buffer::Writable(535),
                Buffer::Writable(1),
            ],
        );
        guest.driver.kick(0);
        let mut read = guest.driver.wait_used(0, Some(&guest.poller));
        assert_eq!(read.data.pop(), Some(OK));
        assert_eq!(read.data, text);
    });
}

#[test]
fn many_requests_at_once_on_all_queues_are_all_answered() {
    with_each_engine(|kind| {
        let Some(mut guest) = Guest::new(kind, file(64 * SECTOR), false, ALL) else {
            return;
        };
        for sector in 0..64 {
            guest
                .file
                .write_all_at(&[sector as u8; SECTOR], sector * SECTOR as u64)
                .unwrap();
        }
        for round in 0..20u64 {
            let mut sectors = BTreeMap::new();
            for queue in 0..2u16 {
                for at in 0..5u64 {
                    let sector = (round * 7 + u64::from(queue) * 31 + at) % 64;
                    let header = super::header(IN, sector);
                    let buffers = [
                        Buffer::Readable(&header),
                        Buffer::Writable(SECTOR as u32),
                        Buffer::Writable(1),
                    ];
                    let head = guest.driver.add(queue, &buffers);
                    sectors.insert((queue, head), sector as u8);
                }
                guest.driver.kick(queue);
            }
            for queue in [0u16, 1].repeat(5) {
                let used = guest.driver.wait_used(queue, Some(&guest.poller));
                let sector = sectors.remove(&(queue, used.head)).expect("asked for");
                assert_eq!(used.data[..SECTOR], [sector; SECTOR]);
            }
            assert!(sectors.is_empty());
        }
    });
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    with_each_engine(|kind| ranges(kind, file(64 * SECTOR)));
}

#[test]
fn ranges_are_zeroed_where_the_file_system_has_no_call_for_it() {
    // tmpfs has FALLOC_FL_PUNCH_HOLE and no FALLOC_FL_ZERO_RANGE.
    with_each_engine(|kind| {
        let memory = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC);
        let memory = File::from(memory.expect("a memory file"));
        memory.set_len(64 * SECTOR as u64).unwrap();
        ranges(kind, memory);
    });
}

fn ranges(kind: EngineKind, disk: File) {
    let Some(mut guest) = Guest::new(kind, disk, false, ALL) else {
        return;
    };
    guest.file.write_all_at(&[9; 64 * SECTOR], 0).unwrap();
    assert_eq!(guest.status(WRITE_ZEROES, 0, &range(1, 2, 0), 0), OK);
    let two = [range(4, 1, 1), range(60, 4, 0)].concat();
    assert_eq!(guest.status(WRITE_ZEROES, 0, &two, 0), OK);
    for sector in 0..64 {
        let zero = [1, 2, 4, 60, 61, 62, 63].contains(&sector);
        let expected = if zero { 0 } else { 9 };
        assert_eq!(
            guest.on_host(sector, 1),
            [expected; SECTOR],
            "sector {sector}"
        );
    }
    assert_eq!(guest.status(DISCARD, 0, &range(8, 16, 0), 0), OK);
    assert_eq!(guest.on_host(24, 1), [9; SECTOR]);
    assert_eq!(guest.file.metadata().unwrap().len(), 64 * SECTOR as u64);
}

#[test]
fn the_id_is_cut_to_what_the_driver_has_room_for() {
    // V15.
    let Some(mut guest) = Guest::new(EngineKind::Threads, file(SECTOR), false, ALL) else {
        return;
    };
    let (status, len, id) = guest.ask(GET_ID, 0, &[], 20);
    assert_eq!((status, len), (OK, 21));
    assert_eq!(id, b"disk-of-a-test\0\0\0\0\0\0");
    assert_eq!(guest.ask(GET_ID, 0, &[], 0), (OK, 1, vec![]));
    assert_eq!(guest.ask(GET_ID, 0, &[], 1), (OK, 2, vec![b'd']));
    // The last byte was not written, and it is not claimed.
    let (status, len, id) = guest.ask(GET_ID, 0, &[], 21);
    assert_eq!((status, len, id[20]), (OK, 20, 0xee));
}

#[test]
fn the_configuration_space_tells_what_there_is() {
    let Some(guest) = Guest::new(EngineKind::Threads, file(5 * SECTOR + 100), false, ALL) else {
        return;
    };
    let config = guest.driver.device_config();
    let u32_at = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(config.len(), 60);
    // The last 100 bytes are not a sector.
    assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), 5);
    assert_eq!((u32_at(12), u32_at(20)), (254, 512));
    // Blocks of 512, of which 8 make one that costs no reading, none of them beginning in the middle; no size is the best.
    assert_eq!(config[24..32], [3, 0, 8, 0, 0, 0, 0, 0]);
    assert_eq!(config[34..36], 2u16.to_le_bytes());
    assert_eq!((u32_at(36), u32_at(40), u32_at(44)), (1 << 22, 16, 1));
    assert_eq!((u32_at(48), u32_at(52), config[56]), (1 << 17, 16, 1));
}

#[test]
fn only_what_is_read_counts_as_written() {
    with_each_engine(|kind| {
        let Some(mut guest) = Guest::new(kind, file(64 * SECTOR), false, ALL) else {
            return;
        };
        // Room in front of the status that these requests have no use for.
        let nothing = || (OK, 0, vec![0xee; 512]);
        assert_eq!(guest.ask(OUT, 0, &[1; SECTOR], 512), nothing());
        assert_eq!(guest.ask(FLUSH, 0, &[], 512), nothing());
        assert_eq!(guest.ask(WRITE_ZEROES, 0, &range(0, 1, 0), 512), nothing());
    });
}

#[test]
fn a_request_of_many_mebibytes_is_whole() {
    with_each_engine(|kind| {
        let Some(mut guest) = Guest::new(kind, file(8 << 20), false, ALL) else {
            return;
        };
        let text: Vec<u8> = (0..3 << 20).map(|at: u32| (at / 4093) as u8).collect();
        assert_eq!(guest.status(OUT, 1, &text, 0), OK);
        let (status, _, read) = guest.ask(IN, 1, &[], text.len());
        assert!(status == OK && read == text);
    });
}

#[test]
fn without_mq_the_first_queue_serves_alone() {
    let features = ALL & !F_MQ;
    let Some(mut guest) = Guest::new(EngineKind::Threads, file(SECTOR), false, features) else {
        return;
    };
    assert_eq!(guest.status(IN, 0, &[], SECTOR), OK);
    guest.driver.kick(1);
    assert_eq!(guest.poller.turn(Some(Duration::ZERO)).unwrap(), 0);
}

#[test]
fn a_queue_that_finds_no_room_is_served_when_there_is() {
    let poller = Arc::new(Poller::new().unwrap());
    let io = idle_engine(EngineKind::Threads, &poller).unwrap();
    let mut guest = Guest::with(io.clone(), poller, file(64 * SECTOR), false, ALL);
    let header = super::header(IN, 3);
    let buffers = [
        Buffer::Readable(&header),
        Buffer::Writable(SECTOR as u32),
        Buffer::Writable(1),
    ];
    // One disk may have 256 calls under way.
    for queue in [0, 1] {
        for _ in 0..200 {
            guest.driver.add_indirect(queue, &buffers);
        }
        guest.driver.kick(queue);
    }
    while guest.poller.turn(Some(Duration::ZERO)).unwrap() > 0 {}
    io.start(&seal()).expect("its threads");
    for queue in [0, 1] {
        for _ in 0..200 {
            let used = guest.driver.wait_used(queue, Some(&guest.poller));
            assert_eq!(used.len as usize, SECTOR + 1);
        }
    }
}

#[test]
fn a_disk_stands_still_when_what_is_under_way_has_ended_and_then_goes_on() {
    let poller = Arc::new(Poller::new().unwrap());
    let Some(io) = idle_engine(EngineKind::Threads, &poller) else {
        return;
    };
    let mut guest = Guest::with(io.clone(), poller, file(64 * SECTOR), false, ALL);
    let request = [&header(OUT, 3)[..], &[9; SECTOR]].concat();
    guest
        .driver
        .add(0, &[Buffer::Readable(&request), Buffer::Writable(1)]);
    guest.driver.kick(0);
    guest.poller.turn(Some(Duration::ZERO)).unwrap();
    assert_eq!(guest.driver.suspend(), Err(Busy));
    // Meanwhile it takes no other, and afterwards it does.
    let other = [&header(OUT, 5)[..], &[7; SECTOR]].concat();
    let other = guest
        .driver
        .add(0, &[Buffer::Readable(&other), Buffer::Writable(1)]);
    guest.driver.kick(0);
    io.start(&seal()).unwrap();
    // Nothing is lost of a request that was under way.
    let used = guest.driver.wait_used(0, Some(&guest.poller));
    assert_eq!(used.data, [OK]);
    assert_eq!(guest.on_host(3, 1), [9; SECTOR]);
    assert!(guest.driver.was_told_idle());
    assert_eq!(guest.on_host(5, 1), [0; SECTOR]);
    guest.driver.transport.resume();
    assert_eq!(guest.driver.wait_used(0, Some(&guest.poller)).head, other);
    assert_eq!(guest.on_host(5, 1), [7; SECTOR]);
    let watched = guest.poller.watched();
    let state = written_down(&guest.driver);
    assert_eq!(guest.poller.watched(), watched - 2, "its kicks");
    guest.driver.transport.resume();
    assert_eq!(guest.status(OUT, 4, &[8; SECTOR], 0), OK);
    // In another process, which goes on where the state was written down, the driver is asked the same once more.
    let state_now = written_down(&guest.driver);
    assert_ne!(state, state_now);
    let disk = disk(io, &guest.poller, &guest.file, false);
    guest.driver.carry_over(Box::new(disk), &state_now);
    assert_eq!(guest.ask(IN, 4, &[], SECTOR).2, [8; SECTOR]);
}

/// The small request finds what the large one of the other disk has brought meanwhile.
#[test]
fn two_disks_of_one_engine_both_get_their_answers() {
    const LARGE: usize = 256 << 10;
    with_each_engine(|kind| {
        let poller = Arc::new(Poller::new().unwrap());
        let Some(io) = engine(kind, &poller) else {
            return;
        };
        let disk = || Guest::with(io.clone(), poller.clone(), file(LARGE), false, ALL);
        let (mut large, mut small) = (disk(), disk());
        for _ in 0..100 {
            for (guest, length) in [(&mut large, LARGE), (&mut small, SECTOR)] {
                let header = super::header(IN, 0);
                let buffers = [
                    Buffer::Readable(&header),
                    Buffer::Writable(length as u32),
                    Buffer::Writable(1),
                ];
                guest.driver.add(0, &buffers);
                guest.driver.kick(0);
                poller.turn(Some(Duration::ZERO)).unwrap();
            }
            for (guest, length) in [(&mut small, SECTOR), (&mut large, LARGE)] {
                let answer = guest.driver.wait_used(0, Some(&poller));
                assert_eq!(answer.len, length as u32 + 1);
                assert_eq!(answer.data.last(), Some(&OK));
            }
        }
    });
}
