//! The emulated host as a QEMU process: its command line, its sockets, its end.
//!
//! The machine has exactly what `arguments` says, the same when it is saved and when it is resumed: a saved state fits no
//! other. QEMU dies with us (see `command`), and what it says on its console is at hand when it goes wrong.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::io::{FdFlags, fcntl_setfd};

use crate::command::{self, OnInterrupt, Running};
use crate::testbed::emulator::Emulator;
use crate::testbed::qmp::{Qmp, QmpError};

/// Memory of the emulated host: room for a guest whose memory goes on above the hole at 3 GiB.
const MEMORY_MIB: u32 = 4096;
/// How much of the console an error shows.
const CONSOLE_TAIL_MAX_LINES: usize = 20;

/// How time passes inside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// As outside.
    Plain,
    /// One nanosecond an instruction. Slow, and the same on every machine.
    Metered,
}

/// The files of a machine.
#[derive(Debug, Clone)]
pub struct Files {
    /// The program and its firmware.
    pub emulator: Emulator,
    /// Kernel.
    pub kernel: PathBuf,
    /// Initial ramdisk.
    pub initrd: PathBuf,
    /// Root disk, raw.
    pub root: PathBuf,
    /// The machine's memory.
    pub memory: PathBuf,
    /// Drive with the programs under test, raw.
    pub programs: PathBuf,
}

/// Whether the machine is made or used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// Boots; writes to root disk and memory file.
    Boot,
    /// Waits for a state to go on from; changes nothing on disk.
    Resume,
}

/// Why there is no machine.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// QEMU did not start.
    #[error("starting the testbed's emulator")]
    Start(#[source] io::Error),
    /// It went wrong later.
    #[error("{what}\nthe testbed's last words:\n{words}")]
    Died {
        /// What we saw.
        what: String,
        /// QEMU's messages and the console's tail.
        words: String,
    },
}

/// A running QEMU, killed when dropped.
#[derive(Debug)]
pub struct Machine {
    qemu: Running,
    /// Where QEMU's messages and the guest's console go.
    scratch: PathBuf,
    /// The machine protocol.
    pub qmp: Qmp,
    /// The other end of the door.
    pub door: UnixStream,
}

impl Machine {
    /// Starts QEMU; `scratch` is a directory for its messages and throw-away files.
    ///
    /// # Errors
    /// QEMU is missing, or refuses its command line.
    pub fn start(
        mode: Mode,
        start: Start,
        files: &Files,
        scratch: &Path,
    ) -> Result<Self, MachineError> {
        let (door, their_door) = UnixStream::pair().map_err(MachineError::Start)?;
        let (qmp, their_qmp) = UnixStream::pair().map_err(MachineError::Start)?;
        let sockets = [inherited(their_door)?, inherited(their_qmp)?];
        let fds = sockets
            .each_ref()
            .map(|socket| socket.as_raw_fd().to_string());
        let messages = File::create(scratch.join("qemu.log")).map_err(MachineError::Start)?;
        let mut command = Command::new(files.emulator.program());
        command.args(arguments(
            mode,
            start,
            files,
            &scratch.join("console.log"),
            &fds,
        ));
        // The throw-away copy of the root disk goes where `TMPDIR` says.
        command
            .env("TMPDIR", scratch)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(messages);
        let qemu = command::spawn(&mut command, OnInterrupt::Kill).map_err(MachineError::Start)?;
        drop(sockets);
        match Qmp::start(qmp) {
            Ok(qmp) => Ok(Self {
                qemu,
                scratch: scratch.to_owned(),
                qmp,
                door,
            }),
            Err(cause) => Err(died(&format!("QEMU did not start: {cause}"), scratch)),
        }
    }

    /// An error about this machine, with its last words.
    pub fn died(&self, what: &str) -> MachineError {
        died(what, &self.scratch)
    }

