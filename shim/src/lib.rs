//! `containerd-shim-capsid-v2`: containerd's shim for Capsid, one for each pod.

pub mod agent;
pub mod cgroup;
pub mod child;
pub mod config;
pub mod hooks;
pub mod parked;
pub mod polled;
pub mod share;
pub mod sizing;
pub mod spec;
pub mod stdio;
pub mod vm;
