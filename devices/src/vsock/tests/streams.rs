//! Data: both ways, both makers of a connection, credit, many connections at once.

use super::guest::*;
use crate::testing::Buffer;
use std::io::Write;

const MIB: usize = 1 << 20;

#[test]
fn a_guests_connection_carries_data_both_ways() {
    let mut guest = Guest::new(256);
    guest.refill(16);
    let mut host = guest.dial(1024, 7);
    guest.send(&Wire::data(1024, 7, b"from the guest"));
    assert_eq!(read_now(&mut host), (b"from the guest".to_vec(), false));
    host.write_all(b"from the host").unwrap();
    let packets = guest.receive_all();
    assert_eq!(packets.len(), 1);
    let packet = &packets[0];
    assert_eq!((packet.op, packet.kind), (RW, 1));
    assert_eq!(packet.payload, b"from the host");
    assert_eq!((packet.src_cid, packet.dst_cid), (2, GUEST_CID));
    assert_eq!((packet.src_port, packet.dst_port), (1024, 7));
    assert_eq!((packet.buf_alloc, packet.fwd_cnt), (256 * 1024, 14));
}

#[test]
fn a_hosts_connection_carries_data_both_ways() {
    let mut guest = Guest::new(256);
    guest.refill(16);
    let (mut host, port) = guest.connected(1025);
    host.write_all(b"header and more").unwrap();
    let packets = guest.receive_all();
    assert_eq!(packets.len(), 1);
    assert_eq!(packets[0].payload, b"header and more");
    guest.send(&Wire::data(port, 1025, b"back"));
    assert_eq!(read_now(&mut host).0, b"back");
}

#[test]
fn what_the_host_writes_before_the_guest_answers_arrives_after() {
    let mut guest = Guest::new(256);
    guest.refill(16);
    let (mut host, request) = guest.connect(1025);
    host.write_all(b"early").unwrap();
    assert!(guest.ops().is_empty());
    // Even if the host's program is gone by then.
    drop(host);
    assert!(guest.ops().is_empty());
    guest.send(&Wire::new(RESPONSE, request.src_port, 1025));
    let packets = guest.receive_all();
    let bytes: Vec<u8> = packets.iter().flat_map(|p| p.payload.clone()).collect();
    assert_eq!(bytes, b"early");
    let last = packets.last().unwrap();
    assert_eq!((last.op, last.flags), (SHUTDOWN, RECEIVE | SEND));
}

#[test]
fn a_host_connect_that_the_guest_refuses_closes_the_fd() {
    let mut guest = Guest::new(256);
    guest.refill(16);
    let (mut host, request) = guest.connect(1025);
    host.write_all(b"never read").unwrap();
    guest.send(&Wire::new(RST, request.src_port, 1025));
    assert_eq!(read_now(&mut host), (vec![], true));
    assert_eq!(guest.handle.connections(), 0);
    assert!(guest.ops().is_empty());
}

#[test]
fn host_ports_never_collide() {
    let mut guest = Guest::new(256);
    guest.refill(16);
    let mut ports = std::collections::HashSet::new();
    let mut kept = Vec::new();
    for _ in 0..50 {
        let (stream, port) = guest.connected(1025);
        assert!(ports.insert(port));
        assert!(port >= 1 << 30);
        kept.push(stream);
    }
}

/// Sends `data` as a driver does that keeps to the credit it is told, reading at the host meanwhile.
fn upload(guest: &mut Guest, host: &mut std::os::unix::net::UnixStream, data: &[u8]) -> Vec<u8> {
    let (mut sent, mut read) = (0, Vec::new());
    let (mut buf_alloc, mut fwd_cnt) = (256 * 1024, 0u32);
    let mut stalls = 0;
    while read.len() < data.len() {
        let room = buf_alloc - (sent as u32).wrapping_sub(fwd_cnt);
        let bytes = (room as usize).min(data.len() - sent).min(50_000);
        if bytes > 0 {
            guest.send(&Wire::data(1024, 7, &data[sent..sent + bytes]));
            sent += bytes;
        } else {
            // Only then does the host's program read: the credit runs dry each time.
            stalls += 1;
            assert!(stalls < 10_000, "credit never came back");
            read.extend(read_now(host).0);
        }
        for packet in guest.receive_all() {
            (buf_alloc, fwd_cnt) = (packet.buf_alloc, packet.fwd_cnt);
        }
    }
    assert!(stalls > 1);
    read
}

#[test]
fn megabytes_reach_the_host_whole_through_a_socket_that_is_often_full() {
    let mut guest = Guest::new(256);
    guest.refill(16);
    let mut host = guest.dial(1024, 7);
    let data = pattern(5 * MIB, 1);
    assert!(upload(&mut guest, &mut host, &data) == data);
}

