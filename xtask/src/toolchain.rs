//! The Rust that builds the programs. xtask itself builds with Debian 13's own, so that it can run there at all and fetch the newer
//! one from the backports; a toolchain of rustup's never gets Debian's.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::command::{self, CommandError};
use crate::packages::{self, Package, PackagesError, at_least};
use crate::progress::Progress;

/// Major and minor of the oldest Rust that will do: libcontainer 0.7.0 has `let` chains, whatever its manifest says.
const OLDEST: (u32, u32) = (1, 88);
/// Debian's packages of it. Formatter and lints are of no use to a compiler of another version, so they come along.
const PACKAGES: [Package; 4] = [
    at_least("cargo", "1.88"),
    at_least("rustc", "1.88"),
    RUSTFMT,
    CLIPPY,
];
/// `cargo fmt`, in Debian.
pub const RUSTFMT: Package = at_least("rustfmt", "1.88");
/// `cargo clippy`, in Debian.
pub const CLIPPY: Package = at_least("rust-clippy", "1.88");
/// The Debian package of a cargo that takes its subcommands from Debian.
const CARGO_PACKAGE: &str = "cargo";

/// Why there is no Rust to build with.
#[derive(Debug, thiserror::Error)]
pub enum ToolchainError {
    /// It is too old, and not Debian's.
    #[error(
        "this is Rust {found}, building the programs needs {}.{} or later, and this cargo is not Debian's: run `rustup update`, or update it as you installed it",
        OLDEST.0, OLDEST.1
    )]
    TooOld {
        /// What it says.
        found: String,
    },
    /// It says no version.
    #[error(
        "`rustc --version` says {0:?}, which names no version: install Rust, for instance Debian's package cargo"
    )]
    NoVersion(String),
    /// Debian's could not be installed.
    #[error(transparent)]
    Packages(#[from] PackagesError),
    /// A command could not be started.
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// Sees to it that the Rust on the search path is new enough; Debian's own is replaced by that of the backports.
///
/// # Errors
/// It is too old and stays so; the text says what to run.
pub fn ensure(progress: &Progress) -> Result<(), ToolchainError> {
    let found = found()?;
    if new_enough(&found)? {
        return Ok(());
    }
    if !is_debians_cargo() {
        return Err(ToolchainError::TooOld { found });
    }
    packages::ensure(progress, "building the programs", &PACKAGES)?;
    let found = self::found()?;
    if new_enough(&found)? {
        Ok(())
    } else {
        Err(ToolchainError::TooOld { found })
    }
}

fn found() -> Result<String, ToolchainError> {
    let mut version = Command::new("rustc");
    version.arg("--version");
    let (_, output) = command::query(&mut version)?;
    Ok(String::from_utf8_lossy(&output).trim().to_owned())
}

/// `rustc 1.85.1 (4eb161250 2025-03-15) (built from a source tarball)` and the like.
fn new_enough(version: &str) -> Result<bool, ToolchainError> {
    let parts = version.split_whitespace().nth(1).map(|word| {
        let mut numbers = word.split('.').map(str::parse::<u32>);
        (numbers.next(), numbers.next())
    });
    match parts {
        Some((Some(Ok(major)), Some(Ok(minor)))) => Ok((major, minor) >= OLDEST),
        _ => Err(ToolchainError::NoVersion(version.to_owned())),
    }
}

/// Whether the cargo on the search path is a file of Debian's package; rustup's is a link to rustup, in Debian's package of that
/// too.
pub fn is_debians_cargo() -> bool {
    let Some(cargo) = on_path("cargo").and_then(|path| path.canonicalize().ok()) else {
        return false;
    };
    let mut owner = Command::new("dpkg-query");
    owner.arg("--search").arg(&cargo).stderr(Stdio::null());
    // Without dpkg, no file is of a Debian package.
    command::query(&mut owner)
        .is_ok_and(|(_, output)| owns(&String::from_utf8_lossy(&output), &cargo))
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// `PACKAGE: PATH` or `PACKAGE:ARCHITECTURE: PATH`, one a line.
fn owns(search: &str, path: &Path) -> bool {
    search
        .lines()
        .filter_map(|line| line.split_once(": "))
        .any(|(package, file)| {
            package.split(':').next() == Some(CARGO_PACKAGE) && Path::new(file) == path
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_told_from_what_rustc_prints() {
        let debians = "rustc 1.85.1 (4eb161250 2025-03-15) (built from a source tarball)";
        assert!(!new_enough(debians).expect("a version"));
        for line in [
            "rustc 1.88.0",
            "rustc 1.100.0-nightly (0 2027-01-01)",
            "rustc 2.0.0",
        ] {
            assert!(new_enough(line).expect("a version"), "{line}");
        }
        for line in ["", "rustc", "rustc x.y.z", "gcc (Debian) 14.2.0"] {
            assert!(new_enough(line).is_err(), "{line}");
        }
    }

    #[test]
    fn who_has_an_old_rust_of_another_origin_is_told_what_to_run() {
        let found = "rustc 1.85.0".to_owned();
        let text = ToolchainError::TooOld { found }.to_string();
        assert!(
            text.contains("1.88") && text.contains("`rustup update`"),
            "{text}"
        );
    }

    #[test]
    fn a_cargo_is_debians_when_debians_package_has_it() {
        let cargo = Path::new("/usr/bin/cargo");
        assert!(owns("cargo: /usr/bin/cargo\n", cargo));
        assert!(owns("cargo:amd64: /usr/bin/cargo\n", cargo));
        assert!(!owns("rustup: /usr/bin/cargo\n", cargo));
        assert!(!owns("cargo: /usr/share/doc/cargo\n", cargo));
        assert!(!owns("", cargo));
    }
}
