//! The vCPU threads: each confines itself, waits until all are confined, runs its vCPU and says how it ended.
//!
//! A thread that ends in any way that nobody asked for ends the VM ([`VmmExit::VcpuLost`]); stopping them
//! takes at most [`VCPU_STOP_TIMEOUT_MS`], whatever the guest does.

use crate::end::{End, Ends};
use crate::kvm::vcpu::{Exit, ImmediateExit, Vcpu};
use crate::record::{ExitCounts, Phases};
use crate::seccomp::{self, Filter, FilterError};
use capsid_devices::bus::Bus;
use capsid_protocol::exit::VmmExit;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{io, thread};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

/// How long the threads get to leave the guest once they are told to, in ms. A vCPU in the kernel answers a
/// signal in microseconds; one that does not is left to the end of the process.
pub const VCPU_STOP_TIMEOUT_MS: u64 = 1000;
/// Stack of a vCPU thread, in bytes; they parse no deep structures.
const STACK_BYTES: usize = 256 * 1024;

/// Why the threads could not be started.
#[derive(Debug, thiserror::Error)]
pub enum VcpusError {
    /// No thread.
    #[error("cannot start the thread of vCPU {index}")]
    Thread {
        /// Which vCPU.
        index: usize,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// No signal handler.
    #[error("cannot handle the signal that stops vCPUs")]
    Signal(#[source] io::Error),
    /// No eventfd.
    #[error("cannot make the event of a pause")]
    Quiet(#[source] io::Error),
    /// A thread could not confine itself.
    #[error("cannot confine a vCPU thread")]
    Filter(#[source] FilterError),
    /// A thread ended before it said anything.
    #[error("a vCPU thread ended before it was confined")]
    Lost,
}

/// The address spaces of the guest's devices.
pub struct Buses {
    /// Port I/O.
    pub port: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
}

/// All vCPU threads of a VM. Dropped once they are stopped, it drops the devices, on the thread that drops it:
/// a device's end makes calls that a vCPU's thread may not.
pub struct Vcpus {
    threads: Vec<Thread>,
    gate: Arc<Gate>,
    buses: Arc<Buses>,
}

struct Thread {
    handle: JoinHandle<()>,
    immediate_exit: ImmediateExit,
    counts: ExitCounts,
}

/// Where the threads and the main thread meet.
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
    /// The threads are wanted to end.
    stop: AtomicBool,
    /// The threads are wanted to wait outside the guest.
    pause: AtomicBool,
    /// Signalled when all of them do.
    quiet: Arc<EventFd>,
}

#[derive(Default)]
struct GateState {
    confined: usize,
    ended: usize,
    failure: Option<FilterError>,
    open: bool,
    /// Threads that wait outside the guest because they are wanted to.
    parked: usize,
    /// How many there are.
    all: usize,
}

impl Gate {
    fn new(all: usize) -> io::Result<Gate> {
        Ok(Gate {
            state: Mutex::new(GateState {
                all,
                ..GateState::default()
            }),
            changed: Condvar::new(),
            stop: AtomicBool::new(false),
            pause: AtomicBool::new(false),
            quiet: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
        })
    }

    fn tell_quiet(&self) {
        // Fails only when the counter is full, and then the fd is readable anyway.
        let _ = self.quiet.write(1);
    }

    /// Waits until the pause is over.
    fn park(&self) {
        self.change(|state| {
            state.parked += 1;
            if state.parked == state.all {
                self.tell_quiet();
            }
        });
        let wanted = |_: &mut GateState| {
            self.pause.load(Ordering::Acquire) && !self.stop.load(Ordering::Acquire)
        };
        let mut state = self.wait_while(wanted);
        state.parked -= 1;
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut GateState)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    fn wait_while(
        &self,
        condition: impl FnMut(&mut GateState) -> bool,
    ) -> MutexGuard<'_, GateState> {
        self.changed
            .wait_while(self.lock(), condition)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Says that a thread has ended, however it does.
struct Farewell {
    index: usize,
    gate: Arc<Gate>,
    ends: Ends,
}

impl Drop for Farewell {
    fn drop(&mut self) {
        if !self.gate.stop.load(Ordering::Acquire) {
            // Dropped if the thread has reported a better reason, or another thread has.
            let why = format!("the thread of vCPU {} ended unasked", self.index);
            self.ends.report(End::new(VmmExit::VcpuLost, why));
        }
        self.gate.change(|state| state.ended += 1);
    }
}

impl Vcpus {
    /// Starts one thread for each vCPU. When this returns, all of them are confined by `filter` and none has
    /// entered the guest: that is for [`Vcpus::release`].
    ///
    /// # Errors
    /// A thread could not be started or confined.
    pub fn start(
        vcpus: Vec<Vcpu>,
        buses: &Arc<Buses>,
        ends: &Ends,
        phases: &Phases,
        filter: &Arc<Filter>,
    ) -> Result<Vcpus, VcpusError> {
        handle_wake_up().map_err(VcpusError::Signal)?;
        let gate = Arc::new(Gate::new(vcpus.len()).map_err(VcpusError::Quiet)?);
        let mut threads = Vec::with_capacity(vcpus.len());
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            let counts = ExitCounts::default();
            let immediate_exit = vcpu.immediate_exit();
            let runner = Runner {
                index,
                buses: Arc::clone(buses),
                counts: counts.clone(),
                phases: phases.clone(),
                gate: Arc::clone(&gate),
                ends: ends.clone(),
            };
            let filter = Arc::clone(filter);
            let handle = thread::Builder::new()
                .name(format!("vcpu{index}"))
                .stack_size(STACK_BYTES)
                .spawn(move || runner.thread(vcpu, &filter))
                .map_err(|cause| VcpusError::Thread { index, cause })?;
            threads.push(Thread {
                handle,
                immediate_exit,
                counts,
            });
        }
        let all = threads.len();
        let mut state =
            gate.wait_while(|state| state.confined + state.ended < all && state.failure.is_none());
        if let Some(failure) = state.failure.take() {
            return Err(VcpusError::Filter(failure));
        }
        if state.ended > 0 {
            return Err(VcpusError::Lost);
        }
        drop(state);
        Ok(Vcpus {
            threads,
            gate,
            buses: Arc::clone(buses),
        })
    }

    /// Lets all vCPUs enter the guest.
    pub fn release(&self) {
        self.gate.change(|state| state.open = true);
    }

    /// Counters of all vCPUs.
    pub fn counts(&self) -> Vec<ExitCounts> {
        self.threads
            .iter()
            .map(|thread| thread.counts.clone())
            .collect()
    }

    /// Makes all vCPUs leave the guest and wait. They have when [`Vcpus::is_quiet`] says so, which [`Vcpus::quiet`] tells of.
    pub fn pause(&self) {
        self.gate.change(|state| {
            self.gate.pause.store(true, Ordering::SeqCst);
            // Threads that a resumption has not woken yet stay where they are.
            if state.parked == state.all {
                self.gate.tell_quiet();
            }
        });
        self.kick();
    }

    /// Lets them go on.
    pub fn resume(&self) {
        self.gate
            .change(|_| self.gate.pause.store(false, Ordering::SeqCst));
    }

    /// Whether all of them wait outside the guest because they were told to.
    pub fn is_quiet(&self) -> bool {
        let state = self.gate.lock();
        state.parked == state.all && self.gate.pause.load(Ordering::SeqCst)
    }

    /// Readable when a pause has been reached.
    pub fn quiet(&self) -> &Arc<EventFd> {
        &self.gate.quiet
    }

    /// Makes all vCPUs leave the guest.
    fn kick(&self) {
        for thread in &self.threads {
            thread.immediate_exit.request();
            // Fails only if the thread has ended already.
            let _ = thread.handle.kill(SIGRTMIN());
        }
    }

    /// Makes all vCPUs leave the guest and their threads end; true if all did in time.
    pub fn stop(&self) -> bool {
        self.gate.stop.store(true, Ordering::Release);
        self.release();
        self.kick();
        let deadline = Instant::now() + Duration::from_millis(VCPU_STOP_TIMEOUT_MS);
        let mut state = self.gate.lock();
        while state.ended < self.threads.len() {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else {
                return false;
            };
            state = self
                .gate
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        true
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        if self.gate.lock().ended < self.threads.len() {
            // A thread that was not stopped may still use the devices, and must not be the last who does.
            std::mem::forget(Arc::clone(&self.buses));
            return;
        }
        for thread in self.threads.drain(..) {
            // It has ended but for its own drops; a panic has ended the process already.
            let _ = thread.handle.join();
        }
    }
}

/// Makes the signal that stops vCPUs interrupt a system call and do nothing else.
fn handle_wake_up() -> io::Result<()> {
    extern "C" fn woken(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), woken)
        .map_err(|cause| io::Error::from_raw_os_error(cause.errno()))
}

struct Runner {
    index: usize,
    buses: Arc<Buses>,
    counts: ExitCounts,
    phases: Phases,
    gate: Arc<Gate>,
    ends: Ends,
}

impl Runner {
    fn thread(self, mut vcpu: Vcpu, filter: &Filter) {
        let _farewell = Farewell {
            index: self.index,
            gate: Arc::clone(&self.gate),
            ends: self.ends.clone(),
        };
        if let Err(failure) = seccomp::confine(filter) {
            self.gate.change(|state| state.failure = Some(failure));
            return;
        }
        self.gate.change(|state| state.confined += 1);
        drop(self.gate.wait_while(|state| !state.open));
        if self.index == 0 {
            self.phases.ended("run");
        }
        while !self.gate.stop.load(Ordering::Acquire) {
            if self.gate.pause.load(Ordering::SeqCst) {
                self.gate.park();
                continue;
            }
            if let Some(end) = self.step(&mut vcpu) {
                self.ends.report(end);
                return;
            }
        }
    }

    /// One stay in the guest and what it asked for; an end if it cannot go on.
    fn step(&self, vcpu: &mut Vcpu) -> Option<End> {
        let index = self.index;
        let kvm_error = |why: String| Some(End::new(VmmExit::KvmError, why));
        let late = |port: u16, data: &[u8]| {
            self.buses.port.write(u64::from(port), data);
        };
        match vcpu.run(late) {
            Ok(Exit::PortWrite { port, width, data }) => {
                for element in data.chunks(width) {
                    let device = self.buses.port.write(u64::from(port), element);
                    self.counts.add("io", device.unwrap_or("none"));
                }
            }
            Ok(Exit::PortRead { port, width, data }) => {
                for element in data.chunks_mut(width) {
                    let device = self.buses.port.read(u64::from(port), element);
                    self.counts.add("io", device.unwrap_or("none"));
                }
            }
            Ok(Exit::MmioWrite { address, data }) => {
                let device = self.buses.mmio.write(address, data);
                self.counts.add("mmio", device.unwrap_or("none"));
            }
            Ok(Exit::MmioRead { address, data }) => {
                let device = self.buses.mmio.read(address, data);
                self.counts.add("mmio", device.unwrap_or("none"));
            }
            Ok(Exit::Interrupted) => {
                self.counts.add("interrupted", "");
                // What asked for the exit says why by a word of its own, set before it asked, which the loop reads next. A pause may be
                // over already: then the vCPU goes on.
                vcpu.immediate_exit().withdraw();
            }
            Ok(Exit::Shutdown) => {
                let why = format!("vCPU {index} shut down on a triple fault");
                return Some(End::new(VmmExit::TripleFault, why));
            }
            Ok(Exit::InternalError { suberror }) => {
                return kvm_error(format!(
                    "KVM_EXIT_INTERNAL_ERROR on vCPU {index}, suberror {suberror} ({})",
                    internal_error(suberror)
                ));
            }
            Ok(Exit::FailEntry { reason }) => {
                return kvm_error(format!(
                    "KVM_EXIT_FAIL_ENTRY on vCPU {index}, hardware reason {reason:#x}"
                ));
            }
            Ok(Exit::Halt) => return kvm_error(format!("unexpected KVM_EXIT_HLT on vCPU {index}")),
            Ok(Exit::SystemEvent { kind }) => {
                return kvm_error(format!("unexpected system event {kind} on vCPU {index}"));
            }
            Ok(Exit::Other(reason)) => {
                return kvm_error(format!("unexpected KVM exit {reason} on vCPU {index}"));
            }
            Err(cause) => return kvm_error(format!("KVM_RUN failed on vCPU {index}: {cause}")),
        }
        None
    }
}

/// `KVM_INTERNAL_ERROR_*` of the KVM API in words.
fn internal_error(suberror: u32) -> &'static str {
    match suberror {
        1 => "an instruction that KVM cannot emulate",
        2 => "simultaneous exceptions",
        3 => "the delivery of an event faulted",
        4 => "an exit reason that KVM does not know",
        _ => "no known kind",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use capsid_devices::bus::BusDevice;
    use std::sync::mpsc;

    fn farewell(gate: &Arc<Gate>, ends: &Ends) -> Farewell {
        Farewell {
            index: 3,
            gate: Arc::clone(gate),
            ends: ends.clone(),
        }
    }

    #[test]
    fn a_thread_that_ends_unasked_or_panics_ends_the_vm() {
        for panics in [false, true] {
            let (gate, ends) = (Arc::new(Gate::new(1).unwrap()), Ends::new().unwrap());
            let farewell = farewell(&gate, &ends);
            let thread = thread::spawn(move || {
                let _farewell = farewell;
                assert!(!panics, "on purpose");
            });
            assert_eq!(thread.join().is_err(), panics);
            let end = ends.get().unwrap();
            assert_eq!(end.exit, VmmExit::VcpuLost);
            assert_eq!(end.why, "the thread of vCPU 3 ended unasked");
        }
    }

    #[test]
    fn a_thread_that_was_told_to_stop_is_not_lost() {
        let (gate, ends) = (Arc::new(Gate::new(1).unwrap()), Ends::new().unwrap());
        gate.stop.store(true, Ordering::Release);
        drop(farewell(&gate, &ends));
        assert_eq!(ends.get(), None);
        assert_eq!(gate.lock().ended, 1);
    }

    #[test]
    fn stopping_a_thread_that_never_answers_takes_no_longer_than_its_timeout() {
        handle_wake_up().unwrap();
        let (release, wait) = mpsc::channel::<()>();
        let vcpus = Vcpus {
            threads: vec![Thread {
                handle: thread::spawn(move || {
                    let _ = wait.recv();
                }),
                immediate_exit: ImmediateExit::default(),
                counts: ExitCounts::default(),
            }],
            gate: Arc::new(Gate::new(1).unwrap()),
            buses: buses_with(None),
        };
        let started = Instant::now();
        assert!(!vcpus.stop());
        assert!(started.elapsed() >= Duration::from_millis(VCPU_STOP_TIMEOUT_MS));
        drop(release);
    }

    /// Says on which thread it was dropped.
    struct Device(mpsc::Sender<thread::ThreadId>);

    impl BusDevice for Device {
        fn name(&self) -> &'static str {
            "test"
        }

        fn read(&self, _offset: u64, _data: &mut [u8]) {}

        fn write(&self, _offset: u64, _data: &[u8]) {}
    }

    impl Drop for Device {
        fn drop(&mut self) {
            self.0.send(thread::current().id()).unwrap();
        }
    }

    fn buses_with(device: Option<Device>) -> Arc<Buses> {
        let mut mmio = Bus::new();
        if let Some(device) = device {
            mmio.insert(0, 8, Arc::new(device)).unwrap();
        }
        let port = Bus::new();
        Arc::new(Buses { port, mmio })
    }

    #[test]
    fn devices_end_on_the_thread_that_drops_the_vcpus_not_on_a_vcpus() {
        handle_wake_up().unwrap();
        let (dropped, on) = mpsc::channel();
        let (gate, ends) = (Arc::new(Gate::new(1).unwrap()), Ends::new().unwrap());
        let buses = buses_with(Some(Device(dropped)));
        let (farewell, used) = (farewell(&gate, &ends), Arc::clone(&buses));
        let vcpus = Vcpus {
            threads: vec![Thread {
                handle: thread::spawn({
                    let gate = Arc::clone(&gate);
                    move || {
                        let _used_to_the_last = used;
                        drop(gate.wait_while(|state| !state.open));
                        drop(farewell);
                    }
                }),
                immediate_exit: ImmediateExit::default(),
                counts: ExitCounts::default(),
            }],
            gate,
            buses,
        };
        assert!(vcpus.stop());
        drop(vcpus);
        assert_eq!(on.recv().unwrap(), thread::current().id());
    }
}
