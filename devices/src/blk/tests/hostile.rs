//! What a disk does for one that does not, and on a host that fails.

use super::*;
use crate::testing::any_descriptor;
use proptest::prelude::*;

#[test]
fn refused_requests_leave_file_and_buffers_alone() {
    with_each_engine(|kind| {
        let Some(mut guest) = Guest::new(kind, file(4 * SECTOR), false, ALL) else {
            return;
        };
        guest.file.write_all_at(&[3; 4 * SECTOR], 0).unwrap();
        assert_eq!(guest.ask(IN, 3, &[], 1024), (IOERR, 0, vec![0xee; 1024]));
        assert_eq!(guest.status(OUT, 4, &[1; SECTOR], 0), IOERR);
        assert_eq!(guest.status(OUT, 3, &[1; 2 * SECTOR], 0), IOERR);
        assert_eq!(guest.status(OUT, 0, &[1; 100], 0), IOERR);
        assert_eq!(guest.status(DISCARD, 0, &range(3, 2, 0), 0), IOERR);
        assert_eq!(guest.status(99, 0, &[], 0), UNSUPP);
        assert_eq!(guest.ask_raw(&[0; 15], 0).0, IOERR);
        assert_eq!(guest.on_host(0, 4), [3; 4 * SECTOR]);
        assert_eq!(guest.file.metadata().unwrap().len(), 4 * SECTOR as u64);
        assert_eq!(guest.driver.status(), 0x0f);
    });
}

#[test]
fn a_chain_without_a_status_byte_is_handed_back_and_does_nothing() {
    // V15.
    let Some(mut guest) = Guest::new(EngineKind::Threads, file(4 * SECTOR), false, ALL) else {
        return;
    };
    let header = super::header(OUT, 0);
    guest.driver.add(
        0,
        &[Buffer::Readable(&header), Buffer::Readable(&[1; SECTOR])],
    );
    guest.driver.kick(0);
    assert_eq!(guest.driver.wait_used(0, Some(&guest.poller)).len, 0);
    assert_eq!(guest.on_host(0, 1), [0; SECTOR]);
}

#[test]
fn nothing_changes_a_read_only_disk() {
    // BI6.
    with_each_engine(|kind| {
        let whole = file(4 * SECTOR);
        whole.write_all_at(&[3; 4 * SECTOR], 0).unwrap();
        let Some(mut guest) = Guest::new(kind, whole, true, ALL) else {
            return;
        };
        assert_eq!(guest.driver.offered() & (1 << 5), 1 << 5);
        assert_eq!(guest.status(OUT, 0, &[1; SECTOR], 0), IOERR);
        // Not offered, so unknown.
        assert_eq!(guest.status(DISCARD, 0, &range(0, 1, 0), 0), UNSUPP);
        assert_eq!(guest.status(WRITE_ZEROES, 0, &range(0, 1, 0), 0), UNSUPP);
        assert_eq!(guest.status(IN, 0, &[], SECTOR), OK);
        assert_eq!(guest.status(FLUSH, 0, &[], 0), OK);
        assert_eq!(guest.on_host(0, 4), [3; 4 * SECTOR]);
    });
}

#[test]
fn a_file_cut_off_meanwhile_is_an_error_and_no_more() {
    // BI1.
    with_each_engine(|kind| {
        let Some(mut guest) = Guest::new(kind, file(8 * SECTOR), false, ALL) else {
            return;
        };
        let faults = Arc::<Mutex<Vec<String>>>::default();
        let log = faults.clone();
        guest.io.on_fault(Box::new(move |fault| {
            log.lock().unwrap().push(fault.to_string());
        }));
        guest.file.set_len(SECTOR as u64).unwrap();
        assert_eq!(guest.status(IN, 0, &[], SECTOR), OK);
        assert_eq!(guest.status(IN, 8, &[], SECTOR), IOERR);
        assert!(faults.lock().unwrap().is_empty(), "that one is the guest's");
        assert_eq!(guest.status(IN, 0, &[], 2 * SECTOR), IOERR);
        let said = "disk \"disk-of-a-test\": its file ends before the disk does";
        assert_eq!(*faults.lock().unwrap(), [said]);
        assert_eq!(guest.status(IN, 4, &[], SECTOR), IOERR);
        assert_eq!(guest.driver.status(), 0x0f);
        guest.file.set_len(8 * SECTOR as u64).unwrap();
        assert_eq!(guest.status(IN, 4, &[], SECTOR), OK);
    });
}

