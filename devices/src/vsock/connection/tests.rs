//! Each transition by name, and a model of a driver against which streams of random schedules are checked.

use super::*;
use proptest::prelude::*;
use std::collections::VecDeque;

const PORTS: Ports = Ports {
    host: 1024,
    guest: 7,
};
const BUFFER: u32 = 1000;
const OPEN_WINDOW: Window = Window {
    buf_alloc: 500,
    fwd_cnt: 0,
};
const RESET: Verdict = Verdict::Over { reset: true };

fn ops(connection: &mut Connection) -> Vec<Op> {
    let mut ops = Vec::new();
    while connection.wants_control() {
        ops.push(
            connection
                .take_control()
                .expect("wants to send, so it has something")
                .op,
        );
    }
    assert_eq!(connection.take_control(), None);
    ops
}

fn open() -> Connection {
    let mut connection = Connection::granted(PORTS, OPEN_WINDOW, BUFFER);
    assert_eq!(ops(&mut connection), [Op::Response]);
    connection
}

fn shutdown(receive: bool, send: bool) -> Shutdown {
    Shutdown { receive, send }
}

fn receive(connection: &mut Connection, op: Op) -> Verdict {
    connection.receive(op, OPEN_WINDOW)
}

#[test]
fn a_granted_connection_answers_before_it_sends_data() {
    let mut connection = Connection::granted(PORTS, OPEN_WINDOW, BUFFER);
    assert_eq!(connection.room(), 0);
    assert_eq!(ops(&mut connection), [Op::Response]);
    assert_eq!(connection.room(), 500);
}

#[test]
fn a_request_is_open_once_the_guest_responds() {
    let mut connection = Connection::requested(PORTS, BUFFER);
    assert_eq!(ops(&mut connection), [Op::Request]);
    assert_eq!(
        (connection.phase(), connection.room()),
        (Phase::Requesting, 0)
    );
    assert_eq!(receive(&mut connection, Op::Response), Verdict::Opened);
    assert_eq!((connection.phase(), connection.room()), (Phase::Open, 500));
}

#[test]
fn a_refused_request_is_over_without_an_answer() {
    let mut connection = Connection::requested(PORTS, BUFFER);
    ops(&mut connection);
    let over = receive(&mut connection, Op::Reset);
    assert_eq!(over, Verdict::Over { reset: false });
}

#[test]
fn a_response_before_the_request_was_sent_is_an_error() {
    let mut connection = Connection::requested(PORTS, BUFFER);
    assert_eq!(receive(&mut connection, Op::Response), RESET);
}

#[test]
fn anything_but_an_answer_to_a_request_resets() {
    for op in [
        Op::Request,
        Op::Data(1),
        Op::Shutdown(Shutdown::BOTH),
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        let mut connection = Connection::requested(PORTS, BUFFER);
        ops(&mut connection);
        assert_eq!(receive(&mut connection, op), RESET, "{op:?}");
    }
}

#[test]
fn a_second_request_or_an_unasked_response_resets() {
    for op in [Op::Request, Op::Response] {
        assert_eq!(receive(&mut open(), op), RESET, "{op:?}");
    }
}

#[test]
fn a_payload_beyond_the_credit_resets() {
    let mut connection = open();
    assert_eq!(receive(&mut connection, Op::Data(BUFFER)), Verdict::Deliver);
    assert_eq!(receive(&mut connection, Op::Data(1)), RESET);
}

#[test]
fn a_guest_that_ends_its_stream_still_receives() {
    let mut connection = open();
    let end = Op::Shutdown(shutdown(false, true));
    assert_eq!(receive(&mut connection, end), Verdict::GuestShutdown);
    assert_eq!(connection.guest_shutdown(), shutdown(false, true));
    assert_eq!(connection.room(), 500);
    // It said that it would send no more.
    assert_eq!(receive(&mut connection, Op::Data(1)), RESET);
}

#[test]
fn a_guest_that_receives_no_more_gets_no_data_but_still_sends() {
    let mut connection = open();
    let deaf = Op::Shutdown(shutdown(true, false));
    assert_eq!(receive(&mut connection, deaf), Verdict::GuestShutdown);
    assert_eq!(connection.room(), 0);
    assert!(!connection.takes_host_data());
    assert_eq!(receive(&mut connection, Op::Data(9)), Verdict::Deliver);
}

#[test]
fn both_halves_of_a_guests_shutdown_end_the_connection_in_either_order() {
    for (first, second) in [
        (shutdown(true, false), shutdown(false, true)),
        (shutdown(false, true), shutdown(true, false)),
        (shutdown(false, true), Shutdown::BOTH),
    ] {
        let mut connection = open();
        let half = receive(&mut connection, Op::Shutdown(first));
        assert_eq!(half, Verdict::GuestShutdown);
        assert_eq!(receive(&mut connection, Op::Shutdown(second)), RESET);
    }
}

