//! The recipe: unpack, configure, verify, compile, strip, check, describe. Whatever is written here is in the cache key.
//!
//! Every command gets an environment of our own: neither `MAKEFLAGS` nor `KCFLAGS` nor a locale of the caller changes the result.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use super::fragments::{Config, FragmentError, Unmet, known_symbols};
use super::image::{self, ImageError};
use super::manifest::{FORMAT, FileEntry, Manifest};
use super::objects::{self, ObjectError};
use super::source::SourceError;
use super::{BZIMAGE, CONFIG, MANIFEST, Plan, VMLINUX};
use crate::command::{self, CommandError};
use crate::progress::{LogError, Progress, Step};

/// The variables of every command, besides `PATH`. The first three make the result the same whoever builds it and when.
const ENVIRONMENT: [(&str, &str); 5] = [
    ("KBUILD_BUILD_TIMESTAMP", "1970-01-01"),
    ("KBUILD_BUILD_USER", "capsid"),
    ("KBUILD_BUILD_HOST", "capsid"),
    ("LC_ALL", "C"),
    ("TZ", "UTC"),
];
const TARGETS: [&str; 2] = ["vmlinux", "bzImage"];
/// Where make leaves the second one.
const BZIMAGE_BUILT: &str = "arch/x86/boot/bzImage";
const STRIP: [&str; 1] = ["--strip-all"];
/// Raised when the code below changes what it makes.
const RECIPE_VERSION: u32 = 1;
/// How often a person hears from a long compilation.
const REPORT_INTERVAL_S: u64 = 20;
/// What make prints for an object made.
const OBJECT_LINES: [&str; 2] = ["  CC ", "  AS "];

