//! OCI bundles for tests that need a spec `capsid run`'s flags do not make: a privileged container that can
//! hurt its own guest.

use crate::capsid::image;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// A directory of a test, removed with everything in it when dropped.
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new empty directory.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn new(name: &str) -> Scratch {
        Scratch::below("/var/tmp", name)
    }

    /// A new empty directory on a file system that is only in memory.
    ///
    /// # Panics
    /// It cannot be made.
    pub fn in_memory(name: &str) -> Scratch {
        Scratch::below("/dev/shm", name)
    }

    fn below(directory: &str, name: &str) -> Scratch {
        let path = Path::new(directory).join(format!("capsid-test-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("a directory for the test");
        Scratch(path)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The path of `name` in it, as text for a command line.
    pub fn join(&self, name: &str) -> String {
        self.0.join(name).to_string_lossy().into_owned()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("cannot remove {}: {error}", self.0.display());
        }
    }
}

/// The busybox image's layers, the lowest first, each a plain tar.
///
/// # Panics
/// The image is not the docker-archive that `cargo xtask` makes.
pub fn image_layers() -> Vec<Vec<u8>> {
    let archive = fs::read(image()).expect("the test image");
    let file = |name: &str| -> Option<Vec<u8>> {
        let mut archive = tar::Archive::new(archive.as_slice());
        for entry in archive.entries().ok()? {
            let mut entry = entry.ok()?;
            let path = entry.path().ok()?;
            let same = path.strip_prefix("./").unwrap_or(&path).to_str() == Some(name);
            drop(path);
            if same {
                let mut bytes = Vec::new();
                std::io::Read::read_to_end(&mut entry, &mut bytes).ok()?;
                return Some(bytes);
            }
        }
        None
    };
    let manifest: Value =
        serde_json::from_slice(&file("manifest.json").expect("manifest.json")).expect("JSON");
    let names = manifest[0]["Layers"].as_array().expect("layers");
    names
        .iter()
        .map(|name| file(name.as_str().expect("a name")).expect("the layer is in the archive"))
        .collect()
}

/// Unpacks the busybox image's layers into `rootfs`.
///
/// # Panics
/// As for [`image_layers`], or the directory cannot be written.
pub fn unpack_busybox(rootfs: &Path) {
    fs::create_dir_all(rootfs).expect("rootfs");
    for layer in image_layers() {
        let mut layer = tar::Archive::new(layer.as_slice());
        layer.set_preserve_permissions(true);
        layer.unpack(rootfs).expect("the layer unpacks");
    }
}

/// A privileged spec that runs `script`: all capabilities, no pid namespace of its own, nothing masked.
pub fn privileged_spec(script: &str) -> Value {
    let caps: Vec<String> = [
        "CHOWN",
        "DAC_OVERRIDE",
        "DAC_READ_SEARCH",
        "FOWNER",
        "FSETID",
        "KILL",
        "SETGID",
        "SETUID",
        "NET_ADMIN",
        "NET_RAW",
        "SYS_ADMIN",
        "SYS_BOOT",
        "SYS_CHROOT",
        "SYS_NICE",
        "SYS_PTRACE",
        "SYS_RAWIO",
        "SYS_RESOURCE",
        "SYS_TIME",
        "MKNOD",
        "SYSLOG",
    ]
    .iter()
    .map(|cap| format!("CAP_{cap}"))
    .collect();
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh", "-c", script],
            "env": ["PATH=/bin:/usr/bin:/sbin:/usr/sbin"],
            "cwd": "/",
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps}
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}
        ],
        "linux": {"namespaces": [{"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]}
    })
}

/// Writes a bundle with busybox and `spec` into `directory`.
///
/// # Panics
/// It cannot be written.
pub fn write(directory: &Path, spec: &Value) {
    unpack_busybox(&directory.join("rootfs"));
    fs::write(directory.join("config.json"), spec.to_string()).expect("config.json");
}
