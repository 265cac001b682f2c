//! The systems that are compared, and the command line of each.

use capsid_protocol::machine::Cpus;
use serde_json::{Value, json};
use std::io;
use std::path::{Path, PathBuf};

/// Guest memory of every VMM, in MiB.
pub const MEMORY_MIB: u64 = 128;
/// What every VMM's guest gets besides what the VMM adds itself: a serial port on which the kernel says nothing, so that the
/// first byte is the init's; reset at once.
pub const CMDLINE: &str = "reboot=k panic=-1 loglevel=0 8250.nr_uarts=1";

/// What QEMU is told whatever its machine.
pub const QEMU_OPTIONS: [&str; 11] = [
    "-enable-kvm",
    "-cpu",
    "host",
    "-smp",
    "1",
    "-nodefaults",
    "-no-user-config",
    "-nographic",
    "-no-reboot",
    "-serial",
    "stdio",
];

/// What a run needs.
#[derive(Clone, Debug)]
pub struct Files {
    /// ELF kernel that every VMM boots.
    pub kernel: PathBuf,
    /// Initramfs whose /init is `tiny-init`.
    pub tiny: PathBuf,
    /// Our shipped initramfs.
    pub initramfs: PathBuf,
    /// An OCI bundle that runs `echo`.
    pub bundle: PathBuf,
    /// A directory for what a system wants on disk.
    pub scratch: PathBuf,
    /// CPUs that a guest of `capsid-vmm` has, of which one comes up.
    pub cpus_max: Cpus,
}

/// One system under test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum System {
    /// `capsid-vmm` with the tiny init.
    Capsid,
    /// `capsid-vmm` with the shipped initramfs: its first sign is the agent's dial.
    CapsidOwn,
    /// QEMU's microvm machine.
    QemuMicrovm,
    /// Firecracker, at a path given by the caller.
    Firecracker(PathBuf),
    /// An OCI runtime that is on PATH, running `echo`.
    Runtime(&'static str),
}

impl System {
    /// Its name in the results.
    pub fn name(&self) -> &str {
        match self {
            System::Capsid | System::CapsidOwn => "capsid-vmm",
            System::QemuMicrovm => "qemu-microvm",
            System::Firecracker(_) => "firecracker",
            System::Runtime(name) => name,
        }
    }

    /// Which kernel it boots: `same` for all VMMs alike, `own` as we ship it.
    pub fn kernel(&self) -> &'static str {
        match self {
            System::CapsidOwn => "own",
            System::Runtime(_) => "none",
            _ => "same",
        }
    }

    /// Program and arguments of a system that is a plain command; None for `capsid-vmm`.
    ///
    /// # Errors
    /// A file it wants cannot be written.
    pub fn command(&self, files: &Files) -> io::Result<Option<Vec<String>>> {
        let words = match self {
            System::Capsid | System::CapsidOwn => return Ok(None),
            System::QemuMicrovm => qemu(files),
            System::Firecracker(path) => firecracker(path, files)?,
            System::Runtime(name) => vec![
                (*name).to_owned(),
                "run".to_owned(),
                "--bundle".to_owned(),
                text(&files.bundle),
                "capsid-bench".to_owned(),
            ],
        };
        Ok(Some(words))
    }
}

/// [`CMDLINE`] for a machine without the keyboard controller that resets the others.
fn cmdline_of_microvm() -> String {
    CMDLINE.replace("reboot=k", "reboot=t")
}

fn qemu(files: &Files) -> Vec<String> {
    let cmdline = cmdline_of_microvm();
    let memory = format!("{MEMORY_MIB}M");
    let (kernel, tiny) = (text(&files.kernel), text(&files.tiny));
    // Options as QEMU's own documentation of microvm recommends for the fastest boot.
    [
        "qemu-system-x86_64",
        "-M",
        "microvm,x-option-roms=off,pit=off,pic=off,isa-serial=on,rtc=off,acpi=off",
        "-m",
        &memory,
        "-kernel",
        &kernel,
        "-initrd",
        &tiny,
        "-append",
        &cmdline,
    ]
    .into_iter()
    .chain(QEMU_OPTIONS)
    .map(str::to_owned)
    .collect()
}

fn firecracker(path: &Path, files: &Files) -> io::Result<Vec<String>> {
    let config = files.scratch.join("firecracker.json");
    std::fs::write(&config, firecracker_config(files).to_string())?;
    Ok(vec![
        text(path),
        "--no-api".to_owned(),
        "--config-file".to_owned(),
        text(&config),
    ])
}

fn firecracker_config(files: &Files) -> Value {
    json!({
        "boot-source": {
            "kernel_image_path": text(&files.kernel),
            "initrd_path": text(&files.tiny),
            "boot_args": CMDLINE,
        },
        "drives": [],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB},
    })
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