#[test]
fn a_write_that_the_host_refuses_is_an_error_and_no_more() {
    // BI7, F33: the host refuses each write, here by a seal on a file in memory.
    with_each_engine(|kind| {
        let memory = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::ALLOW_SEALING)
            .map(File::from)
            .expect("a memory file");
        memory.set_len(4 * SECTOR as u64).unwrap();
        rustix::fs::fcntl_add_seals(&memory, rustix::fs::SealFlags::WRITE).unwrap();
        let Some(mut guest) = Guest::new(kind, memory, false, ALL) else {
            return;
        };
        assert_eq!(guest.status(OUT, 0, &[1; SECTOR], 0), IOERR);
        assert_eq!(guest.status(WRITE_ZEROES, 0, &range(0, 1, 0), 0), IOERR);
        assert_eq!(guest.status(IN, 0, &[], SECTOR), OK);
        assert_eq!(guest.driver.status(), 0x0f);
    });
}

#[test]
fn a_head_that_is_under_way_is_not_begun_again() {
    // B2.4, CVE-2026-45782.
    with_each_engine(|kind| {
        let Some(mut guest) = Guest::new(kind, file(64 * SECTOR), false, ALL) else {
            return;
        };
        let header = super::header(IN, 0);
        let sent = guest.driver.allocate(16);
        let room = guest.driver.allocate(1024);
        let memory = guest.driver.memory().clone();
        memory.write_slice(&header, GuestAddress(sent)).unwrap();
        let chain = [
            RawDescriptor {
                addr: sent,
                len: 16,
                flags: NEXT,
                next: 1,
            },
            RawDescriptor {
                addr: room,
                len: 513,
                flags: WRITE,
                next: 0,
            },
        ];
        // Both are there when the queue is served: the first is under way when the second is met.
        guest.driver.add_raw(0, 0, &chain);
        guest.driver.add_raw(0, 0, &chain);
        guest.driver.kick(0);
        let deadline = Instant::now() + Duration::from_millis(WAIT_MS);
        while !guest.driver.needs_reset() {
            assert!(Instant::now() < deadline, "accepted");
            guest
                .poller
                .turn(Some(Duration::from_millis(WAIT_MS)))
                .unwrap();
        }
        reset(&mut guest);
        assert_eq!(guest.driver.status(), 0);
    });
}

#[test]
fn a_broken_chain_asks_for_a_reset_and_a_reset_mends_it() {
    with_each_engine(|kind| {
        let Some(mut guest) = Guest::new(kind, file(64 * SECTOR), false, ALL) else {
            return;
        };
        let outside = RawDescriptor {
            addr: 1 << 40,
            len: 16,
            flags: 0,
            next: 0,
        };
        guest.driver.add_raw(0, 0, &[outside]);
        guest.driver.kick(0);
        guest.poller.turn(Some(Duration::ZERO)).unwrap();
        assert!(guest.driver.needs_reset());
        // The loop does not spin on the kicks of a queue that was given up (B2.11).
        guest.driver.kick(0);
        assert_eq!(guest.poller.turn(Some(Duration::ZERO)).unwrap(), 1);
        assert_eq!(guest.poller.turn(Some(Duration::ZERO)).unwrap(), 0);
        guest.driver.reset();
        guest.driver.negotiate(guest.driver.offered() & ALL);
        guest.driver.setup_queue(0, 16);
        guest.driver.start();
        assert_eq!(guest.status(OUT, 0, &[1; SECTOR], 0), OK);
        assert_eq!(guest.on_host(0, 1), [1; SECTOR]);
    });
}

/// Resets the device while another thread is the loop's, which hands out the results that a reset waits for.
fn reset(guest: &mut Guest) {
    let poller = guest.poller.clone();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                poller.turn(Some(Duration::from_millis(1))).unwrap();
            }
        });
        guest.driver.reset();
        over.store(true, Ordering::SeqCst);
    });
}

#[test]
fn after_a_reset_nothing_is_watched_and_nothing_is_written() {
    with_each_engine(|kind| {
        let whole = file(64 * SECTOR);
        whole.write_all_at(&[7; 64 * SECTOR], 0).unwrap();
        let Some(mut guest) = Guest::new(kind, whole, false, ALL) else {
            return;
        };
        let sent = guest.driver.allocate(16);
        let room = guest.driver.allocate(1024);
        let memory = guest.driver.memory().clone();
        memory
            .write_slice(&super::header(IN, 0), GuestAddress(sent))
            .unwrap();
        let chain = [(sent, 16, NEXT, 1), (room, 513, WRITE, 0)];
        let chain = chain.map(|(addr, len, flags, next)| RawDescriptor {
            addr,
            len,
            flags,
            next,
        });
        guest.driver.add_raw(0, 0, &chain);
        guest.driver.kick(0);
        let watched = guest.poller.watched();
        // Only the kick is served here: the request is under way when the reset comes.
        guest.poller.turn(Some(Duration::ZERO)).unwrap();
        reset(&mut guest);
        assert_eq!(guest.driver.status(), 0);
        assert_eq!(guest.poller.watched(), watched - 2);
        memory
            .write_slice(&[0xee; 513], GuestAddress(room))
            .unwrap();
        while guest.poller.turn(Some(Duration::from_millis(50))).unwrap() > 0 {}
        let mut after = [0; 513];
        memory.read_slice(&mut after, GuestAddress(room)).unwrap();
        assert_eq!(after, [0xee; 513]);
    });
}

