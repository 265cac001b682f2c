//! What the tests of the VMM's program need: guests of a few bytes of code, and the program run as its
//! owner runs it, with everything by inherited fd.

use capsid_protocol::exit::VmmExit;
use capsid_protocol::report::MachineReport;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{self, SigSet, SigmaskHow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};
use std::ffi::CStr;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// How long a run of the VMM may take before a test gives up on it, in seconds: many times what it takes on an emulated host that others
/// use as well.
pub(crate) const RUN_TIMEOUT_S: i64 = 600;
/// Whom the VMM becomes in tests.
pub(crate) const UID: u32 = 61_234;
/// Its group.
pub(crate) const GID: u32 = 61_235;

/// Where the code of a guest is loaded and entered.
pub(crate) const CODE: u32 = 0x10_0000;
/// BAR of pvpanic, in slot 1.
pub(crate) const PVPANIC: u32 = 0xc000_8000;

/// Machine code of a 32-bit guest, instruction by instruction.
#[derive(Clone, Default)]
pub(crate) struct Code(pub Vec<u8>);

impl Code {
    pub(crate) fn outb(mut self, port: u16, value: u8) -> Code {
        let [low, high] = port.to_le_bytes();
        self.0.extend([0x66, 0xba, low, high, 0xb0, value, 0xee]);
        self
    }

    pub(crate) fn outl(mut self, port: u16, value: u32) -> Code {
        let [low, high] = port.to_le_bytes();
        self.0.extend([0x66, 0xba, low, high, 0xb8]);
        self.0.extend(value.to_le_bytes());
        self.0.push(0xef);
        self
    }

    /// `in al, port`, then `out 0x3f8, al`.
    pub(crate) fn echo_port(mut self, port: u16) -> Code {
        let [low, high] = port.to_le_bytes();
        self.0
            .extend([0x66, 0xba, low, high, 0xec, 0x66, 0xba, 0xf8, 0x03, 0xee]);
        self
    }

    pub(crate) fn store8(mut self, address: u32, value: u8) -> Code {
        self.0.extend([0xc6, 0x05]);
        self.0.extend(address.to_le_bytes());
        self.0.push(value);
        self
    }

    pub(crate) fn store32(mut self, address: u32, value: u32) -> Code {
        self.0.extend([0xc7, 0x05]);
        self.0.extend(address.to_le_bytes());
        self.0.extend(value.to_le_bytes());
        self
    }

    /// Writes the low half of an MSR, and zero to the high one.
    pub(crate) fn wrmsr(mut self, index: u32, value: u32) -> Code {
        self.0.push(0xb9);
        self.0.extend(index.to_le_bytes());
        self.0.push(0xb8);
        self.0.extend(value.to_le_bytes());
        self.0.extend([0x31, 0xd2, 0x0f, 0x30]);
        self
    }

    /// `rep outsb` of `count` bytes at `address` to the serial port.
    pub(crate) fn outsb(mut self, address: u32, count: u32) -> Code {
        self.0.push(0xbe);
        self.0.extend(address.to_le_bytes());
        self.0.push(0xb9);
        self.0.extend(count.to_le_bytes());
        self.0.extend([0x66, 0xba, 0xf8, 0x03, 0xfc, 0xf3, 0x6e]);
        self
    }

    pub(crate) fn print(self, text: &str) -> Code {
        text.bytes().fold(self, |code, byte| code.outb(0x3f8, byte))
    }

    /// Lets pvpanic decode its BAR and writes `value` to it.
    pub(crate) fn pvpanic(self, value: u8) -> Code {
        self.outl(0xcf8, 0x8000_0804)
            .outl(0xcfc, 0x0000_0002)
            .store8(PVPANIC, value)
    }

    pub(crate) fn power_off(self) -> Code {
        self.pvpanic(4).halt()
    }

    /// `ud2` with an empty IDT.
    pub(crate) fn triple_fault(mut self) -> Code {
        self.0.extend([0x0f, 0x0b]);
        self
    }

    /// `in al, 0xcfc` behind a write of `address` to 0xcf8, printed; for ever.
    pub(crate) fn print_config_for_ever(self, address: u32) -> Code {
        let mut code = self.outl(0xcf8, address).echo_port(0xcfc);
        // `jmp` with the distance from its own end.
        let back = -(code.0.len() as i32 + 5);
        code.0.push(0xe9);
        code.0.extend(back.to_le_bytes());
        code
    }

    /// `hlt` for ever.
    pub(crate) fn halt(mut self) -> Code {
        self.0.extend([0xf4, 0xeb, 0xfd]);
        self
    }

    /// `jmp .` for ever.
    pub(crate) fn spin(mut self) -> Code {
        self.0.extend([0xeb, 0xfe]);
        self
    }

