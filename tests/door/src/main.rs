//! The testbed's inside end. As PID 1 it makes the emulated host usable (`init`); as `testbed-door serve` it waits at a
//! virtio-serial port for one command, runs it as root and carries its streams (`serve`).
//!
//! Trusts whoever is at the other end of the port: that is `cargo xtask testbed`, which started the machine. It is no part
//! of what Capsid ships.

mod frame;
mod init;
mod serve;
mod task;

use std::process::ExitCode;

fn main() -> ExitCode {
    let outcome = match std::env::args().nth(1).as_deref() {
        Some("serve") => serve::run().map_err(|error| error.to_string()),
        None if std::process::id() == 1 => init::run().map_err(|error| error.to_string()),
        _ => Err("it is the testbed's init: it runs as PID 1 there, and nowhere else".to_owned()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("testbed-door: {why}");
            init::power_off_if_first();
            ExitCode::FAILURE
        }
    }
}
