//! The OCI runtime-spec of the container: from an image's config and the flags, or from a bundle's `config.json` and
//! the flags. Pure, but for the bundle's bounded read.
//!
//! Paths of this host become paths of the guest here and nowhere else: the root file system is
//! `/run/capsid/share/<id>/rootfs`, a volume `/run/capsid/share/<id>/volumes/<n>`.
//!
//! What docker does and this does not: no seccomp profile is set by default, since the guest's kernel serves this
//! container alone and the VM is the boundary (a bundle's profile is obeyed); there is no network but the loopback, for
//! the VM has no network device.

pub(crate) mod bundle;
mod docker;

use crate::image::ImageConfig;
use crate::users::{Accounts, UserError};
use crate::volume::Volume;
use oci_spec::runtime::{BoxBuilder, Mount, Process, Root, Spec};
use serde_json::json;
use std::path::{Path, PathBuf};

pub(crate) use bundle::BundleError;

/// Where the agent mounts the share in the guest.
const GUEST_SHARE: &str = "/run/capsid/share";
/// Longest spec that the agent takes, in bytes.
pub(crate) const SPEC_MAX_BYTES: usize = 2 << 20;
/// The files of `/etc` that we make, where no volume has their place.
pub(crate) const ETC_FILES: [&str; 3] = ["hosts", "hostname", "resolv.conf"];

/// What the flags ask of the process.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wishes {
    pub(crate) id: String,
    pub(crate) command: Vec<String>,
    /// `NAME=value`; a name alone was resolved or dropped before.
    pub(crate) env: Vec<String>,
    pub(crate) cwd: Option<String>,
    pub(crate) user: Option<String>,
    pub(crate) tty: bool,
    /// Columns and rows of the person's terminal.
    pub(crate) console_size: Option<(u16, u16)>,
    pub(crate) hostname: Option<String>,
    pub(crate) read_only: bool,
}

