//! Ends: each half, each order, each side, in time and out of it.

use super::guest::*;
use crate::testing::{Buffer, Driver, written_down};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

fn up() -> Guest {
    let mut guest = Guest::new(256);
    guest.refill(64);
    guest
}

fn idle(guest: &mut Guest) {
    guest.settle();
    assert_eq!(guest.handle.connections(), 0);
    assert_eq!(guest.poller.watched(), IDLE_WATCHES);
}

#[test]
fn the_guests_half_close_ends_the_hosts_input_and_not_its_output() {
    let mut guest = up();
    let mut host = guest.dial(1024, 7);
    guest.send_all(&[Wire::data(1024, 7, b"last"), Wire::shutdown(1024, 7, SEND)]);
    assert_eq!(read_now(&mut host), (b"last".to_vec(), true));
    host.write_all(b"still here").unwrap();
    assert_eq!(guest.receive_all()[0].payload, b"still here");
    // The guest's close of the other half ends it all.
    guest.send(&Wire::shutdown(1024, 7, RECEIVE));
    assert_eq!(guest.ops(), [RST]);
    idle(&mut guest);
}

#[test]
fn the_hosts_half_close_ends_the_guests_input_and_not_its_output() {
    let mut guest = up();
    let mut host = guest.dial(1024, 7);
    host.write_all(b"last").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    let packets = guest.receive_all();
    assert_eq!(packets[0].payload, b"last");
    assert_eq!((packets[1].op, packets[1].flags), (SHUTDOWN, SEND));
    assert_eq!(packets.len(), 2);
    guest.send(&Wire::data(1024, 7, b"still here"));
    assert_eq!(read_now(&mut host), (b"still here".to_vec(), false));
    // Both halves closed, one by each side: the host has left.
    guest.send(&Wire::shutdown(1024, 7, SEND));
    assert_eq!(read_now(&mut host), (vec![], true));
    let packets = guest.receive_all();
    assert_eq!(
        (packets[0].op, packets[0].flags),
        (SHUTDOWN, RECEIVE | SEND)
    );
    guest.send(&Wire::new(RST, 1024, 7));
    idle(&mut guest);
}

#[test]
fn a_guest_that_reads_no_more_fails_the_hosts_writes_only() {
    let mut guest = up();
    let mut host = guest.dial(1024, 7);
    guest.send(&Wire::shutdown(1024, 7, RECEIVE));
    let error = host.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    guest.send(&Wire::data(1024, 7, b"but I speak"));
    assert_eq!(read_now(&mut host), (b"but I speak".to_vec(), false));
    drop(host);
    let packets = guest.receive_all();
    assert_eq!(
        (packets[0].op, packets[0].flags),
        (SHUTDOWN, RECEIVE | SEND)
    );
    guest.send(&Wire::new(RST, 1024, 7));
    idle(&mut guest);
}

#[test]
fn a_host_that_reads_no_more_is_told_to_the_guest() {
    let mut guest = up();
    let mut host = guest.dial(1024, 7);
    host.shutdown(Shutdown::Read).unwrap();
    guest.send(&Wire::data(1024, 7, b"lost"));
    let packets = guest.receive_all();
    assert_eq!((packets[0].op, packets[0].flags), (SHUTDOWN, RECEIVE));
    host.write_all(b"still sends").unwrap();
    assert_eq!(guest.receive_all()[0].payload, b"still sends");
}

#[test]
fn a_guest_that_closes_is_answered_at_once_and_its_bytes_still_arrive() {
    let mut guest = up();
    let mut host = guest.dial(1024, 7);
    // More than the socket holds.
    let data = pattern(250 * 1024, 5);
    for chunk in data.chunks(50 * 1024) {
        guest.send(&Wire::data(1024, 7, chunk));
    }
    guest.receive_all();
    guest.send(&Wire::shutdown(1024, 7, RECEIVE | SEND));
    assert_eq!(guest.ops(), [RST]);
    // The name is free while the host still reads.
    let mut second = guest.dial(1024, 7);
    guest.send(&Wire::data(1024, 7, b"new"));
    assert_eq!(read_now(&mut second).0, b"new");
    let mut read = Vec::new();
    guest.wait(|_| {
        let (bytes, ended) = read_now(&mut host);
        read.extend(bytes);
        ended
    });
    assert!(read == data);
    assert_eq!(guest.handle.connections(), 1);
}

