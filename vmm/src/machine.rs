//! A machine that runs: the event loop of the main thread, from the first instruction of the guest to the
//! end of the run.

use crate::control::Control;
use crate::end::{End, Ends, in_full};
use crate::record::{ExitCounts, Phases};
use crate::slots::Slots;
use crate::vcpus::Vcpus;
use capsid_devices::balloon::BalloonHandle;
use capsid_devices::blk::DiskIo;
use capsid_devices::bus::BusDevice;
use capsid_devices::event::{EventLoop, Interest, Poller, Readiness, Subscriber};
use capsid_devices::mem::MemHandle;
use capsid_devices::serial::Serial;
use capsid_protocol::exit::VmmExit;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a guest that was asked to power off may take, in ms; then the VM ends all the same.
pub const STOP_GRACE_MS: u64 = 10_000;
/// Turns of the event loop that are given to what the guest left in the queues when it ended.
const DRAIN_TURNS_MAX: usize = 1024;
/// How long a slow reader of the serial port may hold up the end, in ms.
const SERIAL_FLUSH_TIMEOUT_MS: u64 = 100;

/// How the guest is asked to power itself off.
pub trait PowerOff {
    /// Asks; false if the guest cannot be asked.
    fn power_off(&mut self) -> bool;
}

/// A machine with all its parts, ready to run.
pub struct Machine {
    /// What the devices and the main thread wait for.
    pub poller: Arc<Poller>,
    /// Where the end is reported.
    pub ends: Ends,
    /// The vCPU threads, confined and waiting.
    pub vcpus: Vcpus,
    /// The serial port, for its last lines.
    pub serial: Arc<Serial>,
    /// The virtio devices.
    pub slots: Slots,
    /// How memory is asked back.
    pub balloon: BalloonHandle,
    /// How it is asked to have more or less, if it may have more than at the start.
    pub mem: Option<MemHandle>,
    /// Where the calls of the disks are made.
    pub disks: Option<Arc<DiskIo>>,
    /// What the owner asks while the VM runs, if it may.
    pub control: Option<Control>,
    /// SIGTERM and SIGINT.
    pub signals: StopSignals,
    /// The way to the guest, if there is one.
    pub power_off: Option<Box<dyn PowerOff>>,
    /// Times, for the report.
    pub phases: Phases,
}

/// What is left of a machine when it has ended.
pub struct Ended {
    /// Why.
    pub end: End,
    /// The last lines of the guest's console.
    pub console: Vec<String>,
    /// Exits to userspace of each vCPU.
    pub counts: Vec<ExitCounts>,
}

/// Lines of the guest's console that go with an error.
const CONSOLE_LINES: usize = 20;

impl Machine {
    /// Runs the guest until it, its owner or a signal ends it, or a defect does.
    pub fn run(mut self) -> Ended {
        let mut end = match self.wait() {
            Ok(end) => end,
            Err(cause) => {
                let why = format!("the event loop failed: {cause}");
                End::new(VmmExit::Internal, why)
            }
        };
        self.phases.ended("end");
        // A guest whose device failed mostly ends for another reason, which it then explains.
        for slot in self.slots.all() {
            if let Some(failure) = slot.transport.take_failure() {
                let failure = in_full(&failure);
                end.why
                    .push_str(&format!("; {}: {failure}", slot.transport.name()));
            }
        }
        // Bounded; a thread that does not answer is left to the end of the process.
        self.vcpus.stop();
        self.drain();
        self.serial
            .flush(Duration::from_millis(SERIAL_FLUSH_TIMEOUT_MS));
        // To drop a disk is to reset it, which would wait for what this loop, which has ended, sees to.
        if let Some(disks) = &self.disks {
            disks.leave();
        }
        Ended {
            end,
            console: self.serial.last_lines(CONSOLE_LINES),
            counts: self.vcpus.counts(),
        }
    }

