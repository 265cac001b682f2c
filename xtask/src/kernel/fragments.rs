//! The kernel's configuration fragments: what they ask for, and whether a `.config` gives it.
//!
//! A fragment line is a request (`CONFIG_X=value` or `# CONFIG_X is not set`), a comment or blank; anything else is refused with
//! its place, because Kconfig itself drops what it does not understand without a word. Trusts the checkout.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

const PREFIX: &str = "CONFIG_";
const NOT_SET: &str = " is not set";
const EXTENSION: &str = "config";

/// Why the fragments were refused.
#[derive(Debug, thiserror::Error)]
pub enum FragmentError {
    /// A file could not be read.
    #[error("reading {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        cause: std::io::Error,
    },
    /// No fragment at all.
    #[error("{} holds no *.{EXTENSION} file", dir.display())]
    None {
        /// Where they should be.
        dir: PathBuf,
    },
    /// A line is neither request nor comment.
    #[error("{place}: {problem}")]
    Line {
        /// Fragment and line.
        place: Place,
        /// What is wrong and how to write it.
        problem: String,
    },
    /// One symbol, two requests.
    #[error("{second}: CONFIG_{symbol} is asked for in {first} already")]
    Twice {
        /// The symbol, without `CONFIG_`.
        symbol: String,
        /// Where it was asked for first.
        first: Place,
        /// Where again.
        second: Place,
    },
}

/// A line of a fragment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The fragment's file name.
    pub fragment: String,
    /// Counted from 1.
    pub line: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} line {}", self.fragment, self.line)
    }
}

/// What a fragment asks of one symbol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// This value, as it is written in `.config`.
    Value(String),
    /// Not built.
    NotSet,
}

/// One request of one fragment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// The symbol, without `CONFIG_`.
    pub symbol: String,
    /// What is asked.
    pub wanted: Wanted,
    /// By whom.
    pub place: Place,
}

impl fmt::Display for Request {
    /// The line of the fragment.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.wanted {
            Wanted::Value(value) => write!(f, "{PREFIX}{}={value}", self.symbol),
            Wanted::NotSet => write!(f, "# {PREFIX}{}{NOT_SET}", self.symbol),
        }
    }
}

/// Every request of every fragment, each symbol once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requests(Vec<Request>);

impl Requests {
    /// Reads every fragment in a directory.
    ///
    /// # Errors
    /// One cannot be read, a line is not a request, a symbol is asked for twice, or there is no fragment.
    pub fn read(dir: &Path) -> Result<Self, FragmentError> {
        let failed = |path: &Path, cause| FragmentError::Read {
            path: path.to_owned(),
            cause,
        };
        let mut paths = std::fs::read_dir(dir)
            .and_then(|entries| {
                entries
                    .map(|entry| Ok(entry?.path()))
                    .collect::<Result<Vec<_>, _>>()
            })
            .map_err(|cause| failed(dir, cause))?;
        paths.retain(|path| path.extension() == Some(EXTENSION.as_ref()));
        paths.sort();
        if paths.is_empty() {
            return Err(FragmentError::None {
                dir: dir.to_owned(),
            });
        }
        let mut texts = Vec::new();
        for path in paths {
            let text = std::fs::read_to_string(&path).map_err(|cause| failed(&path, cause))?;
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            texts.push((name.into_owned(), text));
        }
        Self::parse(&texts)
    }

    /// Reads fragments given as `(name, text)`.
    ///
    /// # Errors
    /// A line is not a request, or a symbol is asked for twice.
    pub fn parse(fragments: &[(String, String)]) -> Result<Self, FragmentError> {
        let mut requests: Vec<Request> = Vec::new();
        let mut seen: BTreeMap<String, Place> = BTreeMap::new();
        for (fragment, text) in fragments {
            for (index, line) in text.lines().enumerate() {
                let place = Place {
                    fragment: fragment.clone(),
                    line: index + 1,
                };
                let Some(request) = request(line, &place)? else {
                    continue;
                };
                if let Some(first) = seen.insert(request.symbol.clone(), place.clone()) {
                    return Err(FragmentError::Twice {
                        symbol: request.symbol,
                        first,
                        second: place,
                    });
                }
                requests.push(request);
            }
        }
        Ok(Self(requests))
    }

