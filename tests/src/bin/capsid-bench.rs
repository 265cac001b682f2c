//! `capsid-bench boot`: the boot benchmark on this host. `cargo xtask bench boot` runs it in the metered testbed.

use capsid_tests::bench::boot::boot;
use capsid_tests::bench::systems::{Files, System};
use clap::Parser;
use std::path::PathBuf;
use std::process::ExitCode;

/// Starts each system in turn and prints one JSON line for each of its phases.
#[derive(Parser)]
struct Args {
    /// ELF kernel that every VMM boots.
    #[arg(long)]
    kernel: PathBuf,
    /// Initramfs whose /init is tiny-init.
    #[arg(long)]
    tiny: PathBuf,
    /// The shipped initramfs.
    #[arg(long)]
    initramfs: PathBuf,
    /// An OCI bundle that runs `echo`.
    #[arg(long)]
    bundle: PathBuf,
    /// Firecracker, if it is to be compared.
    #[arg(long)]
    firecracker: Option<PathBuf>,
    /// Counted starts of each system.
    #[arg(long, default_value_t = 5)]
    samples: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let files = Files {
        kernel: args.kernel,
        tiny: args.tiny,
        initramfs: args.initramfs,
        bundle: args.bundle,
        scratch: std::env::temp_dir(),
    };
    let mut systems = vec![System::Capsid, System::QemuMicrovm];
    systems.extend(args.firecracker.map(System::Firecracker));
    systems.extend([
        System::CapsidOwn,
        System::Runtime("runc"),
        System::Runtime("crun"),
    ]);
    match boot(&systems, &files, args.samples, &mut std::io::stdout()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("capsid-bench: cannot write the results: {error}");
            ExitCode::FAILURE
        }
    }
}
