//! One microVM: KVM, memory, boot, event loop, jail. No async runtime.
//!
//! The program is `capsid-vmm`; its owner hands it a [`capsid_protocol::machine::MachineConfig`] and every
//! resource as an inherited fd. It trusts its owner and no byte of the guest.
//!
//! - [`inherit`]: what the process was started with.
//! - [`mod@assemble`]: the recipe, from configuration to a machine that can run.
//! - [`memory`], [`layout`], [`kvm`], [`arch`], [`boot`], [`board`]: its parts.
//! - [`vcpus`], [`machine`], [`end`]: the run and its end.
//! - [`owner_channel`]: the host's side of vsock.
//! - [`control`], [`slots`]: what the owner asks of a VM that runs; devices that come and go.
//! - [`jail`], [`seccomp`]: what the process gives up before the guest runs.
//! - [`record`]: what is counted.

// Tests play the guest, whose memory it is.
#![cfg_attr(test, allow(clippy::disallowed_methods, clippy::disallowed_types))]

pub mod arch;
pub mod assemble;
pub mod board;
pub mod boot;
pub mod control;
#[cfg(feature = "drill")]
mod drill;
pub mod end;
pub mod faults;
pub mod inherit;
pub mod jail;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod owner_channel;
pub mod record;
pub mod seccomp;
pub mod slots;
pub mod vcpus;

use capsid_protocol::exit::VmmExit;
use end::End;
use record::Phases;
use std::fs::File;
use std::io::Write;
use std::os::fd::{OwnedFd, RawFd};

/// How a run ended and what to tell of it.
pub struct Outcome {
    /// Why.
    pub end: End,
    /// The last lines of the guest's console, oldest first.
    pub console: Vec<String>,
}

impl Outcome {
    fn early(end: End) -> Outcome {
        Outcome {
            end,
            console: Vec::new(),
        }
    }
}

/// Runs the VM whose configuration is on `config_fd`, from beginning to end, in this process: afterwards the
/// process is jailed and good for nothing but its exit.
pub fn run(config_fd: RawFd) -> Outcome {
    let phases = Phases::default();
    phases.ended("exec");
    let mut inherited = match inherit::take(config_fd) {
        Ok(inherited) => inherited,
        Err(error) => return Outcome::early(End::from_error(VmmExit::BadConfig, &error)),
    };
    let report_to = inherited.report.take();
    let (outcome, counts) = match assemble::assemble(inherited, &phases) {
        Ok(machine) => {
            let ended = machine.run();
            let outcome = Outcome {
                end: ended.end,
                console: ended.console,
            };
            (outcome, ended.counts)
        }
        Err(error) => {
            phases.ended("end");
            (Outcome::early(error.end()), Vec::new())
        }
    };
    if let Some(fd) = report_to {
        write_report(fd, &record::report(&phases, &counts));
    }
    outcome
}

/// Nobody is left to hear that the report could not be written; the exit code is the truth in any case.
fn write_report(fd: OwnedFd, report: &capsid_protocol::report::MachineReport) {
    if let Ok(json) = serde_json::to_vec(report) {
        let _ = File::from(fd).write_all(&json);
    }
}