    /// How many symbols are asked for.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing is asked for.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The text that Kconfig reads as `KCONFIG_ALLCONFIG`; also what identifies the requests.
    pub fn all_config(&self) -> String {
        self.0
            .iter()
            .map(|request| format!("{request}\n"))
            .collect()
    }

    /// What the configuration does not give. `known` are the symbols of this kernel: asking that a symbol of no kernel be off
    /// is a spelling mistake that would go unnoticed.
    pub fn unmet(&self, config: &Config, known: &BTreeSet<String>) -> Vec<Unmet> {
        self.0
            .iter()
            .filter_map(|request| {
                let got = config.0.get(&request.symbol);
                let why = if !known.contains(&request.symbol) {
                    Why::Unknown
                } else {
                    match (&request.wanted, got) {
                        (Wanted::Value(wanted), Some(got)) if wanted == got => return None,
                        (Wanted::NotSet, None) => return None,
                        (_, Some(got)) => Why::Is(got.clone()),
                        (_, None) => Why::NotSet,
                    }
                };
                Some(Unmet {
                    request: request.clone(),
                    why,
                })
            })
            .collect()
    }
}

/// A request that `.config` does not meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unmet {
    /// The request.
    pub request: Request,
    /// Why not.
    pub why: Why,
}

/// Why a request is not met.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Why {
    /// No Kconfig file of this kernel has the symbol.
    Unknown,
    /// It is off: something it depends on is missing.
    NotSet,
    /// It has another value: something selects it, or it has no prompt.
    Is(String),
}

impl fmt::Display for Unmet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}): ", self.request, self.request.place)?;
        match &self.why {
            Why::Unknown => f.write_str("this kernel has no such symbol"),
            Why::NotSet => f.write_str("not set, something that it depends on is missing"),
            Why::Is(value) => write!(f, "is {value}, something selects it or sets its default"),
        }
    }
}

/// A `.config`: the symbols that are set, without `CONFIG_`, and their values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config(BTreeMap<String, String>);

impl Config {
    /// Reads the text of a `.config`, which Kconfig wrote.
    pub fn parse(text: &str) -> Self {
        Self(
            text.lines()
                .filter_map(|line| line.strip_prefix(PREFIX)?.split_once('='))
                .map(|(symbol, value)| (symbol.to_owned(), value.to_owned()))
                .collect(),
        )
    }
}

/// The symbols that the Kconfig files below a kernel source define.
///
/// # Errors
/// A file or directory cannot be read.
pub fn known_symbols(source: &Path) -> Result<BTreeSet<String>, FragmentError> {
    let mut known = BTreeSet::new();
    collect_symbols(source, &mut known)?;
    Ok(known)
}

fn collect_symbols(dir: &Path, known: &mut BTreeSet<String>) -> Result<(), FragmentError> {
    let failed = |path: &Path, cause| FragmentError::Read {
        path: path.to_owned(),
        cause,
    };
    for entry in std::fs::read_dir(dir).map_err(|cause| failed(dir, cause))? {
        let entry = entry.map_err(|cause| failed(dir, cause))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(|cause| failed(&path, cause))?;
        if kind.is_dir() {
            collect_symbols(&path, known)?;
        } else if kind.is_file() && entry.file_name().to_string_lossy().starts_with("Kconfig") {
            let text = std::fs::read(&path).map_err(|cause| failed(&path, cause))?;
            known.extend(defined(&String::from_utf8_lossy(&text)));
        }
    }
    Ok(())
}

