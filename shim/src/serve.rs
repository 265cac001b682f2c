//! The server of a pod. It answers no call yet.

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;

/// What a server starts with.
#[derive(Debug)]
pub struct Serving {
    /// The first container's id.
    pub id: String,
    /// containerd's namespace.
    pub namespace: String,
    /// The first container's bundle.
    pub bundle: PathBuf,
    /// The pod's socket; its file is ours to remove at the end.
    pub socket: UnixListener,
    /// The socket's path.
    pub socket_path: PathBuf,
    /// Where events go, if anywhere.
    pub ttrpc_address: Option<String>,
    /// The runtime's options.
    pub options: Option<Any>,
    /// Log more.
    pub debug: bool,
}

/// Serves until the socket fails.
pub fn serve(serving: Serving) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "no event loop");
            return ExitCode::FAILURE;
        }
    };
    let listening = async {
        serving.socket.set_nonblocking(true)?;
        let listener = tokio::net::UnixListener::from_std(serving.socket)?;
        let mut server = ttrpc::r#async::Server::new().add_listener(listener.into());
        server.start().await.map_err(std::io::Error::other)?;
        std::future::pending::<std::io::Result<()>>().await
    };
    if let Err(error) = runtime.block_on(listening) {
        tracing::error!(%error, "cannot serve");
    }
    ExitCode::FAILURE
}
