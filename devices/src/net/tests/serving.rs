//! What a card does for a driver that keeps the rules.

use super::*;

#[test]
fn packets_pass_both_ways() {
    for features in [0, MRG_RXBUF, MRG_RXBUF | CSUM | GUEST_CSUM] {
        let Some(mut guest) = Guest::new(1, MTU, features) else {
            return;
        };
        guest.lend(RECEIVE, 4, 2048);
        guest.send(b"to the guest");
        let used = guest.received(RECEIVE);
        assert_eq!(used.len as usize, HEADERS + 12);
        assert_eq!(
            (text(&used.data), buffers(&used.data)),
            (&b"to the guest"[..], 1)
        );
        let packet = guest.packet(b"to the host");
        let (first, second) = packet.split_at(20);
        guest.driver.add(
            TRANSMIT,
            &[Buffer::Readable(first), Buffer::Readable(second)],
        );
        guest.driver.kick(TRANSMIT);
        assert_eq!(guest.received(TRANSMIT).len, 0);
        assert_eq!(guest.heard(), b"to the host");
        guest.settle();
    }
}

#[test]
fn a_large_packet_fills_several_buffers_at_once() {
    let Some(mut guest) = Guest::new(1, 9000, MRG_RXBUF) else {
        return;
    };
    let large: Vec<u8> = (0..8000).map(|at| (at / 31) as u8).collect();
    guest.lend(RECEIVE, 16, 1500);
    guest.send(&large);
    guest.send(b"next");
    let first = guest.received(RECEIVE);
    assert_eq!(
        usize::from(buffers(&first.data)),
        (HEADERS + 8000usize).div_ceil(1500)
    );
    let mut whole = first.data.clone();
    for _ in 1..buffers(&first.data) {
        // All of them are there as soon as the first is.
        whole.extend(guest.driver.used(RECEIVE).expect("the next buffer").data);
    }
    assert_eq!(text(&whole), large);
    let next = guest.received(RECEIVE);
    assert_eq!((text(&next.data), buffers(&next.data)), (&b"next"[..], 1));
}

#[test]
fn a_pulled_cable_loses_packets_of_both_directions_and_a_plugged_one_none() {
    let Some(mut guest) = Guest::new(1, MTU, MRG_RXBUF | STATUS) else {
        return;
    };
    let said = |guest: &Guest| guest.driver.read(guest.driver.config, 6, 2);
    assert_eq!(said(&guest), 1);
    guest.lend(RECEIVE, 4, 2048);
    guest.settle();
    guest.link.set(false);
    assert_eq!(said(&guest), 0);
    assert_eq!(guest.driver.config_interrupts(), 1);
    guest.send(b"lost");
    let packet = guest.packet(b"lost as well");
    guest.driver.add(TRANSMIT, &[Buffer::Readable(&packet)]);
    guest.driver.kick(TRANSMIT);
    assert_eq!(guest.received(TRANSMIT).len, 0);
    guest.settle();
    assert!(guest.driver.used(RECEIVE).is_none());
    guest.link.set(true);
    guest.link.set(true);
    assert_eq!((said(&guest), guest.driver.config_interrupts()), (1, 2));
    guest.send(b"to the guest");
    assert_eq!(text(&guest.received(RECEIVE).data), b"to the guest");
    let packet = guest.packet(b"to the host");
    guest.driver.add(TRANSMIT, &[Buffer::Readable(&packet)]);
    guest.driver.kick(TRANSMIT);
    guest.received(TRANSMIT);
    assert_eq!(guest.heard(), b"to the host");
    let counted: BTreeMap<_, _> = guest
        .driver
        .transport
        .counters()
        .read()
        .into_iter()
        .collect();
    assert_eq!((counted["rx_packets"], counted["tx_packets"]), (1, 1));
    assert_eq!((counted["rx_dropped"], counted["tx_dropped"]), (1, 1));
}

#[test]
fn buffers_lent_while_the_cable_is_pulled_are_filled_when_it_is_plugged() {
    let Some(mut guest) = Guest::new(1, MTU, MRG_RXBUF | STATUS) else {
        return;
    };
    // A packet for which nothing is lent: from now on the card waits for a kick.
    guest.send(b"too early");
    guest.settle();
    guest.link.set(false);
    guest.lend(RECEIVE, 4, 2048);
    guest.settle();
    guest.link.set(true);
    guest.send(b"to the guest");
    let mut texts = Vec::new();
    while texts.last().is_none_or(|last| last != b"to the guest") {
        texts.push(text(&guest.received(RECEIVE).data).to_vec());
    }
}

