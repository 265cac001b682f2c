//! `cargo xtask deps`: the arrows between the rooms, one version of the crates that two of them must share, and who is excepted from a lint.
//!
//! A room is a directory of the workspace's root. An arrow that is not in `ARROWS` fails the check, whether it is a normal, a
//! build or a test dependency: a new one is a decision (docs/ARCHITECTURE.md), not a line in a manifest.

mod exceptions;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use serde::Deserialize;

use crate::command::{self, CommandError};

/// `(X, Y)`: room X may depend on room Y. Nothing else may, and `xtask` on nothing.
const ARROWS: [(&str, &str); 14] = [
    ("shim", "protocol"),
    ("shim", "owner"),
    ("owner", "protocol"),
    ("agent", "protocol"),
    ("vmm", "protocol"),
    ("vmm", "devices"),
    ("cli", "protocol"),
    ("cli", "owner"),
    ("tests", "protocol"),
    ("tests", "owner"),
    ("fuzz", "protocol"),
    ("fuzz", "devices"),
    ("fuzz", "vmm"),
    ("fuzz", "cli"),
];

/// Guest memory and queues cross between `vmm`, `devices` and the file-system crates: two versions would be two types.
const ONE_VERSION: [&str; 2] = ["vm-memory", "virtio-queue"];

/// Why the check could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DepsError {
    /// `cargo metadata` did not run.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// `cargo metadata` said no; it told why on stderr.
    #[error("`cargo metadata` ended with {0}")]
    Metadata(String),
    /// `git ls-files` said no; it told why on stderr.
    #[error("`git ls-files` ended with {0}")]
    Git(String),
    /// A source file or the page that lists the exceptions from lints.
    #[error("reading the sources for exceptions from lints")]
    Read(#[source] std::io::Error),
    /// Its answer is not what it used to be.
    #[error("reading the answer of `cargo metadata`")]
    Parse(#[from] serde_json::Error),
}

#[derive(Debug, Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    workspace_members: Vec<String>,
    workspace_root: PathBuf,
    resolve: Resolve,
}

#[derive(Debug, Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    manifest_path: PathBuf,
}

#[derive(Debug, Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Debug, Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dep>,
}

#[derive(Debug, Deserialize)]
struct Dep {
    pkg: String,
}

/// Checks the workspace and prints each fault.
///
/// # Errors
/// The check could not be made.
pub fn run(workspace: &Path) -> Result<ExitCode, DepsError> {
    let mut faults = faults(&metadata(workspace)?);
    let exceptions = exceptions::faults(workspace, &sources(workspace)?);
    faults.extend(exceptions.map_err(DepsError::Read)?);
    for fault in &faults {
        println!("deps: {fault}");
    }
    if faults.is_empty() {
        println!("deps: every arrow is an allowed one, every exception from a lint a listed one");
        return Ok(ExitCode::SUCCESS);
    }
    Ok(ExitCode::FAILURE)
}

fn metadata(workspace: &Path) -> Result<Metadata, DepsError> {
    let mut command = Command::new("cargo");
    command
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(workspace);
    let (status, output) = command::query(&mut command)?;
    if !status.success() {
        return Err(DepsError::Metadata(command::end(status)));
    }
    Ok(serde_json::from_slice(&output)?)
}

/// The Rust files that git tracks.
fn sources(workspace: &Path) -> Result<Vec<String>, DepsError> {
    let mut command = Command::new("git");
    command.args(["ls-files", "*.rs"]).current_dir(workspace);
    let (status, output) = command::query(&mut command)?;
    if !status.success() {
        return Err(DepsError::Git(command::end(status)));
    }
    let names = String::from_utf8_lossy(&output);
    Ok(names.lines().map(str::to_owned).collect())
}

