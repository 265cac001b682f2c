//! The programs of the workspace as static binaries, so that they run inside the guest, inside the testbed and on any host.
//!
//! glibc with `crt-static` for the explicit host target: build scripts and proc macros are built for the host as ever.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::command::{CommandError, end, query, shown};
use crate::packages::{Package, PackagesError, any, ensure};
use crate::progress::{LogError, Progress};
use crate::toolchain::{self, ToolchainError};

/// Explicit, so that the flags below do not reach build scripts.
const TARGET: &str = "x86_64-unknown-linux-gnu";
const FLAGS: &str = "-C target-feature=+crt-static";
/// Those of the bare-metal guest. No vector instructions: a KVM without hardware emulates what that guest does, and knows few of them.
/// Its arithmetic is of integers alone, so the ABI of which rustc warns is not in question.
const BARE_FLAGS: &str = "-C target-feature=+crt-static,-sse,-sse2";
/// What building them needs beside cargo.
pub const PACKAGES: [Package; 3] = [any("gcc"), any("libc6-dev"), any("libseccomp-dev")];
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
/// What containerd starts.
pub const SHIM: Program = Program {
    package: "containerd-shim-capsid",
    name: "containerd-shim-capsid-v2",
};
/// The testbed's inside end.
pub const DOOR: Program = Program {
    package: "capsid-testbed-door",
    name: "testbed-door",
};
/// The guest that abuses the VMM's devices; a guest's kernel only as [`build_hostile_guest`] builds it.
const HOSTILE_GUEST: Program = Program {
    package: "capsid-hostile-guest",
    name: "hostile-guest",
};

/// [`VMM`] with threads that do what they are told; only as [`build_drill`] builds it.
const DRILL: Program = Program {
    package: "capsid-vmm",
    name: "capsid-vmm-drill",
};

/// A test target of the workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TestBinary {
    /// The name of its `[[test]]`, which no other has.
    pub name: &'static str,
    /// The program of its package that it starts, at the path where cargo built it.
    pub program: Option<&'static str>,
}

