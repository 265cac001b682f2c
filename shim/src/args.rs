//! The command line, in the form that Go's `flag` package gives it: one dash or two, `-flag value` or `-flag=value`, then the action.
//!
//! It trusts whoever calls the program and refuses what it cannot mean: no action, two of them, a flag without its value. A flag that it
//! does not know is passed over, with its value where it has one: containerd adds some now and then.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

/// Flags with a value that mean nothing to this shim: where others serve, and the program that others publish events with
/// (pkg/shim/shim.go, `parseFlags`).
const IGNORED: [&str; 3] = ["socket", "debug-socket", "publish-binary"];

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Find or start the server of a container's pod, and say where it is.
    Start(Flags),
    /// Undo what a server that is gone left behind.
    Delete(Flags),
    /// Be the server: what `start` executes, not for people.
    Serve(Flags),
    /// Describe the runtime.
    Info,
    /// Say which version this is.
    Version,
}

/// What the flags say. Empty is the same as absent: CRI-O passes an empty `-address`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// `-id`: the container's.
    pub id: Option<String>,
    /// `-namespace`: containerd's, in which the id is unique.
    pub namespace: Option<String>,
    /// `-address`: the gRPC socket of containerd.
    pub address: Option<String>,
    /// `-bundle`: the container's directory, where it is not the working directory.
    pub bundle: Option<PathBuf>,
    /// `-debug`: log more.
    pub debug: bool,
}

