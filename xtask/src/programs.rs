//! The programs of the workspace as static binaries, so that they run inside the guest, inside the testbed and on any host.
//!
//! glibc with `crt-static` for the explicit host target: build scripts and proc macros are built for the host as ever.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command::CommandError;
use crate::packages::{Package, PackagesError, any, ensure};
use crate::progress::{LogError, Progress};

/// Explicit, so that the flags below do not reach build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";
const FLAGS: &str = "-C target-feature=+crt-static";
/// What building them needs beside cargo.
const PACKAGES: [Package; 3] = [any("gcc"), any("libc6-dev"), any("libseccomp-dev")];
/// Where Debian keeps the static libraries of C.
const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";

/// A program of the workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Program {
    /// Its cargo package.
    pub package: &'static str,
    /// Its file name.
    pub name: &'static str,
}

/// What a person types.
pub const CAPSID: Program = Program {
    package: "capsid",
    name: "capsid",
};
/// One microVM.
pub const VMM: Program = Program {
    package: "capsid-vmm",
    name: "capsid-vmm",
};
/// PID 1 of the guest.
pub const AGENT: Program = Program {
    package: "capsid-agent",
    name: "capsid-agent",
};
/// The testbed's inside end.
pub const DOOR: Program = Program {
    package: "capsid-testbed-door",
    name: "testbed-door",
};

/// How they are built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// As shipped.
    Release,
    /// Quicker to build, with debug assertions.
    Dev,
}

/// Why there are no programs.
#[derive(Debug, thiserror::Error)]
pub enum ProgramsError {
    /// What building needs is not there.
    #[error(transparent)]
    Packages(#[from] PackagesError),
    /// cargo said no.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The log could not be made.
    #[error(transparent)]
    Log(#[from] LogError),
    /// cargo said yes, and yet.
    #[error("cargo built no {}", path.display())]
    Missing {
        /// Where it should be.
        path: PathBuf,
    },
}

/// Builds programs and returns their paths in the same order.
///
/// # Errors
/// They do not build.
pub fn build(
    progress: &Progress,
    workspace: &Path,
    profile: Profile,
    programs: &[Program],
) -> Result<Vec<PathBuf>, ProgramsError> {
    ensure(progress, "building the programs", &PACKAGES)?;
    let names = programs
        .iter()
        .map(|program| program.name)
        .collect::<Vec<_>>()
        .join(", ");
    progress.step(&format!("programs {names}"), |step| {
        Ok::<_, ProgramsError>(step.run(&mut cargo(workspace, profile, programs))?)
    })?;
    let dir = target_dir(workspace).join(TARGET).join(profile.dir());
    let paths: Vec<PathBuf> = programs
        .iter()
        .map(|program| dir.join(program.name))
        .collect();
    match paths.iter().find(|path| !path.is_file()) {
        Some(path) => Err(ProgramsError::Missing { path: path.clone() }),
        None => Ok(paths),
    }
}

impl Profile {
    fn dir(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Dev => "debug",
        }
    }
}

fn cargo(workspace: &Path, profile: Profile, programs: &[Program]) -> Command {
    let mut command = Command::new("cargo");
    command
        .args(["build", "--locked", "--target", TARGET])
        .current_dir(workspace);
    if profile == Profile::Release {
        command.arg("--release");
    }
    for program in programs {
        command.args(["--package", program.package, "--bin", program.name]);
    }
    command
        .env("RUSTFLAGS", FLAGS)
        .env("LIBSECCOMP_LINK_TYPE", "static")
        .env("LIBSECCOMP_LIB_PATH", LIBRARIES);
    // Set by the cargo that runs us, for us alone.
    for variable in [
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "CARGO_MANIFEST_DIR",
    ] {
        command.env_remove(variable);
    }
    command
}

/// cargo's own rule: the variable, or `target` in the workspace.
fn target_dir(workspace: &Path) -> PathBuf {
    let named = std::env::var_os("CARGO_TARGET_DIR").filter(|value| !value.is_empty());
    named.map_or_else(|| workspace.join("target"), |dir| workspace.join(dir))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::shown;

    #[test]
    fn programs_are_static_and_the_host_is_not_touched() {
        let line = shown(&cargo(Path::new("/w"), Profile::Release, &[CAPSID, VMM]));
        assert!(
            line.contains("RUSTFLAGS='-C target-feature=+crt-static'"),
            "{line}"
        );
        assert!(
            line.contains("--target x86_64-unknown-linux-gnu --release"),
            "{line}"
        );
        assert!(
            line.ends_with("--package capsid --bin capsid --package capsid-vmm --bin capsid-vmm"),
            "{line}"
        );
    }
}
