//! A bundle: a directory with `config.json` (runtime-spec, `bundle.md`). The file is read with a bound and parsed once;
//! what would happen on this host with runc and cannot happen in a VM is refused with its reason.

use super::SPEC_MAX_BYTES;
use crate::volume::{VOLUMES_MAX, Volume};
use oci_spec::runtime::{Hooks, Mount, Spec};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// File systems that the guest's kernel mounts by itself, without anything of this host.
const GUEST_FILE_SYSTEMS: [&str; 8] = [
    "proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "devtmpfs",
];

/// Why a bundle was refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BundleError {
    /// It cannot be read.
    #[error("cannot read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// Nothing in it.
    #[error("{0} is empty")]
    Empty(PathBuf),
    /// Too long.
    #[error("{path} is longer than {SPEC_MAX_BYTES} bytes")]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// Not a runtime-spec.
    #[error("{path} is not a valid OCI runtime spec")]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and how.
        #[source]
        cause: serde_json::Error,
    },
    /// One field.
    #[error("{path}: {field}: {problem}")]
    Field {
        /// The file.
        path: PathBuf,
        /// Which.
        field: String,
        /// What is wrong.
        problem: &'static str,
    },
}

/// A bundle whose spec was read.
#[derive(Debug)]
pub(crate) struct Bundle {
    /// Its spec, without the mounts that became volumes.
    pub(crate) spec: Spec,
    /// The directory of its root file system.
    pub(crate) root: PathBuf,
    /// Its bind mounts.
    pub(crate) volumes: Vec<Volume>,
    /// Whether it asks for a terminal.
    pub(crate) terminal: bool,
}

/// Reads the bundle in `directory`.
///
/// # Errors
/// The first thing that is missing, broken or cannot be done in a VM.
pub(crate) fn read(directory: &Path) -> Result<Bundle, BundleError> {
    let path = directory.join("config.json");
    let bytes = read_bounded(&path)?;
    parse(&bytes, path, directory)
}