/// Each fault as a sentence.
fn faults(metadata: &Metadata) -> Vec<String> {
    let mut faults = arrows(metadata)
        .into_iter()
        .filter(|(from, to)| !ARROWS.contains(&(from.as_str(), to.as_str())))
        .map(|(from, to)| format!("{from} -> {to} is a new arrow: rooms depend on each other only as ARROWS in xtask/src/deps.rs says"))
        .collect::<Vec<_>>();
    for name in ONE_VERSION {
        let versions: BTreeSet<&str> = metadata
            .packages
            .iter()
            .filter(|p| p.name == name)
            .map(|p| p.version.as_str())
            .collect();
        if versions.len() > 1 {
            let list = versions.into_iter().collect::<Vec<_>>().join(", ");
            faults.push(format!("{name} is in the tree in several versions ({list}): `cargo tree -i {name}` shows who asks"));
        }
    }
    faults
}

/// The arrows between different rooms.
fn arrows(metadata: &Metadata) -> BTreeSet<(String, String)> {
    let rooms: BTreeMap<&str, String> = metadata
        .packages
        .iter()
        .filter(|package| metadata.workspace_members.contains(&package.id))
        .map(|package| {
            (
                package.id.as_str(),
                room(&metadata.workspace_root, &package.manifest_path),
            )
        })
        .collect();
    let mut arrows = BTreeSet::new();
    for node in &metadata.resolve.nodes {
        let Some(from) = rooms.get(node.id.as_str()) else {
            continue;
        };
        for dep in &node.deps {
            if let Some(to) = rooms.get(dep.pkg.as_str()) {
                if from != to {
                    arrows.insert((from.clone(), to.clone()));
                }
            }
        }
    }
    arrows
}

fn room(root: &Path, manifest: &Path) -> String {
    let below = manifest.strip_prefix(root).unwrap_or(manifest);
    below
        .components()
        .next()
        .map(|first| first.as_os_str().to_string_lossy().into_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workspace(edges: &[(&str, &str)], others: &[(&str, &str)]) -> Metadata {
        let names: BTreeSet<&str> = edges.iter().flat_map(|(from, to)| [*from, *to]).collect();
        let members = names.iter().map(|name| Package {
            id: (*name).to_owned(),
            name: format!("capsid-{name}"),
            version: "0.1.0".to_owned(),
            manifest_path: format!("/w/{name}/Cargo.toml").into(),
        });
        let foreign = others.iter().map(|(name, version)| Package {
            id: format!("{name}@{version}"),
            name: (*name).to_owned(),
            version: (*version).to_owned(),
            manifest_path: format!("/registry/{name}/Cargo.toml").into(),
        });
        Metadata {
            packages: members.chain(foreign).collect(),
            workspace_members: names.iter().map(|name| (*name).to_owned()).collect(),
            workspace_root: "/w".into(),
            resolve: Resolve {
                nodes: edges
                    .iter()
                    .map(|(from, to)| Node {
                        id: (*from).to_owned(),
                        deps: vec![Dep {
                            pkg: (*to).to_owned(),
                        }],
                    })
                    .collect(),
            },
        }
    }

    #[test]
    fn the_allowed_arrows_pass() {
        assert_eq!(
            faults(&workspace(&ARROWS, &[("vm-memory", "0.17.1")])),
            Vec::<String>::new()
        );
    }

    #[test]
    fn an_arrow_back_is_a_fault() {
        let faults = faults(&workspace(&[("devices", "vmm")], &[]));
        assert_eq!(faults.len(), 1);
        assert!(
            faults
                .iter()
                .all(|fault| fault.starts_with("devices -> vmm is a new arrow")),
            "{faults:?}"
        );
    }

    #[test]
    fn xtask_depends_on_no_room() {
        assert_eq!(faults(&workspace(&[("xtask", "protocol")], &[])).len(), 1);
    }

    #[test]
    fn two_versions_of_guest_memory_are_a_fault() {
        let faults = faults(&workspace(
            &[],
            &[
                ("vm-memory", "0.17.1"),
                ("vm-memory", "0.16.0"),
                ("libc", "1"),
                ("libc", "2"),
            ],
        ));
        assert_eq!(faults.len(), 1);
        assert!(
            faults.iter().all(|fault| fault.contains("0.16.0, 0.17.1")),
            "{faults:?}"
        );
    }
}
