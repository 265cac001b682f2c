//! The device while the VM stands still, and what another process takes over of it.

use super::{Core, PeerId};
use crate::state::Foreign;
use crate::virtio::queue::Positions;
use serde::{Deserialize, Serialize};
use std::time::Instant;

/// What of the device outlives its connections: plain data. Connections are the sockets of one process; whoever takes this state over
/// tells the driver that they are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockState {
    /// The guest's context id.
    guest_cid: u64,
    /// Where the search for a free host port goes on, so that a restored guest does not meet the ports of
    /// connections that it remembers.
    next_host_port: u32,
}

/// A device that has let go of its queues and keeps its connections.
pub(super) struct Suspended {
    since: Instant,
    /// Those whose fds are to be watched again.
    pub(super) peers: Vec<PeerId>,
}

impl Core {
    pub(super) fn state(&self) -> VsockState {
        VsockState {
            guest_cid: self.guest_cid,
            next_host_port: self.table.next_host_port(),
        }
    }

    /// Goes on as a device of another process that had this state.
    pub(super) fn take_over(&mut self, state: &VsockState) -> Result<(), Foreign> {
        if state.guest_cid != self.guest_cid {
            return Err(Foreign("context id"));
        }
        self.table.go_on_at(state.next_host_port);
        self.owes_reset_event = true;
        Ok(())
    }

    /// Lets go of the queues and keeps the connections, whose sockets nobody looks at meanwhile.
    pub(super) fn suspend(&mut self) -> Positions {
        let Some(queues) = &self.queues else {
            return Positions::new();
        };
        let positions = queues.positions();
        self.release_queues();
        let mut peers = Vec::new();
        for (id, peer) in self.table.peers() {
            if peer.watched.take().is_some() {
                self.event_loop.forget(peer.fd());
                peers.push(id);
            }
        }
        let since = Instant::now();
        self.suspended = Some(Suspended { since, peers });
        self.armed = None;
        let cleared = self.timer.clear();
        debug_assert!(cleared.is_ok(), "the kernel refused to clear a timer");
        positions
    }

    /// After a suspension: the guest has as much time to answer as it had left.
    pub(super) fn watch_again(&mut self) {
        let Some(Suspended { since, peers }) = self.suspended.take() else {
            return;
        };
        self.table.delay(since.elapsed());
        for id in peers {
            if self.watch(id).is_err() {
                // The kernel has no memory for it: the guest is told that it is over.
                self.end(id, true);
            }
        }
    }
}
