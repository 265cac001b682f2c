//! Debian packages: which of those we want are missing, and their installation, named first and with the reason.
//!
//! Trusts the machine's own apt configuration: a package that only the backports of this release have comes from the mirror
//! that is already configured, so no host name is written here.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::Lock;
use crate::command::{self, CommandError, shown};
use crate::progress::{LogError, Progress, Step};

/// Where the keys of Debian's archives are, on every Debian.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const SOURCES_DIR: &str = "/etc/apt/sources.list.d";
/// Another installation may be under way; it is waited for this long.
const DPKG_LOCK_TIMEOUT_S: u32 = 600;

/// apt refuses to update its lists for two at once, and does not wait.
const LOCK: &str = "/run/lock/capsid-packages.lock";

/// A package we want.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Package {
    /// Its name in Debian.
    pub name: &'static str,
    /// The oldest version that will do. Where the release's own is older, it comes from the release's backports.
    pub at_least: Option<&'static str>,
}

/// A package of which any version will do.
pub const fn any(name: &'static str) -> Package {
    Package {
        name,
        at_least: None,
    }
}

/// A package that must be new enough.
pub const fn at_least(name: &'static str, version: &'static str) -> Package {
    Package {
        name,
        at_least: Some(version),
    }
}

/// Why packages are not there.
#[derive(Debug, thiserror::Error)]
pub enum PackagesError {
    /// We may not install.
    #[error(
        "{reason} needs Debian packages that are missing: run `{command}` as root, or this once as root"
    )]
    NotRoot {
        /// What needs them.
        reason: String,
        /// What to run.
        command: String,
    },
    /// There is nothing to install with.
    #[error(
        "{reason} needs the Debian 12 or 13 packages {names}, and this machine has no apt-get: install what they hold by hand, or use a Debian machine"
    )]
    NotDebian {
        /// What needs them.
        reason: String,
        /// Their names.
        names: String,
    },
    /// apt's configuration names no archive of this release.
    #[error(
        "apt is configured with no Debian mirror of {codename} to take its backports from: configure one, then try again"
    )]
    NoMirror {
        /// The release.
        codename: String,
    },
    /// The release is not known.
    #[error("/etc/os-release does not name a release (VERSION_CODENAME)")]
    NoRelease,
    /// A file could not be written.
    #[error("writing {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        cause: std::io::Error,
    },
    /// A command failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The log could not be made.
    #[error(transparent)]
    Log(#[from] LogError),
}

/// Installs those of `wanted` that are missing or too old; says which, and why, first.
///
/// # Errors
/// They could not be installed; the text says what to run.
pub fn ensure(progress: &Progress, reason: &str, wanted: &[Package]) -> Result<(), PackagesError> {
    let missing = missing(wanted, reason)?;
    if missing.is_empty() {
        return Ok(());
    }
    let names = names(&missing);
    if Command::new("apt-get").arg("--version").output().is_err() {
        return Err(PackagesError::NotDebian {
            reason: reason.to_owned(),
            names,
        });
    }
    if !rustix::process::geteuid().is_root() {
        return Err(PackagesError::NotRoot {
            reason: reason.to_owned(),
            command: format!("apt-get install {names}"),
        });
    }
    progress.say(&format!("{reason} needs {names}"));
    progress.step("Debian packages", |step| {
        let _lock = lock()?;
        update_lists(step)?;
        let too_old = |package: &&Package| {
            package
                .at_least
                .is_some_and(|version| !offered(package.name, version))
        };
        let (from_backports, own): (Vec<Package>, Vec<Package>) = missing
            .iter()
            .copied()
            .partition(|package| too_old(&package));
        if !own.is_empty() {
            step.run_to_the_end(&mut install(&own, None))?;
        }
        if !from_backports.is_empty() {
            let codename = codename()?;
            add_backports(&codename)?;
            update_lists(step)?;
            step.run_to_the_end(&mut install(
                &from_backports,
                Some(&format!("{codename}-backports")),
            ))?;
        }
        Ok(())
    })
}

/// Brings apt's lists up to date.
///
/// # Errors
/// apt could not.
pub fn update(step: &Step) -> Result<(), PackagesError> {
    let _lock = lock()?;
    update_lists(step)
}

fn lock() -> Result<Lock, PackagesError> {
    Lock::wait(Path::new(LOCK)).map_err(|cause| PackagesError::Write {
        path: LOCK.into(),
        cause,
    })
}

fn update_lists(step: &Step) -> Result<(), PackagesError> {
    Ok(step.run_to_the_end(Command::new("apt-get").arg("update"))?)
}

fn install(missing: &[Package], backports: Option<&str>) -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args([
        "install",
        "-y",
        "--no-install-recommends",
    ]);
    command
        .arg("-o")
        .arg(format!("DPkg::Lock::Timeout={DPKG_LOCK_TIMEOUT_S}"));
    if let Some(release) = backports {
        command.args(["-t", release]);
    }
    command.args(missing.iter().map(|package| package.name));
    command
}

fn names(packages: &[Package]) -> String {
    packages
        .iter()
        .map(|package| package.name)
        .collect::<Vec<_>>()
        .join(" ")
}

fn missing(wanted: &[Package], reason: &str) -> Result<Vec<Package>, PackagesError> {
    let mut command = Command::new("dpkg-query");
    command.args(["-W", "-f", "${Package} ${db:Status-Status} ${Version}\n"]);
    command
        .args(wanted.iter().map(|package| package.name))
        .stderr(std::process::Stdio::null());
    // It exits 1 when it does not know a package; what it prints counts.
    let (_, output) = command::query(&mut command).map_err(|_| PackagesError::NotDebian {
        reason: reason.to_owned(),
        names: names(wanted),
    })?;
    let installed = installed(&String::from_utf8_lossy(&output));
    let has = |package: &&Package| {
        installed.iter().any(|(name, version)| {
            name == package.name
                && package
                    .at_least
                    .is_none_or(|wanted| not_older(version, wanted))
        })
    };
    Ok(wanted
        .iter()
        .filter(|package| !has(package))
        .copied()
        .collect())
}

