//! `containerd-shim-capsid-v2`. See the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    capsid_shim::main()
}