#[test]
fn a_reset_by_the_guest_closes_the_hosts_end_behind_what_was_sent() {
    let mut guest = up();
    let mut host = guest.dial(1024, 7);
    host.write_all(b"unread").unwrap();
    guest.send_all(&[Wire::data(1024, 7, b"sent"), Wire::new(RST, 1024, 7)]);
    assert_eq!(read_now(&mut host), (b"sent".to_vec(), true));
    idle(&mut guest);
}

#[test]
fn a_host_that_closes_with_bytes_unread_on_both_sides_leaves_in_order() {
    let mut guest = up();
    let mut host = guest.dial(1024, 7);
    guest.send(&Wire::data(1024, 7, b"never read by the host"));
    host.write_all(b"but this goes to the guest").unwrap();
    drop(host);
    let packets = guest.receive_all();
    let bytes: Vec<u8> = packets.iter().flat_map(|p| p.payload.clone()).collect();
    assert_eq!(bytes, b"but this goes to the guest");
    let last = packets.last().unwrap();
    assert_eq!((last.op, last.flags), (SHUTDOWN, RECEIVE | SEND));
    // Under way when the host left: dropped without a word.
    guest.send(&Wire::data(1024, 7, b"late"));
    assert!(guest.ops().is_empty());
    guest.send(&Wire::new(RST, 1024, 7));
    idle(&mut guest);
}

#[test]
fn a_request_that_the_guest_never_answers_ends_in_time() {
    let mut guest = Guest::with_timeouts(256, Duration::from_millis(30), Duration::from_secs(100));
    guest.refill(8);
    let (mut host, request) = guest.connect(1025);
    let mut ended = false;
    guest.wait(|_| {
        ended |= read_now(&mut host).1;
        ended
    });
    assert_eq!(guest.ops(), [RST]);
    // Too late.
    guest.send(&Wire::new(RESPONSE, request.src_port, 1025));
    assert_eq!(guest.ops(), [RST]);
    idle(&mut guest);
}

#[test]
fn a_guest_that_never_confirms_a_close_is_reset_in_time() {
    let mut guest = Guest::with_timeouts(256, Duration::from_secs(100), Duration::from_millis(30));
    guest.refill(8);
    let host = guest.dial(1024, 7);
    drop(host);
    assert_eq!(guest.ops(), [SHUTDOWN]);
    guest.wait(|guest| guest.handle.connections() == 0);
    assert_eq!(guest.ops(), [RST]);
    idle(&mut guest);
}

#[test]
fn a_reset_of_the_device_closes_every_host_end_and_a_new_driver_starts_afresh() {
    let mut guest = up();
    let mut dialled = guest.dial(1024, 7);
    let (mut connected, _) = guest.connected(1025);
    let (mut asked, _) = guest.connect(1026);
    for round in 0..3 {
        guest.driver.reset();
        assert_eq!(guest.driver.status(), 0);
        guest.settle();
        for host in [&mut dialled, &mut connected, &mut asked] {
            assert_eq!(host.read(&mut [0; 8]).unwrap(), 0);
        }
        assert_eq!(guest.handle.connections(), 0);
        assert_eq!(guest.poller.watched(), 2, "timer and resume");
        let refused = guest
            .handle
            .connect(1025, dialled.try_clone().unwrap().into());
        assert!(refused.is_err());
        guest.driver.negotiate(0);
        for queue in 0..3 {
            guest.driver.setup_queue(queue, 8);
        }
        guest.driver.start();
        guest.refill(4);
        // A connection of before is nobody's now.
        guest.send(&Wire::data(1024, 7, b"old"));
        assert_eq!(guest.ops(), [RST], "round {round}");
        dialled = guest.dial(1024, 7);
        (connected, _) = guest.connected(1025);
        (asked, _) = guest.connect(1026);
    }
}

#[test]
fn a_driver_that_is_back_before_the_loop_turned_meets_no_old_connection() {
    let mut guest = up();
    let mut host = guest.dial(1024, 7);
    guest.driver.reset();
    guest.driver.negotiate(0);
    for queue in 0..3 {
        guest.driver.setup_queue(queue, 64);
    }
    guest.driver.start();
    guest.refill(8);
    host.write_all(b"old").unwrap();
    assert!(guest.ops().is_empty());
    assert_eq!(read_now(&mut host), (vec![], true));
    guest.send(&Wire::data(1024, 7, b"old"));
    assert_eq!(guest.ops(), [RST]);
    idle(&mut guest);
}

