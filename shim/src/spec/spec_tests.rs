//! What a spec becomes, what is dropped of it and what is refused.

use super::engines::{self, CONTAINER, SANDBOX};
use super::*;
use serde_json::{Value, json};

const BUNDLE: &str = "/run/containerd/io.containerd.runtime.v2.task/k8s.io/c0";
const ALONE: Role<'static> = Role::Alone;
const PAUSE: Role<'static> = Role::Pause;
const MEMBER: Role<'static> = Role::Member { sandbox: SANDBOX };

fn translated(spec: &Value, role: Role<'_>) -> Result<GuestSpec, Refusal> {
    let spec: Spec = serde_json::from_value(spec.clone()).expect("a spec");
    let context = Context {
        id: CONTAINER,
        bundle: Path::new(BUNDLE),
        role,
    };
    translate(&spec, &context)
}

fn taken(spec: &Value, role: Role<'_>) -> GuestSpec {
    translated(spec, role).expect("taken")
}

fn json_of(guest: &GuestSpec) -> Value {
    serde_json::from_slice(&guest.json).expect("JSON")
}

fn refused(spec: &Value, role: Role<'_>) -> String {
    translated(spec, role).expect_err("refused").to_string()
}

/// The types of the namespaces that the guest makes.
fn namespaces(guest: &GuestSpec) -> Vec<String> {
    let json = json_of(guest);
    let all = json["linux"]["namespaces"].as_array().cloned();
    let all = all.unwrap_or_default();
    assert!(all.iter().all(|entry| entry["path"].is_null()), "{all:?}");
    let kind = |entry: &Value| entry["type"].as_str().unwrap_or_default().to_owned();
    all.iter().map(kind).collect()
}

/// Source and options of the guest's mount at this place.
fn mount_at(guest: &GuestSpec, place: &str) -> (String, Vec<String>) {
    let json = json_of(guest);
    let mounts = json["mounts"].as_array().cloned().unwrap_or_default();
    let mount = mounts.iter().find(|mount| mount["destination"] == place);
    let mount = mount.unwrap_or_else(|| panic!("no mount at {place}"));
    let options = serde_json::from_value(mount["options"].clone());
    let source = mount["source"].as_str().unwrap_or_default();
    (source.to_owned(), options.expect("options"))
}

fn without(spec: &Value, kind: &str) -> Value {
    let mut spec = spec.clone();
    let namespaces = spec["linux"]["namespaces"].as_array_mut();
    namespaces
        .expect("namespaces")
        .retain(|entry| entry["type"] != kind);
    spec
}

fn with_namespace(spec: &Value, kind: &str, path: &str) -> Value {
    let mut spec = without(spec, kind);
    let namespaces = spec["linux"]["namespaces"].as_array_mut();
    namespaces
        .expect("namespaces")
        .push(json!({"type": kind, "path": path}));
    spec
}

fn with_mount(spec: &Value, mount: Value) -> Value {
    let mut spec = spec.clone();
    spec["mounts"].as_array_mut().expect("mounts").push(mount);
    spec
}

fn bind(source: &str, destination: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}

#[test]
fn what_engines_write_is_taken() {
    let table = [
        ("containerd 1.7, pause", engines::cri_pause(), PAUSE, 0),
        ("containerd 1.7", engines::cri_1_7(), MEMBER, 4),
        ("containerd 2", engines::cri_2(), MEMBER, 4),
        ("CRI-O", engines::crio(), MEMBER, 2),
        ("ctr", engines::ctr(), ALONE, 1),
        ("nerdctl", engines::nerdctl(), ALONE, 4),
        ("docker", engines::docker(), ALONE, 4),
    ];
    for (engine, spec, role, volumes) in table {
        let guest = translated(&spec, role).unwrap_or_else(|refusal| panic!("{engine}: {refusal}"));
        assert_eq!(guest.volumes.len(), volumes, "{engine}");
        assert!(guest.cgroup.is_some(), "{engine}");
        assert_eq!(guest.json.is_empty(), role == PAUSE, "{engine}");
    }
}

#[test]
fn the_root_is_a_path_of_the_share() {
    let guest = taken(&engines::cri_1_7(), MEMBER);
    let root = format!("/run/capsid/share/{CONTAINER}/rootfs");
    assert_eq!(
        json_of(&guest)["root"],
        json!({"path": root, "readonly": false})
    );
    assert_eq!(guest.root, Path::new(BUNDLE).join("rootfs"));
    assert!(!guest.read_only_root);
    let crio = taken(&engines::crio(), MEMBER);
    assert!(crio.root.starts_with("/var/lib/containers/storage"));
    assert!(taken(&engines::cri_pause(), PAUSE).read_only_root);
}