/// Why a build failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum BuildError {
    /// A command failed; its text has the tail of the log.
    #[error(transparent)]
    Command(#[from] CommandError),
    /// The log could not be made.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The source could not be unpacked.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The source's Kconfig files could not be read.
    #[error(transparent)]
    Kconfig(#[from] FragmentError),
    /// The configuration does not give what the fragments ask for.
    #[error("{} symbols of guest-kernel/config are not as asked for:{}", .0.len(), listed(.0))]
    Unmet(Vec<Unmet>),
    /// A header of an object had no effect.
    #[error(transparent)]
    Object(#[from] ObjectError),
    /// What was built is no kernel for the VMM.
    #[error("the vmlinux that was built is not fit to be booted")]
    Image(#[from] ImageError),
    /// A file of the build could not be read or written.
    #[error("{doing} {}", path.display())]
    File {
        /// What we were doing.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        cause: std::io::Error,
    },
    /// The manifest could not be written as JSON.
    #[error("writing the manifest")]
    Json(#[from] serde_json::Error),
}

/// The compiler and the linker.
#[derive(Debug, Clone)]
pub(super) struct Tools {
    versions: Vec<String>,
}

impl Tools {
    /// Asks them for their versions, which are part of the result.
    pub(super) fn find() -> Result<Self, CommandError> {
        let versions = ["gcc", "ld"].map(|program| {
            let (_, output) = command::query(clean(program).arg("--version"))?;
            let text = String::from_utf8_lossy(&output);
            Ok::<_, CommandError>(text.lines().next().unwrap_or_default().to_owned())
        });
        Ok(Self {
            versions: versions.into_iter().collect::<Result<_, _>>()?,
        })
    }

    pub(super) fn versions(&self) -> &[String] {
        &self.versions
    }
}

/// What of this file is part of a kernel's identity.
pub(super) fn recipe() -> String {
    format!("{RECIPE_VERSION} {ENVIRONMENT:?} {TARGETS:?} {STRIP:?}")
}

/// Makes and verifies the configuration, and leaves it in `dir`.
pub(super) fn config(progress: &Progress, plan: &Plan, dir: &Path) -> Result<(), BuildError> {
    let tree = Tree::configured(progress, plan, dir)?;
    copy(&tree.output.join(".config"), &dir.join(CONFIG))?;
    tree.remove()
}

/// Builds the kernel, and leaves vmlinux, bzImage, configuration and manifest in `dir`.
pub(super) fn kernel(progress: &Progress, plan: &Plan, dir: &Path) -> Result<(), BuildError> {
    let tree = Tree::configured(progress, plan, dir)?;
    progress.step("guest kernel: compile", |step| {
        let before = cpu_time_of_children();
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        let mut make = dying_with_us(&tree.make());
        make.arg(format!("-j{jobs}"))
            .args(plan.headers.variables())
            .args(TARGETS);
        run_with_reports(progress, step, &mut make)?;
        if let (Some(before), Some(after)) = (before, cpu_time_of_children()) {
            progress.say(&format!(
                "guest kernel: {:.0} CPU-seconds",
                (after - before).as_secs_f64()
            ));
        }
        Ok::<_, BuildError>(())
    })?;
    progress.step("guest kernel: strip and check", |step| {
        let symbols = read(&tree.output.join("System.map"))?;
        objects::check(&String::from_utf8_lossy(&symbols))?;
        let vmlinux = dir.join(VMLINUX);
        let mut strip = clean("strip");
        strip
            .args(STRIP)
            .arg("-o")
            .arg(&vmlinux)
            .arg(tree.output.join("vmlinux"));
        step.run(&mut strip)?;
        image::check(&read(&vmlinux)?)?;
        copy(&tree.output.join(BZIMAGE_BUILT), &dir.join(BZIMAGE))?;
        copy(&tree.output.join(".config"), &dir.join(CONFIG))?;
        describe(plan, &tree, dir)
    })?;
    tree.remove()
}

fn describe(plan: &Plan, tree: &Tree, dir: &Path) -> Result<(), BuildError> {
    let release = read(&tree.output.join("include/config/kernel.release"))?;
    let mut files = std::collections::BTreeMap::new();
    for name in [VMLINUX, BZIMAGE, CONFIG] {
        let path = dir.join(name);
        let entry = FileEntry::of(&path).map_err(file_error("reading", &path))?;
        files.insert(name.to_owned(), entry);
    }
    let manifest = Manifest {
        format: FORMAT,
        key: plan.key.as_str().to_owned(),
        source: plan.source.identity(),
        release: String::from_utf8_lossy(&release).trim().to_owned(),
        tools: plan.tools.versions().to_vec(),
        symbols: plan.requests.len(),
        files,
    };
    let path = dir.join(MANIFEST);
    let json = serde_json::to_string_pretty(&manifest)? + "\n";
    std::fs::write(&path, json).map_err(file_error("writing", &path))
}

/// A configured kernel tree inside a cache entry that is being built.
struct Tree {
    /// Holds the two below where they are ours; removed when the build is done, so that the entry holds results alone.
    work: PathBuf,
    source: PathBuf,
    output: PathBuf,
}

impl Tree {
    fn configured(progress: &Progress, plan: &Plan, dir: &Path) -> Result<Self, BuildError> {
        let work = dir.join("work");
        create_dir(&work)?;
        let output = work.join("output");
        create_dir(&output)?;
        let source = progress.step("guest kernel: source", |step| {
            Ok::<_, BuildError>(plan.source.unpack(step, &work.join("source"))?)
        })?;
        let tree = Self {
            work,
            source,
            output,
        };
        progress.step("guest kernel: configuration", |step| {
            tree.configure(step, plan)
        })?;
        Ok(tree)
    }

    fn configure(&self, step: &Step, plan: &Plan) -> Result<(), BuildError> {
        let requests = self.work.join("requests");
        std::fs::write(&requests, plan.requests.all_config())
            .map_err(file_error("writing", &requests))?;
        step.run(
            self.make()
                .env("KCONFIG_ALLCONFIG", &requests)
                .arg("allnoconfig"),
        )?;
        step.run(self.make().arg("olddefconfig"))?;
        let config = read(&self.output.join(".config"))?;
        let config = Config::parse(&String::from_utf8_lossy(&config));
        let unmet = plan.requests.unmet(&config, &known_symbols(&self.source)?);
        if unmet.is_empty() {
            Ok(())
        } else {
            Err(BuildError::Unmet(unmet))
        }
    }

    fn make(&self) -> Command {
        let mut make = clean("make");
        make.arg("-C").arg(&self.source);
        make.arg(format!("O={}", self.output.display()));
        make
    }

    fn remove(self) -> Result<(), BuildError> {
        std::fs::remove_dir_all(&self.work).map_err(file_error("removing", &self.work))
    }
}

/// The same command in a process namespace of its own: when we are killed, make is killed with us and takes its hundreds of
/// children along. Without it they would go on compiling into a directory that the next build removes. Only root may make
/// one; for others a kill leaves the children of make to end by themselves.
fn dying_with_us(command: &Command) -> Command {
    if !rustix::process::geteuid().is_root() {
        let mut same = clean(&command.get_program().to_string_lossy());
        same.args(command.get_args());
        return same;
    }
    let mut inside = clean("unshare");
    inside.args(["--pid", "--fork", "--kill-child"]);
    inside.arg(command.get_program()).args(command.get_args());
    inside
}

/// A command with our environment and nothing of the caller's but `PATH`.
fn clean(program: &str) -> Command {
    let mut command = Command::new(program);
    command.env_clear().envs(ENVIRONMENT);
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    command
}

/// Runs make; says now and then how far it is.
fn run_with_reports(
    progress: &Progress,
    step: &Step,
    make: &mut Command,
) -> Result<(), CommandError> {
    let (ended, over) = channel::<()>();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let interval = Duration::from_secs(REPORT_INTERVAL_S);
            while over.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                progress.say(&format!(
                    "guest kernel: {} objects",
                    objects(step.log_path())
                ));
            }
        });
        let result = step.run(make);
        drop(ended);
        result
    })
}

