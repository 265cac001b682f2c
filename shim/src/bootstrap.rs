//! What containerd and the shim say to each other around `start`: the message on standard input, in one of three forms, and the reply in
//! the form that goes with it. Pure.
//!
//! containerd 2.3 and newer write `BootstrapParams` and take a `BootstrapResult` of version 3 (pkg/shim/util.go, `Command`). Older ones and
//! CRI-O write the `google.protobuf.Any` of the runtime's options or nothing, and take JSON of version 2 at most. Both messages are
//! protobuf, which does not say what it is: `BootstrapParams` reads as an `Any` too. It is told by its first field, which repeats `-id`.
//!
//! It trusts containerd. What is neither form is refused, not guessed.

use crate::args::Flags;
use crate::config::is_options;
use containerd_shim_protos::bootstrap_api::{
    BootstrapParams, BootstrapResult, Extension, LogLevel,
};
use protobuf::well_known_types::any::Any;
use protobuf::{EnumOrUnknown, Message, MessageField};
use std::path::PathBuf;

/// The longest message on standard input in bytes: the most that ttrpc carries.
pub const MESSAGE_MAX_BYTES: usize = 4 << 20;

/// The protocol of our socket.
const PROTOCOL: &str = "ttrpc";

/// In which form a caller asks, and is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `BootstrapParams`, from containerd 2.3 on.
    Bootstrap,
    /// The options or nothing.
    Old,
}

/// All that `start` was told, whichever form it came in.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// The form.
    pub form: Form,
    /// The container's id.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's gRPC socket; empty for CRI-O.
    pub grpc_address: String,
    /// Where events go; nothing for CRI-O.
    pub ttrpc_address: Option<String>,
    /// The directory for sockets.
    pub socket_dir: Option<PathBuf>,
    /// The options of the runtime.
    pub options: Option<Any>,
    /// Log more.
    pub debug: bool,
}

/// Why a message is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// Neither form.
    #[error(
        "the {0} bytes on standard input are neither BootstrapParams of this container nor the runtime's options"
    )]
    Garbage(usize),
    /// Nobody says which container.
    #[error("no container id, neither by -id nor on standard input")]
    NoId,
    /// Nobody says in which namespace.
    #[error("no namespace, neither by -namespace nor on standard input")]
    NoNamespace,
}

/// Takes the whole of standard input, with the flags and, for the old form, the environment's `TTRPC_ADDRESS`.
///
/// # Errors
/// The message is neither form, or something that must be said is not.
pub fn read(
    message: &[u8],
    flags: &Flags,
    ttrpc_address: Option<String>,
) -> Result<Request, BadRequest> {
    let mut request = match params(message, flags) {
        Some(params) => from_params(params, flags),
        None => Request {
            form: Form::Old,
            id: flags.id.clone().unwrap_or_default(),
            namespace: flags.namespace.clone().unwrap_or_default(),
            grpc_address: flags.address.clone().unwrap_or_default(),
            ttrpc_address,
            socket_dir: None,
            options: options(message)?,
            debug: flags.debug,
        },
    };
    request.ttrpc_address = request.ttrpc_address.filter(|address| !address.is_empty());
    match request {
        Request { id, .. } if id.is_empty() => Err(BadRequest::NoId),
        Request { namespace, .. } if namespace.is_empty() => Err(BadRequest::NoNamespace),
        request => Ok(request),
    }
}

/// `BootstrapParams`, if these bytes are that: an `Any` of the options would have its type where they have the container's id, and its
/// value where they have the namespace. Both are what the flags say, as long as containerd gives them.
fn params(message: &[u8], flags: &Flags) -> Option<BootstrapParams> {
    let params = BootstrapParams::parse_from_bytes(message).ok()?;
    let agrees = |flag: &Option<String>, value: &str| flag.as_deref().is_none_or(|f| f == value);
    let named = !params.instance_id.is_empty() && !params.namespace.is_empty();
    let ours =
        agrees(&flags.id, &params.instance_id) && agrees(&flags.namespace, &params.namespace);
    (named && ours).then_some(params)
}

fn from_params(params: BootstrapParams, flags: &Flags) -> Request {
    let given = |text: String| (!text.is_empty()).then_some(text);
    let options = params
        .extensions
        .into_iter()
        .filter_map(|extension| extension.value.0);
    let mut options = options.filter(|any| is_options(any));
    Request {
        form: Form::Bootstrap,
        id: params.instance_id,
        namespace: params.namespace,
        grpc_address: params.containerd_grpc_address,
        ttrpc_address: given(params.containerd_ttrpc_address),
        socket_dir: params.socket_dir.and_then(given).map(PathBuf::from),
        options: options.next().map(|any| *any),
        // An open enumeration: what is below DEBUG is at least as talkative.
        debug: flags.debug || params.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG as i32,
    }
}

