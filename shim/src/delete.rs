//! The action `delete`: undoes what is left of a container whose server is gone, or does not answer any more. It needs nothing but the bundle,
//! is done when there is nothing to undo, and may come any number of times.
//!
//! Mounts, network namespaces and taps are gone with the server and the VMM, whose they were. What can stay is a VMM that hangs, its cgroup, the
//! socket's file, and hooks that have not run.

use crate::cgroup::{CgroupPath, Hierarchy};
use crate::error::chain;
use crate::hooks::{self, HostHooks};
use crate::pod::timestamp;
use crate::record::{Record, Started, TaskRecord};
use crate::socket::{self, SocketError};
use crate::spec;
use capsid_owner::end::KILLED;
use containerd_shim_protos::api::DeleteResponse;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// How long a killed process may take to be gone, in seconds: containerd waits five for all of this.
const GONE_TIMEOUT_S: i64 = 2;

/// How long all poststop hooks may take together, in seconds: the same.
const HOOKS_TIMEOUT_S: u64 = 2;

/// Whose remains.
#[derive(Debug)]
pub struct Deleting {
    /// The container's id.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The container's bundle, which may be gone.
    pub bundle: PathBuf,
}

/// Why it is not undone.
#[derive(Debug, thiserror::Error)]
pub enum DeleteError {
    /// A record that cannot be read: what is left is not known.
    #[error("reading what the server has left in {bundle}")]
    Record {
        /// Where.
        bundle: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The kernel holds it.
    #[error("process {0} does not die of SIGKILL")]
    Alive(u32),
    /// The server's socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The VM's cgroup.
    #[error("removing the VM's cgroup")]
    Cgroup(#[source] crate::cgroup::CgroupError),
}

/// Undoes what is left.
///
/// # Errors
/// Something stays; the next `delete` tries again.
pub fn delete(deleting: &Deleting) -> Result<DeleteResponse, DeleteError> {
    let Deleting { id, bundle, .. } = deleting;
    let unreadable = |cause| DeleteError::Record {
        bundle: bundle.clone(),
        cause,
    };
    // Of the container that the server was started for; the others of its pod have none, and a server that was killed at once.
    match Record::read(bundle).map_err(unreadable)? {
        Some(record) => end(&record)?,
        None => socket::of_bundle(bundle)?.map_or(Ok(()), |path| socket::remove_dead(&path))?,
    }
    let task = TaskRecord::read(bundle).map_err(unreadable)?;
    if task.is_some() {
        // First: they run once, even if they do not end in time.
        TaskRecord::remove(bundle);
        run_hooks(id, bundle);
    }
    Ok(DeleteResponse {
        pid: task.map_or(0, |task| task.pid),
        exit_status: KILLED.into(),
        exited_at: Some(timestamp(SystemTime::now())).into(),
        ..Default::default()
    })
}

/// Ends the server, which ends the VMM, and the VMM, which may hang; then what was theirs.
fn end(record: &Record) -> Result<(), DeleteError> {
    // One that has said so ends in good order: its hooks, loggers and last events.
    if let Some(shim) = record.shim.filter(|_| record.ends).and_then(Started::open) {
        let _gone_or_killed = gone(&shim);
    }
    let processes = [record.shim, record.vmm].into_iter().flatten();
    // Not a server that was started as one.
    let others = processes.filter(|process| process.pid != std::process::id());
    let killed = others.filter_map(|process| Some((process.pid, process.kill()?)));
    // All are killed before one is waited for.
    for (pid, pidfd) in killed.collect::<Vec<_>>() {
        gone(&pidfd).ok_or(DeleteError::Alive(pid))?;
    }
    let place = record.cgroup.as_ref();
    let place = place.and_then(|place| CgroupPath::parse(Path::new(place)).ok());
    if let (Some(place), Ok(hierarchy)) = (place, Hierarchy::find()) {
        if let Some(cgroup) = hierarchy.left(&place).map_err(DeleteError::Cgroup)? {
            cgroup.remove().map_err(DeleteError::Cgroup)?;
        }
    }
    // It is gone, or a new server's, which would not have the name of a group that is being deleted.
    let _gone = std::fs::remove_file(&record.socket);
    Ok(())
}

/// Waits for the end of a process.
fn gone(pidfd: &OwnedFd) -> Option<()> {
    let timeout = Timespec {
        tv_sec: GONE_TIMEOUT_S,
        tv_nsec: 0,
    };
    loop {
        match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return None,
            Ok(_) => return Some(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return None,
        }
    }
}

/// The hooks that a container's end has, and that nobody ran. What fails is said and nothing more, as with runc.
fn run_hooks(id: &str, bundle: &Path) {
    let Ok(mut spec) = spec::read(bundle) else {
        return; // no spec, no hooks
    };
    let hooks = match HostHooks::take(&mut spec) {
        Ok(hooks) if !hooks.stopped.is_empty() => hooks,
        _ => return,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let Ok(runtime) = runtime else {
        tracing::warn!("no event loop for the poststop hooks");
        return;
    };
    let annotations = spec.annotations().clone().unwrap_or_default();
    let state = hooks::State {
        oci_version: spec.version(),
        id,
        status: hooks::Status::Stopped,
        pid: None,
        bundle,
        annotations: &annotations,
    };
    let limit = Duration::from_secs(HOOKS_TIMEOUT_S);
    let ran = runtime.block_on(async {
        // Those that are dropped are killed.
        tokio::time::timeout(limit, hooks::run_each(&hooks.stopped, &state)).await
    });
    match ran {
        Ok(failures) => {
            for error in failures {
                tracing::warn!(container = id, error = chain(&error), "poststop");
            }
        }
        Err(_) => tracing::warn!(
            container = id,
            "poststop hooks took more than {HOOKS_TIMEOUT_S} s and were killed"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Started;
    use std::fs;
    use std::process::Command;

    fn bundle(name: &str) -> PathBuf {
        let path =
            std::env::temp_dir().join(format!("capsid-delete-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).expect("writable");
        path
    }

    fn deleting(bundle: &Path) -> Deleting {
        Deleting {
            id: "c1".into(),
            namespace: "default".into(),
            bundle: bundle.to_owned(),
        }
    }

    #[test]
    fn a_bundle_that_is_gone_is_deleted() {
        let deleted = delete(&deleting(Path::new("/no/such/bundle"))).expect("nothing to undo");
        assert_eq!(deleted.exit_status, 137);
    }

    #[test]
    fn a_vmm_that_hangs_is_killed_and_its_hooks_run_once() {
        let bundle = bundle("hangs");
        let mut vmm = Command::new("sleep").arg("1000").spawn().expect("sleep");
        let socket = bundle.join("socket");
        fs::write(&socket, "").expect("writable");
        let record = Record {
            vmm: Started::now(vmm.id()),
            ..Record::of_this_process("c1", &socket)
        };
        record.write(&bundle).expect("writable");
        TaskRecord { pid: 4711 }.write(&bundle).expect("writable");
        let hook = serde_json::json!({"path": "/bin/sh", "args": ["sh", "-c", "echo ran >> ran"]});
        let spec = serde_json::json!({"ociVersion": "1.1.0", "hooks": {"poststop": [hook]}});
        fs::write(bundle.join("config.json"), spec.to_string()).expect("writable");
        for pid in [4711, 0] {
            let deleted = delete(&deleting(&bundle)).expect("undone");
            assert_eq!(deleted.pid, pid);
        }
        let ran = fs::read_to_string(bundle.join("ran"));
        vmm.wait().expect("killed");
        let socket = socket.exists();
        fs::remove_dir_all(&bundle).expect("ours");
        assert_eq!(ran.expect("a hook"), "ran\n");
        assert!(!socket);
    }
}
