//! Messages between the VMM, its owner and the agent: each packet is refused, or says the same when it is written again.

use crate::allocations::Bounds;
use capsid_protocol::control::{FrameLength, REPLY_MAX_BYTES, REQUEST_MAX_BYTES, Reply, Request};
use capsid_protocol::vsock::{OwnerMessage, StreamHeader};

pub(crate) const BOUNDS: Bounds = Bounds {
    growth: 2 << 20,
    largest: 1 << 20,
};

pub(crate) fn run(input: &[u8]) {
    channel(input);
    if let Ok(message) = OwnerMessage::decode(input) {
        assert_eq!(message.encode(), input);
    }
    if let Some(header) = input.first_chunk::<{ StreamHeader::BYTES }>() {
        match StreamHeader::decode(header) {
            Ok(StreamHeader::Stdio { stream_id }) => {
                assert_ne!(stream_id, 0);
                assert_eq!(StreamHeader::Stdio { stream_id }.encode(), *header);
            }
            Ok(StreamHeader::PowerOff) | Err(_) => {}
        }
    }
}

/// The control channel: the first byte says how many fds come along, the rest is the message.
fn channel(input: &[u8]) {
    let Some((fds, json)) = input.split_first() else {
        return;
    };
    if let Some(length) = json.first_chunk() {
        if let Ok(length) = FrameLength::decode(*length, REQUEST_MAX_BYTES) {
            assert!((1..=REQUEST_MAX_BYTES).contains(&length.get()));
        }
    }
    let fds = usize::from(*fds);
    if let Ok(request) = Request::from_json(json, fds) {
        let frame = request.to_frame().expect("what was admitted can be sent");
        let again = frame.get(FrameLength::BYTES..).expect("a message");
        assert_eq!(Request::from_json(again, fds).expect("the same"), request);
    }
    if let Ok(reply) = Reply::from_json(json) {
        let frame = reply.to_frame();
        if let Ok(frame) = frame {
            assert!(frame.len() <= FrameLength::BYTES + REPLY_MAX_BYTES);
            let again = frame.get(FrameLength::BYTES..).expect("a message");
            assert_eq!(Reply::from_json(again).expect("the same"), reply);
        }
    }
}