#[test]
fn a_transport_reset_drops_all_connections_and_tells_the_driver() {
    let mut guest = up();
    let mut host = guest.dial(1024, 7);
    guest.connected(1025);
    guest.handle.reset_transport();
    assert_eq!(read_now(&mut host), (vec![], true));
    idle(&mut guest);
    assert!(guest.ops().is_empty());
    // The driver hears of it as soon as it gives a buffer.
    guest.driver.add(EVENT, &[Buffer::Writable(4)]);
    guest.driver.kick(EVENT);
    guest.settle();
    let event = guest.driver.used(EVENT).expect("an event");
    assert_eq!(event.data, [0; 4]);
    assert_eq!(guest.driver.interrupts(EVENT), 1);
    guest.driver.add(EVENT, &[Buffer::Writable(4)]);
    guest.driver.kick(EVENT);
    guest.settle();
    assert!(guest.driver.used(EVENT).is_none(), "told once");
}

#[test]
fn a_device_that_is_gone_leaves_nothing_watched() {
    let mut guest = up();
    let mut host = guest.dial(1024, 7);
    let Guest {
        driver,
        poller,
        handle,
        ..
    } = guest;
    drop(driver);
    assert_eq!(poller.watched(), 0);
    assert_eq!(read_now(&mut host), (vec![], true));
    assert!(handle.connect(1, host.into()).is_err());
}

#[test]
fn connections_outlive_a_suspension_in_which_nobody_looks_at_them() {
    let mut guest = up();
    let mut host = guest.dial(1024, 7);
    let (ours, port) = guest.connected(1025);
    guest.driver.suspend().unwrap();
    host.write_all(b"to the guest").unwrap();
    drop(ours);
    guest.driver.add(
        TX,
        &[
            Buffer::Readable(&Wire::data(1024, 7, b"to the host").header()),
            Buffer::Readable(b"to the host"),
        ],
    );
    guest.settle();
    assert_eq!(guest.poller.watched(), 2, "timer and resumption");
    // Whoever connects meanwhile waits.
    let (_waits, theirs) = UnixStream::pair().unwrap();
    guest.handle.connect(9, theirs.into()).unwrap();
    guest.settle();
    guest.driver.transport.resume();
    let packets = guest.receive_all();
    let asked = packets.iter().filter(|packet| packet.op == REQUEST);
    assert_eq!(asked.map(|packet| packet.dst_port).collect::<Vec<_>>(), [9]);
    let of_port = |host: u32| packets.iter().filter(move |packet| packet.src_port == host);
    let payload: Vec<u8> = of_port(1024).flat_map(|p| p.payload.clone()).collect();
    assert_eq!(payload, b"to the guest");
    let ops: Vec<u16> = of_port(port).map(|packet| packet.op).collect();
    assert_eq!(ops, [SHUTDOWN]);
    assert_eq!(read_now(&mut host), (b"to the host".to_vec(), false));
}

#[test]
fn a_driver_in_another_process_is_told_that_its_connections_are_gone() {
    let mut guest = up();
    let _host = guest.dial(1024, 7);
    let (_, first) = guest.connected(1025);
    guest.driver.add(EVENT, &[Buffer::Writable(4)]);
    let state = written_down(&guest.driver);
    let other = Guest::fresh(guest.poller.clone());
    guest.handle = other.handle();
    guest.driver.carry_over(Box::new(other), &state);
    guest.settle();
    let event = guest.driver.used(EVENT).expect("an event");
    assert_eq!(event.data, [0; 4]);
    assert!(guest.ops().is_empty());
    let (_, next) = guest.connected(1025);
    assert_eq!(next, first + 1, "no port that the driver may remember");
}

#[test]
fn the_state_of_another_guest_is_not_taken_over() {
    let guest = up();
    let mut json = serde_json::to_value(written_down(&guest.driver)).unwrap();
    json["data"]["vsock"]["guest_cid"] = 4.into();
    let state = serde_json::from_value(json).unwrap();
    let other = Driver::new(Box::new(Guest::fresh(guest.poller.clone())));
    assert!(other.transport.restore(&state).is_err());
}

#[test]
fn a_guest_that_stood_still_has_as_much_time_to_answer_as_before() {
    let mut guest = Guest::with_timeouts(256, Duration::from_millis(100), Duration::from_secs(100));
    guest.refill(16);
    let (_host, request) = guest.connect(1025);
    guest.driver.suspend().unwrap();
    std::thread::sleep(Duration::from_millis(150));
    guest.settle();
    guest.driver.transport.resume();
    guest.send(&Wire::new(RESPONSE, request.src_port, 1025));
    assert!(guest.ops().is_empty());
    assert_eq!(guest.handle.connections(), 1);
}
