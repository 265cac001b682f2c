//! The benchmarks as they run on the host under test: each system started in turn, its times taken by this process, JSON lines.

pub mod boot;
pub mod devices;
pub mod inside;
pub mod launch;
pub mod load;
pub mod machine;
pub mod peer;
pub mod share;
pub mod systems;
pub mod trace;