    fn wait(&mut self) -> io::Result<End> {
        let wake = Arc::new(Mutex::new(Wake));
        self.poller
            .watch(self.ends.as_raw_fd(), Interest::READ, 0, wake)?;
        let signalled = Arc::new(AtomicBool::new(false));
        let signals = self.signals.0.as_raw_fd();
        let told_of_signals = Arc::new(Mutex::new(Signalled(signalled.clone())));
        self.poller
            .watch(signals, Interest::READ, 0, told_of_signals)?;
        self.vcpus.release();
        // The signal that told us to stop, and when the guest's grace is over.
        let mut told: Option<(&str, Instant)> = None;
        let mut control = self.control.take();
        loop {
            if let Some(end) = self.ends.get() {
                return Ok(as_told(end, told.map(|(signal, _)| signal)));
            }
            // Not read on every turn: that would be a system call for each event of a device.
            let signal = match signalled.swap(false, Ordering::Relaxed) {
                true => self.signals.take()?,
                false => None,
            };
            if let Some(signal) = signal {
                let stopped =
                    |how: &str| Ok(End::new(VmmExit::Stopped, format!("{signal}, {how}")));
                if told.is_some() {
                    return stopped("twice");
                }
                if let Some(control) = &mut control {
                    control.ends(self, signal);
                }
                if !self.ask_guest() {
                    return stopped("and the guest cannot be asked to power off");
                }
                let grace = Duration::from_millis(STOP_GRACE_MS);
                told = Some((signal, Instant::now() + grace));
            }
            if let Some(end) = control.as_mut().and_then(|control| control.turn(self)) {
                return Ok(as_told(end, None));
            }
            let left = told.map(|(_, deadline)| left_until(deadline));
            if left == Some(Duration::ZERO) {
                let why = format!("the guest did not power off within {STOP_GRACE_MS} ms");
                return Ok(End::new(VmmExit::Stopped, why));
            }
            let deadline = control.as_ref().and_then(Control::deadline);
            let left = left.into_iter().chain(deadline.map(left_until)).min();
            self.poller.turn(left)?;
        }
    }

    /// Ends a pause, or one that is on its way.
    pub fn resume(&self) {
        self.slots.resume();
        self.vcpus.resume();
    }

    fn ask_guest(&mut self) -> bool {
        self.power_off
            .as_mut()
            .is_some_and(|guest| guest.power_off())
    }

    /// Serves what the guest left in its queues, so that its last words reach the owner.
    fn drain(&self) {
        self.poller.forget(self.ends.as_raw_fd());
        self.poller.forget(self.signals.0.as_raw_fd());
        for _ in 0..DRAIN_TURNS_MAX {
            match self.poller.turn(Some(Duration::ZERO)) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }
}

fn left_until(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// A guest that powers off because we asked it to, as a signal told us, was stopped: it did not end by itself.
fn as_told(end: End, signal: Option<&str>) -> End {
    match (end.exit, signal) {
        (VmmExit::PowerOff, Some(signal)) => {
            let why = format!("{signal}, and the guest powered off in good order");
            End::new(VmmExit::Stopped, why)
        }
        _ => end,
    }
}

/// Wakes the loop; what it was woken for, the loop looks up itself.
struct Wake;

impl Subscriber for Wake {
    fn ready(&mut self, _token: u64, _readiness: Readiness) {}
}

/// Tells the loop that there is a signal to be read.
struct Signalled(Arc<AtomicBool>);

impl Subscriber for Signalled {
    fn ready(&mut self, _token: u64, _readiness: Readiness) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// SIGTERM and SIGINT, as an fd.
pub struct StopSignals(SignalFd);

impl StopSignals {
    /// Blocks both for this thread and those that it starts, so that only the fd tells of them. To be
    /// called before any thread is started.
    ///
    /// # Errors
    /// The kernel gave no signalfd.
    pub fn new() -> io::Result<StopSignals> {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        set.thread_block()?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        Ok(StopSignals(SignalFd::with_flags(&set, flags)?))
    }

    /// The name of a signal that came, if one did.
    fn take(&mut self) -> io::Result<Option<&'static str>> {
        let signal = self.0.read_signal()?;
        Ok(signal.map(|signal| match i32::try_from(signal.ssi_signo) {
            Ok(libc::SIGINT) => "SIGINT",
            _ => "SIGTERM",
        }))
    }
}

/// What the guest asks of the machine, as an end.
pub fn machine_events(ends: Ends) -> capsid_devices::machine::MachineEvents {
    use capsid_devices::machine::MachineEvent;
    Arc::new(move |event| {
        let (exit, why) = match event {
            MachineEvent::PowerOff => (VmmExit::PowerOff, "the guest powered off"),
            MachineEvent::Reset => (VmmExit::Reset, "by the keyboard controller"),
            MachineEvent::Panicked => (VmmExit::GuestPanic, "pvpanic reports a kernel panic"),
        };
        ends.report(End::new(exit, why));
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_was_asked_to_power_off_was_stopped() {
        let off = || End::new(VmmExit::PowerOff, "the guest powered off");
        assert_eq!(as_told(off(), None).exit, VmmExit::PowerOff);
        let stopped = as_told(off(), Some("SIGTERM"));
        assert_eq!(stopped.exit, VmmExit::Stopped);
        assert!(stopped.why.contains("SIGTERM"), "{}", stopped.why);
        let panic = End::new(VmmExit::GuestPanic, "pvpanic");
        assert_eq!(
            as_told(panic, Some("SIGTERM")).exit,
            VmmExit::GuestPanic,
            "a guest that dies meanwhile was not stopped"
        );
    }
}