/// The options of the old form. Any other message would leave something over, or have no type.
fn options(message: &[u8]) -> Result<Option<Any>, BadRequest> {
    if message.is_empty() {
        return Ok(None);
    }
    let any = Any::parse_from_bytes(message).ok().filter(|any| {
        let name = &any.type_url;
        let unknown = any.special_fields.unknown_fields();
        let dotted = name.contains('.') && name.chars().all(|c| c.is_ascii_graphic());
        dotted && unknown.iter().next().is_none()
    });
    any.map(Some).ok_or(BadRequest::Garbage(message.len()))
}

/// The request as `BootstrapParams`: how `start` hands it on to the server.
pub fn hand_on(request: Request) -> BootstrapParams {
    let level = match request.debug {
        true => LogLevel::LOG_LEVEL_DEBUG,
        false => LogLevel::LOG_LEVEL_INFO,
    };
    let extensions = request.options.into_iter().map(|any| Extension {
        value: MessageField::some(any),
        ..Extension::default()
    });
    BootstrapParams {
        instance_id: request.id,
        namespace: request.namespace,
        log_level: EnumOrUnknown::new(level),
        containerd_grpc_address: request.grpc_address,
        containerd_ttrpc_address: request.ttrpc_address.unwrap_or_default(),
        extensions: extensions.collect(),
        ..BootstrapParams::default()
    }
}

