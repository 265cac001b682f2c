//! How a VMM ends: one exit code for each reason, so that the owner never has to read a text to know.
//!
//! The VMM prints one line that says why on stderr, followed by the last lines of the guest's
//! console where they help, and then exits with [`VmmExit::code`]. A VMM that was killed by a signal
//! has no such code: the owner reads the signal from `waitpid` and takes it for what it is.

/// Why a VMM process ended. The codes are part of the interface and do not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum VmmExit {
    /// The guest powered itself off, and the VMM had not been told to stop.
    PowerOff = 0,
    /// A thread of the VMM panicked; a defect of Capsid.
    Internal = 70,
    /// The configuration on the inherited fd was refused.
    BadConfig = 78,
    /// The guest asked for a reset (i8042 command 0xFE, `reboot(2)`), which a pod's VM does not do.
    Reset = 80,
    /// The guest's kernel reported a panic.
    GuestPanic = 81,
    /// A vCPU shut down on a triple fault.
    TripleFault = 82,
    /// `KVM_RUN` returned `KVM_EXIT_INTERNAL_ERROR`, `KVM_EXIT_FAIL_ENTRY` or failed.
    KvmError = 83,
    /// A vCPU thread ended although nobody had asked it to.
    VcpuLost = 84,
    /// The VMM was told to stop (SIGTERM) and asked the guest, which powered off or was ended when its grace was over.
    Stopped = 85,
    /// The kernel or the initramfs was refused.
    BadKernel = 86,
    /// KVM is absent, not permitted or lacks what Capsid needs.
    KvmUnavailable = 87,
    /// The guest's memory could not be set up.
    Memory = 88,
    /// A device could not be set up.
    Device = 89,
    /// A part of the jail could not be set up, so the VM did not start.
    Jail = 90,
    /// The owner's end of the owner channel was closed: nobody is left to run this VM for.
    OwnerGone = 91,
}

impl VmmExit {
    /// Every way to end, for tables and tests.
    pub const ALL: [VmmExit; 15] = [
        VmmExit::PowerOff,
        VmmExit::Internal,
        VmmExit::BadConfig,
        VmmExit::Reset,
        VmmExit::GuestPanic,
        VmmExit::TripleFault,
        VmmExit::KvmError,
        VmmExit::VcpuLost,
        VmmExit::Stopped,
        VmmExit::BadKernel,
        VmmExit::KvmUnavailable,
        VmmExit::Memory,
        VmmExit::Device,
        VmmExit::Jail,
        VmmExit::OwnerGone,
    ];

    /// The process exit code.
    pub fn code(self) -> u8 {
        self as u8
    }

    /// The reason behind an exit code, if it is one of ours.
    pub fn from_code(code: i32) -> Option<VmmExit> {
        VmmExit::ALL
            .into_iter()
            .find(|exit| i32::from(exit.code()) == code)
    }

    /// A few words for the person who reads the error.
    pub fn describe(self) -> &'static str {
        match self {
            VmmExit::PowerOff => "the guest powered off",
            VmmExit::Internal => "the VMM failed by a defect of its own",
            VmmExit::BadConfig => "the VMM refused its configuration",
            VmmExit::Reset => "the guest asked for a reset",
            VmmExit::GuestPanic => "the guest kernel panicked",
            VmmExit::TripleFault => "the guest ended in a triple fault",
            VmmExit::KvmError => "KVM could not run the guest",
            VmmExit::VcpuLost => "a vCPU thread was lost",
            VmmExit::Stopped => "the VM was stopped",
            VmmExit::BadKernel => "the guest kernel or initramfs was refused",
            VmmExit::KvmUnavailable => "KVM is not usable",
            VmmExit::Memory => "the guest's memory could not be set up",
            VmmExit::Device => "a device could not be set up",
            VmmExit::Jail => "the VMM's jail could not be set up",
            VmmExit::OwnerGone => "the owner of the VM is gone",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::VmmExit;
    use std::collections::HashSet;

    #[test]
    fn every_reason_has_a_code_of_its_own_that_reads_back() {
        let codes: HashSet<u8> = VmmExit::ALL.iter().map(|exit| exit.code()).collect();
        assert_eq!(codes.len(), VmmExit::ALL.len());
        for exit in VmmExit::ALL {
            assert_eq!(VmmExit::from_code(i32::from(exit.code())), Some(exit));
        }
    }

    #[test]
    fn only_power_off_is_success() {
        for exit in VmmExit::ALL {
            assert_eq!(exit.code() == 0, exit == VmmExit::PowerOff);
        }
    }

    #[test]
    fn a_code_of_nobody_is_none() {
        assert_eq!(VmmExit::from_code(1), None);
        assert_eq!(VmmExit::from_code(-1), None);
        assert_eq!(VmmExit::from_code(256), None);
    }
}
