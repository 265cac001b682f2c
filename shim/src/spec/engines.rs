//! Specs as container engines write them, for tests: what matters of each, by hand, with the paths that they use.

use serde_json::{Value, json};

/// Ids as engines make them: 64 hexadecimal digits.
pub(super) const SANDBOX: &str = "5a11d0b0c0ffee00000000000000000000000000000000000000000000000001";
pub(super) const CONTAINER: &str =
    "c0117a14e50000000000000000000000000000000000000000000000000000ff";
/// Where containerd's CRI keeps what belongs to a pod, since 1.5.
const CRI: &str = "/run/containerd/io.containerd.grpc.v1.cri/sandboxes";
const KUBELET: &str = "/var/lib/kubelet/pods/8d6f0f1e-0000-4000-8000-5f3c9a7b2d11";
/// Where CRI-O keeps what belongs to a container.
const CRIO: &str = "/run/containers/storage/overlay-containers";

fn capabilities() -> Value {
    let all = ["CAP_CHOWN", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    json!({"bounding": all, "effective": all, "permitted": all})
}

fn process(args: &[&str]) -> Value {
    json!({
        "user": {"uid": 1000, "gid": 1000, "additionalGids": [1000]},
        "args": args,
        "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOSTNAME=web-0"],
        "cwd": "/",
        "capabilities": capabilities(),
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        "noNewPrivileges": true,
        "apparmorProfile": "cri-containerd.apparmor.d",
        "selinuxLabel": "system_u:system_r:container_t:s0:c1,c2",
        "oomScoreAdj": 987
    })
}

