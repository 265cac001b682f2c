//! The check of an OCI spec before anything is done with it: parsed once, bounded, made to fit a guest,
//! into types that the rest of the agent can take at their word. Pure.
//!
//! What is the host's business is taken out, not obeyed: its cgroup path, its AppArmor and SELinux
//! labels, its RDT, its hooks (prestart, createRuntime, poststart, poststop). What an image could use
//! against the agent is refused. What libcontainer leaves to luck is made explicit: no capabilities
//! given means none, no oom_score_adj means 0 and not the agent's -1000.

use oci_spec::runtime::{
    Hooks, HooksBuilder, Linux, LinuxCapabilities, LinuxNamespace, LinuxNamespaceType,
    LinuxResources, Mount, Process, Spec,
};
use std::path::{Component, Path, PathBuf};

/// Longest config.json in bytes; ttrpc carries at most 4 MiB.
pub const SPEC_MAX_BYTES: usize = 2 << 20;
/// Most arguments plus environment entries of a process.
const STRINGS_MAX_COUNT: usize = 16 * 1024;
/// Longest argument or environment entry in bytes (MAX_ARG_STRLEN, include/uapi/linux/binfmts.h).
const STRING_MAX_BYTES: usize = 128 * 1024;
/// Most mounts, devices, masked or read-only paths, each.
const ENTRIES_MAX_COUNT: usize = 1024;
/// Longest path in bytes (PATH_MAX).
const PATH_MAX_BYTES: usize = 4096;
/// The id that means "none" to setresuid(2).
const NO_ID: u32 = u32::MAX;

/// Why a spec is refused: the field, and what is wrong with it.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadSpec {
    /// Not JSON, or not an OCI object.
    #[error("{what}: {reason}")]
    Parse {
        /// Which object.
        what: &'static str,
        /// What the parser says.
        reason: String,
    },
    /// Larger than its bound.
    #[error("{what} is {bytes} bytes long, at most {max} are taken")]
    TooLong {
        /// Which object.
        what: &'static str,
        /// Its length.
        bytes: usize,
        /// The bound.
        max: usize,
    },
    /// A field that cannot be as it is.
    #[error("{field}: {reason}")]
    Field {
        /// Its path in the spec.
        field: &'static str,
        /// Why.
        reason: String,
    },
}

fn refuse(field: &'static str, reason: impl Into<String>) -> BadSpec {
    BadSpec::Field {
        field,
        reason: reason.into(),
    }
}

/// A container's spec that the agent will obey.
#[derive(Debug)]
pub struct ContainerSpec {
    /// What libcontainer gets.
    pub spec: Spec,
    /// Its process.
    pub process: ProcessFacts,
    /// `root.path`, absolute.
    pub root: PathBuf,
    /// A network namespace of its own: its `lo` is ours to bring up.
    pub own_network: bool,
    /// A pid namespace of its own, which ends with its init.
    pub own_pids: bool,
}

impl ContainerSpec {
    /// Whether it binds `source` somewhere.
    pub fn binds(&self, source: &Path) -> bool {
        let mut mounts = self.spec.mounts().iter().flatten();
        mounts.any(|mount| mount.source().as_deref() == Some(source))
    }

    /// Has the container born into the pid namespace at `path`, in place of a new one.
    pub fn join_pid_namespace(&mut self, path: PathBuf) {
        let mut linux = self.spec.linux().clone().unwrap_or_default();
        let mut namespaces = linux.namespaces().clone().unwrap_or_default();
        namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Pid);
        let mut shared = LinuxNamespace::default();
        shared.set_typ(LinuxNamespaceType::Pid);
        shared.set_path(Some(path));
        namespaces.push(shared);
        linux.set_namespaces(Some(namespaces));
        self.spec.set_linux(Some(linux));
        self.own_pids = false;
    }
}

/// A process that the agent will start.
#[derive(Debug)]
pub struct ProcessSpec {
    /// What the runtime process gets.
    pub process: Process,
    /// What the agent needs of it.
    pub facts: ProcessFacts,
}

