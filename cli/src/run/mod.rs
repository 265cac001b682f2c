//! `capsid run`: flags -> image -> mounts -> spec -> machine -> container -> exit code.
//!
//! [`run`] reads as this list. What is wrong with the flags is said before anything is touched; everything made on the
//! way is a guard, so that an error or a signal at any step leaves nothing.

mod phases;
mod session;
mod verdict;

pub(crate) use phases::{Clock, Told};
pub(crate) use session::Event;
pub(crate) use verdict::{Verdict, unreached};

use crate::abort::{Abort, Aborted};
use crate::args::RunArgs;
use crate::host::WITH_SOFTWARE_KVM;
use crate::image::cache::{Cache, CacheError, DEFAULT_DIRECTORY};
use crate::image::tree::{Below, Tree};
use crate::image::{self, ImageError};
use crate::quantity::{self, QuantityError};
use crate::share::{self, Plan, Root, Share, ShareError};
use crate::spec::bundle::{self, Bundle};
use crate::spec::{self, BundleError, SpecError, Wishes};
use crate::terminal;
use crate::users::{Accounts, UserError};
use crate::volume::{self, Volume, VolumeError};
use capsid_owner::end::Ended;
use capsid_owner::files::{FileError, Part};
use capsid_owner::host::{self, KvmError};
use capsid_owner::machine::{self, Parts, StartError};
use capsid_protocol::machine::{Cpus, MemoryMib};
use session::Session;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

