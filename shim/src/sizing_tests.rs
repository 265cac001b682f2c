//! Sizes of VMs, from what engines write.

use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};

const GIB: u64 = 1 << 30;
const HOST: Host = Host {
    memory_bytes: 64 * GIB,
    cpus: 16,
};
const NO_LIMITS: Room = Room {
    memory_pod: None,
    memory: None,
    cpu_pod: None,
};

fn spec(annotations: &Value, resources: &Value) -> Spec {
    let spec = json!({"ociVersion": "1.2.0", "annotations": annotations, "linux": {"resources": resources}});
    serde_json::from_value(spec).expect("a spec")
}

/// A pause container's, with annotations as containerd writes them.
fn pod(memory: &str, quota: &str) -> Spec {
    let annotations =
        json!({SANDBOX_MEMORY: memory, SANDBOX_CPU_QUOTA: quota, SANDBOX_CPU_PERIOD: "100000"});
    spec(&annotations, &json!({"cpu": {"shares": 2}}))
}

fn sized(spec: &Spec, role: Role<'_>, room: &Room) -> Result<(u64, u8), SizeError> {
    let size = size(spec, role, room, &HOST, &Config::default())?;
    Ok((size.memory.get(), size.cpus.get()))
}

fn limited(memory_mib: u64) -> Room {
    Room {
        memory_pod: Some(memory_mib * MIB),
        memory: Some(memory_mib * MIB),
        cpu_pod: None,
    }
}

#[test]
fn a_pod_s_annotations_and_what_the_guest_needs_make_the_memory() {
    let size = sized(&pod("1073741824", "150000"), Role::Pause, &NO_LIMITS);
    // 1024 + 48, and 18 for 1090 MiB of page descriptors.
    assert_eq!(size, Ok((1090, 2)));
}

#[test]
fn what_containers_may_use_is_left_of_the_guest_s_memory() {
    for containers in [1, 16, 100, 1000, 4096, 100_000, 500_000] {
        let guest = with_guest_overhead(containers);
        let descriptors = guest.div_ceil(PAGE_DESCRIPTORS);
        assert!(
            guest - descriptors - GUEST_OVERHEAD_MIB >= containers,
            "{containers}"
        );
    }
}

#[test]
fn a_pod_without_limits_gets_the_default() {
    for (memory, quota) in [("0", "0"), ("-1", "-1")] {
        assert_eq!(
            sized(&pod(memory, quota), Role::Pause, &NO_LIMITS),
            Ok((2048, 1))
        );
    }
    let bare = spec(&Value::Null, &Value::Null);
    assert_eq!(sized(&bare, Role::Pause, &NO_LIMITS), Ok((2048, 1)));
    assert_eq!(sized(&bare, Role::Alone, &NO_LIMITS), Ok((2048, 1)));
}

#[test]
fn the_default_is_the_configuration_s() {
    let config = Config {
        memory: MemoryMib::literal(512),
        cpus: Cpus::literal(3),
        ..Config::default()
    };
    let bare = spec(&Value::Null, &Value::Null);
    let size = size(&bare, Role::Alone, &NO_LIMITS, &HOST, &config).expect("a size");
    assert_eq!((size.memory.get(), size.cpus.get()), (512, 3));
}

#[test]
fn a_pod_without_annotations_gets_what_its_cgroup_has() {
    let bare = spec(
        &json!({"io.kubernetes.cri-o.ContainerType": "sandbox"}),
        &Value::Null,
    );
    let room = Room {
        cpu_pod: Some((250_000, 100_000)),
        ..limited(4096)
    };
    assert_eq!(sized(&bare, Role::Pause, &room), Ok((4088, 3)));
}

#[test]
fn a_container_alone_gets_what_its_spec_has() {
    let resources = json!({"memory": {"limit": 268_435_456}, "cpu": {"quota": 50_000}});
    let annotated = spec(&json!({SANDBOX_MEMORY: "1"}), &resources);
    assert_eq!(sized(&annotated, Role::Alone, &NO_LIMITS), Ok((309, 1)));
    let unlimited = json!({"memory": {"limit": -1}, "cpu": {"quota": -1, "period": 100_000}});
    assert_eq!(
        sized(&spec(&Value::Null, &unlimited), Role::Alone, &NO_LIMITS),
        Ok((2048, 1))
    );
    let no_period = json!({"cpu": {"quota": 400_000, "period": 0}});
    assert_eq!(
        sized(&spec(&Value::Null, &no_period), Role::Alone, &NO_LIMITS),
        Ok((2048, 1))
    );
    // What is above a container alone is no pod: docker's cgroup, or system.slice.
    let bare = spec(&Value::Null, &Value::Null);
    assert_eq!(sized(&bare, Role::Alone, &limited(8192)), Ok((2048, 1)));
}