/// What the agent itself does for a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessFacts {
    /// Descriptors 0, 1, 2 are a terminal.
    pub terminal: bool,
    /// Columns and rows at start.
    pub size: Option<(u16, u16)>,
    /// The owner of its stdio.
    pub uid: u32,
    /// The owner of its stdio.
    pub gid: u32,
    /// Its environment lacks HOME.
    pub needs_home: bool,
}

/// Checks config.json for container `id`.
///
/// # Errors
/// The first thing that cannot be obeyed.
pub fn container(id: &str, json: &[u8]) -> Result<ContainerSpec, BadSpec> {
    let mut spec: Spec = parse("config.json", json)?;
    if !spec.version().starts_with("1.") {
        return Err(refuse("ociVersion", "only 1.x is supported"));
    }
    let root = spec.root().as_ref().map(|root| root.path().clone());
    let root = root.ok_or_else(|| refuse("root", "missing"))?;
    plain_path("root.path", &root)?;
    let process = spec.process().clone();
    let checked = process_object(process.ok_or_else(|| refuse("process", "missing"))?)?;
    check_mounts(&spec)?;
    spec.set_mounts(Some(with_dev(spec.mounts().clone().unwrap_or_default())));
    let linux = spec.linux().clone();
    let linux = guest_linux(id, linux.ok_or_else(|| refuse("linux", "missing"))?)?;
    let own_network = has(&linux, LinuxNamespaceType::Network);
    let own_pids = has(&linux, LinuxNamespaceType::Pid);
    let hooks = spec.hooks().as_ref().and_then(guest_hooks);
    spec.set_process(Some(checked.process));
    spec.set_linux(Some(linux));
    spec.set_hooks(hooks);
    Ok(ContainerSpec {
        spec,
        process: checked.facts,
        root,
        own_network,
        own_pids,
    })
}

/// Checks the `process` object of an exec.
///
/// # Errors
/// The first thing that cannot be obeyed.
pub fn process(json: &[u8]) -> Result<ProcessSpec, BadSpec> {
    process_object(parse("process", json)?)
}

/// Checks a `linux.resources` object.
///
/// # Errors
/// Not such an object, or too long.
pub fn resources(json: &[u8]) -> Result<LinuxResources, BadSpec> {
    parse("resources", json)
}

fn parse<T: serde::de::DeserializeOwned>(what: &'static str, json: &[u8]) -> Result<T, BadSpec> {
    if json.len() > SPEC_MAX_BYTES {
        return Err(BadSpec::TooLong {
            what,
            bytes: json.len(),
            max: SPEC_MAX_BYTES,
        });
    }
    serde_json::from_slice(json).map_err(|e| BadSpec::Parse {
        what,
        reason: e.to_string(),
    })
}

fn process_object(mut process: Process) -> Result<ProcessSpec, BadSpec> {
    check_strings(&process)?;
    if !process.cwd().is_absolute() {
        return Err(refuse("process.cwd", "must be absolute"));
    }
    let user = process.user();
    if user.uid() == NO_ID || user.gid() == NO_ID {
        return Err(refuse("process.user", "ids end at 4294967294"));
    }
    let groups = user.additional_gids().as_ref();
    if groups.is_some_and(|gids| gids.len() > ENTRIES_MAX_COUNT || gids.contains(&NO_ID)) {
        return Err(refuse(
            "process.user.additionalGids",
            "too many groups or an impossible one",
        ));
    }
    check_rlimits(&process)?;
    let (uid, gid) = (user.uid(), user.gid());
    let size = process.console_size().and_then(|size| {
        let columns = u16::try_from(size.width()).ok()?;
        let rows = u16::try_from(size.height()).ok()?;
        (columns > 0 && rows > 0).then_some((columns, rows))
    });
    let facts = ProcessFacts {
        terminal: process.terminal() == Some(true),
        size,
        uid,
        gid,
        needs_home: home(&process).is_none_or(str::is_empty),
    };
    // `false` and nothing are the same wish, but libcontainer takes `Some` for "set".
    let strict = process.no_new_privileges().filter(|strict| *strict);
    process.set_no_new_privileges(strict);
    process.set_oom_score_adj(Some(process.oom_score_adj().unwrap_or(0).clamp(-999, 1000)));
    process.set_apparmor_profile(None);
    process.set_selinux_label(None);
    let capabilities = capabilities(process.capabilities().as_ref());
    process.set_capabilities(Some(capabilities));
    Ok(ProcessSpec { process, facts })
}