#[test]
fn bind_mounts_become_volumes_in_their_order() {
    let guest = taken(&engines::cri_1_7(), MEMBER);
    let volumes = format!("/run/capsid/share/{CONTAINER}/volumes");
    let hosts = mount_at(&guest, "/etc/hosts");
    assert_eq!(
        hosts,
        (
            format!("{volumes}/0"),
            vec!["rbind".to_owned(), "rw".to_owned()]
        )
    );
    let token = mount_at(&guest, "/var/run/secrets/kubernetes.io/serviceaccount");
    assert_eq!(
        token,
        (
            format!("{volumes}/3"),
            vec!["rbind".to_owned(), "ro".to_owned()]
        )
    );
    let [hosts, .., token] = guest.volumes.as_slice() else {
        panic!("volumes: {:?}", guest.volumes);
    };
    assert!(hosts.source.ends_with("etc-hosts") && hosts.recursive && !hosts.read_only);
    assert!(token.source.ends_with("kube-api-access") && token.read_only);
}

#[test]
fn a_bind_mount_without_rbind_is_of_one_mount() {
    let spec = with_mount(&engines::ctr(), bind("/srv/one", "/one", &["ro", "rw"]));
    let guest = taken(&spec, ALONE);
    let last = guest.volumes.last().expect("a volume");
    assert!(
        !last.recursive && !last.read_only,
        "the last of ro and rw counts"
    );
    assert!(mount_at(&guest, "/one").1.contains(&"bind".to_owned()));
}

#[test]
fn a_relative_source_is_the_bundle_s() {
    let spec = with_mount(&engines::ctr(), bind("data/./x", "/x", &["bind"]));
    let guest = taken(&spec, ALONE);
    let last = guest.volumes.last().expect("a volume");
    assert_eq!(last.source, Path::new(BUNDLE).join("data/x"));
}

#[test]
fn the_pod_s_shared_memory_is_the_guest_s() {
    for spec in [engines::cri_1_7(), engines::cri_2(), engines::crio()] {
        let guest = taken(&spec, MEMBER);
        assert_eq!(mount_at(&guest, "/dev/shm").0, "/run/capsid/pod/shm");
    }
    let shareable = format!("/var/lib/docker/containers/{CONTAINER}/mounts/shm");
    let mut spec = engines::docker();
    let mounts = spec["mounts"].as_array_mut().expect("mounts");
    mounts.retain(|mount| mount["destination"] != "/dev/shm");
    let spec = with_mount(&spec, bind(&shareable, "/dev/shm", &["rbind"]));
    assert_eq!(
        mount_at(&taken(&spec, ALONE), "/dev/shm").0,
        "/run/capsid/pod/shm"
    );
}

#[test]
fn a_volume_that_a_person_mounts_at_dev_shm_is_a_volume() {
    let mut spec = engines::cri_1_7();
    let mounts = spec["mounts"].as_array_mut().expect("mounts");
    mounts.retain(|mount| mount["destination"] != "/dev/shm");
    let memory = "/var/lib/kubelet/pods/8d6f/volumes/kubernetes.io~empty-dir/shm";
    let guest = taken(
        &with_mount(&spec, bind(memory, "/dev/shm", &["rbind"])),
        MEMBER,
    );
    let source = mount_at(&guest, "/dev/shm").0;
    assert!(source.starts_with("/run/capsid/share/"), "{source}");
}

#[test]
fn kernel_file_systems_of_the_host_are_the_guest_s_own() {
    for source in [
        "/sys/fs/cgroup",
        "/proc",
        "//sys",
        "/sys/./class",
        "/dev/null",
    ] {
        let spec = with_mount(&engines::cri_2(), bind(source, "/there", &["rbind"]));
        let guest = taken(&spec, MEMBER);
        let plain: PathBuf = Path::new(source).components().collect();
        assert_eq!(Path::new(&mount_at(&guest, "/there").0), plain, "{source}");
        assert_eq!(guest.volumes.len(), 4, "{source}");
    }
    for source in ["/system", "/process", "/dev/shm/x", "/devices"] {
        let spec = with_mount(&engines::cri_2(), bind(source, "/there", &["rbind"]));
        assert_eq!(taken(&spec, MEMBER).volumes.len(), 5, "{source}");
    }
}

#[test]
fn devices_of_the_host_are_refused_as_mounts() {
    for source in ["/dev", "/dev/sda", "/dev/./kvm"] {
        let spec = with_mount(&engines::cri_2(), bind(source, "/there", &["rbind"]));
        let refusal = refused(&spec, MEMBER);
        assert!(refusal.contains("].source: /dev"), "{refusal}");
    }
}

