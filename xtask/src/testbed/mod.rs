//! `cargo xtask testbed`: a command as root in an emulated Debian host with a real KVM, where this machine has none.
//!
//! Each run resumes the saved machine (`saved`) in a QEMU of its own (`machine`), with the programs under test on a drive made
//! for it (`drive`), and carries one command's streams (`session`). It changes nothing that the next run sees.

pub mod drive;
pub mod emulator;
pub mod machine;
pub mod qmp;
pub mod saved;
pub mod session;
pub mod terminal;

/// The one description of what crosses the door; the door itself is built from the same file.
#[path = "../../../tests/door/src/frame.rs"]
pub(crate) mod frame;

use std::error::Error;
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};

use crate::artifacts::{self, Artifacts};
use crate::cache::Cache;
use crate::interrupt;
use crate::programs::Profile;
use crate::progress::Progress;
use drive::Item;
use frame::Run;
use machine::{Machine, Mode, Start};
use saved::{Context, ensure_saved};
use session::Outputs;

/// After so much silence a machine may be asleep for ever (see `session`).
const NUDGE_INTERVAL: Duration = Duration::from_secs(1);
/// Where the programs' drive is mounted inside; its `bin` is on the search path.
pub const PROGRAMS_DIR: &str = "/capsid";

/// `cargo xtask testbed`
#[derive(Debug, Subcommand)]
pub enum Testbed {
    /// Run a command as root in the testbed; its streams, signals and exit code are yours
    ///
    /// Every run starts from the same saved state and leaves no trace. The command finds Debian's containerd, runc, crun, CNI
    /// plugins and a real /dev/kvm. A pipe is a pipe: `tar c . | cargo xtask testbed exec -- tar t` works.
    Exec(Exec),
    /// A shell in the testbed
    Shell(Machinery),
}

/// What every way into the testbed takes.
#[derive(Debug, Args)]
pub struct Machinery {
    /// Count one nanosecond for each instruction on one processor: slow, and the same figures on every machine
    #[arg(long)]
    pub metered: bool,
    /// Leave our programs, guest kernel and test image out: nothing is built, and nothing is on the path
    #[arg(long)]
    pub bare: bool,
    /// Build the programs without optimization, which is quicker; slower inside
    #[arg(long, conflicts_with = "bare")]
    pub dev: bool,
    /// Put a file or directory of this machine into the testbed first; may be given several times
    #[arg(long = "copy", value_name = "SRC:DST", value_parser = parse_copy)]
    pub copies: Vec<Copy>,
}

/// `cargo xtask testbed exec`
#[derive(Debug, Args)]
pub struct Exec {
    /// The machine.
    #[command(flatten)]
    pub machinery: Machinery,
    /// Kill the testbed after so many seconds, and exit with 124
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// Run the command on a terminal
    #[arg(long)]
    pub tty: bool,
    /// The command
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

/// `SRC:DST`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Copy {
    from: PathBuf,
    to: PathBuf,
}

