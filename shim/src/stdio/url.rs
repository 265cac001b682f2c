//! What containerd names as a stream, parsed once. Pure.
//!
//! A path alone, or a URL: `fifo:///path`, `file:///path`, `binary:///program?key=value&env.NAME=value` and `binary-v2:///…` (containerd's
//! core/runtime/v2/README.md, "Logging"). Its author is containerd's client, who may start any program on this host anyway; what is refused is what
//! cannot be meant. How long a URL may be is bounded by the message it came in, what a program may be given by execve(2).

use std::collections::HashSet;
use std::ffi::CString;
use std::path::PathBuf;

/// The schemes that name a stream.
const SCHEMES: &str = "fifo, file, binary, binary-v2";
/// What the logger's environment is told by us; nobody else does.
const OWN_NAMES: [&[u8]; 2] = [b"CONTAINER_ID", b"CONTAINER_NAMESPACE"];
/// A key of the query that starts so is a variable of the logger's environment (containerd >= 2.2).
const ENV_PREFIX: &[u8] = b"env.";

/// Where a stream goes to or comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Nowhere: the guest's process gets /dev/null.
    Nothing,
    /// What is there already, a fifo as a rule.
    Existing(PathBuf),
    /// A file that is appended to, and made if it is not there.
    File(PathBuf),
    /// A program that reads it.
    Logger(LoggerCommand),
}

/// How to start a logger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LoggerCommand {
    /// The program, an absolute path.
    pub(super) program: CString,
    /// Its arguments, without the program's name: key and value in turns, in the order of the URL.
    pub(super) arguments: Vec<CString>,
    /// `NAME=value`, without the two that every logger gets.
    pub(super) environment: Vec<CString>,
    /// It says that it is ready by a byte (`binary-v2`), and not by the end of the pipe alone.
    pub(super) strict: bool,
}

/// Why the name of a stream is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadUrl {
    /// It starts with neither `/` nor a scheme.
    #[error("neither an absolute path nor a URL")]
    Form,
    /// No stream goes there.
    #[error("unknown scheme {0:?} (one of {SCHEMES})")]
    Scheme(String),
    /// Streams of `io_type = "streaming"` are not spoken here.
    #[error("streaming I/O ({0}) is not supported")]
    Streaming(String),
    /// Nothing but a local path has a meaning.
    #[error("it names the host {0:?}")]
    Host(String),
    /// A `%` without two hexadecimal digits, or a zero byte.
    #[error("it is wrongly escaped")]
    Escape,
    /// Input is a fifo.
    #[error("standard input can only be a fifo")]
    Input,
}

/// Reads the name of an output.
///
/// # Errors
/// It is refused.
pub(super) fn output(url: &str) -> Result<Target, BadUrl> {
    if url.is_empty() {
        return Ok(Target::Nothing);
    }
    if url.starts_with('/') {
        return Ok(Target::Existing(url.into()));
    }
    let (scheme, rest) = url.split_once("://").ok_or(BadUrl::Form)?;
    // Others have parts that are not ours to parse.
    if !SCHEMES.split(", ").any(|known| known == scheme) {
        return Err(
            match scheme.starts_with("ttrpc+") || scheme.starts_with("grpc+") {
                true => BadUrl::Streaming(scheme.to_owned()),
                false => BadUrl::Scheme(scheme.to_owned()),
            },
        );
    }
    let rest = rest.split_once('#').map_or(rest, |(rest, _fragment)| rest);
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let Some(root) = path.find('/') else {
        return Err(BadUrl::Form);
    };
    if root != 0 {
        return Err(BadUrl::Host(path.split_at(root).0.to_owned()));
    }
    let path = unescape(path, false)?;
    match scheme {
        "fifo" => Ok(Target::Existing(into_path(path))),
        "file" => Ok(Target::File(into_path(path))),
        _ => Ok(Target::Logger(logger(path, query, scheme == "binary-v2")?)),
    }
}

/// Reads the name of the input.
///
/// # Errors
/// It is refused.
pub(super) fn input(url: &str) -> Result<Option<PathBuf>, BadUrl> {
    match output(url)? {
        Target::Nothing => Ok(None),
        Target::Existing(path) => Ok(Some(path)),
        Target::File(_) | Target::Logger(_) => Err(BadUrl::Input),
    }
}

/// As containerd's own shim makes it of a URL: a key's first value counts.
fn logger(program: Vec<u8>, query: &str, strict: bool) -> Result<LoggerCommand, BadUrl> {
    let (mut arguments, mut environment) = (Vec::new(), Vec::new());
    let mut seen = HashSet::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (key, value) = (unescape(key, true)?, unescape(value, true)?);
        if !seen.insert(key.clone()) {
            continue;
        }
        match key.strip_prefix(ENV_PREFIX) {
            Some(name) if OWN_NAMES.contains(&name) => {}
            Some(name) => environment.push(c_string([name, b"=", &value].concat())?),
            None => {
                arguments.push(c_string(key)?);
                arguments.push(c_string(value)?);
            }
        }
    }
    Ok(LoggerCommand {
        program: c_string(program)?,
        arguments,
        environment,
        strict,
    })
}