/// Why no spec could be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    /// Nothing to run.
    #[error("no command: neither the command line nor the image names one")]
    NoCommand,
    /// A bundle without arguments.
    #[error("config.json: process.args is missing or empty, and the command line names no command")]
    NoArgs,
    /// A relative working directory.
    #[error("the working directory {0:?} must be an absolute path")]
    Cwd(String),
    /// An environment entry that is none.
    #[error("environment entry {0:?}: expected NAME or NAME=VALUE")]
    Env(String),
    /// A host name that is none.
    #[error("host name {0:?} is not 1 to 63 characters of [A-Za-z0-9-.]")]
    Hostname(String),
    /// The user.
    #[error(transparent)]
    User(#[from] UserError),
    /// Longer than the agent takes.
    #[error("the container's spec is {0} bytes long, at most {SPEC_MAX_BYTES} are taken")]
    TooLong(usize),
    /// It cannot be written as JSON.
    #[error("the container's spec cannot be made")]
    Json(#[source] serde_json::Error),
}

/// The values of `-e`: a name alone takes the caller's value, and nothing where the caller has none, as docker does.
///
/// # Errors
/// An entry without a name.
pub(crate) fn environment(
    entries: &[String],
    lookup: impl Fn(&str) -> Option<String>,
) -> Result<Vec<String>, SpecError> {
    let mut env = Vec::with_capacity(entries.len());
    for entry in entries {
        let name = entry.split('=').next().unwrap_or_default();
        if name.is_empty() || entry.contains('\0') {
            return Err(SpecError::Env(entry.clone()));
        }
        if entry.contains('=') {
            env.push(entry.clone());
        } else {
            env.extend(lookup(name).map(|value| format!("{name}={value}")));
        }
    }
    Ok(env)
}

/// The host name: the one asked for, or the id's first 12 characters as docker's.
///
/// # Errors
/// A name that `sethostname(2)` or a hosts file would not take.
pub(crate) fn hostname(asked: Option<&str>, id: &str) -> Result<String, SpecError> {
    let name = match asked {
        Some(name) => name.to_owned(),
        None => id.chars().take(12).collect(),
    };
    let is_name = (1..=63).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.'));
    if is_name {
        Ok(name)
    } else {
        Err(SpecError::Hostname(name.chars().take(80).collect()))
    }
}

/// The text of one of [`ETC_FILES`].
pub(crate) fn etc_file(name: &str, hostname: &str) -> String {
    match name {
        "hosts" => format!(
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{hostname}\n"
        ),
        "hostname" => format!("{hostname}\n"),
        // The VM has no network device yet, so there is no server to name.
        _ => String::new(),
    }
}

/// The spec of an image's container.
///
/// # Errors
/// What the flags and the image ask for cannot be had.
pub(crate) fn of_image(
    image: &ImageConfig,
    wishes: &Wishes,
    volumes: &[Volume],
    accounts: &Accounts,
) -> Result<Spec, SpecError> {
    let entrypoint = image.entrypoint.clone().unwrap_or_default();
    let rest = match wishes.command.is_empty() {
        true => image.cmd.clone().unwrap_or_default(),
        false => wishes.command.clone(),
    };
    let args: Vec<String> = entrypoint.into_iter().chain(rest).collect();
    if args.is_empty() {
        return Err(SpecError::NoCommand);
    }
    let host = hostname(wishes.hostname.as_deref(), &wishes.id)?;
    let user = accounts.resolve(
        wishes
            .user
            .as_deref()
            .or(image.user.as_deref())
            .unwrap_or_default(),
    )?;
    let mut env = docker::environment(&host, wishes.tty);
    merge(&mut env, image.env.as_deref().unwrap_or_default());
    merge(&mut env, &wishes.env);
    if let Some(home) = user.home.filter(|home| home.starts_with('/')) {
        if !env.iter().any(|entry| entry.starts_with("HOME=")) {
            env.push(format!("HOME={home}"));
        }
    }
    let cwd = image.working_dir.as_deref().filter(|cwd| !cwd.is_empty());
    let mut mounts = docker::mounts();
    mounts.extend(etc_mounts(&wishes.id, volumes));
    let mut spec: Spec = serde_json::from_value(json!({
        "ociVersion": "1.0.2",
        "hostname": host,
        "process": {
            "args": args,
            "env": env,
            "cwd": cwd.unwrap_or("/"),
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": user.additional_gids},
            "capabilities": docker::capabilities(),
            "rlimits": docker::rlimits(),
        },
        "root": {"path": "rootfs"},
        "mounts": mounts,
        "linux": docker::linux(),
    }))
    .map_err(SpecError::Json)?;
    let mut process = spec.process().clone().unwrap_or_default();
    finish_process(&mut process, wishes)?;
    spec.set_process(Some(process));
    finish(&mut spec, wishes, volumes);
    Ok(spec)
}

/// The spec of a bundle's container: its own, with what the flags change.
///
/// # Errors
/// As for an image.
pub(crate) fn of_bundle(
    bundle: &bundle::Bundle,
    wishes: &Wishes,
    volumes: &[Volume],
    accounts: &Accounts,
) -> Result<Spec, SpecError> {
    let mut spec = bundle.spec.clone();
    let mut process = spec.process().clone().ok_or(SpecError::NoArgs)?;
    if !wishes.command.is_empty() {
        process.set_args(Some(wishes.command.clone()));
    }
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(SpecError::NoArgs);
    }
    let mut env = process.env().clone().unwrap_or_default();
    merge(&mut env, &wishes.env);
    process.set_env(Some(env));
    if let Some(text) = &wishes.user {
        let resolved = accounts.resolve(text)?;
        let mut user = process.user().clone();
        user.set_uid(resolved.uid);
        user.set_gid(resolved.gid);
        user.set_additional_gids(Some(resolved.additional_gids));
        process.set_user(user);
    }
    finish_process(&mut process, wishes)?;
    spec.set_process(Some(process));
    if let Some(name) = &wishes.hostname {
        spec.set_hostname(Some(hostname(Some(name), &wishes.id)?));
    }
    finish(&mut spec, wishes, volumes);
    Ok(spec)
}

