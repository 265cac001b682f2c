//! The event loop itself, on epoll(7).
//!
//! Trusts its subscribers, which are our own code, and nothing that an fd says: an event of a watch that was
//! forgotten meanwhile is dropped, even if the fd's number has been given out again, because the kernel
//! hands back the number of the watch and not that of the fd.

use super::{EventLoop, Interest, Readiness, Subscriber};
use std::collections::HashMap;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// The most fds served between two questions to the kernel.
pub const WATCHES_PER_TURN: usize = 64;

struct Watch {
    fd: RawFd,
    token: u64,
    subscriber: Arc<Mutex<dyn Subscriber>>,
}

#[derive(Default)]
struct Watches {
    by_number: HashMap<u64, Watch>,
    by_fd: HashMap<RawFd, u64>,
    last_number: u64,
}

/// An event loop: many threads may watch and forget, one thread turns it.
pub struct Poller {
    epoll: Epoll,
    watches: Mutex<Watches>,
}

impl Poller {
    /// A loop that watches nothing yet.
    ///
    /// # Errors
    /// The kernel gave no epoll fd.
    pub fn new() -> io::Result<Poller> {
        Ok(Poller {
            epoll: Epoll::new()?,
            watches: Mutex::new(Watches::default()),
        })
    }

    /// Waits until at least one watched fd is ready, or for `timeout` (`None`: for ever), and calls the
    /// subscribers of at most [`WATCHES_PER_TURN`] fds. Returns how many were called; 0 also after a signal.
    ///
    /// To end the thread that turns the loop, watch an eventfd of your own whose subscriber raises a flag.
    ///
    /// # Errors
    /// epoll_wait(2) failed, which means a defect of ours.
    pub fn turn(&self, timeout: Option<Duration>) -> io::Result<usize> {
        let mut events = [EpollEvent::default(); WATCHES_PER_TURN];
        let ready = match self.epoll.wait(milliseconds(timeout), &mut events) {
            Ok(ready) => ready,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => return Err(error),
        };
        let mut called = 0;
        for event in events.iter().take(ready) {
            let watch = self
                .lock()
                .by_number
                .get(&event.data())
                .map(|watch| (watch.token, Arc::clone(&watch.subscriber)));
            // The lock on the watches is gone here: the subscriber may watch, change and forget.
            if let Some((token, subscriber)) = watch {
                let mut subscriber = subscriber.lock().unwrap_or_else(PoisonError::into_inner);
                subscriber.ready(token, readiness(event.event_set()));
                called += 1;
            }
        }
        Ok(called)
    }

    /// How many fds are watched.
    pub fn watched(&self) -> usize {
        self.lock().by_fd.len()
    }

