//! What a person wants to know of this machine beside what a VM needs of it ([`capsid_owner::host`]). Read, not changed.

use std::fs;

/// What can be done where KVM is software.
pub(crate) const WITH_SOFTWARE_KVM: &str =
    "run in the testbed (cargo xtask run --on testbed), or insist with --allow-software-kvm";

/// The kernel's release.
pub(crate) fn kernel_release() -> String {
    rustix::system::uname()
        .release()
        .to_string_lossy()
        .into_owned()
}

/// The tightest memory limit of our own cgroups (v2) in bytes, if there is one.
pub(crate) fn cgroup_memory_limit() -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::"))?;
    let mut directory =
        std::path::PathBuf::from("/sys/fs/cgroup").join(path.trim_start_matches('/'));
    let mut limit = None;
    while directory.starts_with("/sys/fs/cgroup") {
        if let Ok(text) = fs::read_to_string(directory.join("memory.max")) {
            let own: Option<u64> = text.trim().parse().ok();
            limit = own.into_iter().chain(limit).min();
        }
        if !directory.pop() {
            break;
        }
    }
    limit
}

/// Which cgroup hierarchy is mounted.
pub(crate) fn cgroups() -> &'static str {
    if fs::exists("/sys/fs/cgroup/cgroup.controllers").unwrap_or(false) {
        "v2"
    } else if fs::exists("/sys/fs/cgroup/memory").unwrap_or(false) {
        "v1"
    } else {
        "none"
    }
}