#[test]
fn mounts_that_cannot_be_are_refused() {
    let mapped = json!({"destination": "/x", "type": "bind", "source": "/x", "options": ["rbind"],
                        "uidMappings": [{"containerID": 0, "hostID": 100_000, "size": 65536}]});
    let table = [
        (mapped, "uidMappings: mounts with mapped ids"),
        (
            bind("/x", "/x", &["rbind", "idmap"]),
            "uidMappings: mounts with mapped ids",
        ),
        (bind("", "/x", &["rbind"]), "source: missing"),
        (
            json!({"destination": "/x", "type": "bind"}),
            "source: missing",
        ),
        (
            bind("/srv/../proc", "/x", &["rbind"]),
            "source: /srv/../proc must not",
        ),
        (
            json!({"destination": "/x", "type": "ext4", "source": "/dev/sda1"}),
            "type: the file system \"ext4\"",
        ),
        (json!({"destination": "/x"}), "needs something of the host"),
    ];
    for (mount, expected) in table {
        let refusal = refused(&with_mount(&engines::ctr(), mount), ALONE);
        assert!(refusal.contains(expected), "{refusal}");
    }
}

#[test]
fn more_volumes_than_the_bound_are_refused() {
    let mut spec = engines::ctr();
    for n in 0..mounts::VOLUMES_MAX {
        spec = with_mount(&spec, bind("/srv", &format!("/v{n}"), &["bind"]));
    }
    assert!(refused(&spec, ALONE).contains("257 bind mounts of the host, at most 256"));
}

#[test]
fn the_pod_s_namespaces_are_the_guest_s() {
    let guest = taken(&engines::cri_2(), MEMBER);
    assert_eq!(namespaces(&guest), ["pid", "mount", "cgroup"]);
    assert_eq!(guest.network, Network::Path("/proc/4242/ns/net".into()));
    assert_eq!(guest.pid_namespace, PidNamespace::Own);
    assert_eq!(
        namespaces(&taken(&engines::crio(), MEMBER)),
        ["pid", "mount"]
    );
}

#[test]
fn a_container_alone_has_all_but_the_network_for_itself() {
    let guest = taken(&engines::docker(), ALONE);
    assert_eq!(namespaces(&guest), ["mount", "uts", "pid", "ipc", "cgroup"]);
    assert_eq!(guest.network, Network::New);
    let none = with_namespace(&engines::docker(), "network", "/proc/0/ns/net");
    assert_eq!(taken(&none, ALONE).network, Network::New);
    let empty = with_namespace(&engines::docker(), "network", "");
    assert_eq!(taken(&empty, ALONE).network, Network::New);
    let made = with_namespace(&engines::docker(), "network", "/run/netns/x");
    assert_eq!(
        taken(&made, ALONE).network,
        Network::Path("/run/netns/x".into())
    );
}

#[test]
fn namespaces_that_a_pod_s_container_wants_for_itself_are_made() {
    let mut spec = engines::cri_1_7();
    for kind in ["ipc", "uts", "network"] {
        spec = with_namespace(&spec, kind, "");
    }
    let guest = taken(&spec, MEMBER);
    assert_eq!(
        namespaces(&guest),
        ["pid", "mount", "ipc", "uts", "network"]
    );
}

#[test]
fn a_pid_namespace_names_a_task() {
    let spec = with_namespace(&engines::cri_1_7(), "pid", "/proc/4243/ns/pid");
    let guest = taken(&spec, MEMBER);
    assert_eq!(guest.pid_namespace, PidNamespace::OfTask(4243));
    assert!(
        namespaces(&guest).contains(&"pid".to_owned()),
        "the agent is told otherwise"
    );
    for path in [
        "/proc/self/ns/pid",
        "/proc/+1/ns/pid",
        "/proc/0/ns/pid",
        "/proc//ns/pid",
        "/run/pidns/x",
        "/proc/99999999999/ns/pid",
    ] {
        let refusal = refused(&with_namespace(&engines::cri_1_7(), "pid", path), MEMBER);
        assert!(refusal.contains("is not /proc/PID/ns/pid"), "{refusal}");
    }
}