#[test]
fn a_reset_ends_what_no_thread_has_begun() {
    let poller = Arc::new(Poller::new().unwrap());
    let io = idle_engine(EngineKind::Threads, &poller).unwrap();
    let mut guest = Guest::with(io, poller, file(64 * SECTOR), false, ALL);
    let header = super::header(IN, 0);
    let buffers = [Buffer::Readable(&header), Buffer::Writable(513)];
    guest.driver.add(0, &buffers);
    guest.driver.kick(0);
    guest.poller.turn(Some(Duration::ZERO)).unwrap();
    reset(&mut guest);
    assert_eq!(guest.driver.status(), 0);
}

#[test]
fn what_cannot_be_a_disk_is_refused() {
    // BI1, BI3.
    let poller = Arc::new(Poller::new().unwrap());
    let io = engine(EngineKind::Threads, &poller).unwrap();
    let refused = |file: File, read_only, queues, id: &str| {
        let setup = DiskSetup {
            file,
            read_only,
            queues,
            id: id.into(),
        };
        match Disk::new(setup, io.clone(), poller.clone()) {
            Err(error) => error.to_string(),
            Ok(_) => panic!("accepted"),
        }
    };
    let open = |options: &mut OpenOptions, path: &str| options.open(path).expect("opens");
    let read = || OpenOptions::new().read(true).to_owned();
    let whole = || file(4 * SECTOR);
    assert!(refused(whole(), false, 0, "").contains("1 to 16 queues"));
    assert!(refused(whole(), false, 17, "").contains("1 to 16 queues"));
    assert!(refused(whole(), false, 1, "123456789012345678901").contains("20 bytes"));
    assert!(refused(whole(), false, 1, "a\nb").contains("printable"));
    assert!(refused(file(511), false, 1, "").contains("511 bytes"));
    assert!(refused(file(0), false, 1, "").contains("0 bytes"));
    for neither in ["/", "/dev/null", "/proc/self/mem"] {
        let why = refused(open(&mut read(), neither), true, 1, "");
        let small = neither == "/proc/self/mem"; // it says that it is a regular file, of no bytes
        assert!(
            why.contains(if small { "0 bytes" } else { "neither" }),
            "{why}"
        );
    }
    let named = std::env::temp_dir().join(format!("capsid-disk-{}", std::process::id()));
    std::fs::write(&named, [0; SECTOR]).unwrap();
    let path = named.to_str().unwrap();
    let why = refused(open(&mut read(), path), false, 1, "");
    assert!(why.contains("not open for writing"), "{why}");
    let write_only = open(OpenOptions::new().write(true), path);
    assert!(refused(write_only, false, 1, "").contains("not open for reading"));
    let path_only = open(read().custom_flags(libc::O_PATH), path);
    assert!(refused(path_only, true, 1, "").contains("not open for reading"));
    let append = open(read().append(true), path);
    assert!(refused(append, false, 1, "").contains("O_APPEND"));
    std::fs::remove_file(named).unwrap();
}

#[test]
fn there_are_no_more_disks_than_the_engine_has_places() {
    with_each_engine(|kind| {
        let poller = Arc::new(Poller::new().unwrap());
        let Some(io) = engine(kind, &poller) else {
            return;
        };
        let disk = || {
            let setup = DiskSetup {
                file: file(SECTOR),
                read_only: true,
                queues: 1,
                id: String::new(),
            };
            Disk::new(setup, io.clone(), poller.clone())
        };
        let disks: Vec<_> = (0..DISKS_MAX).map(|_| disk().expect("a place")).collect();
        let more = disk().err().expect("no place is left").to_string();
        assert!(more.contains("at most 64"), "{more}");
        for disk in disks {
            let driver = Driver::up(Box::new(disk), 1 << 5);
            assert_eq!(driver.status(), 0x0f);
        }
    });
}

