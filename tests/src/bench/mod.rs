//! The boot benchmark, as it runs on the host under test: each system started in turn, its times taken by
//! this process, one JSON line for each phase.

pub mod boot;
pub mod launch;
pub mod systems;
pub mod trace;