fn home(process: &Process) -> Option<&str> {
    let mut env = process.env().iter().flatten();
    env.find_map(|entry| entry.strip_prefix("HOME="))
}

/// Gives the process a HOME: the one of its user in the image's passwd, or the root.
pub fn set_home(process: &mut Process, home: &str) {
    let mut env = process.env().clone().unwrap_or_default();
    env.retain(|entry| !entry.starts_with("HOME="));
    env.push(format!("HOME={home}"));
    process.set_env(Some(env));
}

/// The home directory of `uid` in the text of an image's /etc/passwd (passwd(5)); hostile text.
pub fn home_in_passwd(passwd: &str, uid: u32) -> Option<&str> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let id = fields.nth(2)?;
        let home = fields.nth(2)?;
        let sound = home.starts_with('/') && !home.contains('\0') && home.len() < PATH_MAX_BYTES;
        (id.parse() == Ok(uid) && sound).then_some(home)
    })
}

fn check_strings(process: &Process) -> Result<(), BadSpec> {
    let args = process.args().as_deref().unwrap_or_default();
    let env = process.env().as_deref().unwrap_or_default();
    if args.is_empty() {
        return Err(refuse("process.args", "missing or empty"));
    }
    if args.len() + env.len() > STRINGS_MAX_COUNT {
        let reason = format!("at most {STRINGS_MAX_COUNT} arguments and environment entries");
        return Err(refuse("process", reason));
    }
    for (field, strings) in [("process.args", args), ("process.env", env)] {
        for (n, string) in strings.iter().enumerate() {
            if string.contains('\0') {
                return Err(refuse(field, format!("entry {n} holds a NUL byte")));
            }
            if string.len() > STRING_MAX_BYTES {
                let reason = format!("entry {n} is longer than {STRING_MAX_BYTES} bytes");
                return Err(refuse(field, reason));
            }
        }
    }
    match env.iter().position(|entry| !entry.contains('=')) {
        Some(n) => Err(refuse("process.env", format!("entry {n} has no '='"))),
        None => Ok(()),
    }
}

fn check_rlimits(process: &Process) -> Result<(), BadSpec> {
    let rlimits = process.rlimits().as_deref().unwrap_or_default();
    for (n, rlimit) in rlimits.iter().enumerate() {
        if rlimit.soft() > rlimit.hard() {
            return Err(refuse(
                "process.rlimits",
                format!("entry {n}: soft over hard"),
            ));
        }
        let mut before = rlimits.iter().take(n);
        if before.any(|earlier| earlier.typ() == rlimit.typ()) {
            return Err(refuse(
                "process.rlimits",
                format!("entry {n}: type named twice"),
            ));
        }
    }
    Ok(())
}

/// None given means none; inheritable ones only as far as ambient ones need them (CVE-2022-29162).
fn capabilities(given: Option<&LinuxCapabilities>) -> LinuxCapabilities {
    let mut all = given.cloned().unwrap_or_else(|| {
        let mut none = LinuxCapabilities::default();
        none.set_bounding(None);
        none.set_effective(None);
        none.set_permitted(None);
        none.set_ambient(None);
        none
    });
    all.set_inheritable(all.ambient().clone());
    all
}

fn check_mounts(spec: &Spec) -> Result<(), BadSpec> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    if mounts.len() > ENTRIES_MAX_COUNT {
        return Err(refuse("mounts", format!("at most {ENTRIES_MAX_COUNT}")));
    }
    for mount in mounts {
        plain_path("mounts.destination", mount.destination())?;
    }
    Ok(())
}

