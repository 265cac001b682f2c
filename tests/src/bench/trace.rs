//! Exits to userspace, counted by the host kernel's own tracepoint, so that every VMM is counted alike. Done in a
//! run of its own: tracing costs instructions.

use super::launch;
use super::systems::{Files, System};
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

const TRACEFS: &str = "/sys/kernel/tracing";

/// Runs `system` once and counts `kvm_userspace_exit` by reason (`KVM_EXIT_` left out, lower case).
///
/// # Errors
/// Tracing is not available or the run fails.
pub fn userspace_exits(system: &System, files: &Files) -> io::Result<BTreeMap<String, u64>> {
    let file = |name: &str| Path::new(TRACEFS).join(name);
    if !file("trace").exists() {
        nix::mount::mount(
            Some("tracefs"),
            TRACEFS,
            Some("tracefs"),
            nix::mount::MsFlags::empty(),
            None::<&str>,
        )?;
    }
    let enable = file("events/kvm/kvm_userspace_exit/enable");
    fs::write(file("buffer_size_kb"), "16384")?;
    fs::write(file("trace"), "")?;
    fs::write(&enable, "1")?;
    let run = launch::sample(system, files);
    fs::write(&enable, "0")?;
    run?;
    Ok(count(&fs::read_to_string(file("trace"))?))
}

/// Counts the reasons in a trace: lines end in `kvm_userspace_exit: reason KVM_EXIT_IO (2)`.
fn count(trace: &str) -> BTreeMap<String, u64> {
    let mut exits = BTreeMap::new();
    for line in trace.lines() {
        let Some((_, event)) = line.split_once("kvm_userspace_exit: reason ") else {
            continue;
        };
        let reason = event.split([' ', '(']).next().unwrap_or(event);
        let reason = reason.trim_start_matches("KVM_EXIT_").to_lowercase();
        *exits.entry(reason).or_default() += 1;
    }
    exits
}

#[cfg(test)]
mod tests {
    use super::count;

    #[test]
    fn reasons_are_counted_and_other_lines_are_not() {
        let trace = "# tracer: nop\n\
             vmm-1 [000] ..... 1.0: kvm_userspace_exit: reason KVM_EXIT_IO (2)\n\
             vmm-1 [000] ..... 1.1: kvm_userspace_exit: reason KVM_EXIT_IO (2)\n\
             vmm-1 [000] ..... 1.2: kvm_userspace_exit: reason restart (4)\n\
             vmm-1 [000] ..... 1.3: kvm_entry: vcpu 0\n";
        let exits = count(trace);
        assert_eq!(exits.get("io"), Some(&2));
        assert_eq!(exits.get("restart"), Some(&1));
        assert_eq!(exits.len(), 2);
    }
}