#[test]
fn the_hosts_end_of_stream_is_a_shutdown_of_one_direction() {
    let mut connection = open();
    connection.host_sends_no_more();
    assert_eq!(ops(&mut connection), [Op::Shutdown(shutdown(false, true))]);
    assert_eq!(connection.phase(), Phase::Open);
    assert_eq!(receive(&mut connection, Op::Data(9)), Verdict::Deliver);
}

#[test]
fn a_host_that_is_done_leaves_and_awaits_the_guests_reset() {
    for receive_first in [true, false] {
        let mut connection = open();
        if receive_first {
            connection.host_receives_no_more();
        } else {
            connection.host_sends_no_more();
        }
        assert_eq!(ops(&mut connection).len(), 1);
        assert_eq!(connection.phase(), Phase::Open);
        connection.host_receives_no_more();
        connection.host_sends_no_more();
        assert_eq!(ops(&mut connection), [Op::Shutdown(Shutdown::BOTH)]);
        assert_eq!(connection.phase(), Phase::Leaving);
        let over = receive(&mut connection, Op::Reset);
        assert_eq!(over, Verdict::Over { reset: false });
    }
}

#[test]
fn data_under_way_when_the_host_closed_is_dropped_and_frees_its_credit() {
    let mut connection = open();
    assert_eq!(receive(&mut connection, Op::Data(600)), Verdict::Deliver);
    connection.host_receives_no_more();
    for _ in 0..10 {
        assert_eq!(receive(&mut connection, Op::Data(BUFFER)), Verdict::Carry);
    }
}

#[test]
fn crossing_shutdowns_end_the_connection() {
    let mut connection = open();
    connection.host_sends_no_more();
    connection.host_receives_no_more();
    ops(&mut connection);
    let both = Op::Shutdown(Shutdown::BOTH);
    assert_eq!(receive(&mut connection, both), RESET);
}

#[test]
fn a_request_for_a_name_being_left_supersedes_it() {
    let mut connection = open();
    connection.host_sends_no_more();
    connection.host_receives_no_more();
    let request = receive(&mut connection, Op::Request);
    assert_eq!(request, Verdict::Superseded);
}

#[test]
fn a_host_that_closes_before_the_guest_answers_says_so_afterwards() {
    let mut connection = Connection::requested(PORTS, BUFFER);
    ops(&mut connection);
    connection.host_sends_no_more();
    connection.host_receives_no_more();
    assert_eq!(connection.phase(), Phase::Requesting);
    assert_eq!(ops(&mut connection), []);
    assert_eq!(receive(&mut connection, Op::Response), Verdict::Opened);
    assert_eq!(connection.phase(), Phase::Leaving);
    assert_eq!(ops(&mut connection), [Op::Shutdown(Shutdown::BOTH)]);
}

#[test]
fn the_guest_is_asked_for_room_once_until_it_gives_some() {
    let mut connection = open();
    connection.take_data(500);
    for _ in 0..3 {
        connection.starved();
    }
    assert_eq!(ops(&mut connection), [Op::CreditRequest]);
    // An answer without room is no reason to ask again and again.
    receive(&mut connection, Op::CreditUpdate);
    connection.starved();
    assert_eq!(ops(&mut connection), []);
    connection.receive(
        Op::CreditUpdate,
        Window {
            buf_alloc: 500,
            fwd_cnt: 500,
        },
    );
    assert_eq!(connection.room(), 500);
    connection.take_data(500);
    connection.starved();
    assert_eq!(ops(&mut connection), [Op::CreditRequest]);
}

#[test]
fn a_question_for_our_window_is_answered_once() {
    let mut connection = open();
    receive(&mut connection, Op::CreditRequest);
    receive(&mut connection, Op::CreditRequest);
    assert_eq!(ops(&mut connection), [Op::CreditUpdate]);
}

#[test]
fn one_packet_carries_at_most_64_kib() {
    let window = Window {
        buf_alloc: u32::MAX,
        fwd_cnt: 0,
    };
    let mut connection = Connection::granted(PORTS, window, BUFFER);
    ops(&mut connection);
    assert_eq!(connection.room(), PAYLOAD_MAX_BYTES);
}

/// A driver that keeps the rules: two byte streams through one connection.
struct Driver {
    buffer: u32,
    /// What the host sent and the guest's program has not read.
    unread: VecDeque<u8>,
    fwd_cnt: u32,
    sent: u32,
    host: Window,
    read: Vec<u8>,
}

impl Driver {
    fn window(&self) -> Window {
        Window {
            buf_alloc: self.buffer,
            fwd_cnt: self.fwd_cnt,
        }
    }

    fn room(&self) -> u32 {
        self.host.buf_alloc - self.sent.wrapping_sub(self.host.fwd_cnt)
    }
}

