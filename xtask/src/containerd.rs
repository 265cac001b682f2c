//! The containerds that the shim is tried under, beside the one in the testbed's image: what Debian's next release will have, and the
//! newest of those that its authors maintain for long.
//!
//! Each is a cache entry with three programs. They need a C library no newer than the testbed's, or none. Trusts apt for Debian's package, whose
//! hash Debian's signed index names, and `go.sum` for the sources of the other.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::artifacts::Artifacts;
use crate::cache::Key;
use crate::command;
use crate::packages::release::Lists;
use crate::packages::{self, Package, PackagesError, any, at_least};
use crate::progress::Step;
use crate::testbed::saved::Context;

/// Of each containerd: itself, its client, and its own shim.
const PROGRAMS: [&str; 3] = ["containerd", "ctr", "containerd-shim-runc-v2"];
/// Raise when a recipe below changes in a way that its key does not see.
const RECIPE: &str = "1";

/// Debian's package and the release that it is taken from. The mirror keeps one version of it; the cache keeps the one that was
/// fetched first.
const DEBIAN: (&str, &str) = ("containerd", "sid");
const DEBIAN_PACKAGES: [Package; 1] = [any("debian-archive-keyring")];
/// Those that start a shim without BootstrapParams and take version 3 of its answer; for these Debian's is here.
const DEBIAN_WANTED: [&str; 3] = ["2.0.", "2.1.", "2.2."];

/// The Go module that names the other, with all it is made of.
const MODULE: &str = "tests/tools/containerd";
/// The oldest Go that fetches by itself the one that a module asks for.
const OLDEST_GO: (u32, u32) = (1, 21);
/// Debian's package of it.
const GO: Package = at_least("golang-go", "2:1.21");
/// Room in the cache while it is being built: sources and objects.
const GO_ROOM_MIB: u64 = 3072;
/// What a person who waits for it is told.
const GO_NOTICE: &str = "the newest containerd is built once, in some 110 CPU-seconds";
/// Static, without the paths of this machine, and small: nobody debugs it.
const GO_BUILD: [&str; 4] = ["build", "-trimpath", "-ldflags=-s -w", "-o"];

/// Why there is no containerd.
#[derive(Debug, thiserror::Error)]
pub enum ContainerdError {
    /// apt brought something else.
    #[error("apt brought no package {} from Debian's {}", DEBIAN.0, DEBIAN.1)]
    NoPackage,
    /// Debian has moved on.
    #[error(
        "Debian's {} has containerd {found:?}, and the tests know how 2.x speaks to a shim: look in xtask/src/containerd.rs for what it is wanted for",
        DEBIAN.1
    )]
    NotTwo {
        /// What its control file says.
        found: String,
    },
}

/// Adds them, each as a directory that a variable names.
///
/// # Errors
/// One could not be made.
pub fn add(context: &Context<'_>, artifacts: &mut Artifacts) -> Result<(), Box<dyn Error>> {
    let debians = debians(context)?;
    let version = std::fs::read_to_string(debians.join("version"))?;
    if !DEBIAN_WANTED.iter().any(|start| version.starts_with(start)) {
        let text = format!(
            "containerd {version} of Debian's {} is not of 2.0 to 2.2: how those start a shim is not tried",
            DEBIAN.1
        );
        context.progress.say(&text);
    }
    let places = [
        ("CAPSID_CONTAINERD_V2_1", debians, "lib/containerd-2.1"),
        (
            "CAPSID_CONTAINERD_V2_3",
            newest(context)?,
            "lib/containerd-2.3",
        ),
    ];
    for (variable, here, inside) in places {
        artifacts.add(Some(variable), here, inside);
    }
    Ok(())
}

/// Debian's, unpacked: the machine may have another installed.
fn debians(context: &Context<'_>) -> Result<PathBuf, Box<dyn Error>> {
    let (package, release) = DEBIAN;
    let key = Key::builder()
        .bytes(RECIPE)
        .bytes(package)
        .bytes(release)
        .finish();
    if let Some(dir) = context.cache.get("containerd-debian", &key) {
        return Ok(dir);
    }
    packages::ensure(context.progress, "a newer containerd", &DEBIAN_PACKAGES)?;
    let dir = context
        .cache
        .get_or_build("containerd-debian", &key, |dir| {
            let mirror = packages::mirror()?;
            context
                .progress
                .step("containerd of Debian", |step| unpack(step, &mirror, dir))
        })?;
    Ok(dir)
}

