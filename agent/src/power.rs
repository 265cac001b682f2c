//! The end of the machine, in order: containers killed, files synced, the share unmounted, power off.
//! Every part has a deadline; a host that is gone or a file system that hangs cannot keep a guest alive.

use crate::last_words;
use crate::sandbox::Sandbox;
use crate::share::Share;
use std::time::Duration;
use tokio::sync::{Notify, OnceCell, watch};

/// How long the orderly part may take.
const ORDERLY_TIMEOUT_MS: u64 = 5_000;
/// How long the host may take to hang up once it has the answer to PowerOff.
const HANG_UP_TIMEOUT_MS: u64 = 500;

/// Who decides when the machine ends.
#[derive(Debug, Default)]
pub struct Power {
    done: OnceCell<()>,
    answered: Notify,
}

impl Power {
    /// Kills, syncs, unmounts; once. Whoever comes second waits for the first: it may be about to power off.
    pub async fn orderly(&self, sandbox: &Sandbox) {
        self.once(async {
            sandbox.kill_all().await;
            let share = sandbox.share.place().map(ToOwned::to_owned);
            let synced = tokio::task::spawn_blocking(move || {
                rustix::fs::sync();
                share.map_or(Ok(()), |share| Share::unmount(&share))
            });
            if let Ok(Err(e)) = synced.await {
                last_words::warn(&format!("unmounting the share: {e}"));
            }
            if let Err(e) = sandbox.shm.unmount() {
                last_words::warn(&format!("unmounting the pod's shared memory: {e}"));
            }
        })
        .await;
    }

    /// Should the first caller be dropped half-way, the second begins anew.
    async fn once(&self, parts: impl Future<Output = ()>) {
        let limit = Duration::from_millis(ORDERLY_TIMEOUT_MS);
        let bounded = async {
            if tokio::time::timeout(limit, parts).await.is_err() {
                last_words::warn("powering off without waiting for the last files");
            }
        };
        self.done.get_or_init(|| bounded).await;
    }

    /// PowerOff has been answered (the answer is on its way).
    pub fn answered(&self) {
        self.answered.notify_one();
    }

    /// Waits for the end that PowerOff asked for: the host hangs up when it has the answer.
    pub async fn asked(&self, mut hung_up: watch::Receiver<bool>) {
        self.answered.notified().await;
        let limit = Duration::from_millis(HANG_UP_TIMEOUT_MS);
        let _ = tokio::time::timeout(limit, hung_up.wait_for(|ended| *ended)).await;
    }
}

/// Ends the machine; ends the process where it is not PID 1.
pub fn off() -> ! {
    if std::process::id() == 1 {
        let Err(errno) = nix::sys::reboot::reboot(nix::sys::reboot::RebootMode::RB_POWER_OFF);
        last_words::die_saying(&format!("powering off: {}", errno.desc()));
    }
    std::process::exit(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn the_second_caller_waits_for_the_first() {
        let power = Arc::new(Power::default());
        let (sync, synced) = oneshot::channel::<()>();
        let (begin, begun) = oneshot::channel();
        let first = Arc::clone(&power);
        let first = tokio::spawn(async move {
            first
                .once(async {
                    begin.send(()).expect("waited for");
                    synced.await.expect("sent");
                })
                .await;
        });
        begun.await.expect("begun");
        let second = power.once(async { panic!("done twice") });
        tokio::pin!(second);
        tokio::select! {
            biased;
            () = &mut second => panic!("the first is still syncing"),
            () = std::future::ready(()) => {}
        }
        sync.send(()).expect("waited for");
        second.await;
        first.await.expect("the first");
    }

    #[tokio::test(start_paused = true)]
    async fn files_that_hang_keep_nobody() {
        Power::default().once(std::future::pending()).await;
    }
}