#[test]
fn the_control_queue_sets_the_pairs_and_refuses_the_rest() {
    let Some(mut guest) = Guest::new(2, MTU, MRG_RXBUF | CTRL_VQ | MQ) else {
        return;
    };
    let control = 4;
    for pairs in [1, 2, 1] {
        assert_eq!(guest.command(control, &[4, 0, pairs, 0]), 0);
    }
    // More than there are; none; cut short; longer; offloads, which are not agreed on; unknown; nothing.
    for bad in [
        &[4, 0, 3, 0][..],
        &[4, 0, 0, 0],
        &[4, 0, 1],
        &[4, 0, 1, 0, 0],
        &[4, 1, 1, 0],
        &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[0, 0, 1],
        &[255, 255],
        &[4],
    ] {
        assert_eq!(guest.command(control, bad), 1, "{bad:?}");
    }
    // Without room for the answer nobody is told.
    guest
        .driver
        .add(control, &[Buffer::Readable(&[4, 0, 1, 0])]);
    guest.driver.kick(control);
    assert_eq!(guest.received(control).len, 0);
}

#[test]
fn a_full_frame_fits_into_the_buffer_that_the_specification_asks_for() {
    // Section 5.1.6.3.1: 1526 bytes without merging.
    let Some(mut guest) = Guest::new(1, MTU, 0) else {
        return;
    };
    guest.lend(RECEIVE, 4, 1526);
    let full = [7; 1500 - 28];
    guest.send(&full);
    let used = guest.received(RECEIVE);
    assert_eq!((used.len, text(&used.data)), (1526, &full[..]));
}

#[test]
fn a_driver_that_lends_little_gets_what_fits() {
    // Less than the largest packet that may come, and less than its queue holds.
    for features in [MRG_RXBUF, MRG_RXBUF | GUEST_CSUM | GUEST_TSO4] {
        let Some(mut guest) = Guest::new(1, 9000, features) else {
            return;
        };
        guest.lend(RECEIVE, 4, 1000);
        guest.send(b"small");
        assert_eq!(text(&guest.received(RECEIVE).data), b"small");
        // This one waits until there is room for it, and those behind it with it.
        guest.send(&[3; 5000]);
        guest.send(b"next");
        guest.settle();
        assert_eq!(guest.driver.used(RECEIVE), None);
        guest.lend(RECEIVE, 4, 1000);
        let mut whole = guest.received(RECEIVE).data;
        for _ in 1..buffers(&whole) {
            whole.extend(guest.driver.used(RECEIVE).expect("the next buffer").data);
        }
        assert_eq!(text(&whole), [3; 5000]);
        assert_eq!(text(&guest.received(RECEIVE).data), b"next");
    }
}

#[test]
fn a_card_wakes_every_tap_that_feeds_a_queue() {
    // Without EVENT_IDX, where one turn's wish for silence hides the kick that another waits for.
    let Some(mut guest) = Guest::new(4, MTU, VERSION_1 | MRG_RXBUF) else {
        return;
    };
    let flows: Vec<UdpSocket> = (0..16)
        .map(|_| UdpSocket::bind((HOST, 0)).expect("a socket"))
        .collect();
    for _ in 0..20 {
        for flow in &flows {
            flow.send_to(b"flow", (GUEST, 9)).expect("sent");
        }
        for _ in 0..flows.len() {
            guest.driver.add(RECEIVE, &[Buffer::Writable(2048)]);
            if guest.driver.wants_kick(RECEIVE) {
                guest.driver.kick(RECEIVE);
            }
            guest.turn();
        }
        for _ in 0..flows.len() {
            assert_eq!(text(&guest.received(RECEIVE).data), b"flow");
        }
    }
}

#[test]
fn with_several_queues_each_packet_comes_once() {
    let Some(mut guest) = Guest::new(4, MTU, MRG_RXBUF | CTRL_VQ | MQ) else {
        return;
    };
    let control = 8;
    // The driver begins with one pair, whichever queue of the tap the host has chosen.
    guest.lend(RECEIVE, 60, 2048);
    for number in 0..20u8 {
        let flow = UdpSocket::bind((HOST, 0)).expect("a socket");
        flow.send_to(&[number], (GUEST, 9)).expect("sent");
    }
    let mut seen: Vec<u8> = (0..20)
        .map(|_| text(&guest.received(RECEIVE).data)[0])
        .collect();
    seen.sort_unstable();
    assert_eq!(seen, (0..20).collect::<Vec<_>>());
    // Then with all of them.
    assert_eq!(guest.command(control, &[4, 0, 4, 0]), 0);
    for pair in 1..4 {
        guest.lend(2 * pair, 30, 2048);
    }
    for number in 0..20u8 {
        let flow = UdpSocket::bind((HOST, 0)).expect("a socket");
        flow.send_to(&[number], (GUEST, 9)).expect("sent");
    }
    let mut seen = Vec::new();
    let deadline = Instant::now() + Duration::from_millis(WAIT_MS);
    while seen.len() < 20 {
        assert!(Instant::now() < deadline, "only {seen:?}");
        guest.poller.turn(Some(Duration::from_millis(10))).unwrap();
        for pair in 0..4 {
            while let Some(used) = guest.driver.used(2 * pair) {
                seen.push(text(&used.data)[0]);
            }
        }
    }
    seen.sort_unstable();
    assert_eq!(seen, (0..20).collect::<Vec<_>>());
    guest.settle();
}