fn kernel_mounts() -> Vec<Value> {
    vec![
        json!({"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
               "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
        json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts",
               "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]}),
        json!({"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": ["nosuid", "noexec", "nodev"]}),
        json!({"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]}),
        json!({"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
               "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}),
    ]
}

fn bind(source: &str, destination: &str, options: &[&str]) -> Value {
    json!({"destination": destination, "type": "bind", "source": source, "options": options})
}

fn new(kinds: &[&str]) -> Vec<Value> {
    kinds.iter().map(|kind| json!({"type": kind})).collect()
}

fn join(kind: &str, path: &str) -> Value {
    json!({"type": kind, "path": path})
}

fn linux(cgroups_path: &str, namespaces: &[Value]) -> Value {
    json!({
        "cgroupsPath": cgroups_path,
        "namespaces": namespaces,
        "resources": {
            "devices": [{"allow": false, "access": "rwm"}],
            "memory": {"limit": 134_217_728},
            "cpu": {"shares": 102, "quota": 50_000, "period": 100_000, "cpus": "0-3", "mems": "0"},
            "hugepageLimits": [{"pageSize": "2MB", "limit": 0}, {"pageSize": "1GB", "limit": 0}],
            "unified": {"memory.oom.group": "1", "cpuset.cpus": "0-3"}
        },
        "maskedPaths": ["/proc/kcore", "/sys/firmware"],
        "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger"],
        "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]}
    })
}

/// The pause container of a pod, by containerd's CRI.
pub(super) fn cri_pause() -> Value {
    let sandbox = format!("{CRI}/{SANDBOX}");
    let mut mounts = kernel_mounts();
    mounts.push(bind(
        &format!("{sandbox}/shm"),
        "/dev/shm",
        &["rbind", "ro", "nosuid", "nodev", "noexec"],
    ));
    mounts.push(bind(
        &format!("{sandbox}/resolv.conf"),
        "/etc/resolv.conf",
        &["rbind", "ro"],
    ));
    let mut namespaces = new(&["pid", "ipc", "uts", "mount"]);
    namespaces.push(join("network", "/var/run/netns/cni-3a4d0c2e"));
    let place = format!("/kubepods/burstable/pod8d6f0f1e/{SANDBOX}");
    let mut linux = linux(&place, &namespaces);
    linux["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647",
                             "kernel.shm_rmid_forced": "1"});
    json!({
        "ociVersion": "1.1.0",
        "process": process(&["/pause"]),
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "web-0",
        "mounts": mounts,
        "annotations": {
            "io.kubernetes.cri.container-type": "sandbox",
            "io.kubernetes.cri.sandbox-id": SANDBOX,
            "io.kubernetes.cri.sandbox-memory": "134217728",
            "io.kubernetes.cri.sandbox-cpu-quota": "150000",
            "io.kubernetes.cri.sandbox-cpu-period": "100000",
            "io.kubernetes.cri.sandbox-log-directory": "/var/log/pods/default_web-0"
        },
        "linux": linux
    })
}

/// A container of a pod, by the CRI of containerd 1.7, with cgroupfs.
pub(super) fn cri_1_7() -> Value {
    let place = format!("/kubepods/burstable/pod8d6f0f1e/{CONTAINER}");
    cri_container(&place, "1.1.0")
}

/// The same by containerd 2, with systemd's cgroups and what it adds.
pub(super) fn cri_2() -> Value {
    let place = format!("kubepods-burstable-pod8d6f0f1e.slice:cri-containerd:{CONTAINER}");
    let mut spec = cri_container(&place, "1.2.1");
    if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
        namespaces.push(json!({"type": "cgroup"}));
    }
    spec
}

fn cri_container(place: &str, version: &str) -> Value {
    let mut mounts = kernel_mounts();
    for (name, place) in [
        ("etc-hosts", "/etc/hosts"),
        ("containers/web/8f5e", "/dev/termination-log"),
    ] {
        mounts.push(bind(
            &format!("{KUBELET}/{name}"),
            place,
            &["rbind", "rprivate", "rw"],
        ));
    }
    let pod = format!("{CRI}/{SANDBOX}");
    mounts.push(bind(
        &format!("{pod}/resolv.conf"),
        "/etc/resolv.conf",
        &["rbind", "rprivate", "rw"],
    ));
    mounts.push(bind(
        &format!("{pod}/shm"),
        "/dev/shm",
        &["rbind", "rprivate", "rw"],
    ));
    let token = format!("{KUBELET}/volumes/kubernetes.io~projected/kube-api-access");
    let at = "/var/run/secrets/kubernetes.io/serviceaccount";
    mounts.push(bind(&token, at, &["rbind", "rprivate", "ro"]));
    let mut namespaces = new(&["pid", "mount"]);
    for kind in ["ipc", "uts"] {
        namespaces.push(join(kind, &format!("/proc/4242/ns/{kind}")));
    }
    namespaces.push(join("network", "/proc/4242/ns/net"));
    json!({
        "ociVersion": version,
        "process": process(&["nginx", "-g", "daemon off;"]),
        "root": {"path": "rootfs"},
        "mounts": mounts,
        "annotations": {
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": SANDBOX,
            "io.kubernetes.cri.image-name": "example.org/nginx:1"
        },
        "linux": linux(place, &namespaces)
    })
}

/// A container of a pod by CRI-O, which pins the namespaces of a pod.
pub(super) fn crio() -> Value {
    let mut mounts = kernel_mounts();
    let pod = format!("{CRIO}/{SANDBOX}/userdata");
    mounts.push(bind(&format!("{pod}/shm"), "/dev/shm", &["rw", "bind"]));
    mounts.push(bind(
        &format!("{pod}/hostname"),
        "/etc/hostname",
        &["ro", "bind", "nodev", "nosuid", "noexec"],
    ));
    mounts.push(bind(
        &format!("{KUBELET}/etc-hosts"),
        "/etc/hosts",
        &["rw", "rbind", "rprivate", "bind"],
    ));
    let mut namespaces = new(&["pid", "mount"]);
    for (kind, directory) in [("network", "netns"), ("ipc", "ipcns"), ("uts", "utsns")] {
        namespaces.push(join(kind, &format!("/var/run/{directory}/1c0ffee1-0000")));
    }
    let place = format!("kubepods-besteffort-pod8d6f0f1e.slice:crio:{CONTAINER}");
    json!({
        "ociVersion": "1.0.2-dev",
        "process": process(&["sh"]),
        "root": {"path": format!("/var/lib/containers/storage/overlay/{CONTAINER}/merged")},
        "hostname": "web-0",
        "mounts": mounts,
        "annotations": {"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": SANDBOX},
        "linux": linux(&place, &namespaces)
    })
}

/// `ctr run --mount … IMAGE c1 sh`.
pub(super) fn ctr() -> Value {
    let mut mounts = kernel_mounts();
    mounts.push(
        json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                       "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]}),
    );
    mounts.push(
        json!({"destination": "/run", "type": "tmpfs", "source": "tmpfs",
                       "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]}),
    );
    mounts.push(bind("/srv/data", "/data", &["rbind", "ro"]));
    let namespaces = new(&["pid", "ipc", "uts", "mount", "network", "cgroup"]);
    json!({
        "ociVersion": "1.2.0",
        "process": process(&["sh"]),
        "root": {"path": "rootfs"},
        "mounts": mounts,
        "linux": linux("/default/c1", &namespaces)
    })
}

/// `nerdctl run`, whose network is made by a hook.
pub(super) fn nerdctl() -> Value {
    let mut spec = ctr();
    let state = format!("/var/lib/nerdctl/1935db59/containers/default/{CONTAINER}");
    let hook = |event| {
        json!([{"path": "/usr/local/bin/nerdctl", "args": ["nerdctl", "internal", "oci-hook", event],
                               "env": ["PATH=/usr/bin"]}])
    };
    spec["hooks"] = json!({"createRuntime": hook("createRuntime"), "poststop": hook("postStop")});
    spec["hostname"] = json!(CONTAINER.get(..12));
    spec["annotations"] = json!({"nerdctl/state-dir": state, "nerdctl/networks": "[\"bridge\"]"});
    spec["linux"]["cgroupsPath"] = json!(format!("system.slice:nerdctl:{CONTAINER}"));
    if let Some(mounts) = spec["mounts"].as_array_mut() {
        for name in ["resolv.conf", "hostname", "hosts"] {
            let options = ["bind", "rprivate"];
            mounts.push(bind(
                &format!("{state}/{name}"),
                &format!("/etc/{name}"),
                &options,
            ));
        }
    }
    spec
}

/// `docker run --cpus=1.5 -v /srv/data:/data`: Docker 26 and later moves the card into the namespace between Create and Start.
pub(super) fn docker() -> Value {
    let state = format!("/var/lib/docker/containers/{CONTAINER}");
    let mut mounts = kernel_mounts();
    mounts.push(
        json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                       "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"]}),
    );
    for name in ["resolv.conf", "hostname", "hosts"] {
        mounts.push(bind(
            &format!("{state}/{name}"),
            &format!("/etc/{name}"),
            &["rbind", "rprivate"],
        ));
    }
    mounts.push(bind("/srv/data", "/data", &["rbind", "rprivate"]));
    let namespaces = new(&["mount", "network", "uts", "pid", "ipc", "cgroup"]);
    let mut linux = linux(&format!("system.slice:docker:{CONTAINER}"), &namespaces);
    linux["sysctl"] = json!({"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647"});
    linux["resources"]["cpu"] = json!({"quota": 150_000, "period": 100_000});
    linux["resources"]["memory"] = json!({});
    linux["resources"]["blockIO"] = json!({"weight": 0});
    json!({
        "ociVersion": "1.2.1",
        "process": process(&["sh"]),
        "root": {"path": "rootfs"},
        "hostname": CONTAINER.get(..12),
        "mounts": mounts,
        "hooks": {"prestart": [{"path": "/proc/993/exe", "args": ["libnetwork-setkey", "-exec-root=/var/run/docker", CONTAINER, "4bc"]}]},
        "linux": linux
    })
}
