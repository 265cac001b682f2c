//! The options that containerd's configuration has for a runtime, as they come with `start` and Create: an Any of one of two messages.
//!
//! Both are read by their field numbers: one is in no crate, of the other four fields in eleven mean something here. What is not read is skipped, as
//! protobuf has it; the type is what must be known.

use crate::cgroup::{BadCgroupPath, CgroupPath};
use capsid_owner::escape::Line;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::empty::Empty;
use protobuf::{Message, UnknownValueRef};
use std::path::{Path, PathBuf};

/// Longest options, in bytes: a configuration file and some more.
const OPTIONS_MAX_BYTES: usize = 128 * 1024;
/// What the CRI, ctr and docker send to a runtime that they do not know (containerd, `api/types/runtimeoptions/v1/api.proto`).
const GENERIC: &str = "runtimeoptions.v1.Options";
/// What is sent to runc (containerd, `api/types/runc/options/oci.proto`), and to us by who has only replaced the runtime's name.
const RUNC: &str = "containerd.runc.v1.Options";

/// What they say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The configuration file in place of the usual one.
    pub config_path: Option<PathBuf>,
    /// The text of a configuration file, in place of any.
    pub config_body: Option<String>,
    /// The cgroup for the shim itself.
    pub shim_cgroup: Option<CgroupPath>,
    /// Owner of the pipes of containers: user and group.
    pub io_owner: (u32, u32),
}

/// Why options are refused.
#[derive(Debug, thiserror::Error)]
pub enum OptionsError {
    /// Another message.
    #[error("the runtime's options are of type {0}, expected {GENERIC} or {RUNC}")]
    Type(String),
    /// Too long.
    #[error("the runtime's options are {0} bytes long, at most {OPTIONS_MAX_BYTES} are read")]
    TooLong(usize),
    /// Not that message.
    #[error("the runtime's options are no {message}")]
    Message {
        /// Which message it should be.
        message: &'static str,
        /// What is wrong.
        #[source]
        cause: protobuf::Error,
    },
    /// No UTF-8, or not of the type that the message has there.
    #[error("field {field} of the runtime's options is not what it should be")]
    Field {
        /// Its number.
        field: u32,
    },
    /// A cgroup that is none.
    #[error("the runtime's options have a ShimCgroup that is none")]
    ShimCgroup(#[source] BadCgroupPath),
}

/// Whether these are options for a runtime, by their type.
pub fn is_options(any: &Any) -> bool {
    matches!(type_name(any), GENERIC | RUNC)
}

/// The message's name: containerd writes it bare, others as a URL that ends with it.
fn type_name(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

impl Options {
    /// Reads the options; none, or an empty Any, say nothing.
    ///
    /// # Errors
    /// They are not of a known type, or not valid.
    pub fn decode(options: Option<&Any>) -> Result<Options, OptionsError> {
        let Some(any) = options.filter(|any| !any.type_url.is_empty()) else {
            return Ok(Options::default());
        };
        if any.value.len() > OPTIONS_MAX_BYTES {
            return Err(OptionsError::TooLong(any.value.len()));
        }
        match type_name(any) {
            GENERIC => Options::generic(&any.value),
            RUNC => Options::runc(&any.value),
            _ => Err(OptionsError::Type(
                Line(any.type_url.as_bytes()).to_string(),
            )),
        }
    }

    fn generic(message: &[u8]) -> Result<Options, OptionsError> {
        let mut options = Options::default();
        for (field, value) in fields(GENERIC, message)?
            .special_fields
            .unknown_fields()
            .iter()
        {
            match field {
                2 => options.config_path = Some(text(field, &value)?.into()),
                3 => options.config_body = Some(text(field, &value)?),
                _ => {}
            }
        }
        options.config_path = options
            .config_path
            .filter(|path| !path.as_os_str().is_empty());
        options.config_body = options.config_body.filter(|body| !body.is_empty());
        Ok(options)
    }

    fn runc(message: &[u8]) -> Result<Options, OptionsError> {
        let mut options = Options::default();
        for (field, value) in fields(RUNC, message)?
            .special_fields
            .unknown_fields()
            .iter()
        {
            match field {
                3 => {
                    let place = text(field, &value)?;
                    let place =
                        Some(Path::new(&place)).filter(|place| !place.as_os_str().is_empty());
                    let parsed = place.map(CgroupPath::parse).transpose();
                    options.shim_cgroup = parsed.map_err(OptionsError::ShimCgroup)?;
                }
                4 => options.io_owner.0 = number(field, &value)?,
                5 => options.io_owner.1 = number(field, &value)?,
                _ => {}
            }
        }
        Ok(options)
    }
}

/// The fields of a message, all of them unknown to a message that has none.
fn fields(name: &'static str, message: &[u8]) -> Result<Empty, OptionsError> {
    Empty::parse_from_bytes(message).map_err(|cause| OptionsError::Message {
        message: name,
        cause,
    })
}

fn text(field: u32, value: &UnknownValueRef<'_>) -> Result<String, OptionsError> {
    match value {
        UnknownValueRef::LengthDelimited(bytes) => {
            String::from_utf8(bytes.to_vec()).map_err(|_| OptionsError::Field { field })
        }
        _ => Err(OptionsError::Field { field }),
    }
}

fn number(field: u32, value: &UnknownValueRef<'_>) -> Result<u32, OptionsError> {
    match value {
        UnknownValueRef::Varint(value) => {
            u32::try_from(*value).map_err(|_| OptionsError::Field { field })
        }
        _ => Err(OptionsError::Field { field }),
    }
}
