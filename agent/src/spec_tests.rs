//! What the check of a spec takes, changes and refuses.

use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};

fn config() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "root": {"path": "/run/capsid/share/c1/rootfs"},
        "process": {
            "user": {"uid": 1000, "gid": 1000},
            "args": ["sh"], "env": ["PATH=/bin"], "cwd": "/", "noNewPrivileges": false
        },
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}, {"type": "network"}]}
    })
}

fn check(config: &Value) -> Result<ContainerSpec, BadSpec> {
    container("c1", config.to_string().as_bytes())
}

/// The field that a refusal names.
fn refused_field(config: &Value) -> &'static str {
    match check(config) {
        Err(BadSpec::Field { field, .. }) => field,
        other => panic!("expected a refused field, got {other:?}"),
    }
}

#[test]
fn a_plain_spec_is_taken() {
    let checked = check(&config()).expect("taken");
    assert!(checked.own_network && checked.own_pids);
    assert_eq!(checked.process.uid, 1000);
    assert!(checked.process.needs_home);
}

#[test]
fn the_cgroup_is_the_agents_choice() {
    let mut config = config();
    config["linux"]["cgroupsPath"] = json!("kubepods.slice:cri-containerd:abc");
    let checked = check(&config).expect("taken");
    let linux = checked.spec.linux().clone().expect("linux");
    assert_eq!(linux.cgroups_path(), &Some(PathBuf::from("/capsid/c1")));
}

#[test]
fn no_capabilities_means_none() {
    let checked = check(&config()).expect("taken");
    let process = checked.spec.process().clone().expect("process");
    let capabilities = process.capabilities().clone().expect("explicit");
    assert_eq!(capabilities.effective(), &None);
    assert_eq!(capabilities.bounding(), &None);
    assert_eq!(capabilities.inheritable(), &None);
}

#[test]
fn inheritable_capabilities_are_dropped() {
    let mut config = config();
    config["process"]["capabilities"] = json!({
        "bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"],
        "permitted": ["CAP_CHOWN"], "inheritable": ["CAP_CHOWN"]
    });
    let checked = check(&config).expect("taken");
    let process = checked.spec.process().clone().expect("process");
    let capabilities = process.capabilities().clone().expect("given");
    assert_eq!(capabilities.inheritable(), &None);
    assert_eq!(
        capabilities.bounding().as_ref().map(|set| set.len()),
        Some(1)
    );
}

#[test]
fn no_new_privileges_false_is_not_set() {
    let checked = check(&config()).expect("taken");
    let process = checked.spec.process().clone().expect("process");
    assert_eq!(process.no_new_privileges(), None);
}

#[test]
fn the_agents_oom_score_is_not_inherited() {
    let checked = check(&config()).expect("taken");
    let process = checked.spec.process().clone().expect("process");
    assert_eq!(process.oom_score_adj(), Some(0));
}

#[test]
fn host_labels_are_taken_out() {
    let mut config = config();
    config["process"]["apparmorProfile"] = json!("cri-containerd.apparmor.d");
    config["process"]["selinuxLabel"] = json!("system_u:system_r:container_t:s0");
    config["linux"]["mountLabel"] = json!("system_u:object_r:container_file_t:s0");
    let checked = check(&config).expect("taken");
    let process = checked.spec.process().clone().expect("process");
    assert_eq!(process.apparmor_profile(), &None);
    assert_eq!(process.selinux_label(), &None);
}

#[test]
fn only_guest_hooks_stay() {
    let mut config = config();
    config["hooks"] = json!({
        "createRuntime": [{"path": "/host/hook"}], "poststop": [{"path": "/host/hook"}],
        "startContainer": [{"path": "/bin/guest-hook"}]
    });
    let hooks = check(&config)
        .expect("taken")
        .spec
        .hooks()
        .clone()
        .expect("hooks");
    assert!(hooks.create_runtime().is_none());
    assert!(hooks.poststop().is_none());
    assert_eq!(hooks.start_container().as_ref().map(Vec::len), Some(1));
}

#[test]
fn a_spec_without_process_is_refused() {
    let mut config = config();
    config["process"] = Value::Null;
    assert_eq!(refused_field(&config), "process");
}

#[test]
fn empty_args_are_refused() {
    let mut config = config();
    config["process"]["args"] = json!([]);
    assert_eq!(refused_field(&config), "process.args");
}

#[test]
fn a_nul_in_the_environment_is_refused() {
    let mut config = config();
    config["process"]["env"] = json!(["A=b\u{0}c"]);
    assert_eq!(refused_field(&config), "process.env");
}

#[test]
fn an_environment_entry_without_equals_is_refused() {
    let mut config = config();
    config["process"]["env"] = json!(["PATH"]);
    assert_eq!(refused_field(&config), "process.env");
}

#[test]
fn a_relative_cwd_is_refused() {
    let mut config = config();
    config["process"]["cwd"] = json!("tmp");
    assert_eq!(refused_field(&config), "process.cwd");
}

#[test]
fn uid_minus_one_is_refused() {
    let mut config = config();
    config["process"]["user"]["uid"] = json!(u32::MAX);
    assert_eq!(refused_field(&config), "process.user");
}

