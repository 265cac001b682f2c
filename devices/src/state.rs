//! What state that is written down has in common: a version.
//!
//! The state of each device is plain data, to be written by one process and read by another, perhaps a later release. Whoever
//! changes what such a type says counts its version up; who reads one of another version is told so, instead of taking it for his own.
//! State comes from a file, so it is hostile: what is read is checked against the device that takes it.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The version of a type of state: written as the number `N`, and read only if it is that.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Version<const N: u32>;

impl<const N: u32> Serialize for Version<N> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(N)
    }
}

impl<'de, const N: u32> Deserialize<'de> for Version<N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match u32::deserialize(deserializer)? {
            version if version == N => Ok(Version),
            version => Err(serde::de::Error::custom(format_args!(
                "device state of version {version}: this program reads version {N}"
            ))),
        }
    }
}

/// State cannot be a device's: it is that of another one, or of none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the state is not one of this device: its {0}")]
pub struct Foreign(pub &'static str);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_written_as_its_number() {
        assert_eq!(serde_json::to_string(&Version::<7>).unwrap(), "7");
        assert_eq!(serde_json::from_str::<Version<7>>("7").unwrap(), Version);
    }

    #[test]
    fn another_version_is_refused_by_its_number() {
        let refused = serde_json::from_str::<Version<7>>("8").unwrap_err();
        let said = "device state of version 8: this program reads version 7";
        assert!(refused.to_string().starts_with(said), "{refused}");
    }
}