    /// Writes to each page of memory from `address` on, for ever.
    pub(crate) fn touch_from(mut self, address: u32) -> Code {
        self.0.push(0xbf);
        self.0.extend(address.to_le_bytes());
        // `mov [edi], edi`; `add edi, 0x1000`; `jmp` back to the first.
        self.0
            .extend([0x89, 0x3f, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0xeb, 0xf6]);
        self
    }

    /// An ELF file with a PVH note that enters at the first byte.
    pub(crate) fn kernel(&self) -> Vec<u8> {
        let mut note = Vec::new();
        for word in [4u32, 4, 18] {
            note.extend(word.to_le_bytes());
        }
        note.extend(b"Xen\0");
        note.extend(CODE.to_le_bytes());
        let code_offset = 64 + 2 * 56u64;
        let note_offset = code_offset + self.0.len() as u64;

        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        for word in [0u64, 64, 0] {
            file.extend(word.to_le_bytes());
        }
        file.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        let headers = [
            (1u32, code_offset, u64::from(CODE), self.0.len() as u64),
            (4, note_offset, 0, note.len() as u64),
        ];
        for (kind, offset, address, bytes) in headers {
            file.extend(kind.to_le_bytes());
            file.extend(5u32.to_le_bytes());
            for word in [offset, address, address, bytes, bytes, 4] {
                file.extend(word.to_le_bytes());
            }
        }
        file.extend(&self.0);
        file.extend(note);
        file
    }
}

/// A file in memory that a child inherits.
pub(crate) fn inherited(bytes: &[u8]) -> File {
    named(c"test", bytes)
}

/// The same by a name that /proc shows.
pub(crate) fn named(name: &CStr, bytes: &[u8]) -> File {
    let mut file = File::from(memfd_create(name, MemfdFlags::empty()).unwrap());
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

/// A VMM to be started.
pub(crate) struct Vmm {
    pub program: PathBuf,
    pub kernel: File,
    pub cpus: u8,
    pub memory_mib: u64,
    /// Whom it becomes: user and group.
    pub identity: (u32, u32),
    /// Members added to the JSON of the configuration.
    pub more: String,
}

impl Vmm {
    pub(crate) fn new(kernel: &[u8]) -> Vmm {
        Vmm {
            program: env!("CARGO_BIN_EXE_capsid-vmm").into(),
            kernel: inherited(kernel),
            cpus: 1,
            memory_mib: 64,
            identity: (UID, GID),
            more: String::new(),
        }
    }

    pub(crate) fn of(code: &Code) -> Vmm {
        Vmm::new(&code.kernel())
    }

    pub(crate) fn start(self) -> Running {
        self.start_by(spawn)
    }

    pub(crate) fn start_by(self, spawn: impl Fn(&mut Command) -> Child) -> Running {
        let mut prepared = self.prepare();
        Running {
            child: spawn(&mut prepared.command),
            serial: prepared.serial,
            report: prepared.report,
        }
    }

    pub(crate) fn prepare(self) -> Prepared {
        let serial = inherited(b"");
        let report = inherited(b"");
        let config = format!(
            r#"{{"version":1,"id":"test","cpus":{},"memory_mib":{},"kernel_fd":{},"report_fd":{},
                "serial":{{"fd":{}}},"jail":{{"uid":{},"gid":{}}}{}}}"#,
            self.cpus,
            self.memory_mib,
            self.kernel.as_raw_fd(),
            report.as_raw_fd(),
            serial.as_raw_fd(),
            self.identity.0,
            self.identity.1,
            self.more,
        );
        let config = inherited(config.as_bytes());
        let mut command = Command::new(&self.program);
        command
            .args(["--config-fd", &config.as_raw_fd().to_string()])
            .env("OWNERS_SECRET", "not for a guest")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        Prepared {
            command,
            serial,
            report,
            _inherited: [config, self.kernel],
        }
    }

    pub(crate) fn run(self) -> Ended {
        self.start().wait()
    }
}

/// A VMM that was not started yet.
pub(crate) struct Prepared {
    pub command: Command,
    pub serial: File,
    report: File,
    _inherited: [File; 2],
}

/// The signals that a VMM reads from an fd, blocked for the calling thread and what it starts; the mask before.
pub(crate) fn block_signals() -> SigSet {
    let mut signals = SigSet::empty();
    signals.add(signal::Signal::SIGTERM);
    signals.add(signal::Signal::SIGINT);
    signals.thread_swap_mask(SigmaskHow::SIG_BLOCK).unwrap()
}

/// Starts it as an owner does: the first process of a PID namespace, with the signals that it reads from an fd blocked.
pub(crate) fn spawn(command: &mut Command) -> Child {
    let own = File::open("/proc/thread-self/ns/pid").unwrap();
    let before = block_signals();
    unshare(CloneFlags::CLONE_NEWPID).unwrap();
    let child = command.spawn();
    setns(own, CloneFlags::CLONE_NEWPID).unwrap();
    before.thread_set_mask().unwrap();
    child.unwrap()
}

