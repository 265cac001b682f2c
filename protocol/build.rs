//! Generates the agent service (messages, async server, blocking client) from `proto/agent.proto`.
use std::{env, fs, io, path::PathBuf};

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=proto/agent.proto");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or(io::ErrorKind::NotFound)?);
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .input("proto/agent.proto")
        .include("proto")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize {
            async_server: true,
            ..Default::default()
        })
        .run()?;
    // The generated files open with inner attributes, so they must be modules, not includes.
    fs::write(
        out.join("services.rs"),
        "pub mod agent;\npub mod agent_ttrpc;\n",
    )
}
