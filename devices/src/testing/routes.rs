//! The VMM's side of MSI-X, counting instead of interrupting.

use crate::pci::msix::{MsiMessage, MsiRoutes};
use std::io;
use std::sync::{Condvar, Mutex};
use std::time::Instant;

#[derive(Default)]
struct Log {
    routes: Vec<(u16, Option<MsiMessage>)>,
    triggered: Vec<u16>,
    refuse: bool,
}

/// Remembers each route and each trigger.
#[derive(Default)]
pub struct FakeRoutes {
    log: Mutex<Log>,
    triggered: Condvar,
}

impl FakeRoutes {
    /// How often `vector` was triggered.
    pub fn triggers(&self, vector: u16) -> usize {
        let log = self.log.lock().unwrap();
        log.triggered.iter().filter(|seen| **seen == vector).count()
    }

    /// All changes of routes so far, in order.
    pub fn updates(&self) -> Vec<(u16, Option<MsiMessage>)> {
        self.log.lock().unwrap().routes.clone()
    }

    /// Makes every following update and trigger fail, or succeed again.
    pub fn refuse(&self, refuse: bool) {
        self.log.lock().unwrap().refuse = refuse;
    }

    /// Waits until more than `seen` triggers happened in all, and returns how many; `None` at `deadline`.
    pub fn wait_beyond(&self, seen: usize, deadline: Instant) -> Option<usize> {
        let mut log = self.log.lock().unwrap();
        while log.triggered.len() <= seen {
            let left = deadline.checked_duration_since(Instant::now())?;
            log = self.triggered.wait_timeout(log, left).unwrap().0;
        }
        Some(log.triggered.len())
    }

    /// How many triggers happened in all.
    pub fn total(&self) -> usize {
        self.log.lock().unwrap().triggered.len()
    }
}

impl MsiRoutes for FakeRoutes {
    fn update(&self, vector: u16, message: Option<MsiMessage>) -> io::Result<()> {
        let mut log = self.log.lock().unwrap();
        if log.refuse {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        log.routes.push((vector, message));
        Ok(())
    }

    fn trigger(&self, vector: u16) -> io::Result<()> {
        let mut log = self.log.lock().unwrap();
        if log.refuse {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        log.triggered.push(vector);
        self.triggered.notify_all();
        Ok(())
    }
}
