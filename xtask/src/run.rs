//! `cargo xtask run`: sets everything up, then runs a container in a microVM, on this host or in the testbed.
//!
//! Without a command it runs the demo, which prints who ran where. What stands before `--` goes to `capsid run` as it is.

use std::error::Error;
use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use crate::artifacts::{self, Artifacts};
use crate::cache::Cache;
use crate::command::shown;
use crate::place::{Kvm, Place};
use crate::programs::Profile;
use crate::progress::Progress;
use crate::testbed::machine::Mode;
use crate::testbed::saved::Context;
use crate::testbed::{self, Order, PROGRAMS_DIR};

/// `cargo xtask run`
#[derive(Debug, clap::Args)]
pub struct Run {
    /// Where to run; by default on this host if its KVM has hardware behind it, else in the testbed
    #[arg(long, value_enum)]
    pub on: Option<Place>,
    /// Flags for `capsid run`, e.g. --cpus 2 --memory 512M; paths in them are those of the place where it runs
    #[arg(allow_hyphen_values = true, value_name = "FLAG")]
    pub flags: Vec<OsString>,
    /// The command in the busybox test image; without one, the demo
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

impl Run {
    /// The flags, and the command behind `--`: clap leaves the separator among flags that begin with a hyphen.
    fn parts(&self) -> (&[OsString], &[OsString]) {
        match self.flags.iter().position(|flag| flag == "--") {
            Some(place) => (
                self.flags.get(..place).unwrap_or_default(),
                self.flags.get(place + 1..).unwrap_or_default(),
            ),
            None => (&self.flags, &self.command),
        }
    }
}

/// Printed by the host, then by the container.
const DEMO_HOST: &str = r#"echo "host kernel        $(uname -sr)"; exec "$@""#;
const DEMO_CONTAINER: &str = r#"echo "guest kernel       $(uname -sr)"
echo "guest CPUs         $(nproc)"
echo "guest memory       $(awk '/MemTotal/ { printf "%d MiB", $2 / 1024 }' /proc/meminfo)"
echo "container's id     $(id)"
echo "container's processes:"
ps -o pid,user,comm | sed 's/^/    /'
echo "container's mounts:"
awk '{ print "    " $2 " (" $3 ")" }' /proc/mounts
"#;

/// Runs the subcommand.
///
/// # Errors
/// Something could not be set up.
pub fn run(run: &Run, workspace: &Path) -> Result<ExitCode, Box<dyn Error>> {
    let cache = Cache::open()?;
    let progress = Progress::new(cache.root().join("logs"));
    let context = Context {
        progress: &progress,
        cache: &cache,
        workspace,
    };
    let place = choose(&progress, run.on);
    match place {
        Place::Host => here(&artifacts::ensure(&context, Profile::Release)?, run),
        Place::Testbed => {
            let artifacts = testbed::prepare(&context, Profile::Release, Mode::Plain)?;
            let image = Path::new(PROGRAMS_DIR).join("share/busybox.tar");
            let order = Order {
                items: artifacts.items(),
                variables: artifacts.variables_inside(),
                words: words(Path::new("capsid"), &image, run),
                tty: wants_terminal(run.parts().0),
                ..Order::new(Mode::Plain)
            };
            Ok(ExitCode::from(testbed::execute(&context, order)?))
        }
    }
}

/// The place, said in one line.
pub fn choose(progress: &Progress, forced: Option<Place>) -> Place {
    let (chosen, why) = Kvm::look().choose();
    match forced {
        None => {
            progress.say(why);
            chosen
        }
        Some(place) => {
            if place != chosen {
                progress.say(&format!("as told with --on; by itself: {why}"));
            }
            place
        }
    }
}

/// Becomes the command: its streams, terminal and signals are its own.
fn here(artifacts: &Artifacts, run: &Run) -> Result<ExitCode, Box<dyn Error>> {
    let missing = "it was built a moment ago and is gone";
    let capsid = artifacts.here("capsid").ok_or(missing)?;
    let image = artifacts.here("busybox.tar").ok_or(missing)?;
    let mut words = words(capsid, image, run).into_iter();
    let mut command = Command::new(words.next().unwrap_or_default());
    command.args(words).envs(artifacts.variables_here());
    eprintln!("           $ {}", shown(&command));
    Err(Box::new(command.exec()))
}

fn words(capsid: &Path, image: &Path, run: &Run) -> Vec<OsString> {
    let (flags, command) = run.parts();
    let demo = command.is_empty();
    let mut words = Vec::new();
    if demo {
        words.extend(["sh", "-c", DEMO_HOST, "demo"].map(OsString::from));
    }
    words.extend([capsid.into(), "run".into()]);
    if !has_source(flags) {
        words.extend(["--image".into(), PathBuf::from(image).into()]);
    }
    if demo {
        words.push("--timing".into());
    }
    words.extend(flags.iter().cloned());
    words.push("--".into());
    if demo {
        words.extend(["sh", "-c", DEMO_CONTAINER].map(OsString::from));
    } else {
        words.extend(command.iter().cloned());
    }
    words
}

/// Whether the person names something else to run than the test image.
fn has_source(flags: &[OsString]) -> bool {
    let sources = ["--image", "--rootfs", "--bundle"];
    flags.iter().filter_map(|flag| flag.to_str()).any(|flag| {
        sources.iter().any(|source| {
            flag.strip_prefix(source)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
        })
    })
}

/// `-t`, alone or among other short flags, or `--tty`.
fn wants_terminal(flags: &[OsString]) -> bool {
    let short = |flag: &str| {
        flag.strip_prefix('-').is_some_and(|rest| {
            !rest.is_empty()
                && rest.bytes().all(|byte| matches!(byte, b'i' | b't'))
                && rest.contains('t')
        })
    };
    flags
        .iter()
        .filter_map(|flag| OsStr::to_str(flag))
        .any(|flag| flag == "--tty" || short(flag))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        run: Run,
    }

