//! `cargo xtask kernel`: the guest kernel, built from Debian's source with our configuration, and kept in the cache.
//!
//! What is built is a function of the fragments, the headers of [`objects`], the source, the compiler and the recipe below, and the cache is keyed by
//! those. A build happens in the entry's temporary directory, so one that dies leaves nothing that looks complete; the
//! environment of the caller does not reach it. Trusts the source it is given.

mod build;
pub mod fragments;
pub mod image;
pub mod manifest;
pub mod objects;
pub mod source;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::cache::{Cache, CacheError, Key};
use crate::command::CommandError;
use crate::progress::Progress;
use build::Tools;
use fragments::{FragmentError, Requests};
use objects::{Headers, ObjectError};
use source::{Source, SourceError};

/// The cache's kind of built kernels.
const KIND: &str = "kernel";
/// The cache's kind of verified configurations.
const KIND_CONFIG: &str = "kernel-config";
/// Where the fragments are in the checkout.
const FRAGMENTS: &str = "guest-kernel/config";
/// The files of an entry.
const VMLINUX: &str = "vmlinux";
const BZIMAGE: &str = "bzImage";
const CONFIG: &str = "config";
const MANIFEST: &str = "manifest.json";

/// What is asked of `cargo xtask kernel`.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// Build from this source directory or tarball instead of Debian's linux-source-6.12
    #[arg(long, value_name = "DIR|TARBALL")]
    source: Option<PathBuf>,
    /// Only verify that the source gives every symbol that guest-kernel/config asks for
    #[arg(long)]
    config_check: bool,
}

/// A kernel in the cache.
#[derive(Debug, Clone)]
pub struct Kernel {
    dir: PathBuf,
}

impl Kernel {
    /// The uncompressed ELF with the PVH entry, stripped, segments on pages: what the VMM boots.
    pub fn vmlinux(&self) -> PathBuf {
        self.dir.join(VMLINUX)
    }

    /// The same kernel, compressed, for other VMMs.
    pub fn bzimage(&self) -> PathBuf {
        self.dir.join(BZIMAGE)
    }

    /// The `.config` it was built with.
    pub fn config(&self) -> PathBuf {
        self.dir.join(CONFIG)
    }

    /// What it was made from, and the hash of each file.
    pub fn manifest(&self) -> PathBuf {
        self.dir.join(MANIFEST)
    }
}

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The fragments are not sound.
    #[error(transparent)]
    Fragments(#[from] FragmentError),
    /// The headers of objects are not there.
    #[error(transparent)]
    Objects(#[from] ObjectError),
    /// There is no source, or no tools.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The cache refused, or the build failed.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A command failed.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The path could not be printed.
    #[error("writing to stdout")]
    Stdout(#[source] std::io::Error),
}

/// Runs the subcommand: prints the path of vmlinux, or of the verified configuration, on stdout.
///
/// # Errors
/// There is no kernel, or the configuration does not hold.
pub fn run(workspace: &Path, options: &Options) -> Result<ExitCode, KernelError> {
    let cache = Cache::open()?;
    let progress = Progress::new(cache.root().join("logs"));
    let source = options.source.as_deref();
    let path = if options.config_check {
        verified_config(&progress, &cache, workspace, source)?
    } else {
        ensure(&progress, &cache, workspace, source)?.vmlinux()
    };
    writeln!(std::io::stdout(), "{}", path.display()).map_err(KernelError::Stdout)?;
    Ok(ExitCode::SUCCESS)
}

/// The kernel of this checkout: from the cache, or built. `source` names another source than Debian's package.
///
/// # Errors
/// It is not in the cache and cannot be built.
pub fn ensure(
    progress: &Progress,
    cache: &Cache,
    workspace: &Path,
    source: Option<&Path>,
) -> Result<Kernel, KernelError> {
    let plan = Plan::make(progress, workspace, source)?;
    let dir = cache.get_or_build(KIND, &plan.key, |dir| {
        Ok(build::kernel(progress, &plan, dir)?)
    })?;
    Ok(Kernel { dir })
}

/// The path of the configuration that the fragments give, every request verified.
///
/// # Errors
/// A request is not met, or the source is not there.
pub fn verified_config(
    progress: &Progress,
    cache: &Cache,
    workspace: &Path,
    source: Option<&Path>,
) -> Result<PathBuf, KernelError> {
    let plan = Plan::make(progress, workspace, source)?;
    let dir = cache.get_or_build(KIND_CONFIG, &plan.key, |dir| {
        Ok(build::config(progress, &plan, dir)?)
    })?;
    progress.say(&format!(
        "{} symbols asked for, each verified",
        plan.requests.len()
    ));
    Ok(dir.join(CONFIG))
}

/// Everything that a build depends on.
struct Plan {
    requests: Requests,
    headers: Headers,
    source: Source,
    tools: Tools,
    key: Key,
}

impl Plan {
    fn make(
        progress: &Progress,
        workspace: &Path,
        source: Option<&Path>,
    ) -> Result<Self, KernelError> {
        let requests = Requests::read(&workspace.join(FRAGMENTS))?;
        let headers = Headers::read(workspace.join(objects::OBJECTS))?;
        let source = Source::find(progress, source)?;
        let tools = Tools::find()?;
        let key = Key::builder()
            .bytes(requests.all_config())
            .bytes(headers.identity())
            .bytes(source.identity())
            .bytes(tools.versions().join("\n"))
            .bytes(build::recipe())
            .finish();
        Ok(Self {
            requests,
            headers,
            source,
            tools,
            key,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_of_a_kernel_are_in_its_directory() {
        let kernel = Kernel { dir: "/k".into() };
        let files = [
            kernel.vmlinux(),
            kernel.bzimage(),
            kernel.config(),
            kernel.manifest(),
        ];
        assert!(
            files
                .iter()
                .all(|file| file.parent() == Some(Path::new("/k")))
        );
        assert_eq!(kernel.vmlinux(), Path::new("/k/vmlinux"));
    }
}