/// Why a command line is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadArgs {
    /// There is no action.
    #[error(
        "nothing to do: containerd starts this program, with `-namespace NS -id ID [-address SOCKET] start` or `… delete`; -info and -v describe it"
    )]
    NoAction,
    /// A word that is none.
    #[error("unknown action {0:?}, expected start or delete")]
    UnknownAction(String),
    /// A word after the action.
    #[error("unexpected {0:?} after the action")]
    AfterAction(String),
    /// The last word is a flag that needs one more.
    #[error("flag -{0} needs a value")]
    NoValue(&'static str),
    /// Not text.
    #[error("the value of flag -{0} is not UTF-8")]
    NotText(&'static str),
    /// Not a truth value.
    #[error("the value of flag -{0} is neither true nor false")]
    NotBool(&'static str),
}

/// Takes the words after the program's name.
///
/// # Errors
/// The first that has no meaning.
pub fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Action, BadArgs> {
    let mut words: Words = words.into_iter().collect::<Vec<_>>().into_iter();
    let mut parsed = Parsed::default();
    while let Some(word) = words.next() {
        match flag(&word) {
            Some((name, value)) => parsed.flag(name, value, &mut words)?,
            None => parsed.word(&word)?,
        }
    }
    parsed.action()
}

type Words = std::vec::IntoIter<OsString>;

/// The name and, after `=`, the value of a flag; nothing if the word is none. Two dashes alone end the flags in Go: here they are none.
fn flag(word: &OsStr) -> Option<(&[u8], Option<&OsStr>)> {
    let dashed = word.as_bytes().strip_prefix(b"-")?;
    let name = dashed.strip_prefix(b"-").unwrap_or(dashed);
    if name.is_empty() {
        return None;
    }
    let Some(end) = name.iter().position(|byte| *byte == b'=') else {
        return Some((name, None));
    };
    let (name, value) = name.split_at(end);
    Some((name, value.get(1..).map(OsStr::from_bytes)))
}

#[derive(Default)]
struct Parsed {
    flags: Flags,
    info: bool,
    version: bool,
    action: Option<String>,
}

impl Parsed {
    fn flag(
        &mut self,
        name: &[u8],
        value: Option<&OsStr>,
        words: &mut Words,
    ) -> Result<(), BadArgs> {
        match name {
            b"id" => self.flags.id = text("id", value, words)?,
            b"namespace" => self.flags.namespace = text("namespace", value, words)?,
            b"address" => self.flags.address = text("address", value, words)?,
            b"bundle" => self.flags.bundle = given("bundle", value, words)?.map(PathBuf::from),
            b"debug" => self.flags.debug = truth("debug", value)?,
            b"info" => self.info = truth("info", value)?,
            b"v" | b"version" => self.version = truth("v", value)?,
            other => match IGNORED.iter().find(|known| known.as_bytes() == other) {
                Some(known) => drop(given(known, value, words)?),
                None if value.is_none() => pass_over_value(words),
                None => {}
            },
        }
        Ok(())
    }

    fn word(&mut self, word: &OsStr) -> Result<(), BadArgs> {
        let word = word.to_string_lossy().into_owned();
        if self.action.is_some() {
            return Err(BadArgs::AfterAction(word));
        }
        self.action = Some(word);
        Ok(())
    }

    fn action(self) -> Result<Action, BadArgs> {
        if self.version {
            return Ok(Action::Version);
        }
        if self.info {
            return Ok(Action::Info);
        }
        match self.action.as_deref() {
            Some("start") => Ok(Action::Start(self.flags)),
            Some("delete") => Ok(Action::Delete(self.flags)),
            Some("serve") => Ok(Action::Serve(self.flags)),
            Some(other) => Err(BadArgs::UnknownAction(other.to_owned())),
            None => Err(BadArgs::NoAction),
        }
    }
}

/// The value behind `=` or the next word, whatever it looks like; none if it is empty.
fn given(
    name: &'static str,
    value: Option<&OsStr>,
    words: &mut Words,
) -> Result<Option<OsString>, BadArgs> {
    let value = match value {
        Some(value) => value.to_owned(),
        None => words.next().ok_or(BadArgs::NoValue(name))?,
    };
    Ok((!value.is_empty()).then_some(value))
}

fn text(
    name: &'static str,
    value: Option<&OsStr>,
    words: &mut Words,
) -> Result<Option<String>, BadArgs> {
    let value = given(name, value, words)?;
    let text = value.map(OsString::into_string).transpose();
    text.map_err(|_bytes| BadArgs::NotText(name))
}

/// A flag without a value is true; the words for the values are those of Go's `strconv.ParseBool`.
fn truth(name: &'static str, value: Option<&OsStr>) -> Result<bool, BadArgs> {
    match value.map(OsStr::as_bytes) {
        None | Some(b"1" | b"t" | b"T" | b"true" | b"TRUE" | b"True") => Ok(true),
        Some(b"0" | b"f" | b"F" | b"false" | b"FALSE" | b"False") => Ok(false),
        Some(_) => Err(BadArgs::NotBool(name)),
    }
}

/// Behind a flag that nobody knows: a word that is no flag is its value, but the last word is the action.
fn pass_over_value(words: &mut Words) {
    if let [next, _, ..] = words.as_slice() {
        if flag(next).is_none() {
            words.next();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parsed(line: &str) -> Result<Action, BadArgs> {
        parse(line.split(' ').map(|word| match word {
            "''" => OsString::new(),
            word => OsString::from(word),
        }))
    }

    fn flags() -> Flags {
        Flags {
            id: Some("c1".into()),
            namespace: Some("k8s.io".into()),
            address: Some("/run/c.sock".into()),
            ..Flags::default()
        }
    }

    #[test]
    fn containerd_s_own_lines_are_understood() {
        let start = "-namespace k8s.io -address /run/c.sock -publish-binary /bin/c -id c1 start";
        assert_eq!(parsed(start), Ok(Action::Start(flags())));
        let mut expected = flags();
        expected.debug = true;
        expected.bundle = Some("/b".into());
        let delete = "-namespace k8s.io -address /run/c.sock -publish-binary /bin/c -id c1 -bundle /b -debug delete";
        assert_eq!(parsed(delete), Ok(Action::Delete(expected)));
    }

    #[test]
    fn cri_o_s_line_with_an_empty_address_is_understood() {
        let line = "-namespace default -address '' -publish-binary /bin/crio -id c1 start";
        let expected = Flags {
            id: Some("c1".into()),
            namespace: Some("default".into()),
            ..Flags::default()
        };
        assert_eq!(parsed(line), Ok(Action::Start(expected)));
    }

    #[test]
    fn one_dash_or_two_with_a_space_or_an_equals_sign_are_one() {
        let lines = [
            "--namespace=k8s.io --address=/run/c.sock --id=c1 start",
            "--namespace k8s.io -address=/run/c.sock --id c1 start",
        ];
        for line in lines {
            assert_eq!(parsed(line), Ok(Action::Start(flags())), "{line}");
        }
    }

    #[test]
    fn unknown_flags_are_passed_over_with_or_without_a_value() {
        let lines = [
            "-new -namespace k8s.io -address /run/c.sock -id c1 start",
            "-namespace k8s.io -new value -address /run/c.sock -id c1 start",
            "-namespace k8s.io -new=value -address /run/c.sock -id c1 -newer start",
            "-namespace k8s.io -socket s -debug-socket d -address /run/c.sock -id c1 start",
        ];
        for line in lines {
            assert_eq!(parsed(line), Ok(Action::Start(flags())), "{line}");
        }
    }

    #[test]
    fn a_value_may_look_like_a_flag_or_an_action() {
        let Ok(Action::Start(flags)) = parsed("-id start -namespace -x start") else {
            panic!("start");
        };
        assert_eq!(flags.id.as_deref(), Some("start"));
        assert_eq!(flags.namespace.as_deref(), Some("-x"));
    }

    #[test]
    fn info_and_version_need_nothing_else_and_come_first() {
        assert_eq!(parsed("-info"), Ok(Action::Info));
        assert_eq!(parsed("-debug -info start"), Ok(Action::Info));
        for line in ["-v", "--version", "-version", "-info -v"] {
            assert_eq!(parsed(line), Ok(Action::Version), "{line}");
        }
        assert_eq!(parsed("-info=false"), Err(BadArgs::NoAction));
    }

    #[test]
    fn what_means_nothing_is_refused() {
        assert_eq!(parse([]), Err(BadArgs::NoAction));
        assert_eq!(parsed("-id"), Err(BadArgs::NoValue("id")));
        assert_eq!(parsed("-debug=maybe start"), Err(BadArgs::NotBool("debug")));
        assert_eq!(parsed("stop"), Err(BadArgs::UnknownAction("stop".into())));
        assert_eq!(
            parsed("start delete"),
            Err(BadArgs::AfterAction("delete".into()))
        );
        let bytes = OsStr::from_bytes(b"\xff").to_owned();
        assert_eq!(parse(["-id".into(), bytes]), Err(BadArgs::NotText("id")));
    }

    #[test]
    fn a_bundle_may_have_any_name() {
        let path = OsStr::from_bytes(b"/b\xff").to_owned();
        let words = ["-bundle".into(), path.clone(), "delete".into()];
        let Ok(Action::Delete(flags)) = parse(words) else {
            panic!("delete");
        };
        assert_eq!(flags.bundle, Some(PathBuf::from(path)));
    }

    proptest! {
        #[test]
        fn any_words_are_an_action_or_a_refusal(words: Vec<Vec<u8>>) {
            let words = words.iter().map(|word| OsStr::from_bytes(word).to_owned());
            let _either = parse(words);
        }

        #[test]
        fn what_was_given_comes_back(id in "[a-z0-9]{1,64}", namespace in "[a-z.]{1,20}", equals: bool, debug: bool) {
            let mut words: Vec<OsString> = Vec::new();
            for (name, value) in [("id", &id), ("namespace", &namespace)] {
                match equals {
                    true => words.push(format!("-{name}={value}").into()),
                    false => words.extend([format!("--{name}").into(), value.into()]),
                }
            }
            if debug {
                words.push("-debug".into());
            }
            words.push("start".into());
            let expected = Flags { id: Some(id), namespace: Some(namespace), debug, ..Flags::default() };
            prop_assert_eq!(parse(words), Ok(Action::Start(expected)));
        }
    }
}
