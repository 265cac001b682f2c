//! `cargo deny`: licences, sources and bans always; advisories where their database can be had.

use std::error::Error;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::check;
use super::count::Count;
use crate::cache::Key;
use crate::command::{self, OnInterrupt, shown};
use crate::testbed::saved::Context;

/// The version whose configuration deny.toml is.
const VERSION: &str = "0.20.2";

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

/// The program on the search path if it is the right one, else one of our own in the cache.
fn ensure(context: &Context<'_>) -> Result<PathBuf, Box<dyn Error>> {
    let installed = Command::new("cargo-deny").arg("--version").output();
    if installed.is_ok_and(|output| {
        String::from_utf8_lossy(&output.stdout).trim() == format!("cargo-deny {VERSION}")
    }) {
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
                    "--version",
                    VERSION,
                    "cargo-deny",
                    "--root",
                ])
                .arg(dir);
            command.arg("--target-dir").arg(dir.join("target"));
            step.run(&mut command)?;
            std::fs::remove_dir_all(dir.join("target"))?;
            Ok(())
        })
    })?;
    Ok(dir.join("bin/cargo-deny"))
}
