//! The jail: what the process gives up, always and in every build, before the guest runs its first instruction.
//!
//! Two steps, because the file system's threads start between them and inherit what the process is by then:
//! [`isolate`] first of all (limits; network, IPC and host name of its own), [`enter`] last (empty root, the
//! configured user and group, no capability, no new privileges, Landlock). Behind that comes only seccomp.
//!
//! Two parts are the owner's to give, because only who makes a process can (docs/decisions/0013): the PID namespace, of which
//! this process is to be the first, and the cgroup, which it is born in. Without the first it refuses to start.
//!
//! If any part cannot be had, the VM does not start; only Landlock is left out where the kernel has none.

mod landlock;
mod parent;

pub use parent::Parent;

use capsid_protocol::machine::JailConfig;
use nix::sched::{CloneFlags, unshare};
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags,
    fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, unmount,
};
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, fchdir, getpid, pivot_root, set_dumpable_behavior,
    setrlimit,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, Gid, Uid, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

/// The most fds in one table: that of the process, with the guest's connections, or that of a share's threads.
pub const OPEN_FILES_MAX: u64 = 16 * 1024;

/// A part of the jail that could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The owner did not give it.
    #[error(
        "the VMM must be started as the first process of a PID namespace (as `unshare --pid --fork` does); \
         it never runs a guest unjailed"
    )]
    PidNamespace,
    /// The kernel refused.
    #[error(
        "cannot {step}; the VMM must start as root with CAP_SYS_ADMIN, and it never runs a guest unjailed"
    )]
    Step {
        /// What was being done.
        step: &'static str,
        /// Why it failed.
        #[source]
        cause: Errno,
    },
}

fn step<T>(step: &'static str, result: Result<T, Errno>) -> Result<T, JailError> {
    result.map_err(|cause| JailError::Step { step, cause })
}

fn new_namespaces(what: &'static str, flags: CloneFlags) -> Result<(), JailError> {
    let result = unshare(flags).map_err(|errno| Errno::from_raw_os_error(errno as i32));
    step(what, result)
}

/// Sets its limits, which its owner's may be too low for, and leaves the host's network, IPC objects and host name. The first
/// thing of all, with one thread. The parent comes back if the process `dies_with_parent`.
///
/// # Errors
/// This is not the first process of a PID namespace, or the kernel refused.
pub fn isolate(dies_with_parent: bool) -> Result<Option<Parent>, JailError> {
    if !getpid().is_init() {
        return Err(JailError::PidNamespace);
    }
    let parent = dies_with_parent.then(Parent::find).transpose()?;
    limit_resources()?;
    new_namespaces(
        "enter network, IPC and UTS namespaces of its own",
        CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS,
    )?;
    Ok(parent)
}

/// Closes the rest: root, user, capabilities, privileges, file systems. For the calling thread and those that it
/// starts from now on. `parent` is given if the process must end with it; with an owner channel that
/// channel says so.
///
/// # Errors
/// The kernel refused a part.
pub fn enter(jail: JailConfig, parent: Option<Parent>) -> Result<(), JailError> {
    enter_empty_root()?;
    become_nobody(jail)?;
    step("refuse new privileges", set_no_new_privs(true))?;
    // Behind the last thing that opens or mounts anything.
    landlock::forbid_everything()?;
    step(
        "become undumpable",
        set_dumpable_behavior(DumpableBehavior::NotDumpable),
    )?;
    parent.map_or(Ok(()), |parent| parent.die_with())
}

fn limit_resources() -> Result<(), JailError> {
    let limits = [
        ("forbid core dumps", Resource::Core, Some(0)),
        ("limit open files", Resource::Nofile, Some(OPEN_FILES_MAX)),
        ("forbid locked memory", Resource::Memlock, Some(0)),
        ("forbid message queues", Resource::Msgqueue, Some(0)),
        // How large a file may be is said by the files that it is given; what goes beyond a limit is sent SIGXFSZ.
        ("write files of any size", Resource::Fsize, None),
    ];
    for (what, resource, most) in limits {
        let limit = Rlimit {
            current: most,
            maximum: most,
        };
        step(what, setrlimit(resource, limit))?;
    }
    Ok(())
}

/// A mount namespace whose one mount is an empty, read-only tmpfs.
fn enter_empty_root() -> Result<(), JailError> {
    new_namespaces(
        "enter a mount namespace of its own",
        CloneFlags::CLONE_NEWNS,
    )?;
    step(
        "cut its mounts off from the host's",
        mount_change(
            "/",
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        ),
    )?;
    let root = || {
        let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&tmpfs, "size", "4k")?;
        fsconfig_set_string(&tmpfs, "nr_inodes", "1")?;
        fsconfig_set_string(&tmpfs, "mode", "0555")?;
        fsconfig_create(&tmpfs)?;
        let nothing_happens_here = MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let root = fsmount(&tmpfs, FsMountFlags::FSMOUNT_CLOEXEC, nothing_happens_here)?;
        move_mount(&root, "", CWD, "/", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        fchdir(&root)?;
        // The old root is stacked onto the new one at "." and taken away from there (pivot_root(2)).
        pivot_root(".", ".")?;
        unmount(".", UnmountFlags::DETACH)?;
        rustix::process::chdir("/")
    };
    step("move into an empty root", root())
}

fn become_nobody(jail: JailConfig) -> Result<(), JailError> {
    // These are of the calling thread: the file system's threads keep what they chose for themselves.
    step("clear ambient capabilities", clear_ambient_capability_set())?;
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        match remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            // The first number that this kernel has no capability for.
            Err(Errno::INVAL) if bit > 0 => break,
            result => step("empty the capability bounding set", result)?,
        }
    }
    let (uid, gid) = (Uid::from_raw(jail.uid), Gid::from_raw(jail.gid));
    step("drop supplementary groups", set_thread_groups(&[]))?;
    step("change its group", set_thread_res_gid(gid, gid, gid))?;
    step("change its user", set_thread_res_uid(uid, uid, uid))?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    step("drop its capabilities", set_capabilities(None, none))
}
