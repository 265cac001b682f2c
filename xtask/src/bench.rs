//! `cargo xtask bench`: figures from the metered testbed, whose clock counts instructions, so that they are the same on
//! every machine.
//!
//! Only ratios inside one run mean anything outside it: an emulated exit costs what its instructions cost, a real one about
//! a microsecond. Exits to userspace are therefore counted beside the times.

pub mod table;

use std::error::Error;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use clap::{Args, Subcommand};
use serde_json::json;

use crate::cache::Cache;
use crate::initramfs;
use crate::programs::{self, Profile, Program};
use crate::progress::Progress;
use crate::testbed::machine::Mode;
use crate::testbed::saved::Context;
use crate::testbed::session::Outputs;
use crate::testbed::{self, Order, PROGRAMS_DIR};

/// `cargo xtask bench`
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// From the start of a VMM to its guest's first byte and to its end, beside QEMU, Firecracker, runc and crun
    Boot(Boot),
}

/// `cargo xtask bench boot`
#[derive(Debug, Args)]
pub struct Boot {
    /// Print JSON lines instead of the table
    #[arg(long)]
    pub json: bool,
    /// A static Firecracker to compare with
    #[arg(long, value_name = "PATH")]
    pub firecracker: Option<PathBuf>,
    /// Counted starts of each system
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub samples: u32,
}

/// Starts the systems and takes their times.
const DRIVER: Program = Program {
    package: "capsid-tests",
    name: "capsid-bench",
};
/// The init that every VMM boots.
const TINY: Program = Program {
    package: "capsid-tests",
    name: "tiny-init",
};
/// The longest output of the driver that is kept, in bytes.
const OUTPUT_MAX_BYTES: usize = 16 << 20;

/// Makes the container runtimes' bundle inside, then becomes the driver.
const SCRIPT: &str = r#"
set -e
bundle=$(mktemp -d)
mkdir "$bundle/rootfs" "$bundle/image"
tar -xf "$CAPSID_TEST_IMAGE" -C "$bundle/image"
tar -xf "$bundle/image/layer.tar" -C "$bundle/rootfs"
cp "$1" "$bundle/config.json"
shift
exec capsid-bench "$@" --bundle "$bundle"
"#;

/// Runs the subcommand.
///
/// # Errors
/// Something could not be set up, or the driver failed.
pub fn run(bench: &Bench, workspace: &Path) -> Result<ExitCode, Box<dyn Error>> {
    match bench {
        Bench::Boot(options) => boot(options, workspace),
    }
}

fn boot(options: &Boot, workspace: &Path) -> Result<ExitCode, Box<dyn Error>> {
    let cache = Cache::open()?;
    let progress = Progress::new(cache.root().join("logs"));
    let context = Context {
        progress: &progress,
        cache: &cache,
        workspace,
    };
    let order = order(&context, options)?;
    progress.say("boot: the systems in turn in the metered testbed; about 20 s of this machine for 1 s of its clock");
    let collected = Collected::default();
    let outputs = Outputs {
        out: Box::new(collected.clone()),
        err: Box::new(io::stderr()),
    };
    let code = testbed::execute_into(&context, order, outputs)?;
    let text = collected.text();
    if options.json {
        print!("{text}");
    } else {
        print!("{}", table::table(&table::parse(&text)?));
    }
    Ok(ExitCode::from(code))
}

/// Everything the driver needs, on the programs drive, and its command line.
fn order(context: &Context<'_>, options: &Boot) -> Result<Order, Box<dyn Error>> {
    let mut artifacts = testbed::prepare(context, Profile::Release, Mode::Metered)?;
    let built = programs::build(
        context.progress,
        context.workspace,
        Profile::Release,
        &[DRIVER, TINY],
    )?;
    let [driver, tiny] = built.as_slice() else {
        return Err("cargo built neither the driver nor tiny-init".into());
    };
    let archive = tiny.with_file_name("tiny-initramfs.cpio");
    initramfs::write(tiny, &archive)?;
    let spec = tiny.with_file_name("bench-config.json");
    std::fs::write(&spec, echo_spec().to_string())?;
    artifacts.add(None, driver.clone(), "bin/capsid-bench");
    artifacts.add(None, archive, "share/tiny.cpio");
    artifacts.add(None, spec, "share/bench-config.json");
    let inside = |path: &str| format!("{PROGRAMS_DIR}/{path}");
    let mut words = vec![
        "sh".to_owned(),
        "-c".to_owned(),
        SCRIPT.to_owned(),
        "bench".to_owned(),
        inside("share/bench-config.json"),
        "--kernel".to_owned(),
        inside("share/vmlinux"),
        "--tiny".to_owned(),
        inside("share/tiny.cpio"),
        "--initramfs".to_owned(),
        inside("share/initramfs.cpio"),
        "--samples".to_owned(),
        options.samples.to_string(),
    ];
    if let Some(path) = &options.firecracker {
        artifacts.add(None, path.canonicalize()?, "bin/firecracker");
        words.extend(["--firecracker".to_owned(), inside("bin/firecracker")]);
    }
    Ok(Order {
        items: artifacts.items(),
        variables: artifacts.variables_inside(),
        words: words.into_iter().map(Into::into).collect(),
        ..Order::new(Mode::Metered)
    })
}

/// What runc and crun run: `echo` with the namespaces of a plain container.
fn echo_spec() -> serde_json::Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {"terminal": false, "user": {"uid": 0, "gid": 0}, "args": ["echo", "hello"],
                    "env": ["PATH=/bin:/usr/bin"], "cwd": "/"},
        "root": {"path": "rootfs", "readonly": true},
        // The bundle lies where device nodes cannot be opened.
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"},
                   {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"}]}
    })
}

/// The driver's standard output, kept.
#[derive(Clone, Default)]
struct Collected(Arc<Mutex<Vec<u8>>>);

impl Write for Collected {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() + bytes.len() > OUTPUT_MAX_BYTES {
            return Err(io::Error::other("the driver printed more than any result"));
        }
        kept.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Collected {
    fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}
