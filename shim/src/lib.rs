//! `containerd-shim-capsid-v2`: containerd's shim for Capsid, one for each pod.

pub mod agent;
pub mod child;
pub mod parked;
pub mod polled;
pub mod share;
pub mod stdio;
pub mod vm;
