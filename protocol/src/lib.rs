//! What two Capsid processes must agree on, and nothing else: types and their parsers, no I/O.
//!
//! - [`machine`]: the configuration that an owner hands to a VMM.
//! - [`control`]: what an owner asks of a VMM while it runs.
//! - [`vsock`]: ports, the owner channel, the header of a stream.
//! - [`exec_error`]: how the agent says that a program could not be executed (127, 126).
//! - [`exit`]: the exit codes of a VMM.
//! - [`report`]: what a VMM says of its run when it ends.
//! - [`agent`]: the guest agent's ttrpc service, generated from `proto/agent.proto`.

pub mod control;
pub mod exec_error;
pub mod exit;
pub mod machine;
pub mod report;
pub mod vsock;

/// The guest agent's service, generated from `proto/agent.proto` at build time.
pub mod agent {
    pub use generated::{agent::*, agent_ttrpc::*};

    /// The client for an event loop.
    pub mod r#async {
        pub use super::generated::agent_ttrpc_async::AgentClient;
    }

    #[allow(
        missing_docs,
        unreachable_pub,
        unused_mut,
        rust_2018_idioms,
        unsafe_code,
        clippy::all,
        clippy::pedantic,
        clippy::restriction
    )]
    mod generated {
        include!(concat!(env!("OUT_DIR"), "/services.rs"));
    }
}
