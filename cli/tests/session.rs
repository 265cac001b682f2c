//! `capsid run` against a VMM that is a fake (`examples/fake-vmm.rs`), good or hostile: what goes in, what comes out, and
//! what is left. These need root and a /dev/kvm of any kind; without them each says so and is skipped.

use serde_json::Value;
use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// Skips the calling test, loudly, if `capsid run` cannot get anywhere here. `cargo xtask test` counts a test that prints a line
/// `SKIPPED …: why` as skipped (`xtask/src/test/count.rs`); plain `cargo test` shows the line with `-- --show-output`.
macro_rules! needs_kvm {
    () => {
        let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
        if kvm.is_err() || !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED {}: needs /dev/kvm and root", module_path!());
            return;
        }
    };
}

struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Scratch {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let unique = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("capsid-run-{}-{unique}", std::process::id()));
        fs::create_dir_all(path.join("root/etc")).expect("a directory for the test");
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).expect("nothing is mounted in it");
    }
}

fn fake_vmm() -> PathBuf {
    let capsid = Path::new(env!("CARGO_BIN_EXE_capsid"));
    let fake = capsid.with_file_name("examples").join("fake-vmm");
    assert!(fake.exists(), "{} is built with the tests", fake.display());
    fake
}

/// `capsid run` in a scratch directory, with `script` for the fake.
fn capsid(scratch: &Scratch, script: &str, flags: &[&str], command: &[&str]) -> Command {
    let kernel = scratch.0.join("script");
    fs::write(&kernel, script).expect("writable");
    let mut capsid = Command::new(env!("CARGO_BIN_EXE_capsid"));
    capsid
        .args(["run", "--allow-software-kvm", "--vmm"])
        .arg(fake_vmm())
        .arg("--kernel")
        .arg(&kernel)
        .arg("--initramfs")
        .arg(&kernel);
    if !flags.contains(&"--bundle") {
        capsid.arg("--rootfs").arg(scratch.0.join("root"));
    }
    capsid.args(flags).arg("--").args(command);
    capsid
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    capsid
}

fn run(script: &str, flags: &[&str], command: &[&str]) -> Output {
    let scratch = Scratch::new();
    let output = capsid(&scratch, script, flags, command)
        .output()
        .expect("it runs");
    assert_eq!(children_left(&scratch), 0, "no VMM is left");
    output
}

/// VMMs of this scratch directory that still run: their kernel is a file in it.
fn children_left(scratch: &Scratch) -> usize {
    let script = scratch.0.join("script");
    let processes = fs::read_dir("/proc").expect("/proc").flatten();
    processes
        .filter(|process| {
            let fds = fs::read_dir(process.path().join("fd"))
                .into_iter()
                .flatten()
                .flatten();
            fds.into_iter()
                .any(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == script))
        })
        .count()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[track_caller]
fn ends(output: &Output, code: i32) -> String {
    let stderr = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "stderr: {stderr}");
    stderr
}

#[track_caller]
fn one_line(stderr: &str, word: &str) {
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    assert!(stderr.contains(word), "{word:?} in {stderr}");
}

/// Reads until `mark` has come.
fn until(child: &mut Child, mark: &str) {
    let stdout = child.stdout.as_mut().expect("piped");
    let mut seen = Vec::new();
    let mut byte = [0];
    while !text(&seen).contains(mark) {
        assert_eq!(
            stdout.read(&mut byte).expect("piped"),
            1,
            "ended after {seen:?}"
        );
        seen.extend(byte);
    }
}

fn kill(child: &Child, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(child.id() as i32).expect("a pid");
    rustix::process::kill_process(pid, signal).expect("our child");
}

#[test]
fn the_exit_code_is_the_command_s() {
    needs_kvm!();
    for code in [0, 1, 7, 125, 137, 255] {
        let output = run("agent", &[], &["exit", &code.to_string()]);
        assert_eq!(ends(&output, code), "");
    }
}

#[test]
fn an_exit_status_that_is_none_is_255() {
    needs_kvm!();
    ends(&run("agent", &[], &["exit", "65536"]), 255);
}

#[test]
fn output_and_error_come_apart_and_whole() {
    needs_kvm!();
    let output = run("agent", &[], &["say", "to-out", "to-err"]);
    assert_eq!(ends(&output, 0), "to-err");
    assert_eq!(text(&output.stdout), "to-out");
}

#[test]
fn sixteen_mebibytes_go_through_and_come_back() {
    needs_kvm!();
    let scratch = Scratch::new();
    let sent: Vec<u8> = (0..16u32 << 20).map(|n| (n % 251) as u8).collect();
    let mut child = capsid(&scratch, "agent", &["-i"], &["cat"])
        .stdin(Stdio::piped())
        .spawn()
        .expect("it runs");
    let mut stdin = child.stdin.take().expect("piped");
    let bytes = sent.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&bytes));
    let output = child.wait_with_output().expect("it ends");
    writer.join().expect("the writer").expect("all was read");
    ends(&output, 0);
    assert!(output.stdout == sent);
}