#[test]
fn megabytes_reach_the_guest_whole_through_small_buffers() {
    for (rx_bytes, buffers, length) in [(300, 100, 2 * MIB), (45, 3, 30_000), (3776, 128, 4 * MIB)]
    {
        let mut guest = Guest::new(rx_bytes);
        guest.refill(buffers);
        let request = Wire {
            buf_alloc: 64 * 1024,
            ..Wire::new(REQUEST, 1024, 7)
        };
        let mut host = guest.dial_with(&request);
        let data = pattern(length, 2);
        let (mut sent, mut received) = (0, Vec::new());
        while received.len() < data.len() {
            while let Ok(count) = host.write(&data[sent..]) {
                sent += count;
                if sent == data.len() {
                    break;
                }
            }
            for packet in guest.receive_all() {
                received.extend(packet.payload);
            }
            guest.send(&Wire {
                buf_alloc: 64 * 1024,
                fwd_cnt: received.len() as u32,
                ..Wire::new(CREDIT_UPDATE, 1024, 7)
            });
        }
        assert!(received == data, "buffers of {rx_bytes}");
    }
}

#[test]
fn the_host_waits_for_the_guests_credit_and_asks_for_it_once() {
    let mut guest = Guest::new(256);
    guest.refill(64);
    let request = Wire {
        buf_alloc: 1000,
        ..Wire::new(REQUEST, 1024, 7)
    };
    let mut host = guest.dial_with(&request);
    let data = pattern(3000, 3);
    host.write_all(&data).unwrap();
    let packets = guest.receive_all();
    let bytes: usize = packets.iter().map(|p| p.payload.len()).sum();
    assert_eq!(bytes, 1000);
    let asked = packets.iter().filter(|p| p.op == CREDIT_REQUEST).count();
    assert_eq!(asked, 1);
    // Silence until the guest gives room.
    assert!(guest.ops().is_empty());
    guest.send(&Wire {
        buf_alloc: 1000,
        fwd_cnt: 300,
        ..Wire::new(CREDIT_UPDATE, 1024, 7)
    });
    let bytes: usize = guest.receive_all().iter().map(|p| p.payload.len()).sum();
    assert_eq!(bytes, 300);
    // Counters that make no sense give none.
    guest.send(&Wire {
        buf_alloc: 1000,
        fwd_cnt: 5000,
        ..Wire::new(CREDIT_UPDATE, 1024, 7)
    });
    assert!(guest.receive_all().iter().all(|p| p.payload.is_empty()));
}

#[test]
fn a_host_that_never_reads_stops_the_guest_at_its_credit() {
    let mut guest = Guest::new(256);
    guest.refill(16);
    let mut host = guest.dial(1024, 7);
    let (mut sent, mut fwd_cnt) = (Vec::new(), 0);
    loop {
        let room = 256 * 1024 - (sent.len() as u32 - fwd_cnt);
        if room == 0 {
            break;
        }
        let bytes = pattern((room as usize).min(64 * 1024), u64::from(fwd_cnt) + 9);
        guest.send(&Wire::data(1024, 7, &bytes));
        sent.extend(bytes);
        for packet in guest.receive_all() {
            fwd_cnt = packet.fwd_cnt;
        }
    }
    // Asked, the host tells the truth: nothing more was taken, or so little that the rest counts.
    guest.send(&Wire::new(CREDIT_REQUEST, 1024, 7));
    let told = guest.receive_all();
    assert_eq!(told.len(), 1);
    assert_eq!(told[0].op, CREDIT_UPDATE);
    let room = 256 * 1024 - (sent.len() as u32 - told[0].fwd_cnt);
    guest.send(&Wire::data(1024, 7, &vec![1; room as usize + 1]));
    assert_eq!(guest.ops(), [RST], "beyond the credit");
    // What was within it arrives, and then the end.
    let mut read = Vec::new();
    guest.wait(|_| {
        let (bytes, ended) = read_now(&mut host);
        read.extend(bytes);
        ended
    });
    assert!(read == sent);
    assert_eq!(guest.handle.connections(), 0);
}

#[test]
fn two_hundred_connections_at_once_keep_their_bytes_apart() {
    let mut guest = Guest::new(512);
    guest.refill(64);
    let mut hosts = Vec::new();
    for port in 0..200u32 {
        hosts.push((port, guest.dial(1024, port)));
    }
    assert_eq!(guest.handle.connections(), 200);
    for (port, host) in &mut hosts {
        host.write_all(&pattern(2000, u64::from(*port))).unwrap();
    }
    let mut received = vec![Vec::new(); 200];
    for packet in guest.receive_all() {
        received[packet.dst_port as usize].extend(packet.payload);
    }
    for (port, host) in &mut hosts {
        let bytes = pattern(2000, u64::from(*port));
        assert!(received[*port as usize] == bytes);
        guest.send(&Wire::data(1024, *port, &bytes));
        assert!(read_now(host).0 == bytes);
    }
    // All hosts go away at once: each connection is left in order.
    drop(hosts);
    let packets = guest.receive_all();
    assert_eq!(packets.len(), 200);
    for packet in packets {
        assert_eq!((packet.op, packet.flags), (SHUTDOWN, RECEIVE | SEND));
        guest.send(&Wire::new(RST, 1024, packet.dst_port));
    }
    assert_eq!(guest.handle.connections(), 0);
    assert_eq!(guest.poller.watched(), IDLE_WATCHES);
}

