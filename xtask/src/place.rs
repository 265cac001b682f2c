//! Where microVMs can run: on this host, when its KVM has hardware behind it, else in the testbed.

use std::path::Path;

/// Where to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Place {
    /// Right here.
    Host,
    /// In the emulated host.
    Testbed,
}

/// The processor's flags for hardware virtualization.
const HARDWARE_FLAGS: [&str; 2] = ["vmx", "svm"];
/// KVM's modules for them, as /sys/module has them, built in or loaded.
const HARDWARE_MODULES: [&str; 2] = ["kvm_intel", "kvm_amd"];

/// What the choice rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kvm {
    /// There is a /dev/kvm.
    pub device: bool,
    /// The processor has VT-x or AMD-V.
    pub flag: bool,
    /// The module that uses it is there.
    pub module: bool,
}

impl Kvm {
    /// Looks at this machine.
    pub fn look() -> Self {
        // A machine without the file has no such processor.
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        Self {
            device: Path::new("/dev/kvm").exists(),
            flag: has_flag(&cpuinfo),
            module: HARDWARE_MODULES
                .iter()
                .any(|name| Path::new("/sys/module").join(name).exists()),
        }
    }

    /// The place to run, and one line saying why.
    pub fn choose(self) -> (Place, &'static str) {
        match self {
            Self {
                device: true,
                flag: true,
                module: true,
            } => (
                Place::Host,
                "/dev/kvm has hardware behind it: running right on this host",
            ),
            Self { device: false, .. } => (
                Place::Testbed,
                "there is no /dev/kvm: running inside the testbed, an emulated host",
            ),
            Self { device: true, .. } => (
                Place::Testbed,
                "/dev/kvm has no hardware behind it: running inside the testbed, an emulated host",
            ),
        }
    }
}

fn has_flag(cpuinfo: &str) -> bool {
    let flags = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("flags"))
        .unwrap_or_default();
    flags
        .split_whitespace()
        .any(|flag| HARDWARE_FLAGS.contains(&flag))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_flag_counts() {
        assert!(has_flag("processor : 0\nflags\t\t: fpu svm sse\n"));
        assert!(!has_flag("flags : fpu svm_lock\nmodel name : vmx\n"));
        assert!(!has_flag(""));
    }

    #[test]
    fn a_kvm_without_hardware_means_the_testbed() {
        let hardware = Kvm {
            device: true,
            flag: true,
            module: true,
        };
        assert_eq!(hardware.choose().0, Place::Host);
        assert_eq!(
            Kvm {
                flag: false,
                ..hardware
            }
            .choose()
            .0,
            Place::Testbed
        );
        assert_eq!(
            Kvm {
                module: false,
                ..hardware
            }
            .choose()
            .0,
            Place::Testbed
        );
        assert_eq!(
            Kvm {
                device: false,
                ..hardware
            }
            .choose()
            .0,
            Place::Testbed
        );
    }
}