    fn parsed(words: &[&str]) -> Run {
        Line::try_parse_from([&["x"], words].concat())
            .expect("parsed")
            .run
    }

    fn line(words: &[&str]) -> String {
        let words = super::words(Path::new("capsid"), Path::new("/i.tar"), &parsed(words));
        words
            .iter()
            .map(|word| word.to_string_lossy().into_owned())
            .collect::<Vec<_>>()
            .join(" ")
    }

    #[test]
    fn flags_go_to_capsid_and_the_command_to_the_container() {
        assert_eq!(
            line(&[
                "--cpus",
                "2",
                "--memory",
                "512M",
                "--",
                "sh",
                "-c",
                "nproc; free -m"
            ]),
            "capsid run --image /i.tar --cpus 2 --memory 512M -- sh -c nproc; free -m"
        );
        assert_eq!(
            line(&["--", "sh", "-c", "exit 7"]),
            "capsid run --image /i.tar -- sh -c exit 7"
        );
    }

    #[test]
    fn the_place_may_be_forced_before_the_flags() {
        let run = parsed(&["--on", "testbed", "--cpus", "2", "--", "true"]);
        assert_eq!(run.on, Some(Place::Testbed));
        assert_eq!(run.parts().0, ["--cpus", "2"].map(OsString::from));
    }

    #[test]
    fn without_a_command_the_demo_runs() {
        let line = line(&[]);
        assert!(line.starts_with("sh -c echo \"host kernel"), "{line}");
        assert!(
            line.contains("demo capsid run --image /i.tar --timing -- sh -c"),
            "{line}"
        );
    }

    #[test]
    fn a_source_of_ones_own_takes_the_images_place() {
        assert_eq!(
            line(&["--rootfs", "/r", "--", "true"]),
            "capsid run --rootfs /r -- true"
        );
        assert_eq!(
            line(&["--image=/x", "--", "true"]),
            "capsid run --image=/x -- true"
        );
    }

    #[test]
    fn a_terminal_is_wanted_by_t_in_any_form() {
        let wants = |flag: &str| wants_terminal(&[flag.into()]);
        assert!(wants("-t") && wants("-it") && wants("-ti") && wants("--tty"));
        assert!(!wants("-i") && !wants("--timing") && !wants("-test") && !wants("-"));
    }
}
