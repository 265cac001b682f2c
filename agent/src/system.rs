//! What the agent asks of its kernel, and sets, for the whole guest.

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use std::io;

/// Longest hostname in bytes (HOST_NAME_MAX).
const HOSTNAME_MAX_BYTES: usize = 64;

/// Why the guest does not take what the host says of it.
#[derive(Debug, thiserror::Error)]
pub enum SystemError {
    /// The name.
    #[error("hostname: 1 to {HOSTNAME_MAX_BYTES} of A-Z a-z 0-9 - . are taken")]
    BadHostname,
    /// The name.
    #[error("setting the hostname")]
    Hostname(#[source] io::Error),
    /// The clock.
    #[error("setting the clock to {ns} ns")]
    Clock {
        /// Since 1970.
        ns: u64,
        /// errno.
        #[source]
        cause: io::Error,
    },
}

/// CLOCK_BOOTTIME in ns.
pub fn boottime_ns() -> u64 {
    let now = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(nanos)
}

/// Sets the hostname; empty leaves it.
///
/// # Errors
/// Not a hostname.
pub fn set_hostname(name: &str) -> Result<(), SystemError> {
    if name.is_empty() {
        return Ok(());
    }
    if !is_hostname(name) {
        return Err(SystemError::BadHostname);
    }
    rustix::system::sethostname(name.as_bytes()).map_err(|e| SystemError::Hostname(e.into()))
}

fn is_hostname(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
    name.len() <= HOSTNAME_MAX_BYTES && name.bytes().all(plain)
}

/// Steps CLOCK_REALTIME to the host's; 0 leaves it.
///
/// # Errors
/// A time that the kernel does not take.
pub fn set_realtime(ns: u64) -> Result<(), SystemError> {
    if ns == 0 {
        return Ok(());
    }
    let time = Timespec {
        tv_sec: i64::try_from(ns / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(ns % 1_000_000_000).unwrap_or(0),
    };
    clock_settime(ClockId::Realtime, time).map_err(|cause| SystemError::Clock {
        ns,
        cause: cause.into(),
    })
}

/// uname -r.
pub fn kernel_release() -> String {
    let name = rustix::system::uname();
    name.release().to_string_lossy().into_owned()
}

/// CPUs that are online; 0 if the kernel does not say.
pub fn online_cpus() -> u32 {
    let online = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN);
    let online = online.ok().flatten();
    online.and_then(|n| u32::try_from(n).ok()).unwrap_or(0)
}

/// MemTotal.
pub fn memory_total_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_name_is_a_hostname() {
        assert!(is_hostname("web-0.pods.local"));
    }

    #[test]
    fn a_hostname_of_65_bytes_is_refused() {
        assert!(!is_hostname(&"a".repeat(65)));
    }

    #[test]
    fn a_hostname_with_a_slash_is_refused() {
        assert!(!is_hostname("a/b"));
    }

    #[test]
    fn zero_leaves_the_clock() {
        assert!(set_realtime(0).is_ok());
    }
}
