//! `containerd-shim-capsid-v2`: containerd's shim for Capsid, one for each pod.
//!
//! The program is called in four ways ([`args`]). `start` finds the server of a container's pod or leaves one behind ([`mod@start`],
//! [`bootstrap`], [`group`], [`socket`], [`launch`]); `serve` is that server ([`mod@serve`]), which tells containerd what happens ([`events`]) and
//! logs ([`log`]); `delete` removes what a killed server left ([`mod@delete`]); `-info` and `-v` describe the shim ([`info`]).
//! The servers' sockets are in `/run/containerd/s`, or where containerd or `CAPSID_SOCKET_DIR` says.
//!
//! It trusts containerd and the host's kernel. Of the guest, its agent, the VMM and the annotations of a spec every byte is a stranger's.

pub mod agent;
pub mod args;
pub mod bootstrap;
pub mod cgroup;
pub mod child;
pub mod config;
mod console;
pub mod container;
pub mod delete;
pub mod error;
pub mod events;
pub mod group;
pub mod hooks;
pub mod info;
pub mod launch;
pub mod link;
pub mod log;
pub mod parked;
pub mod pod;
pub mod polled;
pub mod process;
pub mod record;
pub mod serve;
pub mod service;
pub mod share;
pub mod sizing;
pub mod socket;
pub mod spec;
pub mod start;
pub mod state;
pub mod stats;
pub mod stdio;
#[cfg(test)]
mod testing;
pub mod vm;

use args::{Action, Flags};
use capsid_owner::escape;
use delete::Deleting;
use error::chain;
use launch::Given;
use protobuf::Message;
use serve::Serving;
use std::error::Error;
use std::io::Write;
use std::process::ExitCode;

/// The program.
pub fn main() -> ExitCode {
    let done = match args::parse(std::env::args_os().skip(1)) {
        Ok(Action::Start(flags)) => start::start(&flags).map_err(Box::from),
        Ok(Action::Delete(flags)) => delete(flags),
        Ok(Action::Serve(flags)) => return serve(&flags),
        Ok(Action::Info) => say(&info::runtime_info()),
        Ok(Action::Version) => writeln!(std::io::stdout(), "{}", info::VERSION).map_err(Box::from),
        Err(error) => Err(error.into()),
    };
    done.map_or_else(|error| fail(&*error), |()| ExitCode::SUCCESS)
}

fn serve(flags: &Flags) -> ExitCode {
    let given = match launch::given(flags) {
        Ok(given) => given,
        Err(error) => return fail(&error),
    };
    let Given {
        request,
        bundle,
        listener,
        socket_path,
    } = given;
    log::start(&bundle, &request.namespace, &request.id, request.debug);
    serve::serve(Serving {
        id: request.id,
        namespace: request.namespace,
        bundle,
        socket: listener,
        socket_path,
        ttrpc_address: request.ttrpc_address,
        options: request.options,
    })
}

/// containerd reads standard output as the message, and logs standard error as warnings.
fn delete(flags: Flags) -> Result<(), Box<dyn Error>> {
    let deleting = Deleting {
        id: flags.id.ok_or("delete needs -id")?,
        namespace: flags.namespace.ok_or("delete needs -namespace")?,
        bundle: flags.bundle.map_or_else(std::env::current_dir, Ok)?,
    };
    log::start_on_standard_error(&deleting.namespace, &deleting.id);
    say(&delete::delete(&deleting)?)
}

fn say(message: &impl Message) -> Result<(), Box<dyn Error>> {
    let mut output = std::io::stdout().lock();
    output.write_all(&message.write_to_bytes()?)?;
    Ok(output.flush()?)
}

/// An error with its causes as one line on standard error, which is what people see of a container that did not start.
fn fail(error: &(dyn Error + 'static)) -> ExitCode {
    let line = escape::console(chain(error).as_bytes()).replace(['\n', '\t'], " ");
    // Where nobody reads it, the exit code is all there is.
    let _unread = writeln!(std::io::stderr(), "containerd-shim-capsid-v2: {line}");
    ExitCode::FAILURE
}
