//! Where the programs of the machine are: the VMM, the guest kernel and the initramfs.

use rustix::fs::{Mode, OFlags};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// Where packages put what is not a program.
const SHARE_DIRECTORY: &str = "/usr/share/capsid";
/// Where packages put programs that nobody types.
const LIBEXEC_DIRECTORY: &str = "/usr/libexec/capsid";

/// One of the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// `capsid-vmm`.
    Vmm,
    /// The guest kernel.
    Kernel,
    /// The guest's initramfs.
    Initramfs,
}

/// What was not found.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The path that the person named.
    #[error("cannot open the {what} {path}")]
    Named {
        /// Which file.
        what: &'static str,
        /// Its path.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// Nowhere we look.
    #[error(
        "no {what} found (looked at {looked}); `cargo xtask run` builds everything; or name it with {flag} or ${variable}"
    )]
    Nowhere {
        /// Which file.
        what: &'static str,
        /// The paths.
        looked: String,
        /// The flag that names it.
        flag: &'static str,
        /// The variable that names it.
        variable: &'static str,
    },
}

impl Part {
    /// A few words.
    pub fn what(self) -> &'static str {
        match self {
            Part::Vmm => "VMM program",
            Part::Kernel => "guest kernel",
            Part::Initramfs => "guest initramfs",
        }
    }

    fn names(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Part::Vmm => ("capsid-vmm", "--vmm", "CAPSID_VMM"),
            Part::Kernel => ("vmlinux", "--kernel", "CAPSID_KERNEL"),
            Part::Initramfs => ("initramfs.cpio", "--initramfs", "CAPSID_INITRAMFS"),
        }
    }

    /// Finds the path: the one that the user named, the variable's, or the first of the usual ones that is there.
    ///
    /// # Errors
    /// It is nowhere.
    pub fn find(self, named: Option<&Path>) -> Result<PathBuf, FileError> {
        let (_, _, variable) = self.names();
        let named = named.map(OsString::from);
        let named = named.or_else(|| std::env::var_os(variable).filter(|path| !path.is_empty()));
        let program = std::env::current_exe().ok();
        self.among(named, program.as_deref().and_then(Path::parent))
    }

    fn among(self, named: Option<OsString>, beside: Option<&Path>) -> Result<PathBuf, FileError> {
        if let Some(path) = named {
            return Ok(path.into());
        }
        let (name, flag, variable) = self.names();
        let mut places = Vec::new();
        if let Some(directory) = beside {
            places.push(directory.join(name));
            if self != Part::Vmm {
                places.push(directory.join("../share/capsid").join(name));
            }
        }
        places.push(match self {
            Part::Vmm => Path::new(LIBEXEC_DIRECTORY).join(name),
            Part::Kernel | Part::Initramfs => Path::new(SHARE_DIRECTORY).join(name),
        });
        let looked = || {
            let places: Vec<String> = places.iter().map(|p| p.display().to_string()).collect();
            places.join(", ")
        };
        let found = places.iter().find(|place| place.exists()).cloned();
        found.ok_or_else(|| FileError::Nowhere {
            what: self.what(),
            looked: looked(),
            flag,
            variable,
        })
    }

    /// Opens a regular file for reading, without waiting for anybody if it is a pipe.
    ///
    /// # Errors
    /// It is not there, or not a regular file.
    pub fn open(self, path: &Path) -> Result<File, FileError> {
        let opened = || -> io::Result<File> {
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
            if !file.metadata()?.is_file() {
                return Err(io::Error::other("it is not a regular file"));
            }
            Ok(file)
        };
        opened().map_err(|cause| FileError::Named {
            what: self.what(),
            path: path.to_owned(),
            cause,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_named_file_is_taken_as_it_is_and_reported_by_name() {
        let path = Part::Kernel
            .among(Some("/no/kernel".into()), None)
            .expect("named");
        let error = Part::Kernel.open(&path).expect_err("not there").to_string();
        assert_eq!(error, "cannot open the guest kernel /no/kernel");
    }

    #[test]
    fn what_is_nowhere_says_where_it_was_looked_for_and_what_to_do() {
        let beside = Path::new("/no/such/bin");
        let error = Part::Initramfs
            .among(None, Some(beside))
            .expect_err("nowhere")
            .to_string();
        assert!(
            error.contains("/no/such/bin/../share/capsid/initramfs.cpio"),
            "{error}"
        );
        assert!(
            error.contains("--initramfs or $CAPSID_INITRAMFS"),
            "{error}"
        );
    }

    #[test]
    fn a_directory_is_no_kernel() {
        assert!(Part::Kernel.open(Path::new("/")).is_err());
    }
}
