//! A share without queues and threads of its own, for tests that serve requests on one thread, one after the other.

use super::confine::{ConfineError, drop_privileges, own_working_directory};
use super::device::{FD_BUDGET_MIN, split_budget};
use super::guest_io;
use super::server::Server;
use super::session::Scratch;
use crate::virtio::chain::Buffers;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// A share that is served on the thread that made it.
pub struct BareShare {
    server: Server,
    scratch: Scratch,
}

impl BareShare {
    /// The tree below `root`, with [`FD_BUDGET_MIN`] descriptors; `proc_fds` is `/proc/self/fd`. The calling thread becomes
    /// user and group `id` with the privileges of a share's threads, for good; its mount namespace and its system calls stay
    /// as they are.
    ///
    /// # Errors
    /// The thread could not be changed; it is of no more use.
    pub fn new(root: OwnedFd, proc_fds: OwnedFd, id: u32) -> Result<BareShare, ConfineError> {
        drop_privileges(id, id)?;
        own_working_directory(proc_fds.as_fd())?;
        Ok(BareShare {
            server: Server::new(
                root,
                Arc::new(proc_fds),
                split_budget(FD_BUDGET_MIN),
                Arc::default(),
            ),
            scratch: Scratch::new(),
        })
    }

    /// Serves one request; returns how many bytes were written.
    pub fn serve(&mut self, buffers: Buffers<'_>) -> u32 {
        self.server
            .serve(&guest_io::Buffers::new(buffers), &mut self.scratch)
    }

    /// What a reset does: all nodes and open files go.
    pub fn end_session(&self) {
        self.server.end_session();
    }
}
