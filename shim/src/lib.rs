//! `containerd-shim-capsid-v2`: containerd's shim for Capsid, one for each pod.

pub mod parked;
pub mod share;
