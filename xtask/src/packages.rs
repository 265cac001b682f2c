//! Debian packages: which of those we want are missing, and their installation, named first and with the reason.
//!
//! Trusts the machine's own apt configuration: a package that only the backports of this release have comes from the mirror
//! that is already configured, so no host name is written here.

pub mod release;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::Lock;
use crate::command::{self, CommandError, shown};
use crate::progress::{LogError, Progress, Step};

/// Where the keys of Debian's archives are, on every Debian.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Where the backports are added, on a machine that is configured without them.
const BACKPORTS_LIST: &str = "/etc/apt/sources.list.d/capsid-backports.list";
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
    /// Without apt's lists nobody can say which version it would install, and from where.
    #[error(
        "{reason} needs {names}, and apt has no lists to say where from: run `apt-get update` as root and then this again, or this once as root"
    )]
    NoLists {
        /// What needs them.
        reason: String,
        /// Their names.
        names: String,
    },
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
        return Err(not_root(reason, &missing)?);
    }
    progress.say(&format!("{reason} needs {names}"));
    progress.step("Debian packages", |step| {
        let _lock = lock()?;
        update_lists(step)?;
        for act in plan(&missing)? {
            act.run(step)?;
        }
        Ok(())
    })
}

/// The refusal that says what root would do.
fn not_root(reason: &str, missing: &[Package]) -> Result<PackagesError, PackagesError> {
    let unknown =
        |package: &&Package| package.at_least.is_some() && offered(package.name).is_none();
    if missing.iter().any(|package| unknown(&package)) {
        return Ok(PackagesError::NoLists {
            reason: reason.to_owned(),
            names: names(missing),
        });
    }
    let acts = plan(missing)?;
    let update = Act::Run(update_command()).to_string();
    let rest = acts.iter().map(Act::to_string);
    Ok(PackagesError::NotRoot {
        reason: reason.to_owned(),
        command: std::iter::once(update)
            .chain(rest)
            .collect::<Vec<_>>()
            .join(" && "),
    })
}

/// One thing that root does to install packages; its text is what a person would type.
#[derive(Debug)]
enum Act {
    Run(Command),
    AddSource(String),
}

impl Act {
    fn run(self, step: &Step) -> Result<(), PackagesError> {
        match self {
            Self::Run(mut command) => Ok(step.run_to_the_end(&mut command)?),
            Self::AddSource(source) => {
                let path = PathBuf::from(BACKPORTS_LIST);
                std::fs::write(&path, format!("{source}\n"))
                    .map_err(|cause| PackagesError::Write { path, cause })
            }
        }
    }
}

impl fmt::Display for Act {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Run(command) => f.write_str(&shown(command)),
            Self::AddSource(source) => write!(f, "echo '{source}' > {BACKPORTS_LIST}"),
        }
    }
}

/// What apt is configured with.
#[derive(Debug)]
struct Archive {
    codename: String,
    mirror: String,
    has_backports: bool,
}

/// What is to be done after apt's lists were brought up to date.
fn plan(missing: &[Package]) -> Result<Vec<Act>, PackagesError> {
    let too_old = |package: &&Package| {
        package.at_least.is_some_and(|wanted| {
            !offered(package.name).is_some_and(|version| not_older(&version, wanted))
        })
    };
    let (newer, own): (Vec<Package>, Vec<Package>) = missing
        .iter()
        .copied()
        .partition(|package| too_old(&package));
    if newer.is_empty() {
        return Ok(vec![Act::Run(install(&own, None))]);
    }
    Ok(with_backports(&own, &newer, &archive()?))
}

fn with_backports(own: &[Package], newer: &[Package], archive: &Archive) -> Vec<Act> {
    let backports = format!("{}-backports", archive.codename);
    let mut acts = Vec::new();
    if !own.is_empty() {
        acts.push(Act::Run(install(own, None)));
    }
    if !archive.has_backports {
        let mirror = &archive.mirror;
        acts.push(Act::AddSource(format!(
            "deb [signed-by={KEYRING}] {mirror} {backports} main"
        )));
        acts.push(Act::Run(update_command()));
    }
    acts.push(Act::Run(install(newer, Some(&backports))));
    acts
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
    Ok(step.run_to_the_end(&mut update_command())?)
}

fn update_command() -> Command {
    let mut command = Command::new("apt-get");
    command.arg("update");
    command
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

/// The version that apt would install by itself.
fn offered(name: &str) -> Option<String> {
    let (_, output) = command::query(Command::new("apt-cache").args(["policy", name])).ok()?;
    candidate(&String::from_utf8_lossy(&output))
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
    Ok(archive()?.mirror)
}

fn archive() -> Result<Archive, PackagesError> {
    let codename = codename()?;
    let mut command = Command::new("apt-get");
    command.args([
        "indextargets",
        "--format",
        "$(ORIGIN)|$(CODENAME)|$(COMPONENT)|$(REPO_URI)",
        "Created-By: Packages",
    ]);
    let (_, output) = command::query(&mut command)?;
    let targets = String::from_utf8_lossy(&output);
    let Some(mirror) = mirror_of(&targets, "Debian", &codename) else {
        return Err(PackagesError::NoMirror { codename });
    };
    let backports = mirror_of(
        &targets,
        "Debian Backports",
        &format!("{codename}-backports"),
    );
    Ok(Archive {
        codename,
        mirror,
        has_backports: backports.is_some(),
    })
}

fn mirror_of(targets: &str, origin: &str, codename: &str) -> Option<String> {
    let start = format!("{origin}|{codename}|main|");
    let address = targets.lines().find_map(|line| line.strip_prefix(&start))?;
    Some(address.to_owned())
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
        let targets = "Other|bookworm|main|http://other/\nDebian|bookworm-updates|main|http://a/\n\
             Debian|bookworm|main|http://b/debian/\nDebian Backports|bookworm-backports|main|http://c/\n";
        let mirror = |origin, codename| mirror_of(targets, origin, codename);
        assert_eq!(
            mirror("Debian", "bookworm").as_deref(),
            Some("http://b/debian/")
        );
        assert_eq!(mirror("Debian", "trixie"), None);
        assert!(mirror("Debian Backports", "bookworm-backports").is_some());
        assert!(mirror("Debian Backports", "trixie-backports").is_none());
    }

    fn line(own: &[Package], has_backports: bool) -> String {
        let archive = Archive {
            codename: "bookworm".to_owned(),
            mirror: "http://mirror/debian/".to_owned(),
            has_backports,
        };
        let newer = [at_least("qemu-system-x86", "1:9")];
        let acts = with_backports(own, &newer, &archive);
        acts.iter()
            .map(Act::to_string)
            .collect::<Vec<_>>()
            .join(" && ")
    }

    #[test]
    fn what_the_release_has_too_old_is_said_to_come_from_backports() {
        let line = line(&[any("tar")], true);
        let (own, newer) = line.split_once(" && ").expect("two commands");
        assert!(own.ends_with(" tar") && !own.contains(" -t "), "{line}");
        assert!(
            newer.ends_with(" -t bookworm-backports qemu-system-x86"),
            "{line}"
        );
    }

    #[test]
    fn backports_that_are_not_there_are_added_first() {
        let line = line(&[], false);
        assert!(
            line.starts_with(
                "echo 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] \
                 http://mirror/debian/ bookworm-backports main' > /etc/apt/sources.list.d/capsid-backports.list \
                 && apt-get update && "
            ),
            "{line}"
        );
    }
}