/// A system call, or some of its calls.
#[derive(Clone, Copy)]
pub(crate) struct Call {
    number: i64,
    /// An argument, some bits of it, and their value.
    only: Option<(u8, u64, u64)>,
}

impl Call {
    pub(crate) fn any(number: i64) -> Call {
        Call { number, only: None }
    }

    /// With this argument.
    pub(crate) fn with(number: i64, argument: u8, value: impl Into<i64>) -> Call {
        let only = Some((argument, u64::from(u32::MAX), value.into() as u64));
        Call { number, only }
    }

    /// With this bit in its first argument.
    pub(crate) fn with_flag(number: i64, flag: i32) -> Call {
        let flag = flag as u64;
        let only = Some((0, flag, flag));
        Call { number, only }
    }
}

/// Does something on a thread whose VMMs are refused a system call, as container runtimes and older kernels refuse some.
///
/// # Panics
/// It panics.
pub(crate) fn refused<T: Send>(call: Call, errno: Errno, what: impl FnOnce() -> T + Send) -> T {
    let condition = |(argument, bits, value)| {
        let operator = SeccompCmpOp::MaskedEq(bits);
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value).unwrap()
    };
    let rules = call
        .only
        .map(|only| SeccompRule::new(vec![condition(only)]).unwrap());
    let refusal = SeccompFilter::new(
        [(call.number, rules.into_iter().collect())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(errno.raw_os_error() as u32),
        TargetArch::x86_64,
    );
    let refusal = BpfProgram::try_from(refusal.unwrap()).unwrap();
    let confined = move || {
        seccompiler::apply_filter(&refusal).unwrap();
        what()
    };
    std::thread::scope(|scope| scope.spawn(confined).join()).unwrap()
}

/// A VMM that runs; killed when dropped.
pub(crate) struct Running {
    pub child: Child,
    serial: File,
    report: File,
}

/// A VMM that has ended.
pub(crate) struct Ended {
    /// `None` after a signal.
    pub exit: Option<VmmExit>,
    pub stderr: String,
    pub serial: String,
    pub report: Option<MachineReport>,
}

impl Running {
    pub(crate) fn pid(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty()).unwrap();
        pidfd_send_signal(pidfd, signal).unwrap();
    }

    /// What the guest has printed so far, byte by byte.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        raw_contents(&self.serial)
    }

    /// Waits until the guest has printed `text`.
    pub(crate) fn printed(&mut self, text: &str) {
        self.printed_while(text, std::thread::yield_now);
    }

    /// The same, and does something over and over meanwhile.
    pub(crate) fn printed_while(&mut self, text: &str, mut meanwhile: impl FnMut()) {
        let started = std::time::Instant::now();
        while !contents(&self.serial).contains(text) {
            assert!(
                started.elapsed().as_secs() < RUN_TIMEOUT_S as u64,
                "no {text:?}: {:?}",
                contents(&self.serial)
            );
            if let Some(status) = self.child.try_wait().unwrap() {
                let mut stderr = String::new();
                let mut pipe = self.child.stderr.take().unwrap();
                pipe.read_to_string(&mut stderr).unwrap();
                let said = contents(&self.serial);
                panic!("the VMM ended early with {status}: {stderr}; {said:?}");
            }
            meanwhile();
        }
    }

    pub(crate) fn wait(mut self) -> Ended {
        let pidfd = pidfd_open(self.pid(), PidfdFlags::empty()).unwrap();
        let timeout = Timespec {
            tv_sec: RUN_TIMEOUT_S,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::new(&pidfd, PollFlags::IN)];
        if poll(&mut fds, Some(&timeout)).unwrap() == 0 {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
            panic!("the VMM did not end within {RUN_TIMEOUT_S} s");
        }
        let mut stderr = String::new();
        let mut pipe = self.child.stderr.take().unwrap();
        pipe.read_to_string(&mut stderr).unwrap();
        let code = self.child.wait().unwrap().code();
        Ended {
            exit: code.and_then(VmmExit::from_code),
            stderr,
            serial: contents(&self.serial),
            report: serde_json::from_str(&contents(&self.report)).ok(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// By position: the VMM writes at the offset that its descriptor and ours share.
fn raw_contents(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

pub(crate) fn contents(file: &File) -> String {
    String::from_utf8_lossy(&raw_contents(file)).into_owned()
}

/// Whether VMs can run here; says so loudly, with the test's name, if not. `cargo xtask test` counts a test that prints a line
/// `SKIPPED …: why` as skipped (`xtask/src/test/count.rs`); plain `cargo test` shows the line with `-- --show-output`.
pub(crate) fn can_run(test: &str) -> bool {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let root = rustix::process::geteuid().is_root();
    if kvm.is_err() || !root {
        eprintln!("SKIPPED {test}: needs /dev/kvm and root");
    }
    kvm.is_ok() && root
}