/// The mounts with one on /dev: the device nodes that every container has (OCI runtime-spec, "Default
/// Devices") cannot be made in the root itself, which is the host's and takes none.
fn with_dev(mut mounts: Vec<Mount>) -> Vec<Mount> {
    let dev = Path::new("/dev");
    if mounts.iter().any(|mount| mount.destination() == dev) {
        return mounts;
    }
    let mut tmpfs = Mount::default();
    tmpfs.set_destination(dev.to_owned());
    tmpfs.set_typ(Some("tmpfs".to_owned()));
    tmpfs.set_source(Some("tmpfs".into()));
    let options = ["nosuid", "strictatime", "mode=755", "size=65536k"];
    tmpfs.set_options(Some(options.map(str::to_owned).to_vec()));
    // Below what it would hide.
    let first_inside = mounts
        .iter()
        .position(|mount| mount.destination().starts_with(dev));
    mounts.insert(first_inside.unwrap_or(mounts.len()), tmpfs);
    mounts
}

/// Absolute, without `..`, bounded, no NUL or newline.
fn plain_path(field: &'static str, path: &Path) -> Result<(), BadSpec> {
    let bytes = path.as_os_str().as_encoded_bytes();
    if !path.is_absolute() {
        return Err(refuse(field, "must be absolute"));
    }
    if bytes.len() > PATH_MAX_BYTES || bytes.iter().any(|b| matches!(b, 0 | b'\n')) {
        return Err(refuse(field, "too long, or with a NUL or a newline"));
    }
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(refuse(field, "must not contain '..'"));
    }
    Ok(())
}

fn guest_linux(id: &str, mut linux: Linux) -> Result<Linux, BadSpec> {
    check_namespaces(&linux)?;
    for (field, count) in [
        (
            "linux.maskedPaths",
            linux.masked_paths().as_ref().map(Vec::len),
        ),
        (
            "linux.readonlyPaths",
            linux.readonly_paths().as_ref().map(Vec::len),
        ),
        ("linux.devices", linux.devices().as_ref().map(Vec::len)),
    ] {
        if count.unwrap_or(0) > ENTRIES_MAX_COUNT {
            return Err(refuse(field, format!("at most {ENTRIES_MAX_COUNT}")));
        }
    }
    let seccomp = linux.seccomp().as_ref();
    if seccomp.is_some_and(|seccomp| seccomp.listener_path().is_some()) {
        return Err(refuse(
            "linux.seccomp.listenerPath",
            "seccomp notification is not supported",
        ));
    }
    linux.set_cgroups_path(Some(Path::new("/capsid").join(id)));
    linux.set_mount_label(None);
    linux.set_intel_rdt(None);
    linux.set_net_devices(None);
    Ok(linux)
}

/// New namespaces only: what is to be shared is shared with the pod by being left out, and a pid namespace is shared with
/// a container that the request names. The agent's mounts are nobody's.
fn check_namespaces(linux: &Linux) -> Result<(), BadSpec> {
    let refused = |reason| Err(refuse("linux.namespaces", reason));
    for namespace in linux.namespaces().iter().flatten() {
        let path = namespace.path().as_ref();
        if path.is_some_and(|path| !path.as_os_str().is_empty()) {
            return refused("a namespace is not joined by a path");
        }
    }
    if !has(linux, LinuxNamespaceType::Mount) {
        return refused("a new mount namespace is required");
    }
    if has(linux, LinuxNamespaceType::User) {
        return refused("user namespaces are not supported yet");
    }
    Ok(())
}

/// Whether a namespace of this kind is listed.
fn has(linux: &Linux, kind: LinuxNamespaceType) -> bool {
    let mut all = linux.namespaces().iter().flatten();
    all.any(|namespace| namespace.typ() == kind)
}

/// Only createContainer and startContainer run in the guest; the others are the host's.
fn guest_hooks(hooks: &Hooks) -> Option<Hooks> {
    let create = hooks.create_container().clone().unwrap_or_default();
    let start = hooks.start_container().clone().unwrap_or_default();
    if create.is_empty() && start.is_empty() {
        return None;
    }
    let built = HooksBuilder::default().create_container(create);
    built.start_container(start).build().ok()
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
