//! What the shim says about itself: `-info` for containerd 2.0 and newer (introspection, and once before the first container), `-v` for
//! people. It needs no container, no environment and no standard input.
//!
//! What it claims is what the agent and its OCI library do (agent/src/spec.rs, libcontainer's `syscall/linux.rs` and `seccomp`), and what
//! this shim does for mounts and hooks of the host.

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use serde_json::{Value, json};
use std::collections::HashMap;

/// The name that containerd finds this program by.
pub const RUNTIME: &str = "io.containerd.capsid.v2";
/// This program's name and version, as one line.
pub const VERSION: &str = concat!("containerd-shim-capsid-v2 ", env!("CARGO_PKG_VERSION"));

/// What the type of the features is called (github.com/opencontainers/runtime-spec, specs-go/features, by typeurl).
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
/// The annotation that has containerd >= 2.2 hand over mounts that it would make itself otherwise (core/runtime/v2/task_manager.go).
const ALLOW_MOUNTS: &str = "containerd.io/runtime-allow-mounts";
/// The types of mounts that this shim makes itself, in the annotation's words.
const MOUNTS: &[&str] = &[];

/// Options of mounts that are not a file system's own.
const MOUNT_OPTIONS: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "remount",
    "rexec",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "slave",
    "strictatime",
    "suid",
    "sync",
    "unbindable",
];

/// The capabilities of the guest's kernel, without their prefix.
const CAPABILITIES: &[&str] = &[
    "AUDIT_CONTROL",
    "AUDIT_READ",
    "AUDIT_WRITE",
    "BLOCK_SUSPEND",
    "BPF",
    "CHECKPOINT_RESTORE",
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "IPC_LOCK",
    "IPC_OWNER",
    "KILL",
    "LEASE",
    "LINUX_IMMUTABLE",
    "MAC_ADMIN",
    "MAC_OVERRIDE",
    "MKNOD",
    "NET_ADMIN",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_RAW",
    "PERFMON",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYSLOG",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_CHROOT",
    "SYS_MODULE",
    "SYS_NICE",
    "SYS_PACCT",
    "SYS_PTRACE",
    "SYS_RAWIO",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "WAKE_ALARM",
];

/// The answer to `-info`.
pub fn runtime_info() -> RuntimeInfo {
    let version = RuntimeVersion {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        ..RuntimeVersion::default()
    };
    let features = Any {
        type_url: FEATURES_TYPE.to_owned(),
        value: features().to_string().into_bytes(),
        ..Any::default()
    };
    RuntimeInfo {
        name: RUNTIME.to_owned(),
        version: MessageField::some(version),
        features: MessageField::some(features),
        annotations: annotations(MOUNTS),
        ..RuntimeInfo::default()
    }
}

/// The annotation is there only with something in it: an empty one would have containerd compare mounts with nothing.
fn annotations(mounts: &[&str]) -> HashMap<String, String> {
    let allowed = (!mounts.is_empty()).then(|| (ALLOW_MOUNTS.to_owned(), mounts.join(",")));
    allowed.into_iter().collect()
}

/// OCI runtime-spec, features.md.
fn features() -> Value {
    let capabilities: Vec<String> = CAPABILITIES
        .iter()
        .map(|name| format!("CAP_{name}"))
        .collect();
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.1.0",
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "time", "uts"],
            "capabilities": capabilities,
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD",
                    "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE",
                ],
                "archs": ["SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"],
                "knownFlags": [
                    "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC",
                    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
                ],
            },
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": false}},
            "netDevices": {"enabled": false},
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::{Capability, Features, LinuxNamespaceType};
    use std::str::FromStr;

    #[test]
    fn the_features_are_those_of_the_runtime_spec() {
        let info = runtime_info();
        let any = info.features.as_ref().expect("features");
        assert_eq!(any.type_url, FEATURES_TYPE);
        let features: Features = serde_json::from_slice(&any.value).expect("the spec's types");
        let linux = features.linux().as_ref().expect("linux");
        let namespaces = linux.namespaces().as_ref().expect("namespaces");
        assert!(namespaces.contains(&LinuxNamespaceType::Network));
        // The agent refuses user namespaces.
        assert!(!namespaces.contains(&LinuxNamespaceType::User));
        let seccomp = linux.seccomp().as_ref().expect("seccomp");
        assert_eq!(seccomp.enabled(), &Some(true));
        // CRI allows recursive read-only mounts by this word (internal/cri/server/service.go).
        let options = features.mount_options().as_ref().expect("options");
        assert!(options.contains(&"rro".to_owned()) && !options.contains(&"idmap".to_owned()));
    }

    #[test]
    fn every_capability_is_one_and_none_is_missing() {
        let known: Vec<Capability> = CAPABILITIES
            .iter()
            .map(|name| Capability::from_str(name).expect("a capability"))
            .collect();
        let distinct: std::collections::HashSet<_> = known.iter().collect();
        // CAP_LAST_CAP is CAP_CHECKPOINT_RESTORE, 40 (include/uapi/linux/capability.h).
        assert_eq!(distinct.len(), 41);
    }

    #[test]
    fn only_mounts_that_the_shim_takes_are_announced() {
        assert!(runtime_info().annotations.is_empty());
        let announced = annotations(&["erofs", "ext4"]);
        assert_eq!(
            announced.get(ALLOW_MOUNTS).map(String::as_str),
            Some("erofs,ext4")
        );
    }
}
