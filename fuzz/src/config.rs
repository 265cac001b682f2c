//! JSON documents: a machine's configuration, the spec of a bundle, the documents of an image. The first byte says which.

use crate::allocations::Bounds;
use capsid_protocol::machine::{CONFIG_MAX_BYTES, MachineConfig};
use std::collections::BTreeSet;
use std::path::Path;

pub(crate) const BOUNDS: Bounds = Bounds {
    growth: 4 << 20,
    largest: 1 << 20,
};

pub(crate) fn run(input: &[u8]) {
    let Some((kind, json)) = input.split_first() else {
        return;
    };
    match kind % 3 {
        0 => machine(json),
        1 => {
            if let Err(reason) = capsid::strangers::read_bundle(json, Path::new("/bundle")) {
                assert!(!reason.is_empty());
            }
        }
        _ => {
            capsid::strangers::read_documents(json);
        }
    }
}

/// A configuration that is one names each descriptor once, none of the standard ones, and reads back as itself.
fn machine(json: &[u8]) {
    let Ok(config) = MachineConfig::from_json(json) else {
        return;
    };
    assert!(json.len() <= CONFIG_MAX_BYTES);
    let fds: Vec<i32> = config.fds().iter().map(|fd| fd.get()).collect();
    assert!(fds.iter().all(|fd| *fd > 2));
    assert_eq!(fds.iter().collect::<BTreeSet<_>>().len(), fds.len());
    let again = config.to_json().expect("JSON");
    assert_eq!(MachineConfig::from_json(&again).expect("the same"), config);
}