/// How many objects a log of make names. A log that cannot be read now is read the next time.
fn objects(log: &Path) -> usize {
    File::open(log).map_or(0, |file| {
        BufReader::new(file)
            .split(b'\n')
            .map_while(Result::ok)
            .filter(|line| {
                OBJECT_LINES
                    .iter()
                    .any(|start| line.starts_with(start.as_bytes()))
            })
            .count()
    })
}

/// The processor time that our children, which have ended, used. None where /proc does not tell.
fn cpu_time_of_children() -> Option<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    children_ticks(&stat).map(|ticks| {
        let ticks_per_second = rustix::param::clock_ticks_per_second().max(1);
        Duration::from_millis(ticks.saturating_mul(1000) / ticks_per_second)
    })
}

/// Fields 16 and 17 of proc_pid_stat(5): user and system time of the children that were waited for.
fn children_ticks(stat: &str) -> Option<u64> {
    // The name, in brackets, may hold anything.
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(13);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    user.checked_add(system)
}

fn listed(unmet: &[Unmet]) -> String {
    unmet.iter().fold(String::new(), |mut text, unmet| {
        // Writing into a String cannot fail.
        let _written = write!(text, "\n    {unmet}");
        text
    })
}

fn read(path: &Path) -> Result<Vec<u8>, BuildError> {
    std::fs::read(path).map_err(file_error("reading", path))
}

fn copy(from: &Path, to: &Path) -> Result<(), BuildError> {
    std::fs::copy(from, to).map_err(file_error("copying", from))?;
    Ok(())
}

fn create_dir(path: &Path) -> Result<(), BuildError> {
    std::fs::create_dir(path).map_err(file_error("creating", path))
}

fn file_error<'a>(
    doing: &'static str,
    path: &'a Path,
) -> impl Fn(std::io::Error) -> BuildError + 'a {
    move |cause| BuildError::File {
        doing,
        path: path.to_owned(),
        cause,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_callers_environment_does_not_reach_a_build() {
        let (_, output) = command::query(&mut clean("env")).expect("env runs");
        let text = String::from_utf8_lossy(&output);
        let mut names: Vec<&str> = text
            .lines()
            .filter_map(|line| line.split('=').next())
            .collect();
        names.sort_unstable();
        let mut wanted: Vec<&str> = ENVIRONMENT
            .iter()
            .map(|(name, _)| *name)
            .chain(["PATH"])
            .collect();
        wanted.sort_unstable();
        assert_eq!(names, wanted);
    }

    #[test]
    fn processor_time_is_read_behind_any_process_name() {
        let stat = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 11 12 300 45 20 0";
        assert_eq!(children_ticks(stat), Some(345));
        assert_eq!(children_ticks("7 (a) S 1 2"), None);
        assert!(cpu_time_of_children().is_some());
    }

    #[test]
    fn objects_are_counted_and_other_lines_are_not() {
        let path = std::env::temp_dir().join(format!("xtask-objects-{}", std::process::id()));
        std::fs::write(
            &path,
            "  CC      a.o\n  HOSTCC  b\n  AS      c.o\nwarning\n",
        )
        .expect("written");
        let count = objects(&path);
        std::fs::remove_file(&path).expect("removed");
        assert_eq!((count, objects(&path)), (2, 0));
    }

    #[test]
    fn every_unmet_request_has_its_line() {
        let requests = super::super::fragments::Requests::parse(&[(
            "a.config".into(),
            "CONFIG_A=y\nCONFIG_B=y\n".into(),
        )])
        .expect("sound");
        let unmet = requests.unmet(&Config::parse(""), &["A".to_owned()].into());
        let text = BuildError::Unmet(unmet).to_string();
        assert!(
            text.starts_with("2 symbols of guest-kernel/config"),
            "{text}"
        );
        assert!(
            text.contains("\n    CONFIG_A=y (a.config line 1): not set"),
            "{text}"
        );
        assert!(
            text.ends_with("\n    CONFIG_B=y (a.config line 2): this kernel has no such symbol"),
            "{text}"
        );
    }
}
