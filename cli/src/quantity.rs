//! Sizes and counts as a person writes them, checked against what a VM may have and what this host has.

use capsid_protocol::machine::{Cpus, MemoryMib};
use std::ops::RangeInclusive;
use std::time::Duration;

/// Bytes of a MiB.
const MIB_BYTES: u64 = 1 << 20;
/// How long a guest may be given until its agent can be reached, in seconds. An emulated host is some twenty times slower than a
/// real one.
const BOOT_TIMEOUTS_S: RangeInclusive<u64> = 1..=3600;

/// Why a number was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QuantityError {
    /// Not a size.
    #[error(
        "--memory {0:?} is not a size: expected a number with b, k, m, g or t, for instance 512m"
    )]
    MemorySyntax(String),
    /// Below what a guest needs or above what a VM can have.
    #[error("--memory {text}: a VM has {min} MiB to {max} MiB", min = MemoryMib::MIN, max = MemoryMib::MAX)]
    MemoryRange {
        /// As written.
        text: String,
    },
    /// More than the machine has.
    #[error("--memory {text}: this machine has {host_mib} MiB in all")]
    MemoryOfHost {
        /// As written.
        text: String,
        /// The host's memory in MiB.
        host_mib: u64,
    },
    /// Not a number of CPUs.
    #[error("--cpus {0:?}: a VM has 1 to {max} whole cpus", max = Cpus::MAX)]
    Cpus(String),
    /// Not a time that a guest may take.
    #[error(
        "--boot-timeout {0:?}: a guest may take {least} to {most} whole seconds",
        least = BOOT_TIMEOUTS_S.start(),
        most = BOOT_TIMEOUTS_S.end()
    )]
    BootTimeout(String),
}

/// A memory size as docker takes it: a number, maybe with a fraction, and a unit of powers of 1024 in either case
/// (`b`, `k`, `m`, `g`, `t`, also `kb` or `kib`); without a unit, bytes. Rounded up to whole MiB.
///
/// # Errors
/// Another text, less than a guest needs, more than the host's `host_bytes`.
pub(crate) fn memory(text: &str, host_bytes: u64) -> Result<MemoryMib, QuantityError> {
    let syntax = || QuantityError::MemorySyntax(text.chars().take(40).collect());
    let bytes = bytes(text).ok_or_else(syntax)?;
    let mib = bytes.div_ceil(MIB_BYTES);
    let memory = MemoryMib::try_from(mib).map_err(|_| QuantityError::MemoryRange {
        text: text.to_owned(),
    })?;
    if memory.bytes() > host_bytes {
        return Err(QuantityError::MemoryOfHost {
            text: text.to_owned(),
            host_mib: host_bytes / MIB_BYTES,
        });
    }
    Ok(memory)
}

/// A number of CPUs.
///
/// # Errors
/// Another text, or a number that a VM cannot have.
pub(crate) fn cpus(text: &str) -> Result<Cpus, QuantityError> {
    let refused = || QuantityError::Cpus(text.chars().take(40).collect());
    let count: u64 = text.parse().map_err(|_| refused())?;
    Cpus::try_from(count).map_err(|_| refused())
}

/// How long a guest may take until its agent can be reached.
///
/// # Errors
/// Another text, or a time out of bounds.
pub(crate) fn boot_timeout(text: &str) -> Result<Duration, QuantityError> {
    let seconds = text.parse().ok();
    let seconds = seconds.filter(|seconds| BOOT_TIMEOUTS_S.contains(seconds));
    let refused = || QuantityError::BootTimeout(text.chars().take(40).collect());
    seconds.map(Duration::from_secs).ok_or_else(refused)
}

fn bytes(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, unit) = text.split_at(digits.unwrap_or(text.len()));
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    if whole.is_empty() || fraction.is_empty() || fraction.len() > 9 || fraction.contains('.') {
        return None;
    }
    let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let whole: u64 = whole.parse().ok()?;
    let fraction: u64 = fraction.parse().ok()?;
    let scaled = u128::from(whole) * scale + u128::from(fraction);
    u64::try_from((scaled << shift) / scale).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOST_BYTES: u64 = 8 << 30;

    fn mib(text: &str) -> Result<u64, QuantityError> {
        memory(text, HOST_BYTES).map(MemoryMib::get)
    }

    #[test]
    fn docker_s_units_are_powers_of_1024_in_either_case() {
        assert_eq!(mib("512M"), Ok(512));
        assert_eq!(mib("1g"), Ok(1024));
        assert_eq!(mib("1.5GiB"), Ok(1536));
        assert_eq!(mib("134217728"), Ok(128));
        assert_eq!(mib("134217729b"), Ok(129));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["12Q", "", "-5", "m", "1..5g", ".5g", "1 g", "1e9", "0x40m"] {
            assert!(
                matches!(mib(text), Err(QuantityError::MemorySyntax(_))),
                "{text}"
            );
        }
    }

    #[test]
    fn too_little_and_too_much_are_refused_with_numbers() {
        for text in ["0", "1M", "63m", "600g"] {
            let error = mib(text).expect_err("out of range").to_string();
            assert!(error.contains("64 MiB to 524288 MiB"), "{error}");
        }
        assert_eq!(
            mib("9g").expect_err("more than the host has").to_string(),
            "--memory 9g: this machine has 8192 MiB in all"
        );
    }

    #[test]
    fn cpus_are_one_to_thirty_two() {
        assert_eq!(cpus("2").map(Cpus::get), Ok(2));
        for text in ["0", "-1", "1000", "many", "1.5", ""] {
            assert!(cpus(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_size_or_refused(text: String) {
            let _either = memory(&text, HOST_BYTES);
            let _either = cpus(&text);
        }

        #[test]
        fn a_plain_number_of_mebibytes_is_itself(count in 64u64..8192) {
            prop_assert_eq!(mib(&format!("{count}m")), Ok(count));
        }
    }

    #[test]
    fn a_guest_may_take_from_a_second_to_an_hour() {
        for (text, seconds) in [("1", 1), ("300", 300), ("3600", 3600)] {
            assert_eq!(boot_timeout(text), Ok(Duration::from_secs(seconds)));
        }
        for text in ["0", "3601", "-1", "1.5", "1s", "", "99999999999999999999"] {
            let refused = QuantityError::BootTimeout(text.to_owned());
            assert_eq!(boot_timeout(text), Err(refused), "{text}");
        }
    }
}
