//! From a checked spec to a process: its files, its descriptors, the runtime process's order, and what its report
//! means. Blocking; runs on blocking threads.

use crate::cgroup::Cgroup;
use crate::container::{Container, Directories};
use crate::error::{Result, SandboxError, io_error};
use crate::last_words;
use crate::launch::{LaunchError, Launched, Launcher};
use crate::process::Stdio;
use crate::runtime::message::{Order, Report};
use crate::spec::{self, ContainerSpec, ProcessFacts, ProcessSpec};
use crate::stdio::{self, HostStreams, ProcessEnds};
use capsid_protocol::exec_error::ExecError;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

pub(crate) fn not_executed(report: Report) -> SandboxError {
    match report {
        Report::NotFound(what) => SandboxError::NotExecuted {
            kind: ExecError::NotFound,
            what,
        },
        Report::NotExecutable(what) => SandboxError::NotExecuted {
            kind: ExecError::NotExecutable,
            what,
        },
        Report::Failed(what) => SandboxError::NotStarted(what),
        Report::Executing => SandboxError::NotStarted("the program was not executed".into()),
    }
}

/// What the process reported says more than what the runtime process saw of it.
fn launch_error((error, reports): (LaunchError, Vec<Report>)) -> SandboxError {
    let told = reports
        .into_iter()
        .find(|report| *report != Report::Executing);
    told.map_or_else(|| SandboxError::Launch(error), not_executed)
}

/// The descriptors of a new process and the agent's side of them.
fn stdio_of(facts: ProcessFacts, streams: HostStreams) -> io::Result<(ProcessEnds, Stdio)> {
    if facts.terminal {
        let owner = (facts.uid, facts.gid);
        return Ok((stdio::nulls()?, Stdio::terminal(streams, facts.size, owner)));
    }
    let (ends, agent) = stdio::pipes(streams, facts.uid, facts.gid)?;
    Ok((ends, Stdio::Pipes(agent)))
}

/// The init of a container, born into a pid namespace of its own or into that of `shared`.
pub(crate) fn launch_init(
    launcher: &Launcher,
    (id, directories): (&str, &Directories),
    mut checked: ContainerSpec,
    shared: Option<&Container>,
    streams: HostStreams,
) -> Result<(Launched, Stdio)> {
    let bundle = &directories.bundle;
    let namespace = shared.map(pid_namespace).transpose()?;
    if let Some(namespace) = &namespace {
        // libcontainer joins by a path: this one names the namespace itself, as long as it is open here.
        let (agent, fd) = (std::process::id(), namespace.as_raw_fd());
        checked.join_pid_namespace(format!("/proc/{agent}/fd/{fd}").into());
    }
    if let (true, Some(process)) = (checked.process.needs_home, checked.spec.process_mut()) {
        spec::set_home(process, &home_of(&checked.root, checked.process.uid));
    }
    let config =
        serde_json::to_vec(&checked.spec).map_err(|e| io_error("writing its spec")(e.into()));
    write_private(&bundle.join("config.json"), &config?).map_err(io_error("writing its spec"))?;
    let (ends, stdio) =
        stdio_of(checked.process, streams).map_err(io_error("making its descriptors"))?;
    let order = Order::Create {
        container_id: id.into(),
        bundle: bundle.clone(),
        state_root: directories.state_root.clone(),
        console_socket: checked
            .process
            .terminal
            .then(|| bundle.join("console.sock")),
        loopback: checked.own_network,
    };
    let launched = launcher.launch(&order, &ends, &[]).map_err(launch_error)?;
    Ok((launched, stdio))
}

/// The pid namespace of a container that has not ended.
fn pid_namespace(of: &Container) -> Result<OwnedFd> {
    let opened = std::fs::File::open(format!("/proc/{}/ns/pid", of.init.pid));
    // Not ended after the look: until now the pid has meant no other process.
    if !of.init.runs() {
        let why = format!("pid_namespace_of: container {} has ended", of.id);
        return Err(SandboxError::Wrong(why));
    }
    Ok(opened
        .map_err(io_error("opening the pid namespace to share"))?
        .into())
}

/// The pause process of a pod, in a cgroup that is made for it. Its streams end here: nobody reads and nobody writes.
pub(crate) fn launch_pause(
    launcher: &Launcher,
    cgroup: &Cgroup,
    streams: HostStreams,
) -> Result<(Launched, Stdio)> {
    streams.end();
    cgroup.make()?;
    let cgroup = cgroup.directory()?;
    let ends = stdio::nulls().map_err(io_error("making its descriptors"))?;
    let launched = launcher.launch(&Order::Pause, &ends, &[&cgroup]);
    let launched = launched.map_err(launch_error)?;
    Ok((launched, Stdio::Pipes(stdio::AgentEnds::default())))
}

pub(crate) fn launch_exec(
    launcher: &Launcher,
    (container, root): (&Container, &Path),
    exec_id: &str,
    mut checked: ProcessSpec,
    streams: HostStreams,
) -> Result<(Launched, Stdio)> {
    if checked.facts.needs_home {
        let home = home_of(root, checked.facts.uid);
        spec::set_home(&mut checked.process, &home);
    }
    let bundle = container.directories.bundle.clone();
    let file = bundle.join(format!("exec-{exec_id}.json"));
    let json = serde_json::to_vec(&checked.process);
    let json = json.map_err(|e| io_error("writing its process")(e.into()))?;
    write_private(&file, &json).map_err(io_error("writing its process"))?;
    let (ends, stdio) =
        stdio_of(checked.facts, streams).map_err(io_error("making its descriptors"))?;
    let cgroup = container.cgroup.directory()?;
    let init_cgroup = container.cgroup.directory_of(container.init.pid)?;
    let order = Order::Exec {
        bundle,
        process: file.clone(),
    };
    let places = [
        &container.init.pidfd,
        &cgroup,
        init_cgroup.as_ref().unwrap_or(&cgroup),
    ];
    let launched = launcher.launch(&order, &ends, &places);
    if let Err(e) = std::fs::remove_file(&file) {
        last_words::warn(&format!("removing {}: {e}", file.display()));
    }
    Ok((launched.map_err(launch_error)?, stdio))
}

fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut options = std::fs::OpenOptions::new();
    let mut file = options
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)
}

/// The user's home in the image, found by the agent so that nothing asks the image's own name service
/// (CVE-2019-14271); "/" if the image does not say.
fn home_of(root: &Path, uid: u32) -> String {
    let passwd = crate::rootfs::read_small(root, "etc/passwd").unwrap_or_default();
    spec::home_in_passwd(&passwd, uid).unwrap_or("/").into()
}

/// Wakes libcontainer's init, which waits for one connection on its socket.
pub(crate) fn notify(socket: &Path) -> io::Result<()> {
    let mut socket = std::os::unix::net::UnixStream::connect(socket)?;
    socket.write_all(b"start")
}
