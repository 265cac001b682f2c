//! Devices, limits and kernel parameters: which of them mean something in a guest.

use super::namespaces::Shared;
use super::{Refusal, refusal, shown};
use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceType, LinuxResources};
use std::collections::BTreeMap;
use std::path::Path;

/// Most kernel parameters, and most bytes of a name and of a value (`/proc/sys` takes a page).
const SYSCTLS_MAX_COUNT: usize = 1024;
const SYSCTL_NAME_MAX_BYTES: usize = 256;
const SYSCTL_VALUE_MAX_BYTES: usize = 4096;
/// Parameters of the ipc namespace; `fs.mqueue.*` too (ipc/ipc_sysctl.c, ipc/mq_sysctl.c).
const IPC_SYSCTLS: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];
/// Files of cgroup v2 by their controller that a guest has as it has CPUs, memory and processes. Others name devices, CPUs or nodes of the host.
const GUEST_CONTROLLERS: [&str; 3] = ["cpu.", "memory.", "pids."];

/// What the agent makes in every container (runtime-spec, `config-linux.md`, "Default Devices").
const DEFAULT_DEVICES: [(&str, i64, i64); 8] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
    ("/dev/console", 5, 1),
    ("/dev/ptmx", 5, 2),
];
/// Devices that are a part of the guest's own kernel: FUSE and TUN (Documentation/admin-guide/devices.txt).
const GUEST_DEVICES: [(i64, i64); 2] = [(10, 229), (10, 200)];

/// Leaves of the devices those that the guest has and the agent does not make by itself.
///
/// # Errors
/// A device of the host.
pub(super) fn check_devices(linux: &mut Linux) -> Result<(), Refusal> {
    if linux
        .net_devices()
        .as_ref()
        .is_some_and(|devices| !devices.is_empty())
    {
        return Err(refusal(
            "linux.netDevices",
            "network devices of the host do not reach into a VM: do not pass any",
        ));
    }
    let Some(mut devices) = linux.devices().clone() else {
        return Ok(());
    };
    for (index, device) in devices.iter().enumerate() {
        if !is_guest_device(device) {
            let problem = format!(
                "{} ({} {}:{}) is a device of the host, which a VM does not have: do not pass it; for privileged containers set \
                 privileged_without_host_devices = true for this runtime in containerd's configuration",
                shown(device.path()),
                device.typ().as_str(),
                device.major(),
                device.minor()
            );
            return Err(refusal(format!("linux.devices[{index}]"), problem));
        }
    }
    devices.retain(|device| {
        let mut all = DEFAULT_DEVICES.iter();
        !all.any(|(path, ..)| Path::new(path) == device.path())
    });
    linux.set_devices(Some(devices));
    Ok(())
}

fn is_guest_device(device: &LinuxDevice) -> bool {
    let number = (device.major(), device.minor());
    match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => {
            let default = DEFAULT_DEVICES.iter();
            let mut default = default.map(|(_, major, minor)| (*major, *minor));
            default.any(|default| default == number) || GUEST_DEVICES.contains(&number)
        }
        LinuxDeviceType::P => true,
        LinuxDeviceType::A | LinuxDeviceType::B => false,
    }
}

/// Drops what names CPUs, memory nodes, disks and adapters of the host.
///
/// # Errors
/// As [`of_guest`].
pub(super) fn drop_host_limits(linux: &mut Linux) -> Result<(), Refusal> {
    linux.set_memory_policy(None);
    if let Some(resources) = linux.resources().clone() {
        linux.set_resources(Some(of_guest(resources)?));
    }
    Ok(())
}

/// The limits that mean something in a guest.
///
/// # Errors
/// Huge pages: a container that asks for them cannot do without, and a guest has none.
pub(super) fn of_guest(mut resources: LinuxResources) -> Result<LinuxResources, Refusal> {
    refuse_huge_pages(&resources)?;
    resources.set_hugepage_limits(None);
    resources.set_block_io(None);
    resources.set_network(None);
    resources.set_rdma(None);
    if let Some(mut cpu) = resources.cpu().clone() {
        cpu.set_cpus(None);
        cpu.set_mems(None);
        resources.set_cpu(Some(cpu));
    }
    if let Some(mut unified) = resources.unified().clone() {
        unified.retain(|file, _| {
            GUEST_CONTROLLERS
                .iter()
                .any(|prefix| file.starts_with(prefix))
        });
        resources.set_unified(Some(unified));
    }
    Ok(resources)
}

/// The kubelet writes a limit of 0 for each size of the host's huge pages where none are asked for.
fn refuse_huge_pages(resources: &LinuxResources) -> Result<(), Refusal> {
    let mut asked = resources.hugepage_limits().iter().flatten();
    match asked.find(|limit| limit.limit() > 0) {
        Some(limit) => {
            let problem = format!(
                "{} bytes of huge pages of {} are asked for, and a VM has none yet: ask for memory instead",
                limit.limit(),
                shown(limit.page_size())
            );
            Err(refusal("linux.resources.hugepageLimits", problem))
        }
        None => Ok(()),
    }
}

/// Takes the parameters of namespaces that are the guest's own out of the spec; those of the container's own stay.
///
/// # Errors
/// One that is in no namespace, which runc does not set either, or no name of one.
pub(super) fn take_sysctls(
    linux: &mut Linux,
    shared: Shared,
) -> Result<BTreeMap<String, String>, Refusal> {
    let mut guest = BTreeMap::new();
    let Some(mut own) = linux.sysctl().clone() else {
        return Ok(guest);
    };
    if own.len() > SYSCTLS_MAX_COUNT {
        return Err(refusal(
            "linux.sysctl",
            format!("at most {SYSCTLS_MAX_COUNT}"),
        ));
    }
    let mut names: Vec<String> = own.keys().cloned().collect();
    names.sort();
    for name in names {
        let value = own.get(&name).map_or("", String::as_str);
        let field = || format!("linux.sysctl[{}]", shown(&name));
        let bad_name =
            name.len() > SYSCTL_NAME_MAX_BYTES || name.split(['.', '/']).any(str::is_empty);
        if bad_name || name.contains(['\0', '\n']) {
            return Err(refusal(field(), "is not the name of a kernel parameter"));
        }
        if value.len() > SYSCTL_VALUE_MAX_BYTES || value.contains('\0') {
            let problem = format!(
                "its value is longer than {SYSCTL_VALUE_MAX_BYTES} bytes, or has a NUL in it"
            );
            return Err(refusal(field(), problem));
        }
        let Some(of_guest) = is_of_guest(&name, shared) else {
            let problem = "is in no namespace of a container, so no runtime sets it for one";
            return Err(refusal(field(), problem));
        };
        if of_guest {
            guest.extend(own.remove_entry(&name));
        }
    }
    linux.set_sysctl(Some(own));
    Ok(guest)
}

/// Whether the parameter's namespace is the guest's; none if it has no namespace.
fn is_of_guest(name: &str, shared: Shared) -> Option<bool> {
    let name = name.replace('/', ".");
    if name.starts_with("net.") {
        Some(shared.network)
    } else if name.starts_with("fs.mqueue.") || IPC_SYSCTLS.contains(&name.as_str()) {
        Some(shared.ipc)
    } else if name == "kernel.domainname" {
        Some(shared.uts)
    } else {
        None
    }
}
