//! `capsid-agent`: PID 1 of the guest; with `oci-runtime`, the agent's runtime process; with `pause`, the pause
//! process of a pod; with `serve`, the same service in an ordinary root process over unix sockets (how it is tested without a VM).

use capsid_agent::sandbox::Places;
use capsid_agent::transport::Doors;
use capsid_agent::{boot, last_words, power, runtime, serve, system};
use std::path::PathBuf;
use std::process::ExitCode;

fn main() -> ExitCode {
    let started_ns = system::boottime_ns();
    let mut arguments = std::env::args_os().skip(1);
    let first = arguments.next();
    if first.as_deref() == Some(runtime::ARGUMENT.as_ref()) {
        return runtime::main();
    }
    if first.as_deref() == Some(runtime::pause::ARGUMENT.as_ref()) {
        return runtime::pause::main();
    }
    last_words::on_panic();
    if std::process::id() == 1 {
        guest(started_ns)
    }
    match (first, arguments.next(), arguments.next(), arguments.next()) {
        (Some(verb), Some(rpc), Some(streams), Some(run)) if verb == "serve" => {
            ordinary_process(started_ns, rpc.into(), streams.into(), run.into())
        }
        _ => last_words::die_saying(
            "this program is PID 1 of a Capsid guest; outside of one: serve RPC-SOCKET STREAM-SOCKET DIR",
        ),
    }
}

/// The guest's whole life. The doors come first: the host's answer travels while the guest is prepared.
fn guest(started_ns: u64) -> ! {
    let doors = Doors::Vsock;
    let opened = doors
        .listen()
        .and_then(|listener| Ok((listener, doors.dial()?)));
    // Mounts come even if the doors failed: the reason is told over /dev/kmsg.
    if let Err(e) = boot::prepare() {
        last_words::die(&e);
    }
    let places = Places {
        program: std::env::current_exe().unwrap_or_else(|_| "/init".into()),
        run: "/run/capsid".into(),
        cgroup_root: boot::CGROUP_ROOT.into(),
        share: Some("/run/capsid/share".into()),
    };
    let served = match opened {
        Ok((listener, dialled)) => serve(listener, dialled, places, started_ns),
        Err(e) => Err(e.into()),
    };
    if let Err(e) = served {
        last_words::die(&e);
    }
    power::off()
}

fn ordinary_process(started_ns: u64, rpc: PathBuf, streams: PathBuf, run: PathBuf) -> ! {
    let places = Places {
        program: std::env::current_exe().unwrap_or_default(),
        run,
        cgroup_root: boot::CGROUP_ROOT.into(),
        share: None,
    };
    if let Err(e) = rustix::process::set_child_subreaper(Some(rustix::process::getpid())) {
        last_words::die_saying(&format!("becoming the reaper of orphans: {e}"));
    }
    let doors = Doors::Unix { rpc, streams };
    let opened = doors
        .listen()
        .and_then(|listener| Ok((listener, doors.dial()?)));
    let served = match opened {
        Ok((listener, dialled)) => serve(listener, dialled, places, started_ns),
        Err(e) => Err(e.into()),
    };
    if let Err(e) = served {
        last_words::die(&e);
    }
    power::off()
}