/// The reply of `start`: the server's address in the form of the question.
///
/// # Errors
/// The message could not be encoded.
pub fn reply(form: Form, address: &str) -> Result<Vec<u8>, protobuf::Error> {
    match form {
        Form::Bootstrap => BootstrapResult {
            version: 3,
            address: address.to_owned(),
            protocol: PROTOCOL.to_owned(),
            ..BootstrapResult::default()
        }
        .write_to_bytes(),
        Form::Old => {
            let reply = serde_json::json!({"version": 2, "address": address, "protocol": PROTOCOL});
            Ok(reply.to_string().into_bytes())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ID: &str = "8a11c0ffee";
    const RUNC_OPTIONS: &str = "containerd.runc.v1.Options";
    const RUNTIME_OPTIONS: &str = "runtimeoptions.v1.Options";

    fn flags() -> Flags {
        Flags {
            id: Some(ID.into()),
            namespace: Some("k8s.io".into()),
            address: Some("/run/containerd/containerd.sock".into()),
            ..Flags::default()
        }
    }

    fn typed(type_url: &str, value: &[u8]) -> Any {
        Any {
            type_url: type_url.into(),
            value: value.into(),
            ..Any::default()
        }
    }

    fn written(message: &impl Message) -> Vec<u8> {
        message.write_to_bytes().expect("encodable")
    }

    fn bootstrap() -> BootstrapParams {
        BootstrapParams {
            instance_id: ID.into(),
            namespace: "k8s.io".into(),
            containerd_version: "2.3.4".into(),
            containerd_ttrpc_address: "/run/t".into(),
            containerd_grpc_address: "/run/g".into(),
            containerd_binary: "/usr/bin/containerd".into(),
            socket_dir: Some("/run/containerd/s".into()),
            ..BootstrapParams::default()
        }
    }

    fn extension(any: Any) -> Extension {
        Extension {
            value: MessageField::some(any),
            ..Extension::default()
        }
    }

    #[test]
    fn nothing_on_standard_input_is_the_old_form() {
        let request = read(b"", &flags(), Some("/run/t".into())).expect("old");
        assert_eq!((request.form, request.options), (Form::Old, None));
        assert_eq!(request.ttrpc_address.as_deref(), Some("/run/t"));
        assert_eq!(request.grpc_address, "/run/containerd/containerd.sock");
    }

    #[test]
    fn options_alone_are_the_old_form() {
        for name in [
            RUNC_OPTIONS,
            "type.googleapis.com/runtimeoptions.v1.Options",
        ] {
            let options = typed(name, b"\x1a\x02/x");
            let request = read(&written(&options), &flags(), None).expect("old");
            assert_eq!((request.form, request.options), (Form::Old, Some(options)));
        }
    }

    #[test]
    fn params_of_this_container_are_the_new_form_and_win_over_flags_and_environment() {
        let mut params = bootstrap();
        params.log_level = EnumOrUnknown::from_i32(-8);
        let other = typed("containerd.io/cri.v1.PodSandboxConfig", b"x");
        let options = typed("type.googleapis.com/containerd.runc.v1.Options", b"");
        params.extensions = vec![extension(other), extension(options.clone())];
        let request = read(&written(&params), &flags(), Some("/env".into())).expect("new");
        let expected = Request {
            form: Form::Bootstrap,
            id: ID.into(),
            namespace: "k8s.io".into(),
            grpc_address: "/run/g".into(),
            ttrpc_address: Some("/run/t".into()),
            socket_dir: Some("/run/containerd/s".into()),
            options: Some(options),
            debug: true,
        };
        assert_eq!(request, expected);
    }

    #[test]
    fn a_container_named_like_the_options_is_not_confused_with_them() {
        let mut flags = flags();
        flags.id = Some(RUNC_OPTIONS.into());
        let options = typed(RUNC_OPTIONS, b"\x1a\x02/x");
        let request = read(&written(&options), &flags, None).expect("old");
        assert_eq!((request.form, request.options), (Form::Old, Some(options)));
        let mut params = bootstrap();
        params.instance_id = RUNC_OPTIONS.into();
        let request = read(&written(&params), &flags, None).expect("new");
        assert_eq!(request.form, Form::Bootstrap);
    }

    #[test]
    fn params_alone_will_do_when_the_flags_are_gone() {
        let request = read(&written(&bootstrap()), &Flags::default(), None).expect("new");
        assert_eq!(
            (request.id.as_str(), request.namespace.as_str()),
            (ID, "k8s.io")
        );
    }

    #[test]
    fn what_is_neither_is_refused() {
        let mut other = bootstrap();
        other.instance_id = "another.container".into();
        let typeless = typed("", b"x");
        let wordless = typed("options", b"x");
        for message in [
            written(&other),
            written(&typeless),
            written(&wordless),
            b"garbage".to_vec(),
        ] {
            let length = message.len();
            assert_eq!(
                read(&message, &flags(), None),
                Err(BadRequest::Garbage(length))
            );
        }
    }

    #[test]
    fn an_id_and_a_namespace_must_be_said() {
        assert_eq!(read(b"", &Flags::default(), None), Err(BadRequest::NoId));
        let only_id = Flags {
            id: Some(ID.into()),
            ..Flags::default()
        };
        assert_eq!(read(b"", &only_id, None), Err(BadRequest::NoNamespace));
    }

    #[test]
    fn empty_addresses_are_none() {
        let request = read(b"", &flags(), Some(String::new())).expect("old");
        assert_eq!(request.ttrpc_address, None);
        let mut params = bootstrap();
        params.containerd_ttrpc_address.clear();
        params.socket_dir = Some(String::new());
        let request = read(&written(&params), &flags(), None).expect("new");
        assert_eq!((request.ttrpc_address, request.socket_dir), (None, None));
    }

    #[test]
    fn replies_are_what_each_daemon_takes() {
        let old = reply(Form::Old, "unix:///s/x").expect("encodable");
        let json: serde_json::Value = serde_json::from_slice(&old).expect("JSON");
        let expected =
            serde_json::json!({"version": 2, "address": "unix:///s/x", "protocol": "ttrpc"});
        assert_eq!(json, expected);
        // containerd >= 2.3 tries protobuf first (core/runtime/v2/shim.go, parseStartResponse): JSON must not pass for it.
        assert!(BootstrapResult::parse_from_bytes(&old).is_err());
        let new = reply(Form::Bootstrap, "unix:///s/x").expect("encodable");
        let result = BootstrapResult::parse_from_bytes(&new).expect("protobuf");
        assert_eq!(
            (
                result.version,
                result.address.as_str(),
                result.protocol.as_str()
            ),
            (3, "unix:///s/x", "ttrpc")
        );
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>, with_id: bool) {
            let flags = if with_id { flags() } else { Flags::default() };
            let _either = read(&bytes, &flags, None);
        }

        #[test]
        fn what_is_handed_on_arrives(
            id in "[a-z0-9]{1,64}", namespace in "[a-z.]{1,20}", grpc in ".{0,20}", ttrpc in proptest::option::of(".{1,20}"),
            value in proptest::option::of(proptest::collection::vec(any::<u8>(), 0..64)), debug: bool,
        ) {
            let options = value.map(|value| typed(RUNTIME_OPTIONS, &value));
            let flags = Flags { id: Some(id.clone()), namespace: Some(namespace.clone()), ..Flags::default() };
            let request = Request {
                form: Form::Bootstrap, id, namespace, grpc_address: grpc, ttrpc_address: ttrpc, socket_dir: None, options, debug,
            };
            let message = written(&hand_on(request.clone()));
            prop_assert_eq!(read(&message, &flags, None), Ok(request));
        }
    }
}