#[test]
fn a_root_that_climbs_is_refused() {
    let mut config = config();
    config["root"]["path"] = json!("/run/capsid/share/../../..");
    assert_eq!(refused_field(&config), "root.path");
}

#[test]
fn a_relative_mount_destination_is_refused() {
    let mut config = config();
    config["mounts"] = json!([{"destination": "data", "type": "tmpfs", "source": "tmpfs"}]);
    assert_eq!(refused_field(&config), "mounts.destination");
}

fn destinations(config: &Value) -> Vec<PathBuf> {
    let mounts = check(config).expect("taken").spec.mounts().clone();
    let mounts = mounts.unwrap_or_default();
    mounts.iter().map(|m| m.destination().clone()).collect()
}

#[test]
fn dev_is_a_mount_before_what_lies_in_it() {
    let mount = |path: &str| json!({"destination": path, "type": "tmpfs", "source": "tmpfs"});
    let mut config = config();
    assert_eq!(destinations(&config), [Path::new("/dev")]);
    config["mounts"] = json!([mount("/devices"), mount("/dev/shm"), mount("/sys")]);
    let expected = ["/devices", "/dev", "/dev/shm", "/sys"].map(PathBuf::from);
    assert_eq!(destinations(&config), expected);
    config["mounts"] = json!([mount("/dev/"), mount("/dev/shm")]);
    assert_eq!(destinations(&config).len(), 2, "the spec's own is kept");
}

#[test]
fn a_shared_mount_namespace_is_refused() {
    let mut config = config();
    config["linux"]["namespaces"] = json!([{"type": "pid"}]);
    assert_eq!(refused_field(&config), "linux.namespaces");
}

#[test]
fn a_namespace_joined_by_a_path_is_refused() {
    let mut config = config();
    for kind in ["network", "ipc", "uts", "pid", "mount", "cgroup"] {
        config["linux"]["namespaces"] =
            json!([{"type": "mount"}, {"type": "pid"}, {"type": kind, "path": "/proc/1/ns/x"}]);
        assert_eq!(refused_field(&config), "linux.namespaces", "{kind}");
    }
}

#[test]
fn a_shared_pid_namespace_is_in_the_place_of_a_new_one() {
    let mut checked = check(&config()).expect("taken");
    checked.join_pid_namespace("/proc/1/fd/7".into());
    let linux = checked.spec.linux().clone().expect("linux");
    let of_pid = |namespace: &&LinuxNamespace| namespace.typ() == LinuxNamespaceType::Pid;
    let namespaces = linux.namespaces().clone().expect("namespaces");
    let paths: Vec<_> = namespaces
        .iter()
        .filter(of_pid)
        .map(|namespace| namespace.path().clone())
        .collect();
    assert_eq!(paths, [Some("/proc/1/fd/7".into())]);
    assert_eq!(namespaces.len(), 3);
    assert!(!checked.own_pids);
}

#[test]
fn a_user_namespace_is_refused() {
    let mut config = config();
    config["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "user"}]);
    assert_eq!(refused_field(&config), "linux.namespaces");
}

#[test]
fn an_rlimit_named_twice_is_refused() {
    let mut config = config();
    let nofile = json!({"type": "RLIMIT_NOFILE", "soft": 1, "hard": 2});
    config["process"]["rlimits"] = json!([nofile, nofile]);
    assert_eq!(refused_field(&config), "process.rlimits");
}

#[test]
fn another_major_version_is_refused() {
    let mut config = config();
    config["ociVersion"] = json!("9.0.0");
    assert_eq!(refused_field(&config), "ociVersion");
}

#[test]
fn a_spec_over_the_bound_is_refused_unread() {
    let refused = container("c1", &vec![b' '; SPEC_MAX_BYTES + 1]);
    assert!(matches!(refused, Err(BadSpec::TooLong { .. })));
}

#[test]
fn deep_nesting_is_refused() {
    let refused = container("c1", "[".repeat(100_000).as_bytes());
    assert!(matches!(refused, Err(BadSpec::Parse { .. })));
}

#[test]
fn a_shared_network_is_not_ours_to_bring_up() {
    let mut config = config();
    config["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "pid"}]);
    assert!(!check(&config).expect("taken").own_network);
}

#[test]
fn home_comes_from_the_images_passwd() {
    let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:33::/var/www:/bin/false\n";
    assert_eq!(home_in_passwd(passwd, 33), Some("/var/www"));
    assert_eq!(home_in_passwd(passwd, 44), None);
    assert_eq!(home_in_passwd("x:x:33", 33), None);
}

proptest! {
    #[test]
    fn any_bytes_are_taken_or_refused(json: Vec<u8>) {
        let _ = container("c1", &json);
        let _ = process(&json);
        let _ = resources(&json);
    }

    #[test]
    fn any_passwd_gives_an_absolute_home_or_none(passwd: String, uid: u32) {
        if let Some(home) = home_in_passwd(&passwd, uid) {
            prop_assert!(home.starts_with('/'));
        }
    }
}