#[test]
fn the_host_s_namespaces_are_refused_each_with_its_reason() {
    let table = [
        ("network", "in the host's network"),
        ("pid", "the processes of the host"),
        ("ipc", "share memory with processes of the host"),
        ("uts", "the host's name"),
        ("mount", "the files of the host"),
    ];
    for (kind, expected) in table {
        for (spec, role) in [
            (engines::docker(), ALONE),
            (engines::cri_pause(), PAUSE),
            (engines::cri_2(), MEMBER),
        ] {
            let refusal = refused(&without(&spec, kind), role);
            assert!(
                refusal.starts_with("config.json: linux.namespaces: none of type"),
                "{refusal}"
            );
            assert!(refusal.contains(expected), "{refusal}");
        }
    }
    let both = without(&without(&engines::cri_pause(), "uts"), "network");
    assert!(
        refused(&both, PAUSE).contains("hostNetwork"),
        "the network is what was asked for"
    );
}

#[test]
fn namespaces_of_others_are_refused() {
    for kind in ["ipc", "uts"] {
        let refusal = refused(
            &with_namespace(&engines::docker(), kind, "/proc/7/ns/x"),
            ALONE,
        );
        assert!(refusal.contains("of another container"), "{refusal}");
    }
    for kind in ["mount", "cgroup", "time"] {
        let refusal = refused(
            &with_namespace(&engines::cri_2(), kind, "/proc/7/ns/x"),
            MEMBER,
        );
        assert!(
            refusal.contains("/proc/7/ns/x is a namespace of the host"),
            "{refusal}"
        );
    }
    let user = refused(
        &with_namespace(&engines::cri_2(), "user", "/proc/7/ns/user"),
        MEMBER,
    );
    assert!(user.contains("hostUsers"), "{user}");
    let relative = refused(
        &with_namespace(&engines::docker(), "network", "run/netns/x"),
        ALONE,
    );
    assert!(relative.contains("not an absolute path"), "{relative}");
    let mut twice = engines::docker();
    let namespaces = twice["linux"]["namespaces"]
        .as_array_mut()
        .expect("namespaces");
    namespaces.push(json!({"type": "pid"}));
    assert!(refused(&twice, ALONE).contains("linux.namespaces[6]: a type named twice"));
}

#[test]
fn a_time_namespace_of_its_own_is_the_guest_s_to_make() {
    let spec = with_namespace(&engines::docker(), "time", "");
    assert!(namespaces(&taken(&spec, ALONE)).contains(&"time".to_owned()));
}

#[test]
fn parameters_of_the_guest_s_own_namespaces_are_handed_out() {
    let pause = taken(&engines::cri_pause(), PAUSE);
    let names: Vec<&str> = pause.sysctls.keys().map(String::as_str).collect();
    let expected = [
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.ping_group_range",
    ];
    assert_eq!(names, expected);
    let mut spec = engines::docker();
    spec["linux"]["sysctl"]["kernel.msgmax"] = json!("65536");
    let docker = taken(&spec, ALONE);
    assert_eq!(
        json_of(&docker)["linux"]["sysctl"],
        json!({"kernel.msgmax": "65536"})
    );
    assert_eq!(docker.sysctls.len(), 2);
}

#[test]
fn parameters_of_no_namespace_are_refused() {
    for name in [
        "vm.swappiness",
        "kernel.hostname",
        "user.max_user_namespaces",
        "net",
        "kernel.shmmax2",
    ] {
        let mut spec = engines::docker();
        spec["linux"]["sysctl"] = json!({name: "1"});
        assert!(
            refused(&spec, ALONE).contains("is in no namespace"),
            "{name}"
        );
    }
    for name in ["", "net..x", "net/../../etc", ".net", "net.a\nb"] {
        let mut spec = engines::docker();
        spec["linux"]["sysctl"] = json!({name: "1"});
        assert!(
            refused(&spec, ALONE).contains("is not the name of"),
            "{name}"
        );
    }
    let mut spec = engines::docker();
    spec["linux"]["sysctl"] = json!({"net.ipv4.x": "1\u{0}"});
    assert!(refused(&spec, ALONE).contains("its value"));
}

#[test]
fn the_name_of_the_guest_is_said_by_its_first_container() {
    let pause = taken(&engines::cri_pause(), PAUSE);
    assert_eq!(pause.hostname.as_deref(), Some("web-0"));
    let docker = taken(&engines::docker(), ALONE);
    assert_eq!(docker.hostname.as_deref(), CONTAINER.get(..12));
    assert_eq!(json_of(&docker)["hostname"], json!(CONTAINER.get(..12)));
    let member = taken(&engines::crio(), MEMBER);
    assert_eq!(
        (member.hostname.as_deref(), &json_of(&member)["hostname"]),
        (None, &Value::Null)
    );
    let mut long = engines::docker();
    long["hostname"] = json!("x".repeat(65));
    assert!(refused(&long, ALONE).contains("hostname: longer than 64 bytes"));
}