fn unpack(step: &Step, mirror: &str, dir: &Path) -> Result<(), Box<dyn Error>> {
    let (package, release) = DEBIAN;
    let work = dir.join("work");
    let lists = Lists::update(step, "deb", mirror, release, &work)?;
    step.run(&mut lists.apt(&["download", package]))?;
    let deb = lists.only("deb").ok_or(ContainerdError::NoPackage)?;
    let mut field = Command::new("dpkg-deb");
    let (_, version) = command::query(field.arg("--field").arg(&deb).arg("Version"))?;
    let version = two(&String::from_utf8_lossy(&version))?;
    let unpacked = work.join("unpacked");
    step.run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&unpacked))?;
    for program in PROGRAMS {
        std::fs::copy(unpacked.join("usr/bin").join(program), dir.join(program))?;
    }
    std::fs::write(dir.join("version"), version)?;
    std::fs::remove_dir_all(work)?;
    Ok(())
}

/// The version, if it is 2.x.
fn two(version: &str) -> Result<String, ContainerdError> {
    let found = version.trim().to_owned();
    if found.starts_with("2.") {
        Ok(found)
    } else {
        Err(ContainerdError::NotTwo { found })
    }
}

/// The one that the Go module names.
fn newest(context: &Context<'_>) -> Result<PathBuf, Box<dyn Error>> {
    let module = context.workspace.join(MODULE);
    let key = GO_BUILD
        .iter()
        .chain(&PROGRAMS)
        .fold(Key::builder().bytes(RECIPE), |key, part| key.bytes(part))
        .dir(&module)?
        .finish();
    if let Some(dir) = context.cache.get("containerd-go", &key) {
        return Ok(dir);
    }
    context.cache.require_room(GO_ROOM_MIB)?;
    ensure_go(context)?;
    let dir = context.cache.get_or_build("containerd-go", &key, |dir| {
        context.progress.say(GO_NOTICE);
        context
            .progress
            .step("containerd of Go", |step| build(step, &module, dir))
    })?;
    Ok(dir)
}

/// The work is done below the entry, so that it goes with it when we are killed.
fn build(step: &Step, module: &Path, dir: &Path) -> Result<(), Box<dyn Error>> {
    let work = dir.join("work");
    std::fs::create_dir(&work)?;
    let mut go = Command::new("go");
    // The last slash says that it is a directory; the last word stands for the programs that the module names.
    go.args(GO_BUILD).arg(dir.join("")).arg("tool");
    go.env("CGO_ENABLED", "0")
        .env("GOTOOLCHAIN", "auto")
        .env("GOFLAGS", "-mod=readonly -modcacherw -buildvcs=false")
        .env("GOWORK", "off")
        .env("GOMODCACHE", work.join("modules"))
        .env("GOCACHE", work.join("objects"))
        .env("GOPATH", work.join("path"));
    step.run(go.current_dir(module))?;
    std::fs::remove_dir_all(work)?;
    Ok(())
}

/// Any Go that is new enough will do, wherever it is from; where there is none, Debian's.
fn ensure_go(context: &Context<'_>) -> Result<(), PackagesError> {
    let mut version = Command::new("go");
    version.args(["env", "GOVERSION"]).stderr(Stdio::null());
    // It may not be there at all.
    let found = command::query(&mut version).is_ok_and(|(status, output)| {
        status.success() && new_enough(&String::from_utf8_lossy(&output))
    });
    if found {
        return Ok(());
    }
    packages::ensure(context.progress, "building the newest containerd", &[GO])
}

/// `go1.26.8`, `go1.27rc1` and the like.
fn new_enough(version: &str) -> bool {
    let Some(rest) = version.trim().strip_prefix("go") else {
        return false;
    };
    let mut numbers = rest
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= OLDEST_GO,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_go_that_fetches_another_is_new_enough() {
        for version in ["go1.21.0\n", "go1.26.8", "go1.27rc1", "go2.0"] {
            assert!(new_enough(version), "{version}");
        }
        for version in ["", "go1.19.8", "devel", "1.26.8", "gox"] {
            assert!(!new_enough(version), "{version}");
        }
    }

    #[test]
    fn another_containerd_than_2_is_refused_by_its_version() {
        assert_eq!(two("2.1.9+ds1-5\n").expect("2"), "2.1.9+ds1-5");
        for version in ["1.7.24~ds1-6", "3.0.0-1", "20.1", ""] {
            let text = two(version).expect_err("refused").to_string();
            assert!(text.contains(&format!("{version:?}")), "{text}");
        }
    }
}