#[test]
fn without_i_no_byte_of_the_input_is_passed_on() {
    needs_kvm!();
    let output = run("agent", &[], &["cat"]);
    // The fake finds no stream for its input and ends with a panic of its own.
    assert_ne!(output.status.code(), Some(0));
}

#[test]
fn an_output_that_nobody_reads_ends_the_writer() {
    needs_kvm!();
    let scratch = Scratch::new();
    let mut child = capsid(&scratch, "agent", &[], &["yes"])
        .spawn()
        .expect("it runs");
    until(&mut child, "y\ny\n");
    drop(child.stdout.take());
    assert_eq!(child.wait().expect("it ends").code(), Some(141));
}

/// More than the pipe to the reader holds, and less than the pipe and the socket before it: its writer ends while its
/// reader has hardly begun.
const FLOOD_BYTES: usize = 200 << 10;

#[test]
fn a_reader_has_all_the_time_there_is() {
    needs_kvm!();
    let scratch = Scratch::new();
    let mut child = capsid(&scratch, "agent", &[], &["flood", &FLOOD_BYTES.to_string()])
        .spawn()
        .expect("it runs");
    until(&mut child, "y");
    // Longer than the guest would have to end its output, and the VMM's sockets after it.
    let pid = rustix::process::Pid::from_raw(child.id() as i32).expect("a pid");
    let flags = rustix::process::PidfdFlags::empty();
    let pidfd = rustix::process::pidfd_open(pid, flags).expect("our child");
    let mut fds = [rustix::event::PollFd::new(
        &pidfd,
        rustix::event::PollFlags::IN,
    )];
    let limit = rustix::event::Timespec {
        tv_sec: 40,
        tv_nsec: 0,
    };
    let ended = rustix::event::poll(&mut fds, Some(&limit)).expect("a pidfd");
    assert_eq!(ended, 0, "capsid ended before its output was read");
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(ends(&output, 0), "");
    assert_eq!(output.stdout.len(), FLOOD_BYTES - 1);
}

/// Sends SIGINT for as long as it lives, because standard signals do not queue; its exit code.
fn interrupted_until_it_ends(child: &mut Child) -> Option<i32> {
    loop {
        if let Some(status) = child.try_wait().expect("our child") {
            return status.code();
        }
        kill(child, rustix::process::Signal::INT);
        std::thread::yield_now();
    }
}

#[test]
fn an_interrupt_ends_the_wait_for_a_reader_and_is_no_success() {
    needs_kvm!();
    let scratch = Scratch::new();
    let mut child = capsid(&scratch, "agent", &[], &["flood", &FLOOD_BYTES.to_string()])
        .spawn()
        .expect("it runs");
    until(&mut child, "y");
    assert_eq!(interrupted_until_it_ends(&mut child), Some(130));
    assert_eq!(children_left(&scratch), 0);
}

#[test]
fn an_output_that_cannot_be_written_is_not_a_success() {
    needs_kvm!();
    let scratch = Scratch::new();
    let full = fs::File::options()
        .write(true)
        .open("/dev/full")
        .expect("/dev/full");
    let output = capsid(&scratch, "agent", &[], &["say", "x", ""])
        .stdout(full)
        .output()
        .expect("it runs");
    one_line(&ends(&output, 125), "cannot write standard output");
}

#[test]
fn signals_reach_the_command() {
    needs_kvm!();
    for signal in [1, 2, 3, 10, 12, 14, 15, 16, 18, 26, 27, 29, 30] {
        let scratch = Scratch::new();
        let mut child = capsid(&scratch, "agent", &[], &["trap"])
            .spawn()
            .expect("it runs");
        until(&mut child, "up");
        kill(
            &child,
            rustix::process::Signal::from_named_raw(signal).expect("a signal"),
        );
        assert_eq!(child.wait().expect("it ends").code(), Some(100 + signal));
    }
}

#[test]
fn the_third_interrupt_kills_what_ignores_two() {
    needs_kvm!();
    let scratch = Scratch::new();
    let mut child = capsid(&scratch, "agent", &[], &["ignore"])
        .spawn()
        .expect("it runs");
    until(&mut child, "up");
    assert_eq!(interrupted_until_it_ends(&mut child), Some(130));
    assert_eq!(children_left(&scratch), 0);
}

#[test]
fn an_interrupt_before_the_agent_is_there_ends_everything() {
    needs_kvm!();
    let scratch = Scratch::new();
    let mut child = capsid(&scratch, "silent", &[], &["exit", "0"])
        .spawn()
        .expect("it runs");
    // Two processes hold the script when the VMM runs.
    while children_left(&scratch) < 1 {
        std::thread::yield_now();
    }
    kill(&child, rustix::process::Signal::INT);
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
    assert_eq!(children_left(&scratch), 0);
}

#[test]
fn capsid_killed_takes_its_vmm_along() {
    needs_kvm!();
    let scratch = Scratch::new();
    let mut child = capsid(&scratch, "agent", &[], &["ignore"])
        .spawn()
        .expect("it runs");
    until(&mut child, "up");
    child.kill().expect("our child");
    child.wait().expect("our child");
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while children_left(&scratch) > 0 {
        assert!(
            std::time::Instant::now() < deadline,
            "the VMM outlives its owner"
        );
        std::thread::yield_now();
    }
}

