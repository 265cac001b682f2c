//! A guest that breaks the rules, and one that just does nothing.

use super::guest::*;
use crate::testing::Buffer;
use crate::vsock::MAX_CONNECTIONS;
use crate::vsock::device::RESETS_MAX;
use proptest::prelude::*;
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Calls of subscribers in a while in which nothing happens.
fn calls_when_left_alone(guest: &mut Guest) -> usize {
    (0..5)
        .map(|_| guest.poller.turn(Some(Duration::from_millis(5))).unwrap())
        .sum()
}

#[test]
fn a_guest_that_never_refills_costs_a_bounded_number_of_wake_ups() {
    let mut guest = Guest::new(256);
    guest.refill(64);
    let mut hosts: Vec<UnixStream> = (0..50).map(|port| guest.dial(1024, port)).collect();
    // Uses all buffers up; none comes back.
    for host in &mut hosts {
        while host.write(&[1; 16 * 1024]).is_ok() {}
    }
    let before = guest.calls;
    guest.settle();
    let calls = guest.calls - before;
    assert!(calls <= 50 * 4, "{calls} calls for 50 sockets");
    assert_eq!(calls_when_left_alone(&mut guest), 0);
    // Hosts that hang up meanwhile are no reason to spin either.
    drop(hosts);
    let before = guest.calls;
    guest.settle();
    assert!(guest.calls - before <= 50 * 4);
    assert_eq!(calls_when_left_alone(&mut guest), 0);
    // And all of it goes on when buffers come.
    while guest.take().is_some() {}
    guest.refill(64);
    let mut ended = 0;
    while ended < 50 {
        let packets = guest.receive_all();
        assert!(!packets.is_empty());
        ended += packets
            .iter()
            .filter(|p| p.op == SHUTDOWN && p.flags == RECEIVE | SEND)
            .count();
    }
}

#[test]
fn a_guest_that_gives_no_credit_costs_a_bounded_number_of_wake_ups() {
    let mut guest = Guest::new(256);
    guest.refill(64);
    let request = Wire {
        buf_alloc: 0,
        ..Wire::new(REQUEST, 1024, 7)
    };
    let mut host = guest.dial_with(&request);
    host.write_all(&[1; 1000]).unwrap();
    assert_eq!(guest.ops(), [CREDIT_REQUEST]);
    assert_eq!(calls_when_left_alone(&mut guest), 0);
    drop(host);
    // The host takes nothing any more; its bytes still wait for credit.
    let packets = guest.receive_all();
    assert_eq!((packets[0].op, packets[0].flags), (SHUTDOWN, RECEIVE));
    assert_eq!(calls_when_left_alone(&mut guest), 0);
}

#[test]
fn a_host_that_never_reads_costs_a_bounded_number_of_wake_ups() {
    let mut guest = Guest::new(256);
    guest.refill(64);
    let host = guest.dial(1024, 7);
    for _ in 0..8 {
        guest.send(&Wire::data(1024, 7, &[1; 40_000]));
        guest.receive_all();
    }
    assert_eq!(calls_when_left_alone(&mut guest), 0);
    drop(host);
    assert_eq!(guest.ops(), [SHUTDOWN]);
    assert_eq!(calls_when_left_alone(&mut guest), 0);
}

/// As many fds as this process may have at all.
fn raise_fd_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, all).expect("the hard limit may be used up");
}

#[test]
fn one_connection_too_many_is_reset_and_one_less_is_not() {
    raise_fd_limit();
    let mut guest = Guest::new(256);
    guest.refill(64);
    let mut hosts = Vec::new();
    for port in 0..MAX_CONNECTIONS as u32 {
        hosts.push(guest.dial(1024, port));
    }
    guest.send(&Wire::new(REQUEST, 1024, 5000));
    assert_eq!(guest.ops(), [RST]);
    assert_eq!(guest.handle.connections(), MAX_CONNECTIONS);
    let (ours, theirs) = UnixStream::pair().unwrap();
    assert!(guest.handle.connect(1025, theirs.into()).is_err());
    drop(ours);
    guest.send(&Wire::shutdown(1024, 0, RECEIVE | SEND));
    assert_eq!(guest.ops(), [RST]);
    hosts.push(guest.dial(1024, 5000));
}