/// The symbols that one Kconfig file defines.
fn defined(kconfig: &str) -> impl Iterator<Item = String> {
    kconfig.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let keyword = words.next()?;
        (keyword == "config" || keyword == "menuconfig")
            .then(|| words.next())
            .flatten()
            .map(str::to_owned)
    })
}

/// The request in a line, if it is not blank or a comment.
fn request(line: &str, place: &Place) -> Result<Option<Request>, FragmentError> {
    let refuse = |problem: &str| FragmentError::Line {
        place: place.clone(),
        problem: problem.to_owned(),
    };
    let line = line.trim_end();
    let (symbol, wanted) = if let Some(comment) = line.strip_prefix('#') {
        let Some(rest) = comment.trim_start().strip_prefix(PREFIX) else {
            return Ok(None);
        };
        match rest.strip_suffix(NOT_SET) {
            Some(symbol) if comment.starts_with(" CONFIG_") => (symbol, Wanted::NotSet),
            _ => {
                return Err(refuse(
                    "a comment that opens with a symbol must read `# CONFIG_X is not set`",
                ));
            }
        }
    } else if line.is_empty() {
        return Ok(None);
    } else {
        let (symbol, value) = line
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split_once('='))
            .ok_or_else(|| {
                refuse("expected `CONFIG_X=value`, `# CONFIG_X is not set` or a comment")
            })?;
        (symbol, Wanted::Value(value_of(value).map_err(refuse)?))
    };
    let is_symbol = !symbol.is_empty()
        && symbol
            .bytes()
            .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_');
    // A few symbols of the kernel have small letters; none of them is of use to a guest.
    if !is_symbol {
        return Err(refuse("a symbol is made of A-Z, 0-9 and _"));
    }
    Ok(Some(Request {
        symbol: symbol.to_owned(),
        wanted,
        place: place.clone(),
    }))
}

