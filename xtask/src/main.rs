//! The developer's door: `cargo xtask SUBCOMMAND`. One file per subcommand; every plain command that it runs is printed.
//!
//! Trusts the person who runs it and the checkout it is in. Depends on no room of the workspace: it runs their programs.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xtask::testbed::{self, Testbed};
use xtask::{deps, interrupt, kernel};

/// Build, run and test Capsid. Whatever takes long is kept in /var/cache/capsid (CAPSID_CACHE names another place).
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    subcommand: Xtask,
}

#[derive(Debug, Subcommand)]
enum Xtask {
    /// Check the arrows between the rooms, and that the shared crates are there in one version
    Deps,
    /// Build the guest kernel, or find it in the cache; prints the path of vmlinux
    Kernel(kernel::Options),
    /// An emulated host with a real KVM, for machines that have none
    #[command(subcommand)]
    Testbed(Testbed),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Err(error) = interrupt::install() {
        eprintln!("xtask: installing signal handlers: {error}");
        return ExitCode::FAILURE;
    }
    match run(&arguments.subcommand) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {}", chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn run(subcommand: &Xtask) -> Result<ExitCode, Box<dyn Error>> {
    match subcommand {
        Xtask::Deps => Ok(deps::run(&workspace())?),
        Xtask::Kernel(options) => Ok(kernel::run(&workspace(), options)?),
        Xtask::Testbed(testbed) => testbed::run(testbed, &workspace()),
    }
}

/// The checkout that this xtask was built from.
fn workspace() -> PathBuf {
    let room = Path::new(env!("CARGO_MANIFEST_DIR"));
    room.parent().unwrap_or(room).to_owned()
}

/// The error and its causes, once each.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_chain_names_every_cause() {
        let cause = std::io::Error::from(std::io::ErrorKind::NotFound);
        let error = xtask::cache::CacheError::Io {
            doing: "opening",
            path: "/x".into(),
            cause,
        };
        assert_eq!(chain(&error), "opening /x: entity not found");
    }
}
