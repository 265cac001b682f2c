//! Where the kernel's source comes from: Debian's `linux-source-6.12`, or a tarball or directory that the caller names.
//!
//! The identity of a source is what the cache is keyed by: the package's version, or the hash of what was named. Trusts apt,
//! and the caller for the rest: building a kernel runs the source's own makefiles.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cache::{CacheError, Key};
use crate::command::{self, CommandError};
use crate::packages::{self, Package, PackagesError, any};
use crate::progress::{Progress, Step};

/// The Debian package; its tarball is named like it.
pub const PACKAGE: &str = "linux-source-6.12";
const TARBALL_DIR: &str = "/usr/src";
/// What a build runs, and the packages that have it.
const TOOLS: [(&str, Package); 9] = [
    ("gcc", any("gcc")),
    ("ld", any("binutils")),
    ("make", any("make")),
    ("flex", any("flex")),
    ("bison", any("bison")),
    ("bc", any("bc")),
    ("perl", any("perl")),
    ("tar", any("tar")),
    ("xz", any("xz-utils")),
];
/// Headers: objtool reads ELF, everything includes the C library.
const HEADERS: [Package; 2] = [any("libelf-dev"), any("libc6-dev")];
/// What a tarball holds that a kernel for a virtual x86 machine never compiles: three files of four. Kconfig files and
/// makefiles stay, because the tree is parsed and descended into as a whole.
const NEVER_COMPILED: [&str; 20] = [
    "Documentation/*/*",
    "LICENSES",
    "rust/*.rs",
    "samples/*.[ch]",
    "sound/*.[ch]",
    "tools/perf",
    "tools/testing",
    "arch/[a-t]*/*.[chS]",
    "arch/[a-t]*/*.dts*",
    "arch/xtensa/*.[chS]",
    "drivers/accel/*.[ch]",
    "drivers/gpu/*.[ch]",
    "drivers/infiniband/*.[ch]",
    "drivers/media/*.[ch]",
    "drivers/net/ethernet/*.[ch]",
    "drivers/net/wireless/*.[ch]",
    "drivers/scsi/*.[ch]",
    "drivers/staging/*.[ch]",
    "drivers/usb/*.[ch]",
    "drivers/iio/*.[ch]",
];
/// Not part of a source: what a checkout or an editor adds.
const NOT_SOURCE: [&str; 1] = [".git"];