/// Why a run failed before its command ran.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RunError {
    /// Not root.
    #[error(
        "capsid run must be run as root: it mounts the container's file system and jails the VMM"
    )]
    NotRoot,
    /// Nothing to run.
    #[error("nothing to run: give one of --image, --rootfs or --bundle")]
    NoSource,
    /// `-it` without a terminal.
    #[error("standard input is not a terminal, which -i with -t needs")]
    NoTerminal,
    /// Numbers.
    #[error(transparent)]
    Quantity(#[from] QuantityError),
    /// Volumes.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The machine's files.
    #[error(transparent)]
    File(#[from] FileError),
    /// The image.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The image cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// Mounts.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// The spec.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The working directory cannot be made.
    #[error("cannot make the working directory {path}")]
    Cwd {
        /// Its path in the container.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The container's accounts.
    #[error(transparent)]
    User(#[from] UserError),
    /// The VMM.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Something of the host.
    #[error("cannot {what}")]
    Host {
        /// What we were doing.
        what: &'static str,
        /// Why not.
        #[source]
        cause: io::Error,
    },
    /// A signal asked to stop.
    #[error(transparent)]
    Aborted(#[from] Aborted),
}

/// The words for a machine that ended before anything ran in it.
pub(crate) fn machine_ended(ended: &Ended) -> String {
    verdict::machine_ended(ended, false)
        .reason
        .unwrap_or_default()
}

/// What the flags say, checked.
struct Checked {
    cpus: Cpus,
    memory: MemoryMib,
    boot_timeout: Duration,
    volumes: Vec<Volume>,
    env: Vec<String>,
    vmm: PathBuf,
    kernel: File,
    initramfs: File,
}

/// Where the container's files come from, read.
enum Source {
    Image(image::Image),
    Directory(PathBuf),
    Bundle(Box<Bundle>),
}

/// Runs the command to its end.
///
/// # Errors
/// What kept the command from running; later ends are verdicts.
pub(crate) fn run(
    args: &RunArgs,
    abort: &Abort,
    events: (mpsc::Sender<Event>, mpsc::Receiver<Event>),
    clock: &Clock,
) -> Result<(Verdict, Told), RunError> {
    let checked = check(args)?;
    let source = read_source(args, abort)?;
    clock.mark("image");
    let mut wishes = wishes(args, &checked)?;
    if let Source::Bundle(bundle) = &source {
        wishes.tty |= bundle.terminal;
    }
    let volumes = all_volumes(&source, &checked.volumes);
    let share = make_share(args, &source, &wishes, &volumes)?;
    clock.mark("mounts");
    let spec = make_spec(&source, &wishes, &volumes, &share)?;
    abort.check()?;
    let parts = Parts {
        id: wishes.id.clone(),
        vmm: checked.vmm,
        kernel: checked.kernel,
        initramfs: checked.initramfs,
        share: Some(share.tree),
        cpus: checked.cpus,
        memory: checked.memory,
        console: args.debug,
        cgroup: None,
    };
    Session::start(parts, checked.boot_timeout, events, clock)?.run(session::Container {
        id: wishes.id,
        hostname: wishes.hostname.unwrap_or_default(),
        spec,
        interactive: args.interactive,
        tty: wishes.tty,
    })
}

/// Checks everything that can be checked without work, the flags first.
fn check(args: &RunArgs) -> Result<Checked, RunError> {
    if args.image.is_none() && args.rootfs.is_none() && args.bundle.is_none() {
        return Err(RunError::NoSource);
    }
    let (memory_total, _) = host::memory();
    let cpus = quantity::cpus(&args.cpus)?;
    let memory = quantity::memory(&args.memory, memory_total)?;
    let boot_timeout = quantity::boot_timeout(&args.machine.boot_timeout)?;
    let volumes = volume::parse_all(&args.volume)?;
    let env = spec::environment(&args.env, |name| std::env::var(name).ok())?;
    if args.interactive && args.tty && !terminal::is_stdin() {
        return Err(RunError::NoTerminal);
    }
    if !rustix::process::geteuid().is_root() {
        return Err(RunError::NotRoot);
    }
    host::usable_kvm(args.machine.allow_software_kvm, WITH_SOFTWARE_KVM)?;
    let vmm = args.machine.find(Part::Vmm)?;
    machine::is_executable(&vmm)?;
    let kernel = Part::Kernel.open(&args.machine.find(Part::Kernel)?)?;
    let initramfs = Part::Initramfs.open(&args.machine.find(Part::Initramfs)?)?;
    Ok(Checked {
        cpus,
        memory,
        boot_timeout,
        volumes,
        env,
        vmm,
        kernel,
        initramfs,
    })
}

fn read_source(args: &RunArgs, abort: &Abort) -> Result<Source, RunError> {
    if let Some(path) = &args.image {
        let directory = std::env::var_os("CAPSID_CACHE").filter(|path| !path.is_empty());
        let directory = directory.map_or_else(|| PathBuf::from(DEFAULT_DIRECTORY), PathBuf::from);
        let image = image::open(path, &Cache::open(&directory)?, abort)?;
        if image.dropped_xattrs > 0 {
            eprintln!(
                "capsid: {} extended attributes of the image were not kept",
                image.dropped_xattrs
            );
        }
        return Ok(Source::Image(image));
    }
    if let Some(directory) = &args.bundle {
        return Ok(Source::Bundle(Box::new(bundle::read(directory)?)));
    }
    let directory = args.rootfs.clone().ok_or(RunError::NoSource)?;
    Ok(Source::Directory(directory))
}

fn wishes(args: &RunArgs, checked: &Checked) -> Result<Wishes, RunError> {
    let id = new_id()?;
    let hostname = match &args.bundle {
        // A bundle has its own; a flag wins over it.
        Some(_) => args.hostname.clone(),
        None => Some(spec::hostname(args.hostname.as_deref(), &id)?),
    };
    Ok(Wishes {
        command: args.command.clone(),
        env: checked.env.clone(),
        cwd: args.workdir.clone(),
        user: args.user.clone(),
        tty: args.tty,
        console_size: terminal::size(),
        hostname,
        read_only: args.read_only,
        id,
    })
}

/// 12 random hex digits, as docker shows ids.
fn new_id() -> Result<String, RunError> {
    let mut bytes = [0u8; 6];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).map_err(
        |error| RunError::Host {
            what: "get random bytes",
            cause: error.into(),
        },
    )?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn all_volumes(source: &Source, flags: &[Volume]) -> Vec<Volume> {
    let mut volumes = match source {
        Source::Bundle(bundle) => bundle.volumes.clone(),
        Source::Image(_) | Source::Directory(_) => Vec::new(),
    };
    volumes.extend(flags.iter().cloned());
    volumes
}

fn make_share(
    args: &RunArgs,
    source: &Source,
    wishes: &Wishes,
    volumes: &[Volume],
) -> Result<Share, RunError> {
    let directory = |path: &Path, read_only| Root::Directory {
        path: path.to_owned(),
        read_only,
    };
    let root = match source {
        Source::Image(image) => Root::Layers(image.layers.clone()),
        Source::Directory(path) => directory(path, args.read_only),
        Source::Bundle(bundle) => {
            let own = spec::is_read_only(bundle.spec.root().as_ref());
            directory(&bundle.root, own || args.read_only)
        }
    };
    let hostname = wishes.hostname.as_deref().unwrap_or("localhost");
    let files = spec::ETC_FILES.map(|name| (name, spec::etc_file(name, hostname)));
    Ok(share::make(&Plan {
        id: wishes.id.clone(),
        root,
        volumes: volumes.to_vec(),
        files: files.to_vec(),
        host_memory_bytes: host::memory().0,
    })?)
}

fn make_spec(
    source: &Source,
    wishes: &Wishes,
    volumes: &[Volume],
    share: &Share,
) -> Result<Vec<u8>, RunError> {
    let rootfs = share.rootfs().map_err(|cause| RunError::Host {
        what: "look into the root file system",
        cause,
    })?;
    let accounts = Accounts::read(&rootfs)?;
    let plain = image::ImageConfig::default();
    let spec = match source {
        Source::Image(image) => spec::of_image(&image.config, wishes, volumes, &accounts)?,
        Source::Directory(_) => spec::of_image(&plain, wishes, volumes, &accounts)?,
        Source::Bundle(bundle) => spec::of_bundle(bundle, wishes, volumes, &accounts)?,
    };
    let cwd = spec.process().as_ref().map(|process| process.cwd().clone());
    make_cwd(&rootfs, &cwd.unwrap_or_default())?;
    Ok(spec::to_json(&spec)?)
}

/// Makes a working directory that is missing, as docker does before it starts a container.
fn make_cwd(rootfs: &Tree, cwd: &Path) -> Result<(), RunError> {
    let below = Below::new(cwd.as_os_str().as_encoded_bytes()).map_err(io::Error::other);
    below
        .and_then(|below| rootfs.directory(&below))
        .map(drop)
        .map_err(|cause| RunError::Cwd {
            path: cwd.to_owned(),
            cause,
        })
}
