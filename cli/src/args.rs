//! The command line. Docker's name and meaning for each flag that docker has.

use capsid_owner::files::{FileError, Part};
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Runs containers, each in a microVM of its own.
#[derive(Debug, Parser)]
#[command(name = "capsid", version, about, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command in a new container in a microVM of its own
    #[command(
        after_help = "Signals: INT, TERM, HUP, QUIT, USR1, USR2, ALRM, VTALRM, PROF, IO, PWR, STKFLT and CONT are \
                      passed on to the command. The third of the first four kills its VM. TSTP stops capsid itself."
    )]
    Run(Box<RunArgs>),
    /// Say whether this machine can run containers, and what to do if not
    Check(CheckArgs),
}

/// Where the programs of the machine are; without a flag or variable, beside `capsid` and in /usr/share/capsid.
#[derive(Debug, Default, Clone, Args)]
pub struct MachineArgs {
    /// Guest kernel: vmlinux with a PVH note, or bzImage (or $CAPSID_KERNEL)
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Guest initramfs, whose /init is the agent (or $CAPSID_INITRAMFS)
    #[arg(long, value_name = "FILE")]
    pub initramfs: Option<PathBuf>,
    /// The VMM program (or $CAPSID_VMM)
    #[arg(long, value_name = "FILE")]
    pub vmm: Option<PathBuf>,
    /// How long the guest may take until its agent can be reached
    #[arg(
        long,
        value_name = "SECONDS",
        default_value = "300",
        allow_hyphen_values = true
    )]
    pub boot_timeout: String,
    /// Start the VM even where KVM is software, which can take hours
    #[arg(long)]
    pub allow_software_kvm: bool,
}

impl MachineArgs {
    /// Where a part of the machine is.
    ///
    /// # Errors
    /// It is nowhere.
    pub(crate) fn find(&self, part: Part) -> Result<PathBuf, FileError> {
        let named = match part {
            Part::Vmm => &self.vmm,
            Part::Kernel => &self.kernel,
            Part::Initramfs => &self.initramfs,
        };
        part.find(named.as_deref())
    }
}

/// `capsid run`.
#[derive(Debug, Default, Args)]
pub struct RunArgs {
    /// Image: docker-archive or OCI layout, a file or a directory
    #[arg(long, value_name = "FILE.tar|DIR", group = "source")]
    pub image: Option<PathBuf>,
    /// Directory used in place as the root file system
    #[arg(long, value_name = "DIR", group = "source")]
    pub rootfs: Option<PathBuf>,
    /// OCI bundle: a directory with config.json
    #[arg(long, value_name = "DIR", group = "source")]
    pub bundle: Option<PathBuf>,
    /// Pass standard input on
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Set an environment variable; without a value, pass the caller's on
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Mount a file or directory of this host
    #[arg(short, long, value_name = "SRC:DST[:ro]")]
    pub volume: Vec<String>,
    /// Working directory in the container
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// User, and group, by number or by a name of the container
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
    /// Virtual CPUs of the VM
    #[arg(
        long,
        value_name = "N",
        default_value = "1",
        allow_hyphen_values = true
    )]
    pub cpus: String,
    /// Memory of the VM, for instance 512m or 2g
    #[arg(
        long,
        short = 'm',
        value_name = "SIZE",
        default_value = "256m",
        allow_hyphen_values = true
    )]
    pub memory: String,
    /// Mount the container's root file system read-only
    #[arg(long)]
    pub read_only: bool,
    /// Host name in the container
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// Print the phases of the run with their times on standard error
    #[arg(long)]
    pub timing: bool,
    /// Copy the guest's console to standard error
    #[arg(long)]
    pub debug: bool,
    /// Print one JSON object about the run on standard error at the end
    #[arg(long)]
    pub json: bool,
    /// Where the machine comes from.
    #[command(flatten)]
    pub machine: MachineArgs,
    /// The command and its arguments; without one, the image's or the bundle's
    #[arg(trailing_var_arg = true, value_name = "CMD")]
    pub command: Vec<String>,
}

/// `capsid check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Print one JSON object on standard output
    #[arg(long)]
    pub json: bool,
    /// Where the machine comes from.
    #[command(flatten)]
    pub machine: MachineArgs,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(words: &[&str]) -> Result<RunArgs, clap::Error> {
        let words = [&["capsid", "run"], words].concat();
        match Cli::try_parse_from(words)?.command {
            Command::Run(args) => Ok(*args),
            Command::Check(_) => unreachable!("the words say run"),
        }
    }

    #[test]
    fn the_command_s_own_flags_are_not_ours() {
        let args = run(&["--image", "x", "-it", "--", "ls", "-l", "--env"]).expect("valid");
        assert_eq!(args.command, ["ls", "-l", "--env"]);
        assert!(args.interactive && args.tty && args.env.is_empty());
    }

    #[test]
    fn the_two_dashes_are_optional_as_with_docker() {
        let args = run(&["--image", "x", "sh", "-c", "exit 7"]).expect("valid");
        assert_eq!(args.command, ["sh", "-c", "exit 7"]);
    }

    #[test]
    fn an_unknown_flag_is_not_a_command() {
        assert!(run(&["--bogus"]).is_err());
        assert!(run(&["--image", "x", "--bogus", "--", "true"]).is_err());
    }

    #[test]
    fn an_image_and_a_rootfs_are_one_too_many() {
        assert!(run(&["--image", "x", "--rootfs", "y", "--", "true"]).is_err());
    }

    #[test]
    fn a_negative_number_reaches_its_own_check() {
        let args = run(&["--image", "x", "--cpus=-1", "--memory=-5"]).expect("refused later");
        assert_eq!((args.cpus.as_str(), args.memory.as_str()), ("-1", "-5"));
    }

    #[test]
    fn the_definition_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
