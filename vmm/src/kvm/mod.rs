//! KVM: every ioctl of the VMM is in here.
//!
//! Order matters. A memory slot that is registered after anything sits on a KVM I/O bus waits for an SRCU
//! grace period, some 7 ms; so [`vm::Vm::new`] takes all memory before it makes the interrupt controllers, and
//! ioeventfds come last.

pub mod irq;
pub mod vcpu;
pub mod vm;

use kvm_ioctls::{Cap, Kvm};
use rustix::io::Errno;

/// The KVM API that has been the only one since 2007.
const API_VERSION: i32 = 12;

/// What the VMM cannot do without, with the names of the KVM documentation.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Why KVM cannot be used or refused something.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No `/dev/kvm`.
    #[error(
        "/dev/kvm does not exist: load the kvm_intel or kvm_amd module, or enable virtualization"
    )]
    Absent,
    /// No permission.
    #[error("/dev/kvm may not be opened: run as root or give the user access to it")]
    Denied,
    /// Any other failure to open.
    #[error("cannot open /dev/kvm")]
    Open(#[source] Errno),
    /// Something else is at `/dev/kvm`.
    #[error("/dev/kvm speaks API version {0}, expected {API_VERSION}")]
    Version(i32),
    /// An old or exotic KVM.
    #[error("this KVM lacks {0}; a host kernel of 5.10 or newer is needed")]
    Lacks(&'static str),
    /// Fewer vCPUs than asked for.
    #[error("this KVM runs at most {max} vCPUs, the VM asks for {asked}")]
    TooManyCpus {
        /// `KVM_CAP_MAX_VCPUS`.
        max: usize,
        /// Configured.
        asked: u8,
    },
    /// An ioctl failed.
    #[error("{what} failed")]
    Ioctl {
        /// Which.
        what: &'static str,
        /// How.
        #[source]
        cause: Errno,
    },
    /// A list of CPUID leaves that KVM's own list type cannot hold; a defect.
    #[error("too many CPUID leaves or MSRs")]
    List,
}

/// An ioctl's failure with its name.
pub(crate) fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> KvmError {
    move |cause| KvmError::Ioctl {
        what,
        cause: Errno::from_raw_os_error(cause.errno()),
    }
}

/// Opens KVM and checks that it has what the VMM needs.
///
/// # Errors
/// It is absent, not permitted, or lacks something.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|cause| match cause.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Absent,
        libc::EACCES | libc::EPERM => KvmError::Denied,
        errno => KvmError::Open(Errno::from_raw_os_error(errno)),
    })?;
    match kvm.get_api_version() {
        API_VERSION => {}
        version => return Err(KvmError::Version(version)),
    }
    match NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(KvmError::Lacks(name)),
        None => Ok(kvm),
    }
}
