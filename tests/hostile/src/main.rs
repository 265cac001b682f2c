//! The guest's first instruction and its panics. In the release profile, whose panics abort, this is a guest's kernel; in the
//! others, in which the whole workspace is built and linted, a program of the host that says so.

#![cfg_attr(panic = "abort", no_std, no_main)]

#[cfg(panic = "abort")]
mod entry;

#[cfg(panic = "unwind")]
fn main() -> std::process::ExitCode {
    eprintln!("hostile-guest: this is a guest's kernel only in the release profile");
    // So that all of it is linked, and nothing of it unused.
    let _run: fn(u64) -> ! = capsid_hostile_guest::run;
    std::process::ExitCode::FAILURE
}
