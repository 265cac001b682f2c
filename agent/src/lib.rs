//! `capsid-agent`, PID 1 of a Capsid guest: it makes the guest a place for containers, dials the host
//! once, serves the calls that come over that connection, and powers the machine off when it ends.
//!
//! It trusts its host and its kernel, and no container: images, their processes and all they can reach
//! are hostile. It opens no connection but that one and hears nobody but the host.
//!
//! The containers of a pod share its network, its IPC objects and its host name, which are the guest's own and so the agent's. What
//! that puts within the reach of a container, also of one with CAP_SYS_ADMIN and CAP_NET_ADMIN in it:
//!
//! - Sockets by name: the agent has none. Its two doors are vsock, which no network namespace holds; each checks that its
//!   peer is the host. Sockets between it and its runtime process have no name, those of libcontainer are files of the agent's mount
//!   namespace, which no container is in.
//! - Uevents, which a container can send in any network namespace: each costs the agent one more look (`hotplug.rs`).
//! - Interfaces, routes and the host name: the pod's, the agent uses none of them. SysV and POSIX IPC: the agent has none.
//! - Its mount namespace is shared with nobody: a spec that asks for that is refused (`spec.rs`).
//! - Its cgroup and its pid namespace, by a spec that lists none: who may mount cgroup2 there and write it, or trace or kill there, can
//!   stop the agent, and with it this guest. So can whoever may load a module or write /dev/mem: a privileged container is root in
//!   its own VM, and a host that thinks otherwise of a pod asks for these two namespaces.

mod birth;
pub mod boot;
pub mod cgroup;
pub mod container;
pub mod cpus;
mod error;
pub mod events;
pub mod figures;
pub mod hotplug;
pub mod last_words;
pub mod launch;
pub mod pending;
pub mod power;
pub mod process;
pub mod reaper;
pub mod rootfs;
pub mod runtime;
pub mod sandbox;
pub mod server;
pub mod share;
pub mod shm;
pub mod spec;
pub mod state;
pub mod stdio;
pub mod stream;
pub mod system;
pub mod transport;

use std::sync::Arc;
use transport::{Dialled, DoorError, Listener, RpcStream};

/// Threads for work that blocks: all launches, and as many again for the calls that never wait for them.
const BLOCKING_THREADS_COUNT: usize = 2 * sandbox::LAUNCHES_MAX_COUNT;

/// Why the agent cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A door does not open.
    #[error(transparent)]
    Door(#[from] DoorError),
    /// The runtime, a signal handler, the stream port.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// errno.
        #[source]
        cause: std::io::Error,
    },
    /// The RPC server.
    #[error("serving the host's calls")]
    Rpc(#[source] ttrpc::Error),
}

fn io(what: &'static str) -> impl Fn(std::io::Error) -> ServeError {
    move |cause| ServeError::Io { what, cause }
}

/// Serves the host until it hangs up or asks for the end; the machine may be powered off after that.
///
/// # Errors
/// The agent cannot serve (any more); the machine has no use then.
pub fn serve(
    listener: Listener,
    dialled: Dialled,
    places: sandbox::Places,
    started_ns: u64,
) -> Result<(), ServeError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS_COUNT)
        .build()
        .map_err(io("starting the event loop"))?;
    let served = runtime.block_on(serve_in(listener, dialled, places, started_ns));
    // A blocking thread that hangs in the kernel must not keep the machine.
    runtime.shutdown_background();
    served
}

async fn serve_in(
    listener: Listener,
    dialled: Dialled,
    places: sandbox::Places,
    started_ns: u64,
) -> Result<(), ServeError> {
    let children = reaper::Reaper::listen().map_err(io("listening for SIGCHLD"))?;
    let reaper = Arc::new(reaper::Reaper::default());
    tokio::spawn(Arc::clone(&reaper).run(children));
    let pending = Arc::new(pending::PendingStreams::default());
    let sandbox = Arc::new(sandbox::Sandbox::new(places, reaper, Arc::clone(&pending)));
    let power = Arc::new(power::Power::default());
    let service = server::Service::new(Arc::clone(&sandbox), Arc::clone(&power), started_ns);

    let streams = listener.accept_each(|stream| pending.admit(stream));
    tokio::pin!(streams);
    let (channel, hung_up) = tokio::select! {
        connected = dialled.connected() => RpcStream::new(connected?),
        broken = &mut streams => return broken.map_err(io("accepting streams")),
    };
    let one = futures_util::stream::once(std::future::ready(Ok(channel)));
    let mut server = ttrpc::r#async::Server::new()
        .register_service(capsid_protocol::agent::create_agent(Arc::new(service)))
        .add_listener(ttrpc::r#async::transport::Listener::new(one));
    server.start().await.map_err(ServeError::Rpc)?;

    let mut ended = hung_up.clone();
    tokio::select! {
        _ = ended.wait_for(|ended| *ended) => {}
        () = power.asked(hung_up) => {}
        () = pending.power_off() => {}
        broken = streams => broken.map_err(io("accepting streams"))?,
    }
    power.orderly(&sandbox).await;
    Ok(())
}
