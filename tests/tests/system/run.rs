//! Each flag of `capsid run` means what docker means by it.

use capsid_tests::bundle::{Scratch, privileged_spec, unpack_busybox, write};
use capsid_tests::capsid::{capsid, kernel, run, sh};

#[test]
fn output_and_error_come_back_apart() {
    let ended = sh(&[], "echo to-out; echo to-err >&2").wait();
    ended.exits(0);
    assert_eq!(ended.text(), "to-out\n");
    assert_eq!(ended.stderr, "to-err\n");
}

#[test]
fn the_image_s_command_runs_when_none_is_given() {
    let image = capsid_tests::capsid::image();
    // The test image's command is `sh`; without a terminal or input it ends at once.
    capsid(["run", "--image", image.to_str().expect("utf-8")])
        .wait()
        .exits(0);
}

#[test]
fn environment_directory_user_and_hostname_are_set() {
    let ended = sh(
        &[
            "-e",
            "COLOUR=dark red",
            "-e",
            "EMPTY=",
            "-w",
            "/usr",
            "-u",
            "1234:5678",
        ],
        "echo \"$COLOUR|$EMPTY|$(pwd)|$(id -u):$(id -g)|$(cat /proc/sys/kernel/hostname)|$HOME\"",
    )
    .wait();
    ended.exits(0);
    let text = ended.text();
    let fields: Vec<&str> = text.trim_end().split('|').collect();
    assert_eq!(&fields[..4], ["dark red", "", "/usr", "1234:5678"]);
    assert!(!fields[4].is_empty() && fields[4] != "(none)", "{text}");
}

#[test]
fn a_missing_working_directory_is_made_as_docker_does() {
    let ended = sh(&["-w", "/made/for/me"], "pwd").wait();
    ended.exits(0);
    assert_eq!(ended.text(), "/made/for/me\n");
}

#[test]
fn cpus_and_memory_are_what_was_asked_for() {
    let ended = sh(
        &["--cpus", "2", "--memory", "512M"],
        "nproc; awk '/MemTotal/{print $2}' /proc/meminfo",
    )
    .wait();
    ended.exits(0);
    let text = ended.text();
    let mut lines = text.lines();
    assert_eq!(lines.next(), Some("2"));
    let kib: u64 = lines
        .next()
        .and_then(|kib| kib.parse().ok())
        .expect("MemTotal");
    assert!((440 * 1024..=512 * 1024).contains(&kib), "{kib} KiB");
}

#[test]
fn memory_goes_on_above_the_hole_for_devices() {
    // 3 GiB below the hole, 512 MiB from 4 GiB on; Linux calls the latter its zone Normal and takes memory from there first.
    let ended = sh(
        &["--memory", "3584M"],
        "awk '/zone +Normal/ {normal = 1} normal && /present/ {print $2; exit}' /proc/zoneinfo; \
         head -c 33554432 /dev/urandom > /there && cp /there /again && cmp /there /again && echo same",
    )
    .wait();
    ended.exits(0);
    assert_eq!(ended.text(), format!("{}\nsame\n", (512 << 20) / 4096));
}

#[test]
fn the_least_memory_that_a_vm_has_is_enough_for_a_command() {
    let ended = run(&["--memory", "64m"], &["true"]).wait();
    ended.exits(0);
    assert_eq!(ended.stderr, "");
}

#[test]
fn a_compressed_kernel_boots_as_well() {
    let bzimage = kernel().with_file_name("bzImage");
    assert!(
        bzimage.exists(),
        "{} does not exist; `cargo xtask kernel` leaves it beside vmlinux",
        bzimage.display()
    );
    let ended = sh(&["--cpus", "2"], "nproc; exit 7")
        .env("CAPSID_KERNEL", bzimage)
        .wait();
    ended.exits(7);
    assert_eq!(ended.text(), "2\n");
}

#[test]
fn thirty_two_cpus_come_up() {
    let ended = sh(&["--cpus", "32", "--memory", "512M"], "nproc").wait();
    ended.exits(0);
    assert_eq!(ended.text(), "32\n");
}

#[test]
fn the_container_sees_itself_alone() {
    let ended = sh(
        &[],
        "ps -o pid,comm | tail -n +2; ls -d /run/capsid 2>/dev/null; true",
    )
    .wait();
    ended.exits(0);
    let text = ended.text();
    assert!(text.trim_start().starts_with("1 sh"), "{text}");
    assert!(!text.contains("capsid"), "{text}");
}

