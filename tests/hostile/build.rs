//! How the guest is linked: without anything of the host's, at the addresses of `link.ld`.
//!
//! Only in the release profile, whose panics abort: in the others the program is one of the host (`src/main.rs`).

use std::path::Path;

fn main() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("link.ld");
    println!("cargo::rerun-if-changed={}", script.display());
    if std::env::var("PROFILE").as_deref() != Ok("release") {
        return;
    }
    let flags = ["-nostartfiles", "-nostdlib", "-static", "-no-pie"];
    for flag in flags {
        println!("cargo::rustc-link-arg-bins={flag}");
    }
    println!("cargo::rustc-link-arg-bins=-Wl,-T,{}", script.display());
    println!("cargo::rustc-link-arg-bins=-Wl,--build-id=none,-z,noexecstack");
    // `core` was built for programs that unwind, and names what they would do it with.
    println!("cargo::rustc-link-arg-bins=-Wl,--defsym=rust_eh_personality=0");
}
