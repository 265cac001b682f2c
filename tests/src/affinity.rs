//! Everything a test starts on one processor.
//!
//! In the testbed a guest of 32 vCPUs on two emulated processors at once failed in each of four runs: QEMU itself
//! ended, a vCPU took a triple fault, or nothing went on. Taking turns on one processor they come up. The emulator's
//! nested SVM is suspected; a host with hardware has yet to show it.

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// While it lives, what this thread starts runs on the first processor that this thread may use.
pub struct OneProcessor {
    before: CpuSet,
}

impl OneProcessor {
    /// From now on.
    ///
    /// # Panics
    /// The kernel does not say where this thread may run.
    pub fn only() -> OneProcessor {
        let this_thread = Pid::from_raw(0);
        let before = sched_getaffinity(this_thread).expect("the affinity of this thread");
        let first = (0..CpuSet::count())
            .find(|&cpu| before.is_set(cpu) == Ok(true))
            .expect("a thread runs somewhere");
        let mut one = CpuSet::new();
        one.set(first).expect("within the set");
        sched_setaffinity(this_thread, &one).expect("fewer processors are always granted");
        OneProcessor { before }
    }
}

impl Drop for OneProcessor {
    fn drop(&mut self) {
        // Refused only if those processors have gone away since; then the kernel has chosen others.
        let _ = sched_setaffinity(Pid::from_raw(0), &self.before);
    }
}