    /// Saves the state and ends QEMU in good order.
    ///
    /// # Errors
    /// QEMU could not.
    pub fn save_and_quit(mut self, state: &Path) -> Result<(), MachineError> {
        let saved = self.qmp.save(&uri(state)).and_then(|()| self.qmp.quit());
        saved.map_err(|cause| self.died_of(&cause))?;
        let status = self.qemu.child.wait().map_err(MachineError::Start)?;
        if status.success() {
            Ok(())
        } else {
            Err(self.died(&format!("QEMU ended with {}", command::end(status))))
        }
    }

    /// Goes on from a saved state.
    ///
    /// # Errors
    /// QEMU could not.
    pub fn resume(&mut self, state: &Path) -> Result<(), MachineError> {
        self.qmp
            .load(&uri(state))
            .map_err(|cause| self.died_of(&cause))
    }

    /// An error about this machine after its door closed, with how QEMU ended as well. Ends QEMU if it still runs.
    pub fn lost(&mut self, what: &str) -> MachineError {
        // A process that is ending by itself keeps the status it ends with.
        let _ = self.qemu.child.kill();
        match self.qemu.child.wait() {
            Ok(status) => self.died(&format!("{what} ({})", command::end(status))),
            Err(_) => self.died(what),
        }
    }

    fn died_of(&self, cause: &QmpError) -> MachineError {
        self.died(&cause.to_string())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself; there is nothing in it that is still wanted.
        let _ = self.qemu.child.kill();
        let _ = self.qemu.child.wait();
    }
}

/// QEMU's arguments. Paths and descriptors apart, `Boot` and `Resume` describe the same machine. One processor: with two,
/// guests die of the emulator's own faults (`docs/decisions/0008-testbed-of-one-processor.md`). Without ERMS and its kind kernels copy
/// and clear memory by words: the emulator executes a `rep movsb` byte by byte, where a real processor moves cache lines.
pub fn arguments(
    mode: Mode,
    start: Start,
    files: &Files,
    console: &Path,
    [door, qmp]: &[String; 2],
) -> Vec<String> {
    let clock = match mode {
        Mode::Plain => "",
        Mode::Metered => " -icount shift=0,sleep=off",
    };
    let (sharing, keeping, incoming) = match start {
        Start::Boot => ("share=on", "", ""),
        Start::Resume => (
            "share=off,readonly=on,rom=off",
            ",snapshot=on",
            "-incoming defer",
        ),
    };
    let (memory, root, programs) = (
        escaped(&files.memory),
        escaped(&files.root),
        escaped(&files.programs),
    );
    let mut line = Line::default();
    line.words("-nodefaults -no-user-config -display none -no-reboot");
    line.pair("-L", files.emulator.dir().to_string_lossy());
    line.words(&format!("-machine q35,memory-backend=memory -cpu max,-erms,-fsrm,-fzrm,-fsrs,-fsrc -smp 1 -accel tcg,thread=single{clock} -m {MEMORY_MIB}"));
    let size = format!("size={MEMORY_MIB}M");
    line.pair(
        "-object",
        format!("memory-backend-file,id=memory,{size},mem-path={memory},{sharing}"),
    );
    line.pair("-kernel", files.kernel.to_string_lossy());
    line.pair("-initrd", files.initrd.to_string_lossy());
    line.pair("-append", KERNEL_COMMAND_LINE);
    line.pair(
        "-chardev",
        format!("file,id=console,path={}", escaped(console)),
    );
    line.words("-serial chardev:console");
    let throw_away = format!("cache=unsafe,discard=unmap{keeping}");
    line.pair(
        "-drive",
        format!("file={root},format=raw,if=none,id=root,{throw_away}"),
    );
    line.words("-device virtio-blk-pci,drive=root");
    line.pair(
        "-drive",
        format!("file={programs},format=raw,if=none,id=programs,readonly=on"),
    );
    line.words(
        "-device virtio-blk-pci,drive=programs -device virtio-rng-pci -device virtio-serial-pci",
    );
    line.words(&format!(
        "-chardev socket,id=door,fd={door} -device virtserialport,chardev=door,name=capsid.door"
    ));
    line.words(&format!(
        "-chardev socket,id=qmp,fd={qmp} -mon chardev=qmp,mode=control"
    ));
    line.words(incoming);
    line.0
}