#[test]
fn the_configuration_space_tells_what_there_is() {
    let Some(guest) = Guest::new(4, 9000, 0) else {
        return;
    };
    let config = guest.driver.device_config();
    assert_eq!(config[..6], MAC);
    assert_eq!(config[8..12], [4, 0, 0x28, 0x23]);
    assert_eq!(guest.driver.queue_count(), 9);
}

#[test]
fn buffers_that_were_lent_are_filled_after_a_suspension_and_packets_meanwhile_are_not_lost() {
    let Some(mut guest) = Guest::new(1, MTU, MRG_RXBUF | STATUS) else {
        return;
    };
    guest.lend(RECEIVE, 8, 2048);
    guest.send(b"before");
    assert_eq!(text(&guest.received(RECEIVE).data), b"before");
    written_down(&guest.driver);
    guest.send(b"meanwhile");
    guest.settle();
    assert_eq!(guest.driver.used_index(RECEIVE), 1);
    guest.driver.transport.resume();
    assert_eq!(text(&guest.received(RECEIVE).data), b"meanwhile");
    let packet = guest.packet(b"to the host");
    guest.driver.add(TRANSMIT, &[Buffer::Readable(&packet)]);
    guest.driver.kick(TRANSMIT);
    guest.received(TRANSMIT);
    assert_eq!(guest.heard(), b"to the host");
    for _ in 0..6 {
        guest.send(b"the rest");
        assert_eq!(text(&guest.received(RECEIVE).data), b"the rest");
    }
    guest.settle();
}

#[test]
fn a_chain_without_room_comes_back_once_whatever_stands_still_meanwhile() {
    let Some(mut guest) = Guest::new(1, MTU, MRG_RXBUF | STATUS) else {
        return;
    };
    let lent = [100, 100].map(|bytes| guest.driver.add(RECEIVE, &[Buffer::Writable(bytes)]));
    let roomless = guest.driver.add(RECEIVE, &[Buffer::Readable(&[1; 8])]);
    guest.lend(RECEIVE, 2, 2048);
    guest.settle();
    assert_eq!(guest.driver.used_index(RECEIVE), 0);
    guest.driver.suspend().unwrap();
    guest.driver.transport.resume();
    // What does not fit into those in front of it is lost.
    guest.send(&[7; 300]);
    guest.settle();
    assert_eq!(guest.driver.used_index(RECEIVE), 0);
    guest.send(&[8; 100]);
    let heads = [(); 3].map(|()| guest.received(RECEIVE).head);
    assert_eq!(heads, [lent[0], lent[1], roomless]);
    guest.send(b"behind it");
    assert_eq!(text(&guest.received(RECEIVE).data), b"behind it");
    guest.settle();
}

#[test]
fn a_cable_pulled_during_a_suspension_is_told_after_it() {
    let Some(guest) = Guest::new(1, MTU, MRG_RXBUF | STATUS) else {
        return;
    };
    guest.driver.suspend().unwrap();
    guest.link.set(false);
    assert_eq!(guest.driver.config_interrupts(), 0);
    let state = guest.driver.transport.state().unwrap();
    guest.driver.transport.resume();
    assert_eq!(guest.driver.config_interrupts(), 1);
    let json = serde_json::to_value(&state).unwrap();
    let known = serde_json::json!({"net": {"pairs": 1, "up": false}});
    assert_eq!(json["data"], known);
}

#[test]
fn what_comes_while_the_cable_is_pulled_is_lost_also_during_a_suspension() {
    let Some(mut guest) = Guest::new(1, MTU, MRG_RXBUF | STATUS) else {
        return;
    };
    guest.lend(RECEIVE, 4, 2048);
    guest.settle();
    guest.driver.suspend().unwrap();
    guest.link.set(false);
    guest.send(b"lost");
    guest.link.set(true);
    guest.driver.transport.resume();
    guest.settle();
    guest.send(b"there");
    assert_eq!(text(&guest.received(RECEIVE).data), b"there");
}

#[test]
fn a_card_uses_as_many_pairs_after_a_suspension_as_before() {
    let Some(mut guest) = Guest::new(2, MTU, MRG_RXBUF | CTRL_VQ | MQ) else {
        return;
    };
    assert_eq!(guest.command(4, &[4, 0, 2, 0]), 0);
    let state = written_down(&guest.driver);
    let json = serde_json::to_value(&state).unwrap();
    assert_eq!(json["data"]["net"]["pairs"], 2);
    guest.driver.transport.resume();
    assert_eq!(guest.command(4, &[4, 0, 1, 0]), 0);
    let json = serde_json::to_value(written_down(&guest.driver)).unwrap();
    assert_eq!(json["data"]["net"]["pairs"], 1);
}
