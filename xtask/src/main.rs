//! The developer's door: `cargo xtask SUBCOMMAND`. One file per subcommand; every plain command that it runs is printed.
//!
//! Trusts the person who runs it and the checkout it is in. Depends on no room of the workspace: it runs their programs.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use xtask::testbed::{self, Testbed};
use xtask::{bench, deps, interrupt, kernel, run, test};

/// Build, run and test Capsid. Whatever takes long is kept in /var/cache/capsid (CAPSID_CACHE names another place).
/// CAPSID_KERNEL names a guest kernel to use instead of building ours.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask", version, arg_required_else_help = true)]
struct Arguments {
    #[command(subcommand)]
    subcommand: Xtask,
}

#[derive(Debug, Subcommand)]
enum Xtask {
    /// Figures from the metered testbed, whose clock counts instructions
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Check the arrows between the rooms, and that the shared crates are there in one version
    Deps,
    /// Build the guest kernel, or find it in the cache; prints the path of vmlinux
    Kernel(kernel::Options),
    /// Run a container in a microVM, on this host or in the testbed; without a command, the demo
    Run(run::Run),
    /// Every check and test there is; ends with counts
    Test(test::Test),
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
    match dispatch(&arguments.subcommand) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {}", xtask::chain(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

fn dispatch(subcommand: &Xtask) -> Result<ExitCode, Box<dyn Error>> {
    match subcommand {
        Xtask::Bench(bench) => bench::run(bench, &workspace()),
        Xtask::Deps => Ok(deps::run(&workspace())?),
        Xtask::Kernel(options) => Ok(kernel::run(&workspace(), options)?),
        Xtask::Run(arguments) => run::run(arguments, &workspace()),
        Xtask::Test(arguments) => test::run(arguments, &workspace()),
        Xtask::Testbed(testbed) => testbed::run(testbed, &workspace()),
    }
}

/// The checkout that this xtask was built from.
fn workspace() -> PathBuf {
    let room = Path::new(env!("CARGO_MANIFEST_DIR"));
    room.parent().unwrap_or(room).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }
}