/// The bytes that an escaped text (RFC 3986 section 2.1) stands for, none of them zero; in a query a plus is a space.
fn unescape(text: &str, is_query: bool) -> Result<Vec<u8>, BadUrl> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || {
                    let digit = char::from(rest.next()?).to_digit(16)?;
                    u8::try_from(digit).ok()
                };
                let (high, low) = (digit(), digit());
                high.zip(low)
                    .map(|(high, low)| high << 4 | low)
                    .ok_or(BadUrl::Escape)?
            }
            b'+' if is_query => b' ',
            byte => byte,
        });
    }
    match bytes.contains(&0) {
        true => Err(BadUrl::Escape),
        false => Ok(bytes),
    }
}

fn into_path(bytes: Vec<u8>) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    std::ffi::OsString::from_vec(bytes).into()
}

fn c_string(bytes: Vec<u8>) -> Result<CString, BadUrl> {
    CString::new(bytes).map_err(|_zero_inside| BadUrl::Escape)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn strings(texts: &[&str]) -> Vec<CString> {
        texts
            .iter()
            .map(|text| CString::new(*text).expect("no zero"))
            .collect()
    }

    fn command(url: &str) -> LoggerCommand {
        match output(url).expect("a URL") {
            Target::Logger(command) => command,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_path_alone_is_taken_as_it_is() {
        let path = "/run/containerd/fifo/1/a b%20?c://d#e";
        assert_eq!(output(path), Ok(Target::Existing(path.into())));
        assert_eq!(input(path), Ok(Some(path.into())));
    }

    #[test]
    fn an_empty_name_is_no_stream() {
        assert_eq!(output(""), Ok(Target::Nothing));
        assert_eq!(input(""), Ok(None));
    }

    #[test]
    fn the_path_of_a_url_is_unescaped() {
        assert_eq!(output("fifo:///a%20b"), Ok(Target::Existing("/a b".into())));
        assert_eq!(
            output("file:///var/log/x+y.log"),
            Ok(Target::File("/var/log/x+y.log".into()))
        );
    }

    #[test]
    fn a_logger_gets_keys_and_values_in_turns() {
        let command = command("binary:///usr/bin/log?mode=a+b&empty&x=%2Fy&mode=again");
        assert_eq!(command.program.as_c_str(), c"/usr/bin/log");
        assert_eq!(
            command.arguments,
            strings(&["mode", "a b", "empty", "", "x", "/y"])
        );
        assert!(command.environment.is_empty() && !command.strict);
    }

    #[test]
    fn a_logger_s_environment_is_what_the_query_names_but_never_the_container() {
        let command = command("binary-v2:///l?env.HOME=/root&env.CONTAINER_ID=lie&a=1");
        assert_eq!(command.environment, strings(&["HOME=/root"]));
        assert_eq!(command.arguments, strings(&["a", "1"]));
        assert!(command.strict);
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        assert_eq!(output("relative/path"), Err(BadUrl::Form));
        assert_eq!(output("binary://?a=b"), Err(BadUrl::Form));
        assert_eq!(output("http:///x"), Err(BadUrl::Scheme("http".to_owned())));
        assert_eq!(
            output("file://host/x"),
            Err(BadUrl::Host("host".to_owned()))
        );
        let streaming = "ttrpc+unix:///run/containerd/containerd.sock?streaming_id=x";
        assert_eq!(
            output(streaming),
            Err(BadUrl::Streaming("ttrpc+unix".to_owned()))
        );
        for url in [
            "file:///%",
            "file:///%2",
            "file:///%+1",
            "file:///%zz",
            "file:///%00",
            "binary:///x?a=%00",
        ] {
            assert_eq!(output(url), Err(BadUrl::Escape), "{url}");
        }
        assert_eq!(input("file:///x"), Err(BadUrl::Input));
        assert_eq!(input("binary:///x"), Err(BadUrl::Input));
    }

    proptest! {
        #[test]
        fn any_text_is_parsed_or_refused(url in "(fifo|file|binary|binary-v2|x)?(://)?[ -~]*") {
            if let Ok(Target::Logger(command)) = output(&url) {
                prop_assert!(command.program.as_bytes().starts_with(b"/"));
                prop_assert_eq!(command.arguments.len() % 2, 0);
            }
        }

        #[test]
        fn an_escaped_path_reads_back(path: Vec<u8>) {
            let escaped: String = path.iter().map(|byte| format!("%{byte:02x}")).collect();
            let expected = match path.contains(&0) {
                true => Err(BadUrl::Escape),
                false => Ok(Target::File(into_path([b"/".as_slice(), &path].concat()))),
            };
            prop_assert_eq!(output(&format!("file:///{escaped}")), expected);
        }
    }
}
