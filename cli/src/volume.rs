//! `-v SRC:DST[:ro]`: parsed once; the source is opened by the mounting code.

use std::path::PathBuf;

/// Most volumes of one container.
pub(crate) const VOLUMES_MAX: usize = 256;

/// One volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Volume {
    /// Path on this host.
    pub(crate) source: PathBuf,
    /// Absolute path in the container.
    pub(crate) destination: String,
    /// Enforced on the host.
    pub(crate) read_only: bool,
}

/// Why a volume was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum VolumeError {
    /// Not `SRC:DST[:ro]`.
    #[error("volume {0:?}: expected SRC:DST or SRC:DST:ro")]
    Syntax(String),
    /// A name where a path must be.
    #[error(
        "volume {0:?}: the source must be a path (there are no named volumes), for instance ./{0}"
    )]
    Named(String),
    /// A relative destination.
    #[error("volume {text:?}: the destination {destination:?} must be an absolute path")]
    Relative {
        /// The flag's value.
        text: String,
        /// Its second part.
        destination: String,
    },
    /// A destination that hides the root or leaves it.
    #[error(
        "volume {text:?}: the destination {destination:?} must name something below / without .."
    )]
    Destination {
        /// The flag's value.
        text: String,
        /// Its second part.
        destination: String,
    },
    /// An option that is neither ro nor rw.
    #[error("volume {text:?}: unknown option {option:?}, expected ro or rw")]
    Option {
        /// The flag's value.
        text: String,
        /// The option.
        option: String,
    },
    /// Two volumes at one place.
    #[error("two volumes have the destination {0:?}")]
    Twice(String),
    /// Too many.
    #[error("more than {VOLUMES_MAX} volumes")]
    TooMany,
}

/// Reads the flag's values.
///
/// # Errors
/// The first one refused.
pub(crate) fn parse_all(texts: &[String]) -> Result<Vec<Volume>, VolumeError> {
    if texts.len() > VOLUMES_MAX {
        return Err(VolumeError::TooMany);
    }
    let mut volumes: Vec<Volume> = Vec::with_capacity(texts.len());
    for text in texts {
        let volume = parse(text)?;
        if volumes
            .iter()
            .any(|other| other.destination == volume.destination)
        {
            return Err(VolumeError::Twice(volume.destination));
        }
        volumes.push(volume);
    }
    Ok(volumes)
}

fn parse(text: &str) -> Result<Volume, VolumeError> {
    let mut parts = text.split(':');
    let (source, destination) = match (parts.next(), parts.next()) {
        (Some(source), Some(destination)) if !source.is_empty() => (source, destination),
        _ => return Err(VolumeError::Syntax(text.to_owned())),
    };
    let mut read_only = false;
    for option in parts
        .next()
        .into_iter()
        .flat_map(|options| options.split(','))
    {
        match option {
            "ro" => read_only = true,
            "rw" => read_only = false,
            option => {
                return Err(VolumeError::Option {
                    text: text.to_owned(),
                    option: option.to_owned(),
                });
            }
        }
    }
    if parts.next().is_some() {
        return Err(VolumeError::Syntax(text.to_owned()));
    }
    if !source.starts_with('/') && !source.starts_with('.') {
        return Err(VolumeError::Named(source.to_owned()));
    }
    Ok(Volume {
        source: PathBuf::from(source),
        destination: self::destination(text, destination)?,
        read_only,
    })
}

/// The destination, cleaned of empty and `.` components.
fn destination(text: &str, destination: &str) -> Result<String, VolumeError> {
    if !destination.starts_with('/') {
        return Err(VolumeError::Relative {
            text: text.to_owned(),
            destination: destination.to_owned(),
        });
    }
    let names: Vec<&str> = destination
        .split('/')
        .filter(|name| !matches!(*name, "" | "."))
        .collect();
    if names.is_empty() || names.contains(&"..") || destination.contains('\0') {
        return Err(VolumeError::Destination {
            text: text.to_owned(),
            destination: destination.to_owned(),
        });
    }
    Ok(format!("/{}", names.join("/")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refused(text: &str) -> String {
        parse(text).expect_err("must be refused").to_string()
    }

    #[test]
    fn source_destination_and_ro_are_taken_apart() {
        assert_eq!(
            parse("./a:/b//c/:ro"),
            Ok(Volume {
                source: "./a".into(),
                destination: "/b/c".into(),
                read_only: true
            })
        );
    }

    #[test]
    fn a_relative_destination_is_refused() {
        assert!(refused("/tmp:data").contains("\"data\" must be an absolute path"));
    }

    #[test]
    fn a_named_volume_is_refused() {
        assert!(refused("data:/data").contains("no named volumes"));
    }

    #[test]
    fn the_root_and_what_leaves_it_are_no_destinations() {
        for text in ["/a:/", "/a:/b/../..", "/a:/."] {
            assert!(refused(text).contains("below /"), "{text}");
        }
    }

    #[test]
    fn an_unknown_option_is_named() {
        assert!(refused("/a:/b:rx").contains("\"rx\""));
        assert!(refused("/a:/b:ro:x").contains("expected SRC:DST"));
        assert!(refused(":/b").contains("expected SRC:DST"));
    }

    #[test]
    fn two_volumes_at_one_place_are_refused() {
        let texts = ["/a:/b".to_owned(), "/c:/b/".to_owned()];
        assert_eq!(parse_all(&texts), Err(VolumeError::Twice("/b".into())));
    }

    proptest! {
        #[test]
        fn any_text_is_a_volume_or_refused(text: String) {
            if let Ok(volume) = parse(&text) {
                prop_assert!(volume.destination.starts_with('/'));
                prop_assert!(!volume.destination.split('/').any(|name| name == ".."));
            }
        }
    }
}
