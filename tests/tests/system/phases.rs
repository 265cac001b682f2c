//! A run that is cut short in any of its phases leaves nothing, and says by its code what cut it.
//!
//! The phases are those of `cli/src/run/session.rs`. Each is entered by an event that is seen from outside, and the
//! later ones are held open until the cut, so that no clock decides which phase it hits.

use capsid_tests::bundle::{Scratch, privileged_spec, write};
use capsid_tests::capsid::{capsid, image, sh, vmm_of};
use capsid_tests::command::{Run, Running};
use capsid_tests::ledger::Ledger;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe};
use std::fs;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// More than fits into a pipe, so that whoever writes it has to wait, and less than fits on the way to it.
const HELD_BYTES: usize = 128 * 1024;
/// The exit code of the command in the bundle.
const CODE: i32 = 5;

/// How many entries a directory has; none if it is not there.
fn entries(directory: &Path) -> usize {
    fs::read_dir(directory).map_or(0, Iterator::count)
}

/// A `capsid` that runs a bundle, some way into its run.
struct Cut {
    scratch: Scratch,
    running: Running,
    /// The end of its output that nobody reads yet.
    output: File,
}

impl Cut {
    /// Starts a bundle whose command marks with the file `up` that it runs, having filled its output, waits for the file
    /// `go` and ends. With `hook`, a hook holds up its start for ever, which the file `hook` marks.
    fn start(hook: bool) -> Cut {
        let scratch = Scratch::new("phase");
        let mut spec = privileged_spec(&format!(
            "head -c {HELD_BYTES} /dev/zero; touch /up; until test -e /go; do sleep 0.1; done; exit {CODE}"
        ));
        if hook {
            spec["hooks"] = serde_json::json!({"startContainer": [{
                "path": "/bin/sh", "args": ["sh", "-c", "touch /hook; sleep 1000"]}]});
        }
        write(scratch.path(), &spec);
        // A mount point that is missing is made as the container is created, and the host sees it.
        fs::remove_dir(scratch.path().join("rootfs/proc")).expect("the image has it");
        let (output, theirs) = pipe().expect("a pipe");
        let bundle = scratch.path().to_str().expect("utf-8").to_owned();
        let running = capsid(["run", "--bundle", &bundle])
            .output_to(theirs)
            .start();
        Cut {
            scratch,
            running,
            output: output.into(),
        }
    }

    fn has(&self, name: &str) -> bool {
        self.scratch.path().join("rootfs").join(name).exists()
    }

    /// Waits until the VMM's process is there.
    fn booting() -> Cut {
        let cut = Cut::start(false);
        cut.running
            .reaches("its VMM", || vmm_of(cut.running.pid()).is_some());
        cut
    }

    /// Waits until the agent makes the container.
    fn creating() -> Cut {
        let cut = Cut::start(false);
        cut.running
            .reaches("the creation of its container", || cut.has("proc"));
        cut
    }

    /// Waits until a hook holds up the start of the command.
    fn starting() -> Cut {
        let cut = Cut::start(true);
        cut.running
            .reaches("the start of its command", || cut.has("hook"));
        cut
    }

    /// Waits until the command runs.
    fn running() -> Cut {
        let cut = Cut::start(false);
        cut.running.reaches("its command", || cut.has("up"));
        cut
    }

    /// Waits until the command's exit is known, while its output cannot be written.
    fn draining() -> Cut {
        let cut = Cut::running();
        let threads = cut.running.threads();
        fs::write(cut.scratch.path().join("rootfs/go"), "").expect("write");
        // The thread that waits for the exit ends with it, and so does the one that copies standard error.
        cut.running.reaches("the command's exit", || {
            cut.running.threads() + 2 <= threads
        });
        cut
    }

    /// Waits until the guest is asked to power off; its VMM is stopped, so that it cannot.
    fn powering_off() -> Cut {
        let mut cut = Cut::draining();
        let threads = cut.running.threads();
        let vmm = vmm_of(cut.running.pid()).expect("the VMM runs");
        kill(vmm, Signal::SIGSTOP).expect("the VMM runs");
        let mut output = vec![0; HELD_BYTES];
        cut.output.read_exact(&mut output).expect("all of it");
        cut.running
            .reaches("the end of its output", || cut.running.threads() < threads);
        cut
    }

