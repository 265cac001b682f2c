//! The JSON of images: docker-archive's `manifest.json` (docker, `image/tarexport`), the OCI image-spec's index and
//! manifest, and the image config. All of it is a stranger's: bounded, typed, unknown fields ignored as the specs say.

use super::digest::Digest;
use serde::Deserialize;

/// Longest JSON document of an image, in bytes (registries refuse manifests above 4 MiB).
pub(crate) const DOCUMENT_MAX_BYTES: u64 = 4 * 1024 * 1024;
/// Most layers of one image: docker's own limit is 127, and each is a lower directory of one mount.
pub(crate) const LAYERS_MAX: usize = 127;
/// Most manifests in one index.
pub(crate) const MANIFESTS_MAX: usize = 1024;

/// One image of a docker-archive.
#[derive(Debug, Deserialize)]
pub(crate) struct ArchiveImage {
    #[serde(rename = "Config")]
    pub(crate) config: String,
    #[serde(rename = "RepoTags", default)]
    pub(crate) tags: Option<Vec<String>>,
    #[serde(rename = "Layers", default)]
    pub(crate) layers: Option<Vec<String>>,
}

/// An OCI index, or an OCI manifest: told apart by what is in it.
#[derive(Debug, Deserialize)]
pub(crate) struct IndexOrManifest {
    #[serde(default)]
    pub(crate) manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    pub(crate) config: Option<Descriptor>,
    #[serde(default)]
    pub(crate) layers: Vec<Descriptor>,
}

/// What a blob is and how it is checked.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Descriptor {
    pub(crate) digest: Digest,
    #[serde(default)]
    pub(crate) platform: Option<Platform>,
    #[serde(default)]
    pub(crate) annotations: Option<std::collections::BTreeMap<String, String>>,
}

/// For what an image was built.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    pub(crate) architecture: String,
    #[serde(default)]
    pub(crate) os: String,
}

impl Platform {
    /// Whether our guests can run it: linux/amd64, where an empty word says nothing.
    pub(crate) fn is_ours(&self) -> bool {
        matches!(self.os.as_str(), "" | "linux")
            && matches!(self.architecture.as_str(), "" | "amd64" | "x86_64")
    }
}

impl Descriptor {
    /// The name that an index gives an image.
    pub(crate) fn name(&self) -> Option<&str> {
        let annotations = self.annotations.as_ref()?;
        let name = annotations
            .get("org.opencontainers.image.ref.name")
            .or_else(|| annotations.get("io.containerd.image.name"));
        name.map(String::as_str)
    }
}

/// The image config document.
#[derive(Debug, Deserialize)]
pub(crate) struct ConfigDocument {
    #[serde(flatten)]
    pub(crate) platform: Platform,
    #[serde(default)]
    pub(crate) config: Option<ImageConfig>,
    pub(crate) rootfs: RootFs,
}

/// The digests of the unpacked layers, the lowest first.
#[derive(Debug, Deserialize)]
pub(crate) struct RootFs {
    #[serde(default)]
    pub(crate) diff_ids: Vec<Digest>,
}

/// What an image says of the process to run (image-spec, "Image Configuration").
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(crate) struct ImageConfig {
    /// `NAME=value`.
    #[serde(rename = "Env", default)]
    pub env: Option<Vec<String>>,
    /// Arguments, or the command where there is no entrypoint.
    #[serde(rename = "Cmd", default)]
    pub cmd: Option<Vec<String>>,
    /// The command, before the arguments.
    #[serde(rename = "Entrypoint", default)]
    pub entrypoint: Option<Vec<String>>,
    /// Working directory.
    #[serde(rename = "WorkingDir", default)]
    pub working_dir: Option<String>,
    /// `user[:group]`, names or numbers.
    #[serde(rename = "User", default)]
    pub(crate) user: Option<String>,
}

/// Which of an index's manifests to take.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice<'a> {
    /// This one.
    One(&'a Digest),
    /// None is for linux/amd64; the platforms there are.
    NoneOfOurs(Vec<String>),
    /// Several images, by name.
    Several(Vec<String>),
}

/// Chooses among the manifests of an index: those for our platform; where they are told apart by name, they are
/// different images and the choice is not ours.
pub(crate) fn choose(manifests: &[Descriptor]) -> Choice<'_> {
    let is_ours =
        |descriptor: &&Descriptor| descriptor.platform.as_ref().is_none_or(Platform::is_ours);
    let mut ours = manifests.iter().filter(is_ours);
    let Some(first) = ours.next() else {
        let platforms = manifests
            .iter()
            .filter_map(|descriptor| descriptor.platform.as_ref());
        return Choice::NoneOfOurs(
            platforms
                .map(|platform| format!("{}/{}", platform.os, platform.architecture))
                .collect(),
        );
    };
    let names = || {
        manifests
            .iter()
            .filter(is_ours)
            .map(|descriptor| descriptor.name().unwrap_or("unnamed").to_owned())
    };
    if ours.any(|other| other.name() != first.name() && other.digest != first.digest) {
        return Choice::Several(names().collect());
    }
    Choice::One(&first.digest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn descriptor(digit: char, platform: Option<&str>, name: Option<&str>) -> Descriptor {
        let mut value = json!({"digest": format!("sha256:{}", digit.to_string().repeat(64))});
        if let Some((os, architecture)) = platform.and_then(|platform| platform.split_once('/')) {
            value["platform"] = json!({"os": os, "architecture": architecture});
        }
        if let Some(name) = name {
            value["annotations"] = json!({"org.opencontainers.image.ref.name": name});
        }
        serde_json::from_value(value).expect("a descriptor")
    }

    #[test]
    fn our_platform_is_chosen_among_others() {
        let manifests = [
            descriptor('1', Some("linux/arm64"), None),
            descriptor('2', Some("linux/amd64"), None),
            descriptor('3', Some("unknown/unknown"), None),
        ];
        assert_eq!(choose(&manifests), Choice::One(&manifests[1].digest));
    }

    #[test]
    fn an_image_for_others_is_refused_with_its_platforms() {
        let manifests = [descriptor('1', Some("linux/arm64"), None)];
        assert_eq!(
            choose(&manifests),
            Choice::NoneOfOurs(vec!["linux/arm64".into()])
        );
    }

    #[test]
    fn two_images_of_different_names_are_not_chosen_between() {
        let manifests = [
            descriptor('1', None, Some("a")),
            descriptor('2', None, Some("b")),
        ];
        assert_eq!(
            choose(&manifests),
            Choice::Several(vec!["a".into(), "b".into()])
        );
    }

    #[test]
    fn two_names_of_one_image_are_one_image() {
        let manifests = [
            descriptor('1', None, Some("a")),
            descriptor('1', None, Some("b")),
        ];
        assert_eq!(choose(&manifests), Choice::One(&manifests[0].digest));
    }

    #[test]
    fn a_config_without_a_config_is_an_empty_one() {
        let document: ConfigDocument =
            serde_json::from_str(r#"{"os":"linux","architecture":"amd64","config":null,"rootfs":{"type":"layers","diff_ids":[]}}"#)
                .expect("valid");
        assert_eq!(document.config, None);
        assert!(document.platform.is_ours());
    }

    proptest! {
        #[test]
        fn any_json_is_read_or_refused(text: String) {
            let _either = serde_json::from_str::<ConfigDocument>(&text);
            let _either = serde_json::from_str::<IndexOrManifest>(&text);
            let _either = serde_json::from_str::<Vec<ArchiveImage>>(&text);
        }
    }
}