#[test]
fn ports_that_are_not_open_or_used_up_are_reset() {
    let mut guest = Guest::new(256);
    guest.refill(16);
    guest.host.open.lock().unwrap().insert(9, 1);
    guest.send(&Wire::new(REQUEST, 8, 1));
    assert_eq!(guest.ops(), [RST]);
    let host = guest.dial(9, 1);
    guest.send(&Wire::new(REQUEST, 9, 2));
    assert_eq!(guest.ops(), [RST]);
    // Also when the first one is over.
    drop(host);
    guest.ops();
    guest.send(&Wire::new(RST, 9, 1));
    guest.send(&Wire::new(REQUEST, 9, 1));
    assert_eq!(guest.ops(), [RST]);
    assert_eq!(guest.handle.connections(), 0);
}

#[test]
fn a_storm_of_stray_packets_stops_the_guests_own_queue_and_nothing_else() {
    let mut guest = Guest::new(64);
    let storm: Vec<Wire> = (0..100).map(|port| Wire::new(RW, 1, port)).collect();
    for _ in 0..6 {
        // No receive buffer: the answers wait, and beyond RESETS_MAX the packets do.
        for packet in &storm {
            if guest.driver.used_index(TX) as usize >= RESETS_MAX {
                break;
            }
            guest.driver.add(TX, &[Buffer::Readable(&packet.header())]);
            guest.driver.kick(TX);
            guest.settle();
            while guest.driver.used(TX).is_some() {}
        }
    }
    let header = storm[0].header();
    for _ in 0..20 {
        guest.driver.add(TX, &[Buffer::Readable(&header)]);
    }
    guest.driver.kick(TX);
    guest.settle();
    assert_eq!(guest.driver.used_index(TX) as usize, RESETS_MAX);
    assert_eq!(calls_when_left_alone(&mut guest), 0);
    guest.refill(100);
    assert_eq!(guest.ops().len(), RESETS_MAX + 20);
    assert_eq!(guest.driver.used_index(TX) as usize, RESETS_MAX + 20);
}

#[test]
fn wrong_packets_are_reset_or_dropped_and_the_device_lives() {
    let mut guest = Guest::new(64);
    guest.refill(32);
    let good = Wire::new(REQUEST, 1024, 7);
    for (packet, answers) in [
        (
            Wire {
                src_cid: 4,
                ..good.clone()
            },
            1,
        ),
        (
            Wire {
                dst_cid: 1,
                ..good.clone()
            },
            1,
        ),
        (
            Wire {
                kind: 2,
                ..good.clone()
            },
            1,
        ),
        (
            Wire {
                kind: 0,
                ..good.clone()
            },
            1,
        ),
        (
            Wire {
                op: 0,
                ..good.clone()
            },
            1,
        ),
        (
            Wire {
                op: 255,
                ..good.clone()
            },
            1,
        ),
        (
            Wire {
                op: RESPONSE,
                ..good.clone()
            },
            1,
        ),
        (
            Wire {
                op: SHUTDOWN,
                flags: SEND,
                ..good.clone()
            },
            1,
        ),
        (
            Wire {
                op: CREDIT_REQUEST,
                ..good.clone()
            },
            1,
        ),
        (
            Wire {
                op: RST,
                ..good.clone()
            },
            0,
        ),
        (
            Wire {
                op: RST,
                src_cid: 9,
                ..good.clone()
            },
            0,
        ),
        (
            Wire {
                len: 5,
                ..good.clone()
            },
            1,
        ),
    ] {
        guest.send(&packet);
        let got = guest.receive_all();
        assert_eq!(got.len(), answers, "{packet:?}");
        assert!(got.iter().all(|p| p.op == RST && p.kind == packet.kind));
        assert_eq!(guest.handle.connections(), 0);
    }
    // A header that is not all there has nobody to answer.
    guest
        .driver
        .add(TX, &[Buffer::Readable(&good.header()[..43])]);
    guest.driver.kick(TX);
    guest.settle();
    assert_eq!(guest.driver.used(TX).expect("comes back").len, 0);
    assert!(guest.ops().is_empty());
    guest.dial(1024, 7);
    assert_eq!(guest.driver.status(), 0x0f);
}