    /// Cuts it by a signal; it exits with `code` and leaves nothing.
    #[track_caller]
    fn by(self, signal: Signal, code: i32, phase: &str) {
        let vmm = vmm_of(self.running.pid());
        kill(Pid::from_raw(self.running.pid()), signal).expect("capsid runs");
        let ended = self.running.wait();
        assert_eq!(ended.code, code, "{phase} by {signal}: {}", ended.stderr);
        if let Some(vmm) = vmm.filter(|_| phase == "powering off") {
            // A process that was stopped learns only now that its owner is gone; it may have been killed by it.
            let _gone = kill(vmm, Signal::SIGCONT);
        }
    }
}

/// A phase's name, the way into it, and the code of a run that Ctrl-C cuts there.
type Phase = (&'static str, fn() -> Cut, i32);

const PHASES: [Phase; 5] = [
    ("booting", Cut::booting, 130),
    ("creating", Cut::creating, 130),
    ("starting", Cut::starting, 130),
    // What the command wrote is not all written: its own exit would say that it is.
    ("draining", Cut::draining, 130),
    ("powering off", Cut::powering_off, CODE),
];

#[test]
fn ctrl_c_in_each_phase_ends_the_run_and_leaves_nothing() {
    for (phase, reach, code) in PHASES {
        let before = Ledger::now();
        reach().by(Signal::SIGINT, code, phase);
        before.balances();
    }
}

#[test]
fn capsid_killed_in_each_phase_leaves_nothing() {
    for (phase, reach, _) in
        PHASES
            .into_iter()
            .chain([("running", Cut::running as fn() -> Cut, 137)])
    {
        let before = Ledger::now();
        reach().by(Signal::SIGKILL, 137, phase);
        before.balances();
    }
}

#[test]
fn ctrl_c_while_the_command_runs_is_the_command_s() {
    let before = Ledger::now();
    let script = "trap 'exit 130' INT; echo up; while :; do sleep 0.1; done";
    let mut running = sh(&[], script).start();
    running.until("up");
    kill(Pid::from_raw(running.pid()), Signal::SIGINT).expect("capsid runs");
    running.wait().exits(130);
    before.balances();
}

/// `capsid run` of the busybox image with this cache.
fn with_cache(cache: &Path) -> Run {
    let image = image();
    let image = image.to_str().expect("utf-8");
    capsid(["run", "--image", image, "--", "true"]).env("CAPSID_CACHE", cache)
}

/// Cuts a run by `signal` while it unpacks an image into an empty cache.
fn cut_while_unpacking(cache: &Path, signal: Signal, code: i32) {
    let running = with_cache(cache).start();
    running.reaches("the unpacking", || entries(&cache.join("tmp")) > 0);
    kill(Pid::from_raw(running.pid()), signal).expect("capsid runs");
    running.wait().exits(code);
    let whole = entries(&cache.join("layers"));
    assert_eq!(whole, 0, "the cut came after the layer was whole");
}

#[test]
fn ctrl_c_while_an_image_is_unpacked_leaves_nothing() {
    let before = Ledger::now();
    let scratch = Scratch::new("unpack");
    cut_while_unpacking(scratch.path(), Signal::SIGINT, 130);
    assert_eq!(entries(&scratch.path().join("tmp")), 0);
    drop(scratch);
    before.balances();
}

#[test]
fn what_a_run_killed_while_it_unpacked_has_left_the_next_removes() {
    let before = Ledger::now();
    let scratch = Scratch::new("unpack");
    cut_while_unpacking(scratch.path(), Signal::SIGKILL, 137);
    with_cache(scratch.path()).wait().exits(0);
    assert_eq!(entries(&scratch.path().join("tmp")), 0);
    assert_eq!(entries(&scratch.path().join("layers")), 1);
    drop(scratch);
    before.balances();
}
