//! `cargo xtask bench`: figures from the metered testbed, whose clock counts instructions, so that they are the same on
//! every machine.
//!
//! Only ratios inside one run mean anything outside it: an emulated exit costs what its instructions cost, a real one about
//! a microsecond. Exits to userspace are therefore counted beside the times.

pub mod boot;
pub mod loads;
pub mod table;

use std::error::Error;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::json;
use table::NoResult;

use crate::artifacts::Artifacts;
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
    /// A disk: random and sequential accesses, beside QEMU
    Blk(Device),
    /// A network card: ping, and TCP both ways, beside QEMU with its own device and with the host kernel's
    Net(Device),
    /// Streams between guest and host: ping-pong, and both ways, beside QEMU, whose device is the host kernel's
    Vsock(Device),
    /// A shared directory: reading, unpacking, finding, beside QEMU with virtiofsd
    Fs(Share),
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
    /// CPUs that a guest of capsid-vmm has, of which one comes up
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=32))]
    pub cpus_max: u32,
    /// Counted starts of each system
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub samples: u32,
}

/// `cargo xtask bench blk`, and those like it
#[derive(Debug, Args)]
pub struct Device {
    /// Print JSON lines instead of the table
    #[arg(long)]
    pub json: bool,
    /// This load alone
    #[arg(long, value_name = "NAME")]
    pub load: Option<String>,
    /// This system alone
    #[arg(long, value_name = "NAME")]
    pub system: Option<String>,
    /// Counted rounds of each load
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub samples: u32,
}

