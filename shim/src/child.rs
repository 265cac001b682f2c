//! A child process whose end is an event: by its pidfd, so that no SIGCHLD is needed and nobody else's child is taken.

use crate::polled::polled;
use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus, kill_process, pidfd_open,
    pidfd_send_signal, waitid,
};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// A child that nobody has waited for yet. Dropped before its end it is killed, and whoever inherits the children of this process reaps it.
#[derive(Debug)]
pub struct Child {
    pidfd: AsyncFd<OwnedFd>,
    is_reaped: bool,
}

impl Child {
    /// Takes a child over.
    ///
    /// # Errors
    /// No descriptors are left; the child was killed and reaped.
    pub fn adopt(pid: Pid) -> io::Result<Child> {
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from);
        match pidfd.and_then(|pidfd| polled(pidfd, Interest::READABLE)) {
            Ok(pidfd) => Ok(Child {
                pidfd,
                is_reaped: false,
            }),
            Err(cause) => {
                // It is our child and not reaped yet: neither of the two can fail, and the end comes.
                let _killed = kill_process(pid, Signal::KILL);
                let _reaped = waitid(WaitId::Pid(pid), WaitIdOptions::EXITED);
                Err(cause)
            }
        }
    }

    /// Waits for its end and reaps it. Cancel safe.
    ///
    /// # Errors
    /// It was waited for already.
    pub async fn end(&mut self) -> io::Result<WaitIdStatus> {
        loop {
            let mut ready = self.pidfd.readable().await?;
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            match waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
                Ok(Some(status)) => {
                    self.is_reaped = true;
                    return Ok(status);
                }
                Ok(None) | Err(Errno::INTR) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends a signal. A process that has ended takes none.
    pub fn signal(&self, signal: Signal) {
        let _has_ended = pidfd_send_signal(self.pidfd.get_ref(), signal);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.is_reaped {
            self.signal(Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::Duration;

    fn child(script: &str) -> (std::process::Child, Child) {
        let child = Command::new("sh")
            .args(["-c", script])
            .spawn()
            .expect("a shell");
        let pid = Pid::from_child(&child);
        (child, Child::adopt(pid).expect("a pidfd"))
    }

    #[tokio::test]
    async fn an_end_is_told_with_its_status_and_reaped() {
        let (mut child, mut process) = child("exit 7");
        assert_eq!(process.end().await.expect("ours").exit_status(), Some(7));
        assert!(child.wait().is_err(), "it is reaped");
    }

    #[tokio::test]
    async fn a_signal_ends_it() {
        let (_child, mut process) = child("exec sleep 1000");
        let long = tokio::time::timeout(Duration::from_millis(20), process.end()).await;
        assert!(long.is_err(), "it runs");
        process.signal(Signal::TERM);
        let status = process.end().await.expect("ours");
        assert_eq!(status.terminating_signal(), Some(Signal::TERM.as_raw()));
    }

    #[tokio::test]
    async fn one_that_is_dropped_is_killed() {
        let (mut child, process) = child("exec sleep 1000");
        drop(process);
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(
            child.wait().expect("ours").signal(),
            Some(Signal::KILL.as_raw())
        );
    }
}