#[test]
fn a_read_only_root_refuses_writes_and_a_plain_one_forgets_them() {
    sh(&["--read-only"], "touch /x").wait().exits(1);
    sh(
        &["--read-only"],
        "touch /dev/shm/x && touch /proc/self/comm",
    )
    .wait()
    .exits(0);
    sh(&[], "touch /x && test -e /x").wait().exits(0);
    sh(&[], "test ! -e /x").wait().exits(0);
}

#[test]
fn capabilities_and_masked_paths_are_docker_s() {
    let ended = sh(
        &[],
        "grep -E 'Cap(Eff|Bnd|Inh)' /proc/self/status; test -c /proc/keys && echo masked; \
         echo 1 > /proc/sys/vm/swappiness; mount -t tmpfs t /mnt; hostname other",
    )
    .wait();
    let text = ended.text();
    assert!(text.contains("CapEff:\t00000000a80425fb"), "{text}");
    assert!(text.contains("CapInh:\t0000000000000000"), "{text}");
    assert!(text.contains("masked"), "{text}");
    let refusal = "/proc/sys/vm/swappiness: Read-only file system";
    assert!(ended.stderr.contains(refusal), "{}", ended.stderr);
    assert!(ended.code != 0);
}

#[test]
fn a_bundle_without_a_dev_has_its_devices_all_the_same() {
    let mut spec = privileged_spec("echo x > /dev/null && test -c /dev/urandom && echo there");
    spec["mounts"] = serde_json::json!([]);
    let scratch = Scratch::new("no-dev");
    write(scratch.path(), &spec);
    let ended = capsid(["run", "--bundle", &scratch.join("")]).wait();
    ended.exits(0);
    assert_eq!(ended.text(), "there\n");
}

#[test]
fn a_rootfs_directory_is_used_in_place() {
    let scratch = Scratch::new("rootfs");
    unpack_busybox(&scratch.path().join("root"));
    capsid([
        "run",
        "--rootfs",
        &scratch.join("root"),
        "--",
        "sh",
        "-c",
        "echo written > /by-the-container",
    ])
    .wait()
    .exits(0);
    let written =
        std::fs::read_to_string(scratch.path().join("root/by-the-container")).expect("written");
    assert_eq!(written, "written\n");
}

#[test]
fn a_bundle_runs_by_its_own_spec() {
    let scratch = Scratch::new("bundle");
    write(
        scratch.path(),
        &privileged_spec("echo from the bundle; exit 3"),
    );
    let ended = capsid(["run", "--bundle", scratch.path().to_str().expect("utf-8")]).wait();
    ended.exits(3);
    assert_eq!(ended.text(), "from the bundle\n");
}

#[test]
fn the_machine_is_a_vm_of_its_own() {
    let host = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("uname -r");
    let ended = run(&[], &["cat", "/proc/sys/kernel/osrelease"]).wait();
    ended.exits(0);
    assert_ne!(ended.text(), host);
}

#[test]
fn the_guest_has_the_host_s_time() {
    let ended = run(&[], &["date", "+%s"]).wait();
    ended.exits(0);
    let guest: u64 = ended.text().trim().parse().expect("seconds");
    let host = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .expect("after 1970")
        .as_secs();
    assert!(host.abs_diff(guest) < 120, "guest {guest}, host {host}");
}

#[test]
fn json_tells_the_exit_and_the_phases() {
    let ended = sh(&["--json"], "exit 5").wait();
    ended.exits(5);
    let line = ended.stderr.lines().last().expect("a line");
    let told: serde_json::Value = serde_json::from_str(line).expect("JSON");
    assert_eq!(told["exit_code"], 5, "{told}");
    assert!(
        told["phases"]
            .as_array()
            .is_some_and(|phases| phases.len() > 4),
        "{told}"
    );
}

#[test]
fn check_says_that_run_would_work() {
    let ended = capsid(["check"]).wait();
    ended.exits(0);
    let ended = capsid(["check", "--json"]).wait();
    ended.exits(0);
    let told: serde_json::Value = serde_json::from_slice(&ended.stdout).expect("JSON");
    assert!(told.is_object());
}