    fn lock(&self) -> MutexGuard<'_, Watches> {
        // Nothing in here panics while the lock is held.
        self.watches.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventLoop for Poller {
    fn watch(
        &self,
        fd: RawFd,
        interest: Interest,
        token: u64,
        subscriber: Arc<Mutex<dyn Subscriber>>,
    ) -> io::Result<()> {
        let mut watches = self.lock();
        watches.last_number += 1;
        let number = watches.last_number;
        let event = EpollEvent::new(event_set(interest), number);
        // The kernel refuses an fd that is watched already (EEXIST).
        self.epoll.ctl(ControlOperation::Add, fd, event)?;
        watches.by_fd.insert(fd, number);
        watches.by_number.insert(
            number,
            Watch {
                fd,
                token,
                subscriber,
            },
        );
        Ok(())
    }

    fn change(&self, fd: RawFd, interest: Interest) -> io::Result<()> {
        let watches = self.lock();
        let number = watches
            .by_fd
            .get(&fd)
            .ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        let event = EpollEvent::new(event_set(interest), *number);
        self.epoll.ctl(ControlOperation::Modify, fd, event)
    }

    fn forget(&self, fd: RawFd) {
        let mut watches = self.lock();
        let Some(number) = watches.by_fd.remove(&fd) else {
            return;
        };
        let watch = watches.by_number.remove(&number);
        debug_assert!(watch.is_some_and(|watch| watch.fd == fd));
        // Fails only if the fd was closed before it was forgotten; then the kernel has already dropped it.
        let _ = self
            .epoll
            .ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }
}

fn event_set(interest: Interest) -> EventSet {
    let mut set = EventSet::empty();
    set.set(EventSet::IN, interest.readable);
    set.set(EventSet::OUT, interest.writable);
    set.set(EventSet::EDGE_TRIGGERED, interest.edge);
    // Without interest in reading, a half-closed peer must not wake the loop again and again.
    set.set(EventSet::READ_HANG_UP, interest.readable);
    set
}

fn readiness(set: EventSet) -> Readiness {
    Readiness {
        readable: set.intersects(EventSet::IN | EventSet::READ_HANG_UP),
        writable: set.contains(EventSet::OUT),
        hangup: set.intersects(EventSet::HANG_UP | EventSet::ERROR),
    }
}

/// epoll_wait(2) counts in ms and takes -1 for ever; a part of a ms is rounded up so that nobody spins on it.
fn milliseconds(timeout: Option<Duration>) -> i32 {
    match timeout {
        None => -1,
        Some(timeout) => i32::try_from(timeout.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    const NOW: Option<Duration> = Some(Duration::ZERO);

    #[derive(Default)]
    struct Seen(Vec<(u64, Readiness)>);

    impl Subscriber for Seen {
        fn ready(&mut self, token: u64, readiness: Readiness) {
            self.0.push((token, readiness));
        }
    }

    fn seen() -> Arc<Mutex<Seen>> {
        Arc::new(Mutex::new(Seen::default()))
    }

    #[test]
    fn a_ready_fd_calls_its_subscriber_with_its_token() {
        let poller = Poller::new().unwrap();
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        let seen = seen();
        poller
            .watch(fd.as_raw_fd(), Interest::READ, 7, seen.clone())
            .unwrap();
        assert_eq!(poller.turn(NOW).unwrap(), 0);
        fd.write(1).unwrap();
        assert_eq!(poller.turn(None).unwrap(), 1);
        let expected = Readiness {
            readable: true,
            ..Readiness::default()
        };
        assert_eq!(seen.lock().unwrap().0, [(7, expected)]);
    }

    #[test]
    fn a_kick_is_told_once_and_nothing_is_taken_away() {
        let poller = Poller::new().unwrap();
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        // The kick of a driver that was faster than the watch.
        kick.write(1).unwrap();
        let (old, new) = (seen(), seen());
        let fd = kick.as_raw_fd();
        poller.watch(fd, Interest::KICK, 1, old.clone()).unwrap();
        assert_eq!(poller.turn(NOW).unwrap(), 1);
        assert_eq!(poller.turn(NOW).unwrap(), 0);
        kick.write(1).unwrap();
        kick.write(1).unwrap();
        assert_eq!(poller.turn(NOW).unwrap(), 1);
        assert_eq!(poller.turn(NOW).unwrap(), 0);
        // Whoever watches it next does not know what was seen before.
        poller.forget(fd);
        poller.watch(fd, Interest::KICK, 2, new.clone()).unwrap();
        assert_eq!(poller.turn(NOW).unwrap(), 1);
        assert_eq!(
            (old.lock().unwrap().0.len(), new.lock().unwrap().0.len()),
            (2, 1)
        );
    }

    #[test]
    fn a_forgotten_fd_calls_nobody_even_when_its_number_is_used_again() {
        let poller = Poller::new().unwrap();
        let (old, new) = (seen(), seen());
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        fd.write(1).unwrap();
        poller
            .watch(fd.as_raw_fd(), Interest::READ, 1, old.clone())
            .unwrap();
        poller.forget(fd.as_raw_fd());
        poller
            .watch(fd.as_raw_fd(), Interest::READ, 2, new.clone())
            .unwrap();
        poller.turn(NOW).unwrap();
        assert!(old.lock().unwrap().0.is_empty());
        assert_eq!(new.lock().unwrap().0.len(), 1);
        poller.forget(fd.as_raw_fd());
        assert_eq!(poller.turn(NOW).unwrap(), 0);
        assert_eq!(poller.watched(), 0);
    }

    #[test]
    fn an_fd_is_watched_once_and_changed_only_while_watched() {
        let poller = Poller::new().unwrap();
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        assert!(poller.change(fd.as_raw_fd(), Interest::READ).is_err());
        poller
            .watch(fd.as_raw_fd(), Interest::READ, 1, seen())
            .unwrap();
        assert!(
            poller
                .watch(fd.as_raw_fd(), Interest::READ, 1, seen())
                .is_err()
        );
        poller.forget(fd.as_raw_fd());
        assert!(poller.change(fd.as_raw_fd(), Interest::READ).is_err());
    }

    #[test]
    fn without_interest_a_half_closed_peer_does_not_wake_the_loop_but_a_gone_one_does() {
        let poller = Poller::new().unwrap();
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let seen = seen();
        poller
            .watch(ours.as_raw_fd(), Interest::READ, 1, seen.clone())
            .unwrap();
        theirs.write_all(b"x").unwrap();
        theirs.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(poller.turn(NOW).unwrap(), 1);
        poller
            .change(ours.as_raw_fd(), Interest::default())
            .unwrap();
        assert_eq!(poller.turn(NOW).unwrap(), 0);
        drop(theirs);
        assert_eq!(poller.turn(NOW).unwrap(), 1);
        assert!(seen.lock().unwrap().0.last().unwrap().1.hangup);
    }

    #[test]
    fn a_subscriber_may_forget_itself_while_it_is_called() {
        struct Once(Arc<Poller>, RawFd);
        impl Subscriber for Once {
            fn ready(&mut self, _: u64, _: Readiness) {
                self.0.forget(self.1);
            }
        }
        let poller = Arc::new(Poller::new().unwrap());
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        fd.write(1).unwrap();
        let once = Arc::new(Mutex::new(Once(poller.clone(), fd.as_raw_fd())));
        poller
            .watch(fd.as_raw_fd(), Interest::READ, 1, once)
            .unwrap();
        assert_eq!(poller.turn(NOW).unwrap(), 1);
        assert_eq!(poller.turn(NOW).unwrap(), 0);
    }

    #[test]
    fn a_part_of_a_millisecond_waits_and_does_not_spin() {
        assert_eq!(milliseconds(Some(Duration::from_nanos(1))), 1);
        assert_eq!(milliseconds(NOW), 0);
        assert_eq!(milliseconds(None), -1);
        assert_eq!(milliseconds(Some(Duration::MAX)), i32::MAX);
    }
}