/// Takes the `config.json` at `path` of the bundle in `directory`.
///
/// # Errors
/// As for [`read`].
pub(crate) fn parse(bytes: &[u8], path: PathBuf, directory: &Path) -> Result<Bundle, BundleError> {
    let spec = serde_json::from_slice(bytes).map_err(|cause| BundleError::Json {
        path: path.clone(),
        cause,
    })?;
    translate(spec, directory).map_err(|(field, problem)| BundleError::Field {
        path,
        field,
        problem,
    })
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, BundleError> {
    let failed = |cause| BundleError::Read {
        path: path.to_owned(),
        cause,
    };
    // A named pipe must not hold us.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let opened = rustix::fs::open(path, flags, Mode::empty());
    let file = File::from(opened.map_err(|error| failed(error.into()))?);
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(failed(io::Error::other("it is not a regular file")));
    }
    let mut bytes = Vec::new();
    file.take(SPEC_MAX_BYTES as u64 + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    match bytes.len() {
        0 => Err(BundleError::Empty(path.to_owned())),
        1..=SPEC_MAX_BYTES => Ok(bytes),
        _ => Err(BundleError::TooLong {
            path: path.to_owned(),
        }),
    }
}

type Refusal = (String, &'static str);

fn refuse<T>(field: impl Into<String>, problem: &'static str) -> Result<T, Refusal> {
    Err((field.into(), problem))
}

fn translate(mut spec: Spec, directory: &Path) -> Result<Bundle, Refusal> {
    check_platform(&spec)?;
    if let Some(hooks) = spec.hooks() {
        check_hooks(hooks)?;
    }
    let root = match spec.root() {
        Some(root) if !root.path().as_os_str().is_empty() => directory.join(root.path()),
        _ => return refuse("root.path", "missing"),
    };
    let Some(process) = spec.process() else {
        return refuse("process", "missing");
    };
    let terminal = process.terminal().unwrap_or(false);
    let namespaces = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().clone());
    for (index, namespace) in namespaces.iter().flatten().enumerate() {
        if namespace.path().is_some() {
            return refuse(
                format!("linux.namespaces[{index}].path"),
                "a namespace of this host cannot be joined from inside a VM",
            );
        }
    }
    let mut volumes = Vec::new();
    let mut mounts = Vec::new();
    for (index, mount) in spec.mounts().clone().into_iter().flatten().enumerate() {
        let field = |name| format!("mounts[{index}].{name}");
        if !mount.destination().is_absolute() {
            return refuse(field("destination"), "must be an absolute path");
        }
        if is_bind(&mount) {
            volumes.push(volume(&mount, directory, &field)?);
        } else if mount
            .typ()
            .as_deref()
            .is_some_and(|kind| GUEST_FILE_SYSTEMS.contains(&kind))
        {
            mounts.push(mount);
        } else {
            return refuse(
                field("type"),
                "this file system needs something of the host; bind mount it instead",
            );
        }
    }
    if volumes.len() > VOLUMES_MAX {
        return refuse("mounts", "too many bind mounts");
    }
    spec.set_mounts(Some(mounts));
    Ok(Bundle {
        spec,
        root,
        volumes,
        terminal,
    })
}

fn check_platform(spec: &Spec) -> Result<(), Refusal> {
    if !spec.version().starts_with("1.") {
        return refuse("ociVersion", "missing or unsupported, expected 1.x");
    }
    if spec.windows().is_some() || spec.solaris().is_some() {
        return refuse("windows or solaris", "the guest is Linux");
    }
    if spec.vm().is_some() {
        return refuse("vm", "the VM is configured by capsid's own flags");
    }
    if spec
        .linux()
        .as_ref()
        .is_some_and(|linux| linux.intel_rdt().is_some())
    {
        return refuse("linux.intelRdt", "the guest has no resource director");
    }
    Ok(())
}

/// Hooks that run in the runtime's namespace would run on this host, beside a container that is not there.
#[allow(deprecated)] // prestart is refused by name
fn check_hooks(hooks: &Hooks) -> Result<(), Refusal> {
    let on_the_host = [
        ("hooks.prestart", hooks.prestart()),
        ("hooks.createRuntime", hooks.create_runtime()),
        ("hooks.poststart", hooks.poststart()),
        ("hooks.poststop", hooks.poststop()),
    ];
    match on_the_host
        .into_iter()
        .find(|(_, hooks)| hooks.as_ref().is_some_and(|hooks| !hooks.is_empty()))
    {
        Some((field, _)) => refuse(
            field,
            "runs on the host, where a VM's container is not; use createContainer or startContainer",
        ),
        None => Ok(()),
    }
}

fn is_bind(mount: &Mount) -> bool {
    let options = mount.options().iter().flatten();
    mount.typ().as_deref() == Some("bind")
        || options
            .into_iter()
            .any(|option| option == "bind" || option == "rbind")
}

fn goes_up(place: &str) -> bool {
    place.split('/').any(|name| name == "..")
}

fn volume(
    mount: &Mount,
    directory: &Path,
    field: &dyn Fn(&'static str) -> String,
) -> Result<Volume, Refusal> {
    let Some(source) = mount.source() else {
        return refuse(field("source"), "missing for a bind mount");
    };
    let destination = mount.destination().to_str();
    let Some(destination) = destination.filter(|place| !goes_up(place)) else {
        return refuse(
            field("destination"),
            "must be UTF-8 and have no component ..",
        );
    };
    Ok(Volume {
        // Relative to the bundle, as runc takes it.
        source: directory.join(source),
        destination: destination.to_owned(),
        read_only: mount
            .options()
            .iter()
            .flatten()
            .any(|option| option == "ro" || option == "rro"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Scratch;
    use proptest::prelude::*;
    use serde_json::{Value, json};
    use std::fs;

    fn good() -> Value {
        json!({"ociVersion": "1.0.2", "root": {"path": "rootfs"},
               "process": {"user": {"uid": 0, "gid": 0}, "args": ["sh"], "cwd": "/"},
               "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
                          {"destination": "/data", "source": "data", "options": ["rbind", "ro"]}],
               "linux": {}})
    }

    fn read_text(text: &[u8]) -> Result<Bundle, String> {
        let scratch = Scratch::new("bundle");
        fs::write(scratch.path().join("config.json"), text).expect("writable");
        read(scratch.path()).map_err(|error| error.to_string())
    }

    fn refused(change: impl FnOnce(&mut Value)) -> String {
        let mut spec = good();
        change(&mut spec);
        read_text(spec.to_string().as_bytes()).expect_err("must be refused")
    }

    #[test]
    fn bind_mounts_become_volumes() {
        let bundle = read_text(good().to_string().as_bytes()).expect("a good bundle");
        let [volume] = bundle.volumes.as_slice() else {
            panic!("one volume, got {:?}", bundle.volumes);
        };
        assert!(volume.read_only && volume.source.ends_with("data"));
        assert_eq!(bundle.spec.mounts().as_ref().map(Vec::len), Some(1));
        assert!(bundle.root.ends_with("rootfs"));
    }

    #[test]
    fn a_missing_empty_or_broken_config_is_named() {
        let error = read(Path::new("/no/such"))
            .expect_err("missing")
            .to_string();
        assert_eq!(error, "cannot read /no/such/config.json");
        assert!(
            read_text(b"")
                .expect_err("empty")
                .ends_with("config.json is empty")
        );
        assert!(
            read_text(b"[]")
                .expect_err("a list")
                .contains("config.json: ")
        );
        for text in [&b"not json"[..], b"{\"process\": 7}", b"\xff"] {
            let error = read_text(text).expect_err("broken");
            assert!(
                error.contains("config.json is not a valid OCI runtime spec"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_huge_config_is_refused_unparsed() {
        let error = read_text(&vec![b' '; 64 << 20]).expect_err("huge");
        assert!(error.contains("longer than 2097152 bytes"), "{error}");
    }

    #[test]
    fn a_deeply_nested_config_is_refused() {
        let text = format!("{{\"annotations\":{}", "[".repeat(1 << 20));
        assert!(read_text(text.as_bytes()).is_err());
    }

    #[test]
    fn what_would_be_the_host_s_is_refused_with_its_reason() {
        let error = refused(|spec| spec["hooks"] = json!({"poststop": [{"path": "/bin/x"}]}));
        assert!(
            error.contains("hooks.poststop: runs on the host"),
            "{error}"
        );
        let error = refused(|spec| {
            spec["linux"] = json!({"namespaces": [{"type": "network", "path": "/run/netns/x"}]});
        });
        assert!(error.contains("linux.namespaces[0].path"), "{error}");
        let error = refused(|spec| spec["mounts"][0]["type"] = json!("ext4"));
        assert!(error.contains("mounts[0].type"), "{error}");
        let error = refused(|spec| spec["mounts"][0]["destination"] = json!("proc"));
        assert!(
            error.contains("mounts[0].destination: must be an absolute path"),
            "{error}"
        );
        assert!(refused(|spec| spec["ociVersion"] = json!("9.0")).contains("ociVersion"));
        assert!(refused(|spec| spec["root"] = Value::Null).contains("root.path"));
    }

    #[test]
    fn only_a_component_of_two_dots_is_refused_in_a_destination() {
        for place in ["/..", "/a/..", "/a/../b", "/../a"] {
            let error = refused(|spec| spec["mounts"][1]["destination"] = json!(place));
            assert!(error.contains("mounts[1].destination"), "{error}");
        }
        for place in ["/a..b", "/..a", "/a..", "/.../a"] {
            let mut spec = good();
            spec["mounts"][1]["destination"] = json!(place);
            let bundle = read_text(spec.to_string().as_bytes()).expect("a name like others");
            assert_eq!(
                bundle.volumes.first().map(|v| v.destination.as_str()),
                Some(place)
            );
        }
    }

    #[test]
    fn a_config_that_is_a_pipe_does_not_hold_us() {
        let scratch = Scratch::new("bundle");
        let path = scratch.path().join("config.json");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::from_raw_mode(0o600)).expect("writable");
        let error = read(scratch.path()).expect_err("a pipe");
        assert!(matches!(error, BundleError::Read { .. }));
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text: String) {
            if let Ok(spec) = serde_json::from_str::<Spec>(&text) {
                let _either = translate(spec, Path::new("/bundle"));
            }
        }
    }
}