#[test]
fn limits_that_name_parts_of_the_host_are_dropped() {
    let guest = taken(&engines::cri_2(), MEMBER);
    let resources = json_of(&guest)["linux"]["resources"].clone();
    assert_eq!(resources["memory"], json!({"limit": 134_217_728}));
    assert_eq!(
        resources["cpu"],
        json!({"shares": 102, "quota": 50_000, "period": 100_000})
    );
    assert_eq!(resources["unified"], json!({"memory.oom.group": "1"}));
    for dropped in ["hugepageLimits", "blockIO", "network", "rdma"] {
        assert_eq!(resources[dropped], Value::Null, "{dropped}");
    }
    let linux = json_of(&guest)["linux"].clone();
    assert_eq!(linux["cgroupsPath"], Value::Null);
    assert_eq!(
        linux["maskedPaths"],
        json!(["/proc/kcore", "/sys/firmware"])
    );
    assert_eq!(linux["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
    assert_eq!(json_of(&guest)["process"]["rlimits"][0]["hard"], 1024);
}

#[test]
fn huge_pages_are_refused() {
    let mut spec = engines::cri_2();
    spec["linux"]["resources"]["hugepageLimits"] = json!([{"pageSize": "2MB", "limit": 4_194_304}]);
    assert!(refused(&spec, MEMBER).contains("4194304 bytes of huge pages of 2MB"));
}

#[test]
fn devices_of_the_guest_stay_and_those_of_the_host_are_refused() {
    let device = |path: &str, kind: &str, major, minor| json!({"path": path, "type": kind, "major": major, "minor": minor});
    let mut spec = engines::docker();
    spec["linux"]["devices"] = json!([
        device("/dev/null", "c", 1, 3),
        device("/dev/fuse", "c", 10, 229),
        device("/dev/net/tun", "c", 10, 200)
    ]);
    let guest = taken(&spec, ALONE);
    let devices = json_of(&guest)["linux"]["devices"].clone();
    let paths: Vec<_> = devices
        .as_array()
        .into_iter()
        .flatten()
        .map(|device| &device["path"])
        .collect();
    assert_eq!(
        paths,
        ["/dev/fuse", "/dev/net/tun"],
        "the agent makes /dev/null by itself"
    );
    for (path, kind, major, minor) in [
        ("/dev/sda", "b", 8, 0),
        ("/dev/kvm", "c", 10, 232),
        ("/dev/null", "b", 1, 3),
    ] {
        spec["linux"]["devices"] = json!([device(path, kind, major, minor)]);
        let refusal = refused(&spec, ALONE);
        let expected =
            format!("linux.devices[0]: {path} ({kind} {major}:{minor}) is a device of the host");
        assert!(refusal.contains(&expected), "{refusal}");
        assert!(
            refusal.contains("privileged_without_host_devices"),
            "{refusal}"
        );
    }
    spec["linux"]["devices"] = Value::Null;
    spec["linux"]["netDevices"] = json!({"eth1": {}});
    assert!(refused(&spec, ALONE).contains("linux.netDevices"));
}

#[test]
fn hooks_of_the_host_come_out_and_those_of_the_guest_stay() {
    let mut spec = engines::nerdctl();
    spec["hooks"]["createContainer"] = json!([{"path": "/bin/in-guest"}]);
    let guest = taken(&spec, ALONE);
    assert_eq!(
        (
            guest.hooks.create.len(),
            guest.hooks.started.len(),
            guest.hooks.stopped.len()
        ),
        (1, 0, 1)
    );
    assert_eq!(
        json_of(&guest)["hooks"],
        json!({"createContainer": [{"path": "/bin/in-guest"}]})
    );
    assert_eq!(
        json_of(&taken(&engines::docker(), ALONE))["hooks"],
        Value::Null
    );
}

#[test]
fn specs_of_other_machines_are_refused() {
    let mut spec = engines::ctr();
    spec["ociVersion"] = json!("2.0");
    assert!(refused(&spec, ALONE).contains("ociVersion: 2.0 is not 1.x"));
    let mut spec = engines::ctr();
    spec["linux"] = Value::Null;
    assert!(refused(&spec, ALONE).contains("linux: missing"));
    let mut spec = engines::ctr();
    spec["vm"] = json!({"kernel": {"path": "/boot/x"}});
    assert!(refused(&spec, ALONE).contains("vm: the VM is configured"));
}

#[test]
fn a_refusal_is_one_printable_line() {
    let spec = with_mount(
        &engines::ctr(),
        bind("/a\n\u{1b}[31m/../b", "/x", &["rbind"]),
    );
    let refusal = refused(&spec, ALONE);
    assert!(!refusal.contains(char::is_control), "{refusal}");
}