/// Why there is no source.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// What was named is not there.
    #[error("kernel source {}", path.display())]
    Missing {
        /// As named.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        cause: std::io::Error,
    },
    /// It is something else.
    #[error("{} is not a Linux source tree: it has no Kconfig and Makefile", path.display())]
    NotLinux {
        /// As named, or unpacked from what was named.
        path: PathBuf,
    },
    /// The package is installed without the tarball.
    #[error("the package {PACKAGE} has no {}: run `apt-get install --reinstall {PACKAGE}`", tarball.display())]
    NoTarball {
        /// Where it should be.
        tarball: PathBuf,
    },
    /// Tools are missing and there is no apt to ask.
    #[error(
        "building the guest kernel needs {programs}, which this machine does not have: install them"
    )]
    NoTools {
        /// Their names.
        programs: String,
    },
    /// Debian packages are missing.
    #[error(transparent)]
    Packages(#[from] PackagesError),
    /// It could not be hashed.
    #[error(transparent)]
    Hash(#[from] CacheError),
    /// A command failed.
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// A kernel source, not yet unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// The tarball of Debian's package.
    Package {
        /// The package's version.
        version: String,
        /// Its tarball.
        tarball: PathBuf,
    },
    /// A tarball.
    Tarball {
        /// As named.
        path: PathBuf,
        /// Its SHA-256.
        hash: String,
    },
    /// A directory.
    Directory {
        /// As named.
        path: PathBuf,
        /// The hash of everything in it.
        hash: String,
    },
}

impl Source {
    /// Finds the source: what `named` says, else Debian's package, installed where it is missing. Installs the tools too.
    ///
    /// # Errors
    /// There is no such source, or what building needs cannot be had.
    pub fn find(progress: &Progress, named: Option<&Path>) -> Result<Self, SourceError> {
        let Some(path) = named else {
            let wanted: Vec<Package> = packages_of_tools().chain([any(PACKAGE)]).collect();
            packages::ensure(progress, "building the guest kernel", &wanted)?;
            return Self::of_package();
        };
        if runs("dpkg-query") {
            let wanted: Vec<Package> = packages_of_tools().collect();
            packages::ensure(progress, "building the guest kernel", &wanted)?;
        } else {
            check_tools()?;
        }
        let missing = |cause| SourceError::Missing {
            path: path.to_owned(),
            cause,
        };
        let path = path.canonicalize().map_err(missing)?;
        if path.is_dir() {
            check_tree(&path)?;
            progress.say(&format!("hashing {}", path.display()));
            let hash = hash_of_tree(&path)?;
            Ok(Self::Directory { path, hash })
        } else {
            let hash = Key::builder().file(&path)?.finish().as_str().to_owned();
            Ok(Self::Tarball { path, hash })
        }
    }

    fn of_package() -> Result<Self, SourceError> {
        let mut query = Command::new("dpkg-query");
        query.args(["-W", "-f", "${Version}", PACKAGE]);
        let (_, version) = command::query(&mut query)?;
        let tarball = Path::new(TARBALL_DIR).join(format!("{PACKAGE}.tar.xz"));
        if !tarball.is_file() {
            return Err(SourceError::NoTarball { tarball });
        }
        Ok(Self::Package {
            version: String::from_utf8_lossy(&version).trim().to_owned(),
            tarball,
        })
    }

    /// What stands for the source in a cache key and in the manifest.
    pub fn identity(&self) -> String {
        match self {
            Self::Package { version, .. } => format!("{PACKAGE} {version}"),
            Self::Tarball { hash, .. } => format!("tarball {hash}"),
            Self::Directory { hash, .. } => format!("directory {hash}"),
        }
    }

    /// The source tree; unpacked into `into` unless it is a directory already. The directory is built from, never in.
    ///
    /// # Errors
    /// It cannot be unpacked, or is not Linux.
    pub fn unpack(&self, step: &Step, into: &Path) -> Result<PathBuf, SourceError> {
        let tarball = match self {
            Self::Directory { path, .. } => return Ok(path.clone()),
            Self::Package { tarball, .. } => tarball,
            Self::Tarball { path, .. } => path,
        };
        std::fs::create_dir(into).map_err(|cause| SourceError::Missing {
            path: into.to_owned(),
            cause,
        })?;
        let mut tar = Command::new("tar");
        tar.args(["--extract", "--strip-components=1", "--no-same-owner"])
            .args(NEVER_COMPILED.map(|pattern| format!("--exclude=*/{pattern}")))
            .arg("--file")
            .arg(tarball)
            .arg("--directory")
            .arg(into);
        step.run(&mut tar)?;
        check_tree(into)?;
        Ok(into.to_owned())
    }
}

fn packages_of_tools() -> impl Iterator<Item = Package> {
    TOOLS.into_iter().map(|(_, package)| package).chain(HEADERS)
}

fn check_tools() -> Result<(), SourceError> {
    let missing: Vec<&str> = TOOLS
        .into_iter()
        .map(|(program, _)| program)
        .filter(|program| !runs(program))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(SourceError::NoTools {
        programs: missing.join(", "),
    })
}

fn runs(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .output()
        .is_ok_and(|output| output.status.success())
}

fn check_tree(path: &Path) -> Result<(), SourceError> {
    if path.join("Kconfig").is_file() && path.join("Makefile").is_file() {
        return Ok(());
    }
    Err(SourceError::NotLinux {
        path: path.to_owned(),
    })
}

fn hash_of_tree(path: &Path) -> Result<String, SourceError> {
    let missing = |cause| SourceError::Missing {
        path: path.to_owned(),
        cause,
    };
    let mut names = std::fs::read_dir(path)
        .and_then(|entries| {
            entries
                .map(|entry| Ok(entry?.file_name()))
                .collect::<Result<Vec<_>, _>>()
        })
        .map_err(missing)?;
    names.retain(|name| NOT_SOURCE.iter().all(|other| name != other));
    names.sort();
    let mut key = Key::builder();
    for name in names {
        let entry = path.join(&name);
        key = key.bytes(name.as_encoded_bytes());
        key = if entry.is_dir() {
            key.dir(&entry)?
        } else {
            key.file(&entry)?
        };
    }
    Ok(key.finish().as_str().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir()
                .join(format!("xtask-kernel-source-{}-{name}", std::process::id()));
            std::fs::create_dir(&path).expect("a new directory");
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).expect("removed");
        }
    }

    #[test]
    fn a_directory_without_a_kernel_is_not_linux() {
        let scratch = Scratch::new("empty");
        let error = check_tree(&scratch.0).expect_err("not linux");
        assert!(
            error.to_string().contains("is not a Linux source tree"),
            "{error}"
        );
    }

    #[test]
    fn the_hash_of_a_tree_follows_its_files_but_not_its_history() {
        let scratch = Scratch::new("hash");
        std::fs::write(scratch.0.join("Makefile"), "all:").expect("written");
        let before = hash_of_tree(&scratch.0).expect("hashed");
        std::fs::create_dir(scratch.0.join(".git")).expect("made");
        assert_eq!(hash_of_tree(&scratch.0).expect("hashed"), before);
        std::fs::write(scratch.0.join("Makefile"), "all: x").expect("written");
        assert_ne!(hash_of_tree(&scratch.0).expect("hashed"), before);
    }

    #[test]
    fn the_version_of_a_package_is_its_identity() {
        let of = |version: &str| Source::Package {
            version: version.to_owned(),
            tarball: PathBuf::from("/x"),
        };
        assert_eq!(of("6.12.1-1").identity(), "linux-source-6.12 6.12.1-1");
        assert_ne!(of("6.12.1-1").identity(), of("6.12.2-1").identity());
    }
}
