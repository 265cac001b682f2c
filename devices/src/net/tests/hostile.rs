//! What a card does for one that does not, and under a flood.

use super::*;

#[test]
fn what_is_to_be_sent_before_the_card_begins_waits_for_the_event_loop() {
    let Some(taps) = taps_or_skip(1, MTU) else {
        return;
    };
    let poller = Arc::new(Poller::new().unwrap());
    let setup = NetSetup {
        taps,
        mac: MAC,
        mtu: MTU,
    };
    let card = Net::new(setup, poller.clone()).expect("a card");
    let mut driver = Driver::new(Box::new(card));
    driver.negotiate(MRG_RXBUF | STATUS);
    driver.setup_queue(RECEIVE, 16);
    driver.setup_queue(TRANSMIT, 16);
    driver.add(TRANSMIT, &[Buffer::Readable(&[0; 64])]);
    driver.start();
    assert_eq!(driver.status(), 0x0f);
    assert!(
        driver.used(TRANSMIT).is_none(),
        "sent by the thread of a vCPU"
    );
    driver.kick(TRANSMIT);
    driver.wait_used(TRANSMIT, Some(&poller));
}
use crate::testing::any_descriptor;
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

#[test]
fn a_packet_that_no_buffer_holds_is_dropped_and_the_next_is_not() {
    let Some(mut guest) = Guest::new(1, MTU, 0) else {
        return;
    };
    guest.lend(RECEIVE, 4, 512);
    guest.send(&[1; 1000]);
    guest.send(b"small");
    assert_eq!(text(&guest.received(RECEIVE).data), b"small");
}

#[test]
fn without_buffers_the_loop_rests_and_with_them_it_goes_on() {
    // B2.11.
    let Some(mut guest) = Guest::new(1, MTU, MRG_RXBUF) else {
        return;
    };
    for _ in 0..300 {
        guest.send(b"flood");
    }
    guest.settle();
    for _ in 0..300 {
        guest.lend(RECEIVE, 1, 2048);
        assert_eq!(text(&guest.received(RECEIVE).data), b"flood");
    }
    guest.settle();
}

#[test]
fn buffers_of_one_byte_hold_a_small_packet_and_lose_a_larger_one() {
    // V16. The header is spread over twelve of them.
    let Some(mut guest) = Guest::new(1, MTU, MRG_RXBUF) else {
        return;
    };
    guest.lend(RECEIVE, 64, 1);
    // All that the queue holds is lent, and will not be more.
    guest.send(&[1; 100]);
    guest.send(b"x");
    let mut whole = Vec::new();
    for _ in 0..HEADERS + 1 {
        whole.extend(guest.received(RECEIVE).data);
    }
    assert_eq!(
        (text(&whole), usize::from(buffers(&whole))),
        (&b"x"[..], HEADERS + 1)
    );
    guest.settle();
    assert_eq!(guest.driver.used(RECEIVE), None);
    assert_eq!(guest.driver.status(), 0x0f);
}

#[test]
fn a_chain_to_receive_into_without_room_comes_back_empty() {
    let Some(mut guest) = Guest::new(1, MTU, MRG_RXBUF) else {
        return;
    };
    guest.driver.add(RECEIVE, &[Buffer::Readable(b"?")]);
    guest.lend(RECEIVE, 2, 2048);
    guest.send(b"text");
    assert_eq!(guest.received(RECEIVE).len, 0);
    assert_eq!(text(&guest.received(RECEIVE).data), b"text");
}

#[test]
fn packets_that_are_none_are_dropped() {
    // V16: no header, a header alone, lies in the header.
    let Some(mut guest) = Guest::new(1, MTU, CSUM) else {
        return;
    };
    let whole = guest.packet(b"whole");
    let bad = guest.packet(b"bad");
    let mut checksum_outside = bad.clone();
    checksum_outside[0] = 1; // NEEDS_CSUM
    checksum_outside[6..8].copy_from_slice(&60_000u16.to_le_bytes());
    let mut no_segments = bad.clone();
    no_segments[1] = 1; // TCPv4 segmentation, in segments of 0 bytes
    let mut unknown = bad.clone();
    unknown[1] = 0x77;
    let short = vec![0; 11];
    let header = vec![0; HEADER];
    let huge = vec![0; 70_000];
    for bad in [short, header, checksum_outside, no_segments, unknown, huge] {
        guest.driver.add(TRANSMIT, &[Buffer::Readable(&bad)]);
    }
    guest.driver.add(TRANSMIT, &[Buffer::Writable(100)]);
    guest.driver.add(TRANSMIT, &[Buffer::Readable(&whole)]);
    guest.driver.kick(TRANSMIT);
    for _ in 0..8 {
        assert_eq!(guest.received(TRANSMIT).len, 0);
    }
    assert_eq!(guest.heard(), b"whole");
    assert_eq!(guest.driver.status(), 0x0f);
}