/// `(name, version)` of what dpkg-query says is installed.
fn installed(output: &str) -> Vec<(String, String)> {
    output
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            match (words.next(), words.next(), words.next()) {
                (Some(name), Some("installed"), Some(version)) => {
                    Some((name.to_owned(), version.to_owned()))
                }
                _ => None,
            }
        })
        .collect()
}

/// dpkg's own order of versions, which is not that of their text.
fn not_older(version: &str, wanted: &str) -> bool {
    Command::new("dpkg")
        .args(["--compare-versions", version, "ge", wanted])
        .status()
        .is_ok_and(|status| status.success())
}

/// Whether the release would install a version that is new enough.
fn offered(name: &str, version: &str) -> bool {
    let Ok((_, output)) = command::query(Command::new("apt-cache").args(["policy", name])) else {
        return false;
    };
    candidate(&String::from_utf8_lossy(&output))
        .is_some_and(|candidate| not_older(&candidate, version))
}

fn candidate(policy: &str) -> Option<String> {
    let value = policy
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate:"))?
        .trim();
    (value != "(none)").then(|| value.to_owned())
}

/// The name of this Debian release.
///
/// # Errors
/// The machine does not say.
pub fn codename() -> Result<String, PackagesError> {
    let text = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    release_codename(&text).ok_or(PackagesError::NoRelease)
}

fn release_codename(os_release: &str) -> Option<String> {
    let value = os_release
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))?
        .trim()
        .trim_matches('"');
    (!value.is_empty() && value.bytes().all(|byte| byte.is_ascii_lowercase()))
        .then(|| value.to_owned())
}

/// The address of the Debian mirror that this machine is configured with.
///
/// # Errors
/// There is none for its release.
pub fn mirror() -> Result<String, PackagesError> {
    let codename = codename()?;
    let mut command = Command::new("apt-get");
    command.args([
        "indextargets",
        "--format",
        "$(ORIGIN) $(CODENAME) $(COMPONENT) $(REPO_URI)",
        "Created-By: Packages",
    ]);
    let (_, output) = command::query(&mut command)?;
    mirror_of(&String::from_utf8_lossy(&output), &codename)
        .ok_or(PackagesError::NoMirror { codename })
}

fn mirror_of(targets: &str, codename: &str) -> Option<String> {
    targets.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let ours = words.next() == Some("Debian")
            && words.next() == Some(codename)
            && words.next() == Some("main");
        if ours {
            words.next().map(str::to_owned)
        } else {
            None
        }
    })
}

fn add_backports(codename: &str) -> Result<(), PackagesError> {
    let path = PathBuf::from(SOURCES_DIR).join("capsid-backports.sources");
    let text = backports_source(&mirror()?, codename);
    std::fs::write(&path, text).map_err(|cause| PackagesError::Write { path, cause })
}

fn backports_source(mirror: &str, codename: &str) -> String {
    format!(
        "# Written by `cargo xtask`: newer packages of this release, which Capsid's testbed needs.\n\
         Types: deb\nURIs: {mirror}\nSuites: {codename}-backports\nComponents: main\nSigned-By: {KEYRING}\n"
    )
}

/// For messages: what a person would run to install these.
pub fn install_line(packages: &[Package]) -> String {
    shown(&install(packages, None))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_fully_installed_counts() {
        let output = "gcc installed 4:12.2.0-3\nqemu config-files 1:7.2\nbroken\n";
        assert_eq!(
            installed(output),
            [("gcc".to_owned(), "4:12.2.0-3".to_owned())]
        );
    }

    #[test]
    fn the_candidate_is_read_from_the_policy() {
        let policy = "qemu:\n  Installed: (none)\n  Candidate: 1:7.2+dfsg-7\n";
        assert_eq!(candidate(policy).as_deref(), Some("1:7.2+dfsg-7"));
        assert_eq!(candidate("x:\n  Candidate: (none)\n"), None);
    }

    #[test]
    fn the_release_is_read_with_or_without_quotes() {
        assert_eq!(
            release_codename("ID=debian\nVERSION_CODENAME=bookworm\n").as_deref(),
            Some("bookworm")
        );
        assert_eq!(
            release_codename("VERSION_CODENAME=\"trixie\"\n").as_deref(),
            Some("trixie")
        );
        assert_eq!(release_codename("VERSION_CODENAME=a;b\n"), None);
        assert_eq!(release_codename("ID=x\n"), None);
    }

    #[test]
    fn the_mirror_is_that_of_the_release_itself() {
        let targets = "Other bookworm main http://other/\nDebian bookworm-updates main http://a/\nDebian bookworm main http://b/debian/\n";
        assert_eq!(
            mirror_of(targets, "bookworm").as_deref(),
            Some("http://b/debian/")
        );
        assert_eq!(mirror_of(targets, "trixie"), None);
    }

    #[test]
    fn the_backports_source_names_the_machines_own_mirror() {
        let text = backports_source("http://mirror/debian/", "bookworm");
        assert!(
            text.contains("\nURIs: http://mirror/debian/\nSuites: bookworm-backports\n"),
            "{text}"
        );
    }

    #[test]
    fn the_install_line_can_be_typed() {
        assert!(install_line(&[any("gcc"), any("make")]).ends_with(" gcc make"));
    }
}
