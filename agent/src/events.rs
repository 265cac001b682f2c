//! News that the host asks for: OOM kills. Each container's memory.events is polled by the event loop;
//! what it says more than last time becomes one event, coalesced per container, so the queue is as
//! bounded as the number of containers.

use crate::cgroup::Cgroup;
use crate::last_words;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::io::Interest;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

/// The OOM killer was in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OomKill {
    /// Which.
    pub container_id: String,
    /// How many processes of it were killed so far.
    pub kills: u64,
}

/// The containers with news, in order.
#[derive(Debug, Default)]
pub struct Events {
    queue: Mutex<VecDeque<OomKill>>,
    more: Notify,
    asked: tokio::sync::Mutex<()>,
}

impl Events {
    fn push(&self, id: &str, kills: u64) {
        let mut queue = self.queue();
        match queue.iter_mut().find(|queued| queued.container_id == id) {
            Some(queued) => queued.kills = kills,
            None => {
                let container_id = id.into();
                queue.push_back(OomKill {
                    container_id,
                    kills,
                });
                self.more.notify_one();
            }
        }
    }

    /// The next container in which the OOM killer was; `None` if somebody else is waiting already.
    pub async fn next_oom(&self) -> Option<OomKill> {
        let _only_one = self.asked.try_lock().ok()?;
        loop {
            let next = self.queue().pop_front();
            match next {
                Some(oom) => return Some(oom),
                None => self.more.notified().await,
            }
        }
    }

    fn queue(&self) -> MutexGuard<'_, VecDeque<OomKill>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Watches one container's memory.events while it lives.
#[derive(Debug)]
pub struct OomWatch {
    counter: Arc<Counter>,
    task: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Counter {
    id: String,
    cgroup: Cgroup,
    seen: Mutex<u64>,
    events: Arc<Events>,
}

impl Counter {
    fn check(&self) -> u64 {
        // A cgroup that is gone has no more news.
        let kills = self.cgroup.oom_kills().unwrap_or(0);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if kills > *seen {
            *seen = kills;
            self.events.push(&self.id, kills);
        }
        *seen
    }
}

impl OomWatch {
    /// Starts watching; `file` is the cgroup's memory.events, if it has one.
    pub fn start(id: &str, cgroup: Cgroup, file: Option<File>, events: Arc<Events>) -> OomWatch {
        let counter = Arc::new(Counter {
            id: id.into(),
            cgroup,
            seen: Mutex::new(0),
            events,
        });
        let task = file.map(|file| {
            let counter = Arc::clone(&counter);
            tokio::spawn(async move {
                if let Err(e) = watch(file, &counter).await {
                    last_words::warn(&format!("watching OOM kills of {}: {e}", counter.id));
                }
            })
        });
        OomWatch { counter, task }
    }

    /// Looks now, and answers how many processes were killed so far: an exit by the OOM killer is never told before its
    /// event is queued.
    pub async fn check(&self) -> u64 {
        let counter = Arc::clone(&self.counter);
        // A look that panicked has told nothing; the watching task still does.
        let looked = tokio::task::spawn_blocking(move || counter.check()).await;
        looked.unwrap_or(0)
    }
}

impl Drop for OomWatch {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

async fn watch(file: File, counter: &Arc<Counter>) -> io::Result<()> {
    let polled = crate::stream::polled(file.into(), Interest::PRIORITY)?;
    loop {
        // Reading this very file arms the next notification (kernfs_generic_poll).
        let mut start = [0; 16];
        match rustix::io::pread(polled.get_ref(), &mut start[..], 0) {
            Err(rustix::io::Errno::NODEV) => return Ok(()),
            result => result?,
        };
        let counter = Arc::clone(counter);
        let _ = tokio::task::spawn_blocking(move || counter.check()).await;
        polled.ready(Interest::PRIORITY).await?.clear_ready();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn oom(id: &str, kills: u64) -> OomKill {
        let container_id = id.into();
        OomKill {
            container_id,
            kills,
        }
    }

    #[tokio::test]
    async fn events_come_in_order_and_once() {
        let events = Events::default();
        for (id, kills) in [("a", 1), ("b", 1), ("a", 3)] {
            events.push(id, kills);
        }
        assert_eq!(events.next_oom().await, Some(oom("a", 3)));
        assert_eq!(events.next_oom().await, Some(oom("b", 1)));
        assert!(events.queue().is_empty());
    }

    #[tokio::test]
    async fn only_one_call_waits() {
        let events = Arc::new(Events::default());
        let first = tokio::spawn({
            let events = Arc::clone(&events);
            async move { events.next_oom().await }
        });
        tokio::task::yield_now().await;
        assert_eq!(events.next_oom().await, None);
        events.push("a", 1);
        assert_eq!(first.await.expect("joins"), Some(oom("a", 1)));
    }
}