#[test]
fn a_killed_vmm_is_137_and_says_so() {
    needs_kvm!();
    let stderr = ends(&run("agent", &[], &["killed"]), 137);
    one_line(&stderr, "the VMM was killed by signal 9");
}

#[test]
fn a_guest_panic_is_255_with_the_reason_the_console_and_the_last_output() {
    needs_kvm!();
    let output = run("agent", &[], &["die", "81"]);
    let stderr = ends(&output, 255);
    assert!(stderr.contains("said by the fake"), "{stderr}");
    assert!(stderr.contains("the guest's last line"), "{stderr}");
    assert_eq!(text(&output.stdout), "last words");
}

#[test]
fn a_vmm_that_powers_off_under_the_command_is_no_success() {
    needs_kvm!();
    ends(&run("agent", &[], &["die", "0"]), 255);
}

#[test]
fn a_vmm_that_refuses_its_kernel_is_125_in_one_line() {
    needs_kvm!();
    let stderr = ends(&run("end 86 no PVH note", &[], &["exit", "0"]), 125);
    one_line(&stderr, "no PVH note");
}

#[test]
fn a_missing_command_is_127() {
    needs_kvm!();
    one_line(
        &ends(&run("agent", &[], &["no-such-command"]), 127),
        "no-such-command",
    );
}

#[test]
fn a_refusal_of_the_agent_is_125_and_its_text_is_escaped() {
    needs_kvm!();
    let stderr = ends(&run("agent", &[], &["refuse"]), 125);
    one_line(&stderr, "refused");
    assert!(!stderr.contains('\x1b'), "{stderr:?}");
}

#[test]
fn an_agent_that_hangs_up_or_sends_garbage_is_255() {
    needs_kvm!();
    for command in ["hang-up", "garbage"] {
        let stderr = ends(&run("agent", &[], &[command]), 255);
        assert!(stderr.contains("did not answer"), "{stderr}");
    }
}

#[test]
fn an_output_that_the_guest_never_ends_does_not_hold_the_exit() {
    needs_kvm!();
    let stderr = ends(&run("agent", &[], &["hold-output"]), 0);
    one_line(&stderr, "did not end its output");
}

#[test]
fn json_tells_exit_phases_and_the_guest() {
    needs_kvm!();
    let stderr = ends(&run("agent", &["--json"], &["exit", "5"]), 5);
    let told: Value = serde_json::from_str(stderr.lines().last().expect("a line")).expect("JSON");
    assert_eq!(told["exit_code"], 5);
    assert_eq!(told["guest"]["kernel"], "fake\\u{1b}[2J");
    assert!(
        told["phases"]
            .as_array()
            .is_some_and(|phases| phases.len() > 4),
        "{told}"
    );
}

#[test]
fn the_spec_names_no_path_of_the_host() {
    needs_kvm!();
    let scratch = Scratch::new();
    let data = scratch.0.join("data");
    fs::create_dir(&data).expect("writable");
    let volume = format!("{}:/data:ro", data.display());
    let output = capsid(&scratch, "agent", &["-v", &volume, "-u", "7:8"], &["spec"])
        .output()
        .expect("it runs");
    ends(&output, 0);
    let spec: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(spec["process"]["user"]["uid"], 7);
    assert!(
        !text(&output.stdout).contains(scratch.0.to_str().expect("UTF-8")),
        "{spec}"
    );
}

#[test]
fn a_missing_working_directory_is_made_inside_the_root() {
    needs_kvm!();
    let scratch = Scratch::new();
    let output = capsid(&scratch, "agent", &["-w", "/made/for/me"], &["exit", "0"])
        .output()
        .expect("it runs");
    ends(&output, 0);
    assert!(scratch.0.join("root/made/for/me").is_dir());
    fs::write(scratch.0.join("root/file"), "").expect("writable");
    let output = capsid(&scratch, "agent", &["-w", "/file"], &["exit", "0"])
        .output()
        .expect("it runs");
    one_line(&ends(&output, 125), "working directory /file");
}

#[test]
fn flags_that_cannot_be_are_refused_in_one_line() {
    needs_kvm!();
    for (flags, word) in [
        (&["--memory", "12Q"][..], "12Q"),
        (&["--memory", "999999g"], "999999g"),
        (&["--memory=-5"], "-5"),
        (&["--cpus=-1"], "cpus"),
        (&["--cpus", "1000"], "1000"),
        (&["-v", "/no/such:/x"], "/no/such"),
        (&["-v", "/tmp:x"], "absolute"),
        (&["-u", "nosuchuser"], "nosuchuser"),
        (&["-w", "relative"], "relative"),
        (&["-e", "=x"], "=x"),
        (&["--hostname", "a b"], "a b"),
        (&["-it"], "terminal"),
        (&["--bogus"], "--bogus"),
    ] {
        let stderr = ends(&run("agent", flags, &["exit", "0"]), 125);
        one_line(&stderr, word);
    }
}
