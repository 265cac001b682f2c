//! Rust's formatter and lints, which are programs apart from cargo: packages of their own in Debian, components of a toolchain
//! that rustup keeps. A toolchain of rustup's never gets Debian's, which are of another version.

use std::process::{Command, Stdio};

use super::Suite;
use crate::command::{self, CommandError};
use crate::packages::{self, Package, PackagesError};
use crate::progress::Progress;
use crate::toolchain::{CLIPPY as CLIPPY_PACKAGE, RUSTFMT, is_debians_cargo};

/// A subcommand of cargo that may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Tool {
    subcommand: &'static str,
    component: &'static str,
    package: Package,
}

const FMT: Tool = Tool {
    subcommand: "fmt",
    component: "rustfmt",
    package: RUSTFMT,
};
const CLIPPY: Tool = Tool {
    subcommand: "clippy",
    component: "clippy",
    package: CLIPPY_PACKAGE,
};

/// Why a subcommand is not there.
#[derive(Debug, thiserror::Error)]
pub(super) enum ToolError {
    /// The toolchain is not Debian's.
    #[error(
        "`cargo {subcommand}` does not work, and this cargo is not Debian's: run `rustup component add {component}`, or add it to the toolchain as you installed that"
    )]
    NotDebians {
        subcommand: &'static str,
        component: &'static str,
    },
    /// It is installed and does not work.
    #[error("`cargo {subcommand}` does not work, although Debian's {} is installed", package.name)]
    Broken {
        subcommand: &'static str,
        package: Package,
    },
    #[error(transparent)]
    Packages(#[from] PackagesError),
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// Sees to it that the subcommands of cargo work that these suites call.
pub(super) fn ensure(progress: &Progress, suites: &[Suite]) -> Result<(), ToolError> {
    let mut missing = Vec::new();
    for tool in suites.iter().copied().filter_map(tool) {
        if !works(tool)? {
            missing.push(tool);
        }
    }
    let Some(first) = missing.first() else {
        return Ok(());
    };
    if !is_debians_cargo() {
        return Err(ToolError::NotDebians {
            subcommand: first.subcommand,
            component: first.component,
        });
    }
    let wanted: Vec<Package> = missing.iter().map(|tool| tool.package).collect();
    packages::ensure(progress, "checking format and lints", &wanted)?;
    for tool in missing {
        if !works(tool)? {
            return Err(ToolError::Broken {
                subcommand: tool.subcommand,
                package: tool.package,
            });
        }
    }
    Ok(())
}

fn tool(suite: Suite) -> Option<Tool> {
    match suite {
        Suite::Fmt => Some(FMT),
        Suite::Clippy => Some(CLIPPY),
        _ => None,
    }
}

fn works(tool: Tool) -> Result<bool, CommandError> {
    let mut version = Command::new("cargo");
    version
        .args([tool.subcommand, "--version"])
        .stderr(Stdio::null());
    let (status, _) = command::query(&mut version)?;
    Ok(status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_suites_that_call_them_need_them() {
        let tools: Vec<Tool> = [Suite::Fmt, Suite::Deps, Suite::Clippy, Suite::Unit]
            .into_iter()
            .filter_map(tool)
            .collect();
        assert_eq!(tools, [FMT, CLIPPY]);
    }

    #[test]
    fn the_refusal_names_the_command_to_run() {
        let error = ToolError::NotDebians {
            subcommand: CLIPPY.subcommand,
            component: CLIPPY.component,
        };
        assert!(
            error
                .to_string()
                .contains("run `rustup component add clippy`"),
            "{error}"
        );
    }
}
