//! The list of unsafe modules in docs/ARCHITECTURE.md is the list in the code: no more, no fewer.

use std::collections::BTreeSet;
use std::path::Path;

/// Where the list is.
const PAGE: &str = "docs/ARCHITECTURE.md";
/// Under which heading.
const HEADING: &str = "## Unsafe";
/// The lint, named in an attribute by a module that needs it, at its head or above one item.
const LINT: &str = "unsafe_code";
/// The levels that let it through.
const LEVELS: [&str; 3] = ["allow", "expect", "warn"];

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

/// Whether an attribute of the file lets the lint through: alone, in a list, under a condition, on however many lines.
fn allows(text: &str) -> bool {
    let words = words(text);
    let mut open: Vec<&str> = Vec::new();
    let mut before = "";
    for word in words {
        match word {
            // What stands before a parenthesis is what it belongs to.
            "(" | "[" => open.push(if word == "(" { before } else { word }),
            ")" | "]" => {
                open.pop();
            }
            LINT if open.last().is_some_and(|level| LEVELS.contains(level)) => return true,
            _ => {}
        }
        before = word;
    }
    false
}

/// The words and signs of a Rust source, without comments and without what stands in quotes.
fn words(text: &str) -> Vec<&str> {
    let mut words = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let end = end_of_unread(rest).unwrap_or_else(|| {
            let other = |c: char| !(c.is_alphanumeric() || c == '_');
            let end = rest.find(other).unwrap_or(rest.len()).max(first.len_utf8());
            if !first.is_whitespace() {
                words.push(rest.get(..end).unwrap_or_default());
            }
            end
        });
        rest = rest.get(end..).unwrap_or_default();
    }
    words
}

/// Where the comment or the quotation ends that the text begins with.
fn end_of_unread(text: &str) -> Option<usize> {
    let after = |from: usize, mark: &str| {
        let found = text.get(from..)?.find(mark)?;
        Some(from + found + mark.len())
    };
    let end = if text.starts_with("//") {
        after(2, "\n")
    } else if text.starts_with("/*") {
        end_of_block(text)
    } else if let Some((start, hashes)) = raw(text) {
        after(start, &format!("\"{}", "#".repeat(hashes)))
    } else if text.starts_with('"') {
        end_of_quotes(text, '"')
    } else if text.starts_with('\'') {
        // A lifetime is no quotation: only its quote is skipped.
        Some(end_of_character(text).unwrap_or(1))
    } else {
        return None;
    };
    Some(end.unwrap_or(text.len()))
}

/// Where the text of a raw string starts, and how many `#` it has: `r"`, `r#"`, `br"` and the like.
fn raw(text: &str) -> Option<(usize, usize)> {
    let mark = ["r", "br", "cr"]
        .into_iter()
        .find_map(|mark| text.strip_prefix(mark))?;
    let hashes = mark.find(|c| c != '#')?;
    mark.get(hashes..)?
        .strip_prefix('"')
        .map(|inner| (text.len() - inner.len(), hashes))
}

/// A block comment may hold others.
fn end_of_block(text: &str) -> Option<usize> {
    let mut depth = 0_usize;
    let mut at = 0;
    loop {
        let rest = text.get(at..)?;
        if rest.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if rest.starts_with("*/") {
            depth -= 1;
            at += 2;
        } else {
            at += rest.chars().next()?.len_utf8();
        }
        if depth == 0 {
            return Some(at);
        }
    }
}

fn end_of_quotes(text: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    let ends = |(_, c): &(usize, char)| {
        let end = !escaped && *c == quote;
        escaped = !escaped && *c == '\\';
        end
    };
    let (at, _) = text.char_indices().skip(1).find(ends)?;
    Some(at + quote.len_utf8())
}

/// `'x'` and `'\…'` are characters; `'x` is a lifetime.
fn end_of_character(text: &str) -> Option<usize> {
    let mut characters = text.char_indices().skip(1);
    let (_, first) = characters.next()?;
    let (at, second) = characters.next()?;
    match (first, second) {
        ('\\', _) => end_of_quotes(text, '\''),
        (_, '\'') => Some(at + 1),
        _ => None,
    }
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
    fn every_attribute_that_lets_it_through_counts() {
        for text in [
            "//! x\n#![allow(unsafe_code)] // why\n",
            "    #[allow(unsafe_code)]\n    fn f() {}\n",
            "#![allow(dead_code, unsafe_code)]",
            "#[allow(\n    missing_docs, // all of it\n    unsafe_code,\n    reason = \"generated\"\n)]",
            "#[cfg_attr(not(test), allow(unsafe_code))]",
            "#[expect(unsafe_code, reason = \"x)\")]",
            "#[ warn ( unsafe_code ) ]",
            "let q = ('\"', '\\'', b'\"'); let l: &'a str = r#\"\"\"#;\n#[allow(unsafe_code)]",
        ] {
            assert!(allows(text), "{text}");
        }
    }

    #[test]
    fn what_is_no_such_attribute_does_not() {
        for text in [
            "// it opens with `#![allow(unsafe_code)]`\nconst MARK: &str = \"allow(unsafe_code)]\";\n",
            "/* #[allow(unsafe_code)] /* */ #[allow(unsafe_code)] */",
            "r#\"\n#[allow(unsafe_code)]\n\"#",
            "br\"\\\"; // \"#[allow(unsafe_code)]",
            "#![deny(unsafe_code)]\n#![allow(dead_code)]",
            "#[allow(unsafe_code_of_mine)]",
            "\"\\\\\" // \"\n#[forbid(unsafe_code)]",
        ] {
            assert!(!allows(text), "{text}");
        }
    }
}