#[test]
fn a_vm_fits_in_its_pod_s_cgroup_and_in_what_is_above() {
    let size = sized(&pod("1073741824", "0"), Role::Pause, &limited(1024));
    assert_eq!(size, Ok((1016, 1)));
    let above = Room {
        memory: Some(512 * MIB),
        ..limited(1024)
    };
    assert_eq!(
        sized(&pod("1073741824", "0"), Role::Pause, &above),
        Ok((504, 1))
    );
    assert_eq!(sized(&pod("0", "0"), Role::Pause, &above), Ok((504, 1)));
}

#[test]
fn a_small_limit_is_raised_to_what_a_guest_needs() {
    assert_eq!(
        sized(&pod("4194304", "1000"), Role::Pause, &NO_LIMITS),
        Ok((64, 1))
    );
    assert_eq!(
        sized(&pod("4194304", "0"), Role::Pause, &limited(72)),
        Ok((64, 1))
    );
}

#[test]
fn too_little_for_a_guest_is_refused_with_the_numbers() {
    let error = sized(&pod("33554432", "0"), Role::Pause, &limited(71)).expect_err("too little");
    let expected = "a memory limit of 71 MiB leaves 63 MiB for the guest after 8 MiB for its VMM, and a guest needs 64: give the pod at least 72 MiB, by \
                    its limits or by overhead.podFixed of its RuntimeClass, of which 56 MiB are the cost of a VM";
    assert_eq!(error.to_string(), expected);
    let tiny = Host {
        memory_bytes: 63 * MIB,
        cpus: 1,
    };
    let bare = spec(&Value::Null, &Value::Null);
    let refused = size(&bare, Role::Alone, &NO_LIMITS, &tiny, &Config::default());
    assert_eq!(refused, Err(SizeError::Host { host_mib: 63 }));
}

#[test]
fn a_vm_is_not_larger_than_its_host() {
    let small = Host {
        memory_bytes: GIB,
        cpus: 2,
    };
    let size = size(
        &pod("107374182400", "3200000"),
        Role::Pause,
        &NO_LIMITS,
        &small,
        &Config::default(),
    );
    let size = size.expect("a size");
    assert_eq!((size.memory.get(), size.cpus.get()), (1024, 2));
}

#[test]
fn an_annotation_that_is_no_number_is_refused() {
    let error = sized(&pod("1Gi\n", "0"), Role::Pause, &NO_LIMITS).expect_err("no number");
    assert_eq!(
        error.to_string(),
        "annotation io.kubernetes.cri.sandbox-memory is 1Gi\\n, which is no number"
    );
    assert!(sized(&pod("0", "99999999999999999999"), Role::Pause, &NO_LIMITS).is_err());
}

#[test]
fn this_host_is_one() {
    let host = Host::read();
    assert!(host.memory_bytes > 64 * MIB && host.cpus >= 1, "{host:?}");
}

proptest! {
    #[test]
    fn any_limits_give_a_size_that_fits_or_a_refusal(
        memory: i64, quota: i64, period: u64, alone: bool,
        room_memory: Option<u64>, cpu_pod: Option<(u64, u64)>, memory_bytes: u64, cpus: u64,
    ) {
        let annotations = json!({SANDBOX_MEMORY: memory.to_string(), SANDBOX_CPU_QUOTA: quota.to_string(),
                                 SANDBOX_CPU_PERIOD: (period >> 1).to_string()});
        let resources = json!({"memory": {"limit": memory}, "cpu": {"quota": quota, "period": period}});
        let spec = spec(&annotations, &resources);
        let role = if alone { Role::Alone } else { Role::Pause };
        let room = Room { memory_pod: room_memory, memory: room_memory, cpu_pod };
        let host = Host { memory_bytes, cpus };
        if let Ok(size) = size(&spec, role, &room, &host, &Config::default()) {
            let bytes = size.memory.bytes();
            prop_assert!(bytes <= memory_bytes);
            prop_assert!(room_memory.is_none_or(|room| bytes + VMM_OVERHEAD_MIB * MIB <= room));
            prop_assert!(u64::from(size.cpus) <= cpus.max(1));
        }
    }
}
