//! `capsid-vmm`: one microVM, started by its owner and by nobody else. See the library.

use capsid_protocol::exit::VmmExit;
use capsid_vmm::{Outcome, inherit, run};
use std::ffi::OsString;
use std::io::Write;
use std::os::fd::RawFd;

const USAGE: &str = "\
Runs one microVM of Capsid.

Usage: capsid-vmm --config-fd N

  --config-fd N   read the machine's configuration (JSON) from the inherited fd N, 3 or more;
                  every resource that it names is an inherited fd as well
  --help          print this
  --version       print the version

This program is started by `capsid run`. It needs to start as root and as the first process of a PID
namespace, and gives root up before the guest runs. It ends with one exit code for each reason, and one line on stderr that says why:
";

/// What the arguments ask for.
#[derive(Debug, PartialEq, Eq)]
enum Command {
    Run(RawFd),
    Help,
    Version,
}

// Also what `capsid-vmm-drill` does.
pub(crate) fn main() {
    std::panic::set_hook(Box::new(|panic| {
        let mut line = format!("capsid-vmm: {}: {panic}", VmmExit::Internal.describe());
        line = line.replace('\n', " ");
        // Both locks of the standard streams might be held by the thread that panicked.
        let _ = rustix::io::write(rustix::stdio::stderr(), format!("{line}\n").as_bytes());
        std::process::exit(i32::from(VmmExit::Internal.code()));
    }));
    inherit::empty_environment();
    inherit::one_heap();
    let code = match command(std::env::args_os().skip(1)) {
        Ok(Command::Run(config_fd)) => tell(&run(config_fd)),
        Ok(Command::Help) => print(&help()),
        Ok(Command::Version) => print(concat!("capsid-vmm ", env!("CARGO_PKG_VERSION"), "\n")),
        Err(why) => {
            eprintln!("capsid-vmm: {why}; see capsid-vmm --help");
            VmmExit::BadConfig.code()
        }
    };
    // Ends every thread at once, whatever it is doing.
    std::process::exit(i32::from(code));
}

fn command(arguments: impl Iterator<Item = OsString>) -> Result<Command, String> {
    let arguments: Vec<OsString> = arguments.collect();
    let words: Vec<&str> = arguments.iter().filter_map(|word| word.to_str()).collect();
    match words.as_slice() {
        _ if words.len() != arguments.len() => Err("an argument is not UTF-8".to_owned()),
        ["--help" | "-h"] => Ok(Command::Help),
        ["--version" | "-V"] => Ok(Command::Version),
        ["--config-fd", number] => match number.parse() {
            Ok(fd) if fd > 2 => Ok(Command::Run(fd)),
            _ => Err(format!(
                "--config-fd {number:?} is not a number of 3 or more"
            )),
        },
        [] => Err("--config-fd is missing".to_owned()),
        [word, ..] => Err(format!("{word:?} is not expected here")),
    }
}

fn help() -> String {
    let mut text = USAGE.to_owned();
    for exit in VmmExit::ALL {
        text.push_str(&format!("  {:3}  {}\n", exit.code(), exit.describe()));
    }
    text
}

fn print(text: &str) -> u8 {
    match std::io::stdout().write_all(text.as_bytes()) {
        Ok(()) => 0,
        Err(_) => VmmExit::Internal.code(),
    }
}

/// One line that says why, and the console where it helps.
fn tell(outcome: &Outcome) -> u8 {
    let exit = outcome.end.exit;
    if exit != VmmExit::PowerOff {
        let mut text = format!("capsid-vmm: {}: {}\n", exit.describe(), outcome.end.why);
        for line in &outcome.console {
            text.push_str("  console: ");
            text.push_str(line);
            text.push('\n');
        }
        // Without stderr there is nobody to tell; the exit code says it too.
        let _ = std::io::stderr().write_all(text.as_bytes());
    }
    exit.code()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Result<Command, String> {
        command(words.iter().map(OsString::from))
    }

    #[test]
    fn the_config_fd_is_a_number_of_three_or_more() {
        assert_eq!(parsed(&["--config-fd", "3"]), Ok(Command::Run(3)));
        for number in ["2", "-1", "x", "", "99999999999"] {
            assert!(
                parsed(&["--config-fd", number])
                    .unwrap_err()
                    .contains("3 or more")
            );
        }
    }

    #[test]
    fn anything_else_is_refused_by_name() {
        assert_eq!(parsed(&[]).unwrap_err(), "--config-fd is missing");
        assert!(
            parsed(&["--seccomp", "off"])
                .unwrap_err()
                .contains("--seccomp")
        );
        assert!(
            parsed(&["--config-fd", "3", "x"])
                .unwrap_err()
                .contains("not expected")
        );
    }

    #[test]
    fn help_lists_every_exit_code() {
        let help = help();
        for exit in VmmExit::ALL {
            assert!(help.contains(exit.describe()));
        }
    }
}
