//! The action `delete`: what is left of a container whose server is gone. There is nothing to undo yet.

use containerd_shim_protos::api::DeleteResponse;
use std::convert::Infallible;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// Ended by SIGKILL, as a task is whose VM died with its shim.
const KILLED: u32 = 128 + 9;

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

/// Undoes what is left.
///
/// # Errors
/// None yet.
pub fn delete(_deleting: &Deleting) -> Result<DeleteResponse, Infallible> {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let mut response = DeleteResponse::new();
    response.set_exit_status(KILLED);
    let exited_at = response.mut_exited_at();
    exited_at.seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
    Ok(response)
}