#[test]
fn a_busy_stream_does_not_starve_a_quiet_one() {
    let mut guest = Guest::new(1024);
    guest.refill(128);
    let mut busy = guest.dial(1024, 1);
    let mut quiet = guest.dial(1024, 2);
    // More than all buffers hold.
    while busy.write(&[1; 64 * 1024]).is_ok() {}
    quiet.write_all(b"me too").unwrap();
    guest.settle();
    let mut seen = Vec::new();
    for _ in 0..128 {
        seen.push(guest.take().expect("all buffers were used").dst_port);
    }
    assert!(seen.contains(&1) && seen.contains(&2));
}

#[test]
fn many_packets_make_few_interrupts() {
    let mut guest = Guest::new(1024);
    guest.refill(100);
    let mut host = guest.dial(1024, 1);
    let before = guest.driver.interrupts(RX);
    host.write_all(&[7; 50_000]).unwrap();
    guest.settle();
    let mut bytes = 0;
    while let Some(packet) = guest.take() {
        bytes += packet.payload.len();
    }
    assert_eq!(bytes, 50_000);
    assert!(guest.driver.interrupts(RX) - before <= 2);
}

#[test]
fn bytes_are_conserved_when_headers_and_payloads_are_cut_anywhere() {
    let mut guest = Guest::new(256);
    guest.refill(16);
    let mut host = guest.dial(1024, 7);
    let packet = Wire::data(1024, 7, &pattern(300, 4));
    let mut bytes = packet.header();
    bytes.extend(&packet.payload);
    for cut in [4, 7, 43, 44, 45, 100] {
        let pieces: Vec<Buffer<'_>> = bytes.chunks(cut).map(Buffer::Readable).collect();
        guest.driver.add(TX, &pieces);
        guest.driver.kick(TX);
        guest.settle();
        guest.driver.used(TX).expect("the chain comes back");
        assert!(read_now(&mut host).0 == packet.payload, "cut at {cut}");
    }
    // Receive buffers cut the same way.
    let mut guest = Guest::new(256);
    for cut in [1u32, 7, 43, 44, 45, 60] {
        let mut left = 120u32;
        let mut pieces = Vec::new();
        while left > 0 {
            pieces.push(Buffer::Writable(left.min(cut)));
            left -= left.min(cut);
        }
        guest.driver.add(RX, &pieces);
        guest.send(&Wire::new(REQUEST, 1, cut));
        let answer = guest.take().expect("an answer");
        assert_eq!((answer.op, answer.dst_port), (RST, cut));
    }
}

/// Time that the device takes for 256 MiB each way, without that of the driver and the host's program:
/// `cargo test --release -p capsid-devices --lib -- --ignored --nocapture device_time`.
#[test]
#[ignore = "a measurement, not a check"]
fn device_time_of_bulk_data() {
    use std::time::{Duration, Instant};
    const LENGTH: usize = 256 * MIB;
    let mut guest = Guest::new(3776);
    guest.refill(128);
    let mut host = guest.dial(1024, 7);
    let timed = |guest: &mut Guest, busy: &mut Duration| {
        let start = Instant::now();
        while guest.poller.turn(Some(Duration::ZERO)).unwrap() > 0 {}
        *busy += start.elapsed();
    };
    let block = vec![1; 64 * 1024];
    let (mut busy, mut received, mut turns) = (Duration::ZERO, 0, 0);
    while received < LENGTH {
        let _ = host.write(&block);
        timed(&mut guest, &mut busy);
        turns += 1;
        while let Some(packet) = guest.take() {
            received += packet.payload.len();
            guest.refill(1);
        }
        guest.driver.add(
            TX,
            &[Buffer::Readable(
                &Wire {
                    fwd_cnt: received as u32,
                    ..Wire::new(CREDIT_UPDATE, 1024, 7)
                }
                .header(),
            )],
        );
        guest.driver.kick(TX);
        timed(&mut guest, &mut busy);
        while guest.driver.used(TX).is_some() {}
    }
    report("to the guest", received, turns, busy);
    let packet = Wire::data(1024, 7, &block);
    let header = packet.header();
    let (mut busy, mut sent, mut turns) = (Duration::ZERO, 0, 0);
    while sent < LENGTH {
        let buffers = [Buffer::Readable(&header), Buffer::Readable(&packet.payload)];
        guest.driver.add(TX, &buffers);
        guest.driver.kick(TX);
        timed(&mut guest, &mut busy);
        turns += 1;
        sent += block.len();
        while guest.driver.used(TX).is_some() {}
        while guest.take().is_some() {
            guest.refill(1);
        }
        let (bytes, _) = read_now(&mut host);
        assert_eq!(bytes.len(), block.len());
    }
    report("to the host", sent, turns, busy);
}

fn report(way: &str, bytes: usize, turns: usize, busy: std::time::Duration) {
    let seconds = busy.as_secs_f64();
    let mib = bytes as f64 / MIB as f64;
    let each = seconds * 1e6 / turns as f64;
    println!(
        "{way}: {:.0} MiB/s, {each:.1} us for each 64 KiB",
        mib / seconds
    );
}