/// `cargo xtask bench fs`
#[derive(Debug, Args)]
pub struct Share {
    /// What every device takes.
    #[command(flatten)]
    pub device: Device,
    /// Files in the tree that is searched
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub files: u32,
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
/// The init that does what the loads of devices are.
const LOADER: Program = Program {
    package: "capsid-tests",
    name: "load-init",
};
/// The initramfs of either.
const INIT_ARCHIVE: &str = "share/bench.cpio";
/// How long one load by one system may take of this machine's time: many times what it takes of an idle one's.
const LOAD_LIMIT: Duration = Duration::from_secs(600);
/// How often a load that failed or stood still is begun.
const ATTEMPTS: u32 = 3;
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
exec capsid-bench boot "$@" --bundle "$bundle"
"#;

/// Becomes the driver, first in line for the processor, so that it sees each mark when it is made; what it starts is nothing special.
///
/// What a VMM reads from disk is read before, beside somebody who wants the processor: while that has nothing to do, the clock runs
/// ahead of the emulated disk, and the emulator goes through each of its ticks.
const DEVICE_SCRIPT: &str = r#"
set -e
chrt --idle 0 sh -c 'while :; do :; done' &
modprobe -a vhost_net vhost_vsock tun
programs="$(command -v capsid-vmm capsid-bench qemu-system-x86_64 ip) /usr/libexec/virtiofsd"
cat $programs $(ldd $programs | grep -o '/[^ ]*[^: ]') /usr/share/qemu/qboot.rom /capsid/share/* > /dev/null
kill $!
# What is written stays in the page cache: how long an emulated disk takes is this machine's business.
echo 0 > /proc/sys/vm/dirty_writeback_centisecs
scratch=$(mktemp -d -p /var/tmp)
exec chrt --reset-on-fork --fifo 1 capsid-bench device "$@" --scratch "$scratch"
"#;

/// Runs the subcommand.
///
/// # Errors
/// Something could not be set up, or the driver failed.
pub fn run(bench: &Bench, workspace: &Path) -> Result<ExitCode, Box<dyn Error>> {
    let cache = Cache::open()?;
    let progress = Progress::new(cache.root().join("logs"));
    let context = Context {
        progress: &progress,
        cache: &cache,
        workspace,
    };
    match bench {
        Bench::Boot(options) => {
            let order = boot_order(&context, options)?;
            let (code, text) = driven(&context, order, "the systems in turn")?;
            show(&text, options.json, |text| {
                Ok(boot::table(&boot::parse(text)?))
            })?;
            Ok(ExitCode::from(code))
        }
        Bench::Blk(options) => device(&context, "blk", options, None),
        Bench::Net(options) => device(&context, "net", options, None),
        Bench::Vsock(options) => device(&context, "vsock", options, None),
        Bench::Fs(options) => device(&context, "fs", &options.device, Some(options.files)),
    }
}

/// Each load by each system in a testbed of its own: now and then one stands still for good.
fn device(
    context: &Context<'_>,
    name: &str,
    options: &Device,
    files: Option<u32>,
) -> Result<ExitCode, Box<dyn Error>> {
    let mut artifacts = testbed::prepare(context, Profile::Release, Mode::Metered)?;
    let built = add_driver(context, &mut artifacts, LOADER)?;
    let is =
        |wanted: &Option<String>, name: &str| wanted.as_ref().is_none_or(|wanted| wanted == name);
    let mut pairs = pairs(&built.driver, name)?;
    pairs.retain(|(load, system)| is(&options.load, load) && is(&options.system, system));
    if pairs.is_empty() {
        return Err(format!("{name} has no such load and system").into());
    }
    let (mut results, mut left_out) = (String::new(), Vec::new());
    for (load, system) in pairs {
        let what = format!("{load}: {system}");
        let order = || device_order(&artifacts, [name, &load, &system], options, files);
        match measured(context, order, &what)? {
            Some(text) => results.push_str(&text),
            None => left_out.push(what),
        }
    }
    show(&results, options.json, |text| {
        Ok(loads::table(&loads::parse(text)?))
    })?;
    for what in &left_out {
        eprintln!("{what} is left out");
    }
    Ok(ExitCode::from(u8::from(!left_out.is_empty())))
}

/// What the driver printed, unless it failed or stood still each time.
fn measured(
    context: &Context<'_>,
    order: impl Fn() -> Order,
    what: &str,
) -> Result<Option<String>, Box<dyn Error>> {
    for attempt in 1..=ATTEMPTS {
        let (code, text) = driven(context, order(), what)?;
        if code == 0 {
            return Ok(Some(text));
        }
        eprintln!(
            "{what}: failed with code {code} (124: not done in {LOAD_LIMIT:?}), attempt {attempt} of {ATTEMPTS}"
        );
    }
    Ok(None)
}

/// The driver's own list of what there is to measure: loads and systems.
fn pairs(driver: &Path, device: &str) -> Result<Vec<(String, String)>, Box<dyn Error>> {
    let said = Command::new(driver).args(["pairs", device]).output()?;
    if !said.status.success() {
        return Err(format!("the driver knows nothing of {device}: {}", said.status).into());
    }
    let said = String::from_utf8(said.stdout)?;
    let pairs = said.lines().filter_map(|line| line.split_once(' '));
    Ok(pairs
        .map(|(load, system)| (load.to_owned(), system.to_owned()))
        .collect())
}

/// Runs the driver; what it said is its results.
fn driven(context: &Context<'_>, order: Order, what: &str) -> Result<(u8, String), Box<dyn Error>> {
    context.progress.say(&format!(
        "{what}: in the metered testbed; about 20 s of this machine for 1 s of its clock"
    ));
    let collected = Collected::default();
    let outputs = Outputs {
        out: Box::new(collected.clone()),
        err: Box::new(io::stderr()),
    };
    let code = testbed::execute_into(context, order, outputs)?;
    Ok((code, collected.text()))
}

fn show(
    text: &str,
    json: bool,
    table: impl Fn(&str) -> Result<String, NoResult>,
) -> Result<(), NoResult> {
    match json {
        true => print!("{text}"),
        false => print!("{}", table(text)?),
    }
    Ok(())
}

/// Everything the driver of the boot benchmark needs, on the programs drive, and its command line.
fn boot_order(context: &Context<'_>, options: &Boot) -> Result<Order, Box<dyn Error>> {
    let mut artifacts = testbed::prepare(context, Profile::Release, Mode::Metered)?;
    let built = add_driver(context, &mut artifacts, TINY)?;
    let spec = built.init.with_file_name("bench-config.json");
    std::fs::write(&spec, echo_spec().to_string())?;
    artifacts.add(None, spec, "share/bench-config.json");
    let mut words = script(SCRIPT);
    words.extend([
        inside("share/bench-config.json"),
        "--kernel".to_owned(),
        inside("share/vmlinux"),
        "--tiny".to_owned(),
        inside(INIT_ARCHIVE),
        "--initramfs".to_owned(),
        inside("share/initramfs.cpio"),
        "--cpus-max".to_owned(),
        options.cpus_max.to_string(),
        "--samples".to_owned(),
        options.samples.to_string(),
    ]);
    if let Some(path) = &options.firecracker {
        artifacts.add(None, path.canonicalize()?, "bin/firecracker");
        words.extend(["--firecracker".to_owned(), inside("bin/firecracker")]);
    }
    Ok(order(&artifacts, words))
}

/// The same for one load of a device by one system.
fn device_order(
    artifacts: &Artifacts,
    what: [&str; 3],
    options: &Device,
    files: Option<u32>,
) -> Order {
    let mut words = script(DEVICE_SCRIPT);
    words.extend(what.map(str::to_owned));
    words.extend([
        "--kernel".to_owned(),
        inside("share/vmlinux"),
        "--initramfs".to_owned(),
        inside(INIT_ARCHIVE),
        "--samples".to_owned(),
        options.samples.to_string(),
    ]);
    if let Some(files) = files {
        words.extend(["--files".to_owned(), files.to_string()]);
    }
    Order {
        limit: Some(LOAD_LIMIT),
        ..order(artifacts, words)
    }
}

fn script(text: &str) -> Vec<String> {
    ["sh", "-c", text, "bench"].map(str::to_owned).into()
}

fn inside(path: &str) -> String {
    format!("{PROGRAMS_DIR}/{path}")
}

fn order(artifacts: &Artifacts, words: Vec<String>) -> Order {
    Order {
        items: artifacts.items(),
        variables: artifacts.variables_inside(),
        words: words.into_iter().map(Into::into).collect(),
        ..Order::new(Mode::Metered)
    }
}

/// Where cargo put them.
struct Built {
    driver: PathBuf,
    init: PathBuf,
}

/// Builds the driver and an init, of which an archive is made.
fn add_driver(
    context: &Context<'_>,
    artifacts: &mut Artifacts,
    init: Program,
) -> Result<Built, Box<dyn Error>> {
    let (progress, profile) = (context.progress, Profile::Release);
    let built = programs::build(progress, context.workspace, profile, &[DRIVER, init])?;
    let Ok([driver, init]) = <[PathBuf; 2]>::try_from(built) else {
        return Err("cargo built neither the driver nor the init".into());
    };
    let archive = init.with_extension("cpio");
    initramfs::write(&init, &archive)?;
    artifacts.add(None, driver.clone(), "bin/capsid-bench");
    artifacts.add(None, archive, INIT_ARCHIVE);
    Ok(Built { driver, init })
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