/// A test target that was built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltTest {
    /// The test.
    pub binary: PathBuf,
    /// The program that it starts.
    pub program: Option<PathBuf>,
}

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
    /// Rust is too old.
    #[error(transparent)]
    Toolchain(#[from] ToolchainError),
    /// cargo said no.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The log could not be made.
    #[error(transparent)]
    Log(#[from] LogError),
    /// cargo said no, and why, on stderr.
    #[error("cargo ended with {0}; its messages are above")]
    Build(String),
    /// cargo's messages are not what they used to be.
    #[error("`cargo test --no-run` named no executable for {0}")]
    NoExecutable(&'static str),
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
    run_build(
        progress,
        cargo_build(workspace, profile, programs),
        programs,
    )?;
    built(workspace, profile, programs)
}

/// Builds the guest that abuses the VMM's devices and returns its path.
///
/// # Errors
/// It does not build.
pub fn build_hostile_guest(
    progress: &Progress,
    workspace: &Path,
) -> Result<Vec<PathBuf>, ProgramsError> {
    let (profile, programs) = (Profile::Release, [HOSTILE_GUEST]);
    let mut command = cargo_build(workspace, profile, &programs);
    command.env("RUSTFLAGS", BARE_FLAGS);
    run_build(progress, command, &programs)?;
    built(workspace, profile, &programs)
}

/// Builds the VMM whose threads do what they are told and returns its path.
///
/// # Errors
/// It does not build.
pub fn build_drill(progress: &Progress, workspace: &Path) -> Result<Vec<PathBuf>, ProgramsError> {
    let mut command = cargo(workspace, "build");
    // The whole workspace, for the reason that `build_test` has.
    command.args(["--workspace", "--bin", DRILL.name]);
    // It reaches the other program of the package as well, which is not built here.
    command.args(["--features", "capsid-vmm/drill"]);
    run_build(progress, command, &[DRILL])?;
    built(workspace, Profile::Dev, &[DRILL])
}

fn run_build(
    progress: &Progress,
    mut command: Command,
    programs: &[Program],
) -> Result<(), ProgramsError> {
    toolchain::ensure(progress)?;
    ensure(progress, "building the programs", &PACKAGES)?;
    let names = programs
        .iter()
        .map(|program| program.name)
        .collect::<Vec<_>>()
        .join(", ");
    progress.step(&format!("programs {names}"), |step| {
        Ok(step.run(&mut command)?)
    })
}

/// Where they are.
fn built(
    workspace: &Path,
    profile: Profile,
    programs: &[Program],
) -> Result<Vec<PathBuf>, ProgramsError> {
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

/// Builds a test target, and the program that it starts, as static binaries.
///
/// # Errors
/// It does not build.
pub fn build_test(
    progress: &Progress,
    workspace: &Path,
    test: TestBinary,
) -> Result<BuiltTest, ProgramsError> {
    let mut command = cargo(workspace, "test");
    // The whole workspace, not the test's package: with fewer packages the crates that they share would have fewer features, and be
    // built again.
    command.args([
        "--no-run",
        "--message-format=json-render-diagnostics",
        "--workspace",
        "--test",
        test.name,
    ]);
    progress.step(&format!("test {}", test.name), |step| {
        step.say(format!("           $ {}", shown(&command)));
        let (status, output) = query(&mut command)?;
        if !status.success() {
            return Err(ProgramsError::Build(end(status)));
        }
        let messages = String::from_utf8_lossy(&output);
        let built = |name| executable(&messages, name).ok_or(ProgramsError::NoExecutable(name));
        Ok(BuiltTest {
            binary: built(test.name)?,
            program: test.program.map(built).transpose()?,
        })
    })
}

/// The path in cargo's messages, one JSON object a line.
fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    let ours =
        |message: &Value| message.pointer("/target/name").and_then(Value::as_str) == Some(name);
    let path = |message: Value| message.get("executable")?.as_str().map(PathBuf::from);
    messages
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .filter(ours)
        .find_map(path)
}

impl Profile {
    fn dir(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Dev => "debug",
        }
    }
}

fn cargo_build(workspace: &Path, profile: Profile, programs: &[Program]) -> Command {
    let mut command = cargo(workspace, "build");
    if profile == Profile::Release {
        command.arg("--release");
    }
    for program in programs {
        command.args(["--package", program.package, "--bin", program.name]);
    }
    command
}

/// cargo, to build for where the programs run.
pub(crate) fn cargo(workspace: &Path, verb: &str) -> Command {
    let mut command = Command::new("cargo");
    command
        .args([verb, "--locked", "--target", TARGET])
        .current_dir(workspace);
    command
        .env("RUSTFLAGS", FLAGS)
        .env("RUSTDOCFLAGS", FLAGS)
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
pub(crate) fn target_dir(workspace: &Path) -> PathBuf {
    let named = std::env::var_os("CARGO_TARGET_DIR").filter(|value| !value.is_empty());
    named.map_or_else(|| workspace.join("target"), |dir| workspace.join(dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_static_and_the_host_is_not_touched() {
        let line = shown(&cargo_build(
            Path::new("/w"),
            Profile::Release,
            &[CAPSID, VMM],
        ));
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

    #[test]
    fn the_executable_is_that_of_the_test() {
        let messages = r#"{"reason":"compiler-artifact","target":{"name":"other"},"executable":"/t/other"}
{"reason":"compiler-artifact","target":{"name":"capsid-vmm","kind":["lib"]},"executable":null}
{"reason":"compiler-artifact","target":{"name":"capsid-vmm","kind":["bin"]},"executable":"/t/capsid-vmm"}
{"reason":"compiler-artifact","target":{"name":"system"},"executable":"/t/system-1"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(executable(messages, "system"), Some("/t/system-1".into()));
        assert_eq!(
            executable(messages, "capsid-vmm"),
            Some("/t/capsid-vmm".into())
        );
        assert_eq!(executable(messages, "absent"), None);
    }
}
