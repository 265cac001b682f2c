//! What the agent asks of its kernel, and sets, for the whole guest.

use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use std::io;
use std::path::PathBuf;

/// Longest hostname in bytes (HOST_NAME_MAX).
const HOSTNAME_MAX_BYTES: usize = 64;

/// Parameters below kernel. that an ipc namespace has (ipc/ipc_sysctl.c).
const IPC_SYSCTLS: [&str; 8] = [
    "msgmax",
    "msgmnb",
    "msgmni",
    "sem",
    "shmall",
    "shmmax",
    "shmmni",
    "shm_rmid_forced",
];

/// Why the guest does not take what the host says of it.
#[derive(Debug, thiserror::Error)]
pub enum SystemError {
    /// The name.
    #[error("hostname: 1 to {HOSTNAME_MAX_BYTES} of A-Z a-z 0-9 - . are taken")]
    BadHostname,
    /// The name.
    #[error("setting the hostname")]
    Hostname(#[source] io::Error),
    /// A kernel parameter that is none of the pod's.
    #[error("kernel parameter {0:?}: only those of the pod's network and ipc namespaces are set")]
    BadSysctl(String),
    /// A kernel parameter that the kernel does not take.
    #[error("setting the kernel parameter {name} to {value:?}")]
    Sysctl {
        /// Which.
        name: String,
        /// What.
        value: String,
        /// errno.
        #[source]
        cause: io::Error,
    },
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

/// Sets kernel parameters of the namespaces that are the agent's and the pod's.
///
/// # Errors
/// One of another namespace, or that the kernel does not take; those before it are set.
pub fn set_sysctls<'a>(
    sysctls: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> Result<(), SystemError> {
    for (name, value) in sysctls {
        let Some(path) = sysctl_path(name) else {
            let shown = name.chars().take(64).collect();
            return Err(SystemError::BadSysctl(shown));
        };
        std::fs::write(path, value).map_err(|cause| SystemError::Sysctl {
            name: name.clone(),
            value: value.chars().take(64).collect(),
            cause,
        })?;
    }
    Ok(())
}

/// The file of a parameter of the network or ipc namespace (sysctl(8): dots separate as slashes do).
fn sysctl_path(name: &str) -> Option<PathBuf> {
    let parts: Vec<&str> = name.split(['.', '/']).collect();
    let sound = parts.iter().all(|part| !part.is_empty());
    let of_pod = match parts.as_slice() {
        ["net", _, ..] | ["fs", "mqueue", _, ..] => true,
        ["kernel", parameter] => IPC_SYSCTLS.contains(parameter),
        _ => false,
    };
    (sound && of_pod).then(|| {
        parts
            .iter()
            .fold("/proc/sys".into(), |path: PathBuf, part| path.join(part))
    })
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
    fn only_parameters_of_the_pod_s_namespaces_have_a_file() {
        let path = sysctl_path("net.ipv4.ip_forward").expect("the pod's");
        assert_eq!(path, PathBuf::from("/proc/sys/net/ipv4/ip_forward"));
        assert!(sysctl_path("kernel.shmmax").is_some());
        for name in [
            "kernel.panic",
            "vm.swappiness",
            "net",
            "net..x",
            "net./etc",
            "kernel.sem/..",
            "fs.file-max",
        ] {
            assert_eq!(sysctl_path(name), None, "{name}");
        }
    }

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