/// A command line being put together.
#[derive(Default)]
struct Line(Vec<String>);

impl Line {
    /// Words without a space in any of them.
    fn words(&mut self, text: &str) {
        self.0.extend(text.split_whitespace().map(str::to_owned));
    }

    /// An option and its value, which may hold anything.
    fn pair(&mut self, option: &str, value: impl Into<String>) {
        self.0.extend([option.to_owned(), value.into()]);
    }
}

/// The emulated processor leaks nothing to speculate about, and the inode tables need no zeroing: both only take time.
const KERNEL_COMMAND_LINE: &str = "root=/dev/vda rw rootflags=noinit_itable console=ttyS0 loglevel=5 panic=-1 \
     mitigations=off init=/usr/sbin/testbed-door";

/// QEMU's own way to write a comma inside a value.
fn escaped(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}

fn uri(state: &Path) -> String {
    format!("file:{}", state.to_string_lossy())
}

fn inherited(socket: UnixStream) -> Result<OwnedFd, MachineError> {
    let fd = OwnedFd::from(socket);
    fcntl_setfd(&fd, FdFlags::empty()).map_err(|errno| MachineError::Start(errno.into()))?;
    Ok(fd)
}

fn died(what: &str, scratch: &Path) -> MachineError {
    let mut words = Vec::new();
    for log in ["qemu.log", "console.log"] {
        // A log that is not there has nothing to add.
        let bytes = std::fs::read(scratch.join(log)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        let skipped = lines.len().saturating_sub(CONSOLE_TAIL_MAX_LINES);
        words.extend(
            lines
                .iter()
                .skip(skipped)
                .map(|line| format!("    {}", command::printable(line))),
        );
    }
    MachineError::Died {
        what: what.to_owned(),
        words: words.join("\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> Files {
        Files {
            emulator: Emulator::at("/e".into()),
            kernel: "/c/vmlinuz".into(),
            initrd: "/c/initrd".into(),
            root: "/c/a,b.img".into(),
            memory: "/c/memory".into(),
            programs: "/s/programs.img".into(),
        }
    }

    fn line(mode: Mode, start: Start) -> String {
        let fds = ["3".to_owned(), "4".to_owned()];
        arguments(mode, start, &files(), Path::new("/s/console"), &fds).join(" ")
    }

    #[test]
    fn a_resumed_machine_writes_to_nothing_that_is_kept() {
        let line = line(Mode::Plain, Start::Resume);
        assert!(
            line.contains("mem-path=/c/memory,share=off,readonly=on"),
            "{line}"
        );
        assert!(
            line.contains(
                "file=/c/a,,b.img,format=raw,if=none,id=root,cache=unsafe,discard=unmap,snapshot=on"
            ),
            "{line}"
        );
        assert!(line.contains("id=programs,readonly=on"), "{line}");
    }

    #[test]
    fn booted_and_resumed_machines_have_the_same_devices() {
        let devices = |start| -> Vec<String> {
            let all = line(Mode::Plain, start);
            all.split(" -device ")
                .skip(1)
                .map(|part| part.split(' ').next().unwrap_or_default().to_owned())
                .collect()
        };
        assert_eq!(devices(Start::Boot), devices(Start::Resume));
        assert_eq!(devices(Start::Boot).len(), 5);
    }

    #[test]
    fn only_the_metered_machine_counts_instructions() {
        for (mode, counts) in [(Mode::Plain, false), (Mode::Metered, true)] {
            let line = line(mode, Start::Boot);
            assert!(line.contains("-smp 1 -accel tcg,thread=single"), "{line}");
            assert_eq!(line.contains("-icount shift=0,sleep=off"), counts, "{line}");
        }
    }
}