/// The JSON for the agent.
///
/// # Errors
/// It is longer than the agent takes.
pub(crate) fn to_json(spec: &Spec) -> Result<Vec<u8>, SpecError> {
    let json = serde_json::to_vec(spec).map_err(SpecError::Json)?;
    if json.len() > SPEC_MAX_BYTES {
        return Err(SpecError::TooLong(json.len()));
    }
    Ok(json)
}

/// Terminal and working directory.
fn finish_process(process: &mut Process, wishes: &Wishes) -> Result<(), SpecError> {
    process.set_terminal(Some(wishes.tty));
    if let Some(cwd) = &wishes.cwd {
        process.set_cwd(PathBuf::from(cwd));
    }
    if !process.cwd().is_absolute() {
        return Err(SpecError::Cwd(process.cwd().display().to_string()));
    }
    let size = wishes.console_size.filter(|_| wishes.tty);
    process.set_console_size(size.and_then(|(columns, rows)| {
        let size = BoxBuilder::default().width(columns).height(rows);
        size.build().ok() // both fields are there
    }));
    Ok(())
}

/// Root and volumes, as the guest finds them.
fn finish(spec: &mut Spec, wishes: &Wishes, volumes: &[Volume]) {
    let mut root = spec.root().clone().unwrap_or_default();
    root.set_path(guest_path(&wishes.id).join("rootfs"));
    if wishes.read_only {
        root.set_readonly(Some(true));
    }
    spec.set_root(Some(root));
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for (index, volume) in volumes.iter().enumerate() {
        let source = guest_path(&wishes.id)
            .join("volumes")
            .join(index.to_string());
        let mode = if volume.read_only { "ro" } else { "rw" };
        mounts.push(bind(&source, &volume.destination, mode));
    }
    spec.set_mounts(Some(mounts));
}

fn guest_path(id: &str) -> PathBuf {
    Path::new(GUEST_SHARE).join(id)
}

fn etc_mounts(id: &str, volumes: &[Volume]) -> Vec<Mount> {
    let files = ETC_FILES.iter().map(|name| (name, format!("/etc/{name}")));
    files
        .filter(|(_, place)| !volumes.iter().any(|volume| volume.destination == *place))
        .map(|(name, place)| bind(&guest_path(id).join("etc").join(name), &place, "rw"))
        .collect()
}

fn bind(source: &Path, destination: &str, mode: &str) -> Mount {
    let mut mount = Mount::default();
    mount.set_destination(PathBuf::from(destination));
    mount.set_source(Some(source.to_owned()));
    mount.set_typ(Some("bind".to_owned()));
    mount.set_options(Some(vec![
        "rbind".to_owned(),
        "rprivate".to_owned(),
        mode.to_owned(),
    ]));
    mount
}

/// Adds entries, the later of one name winning in the earlier one's place.
fn merge(env: &mut Vec<String>, more: &[String]) {
    for entry in more {
        let name = entry.split('=').next().unwrap_or_default();
        // An image may bring an entry without a value; the kernel takes it, libc ignores it, the agent refuses it.
        if name.is_empty() || !entry.contains('=') {
            continue;
        }
        let same = |old: &&mut String| old.split('=').next() == Some(name);
        match env.iter_mut().find(same) {
            Some(old) => *old = entry.clone(),
            None => env.push(entry.clone()),
        }
    }
}

/// Whether a root must be read-only.
pub(crate) fn is_read_only(root: Option<&Root>) -> bool {
    root.and_then(Root::readonly).unwrap_or(false)
}

#[cfg(test)]
#[path = "spec_tests.rs"]
mod tests;
