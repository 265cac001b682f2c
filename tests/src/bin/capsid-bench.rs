//! `capsid-bench`: the benchmarks on this host. `cargo xtask bench` runs them in the metered testbed.

use capsid_protocol::machine::Cpus;
use capsid_tests::bench::load::{Device, Load};
use capsid_tests::bench::machine::Vmm;
use capsid_tests::bench::systems::System;
use capsid_tests::bench::{boot, devices, machine, share, systems};
use clap::{Parser, Subcommand};
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

/// Prints JSON lines.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    bench: Bench,
}

#[derive(Subcommand)]
enum Bench {
    /// Starts each system in turn; one line for each of its phases.
    Boot(Boot),
    /// What there is to measure of a device: a load and a system in each line.
    Pairs {
        /// Which.
        device: Device,
    },
    /// Loads one device of one system.
    Device(Loaded),
}

#[derive(clap::Args)]
struct Boot {
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
    /// CPUs that a guest of `capsid-vmm` has, of which one comes up.
    #[arg(long, default_value_t = 1)]
    cpus_max: u64,
    /// Counted starts of each system.
    #[arg(long, default_value_t = 5)]
    samples: usize,
}

#[derive(clap::Args)]
struct Loaded {
    /// Which.
    device: Device,
    /// How.
    load: String,
    /// Whose.
    system: String,
    /// ELF kernel that every VMM boots.
    #[arg(long)]
    kernel: PathBuf,
    /// Initramfs whose /init is load-init.
    #[arg(long)]
    initramfs: PathBuf,
    /// An empty directory, on a disk, for what the guests read.
    #[arg(long)]
    scratch: PathBuf,
    /// Files in the shared tree.
    #[arg(long, default_value_t = 2_000)]
    files: usize,
    /// Counted rounds of each load.
    #[arg(long, default_value_t = 5)]
    samples: usize,
}

fn main() -> ExitCode {
    let done = match Args::parse().bench {
        Bench::Boot(args) => bench_boot(args),
        Bench::Pairs { device } => {
            pairs(device);
            Ok(())
        }
        Bench::Device(args) => bench_device(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("capsid-bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn bench_boot(args: Boot) -> io::Result<()> {
    let files = systems::Files {
        kernel: args.kernel,
        tiny: args.tiny,
        initramfs: args.initramfs,
        bundle: args.bundle,
        scratch: std::env::temp_dir(),
        cpus_max: Cpus::try_from(args.cpus_max).map_err(io::Error::other)?,
    };
    let mut systems = vec![System::Capsid, System::QemuMicrovm];
    systems.extend(args.firecracker.map(System::Firecracker));
    systems.extend([
        System::CapsidOwn,
        System::Runtime("runc"),
        System::Runtime("crun"),
    ]);
    boot::boot(&systems, &files, args.samples, &mut io::stdout())
}

fn pairs(device: Device) {
    for (load, system) in devices::pairs(device) {
        println!("{load} {system}");
    }
}

fn bench_device(args: Loaded) -> io::Result<()> {
    let unknown = || io::Error::other("no such load of this device by this system");
    if !devices::pairs(args.device).any(|pair| pair == (&args.load, &args.system)) {
        return Err(unknown());
    }
    let load = Load::named(&args.load).ok_or_else(unknown)?;
    let vmm = Vmm::named(&args.system).ok_or_else(unknown)?;
    let files = machine::Files {
        kernel: args.kernel,
        initramfs: args.initramfs,
        disk: args.scratch.join("disk"),
        share: args.scratch.join("share"),
    };
    match args.device {
        Device::Blk => share::write_store(&files.disk)?,
        Device::Fs => {
            std::fs::create_dir(&files.share)?;
            share::fill(&files.share, load.work, args.files)?;
        }
        Device::Net | Device::Vsock => {}
    }
    let sizes = (args.samples, args.files);
    let mut out = io::stdout();
    devices::device((args.device, load, vmm), &files, sizes, &mut out)
}