proptest! {
    /// Any schedule of sending, reading and telling delivers both streams whole and in order, and neither
    /// side ever holds more than its buffer.
    #[test]
    fn streams_arrive_whole_within_the_credit_under_any_schedule(
        guest_buffer in 1u32..300,
        host_buffer in 1u32..300,
        steps in proptest::collection::vec((0u8..6, 1u32..200), 1..300),
    ) {
        let (to_guest, to_host): (Vec<u8>, Vec<u8>) = (0..4000u32).map(|n| (n as u8, (n / 3) as u8)).unzip();
        let mut driver = Driver {
            buffer: guest_buffer, unread: VecDeque::new(), fwd_cnt: 0, sent: 0,
            host: Window { buf_alloc: host_buffer, fwd_cnt: 0 }, read: Vec::new(),
        };
        let mut connection = Connection::granted(PORTS, driver.window(), host_buffer);
        let (mut sent, mut held, mut taken) = (0usize, VecDeque::<u8>::new(), Vec::<u8>::new());
        let mut offered = 0usize;
        // The random schedule first, then everything in turn until the streams are through.
        let tail = (0..40_000u32).map(|n| ((n % 6) as u8, 200));
        for (step, amount) in steps.into_iter().chain(tail) {
            match step {
                0 => {
                    let bytes = connection.room().min(amount).min((to_guest.len() - sent) as u32);
                    if bytes > 0 {
                        driver.host = connection.take_data(bytes).window;
                        driver.unread.extend(&to_guest[sent..sent + bytes as usize]);
                        sent += bytes as usize;
                    } else if sent < to_guest.len() {
                        connection.starved();
                    }
                    prop_assert!(driver.unread.len() <= guest_buffer as usize);
                }
                1 => {
                    let bytes = driver.room().min(amount).min((to_host.len() - offered) as u32);
                    if bytes > 0 {
                        let verdict = connection.receive(Op::Data(bytes), driver.window());
                        prop_assert_eq!(verdict, Verdict::Deliver);
                        held.extend(&to_host[offered..offered + bytes as usize]);
                        driver.sent += bytes;
                        offered += bytes as usize;
                    }
                    prop_assert!(held.len() <= host_buffer as usize);
                }
                2 => {
                    let bytes = held.len().min(amount as usize);
                    taken.extend(held.drain(..bytes));
                    connection.forwarded(bytes as u32);
                }
                3 => {
                    let bytes = driver.unread.len().min(amount as usize);
                    driver.read.extend(driver.unread.drain(..bytes));
                    driver.fwd_cnt += bytes as u32;
                }
                4 => prop_assert_eq!(connection.receive(Op::CreditUpdate, driver.window()), Verdict::Carry),
                _ => {
                    while let Some(packet) = connection.take_control() {
                        driver.host = packet.window;
                        if packet.op == Op::CreditRequest {
                            connection.receive(Op::CreditUpdate, driver.window());
                        }
                    }
                }
            }
            if taken.len() == to_host.len() && driver.read.len() == to_guest.len() {
                break;
            }
        }
        prop_assert!(driver.read == to_guest, "{} of {} bytes reached the guest", driver.read.len(), to_guest.len());
        prop_assert!(taken == to_host, "{} of {} bytes reached the host", taken.len(), to_host.len());
    }

    /// Whatever the guest sends in whatever order, the connection ends or goes on: it never holds more than
    /// its buffer and never wants to send for ever.
    #[test]
    fn no_sequence_of_packets_confuses_a_connection(
        requested: bool,
        steps in proptest::collection::vec((0u8..12, any::<u32>(), any::<u32>()), 1..200),
    ) {
        let mut connection = if requested {
            Connection::requested(PORTS, BUFFER)
        } else {
            Connection::granted(PORTS, OPEN_WINDOW, BUFFER)
        };
        let mut held = 0u32;
        for (step, a, b) in steps {
            let window = Window { buf_alloc: a, fwd_cnt: b };
            let op = match step {
                0 => Op::Request,
                1 => Op::Response,
                2 | 3 => Op::Data(a % 400 + 1),
                4 => Op::Shutdown(shutdown(a & 1 != 0, a & 1 == 0)),
                5 => Op::CreditUpdate,
                6 => Op::CreditRequest,
                7 => { connection.host_sends_no_more(); continue }
                8 => { connection.host_receives_no_more(); held = 0; continue }
                9 => { connection.forwarded(held); held = 0; continue }
                10 => { let room = connection.room(); if room > 0 { connection.take_data(room); } connection.starved(); continue }
                _ => { prop_assert!(ops(&mut connection).len() <= 4); continue }
            };
            match connection.receive(op, window) {
                Verdict::Deliver => { held += a % 400 + 1; prop_assert!(held <= BUFFER); }
                Verdict::Over { .. } | Verdict::Superseded => break,
                Verdict::Carry | Verdict::Opened | Verdict::GuestShutdown => {}
            }
        }
    }
}