#[test]
fn a_broken_queue_asks_for_a_reset_and_a_reset_mends_it() {
    for queue in [RECEIVE, TRANSMIT] {
        let Some(mut guest) = Guest::new(1, MTU, MRG_RXBUF) else {
            return;
        };
        let outside = RawDescriptor {
            addr: 1 << 40,
            len: 16,
            flags: if queue == RECEIVE { 2 } else { 0 },
            next: 0,
        };
        guest.driver.add_raw(queue, 0, &[outside]);
        guest.driver.kick(queue);
        guest.send(b"lost");
        guest.settle();
        assert!(guest.driver.needs_reset());
        // Its kicks are taken, and packets are left where they are.
        guest.driver.kick(queue);
        guest.send(b"lost");
        guest.settle();
        guest.driver.reset();
        guest.settle();
        guest.driver.negotiate(MRG_RXBUF);
        guest.driver.setup_queue(RECEIVE, 64);
        guest.driver.setup_queue(TRANSMIT, 64);
        guest.driver.start();
        guest.lend(RECEIVE, 8, 2048);
        guest.send(b"again");
        while text(&guest.received(RECEIVE).data) != b"again" {}
    }
}

#[test]
fn after_a_reset_nothing_is_watched_and_nothing_is_written() {
    let Some(mut guest) = Guest::new(1, MTU, MRG_RXBUF) else {
        return;
    };
    guest.lend(RECEIVE, 8, 2048);
    guest.settle();
    assert_eq!(guest.poller.watched(), 3);
    guest.driver.set_status(0);
    guest.send(b"lost");
    assert_eq!((guest.poller.watched(), guest.turn()), (0, 0));
    assert_eq!(guest.driver.used_index(RECEIVE), 0);
}

#[test]
fn a_card_without_its_queues_asks_for_a_reset() {
    // B2.10.
    let Some(taps) = taps_or_skip(1, MTU) else {
        return;
    };
    let poller = Arc::new(Poller::new().unwrap());
    let setup = NetSetup {
        taps,
        mac: MAC,
        mtu: MTU,
    };
    let mut driver = Driver::new(Box::new(Net::new(setup, poller.clone()).unwrap()));
    driver.negotiate(0);
    driver.setup_queue(RECEIVE, 8);
    driver.start();
    assert!(driver.needs_reset());
    driver.reset();
    assert_eq!((driver.status(), poller.watched()), (0, 0));
}

#[test]
fn what_an_earlier_driver_left_is_not_for_the_next() {
    let Some(mut guest) = Guest::new(1, MTU, MRG_RXBUF) else {
        return;
    };
    guest.send(b"old");
    guest.driver.reset();
    guest.driver.negotiate(MRG_RXBUF);
    for queue in [RECEIVE, TRANSMIT] {
        guest.driver.setup_queue(queue, 64);
    }
    guest.driver.start();
    guest.lend(RECEIVE, 4, 2048);
    guest.send(b"new");
    assert_eq!(text(&guest.received(RECEIVE).data), b"new");
}

#[test]
fn what_cannot_be_a_card_is_refused() {
    let poller = Arc::new(Poller::new().unwrap());
    let refused = |taps: Vec<OwnedFd>, mac, mtu| {
        let setup = NetSetup { taps, mac, mtu };
        let error = Net::new(setup, poller.clone()).err().expect("refused");
        std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string)
    };
    let null = || OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    assert!(refused(vec![], MAC, MTU).contains("not 0"));
    assert!(refused((0..17).map(|_| null()).collect(), MAC, MTU).contains("not 17"));
    assert!(refused(vec![null()], [1, 0, 0, 0, 0, 1], MTU).contains("group"));
    assert!(refused(vec![null()], [0; 6], MTU).contains("nobody"));
    assert!(refused(vec![null()], MAC, 67).contains("less than 68"));
    assert!(refused(vec![null()], MAC, MTU).contains("no queue of a tap"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whatever a driver makes available, the loop rests, and after a reset packets pass.
    #[test]
    fn a_card_survives_any_ring(
        ring in prop::collection::vec(any_descriptor(), 1..8),
        heads in prop::collection::vec(prop_oneof![8 => 0u16..8, 1 => any::<u16>()], 1..6),
        bytes in prop::collection::vec(any::<u64>(), 8),
        queue in 0u16..5,
        mergeable in any::<bool>(),
    ) {
        let features = CTRL_VQ | MQ | if mergeable { MRG_RXBUF } else { 0 };
        let Some(mut guest) = Guest::new(2, MTU, features) else {
            return Ok(());
        };
        for (at, word) in ring.iter().zip(&bytes) {
            let _outside = guest.driver.memory().write_obj(*word, GuestAddress(at.addr));
        }
        for head in heads {
            guest.driver.add_raw(queue, head, &ring);
        }
        guest.driver.kick(queue);
        for _ in 0..5 {
            guest.send(b"in between");
        }
        guest.settle();
        guest.driver.reset();
        prop_assert_eq!(guest.driver.status(), 0);
        guest.driver.negotiate(MRG_RXBUF);
        for queue in [RECEIVE, TRANSMIT] {
            guest.driver.setup_queue(queue, 64);
        }
        guest.driver.start();
        guest.lend(RECEIVE, 8, 2048);
        guest.send(b"after");
        let after = guest.received(RECEIVE);
        prop_assert_eq!(text(&after.data), b"after");
    }
}