#[test]
fn what_breaks_a_connection_resets_it_once_and_frees_its_name() {
    let broken = [
        Wire::new(REQUEST, 1024, 7),
        Wire::new(RESPONSE, 1024, 7),
        Wire::new(99, 1024, 7),
        Wire::shutdown(1024, 7, 0),
        Wire::shutdown(1024, 7, 4),
        Wire {
            len: 10,
            ..Wire::new(RW, 1024, 7)
        },
        Wire::new(RW, 1024, 7),
    ];
    let mut guest = Guest::new(64);
    guest.refill(32);
    for packet in broken {
        let mut host = guest.dial(1024, 7);
        guest.send(&Wire::data(1024, 7, b"kept"));
        guest.send(&packet);
        assert_eq!(guest.ops(), [RST], "{packet:?}");
        assert_eq!(read_now(&mut host), (b"kept".to_vec(), true));
        assert_eq!(guest.handle.connections(), 0);
    }
}

#[test]
fn receive_buffers_too_small_for_a_header_come_back_empty() {
    let mut guest = Guest::new(64);
    for bytes in [1, 43] {
        guest.driver.add(RX, &[Buffer::Writable(bytes)]);
    }
    guest
        .driver
        .add(RX, &[Buffer::Readable(b"not writable at all")]);
    guest.refill(1);
    guest.send(&Wire::new(REQUEST, 1, 1));
    for _ in 0..3 {
        assert_eq!(guest.driver.used(RX).expect("comes back").len, 0);
    }
    assert_eq!(guest.take().expect("an answer").op, RST);
    // A buffer for a header alone cannot carry data; those in between are skipped, none is lost.
    guest.refill(8);
    let mut host = guest.dial(1024, 7);
    while guest.take().is_some() {}
    let mut guest_bytes = Vec::new();
    for bytes in [44u32, 50, 44, 44, 50, 60, 44, 54] {
        guest.driver.add(RX, &[Buffer::Writable(bytes)]);
    }
    let data = pattern(30, 6);
    host.write_all(&data).unwrap();
    guest.driver.kick(RX);
    guest.settle();
    while let Some(used) = guest.driver.used(RX) {
        if used.len > 44 {
            guest_bytes.extend_from_slice(&used.data[44..]);
        }
    }
    assert!(guest_bytes == data);
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_closes_the_hosts_ends() {
    for queue in [RX, TX, EVENT] {
        let mut guest = Guest::new(64);
        guest.refill(8);
        let mut host = guest.dial(1024, 7);
        if queue == EVENT {
            guest.handle.reset_transport();
        }
        // Nobody reads it after a transport reset.
        let _ = host.write(b"something to send");
        while guest.take().is_some() {}
        guest.driver.set_available_index(queue, 0x7fff);
        guest.driver.kick(queue);
        // Something to do for the receive queue.
        guest.settle();
        if queue == RX {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let _ = guest.handle.connect(1, theirs.into());
            drop(ours);
        }
        assert!(guest.driver.needs_reset(), "queue {queue}");
        assert_eq!(read_now(&mut host), (vec![], true));
        assert_eq!(guest.handle.connections(), 0);
        assert_eq!(calls_when_left_alone(&mut guest), 0);
        guest.driver.reset();
        assert_eq!(guest.driver.status(), 0);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Packet(u16, u32, u32, u32, u32, u32),
    Bytes(Vec<u8>),
    HostWrites(usize, usize),
    HostReads(usize),
    HostCloses(usize),
    HostHalfCloses(usize, bool),
    Connect(u32),
    Refill(usize),
    TransportReset,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0u16..9, 0u32..4, 0u32..70_000, 0u32..5, any::<u32>(), any::<u32>())
            .prop_map(|(op, port, len, flags, alloc, fwd)| Step::Packet(op, port, len, flags, alloc, fwd)),
        4 => (0u32..4).prop_map(|port| Step::Packet(1, port, 0, 0, 1 << 20, 0)),
        3 => (0u32..4, 1u32..20_000).prop_map(|(port, len)| Step::Packet(5, port, len, 0, 1 << 20, 0)),
        2 => proptest::collection::vec(any::<u8>(), 1..100).prop_map(Step::Bytes),
        4 => (0usize..8, 1usize..50_000).prop_map(|(which, len)| Step::HostWrites(which, len)),
        2 => (0usize..8).prop_map(Step::HostReads),
        1 => (0usize..8).prop_map(Step::HostCloses),
        1 => (0usize..8, any::<bool>()).prop_map(|(which, read)| Step::HostHalfCloses(which, read)),
        1 => (0u32..4).prop_map(Step::Connect),
        4 => (1usize..20).prop_map(Step::Refill),
        1 => Just(Step::TransportReset),
    ]
}

