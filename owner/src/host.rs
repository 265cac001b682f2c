//! What this machine is to a VM: its KVM and its memory. Everything here is read, nothing is changed, and nothing waits: whether
//! KVM is software is told by the CPU's flags and not by trying.

use kvm_ioctls::{Cap, Kvm};
use std::fs;
use std::io;

/// The API version that has not changed since Linux 2.6.22 (kernel, `virt/kvm/api.rst`).
const KVM_API_VERSION: i32 = 12;
/// The device.
pub const KVM_DEVICE: &str = "/dev/kvm";

/// What is behind /dev/kvm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KvmKind {
    /// VT-x (`vmx`) or AMD-V (`svm`).
    Hardware(&'static str),
    /// Neither: every instruction of a guest's kernel is emulated. The names of the kernel modules that serve it.
    Software(Vec<String>),
}

/// Why KVM cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No device.
    #[error(
        "{KVM_DEVICE} does not exist: enable virtualization in the firmware, load kvm_intel or kvm_amd, or give this machine nested virtualization"
    )]
    Absent,
    /// No permission.
    #[error(
        "{KVM_DEVICE} may not be opened: run as root or as a member of the group that owns it; a container must be given the device"
    )]
    Forbidden(#[source] io::Error),
    /// Another error.
    #[error("{KVM_DEVICE} cannot be opened")]
    Open(#[source] io::Error),
    /// Not KVM, or from the future.
    #[error("{KVM_DEVICE} has API version {0}, expected {KVM_API_VERSION}")]
    Version(i32),
    /// Something that we need is missing.
    #[error("the kernel's KVM lacks {0}; Linux 5.10 or newer has it")]
    Lacks(&'static str),
    /// Not usable for Linux guests.
    #[error(
        "KVM on this machine is software ({modules}; the CPU shows neither vmx nor svm): a Linux guest would take hours to boot. Use a machine with hardware virtualization, {otherwise}"
    )]
    Software {
        /// The modules.
        modules: String,
        /// What else can be done, for who is told this.
        otherwise: &'static str,
    },
}

/// Opens KVM and looks at what it can do.
///
/// # Errors
/// It is absent, forbidden or too old.
pub fn kvm() -> Result<KvmKind, KvmError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => KvmError::Absent,
        libc::EACCES | libc::EPERM => KvmError::Forbidden(error.into()),
        _ => KvmError::Open(error.into()),
    })?;
    match kvm.get_api_version() {
        KVM_API_VERSION => {}
        version => return Err(KvmError::Version(version)),
    }
    for (cap, name) in [
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
        (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    ] {
        if !kvm.check_extension(cap) {
            return Err(KvmError::Lacks(name));
        }
    }
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    Ok(kind(&cpuinfo, modules()))
}

/// As [`kvm`], and refuses software unless it is allowed. `otherwise` says how.
///
/// # Errors
/// As [`kvm`].
pub fn usable_kvm(allow_software: bool, otherwise: &'static str) -> Result<KvmKind, KvmError> {
    match kvm()? {
        KvmKind::Software(modules) if !allow_software => Err(KvmError::Software {
            modules: modules.join(", "),
            otherwise,
        }),
        kind => Ok(kind),
    }
}

fn kind(cpuinfo: &str, modules: Vec<String>) -> KvmKind {
    let has = |flag: &str| {
        cpuinfo
            .lines()
            .filter(|line| line.starts_with("flags"))
            .any(|line| line.split_whitespace().any(|word| word == flag))
    };
    if has("vmx") {
        KvmKind::Hardware("VT-x")
    } else if has("svm") {
        KvmKind::Hardware("AMD-V")
    } else {
        KvmKind::Software(modules)
    }
}

/// The kernel modules, built in or not, whose names begin with kvm.
fn modules() -> Vec<String> {
    let entries = fs::read_dir("/sys/module").into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("kvm"))
        .collect();
    names.sort();
    names
}

/// Total and available memory in bytes.
pub fn memory() -> (u64, u64) {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    (
        field(&meminfo, "MemTotal:"),
        field(&meminfo, "MemAvailable:"),
    )
}

fn field(meminfo: &str, name: &str) -> u64 {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.unwrap_or(0).saturating_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vmx_and_svm_are_hardware_and_their_absence_is_software() {
        let flags = |flag| format!("processor\t: 0\nflags\t\t: fpu {flag} sse\n");
        let none = Vec::new;
        assert_eq!(kind(&flags("vmx"), none()), KvmKind::Hardware("VT-x"));
        assert_eq!(kind(&flags("svm"), none()), KvmKind::Hardware("AMD-V"));
        let modules = vec!["kvm".to_owned(), "kvm_pvm".to_owned()];
        let software = kind(&flags("svm_lock"), modules.clone());
        assert_eq!(software, KvmKind::Software(modules));
    }

    #[test]
    fn software_is_refused_with_what_else_can_be_done() {
        let error = KvmError::Software {
            modules: "kvm_pvm".to_owned(),
            otherwise: "or wait",
        };
        let said = error.to_string();
        assert!(said.contains("is software (kvm_pvm;"), "{said}");
        assert!(
            said.ends_with("Use a machine with hardware virtualization, or wait"),
            "{said}"
        );
    }

    #[test]
    fn a_meminfo_without_the_field_is_zero() {
        assert_eq!(field("MemTotal:  2048 kB\n", "MemTotal:"), 2 << 20);
        assert_eq!(field("MemTotal: many kB\n", "MemTotal:"), 0);
        assert_eq!(field("", "MemTotal:"), 0);
    }
}
