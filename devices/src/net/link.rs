//! The cable of a card: whoever has the [`Link`] plugs and pulls it while the card works.

use super::server::Server;
use crate::virtio::device::Interrupt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The cable of one card; clones are the same.
///
/// Locks: this one, then the server's. The card takes it with the transport's held, never the other way round.
#[derive(Clone)]
pub struct Link(Arc<Mutex<State>>);

struct State {
    up: bool,
    /// It was pulled while the card did not work.
    was_pulled: bool,
    live: Option<Live>,
}

/// A card between activation and reset.
pub(super) struct Live {
    pub(super) server: Arc<Mutex<Server>>,
    pub(super) interrupt: Arc<dyn Interrupt>,
    /// The driver wants to know (VIRTIO_NET_F_STATUS).
    pub(super) told: bool,
}

impl Link {
    /// One that is plugged.
    pub(super) fn new() -> Link {
        Link(Arc::new(Mutex::new(State {
            up: true,
            was_pulled: false,
            live: None,
        })))
    }

    /// Whether it is plugged.
    pub fn is_up(&self) -> bool {
        self.lock().up
    }

    /// Plugs or pulls it. While it is pulled packets of both directions are thrown away, whatever the driver makes of it.
    pub fn set(&self, up: bool) {
        let mut state = self.lock();
        if state.up == up {
            return;
        }
        state.up = up;
        state.was_pulled |= state.live.is_none() && !up;
        if let Some(live) = &state.live {
            let mut server = live.server.lock().unwrap_or_else(PoisonError::into_inner);
            server.set_link(up);
            drop(server);
            if live.told {
                live.interrupt.config_changed();
            }
        }
    }

    /// The card has begun to work, as the cable says.
    pub(super) fn attach(&self, live: Live) {
        let mut state = self.lock();
        let mut server = live.server.lock().unwrap_or_else(PoisonError::into_inner);
        server.begin(state.up);
        drop(server);
        state.live = Some(live);
    }

    /// It has ended its work.
    pub(super) fn detach(&self) {
        let mut state = self.lock();
        state.live = None;
        state.was_pulled = !state.up;
    }

    /// Whether it was pulled at any time since the card ended its work.
    pub(super) fn was_pulled(&self) -> bool {
        self.lock().was_pulled
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