fn value_of(value: &str) -> Result<String, &'static str> {
    let digits = |text: &str, hex: bool| {
        !text.is_empty()
            && text
                .bytes()
                .all(|byte| byte.is_ascii_digit() || (hex && byte.is_ascii_hexdigit()))
    };
    let number = value.strip_prefix("0x").map_or_else(
        || digits(value.strip_prefix('-').unwrap_or(value), false),
        |hex| digits(hex, true),
    );
    let text = value
        .strip_prefix('"')
        .and_then(|rest| rest.strip_suffix('"'))
        .is_some_and(|inner| !inner.contains(['"', '\\']));
    match value {
        "m" => Err("there are no modules: write `=y`, or `# CONFIG_X is not set`"),
        "n" => Err("write `# CONFIG_X is not set`, as Kconfig does"),
        "y" => Ok(value.to_owned()),
        _ if number || text => Ok(value.to_owned()),
        _ => Err("a value is y, a number, 0x and hex digits, or \"text\""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<Requests, FragmentError> {
        Requests::parse(&[("a.config".to_owned(), text.to_owned())])
    }

    fn parsed(text: &str) -> Requests {
        parse(text).expect("a sound fragment")
    }

    fn refusal(text: &str) -> String {
        parse(text).expect_err("must be refused").to_string()
    }

    fn unmet(fragment: &str, config: &str, kconfig: &str) -> Vec<String> {
        let known = defined(kconfig).collect();
        parsed(fragment)
            .unmet(&Config::parse(config), &known)
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn requests_are_read_and_comments_are_not() {
        let requests = parsed(
            "# why\n\nCONFIG_A=y  \n# CONFIG_B_2 is not set\nCONFIG_C=0x1F\nCONFIG_D=\"x y\"\nCONFIG_E=-1\n",
        );
        assert_eq!(
            requests.all_config(),
            "CONFIG_A=y\n# CONFIG_B_2 is not set\nCONFIG_C=0x1F\nCONFIG_D=\"x y\"\nCONFIG_E=-1\n"
        );
    }

    #[test]
    fn a_symbol_asked_for_and_absent_is_named_with_its_fragment() {
        assert_eq!(
            unmet(
                "# x\nCONFIG_EROFS_FS=y\n",
                "# CONFIG_EROFS_FS is not set\n",
                "config EROFS_FS\n"
            ),
            [
                "CONFIG_EROFS_FS=y (a.config line 2): not set, something that it depends on is missing"
            ]
        );
    }

    #[test]
    fn a_symbol_that_should_be_off_and_is_on_is_named() {
        assert_eq!(
            unmet("# CONFIG_A is not set\n", "CONFIG_A=y\n", "menuconfig A\n"),
            [
                "# CONFIG_A is not set (a.config line 1): is y, something selects it or sets its default"
            ]
        );
    }

    #[test]
    fn another_value_is_not_the_one_asked_for() {
        assert_eq!(
            unmet(
                "CONFIG_NR_CPUS=32\n",
                "CONFIG_NR_CPUS=320\n",
                "config NR_CPUS\n"
            )
            .len(),
            1
        );
    }

    #[test]
    fn a_misspelt_symbol_that_should_be_off_is_noticed() {
        assert_eq!(
            unmet(
                "# CONFIG_USB_SUPORT is not set\n",
                "CONFIG_X=y\n",
                "menuconfig USB_SUPPORT\n"
            ),
            ["# CONFIG_USB_SUPORT is not set (a.config line 1): this kernel has no such symbol"]
        );
    }

    #[test]
    fn what_is_met_is_not_reported() {
        let config = "CONFIG_A=y\nCONFIG_LSM=\"landlock\"\n# CONFIG_B is not set\n";
        let fragment =
            "CONFIG_A=y\nCONFIG_LSM=\"landlock\"\n# CONFIG_B is not set\n# CONFIG_C is not set\n";
        let kconfig = "config A\nconfig LSM\n\tstring\nconfig B\nif X\n  config C\n";
        assert_eq!(unmet(fragment, config, kconfig), Vec::<String>::new());
    }

    #[test]
    fn a_symbol_asked_for_twice_names_both_places() {
        let error = Requests::parse(&[
            ("a.config".into(), "CONFIG_A=y\n".into()),
            ("b.config".into(), "\n# CONFIG_A is not set\n".into()),
        ])
        .expect_err("twice");
        assert_eq!(
            error.to_string(),
            "b.config line 2: CONFIG_A is asked for in a.config line 1 already"
        );
    }

    #[test]
    fn lines_that_kconfig_would_drop_are_refused_with_their_place() {
        for line in [
            "CONFIG_A",
            "CONFIG_=y",
            "CONFIG_A=m",
            "CONFIG_A=n",
            "CONFIG_A=",
            "CONFIG_A=\"x",
            "CONFIG_A=yes",
            "CONFIG_a=y",
            "A=y",
            " CONFIG_A=y",
            "#CONFIG_A is not set",
            "# CONFIG_A is not set!",
            "#  CONFIG_A is not set",
            "CONFIG_A=0x",
        ] {
            assert!(refusal(line).starts_with("a.config line 1: "), "{line}");
        }
    }

    #[test]
    fn the_fragments_of_the_checkout_are_sound() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../guest-kernel/config");
        let requests = Requests::read(&dir).expect("sound fragments");
        for symbol in ["KVM_GUEST", "PVH", "VIRTIO_VSOCKETS", "OVERLAY_FS"] {
            assert!(
                requests.0.iter().any(|request| request.symbol == symbol),
                "{symbol}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(text: String) {
            let _either = parse(&text);
        }

        #[test]
        fn what_was_parsed_reads_back(symbol in "[A-Z][A-Z0-9_]{0,20}", off: bool, value in "[0-9]{1,9}|y|\"[ -!#-\\[\\]-~]*\"") {
            let line = if off { format!("# CONFIG_{symbol} is not set") } else { format!("CONFIG_{symbol}={value}") };
            let requests = parsed(&line);
            prop_assert_eq!(requests.all_config(), format!("{}\n", line));
        }
    }
}