fn run(steps: Vec<Step>) {
    let mut guest = Guest::with_timeouts(700, Duration::from_millis(2), Duration::from_millis(2));
    guest.refill(20);
    let mut hosts: Vec<UnixStream> = Vec::new();
    let mut asked = Vec::new();
    for step in steps {
        match step {
            Step::Packet(op, port, len, flags, buf_alloc, fwd_cnt) => {
                let payload = vec![7; if op == RW { len as usize } else { 0 }];
                // Answers go to the host port that was asked for last.
                let host = if op == RESPONSE || port == 3 {
                    asked.last().copied().unwrap_or(1024)
                } else {
                    1024
                };
                guest.send(&Wire {
                    len: payload.len() as u32,
                    payload,
                    flags,
                    buf_alloc,
                    fwd_cnt,
                    ..Wire::new(op, host, port)
                });
            }
            Step::Bytes(bytes) => {
                guest
                    .driver
                    .add(TX, &[Buffer::Readable(&bytes), Buffer::Readable(&[1; 9])]);
                guest.driver.kick(TX);
            }
            Step::HostWrites(which, len) => {
                if let Some(host) = hosts.get_mut(which) {
                    let _ = host.write(&vec![3; len]);
                }
            }
            Step::HostReads(which) => {
                if let Some(host) = hosts.get_mut(which) {
                    read_now(host);
                }
            }
            Step::HostCloses(which) if which < hosts.len() => drop(hosts.swap_remove(which)),
            Step::HostHalfCloses(which, read) => {
                if let Some(host) = hosts.get_mut(which) {
                    let _ = host.shutdown(if read {
                        std::net::Shutdown::Read
                    } else {
                        std::net::Shutdown::Write
                    });
                }
            }
            Step::Connect(port) => {
                let (ours, theirs) = UnixStream::pair().unwrap();
                ours.set_nonblocking(true).unwrap();
                if guest.handle.connect(port, theirs.into()).is_ok() {
                    hosts.push(ours);
                }
            }
            Step::Refill(count) => {
                let used = std::iter::from_fn(|| guest.take()).collect::<Vec<_>>();
                asked.extend(used.iter().filter(|p| p.op == REQUEST).map(|p| p.src_port));
                guest.refill(count.min(used.len()));
            }
            Step::TransportReset => guest.handle.reset_transport(),
            Step::HostCloses(_) => {}
        }
        guest.settle();
        while guest.driver.used(TX).is_some() {}
        hosts.extend(
            guest
                .host
                .accepted
                .lock()
                .unwrap()
                .drain(..)
                .map(|(_, host)| host),
        );
        assert!(guest.handle.connections() <= hosts.len() + 20);
    }
    assert_eq!(
        guest.driver.status() & 0x40,
        0,
        "no packet is a reason for a reset"
    );
    guest.driver.reset();
    guest.settle();
    assert_eq!(guest.handle.connections(), 0);
    assert_eq!(guest.poller.watched(), 2);
    for host in &mut hosts {
        guest.wait(|_| read_now(host).1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn no_mix_of_packets_and_host_events_breaks_the_device(steps in proptest::collection::vec(step(), 1..80)) {
        run(steps);
    }
}
