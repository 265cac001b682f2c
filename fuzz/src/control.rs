//! Messages between the VMM, its owner and the agent: each packet is refused, or says the same when it is written again.

use capsid_protocol::vsock::{OwnerMessage, StreamHeader};

pub(crate) fn run(input: &[u8]) {
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
