//! The guest kernel's command line: what this machine needs, then what the configuration adds.

use super::error::BootError;
use std::ffi::CString;

/// Parameters that every guest gets, each with its reason. Linux compares each word with the name of each of its parameters, and once more
/// before each of eight levels of initialisation (do_initcall_level): a tenth of a millisecond for a word. So there is none for what
/// Linux does by itself: reset by the keyboard controller where there is no ACPI, PCI configuration by ports where there is no table
/// of it, no check of the timer in a KVM guest, a seed from RDRAND.
const ALWAYS: &[&str] = &[
    // Reset at once after a panic: the VMM sees both.
    "panic=-1",
    // kvm-clock says what the TSC does; no watchdog has to find out.
    "tsc=reliable",
    // There is none in the MP table (`arch/mptable.rs`), but only these words make Linux take the 8259's interrupts by LINT0, which is
    // how the serial port's come (setup_local_APIC).
    "noapic",
    // Our vCPUs start in x2APIC mode (`arch/msr.rs`), in which Linux would address groups of CPUs by numbers that no MSI has room for,
    // unless there is a remapper or it is told.
    "x2apic_phys",
    // A guest of one CPU would take the lock prefixes out of its kernel at boot, 9,000 of them through a mapping of its own each
    // (alternatives_smp_unlock), and put them back for the second CPU: 5 of the 53 M instructions of a boot.
    "noreplace-smp",
    // What this machine has not is not looked for.
    "i8042.noaux",
    "i8042.nomux",
    "i8042.nopnp",
    "i8042.dumbkbd",
    // The crypto self-tests are for kernels whose build nobody tested.
    "cryptomgr.notests",
    // Drivers that are built in would put tunl0, dummy0 and ifb0 next to a pod's eth0.
    "fb_tunnels=none",
    "dummy.numdummies=0",
    "ifb.numifbs=0",
    // Waiting for a grace period is most of what a boot waits for.
    "rcupdate.rcu_expedited=1",
];

/// Where memory can be plugged: it is used at once, most of it for what can be moved, so that it can be taken away again; but not so much that
/// none is left for what cannot.
const PLUGGABLE: &[&str] = &[
    "memhp_default_state=online",
    "memory_hotplug.online_policy=auto-movable",
];

/// Where there is memory above 4 GiB: devices reach it, no 64 MiB are kept below for copies.
const HIGH: &[&str] = &["swiotlb=noforce"];

/// Without a serial port: nothing is printed until a panic, which goes to the VMM's ring by the simplest
/// driver there is. The level comes first: the kernel takes these words in their order (parse_early_param),
/// and a console that is registered before it prints the first 1 KiB of the log, which is 2,200 exits.
const SILENT: &[&str] = &["loglevel=1", "earlycon=uart8250,io,0x3f8", "keep_bootcon"];

/// With a serial port that somebody reads: a console on it.
const CONSOLE: &[&str] = &["console=ttyS0", "8250.nr_uarts=1"];

/// What the command line depends on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Line<'a> {
    /// Whether somebody reads the serial port.
    pub serial: bool,
    /// Whether memory may be plugged while the guest runs.
    pub pluggable: bool,
    /// Whether there is memory above 4 GiB when the guest starts.
    pub high: bool,
    /// How many CPUs come up at boot, where the machine has more.
    pub maxcpus: Option<u8>,
    /// Kernel parameters of the configuration: they come last and so have the last word.
    pub extra: &'a str,
}

/// Puts the command line together; `max_bytes` counts the NUL.
///
/// # Errors
/// It is too long for the kernel.
pub(super) fn assemble(line: &Line<'_>, max_bytes: usize) -> Result<CString, BootError> {
    let when = |given: bool, words: &'static [&'static str]| if given { words } else { &[] };
    let console = if line.serial { CONSOLE } else { SILENT };
    let maxcpus = line.maxcpus.map(|cpus| format!("maxcpus={cpus}"));
    let mut words: Vec<&str> = [
        ALWAYS,
        when(line.high, HIGH),
        when(line.pluggable, PLUGGABLE),
        console,
    ]
    .concat();
    words.extend(maxcpus.as_deref());
    if !line.extra.is_empty() {
        words.push(line.extra);
    }
    let line = words.join(" ");
    let bytes = line.len() + 1;
    if bytes > max_bytes {
        return Err(BootError::Cmdline {
            bytes,
            max: max_bytes,
        });
    }
    // The configuration's parser refused control characters, NUL among them.
    CString::new(line).map_err(|_| BootError::Cmdline {
        bytes,
        max: max_bytes,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout;
    use capsid_protocol::machine::CMDLINE_MAX_BYTES;

    const MAX: usize = layout::CMDLINE_BYTES as usize;

    fn words(line: &Line<'_>) -> Vec<String> {
        let line = assemble(line, MAX).unwrap();
        let words = line.to_str().unwrap().split(' ');
        words.map(str::to_owned).collect()
    }

    #[test]
    fn what_the_configuration_adds_comes_last() {
        let line = words(&Line {
            maxcpus: Some(3),
            extra: "init=/x loglevel=7",
            ..Line::default()
        });
        assert!(line.ends_with(&["maxcpus=3", "init=/x", "loglevel=7"].map(str::to_owned)));
    }

    #[test]
    fn each_word_is_there_only_where_it_is_needed() {
        let (none, all) = (
            Line::default(),
            Line {
                serial: true,
                pluggable: true,
                high: true,
                maxcpus: Some(3),
                extra: "",
            },
        );
        let (none, all) = (words(&none), words(&all));
        for word in [
            "console=ttyS0",
            "memhp_default_state=online",
            "swiotlb=noforce",
            "maxcpus=3",
        ] {
            assert!(all.iter().any(|other| other == word), "{word}");
            assert!(!none.iter().any(|other| other == word), "{word}");
        }
    }

    #[test]
    fn the_log_is_silenced_before_the_early_console_is_there_to_print_it() {
        let line = words(&Line::default());
        let place = |start| line.iter().position(|word| word.starts_with(start));
        assert!(place("loglevel=1").unwrap() < place("earlycon=").unwrap());
    }

    #[test]
    fn the_longest_extra_line_of_a_configuration_always_fits() {
        let extra = "x".repeat(CMDLINE_MAX_BYTES);
        for serial in [false, true] {
            words(&Line {
                serial,
                pluggable: true,
                high: true,
                maxcpus: Some(32),
                extra: &extra,
            });
        }
    }

    #[test]
    fn a_line_too_long_for_the_kernel_is_refused_with_both_lengths() {
        let error = assemble(&Line::default(), 16).unwrap_err().to_string();
        assert!(error.contains("at most 16 fit"), "{error}");
    }
}
