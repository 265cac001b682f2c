//! The list of unsafe modules in docs/ARCHITECTURE.md is the list in the code: no more, no fewer.

use std::collections::BTreeSet;
use std::path::Path;

/// Where the list is.
const PAGE: &str = "docs/ARCHITECTURE.md";
/// Under which heading.
const HEADING: &str = "## Unsafe";
/// What a module that needs it says, at its head or above one function.
const MARK: &str = "allow(unsafe_code)]";

/// Each difference between the page and the given files as a sentence; paths are relative to the workspace.
///
/// # Errors
/// The page or a file cannot be read.
pub(super) fn faults(workspace: &Path, files: &[String]) -> std::io::Result<Vec<String>> {
    let listed = listed(&std::fs::read_to_string(workspace.join(PAGE))?);
    let mut allowing = BTreeSet::new();
    for file in files {
        if allows(&std::fs::read_to_string(workspace.join(file))?) {
            allowing.insert(file.clone());
        }
    }
    let unlisted = allowing
        .difference(&listed)
        .map(|file| format!("{file} allows unsafe code and is not in the table of {PAGE}"));
    let stale = listed
        .difference(&allowing)
        .map(|file| format!("{PAGE} lists {file}, which allows no unsafe code"));
    Ok(unlisted.chain(stale).collect())
}

/// The first column of the table under the heading.
fn listed(page: &str) -> BTreeSet<String> {
    page.split_once(HEADING)
        .map_or("", |(_, section)| section)
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .map(str::to_owned)
        .collect()
}

/// Whether a line of the file is the attribute, at whatever depth.
fn allows(text: &str) -> bool {
    text.lines()
        .map(str::trim_start)
        .any(|line| line.starts_with('#') && line.contains(MARK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_s_first_column_is_the_list() {
        let page = "| `not/this.rs` | before |\n## Unsafe\n\n| module | why |\n|---|---|\n| `a/b.rs` | x |\n| `c.rs` | `y` |\n";
        assert_eq!(
            listed(page),
            BTreeSet::from(["a/b.rs".to_owned(), "c.rs".to_owned()])
        );
    }

    #[test]
    fn only_the_attribute_counts() {
        assert!(allows("//! x\n#![allow(unsafe_code)] // why\n"));
        assert!(allows("    #[allow(unsafe_code)]\n    fn f() {}\n"));
        assert!(!allows(
            "// it opens with `#![allow(unsafe_code)]`\nconst MARK: &str = \"allow(unsafe_code)]\";\n"
        ));
    }
}