#[test]
fn a_disk_that_leaves_gives_its_place_to_another() {
    with_each_engine(|kind| {
        let poller = Arc::new(Poller::new().unwrap());
        let Some(io) = engine(kind, &poller) else {
            return;
        };
        // More than there are places, so that each is used again.
        for round in 0..=DISKS_MAX {
            let whole = file(64 * SECTOR);
            whole.write_all_at(&[round as u8; SECTOR], 0).unwrap();
            let mut guest = Guest::with(io.clone(), poller.clone(), whole, true, ALL);
            let (status, _, data) = guest.ask(IN, 0, &[], SECTOR);
            assert_eq!((status, data), (OK, vec![round as u8; SECTOR]));
            let (status, ..) = guest.ask(OUT, 0, &[0; SECTOR], 0);
            assert_eq!(status, IOERR);
            let counted: BTreeMap<_, _> = guest
                .driver
                .transport
                .counters()
                .read()
                .into_iter()
                .collect();
            assert_eq!(
                (counted["reads"], counted["read_bytes"]),
                (1, SECTOR as u64)
            );
            assert_eq!((counted["writes"], counted["errors"]), (0, 1));
        }
    });
}

#[test]
fn a_disk_that_is_dropped_when_the_loop_has_ended_waits_for_nothing() {
    let poller = Arc::new(Poller::new().unwrap());
    let io = idle_engine(EngineKind::Best, &poller);
    let Some(io) = io else {
        return;
    };
    let mut guest = Guest::with(io.clone(), poller, file(64 * SECTOR), false, ALL);
    let header = super::header(IN, 0);
    let buffers = [Buffer::Readable(&header), Buffer::Writable(513)];
    guest.driver.add(0, &buffers);
    guest.driver.kick(0);
    // The kick is served, its result is not handed out.
    guest.poller.turn(Some(Duration::ZERO)).unwrap();
    io.leave();
    let since = Instant::now();
    drop(guest.driver);
    assert!(since.elapsed() < Duration::from_secs(1));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever a driver makes available, the disk stays as it was, and after a reset it serves.
    #[test]
    fn a_read_only_disk_survives_any_ring(
        ring in prop::collection::vec(any_descriptor(), 1..8),
        heads in prop::collection::vec(prop_oneof![8 => 0u16..8, 1 => any::<u16>()], 1..6),
        kinds in prop::collection::vec(0u32..16, 16),
        threads in any::<bool>(),
    ) {
        let whole = file(64 * SECTOR);
        whole.write_all_at(&[7; 64 * SECTOR], 0).unwrap();
        let kind = if threads { EngineKind::Threads } else { EngineKind::Best };
        let Some(mut guest) = Guest::new(kind, whole, true, ALL) else {
            return Ok(());
        };
        // Where a chain begins there is a request.
        for (at, kind) in ring.iter().zip(&kinds) {
            let _outside = guest.driver.memory().write_obj(*kind, GuestAddress(at.addr));
        }
        for head in heads {
            guest.driver.add_raw(0, head, &ring);
        }
        guest.driver.kick(0);
        for _ in 0..4 {
            guest.poller.turn(Some(Duration::from_millis(1))).unwrap();
        }
        reset(&mut guest);
        prop_assert_eq!(guest.driver.status(), 0);
        prop_assert_eq!(guest.on_host(0, 64), vec![7; 64 * SECTOR]);
        guest.driver.negotiate(guest.driver.offered() & ALL);
        guest.driver.setup_queue(0, 16);
        guest.driver.start();
        let (status, _, data) = guest.ask(IN, 3, &[], SECTOR);
        prop_assert_eq!((status, data), (OK, vec![7; SECTOR]));
    }
}

#[test]
fn a_disk_of_holes_is_as_large_as_its_file_to_the_last_sector() {
    // BI1.
    // More sectors than 32 bits count, and no more than any file system lets a file have.
    const BYTES: u64 = 1 << 43;
    with_each_engine(|kind| {
        let holes = file(0);
        holes.set_len(BYTES).unwrap();
        let Some(mut guest) = Guest::new(kind, holes, false, ALL) else {
            return;
        };
        let sectors = BYTES / SECTOR as u64;
        assert_eq!(guest.driver.device_config()[..8], sectors.to_le_bytes());
        assert_eq!(guest.status(IN, sectors - 1, &[], SECTOR), OK);
        assert_eq!(guest.status(IN, sectors, &[], SECTOR), IOERR);
        assert_eq!(guest.status(OUT, sectors, &[1; SECTOR], 0), IOERR);
    });
}
