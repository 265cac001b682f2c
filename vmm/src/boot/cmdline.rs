//! The guest kernel's command line: what this machine needs, then what the configuration adds.

use super::error::BootError;
use std::ffi::CString;

/// Parameters that every guest gets, each with its reason.
const ALWAYS: &[&str] = &[
    // Reset by the keyboard controller, at once, after a panic: the VMM sees both.
    "reboot=k",
    "panic=-1",
    // kvm-clock says what the TSC does; no watchdog has to find out.
    "tsc=reliable",
    "no_timer_check",
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
    "pci=conf1,lastbus=0",
    "swiotlb=noforce",
    // The crypto self-tests are for kernels whose build nobody tested.
    "cryptomgr.notests",
    // Seed from RDRAND until virtio-rng is there; the host sees all memory anyway.
    "random.trust_cpu=1",
    // Drivers that are built in would put tunl0, dummy0 and ifb0 next to a pod's eth0.
    "fb_tunnels=none",
    "dummy.numdummies=0",
    "ifb.numifbs=0",
    // Memory that the VMM adds is used at once, most of it for what can be moved, so that it can be taken away again; but not so much that
    // none is left for what cannot.
    "memhp_default_state=online",
    "memory_hotplug.online_policy=auto-movable",
    // Waiting for a grace period is most of what a boot waits for.
    "rcupdate.rcu_expedited=1",
];

/// Without a serial port: nothing is printed until a panic, which goes to the VMM's ring by the simplest
/// driver there is. The level comes first: the kernel takes these words in their order (parse_early_param),
/// and a console that is registered before it prints the first 1 KiB of the log, which is 2,200 exits.
const SILENT: &[&str] = &["loglevel=1", "earlycon=uart8250,io,0x3f8", "keep_bootcon"];

/// With a serial port that somebody reads: a console on it.
const CONSOLE: &[&str] = &["console=ttyS0", "8250.nr_uarts=1"];

/// Puts the command line together. `serial` says whether somebody reads the serial port, `maxcpus` how many of the
/// CPUs come up where not all do, `extra` comes last and so has the last word; `max_bytes` counts the NUL.
///
/// # Errors
/// It is too long for the kernel.
pub(super) fn assemble(
    serial: bool,
    maxcpus: Option<u8>,
    extra: &str,
    max_bytes: usize,
) -> Result<CString, BootError> {
    let console = if serial { CONSOLE } else { SILENT };
    let maxcpus = maxcpus.map(|cpus| format!("maxcpus={cpus}"));
    let mut words: Vec<&str> = ALWAYS.iter().chain(console).copied().collect();
    words.extend(maxcpus.as_deref());
    if !extra.is_empty() {
        words.push(extra);
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

    #[test]
    fn what_the_configuration_adds_comes_last() {
        let line = assemble(false, None, "init=/x loglevel=7", 2048).unwrap();
        assert!(line.to_str().unwrap().ends_with(" init=/x loglevel=7"));
    }

    #[test]
    fn a_console_is_named_only_when_somebody_reads_it() {
        let silent = assemble(false, None, "", 2048).unwrap();
        assert!(!silent.to_str().unwrap().contains("console=ttyS0"));
        let loud = assemble(true, None, "", 2048).unwrap();
        assert!(loud.to_str().unwrap().contains("console=ttyS0"));
    }

    #[test]
    fn the_log_is_silenced_before_the_early_console_is_there_to_print_it() {
        let line = assemble(false, None, "", 2048).unwrap();
        let line = line.to_str().unwrap();
        let level = line.find("loglevel=1").unwrap();
        assert!(level < line.find("earlycon=").unwrap());
    }

    #[test]
    fn the_number_of_cpus_is_told_only_where_some_wait() {
        let all = assemble(false, None, "", 2048).unwrap();
        assert!(!all.to_str().unwrap().contains("maxcpus"));
        let some = assemble(false, Some(3), "quiet", 2048).unwrap();
        assert!(some.to_str().unwrap().ends_with(" maxcpus=3 quiet"));
    }

    #[test]
    fn the_longest_extra_line_of_a_configuration_always_fits() {
        let extra = "x".repeat(CMDLINE_MAX_BYTES);
        for serial in [false, true] {
            assemble(serial, Some(32), &extra, layout::CMDLINE_BYTES as usize).unwrap();
        }
    }

    #[test]
    fn a_line_too_long_for_the_kernel_is_refused_with_both_lengths() {
        let error = assemble(false, None, "x", 16).unwrap_err().to_string();
        assert!(error.contains("at most 16 fit"), "{error}");
    }
}