/// One command for the testbed.
#[derive(Debug)]
pub struct Order {
    /// How time passes.
    pub mode: Mode,
    /// What goes on the drive, mounted at /capsid.
    pub items: Vec<Item>,
    /// What is copied from there before the command starts.
    pub copies: Vec<(PathBuf, PathBuf)>,
    /// Set for the command.
    pub variables: Vec<(&'static str, PathBuf)>,
    /// The command.
    pub words: Vec<OsString>,
    /// On a terminal of ours.
    pub tty: bool,
    /// When to give up.
    pub limit: Option<Duration>,
}

/// Runs the subcommand.
///
/// # Errors
/// The testbed could not be made or went down.
pub fn run(testbed: &Testbed, workspace: &Path) -> Result<ExitCode, Box<dyn Error>> {
    let cache = Cache::open()?;
    let progress = Progress::quiet(cache.root().join("logs"));
    let context = Context {
        progress: &progress,
        cache: &cache,
        workspace,
    };
    let code = match testbed {
        Testbed::Exec(exec) => {
            let order = order(&context, &exec.machinery, &exec.command)?;
            let limit = exec.timeout.map(Duration::from_secs);
            execute(
                &context,
                Order {
                    tty: exec.tty,
                    limit,
                    ..order
                },
            )?
        }
        Testbed::Shell(machinery) => {
            let order = order(&context, machinery, &["bash".into(), "-l".into()])?;
            execute(&context, Order { tty: true, ..order })?
        }
    };
    Ok(ExitCode::from(code))
}

impl Order {
    /// An order with nothing in it.
    pub fn new(mode: Mode) -> Self {
        let (items, copies, variables, words) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        Self {
            mode,
            items,
            copies,
            variables,
            words,
            tty: false,
            limit: None,
        }
    }
}

/// Resumes a machine, runs the command in it and returns the exit code.
///
/// # Errors
/// The testbed could not be made or went down.
pub fn execute(context: &Context<'_>, order: Order) -> Result<u8, Box<dyn Error>> {
    resumed(context, order, Streams::Ours)
}

/// As `execute`, with the outputs going elsewhere; the command finds the end of its input at once, and an interruption ends
/// us and the testbed together. Several may run at the same time.
///
/// # Errors
/// As `execute`.
pub fn execute_into(
    context: &Context<'_>,
    order: Order,
    outputs: Outputs,
) -> Result<u8, Box<dyn Error>> {
    resumed(context, order, Streams::Given(outputs))
}

/// Whose streams and signals the command gets.
enum Streams {
    /// All of ours.
    Ours,
    /// These outputs and nothing else.
    Given(Outputs),
}

fn resumed(context: &Context<'_>, order: Order, streams: Streams) -> Result<u8, Box<dyn Error>> {
    let terminal = if order.tty {
        Some(
            terminal::size()
                .ok_or("a terminal inside needs one outside: standard input is none")?,
        )
    } else {
        None
    };
    let saved = ensure_saved(context, order.mode)?;
    let scratch = context.cache.scratch("testbed-runs")?;
    let drive = drive::make(scratch.path(), &order.items)?;
    let mut machine = Machine::start(
        order.mode,
        Start::Resume,
        &saved.files(&drive),
        scratch.path(),
    )?;
    machine.resume(&saved.state())?;
    let run = Run {
        clock_ns: now_ns(),
        terminal,
        words: order.words.into_iter().map(OsString::into_vec).collect(),
        variables: variables(order.tty, &order.variables),
        copies: order
            .copies
            .iter()
            .map(|(from, to)| (bytes(from), bytes(to)))
            .collect(),
    };
    let (input, outputs, taken) = match streams {
        // Not a moment earlier: until now an interruption ends us and the machine.
        Streams::Ours => (
            Some(std::io::stdin()),
            Outputs::ours(),
            Some(interrupt::take()),
        ),
        Streams::Given(outputs) => (None, outputs, None),
    };
    // Held until the terminal is itself again, so that no signal ends us before.
    let (signals, _taken) = taken.unzip();
    let _raw = if order.tty {
        Some(terminal::Raw::enter()?)
    } else {
        None
    };
    let nudge = match order.mode {
        Mode::Plain => Some(NUDGE_INTERVAL),
        // Each would be part of what is measured.
        Mode::Metered => None,
    };
    let door = &machine.door;
    let code = session::carry(door, run, input, outputs, signals, order.limit, nudge);
    code.map_err(|error| machine.lost(&error.to_string()).into())
}

/// Builds or finds everything for runs in the testbed, and the testbed itself, side by side: making the testbed waits much for
/// the network and for itself, while compiling the kernel takes every processor there is.
///
/// # Errors
/// A part could not be made.
pub fn prepare(
    context: &Context<'_>,
    profile: Profile,
    mode: Mode,
) -> Result<Artifacts, Box<dyn Error>> {
    let (artifacts, testbed) = std::thread::scope(|scope| {
        let testbed = scope.spawn(|| match ensure_saved(context, mode) {
            Ok(_) => Ok(()),
            Err(error) => Err(crate::chain(error.as_ref())),
        });
        (artifacts::ensure(context, profile), testbed.join())
    });
    let artifacts = artifacts?;
    testbed.map_err(|_| "making the testbed panicked")??;
    Ok(artifacts)
}

fn order(
    context: &Context<'_>,
    machinery: &Machinery,
    words: &[OsString],
) -> Result<Order, Box<dyn Error>> {
    let mode = if machinery.metered {
        Mode::Metered
    } else {
        Mode::Plain
    };
    let artifacts = if machinery.bare {
        Artifacts::default()
    } else {
        let profile = if machinery.dev {
            Profile::Dev
        } else {
            Profile::Release
        };
        let mut artifacts = prepare(context, profile, mode)?;
        artifacts.add_shim(context, profile)?;
        artifacts
    };
    let mut items = artifacts.items();
    let mut copies = Vec::new();
    for (number, copy) in machinery.copies.iter().enumerate() {
        let place = Path::new("copies").join(number.to_string());
        items.push(Item {
            from: copy.from.clone(),
            to: place.clone(),
        });
        copies.push((place, copy.to.clone()));
    }
    let variables = artifacts.variables_inside();
    Ok(Order {
        items,
        copies,
        variables,
        words: words.to_vec(),
        ..Order::new(mode)
    })
}

fn variables(tty: bool, given: &[(&str, PathBuf)]) -> Vec<Vec<u8>> {
    let line =
        |name: &str, value: &std::ffi::OsStr| [name.as_bytes(), b"=", value.as_bytes()].concat();
    let terminal = std::env::var_os("TERM")
        .filter(|_| tty)
        .map(|kind| line("TERM", &kind));
    given
        .iter()
        .map(|(name, value)| line(name, value.as_os_str()))
        .chain(terminal)
        .collect()
}

fn bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

/// The time since 1970 in nanoseconds; it fits until the year 2554.
fn now_ns() -> u64 {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The source may hold colons, the destination is absolute: the last `:/` parts them.
fn parse_copy(text: &str) -> Result<Copy, String> {
    let (from, to) = text
        .rsplit_once(":/")
        .ok_or("write SRC:DST, with DST absolute")?;
    let from = PathBuf::from(from);
    if from.as_os_str().is_empty() || std::fs::symlink_metadata(&from).is_err() {
        return Err(format!("{} does not exist", from.display()));
    }
    Ok(Copy {
        from,
        to: Path::new("/").join(to),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_absolute_path_is_the_destination() {
        let copy = parse_copy("/proc/self:/x/y").expect("parsed");
        assert_eq!(
            copy,
            Copy {
                from: "/proc/self".into(),
                to: "/x/y".into()
            }
        );
    }

    #[test]
    fn a_relative_destination_is_refused() {
        assert_eq!(
            parse_copy("/proc:x").expect_err("refused"),
            "write SRC:DST, with DST absolute"
        );
    }

    #[test]
    fn a_missing_source_is_named() {
        assert_eq!(
            parse_copy("/no/such/file:/x").expect_err("refused"),
            "/no/such/file does not exist"
        );
    }
}
