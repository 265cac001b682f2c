//! Generates the agent service from `proto/agent.proto`: messages, an async server, a blocking client and an async one.
use std::{env, fs, io, path::Path, path::PathBuf};
use ttrpc_codegen::{Codegen, Customize};

fn main() -> io::Result<()> {
    println!("cargo:rerun-if-changed=proto/agent.proto");
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or(io::ErrorKind::NotFound)?);
    let blocking_client = Customize {
        async_server: true,
        ..Default::default()
    };
    generate(&out, blocking_client)?;
    // One run makes one client. The messages of this run are the same ones again.
    let again = out.join("async");
    fs::create_dir_all(&again)?;
    let async_client = Customize {
        async_client: true,
        ..Default::default()
    };
    generate(&again, async_client)?;
    fs::copy(
        again.join("agent_ttrpc.rs"),
        out.join("agent_ttrpc_async.rs"),
    )?;
    // The generated files open with inner attributes, so they must be modules, not includes.
    fs::write(
        out.join("services.rs"),
        "pub mod agent;\npub mod agent_ttrpc;\npub mod agent_ttrpc_async;\n",
    )
}

fn generate(out: &Path, customize: Customize) -> io::Result<()> {
    Codegen::new()
        .out_dir(out)
        .input("proto/agent.proto")
        .include("proto")
        .rust_protobuf()
        .customize(customize)
        .run()
}
