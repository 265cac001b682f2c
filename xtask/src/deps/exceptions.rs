//! The tables of docs/ARCHITECTURE.md that name the exceptions from a lint are the exceptions in the code: no more, no fewer.

use std::collections::BTreeSet;
use std::path::Path;

/// Where the tables are.
const PAGE: &str = "docs/ARCHITECTURE.md";
/// The levels that let a lint through.
const LEVELS: [&str; 3] = ["allow", "expect", "warn"];

/// A lint that a module is excepted from by an attribute at its head or above one item, and by a line of a table.
struct Rule {
    /// The heading of the table.
    heading: &'static str,
    /// What it is about.
    what: &'static str,
    /// The last words of the lints' names, and of the groups that they are in.
    lints: &'static [&'static str],
    /// Whether code that is compiled for tests alone needs no exception.
    tests_may: bool,
}

const RULES: [Rule; 2] = [
    Rule {
        heading: "## Unsafe",
        what: "unsafe code",
        lints: &["unsafe_code"],
        tests_may: false,
    },
    Rule {
        heading: "## Guest memory",
        what: "every way to guest memory",
        lints: &[
            "disallowed_methods",
            "disallowed_types",
            "style",
            "all",
            "warnings",
        ],
        // They play the driver, whose memory it is.
        tests_may: true,
    },
];

/// Each difference between the page and the given files as a sentence; paths are relative to the workspace.
///
/// # Errors
/// The page or a file cannot be read.
pub(super) fn faults(workspace: &Path, files: &[String]) -> std::io::Result<Vec<String>> {
    let page = std::fs::read_to_string(workspace.join(PAGE))?;
    let mut allowing = [const { BTreeSet::new() }; RULES.len()];
    for file in files {
        let text = std::fs::read_to_string(workspace.join(file))?;
        for (rule, allowing) in RULES.iter().zip(&mut allowing) {
            if rule.lets_through(&text) {
                allowing.insert(file.clone());
            }
        }
    }
    let rules = RULES.iter().zip(&allowing);
    let faults = rules.flat_map(|(rule, allowing)| rule.faults(&page, allowing));
    Ok(faults.collect())
}

impl Rule {
    fn faults(&self, page: &str, allowing: &BTreeSet<String>) -> Vec<String> {
        let listed = listed(page, self.heading);
        let (what, heading) = (self.what, self.heading);
        let unlisted = allowing.difference(&listed).map(|file| {
            format!("{file} allows {what} and is not in the table under \"{heading}\" of {PAGE}")
        });
        let stale = listed
            .difference(allowing)
            .map(|file| format!("{PAGE} lists {file}, which does not allow {what}"));
        unlisted.chain(stale).collect()
    }

    /// Whether an attribute of the file lets one of the lints through: alone, in a list, under a condition, on however many lines.
    fn lets_through(&self, text: &str) -> bool {
        let words = words(text);
        let mut open: Vec<&str> = Vec::new();
        let mut before = "";
        // How many were open before a condition that only tests fulfil.
        let mut tests: Option<usize> = None;
        for (at, word) in words.iter().enumerate() {
            match *word {
                // What stands before a parenthesis is what it belongs to.
                "(" | "[" => {
                    let condition = words.get(at + 1..at + 3) == Some(&["test", ","]);
                    if before == "cfg_attr" && condition && self.tests_may {
                        tests.get_or_insert(open.len());
                    }
                    open.push(if *word == "(" { before } else { word });
                }
                ")" | "]" => {
                    open.pop();
                    tests = tests.filter(|below| open.len() > *below);
                }
                lint if self.lints.contains(&lint) => {
                    let level = open.last().is_some_and(|level| LEVELS.contains(level));
                    if level && tests.is_none() {
                        return true;
                    }
                }
                _ => {}
            }
            before = word;
        }
        false
    }
}

/// The first column of the table under the heading.
fn listed(page: &str, heading: &str) -> BTreeSet<String> {
    let section = page.split_once(heading).map_or("", |(_, rest)| rest);
    let section = section.split("\n## ").next().unwrap_or_default();
    section
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .map(str::to_owned)
        .collect()
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

    const UNSAFE: &Rule = &RULES[0];
    const MEMORY: &Rule = &RULES[1];

    #[test]
    fn the_table_s_first_column_is_the_list() {
        let page = "| `not/this.rs` | before |\n## Unsafe\n\n| module | why |\n|---|---|\n| `a/b.rs` | x |\n| `c.rs` | `y` |\n\n## More\n| `d.rs` | after |\n";
        assert_eq!(
            listed(page, "## Unsafe"),
            BTreeSet::from(["a/b.rs".to_owned(), "c.rs".to_owned()])
        );
    }

    #[test]
    fn an_exception_that_is_not_listed_and_a_line_without_one_are_faults() {
        let page = "## Guest memory\n| `a.rs` | x |\n## Unsafe\n| `b.rs` | x |\n";
        let allowing = |file: &str| BTreeSet::from([file.to_owned()]);
        assert_eq!(MEMORY.faults(page, &allowing("a.rs")), [""; 0]);
        assert_eq!(
            MEMORY.faults(page, &allowing("b.rs")),
            [
                "b.rs allows every way to guest memory and is not in the table under \"## Guest memory\" of docs/ARCHITECTURE.md",
                "docs/ARCHITECTURE.md lists a.rs, which does not allow every way to guest memory",
            ]
        );
    }

    #[test]
    fn every_attribute_that_lets_the_memory_lints_through_counts_but_for_tests() {
        for text in [
            "#![allow(clippy::disallowed_methods)]",
            "#[expect(dead_code, clippy::disallowed_types, reason = \"x\")]",
            "#![allow(clippy::all)]",
            "#[allow(clippy::style)]",
            "#![allow(warnings)]",
            "#![cfg_attr(not(test), allow(clippy::disallowed_methods))]",
            "#![cfg_attr(any(test, feature = \"x\"), allow(clippy::disallowed_methods))]",
            "#![cfg_attr(test, allow(dead_code))]\n#![allow(clippy::disallowed_methods)]",
        ] {
            assert!(MEMORY.lets_through(text), "{text}");
        }
        for text in [
            "#![cfg_attr(test, allow(clippy::disallowed_methods, clippy::disallowed_types))]",
            "#![deny(clippy::all)]",
            "#[allow(clippy::indexing_slicing)]\nfn all(style: u8) {}",
        ] {
            assert!(!MEMORY.lets_through(text), "{text}");
        }
        assert!(UNSAFE.lets_through("#![cfg_attr(test, allow(unsafe_code))]"));
    }

    #[test]
    fn every_attribute_that_lets_unsafe_code_through_counts() {
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
            assert!(UNSAFE.lets_through(text), "{text}");
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
            assert!(!UNSAFE.lets_through(text), "{text}");
        }
    }
}
