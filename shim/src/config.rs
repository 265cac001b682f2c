//! The one configuration file: TOML, strict, and not needed.
//!
//! Who writes it is root. A key that is not known is an error which names the nearest one that is: a misspelt key that is ignored is found out too late.
//! containerd's configuration may name another file for a runtime, or hold the keys itself (`options` of a runtime handler); then this counts, alone.

mod options;

use capsid_owner::escape::Line;
use capsid_owner::host::{KvmError, usable_kvm};
use capsid_protocol::machine::{Cpus, MemoryMib};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;
use toml::{Table, Value};

pub use options::{Options, OptionsError, is_options};

/// Where the file is, if there is one.
pub const CONFIG_PATH: &str = "/etc/capsid/config.toml";
/// What can be done where KVM is software.
const WITH_SOFTWARE_KVM: &str =
    "or insist with allow_software_kvm = true in /etc/capsid/config.toml";
/// Longest file, in bytes.
const CONFIG_MAX_BYTES: usize = 64 * 1024;
/// Memory of a VM without a limit: as Kata's. What the guest does not use costs the host nothing, and what it frees goes back by free page
/// reporting (docs/decisions/0012), but for the descriptors of the pages, one part in 64.
const MEMORY: MemoryMib = MemoryMib::literal(2048);
/// CPUs of a VM without a limit: as Kata's.
const CPUS: Cpus = Cpus::literal(1);
/// How long a guest may take until its agent is there, in seconds; the longest that can be asked for.
const BOOT_TIMEOUT_S: u64 = 60;
const BOOT_TIMEOUT_MAX_S: u64 = 600;

/// What can be configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The VMM program; absent: where packages put it.
    pub vmm: Option<PathBuf>,
    /// The guest kernel; likewise.
    pub kernel: Option<PathBuf>,
    /// The guest's initramfs; likewise.
    pub initramfs: Option<PathBuf>,
    /// Memory of a VM whose pod has no limit.
    pub memory: MemoryMib,
    /// CPUs of a VM whose pod has no limit.
    pub cpus: Cpus,
    /// How long a guest may take until its agent is there.
    pub boot_timeout: Duration,
    /// Start VMs though KVM is software, which takes hours for each.
    pub allow_software_kvm: bool,
    /// Copy the guest's console to the shim's log.
    pub debug_console: bool,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            vmm: None,
            kernel: None,
            initramfs: None,
            memory: MEMORY,
            cpus: CPUS,
            boot_timeout: Duration::from_secs(BOOT_TIMEOUT_S),
            allow_software_kvm: false,
            debug_console: false,
        }
    }
}

/// Why the configuration is refused. The place is a path, or says that it is containerd's configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// Too long.
    #[error("{place} is longer than {CONFIG_MAX_BYTES} bytes")]
    TooLong {
        /// Where it was.
        place: String,
    },
    /// Not TOML.
    #[error("{place}, line {line}: {problem}")]
    Toml {
        /// Where it was.
        place: String,
        /// From 1.
        line: usize,
        /// What the parser says.
        problem: String,
    },
    /// A key that means nothing.
    #[error("{place}: {key} is not a known key; the nearest is {nearest}")]
    Unknown {
        /// Where it was.
        place: String,
        /// The key, fit to be shown.
        key: String,
        /// A key that there is.
        nearest: &'static str,
    },
    /// A value that cannot be.
    #[error("{place}: {key}: {problem}")]
    Value {
        /// Where it was.
        place: String,
        /// The key.
        key: &'static str,
        /// What is wrong with its value.
        problem: String,
    },
}

type Set = fn(&mut Config, Value) -> Result<(), String>;

/// Every key there is; at most thirty are to be.
const KEYS: [(&str, Set); 8] = [
    ("vmm", |config, value| {
        set(&mut config.vmm, path(value).map(Some))
    }),
    ("kernel", |config, value| {
        set(&mut config.kernel, path(value).map(Some))
    }),
    ("initramfs", |config, value| {
        set(&mut config.initramfs, path(value).map(Some))
    }),
    ("memory_mib", |config, value| {
        let memory =
            number(&value).and_then(|mib| MemoryMib::try_from(mib).map_err(|e| e.to_string()));
        set(&mut config.memory, memory)
    }),
    ("cpus", |config, value| {
        let cpus =
            number(&value).and_then(|count| Cpus::try_from(count).map_err(|e| e.to_string()));
        set(&mut config.cpus, cpus)
    }),
    ("boot_timeout_s", |config, value| {
        set(&mut config.boot_timeout, seconds(&value))
    }),
    ("allow_software_kvm", |config, value| {
        set(&mut config.allow_software_kvm, truth(&value))
    }),
    ("debug_console", |config, value| {
        set(&mut config.debug_console, truth(&value))
    }),
];

