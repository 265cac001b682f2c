//! `cargo deny`: licences, sources and bans always; advisories where their database can be had.

use std::error::Error;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::check;
use super::count::Count;
use crate::cache::Key;
use crate::command::{self, OnInterrupt, shown};
use crate::testbed::saved::Context;

/// The version that is built where none is installed: the last that Debian 13's compiler, our oldest, can build.
const VERSION: &str = "0.18.3";
/// The releases that understand deny.toml.
const RELEASES: [&str; 3] = ["0.18.", "0.19.", "0.20."];

/// Runs the checks.
pub(super) fn run(context: &Context<'_>) -> Result<Count, Box<dyn Error>> {
    let program = ensure(context)?;
    let deny = |words: &[&str]| {
        let mut command = Command::new(&program);
        command.args(words).current_dir(context.workspace);
        command
    };
    let mut count = check(&mut deny(&[
        "--workspace",
        "check",
        "bans",
        "licenses",
        "sources",
    ]))?;
    let mut fetch = deny(&["fetch", "db"]);
    eprintln!("           $ {}", shown(&fetch));
    fetch
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut fetching = command::spawn(&mut fetch, OnInterrupt::Kill)?;
    if fetching.child.wait()?.success() {
        count.add(check(&mut deny(&["--workspace", "check", "advisories"]))?);
    } else {
        let why = "their database cannot be fetched from here";
        println!("SKIPPED security advisories: {why}");
        count.add(Count::skipped_one("security advisories", why));
    }
    Ok(count)
}

/// The program on the search path if it understands our configuration, else one of our own in the cache.
fn ensure(context: &Context<'_>) -> Result<PathBuf, Box<dyn Error>> {
    let installed = Command::new("cargo-deny").arg("--version").output();
    if installed.is_ok_and(|output| understands(&String::from_utf8_lossy(&output.stdout))) {
        return Ok("cargo-deny".into());
    }
    let key = Key::builder().bytes("cargo-deny").bytes(VERSION).finish();
    let dir = context.cache.get_or_build("cargo-deny", &key, |dir| {
        context.progress.step("cargo-deny", |step| {
            let mut command = Command::new("cargo");
            command
                .args([
                    "install",
                    "--locked",
                    // It runs for seconds, and optimised takes three times as long to build.
                    "--debug",
                    "--version",
                    VERSION,
                    "cargo-deny",
                    "--root",
                ])
                .arg(dir);
            command
                .arg("--target-dir")
                .arg(dir.join("target"))
                .env("CARGO_PROFILE_DEV_DEBUG", "0");
            step.run(&mut command)?;
            std::fs::remove_dir_all(dir.join("target"))?;
            Ok(())
        })
    })?;
    Ok(dir.join("bin/cargo-deny"))
}

/// Whether a cargo-deny that says this of itself takes our configuration.
fn understands(version: &str) -> bool {
    let version = version.trim().strip_prefix("cargo-deny ");
    version.is_some_and(|version| RELEASES.iter().any(|release| version.starts_with(release)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_that_is_built_is_one_of_those_taken() {
        assert!(understands(&format!("cargo-deny {VERSION}\n")));
        assert!(understands("cargo-deny 0.20.2"));
        for other in [
            "",
            "cargo-deny 0.17.0",
            "cargo-deny 0.180.1",
            "cargo 0.18.3",
        ] {
            assert!(!understands(other), "{other}");
        }
    }
}
