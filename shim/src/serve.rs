//! The server: one for each pod, from the socket it was started with until containerd wants it to end and no container is left.
//!
//! It trusts containerd, whose socket is root's alone, and nothing that comes from the guest. It never ends by itself while it has a container:
//! containerd would take that for the container's end.

use crate::config::{Config, Options};
use crate::error::chain;
use crate::events::Publisher;
use crate::pod::Pod;
use crate::record::Record;
use crate::service::Service;
use async_trait::async_trait;
use containerd_shim_protos::shim_async::create_task;
use protobuf::well_known_types::any::Any;
use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use ttrpc::r#async::transport::Listener;
use ttrpc::r#async::{MethodHandler, Service as TtrpcService, TtrpcContext};

/// How long the last events may take to reach containerd, in ms.
const FLUSH_MS: u64 = 3_000;
/// Most threads for work that blocks. Mounts and forks are short; a file on a disk that hangs takes one for each output that goes there.
const BLOCKING_THREADS_MAX: usize = 64;
/// How the service is called since containerd 2.0, and before.
const TASK_V3: &str = "containerd.task.v3.Task";
const TASK_V2: &str = "containerd.task.v2.Task";
/// The service that is not there yet, and its calls (containerd `api/runtime/sandbox/v1/sandbox.proto`).
const SANDBOX: &str = "containerd.runtime.sandbox.v1.Sandbox";
const SANDBOX_CALLS: [&str; 9] = [
    "CreateSandbox",
    "StartSandbox",
    "Platform",
    "StopSandbox",
    "WaitSandbox",
    "SandboxStatus",
    "PingSandbox",
    "ShutdownSandbox",
    "SandboxMetrics",
];

/// What a server is started with.
#[derive(Debug)]
pub struct Serving {
    /// The group's id: the sandbox's, or the container's.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The bundle of the first container.
    pub bundle: PathBuf,
    /// Where containerd connects.
    pub socket: UnixListener,
    /// Its path, to be removed at the end.
    pub socket_path: PathBuf,
    /// Where events go; none: nowhere.
    pub ttrpc_address: Option<String>,
    /// The runtime's options.
    pub options: Option<Any>,
}

/// Why a server cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A step of ours.
    #[error("{what}")]
    Io {
        /// Which.
        what: &'static str,
        /// errno.
        #[source]
        cause: io::Error,
    },
    /// The server.
    #[error("serving containerd's calls")]
    Rpc(#[source] ttrpc::Error),
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> ServeError {
    move |cause| ServeError::Io { what, cause }
}

/// Serves until the end.
pub fn serve(serving: Serving) -> ExitCode {
    let served = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS_MAX)
        .build()
        .map_err(io_error("starting the event loop"))
        .and_then(|runtime| {
            let served = runtime.block_on(serve_in(serving));
            // Work that hangs in the kernel must not keep the process.
            runtime.shutdown_background();
            served
        });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = chain(&error), "the shim ends");
            ExitCode::FAILURE
        }
    }
}

async fn serve_in(serving: Serving) -> Result<(), ServeError> {
    let config = config(serving.options.as_ref());
    let record = Record::of_this_process(&serving.id, &serving.socket_path);
    record
        .write(&serving.bundle)
        .map_err(io_error("writing what `delete` needs into the bundle"))?;
    let events = Publisher::start(&serving.namespace, serving.ttrpc_address.clone());
    let pod = Arc::new(Pod::new(
        (serving.id, serving.namespace),
        (serving.bundle, record),
        config,
        events.clone(),
    ));
    serving
        .socket
        .set_nonblocking(true)
        .map_err(io_error("listening"))?;
    let listener = tokio::net::UnixListener::from_std(serving.socket);
    let listener = listener.map_err(io_error("listening"))?;
    let service = Service::new(Arc::clone(&pod));
    let mut server = ttrpc::r#async::Server::new()
        .register_service(tasks(service))
        .register_service(no_sandboxes())
        .add_listener(Listener::from(listener));
    server.start().await.map_err(ServeError::Rpc)?;
    let mut term = signal(SignalKind::terminate()).map_err(io_error("listening for SIGTERM"))?;
    let mut interrupt =
        signal(SignalKind::interrupt()).map_err(io_error("listening for SIGINT"))?;
    loop {
        tokio::select! {
            () = pod.over() => break,
            _ = term.recv() => {}
            _ = interrupt.recv() => {}
        }
        // Somebody wants the pod to end: containerd is told how, and ends this process when it has cleaned up.
        if !pod.end_if_unwanted() {
            tracing::warn!("told to end: the VM is stopped");
            let pod = Arc::clone(&pod);
            tokio::spawn(async move { pod.stop().await });
        }
    }
    pod.ends();
    // From here on a new `start` makes a server of its own, and this one has nothing that it creates.
    match std::fs::remove_file(&serving.socket_path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%cause, "removing the socket");
        }
        _ => {}
    }
    pod.end_vm().await;
    pod.closed().await;
    if !events.flushed(Duration::from_millis(FLUSH_MS)).await {
        tracing::warn!("containerd has not taken the last events");
    }
    server.disconnect().await;
    Ok(())
}

/// The configuration, or the sentence that every Create is refused with: containerd shows that to people, and this process's end to nobody.
fn config(options: Option<&Any>) -> Result<Config, String> {
    let options = Options::decode(options).map_err(|error| chain(&error))?;
    Config::load(&options).map_err(|error| chain(&error))
}

/// The service under both of its names: what travels is the same.
fn tasks(service: Service) -> HashMap<String, TtrpcService> {
    let mut services = create_task(Arc::new(service.clone()));
    let mut again = create_task(Arc::new(service));
    if let Some(v2) = again.remove(TASK_V3) {
        services.insert(TASK_V2.to_owned(), v2);
    }
    services
}

/// An unknown service would be answered with INVALID_ARGUMENT and no reason.
struct NoSandboxes;

#[async_trait]
impl MethodHandler for NoSandboxes {
    async fn handler(
        &self,
        _: TtrpcContext,
        request: ttrpc::Request,
    ) -> ttrpc::Result<ttrpc::Response> {
        let text = format!(
            "{}: Capsid has no Sandbox service yet; leave the runtime's sandboxer at containerd's default, \"podsandbox\"",
            request.method
        );
        Err(ttrpc::error::get_rpc_status(
            ttrpc::Code::UNIMPLEMENTED,
            text,
        ))
    }
}

fn no_sandboxes() -> HashMap<String, TtrpcService> {
    let methods = SANDBOX_CALLS.iter().map(|call| {
        let handler: Box<dyn MethodHandler + Send + Sync> = Box::new(NoSandboxes);
        ((*call).to_owned(), handler)
    });
    let service = TtrpcService {
        methods: methods.collect(),
        streams: HashMap::new(),
    };
    HashMap::from([(SANDBOX.to_owned(), service)])
}