/// Keys of containerd's own in the options of a runtime, which it hands over with the others.
const KEYS_OF_CONTAINERD: [&str; 2] = ["TypeUrl", "ConfigPath"];

impl Config {
    /// The configuration that counts: the text in containerd's own configuration, or else the file that it names, or else [`CONFIG_PATH`], which need not be there.
    ///
    /// # Errors
    /// It cannot be read, or not all of it means something.
    pub fn load(options: &Options) -> Result<Config, ConfigError> {
        if let Some(body) = &options.config_body {
            let place = "options in containerd's configuration";
            return Config::parse(body, place, &KEYS_OF_CONTAINERD);
        }
        if let Some(path) = &options.config_path {
            return Config::read(path);
        }
        match Config::read(Path::new(CONFIG_PATH)) {
            Err(ConfigError::Read { cause, .. }) if cause.kind() == io::ErrorKind::NotFound => {
                Ok(Config::default())
            }
            read => read,
        }
    }

    /// Whether VMs can be started on this host.
    ///
    /// # Errors
    /// KVM is not there, or is software and this is not allowed.
    pub fn check_kvm(&self) -> Result<(), KvmError> {
        usable_kvm(self.allow_software_kvm, WITH_SOFTWARE_KVM).map(drop)
    }

    fn read(path: &Path) -> Result<Config, ConfigError> {
        let failed = |cause| ConfigError::Read {
            path: path.to_owned(),
            cause,
        };
        // A named pipe must not hold us.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let opened = rustix::fs::open(path, flags, Mode::empty());
        let file = File::from(opened.map_err(|errno| failed(errno.into()))?);
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(failed(io::Error::other("it is not a regular file")));
        }
        let mut text = String::new();
        let mut file = file.take(CONFIG_MAX_BYTES as u64 + 1);
        file.read_to_string(&mut text).map_err(failed)?;
        Config::parse(&text, &path.display().to_string(), &[])
    }

    fn parse(text: &str, place: &str, ignored: &[&str]) -> Result<Config, ConfigError> {
        let place = || place.to_owned();
        if text.len() > CONFIG_MAX_BYTES {
            return Err(ConfigError::TooLong { place: place() });
        }
        let table: Table = toml::from_str(text).map_err(|error| ConfigError::Toml {
            place: place(),
            line: line_of(text, error.span().map_or(0, |span| span.start)),
            problem: Line(error.message().as_bytes()).to_string(),
        })?;
        let mut config = Config::default();
        for (name, value) in table {
            if ignored.contains(&name.as_str()) {
                continue;
            }
            let Some((key, set)) = KEYS.into_iter().find(|(key, _)| *key == name) else {
                return Err(ConfigError::Unknown {
                    place: place(),
                    key: Line(name.as_bytes()).to_string(),
                    nearest: nearest(&name),
                });
            };
            set(&mut config, value).map_err(|problem| ConfigError::Value {
                place: place(),
                key,
                problem,
            })?;
        }
        Ok(config)
    }
}

fn nearest(name: &str) -> &'static str {
    let distance = |key: &&str| strsim::damerau_levenshtein(key, name);
    let keys = KEYS.iter().map(|(key, _)| *key);
    keys.min_by_key(distance).unwrap_or_default()
}

/// From 1.
fn line_of(text: &str, at: usize) -> usize {
    let before = text.as_bytes().get(..at).unwrap_or_default();
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

fn set<T>(place: &mut T, value: Result<T, String>) -> Result<(), String> {
    *place = value?;
    Ok(())
}

fn path(value: Value) -> Result<PathBuf, String> {
    match value {
        Value::String(path) if Path::new(&path).is_absolute() => Ok(path.into()),
        _ => Err("expected an absolute path in quotes".to_owned()),
    }
}

fn number(value: &Value) -> Result<u64, String> {
    let number = value
        .as_integer()
        .and_then(|number| u64::try_from(number).ok());
    number.ok_or_else(|| "expected a whole number that is not negative".to_owned())
}

fn seconds(value: &Value) -> Result<Duration, String> {
    match number(value)? {
        seconds @ 1..=BOOT_TIMEOUT_MAX_S => Ok(Duration::from_secs(seconds)),
        seconds => Err(format!("{seconds} s: expected 1 to {BOOT_TIMEOUT_MAX_S}")),
    }
}

fn truth(value: &Value) -> Result<bool, String> {
    value
        .as_bool()
        .ok_or_else(|| "expected true or false".to_owned())
}

#[cfg(test)]
#[path = "config_tests.rs"]
mod tests;
