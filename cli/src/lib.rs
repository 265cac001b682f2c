//! The person's door to Capsid: `capsid run` and `capsid check`.
//!
//! It owns the truth of a run: the mounts, the image cache, the VMM process and the exit code. It trusts the person who
//! typed the command and the host's kernel; images, the guest, its agent and the VMM are strangers, whose bytes are
//! bounded, parsed once and escaped when shown. It does not read guest memory, open a network connection or leave
//! anything but whole layers in the image cache.
//!
//! Blocking threads, no async runtime: [`main`] -> [`run`] -> a session that is one loop over events.

mod abort;
pub mod args;
mod check;
mod host;
mod image;
mod quantity;
mod run;
mod share;
mod signals;
mod spec;
mod stdio;
#[cfg(feature = "testing")]
pub mod strangers;
mod terminal;
#[cfg(test)]
mod testing;
mod users;
mod vm;
mod volume;

use abort::Abort;
use args::{CheckArgs, Cli, Command, RunArgs};
use capsid_owner::escape;
use clap::Parser;
use clap::error::ErrorKind;
use run::{Clock, Event, RunError, Verdict};
use signals::Signals;
use std::process::ExitCode;
use std::sync::mpsc;

/// The exit code for errors of ours, as docker's.
const OURS: u8 = 125;
/// The exit code of a check that says no.
const NOT_USABLE: u8 = 1;

/// The program.
pub fn main() -> ExitCode {
    let clock = Clock::start();
    let default_hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        terminal::restore();
        default_hook(panic);
    }));
    // Before any thread: all inherit the mask.
    let signals = match Signals::block() {
        Ok(signals) => signals,
        Err(error) => return fail(&format!("cannot block signals: {error}")),
    };
    match Cli::try_parse() {
        Ok(cli) => match cli.command {
            Command::Run(args) => run_command(&args, signals, &clock),
            Command::Check(args) => check_command(&args, signals),
        },
        Err(error) => usage(&error),
    }
}

fn check_command(args: &CheckArgs, signals: Signals) -> ExitCode {
    let abort = Abort::default();
    let events = mpsc::channel();
    let tell = events.0.clone();
    let served = signals.serve(abort.clone(), move |_| {
        // The check may be over.
        let _nobody_listens = tell.send(check::Event::Signal);
    });
    if let Err(error) = served {
        return fail(&format!("cannot take signals: {error}"));
    }
    match check::check(args, &abort, &events) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(NOT_USABLE),
        Err(aborted) => {
            eprintln!("capsid: {aborted}");
            ExitCode::from(Verdict::signalled(aborted.signal, None).code)
        }
    }
}

fn run_command(args: &RunArgs, signals: Signals, clock: &Clock) -> ExitCode {
    let abort = Abort::default();
    let (sender, events) = mpsc::channel();
    let tell = sender.clone();
    let served = signals.serve(abort.clone(), move |signal| {
        // The session may be over.
        let _nobody_listens = tell.send(Event::Signal(signal));
    });
    if let Err(error) = served {
        return fail(&format!("cannot take signals: {error}"));
    }
    let (verdict, told) = match run::run(args, &abort, (sender, events), clock) {
        Ok((verdict, told)) => (verdict, told),
        Err(error) => (failed(&error, &abort), run::Told::default()),
    };
    if let Some(reason) = &verdict.reason {
        eprintln!("capsid: {reason}");
    }
    if let Some(error) = &told.power_off {
        eprintln!("capsid: the guest did not power off in good order: {error}");
    }
    if args.timing {
        eprint!("{}", told.table(clock));
    }
    if args.json {
        eprintln!("{}", told.json(&verdict, clock));
    }
    ExitCode::from(verdict.code)
}

/// An error before the command ran: one line, and 125. Where a signal had asked to stop, that is the reason, and not the
/// step that noticed it.
fn failed(error: &RunError, abort: &Abort) -> Verdict {
    match abort.check() {
        Err(aborted) => Verdict::signalled(aborted.signal, Some(aborted.to_string())),
        Ok(()) => Verdict::ours(chain(error)),
    }
}

fn fail(reason: &str) -> ExitCode {
    eprintln!("capsid: {reason}");
    ExitCode::from(OURS)
}

/// Help and version as they are; an error of the command line as one line.
fn usage(error: &clap::Error) -> ExitCode {
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    ) {
        // Nobody reads: nothing to tell.
        let _closed = error.print();
        return ExitCode::SUCCESS;
    }
    let text = error.render().to_string();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let lines: Vec<&str> = lines
        .take_while(|line| !line.starts_with("Usage:"))
        .collect();
    let reason = lines.join("; ");
    fail(&format!(
        "{}; see capsid --help",
        reason.trim_start_matches("error: ").trim_end_matches('.')
    ))
}

/// An error with its causes, on one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
