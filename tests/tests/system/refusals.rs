//! Bad input gets one clear line and leaves nothing.

use capsid_tests::bundle::{Scratch, privileged_spec, unpack_busybox, write};
use capsid_tests::capsid::{REFUSED, capsid, image, kernel, refused, run};
use capsid_tests::ledger::Ledger;
use serde_json::json;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output};

#[test]
fn what_is_not_there_is_named() {
    refused(
        capsid(["run", "--image", "/no/such.tar", "--", "true"]),
        &["/no/such.tar"],
    );
    refused(
        capsid(["run", "--rootfs", "/no/such", "--", "true"]),
        &["/no/such"],
    );
    refused(capsid(["run", "--bundle", "/no/such"]), &["/no/such"]);
    refused(
        run(&[], &["true"]).env("CAPSID_KERNEL", "/no/kernel"),
        &["/no/kernel"],
    );
    refused(
        run(&[], &["true"]).env("CAPSID_INITRAMFS", "/no/initramfs"),
        &["/no/initramfs"],
    );
    refused(run(&["-v", "/no/such:/data"], &["true"]), &["/no/such"]);
}

#[test]
fn a_volume_needs_an_absolute_destination() {
    refused(run(&["-v", "/tmp:data"], &["true"]), &["data", "absolute"]);
}

/// `--memory` of this size is refused, and the line says `words`.
#[track_caller]
fn memory_refused(size: &str, words: &[&str]) {
    let flag = format!("--memory={size}");
    refused(run(&[&flag], &["true"]), &[&["--memory"], words].concat());
}

#[test]
fn memory_out_of_range_is_refused_with_the_range() {
    for size in ["0", "1M", "63M", "513G", "999999G"] {
        memory_refused(size, &[size, "64 MiB to 524288 MiB"]);
    }
}

#[test]
fn memory_that_is_no_size_is_refused_by_its_text() {
    for size in ["12Q", "-5", "much", "1e9"] {
        memory_refused(size, &[size, "is not a size"]);
    }
    memory_refused("", &[]);
}

#[test]
fn memory_that_the_host_does_not_have_is_refused_with_what_it_has() {
    let meminfo = fs::read_to_string("/proc/meminfo").expect("/proc/meminfo");
    let kib: u64 = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next())
        .and_then(|kib| kib.parse().ok())
        .expect("MemTotal");
    let has_mib = kib / 1024;
    assert!(
        has_mib < 512 * 1024,
        "with {has_mib} MiB this host has all the memory that a VM may have"
    );
    let more = format!("{}M", has_mib + 1);
    memory_refused(&more, &[&more, &format!("has {has_mib} MiB in all")]);
}

#[test]
fn cpus_out_of_range_are_refused_with_the_range() {
    for cpus in ["0", "-1", "33", "1000", "many", "1.5"] {
        let flag = format!("--cpus={cpus}");
        refused(
            run(&[&flag], &["true"]),
            &["--cpus", cpus, "1 to 32 whole cpus"],
        );
    }
}

#[test]
fn a_time_that_no_guest_may_take_is_refused_with_the_range() {
    for seconds in ["0", "-1", "3601", "1.5", "soon"] {
        let flag = format!("--boot-timeout={seconds}");
        refused(
            run(&[&flag], &["true"]),
            &["--boot-timeout", seconds, "1 to 3600 whole seconds"],
        );
    }
}

#[test]
fn an_unknown_user_is_refused_by_name() {
    refused(run(&["-u", "nosuchuser"], &["true"]), &["nosuchuser"]);
}

#[test]
fn a_command_not_found_is_127_and_one_not_executable_126() {
    let before = Ledger::now();
    run(&[], &["no-such-command"])
        .wait()
        .refuses(127, &["no-such-command"]);
    run(&[], &["/etc/passwd"])
        .wait()
        .refuses(126, &["/etc/passwd"]);
    run(&[], &["/etc"]).wait().refuses(126, &["/etc"]);
    before.balances();
}

#[test]
fn a_kernel_that_is_none_is_refused_for_what_is_wrong_with_it() {
    let scratch = Scratch::new("kernel");
    let good = fs::read(kernel()).expect("the guest kernel");
    let write = |name: &str, bytes: &[u8]| {
        let path = scratch.join(name);
        fs::write(&path, bytes).expect("write");
        path
    };
    let mut elf32 = good.clone();
    elf32[4] = 1; // EI_CLASS: ELFCLASS32
    let mut no_note = good.clone();
    let phoff = u64::from_le_bytes(good[32..40].try_into().expect("8 bytes"));
    for index in 0..usize::from(u16::from_le_bytes([good[56], good[57]])) {
        let at = usize::try_from(phoff).expect("fits") + index * 56;
        if good[at..at + 4] == [4, 0, 0, 0] {
            no_note[at] = 0; // PT_NOTE becomes PT_NULL
        }
    }
    for (path, word) in [
        (
            write("text", b"this is not a kernel\n"),
            "neither an ELF vmlinux nor a bzImage",
        ),
        (write("empty", b""), "the kernel is empty"),
        (
            write("cut", &good[..good.len() / 2]),
            "the kernel is cut short",
        ),
        (write("elf32", &elf32), "a 32-bit ELF file"),
        (write("no-note", &no_note), "no PVH entry note"),
    ] {
        refused(
            run(&[], &["true"]).env("CAPSID_KERNEL", &path),
            &["kernel or initramfs was refused", word],
        );
    }
    let empty = scratch.join("empty");
    refused(
        run(&[], &["true"]).env("CAPSID_INITRAMFS", &empty),
        &["kernel or initramfs was refused", "the initramfs is empty"],
    );
}

#[test]
fn a_bundle_s_config_is_checked() {
    let scratch = Scratch::new("config");
    let bundle = scratch.path().to_str().expect("utf-8");
    unpack_busybox(&scratch.path().join("rootfs"));
    let config = scratch.path().join("config.json");
    let go = || capsid(["run", "--bundle", bundle]);
    refused(go(), &["config.json"]);
    for bytes in [&b""[..], b"not json", b"{\"process\": 7}", b"[]"] {
        fs::write(&config, bytes).expect("write");
        refused(go(), &["config.json"]);
    }
    fs::write(&config, vec![b' '; 64 << 20]).expect("write");
    refused(go(), &["config.json"]);
    let mut spec = privileged_spec("true");
    spec["root"] = json!({"path": "no-such-rootfs"});
    fs::write(&config, spec.to_string()).expect("write");
    refused(go(), &["no-such-rootfs"]);
}

#[test]
fn a_bundle_without_a_command_is_refused() {
    let scratch = Scratch::new("noargs");
    let mut spec = privileged_spec("true");
    spec["process"]["args"] = json!([]);
    write(scratch.path(), &spec);
    refused(
        capsid(["run", "--bundle", scratch.path().to_str().expect("utf-8")]),
        &["args"],
    );
}

/// A /dev without /dev/kvm.
const KVM_ABSENT: &str = "mount -t tmpfs none /mnt && cp -a /dev/null /dev/zero /dev/urandom /mnt/ && mount --move /mnt /dev";
/// A /dev/kvm that not even root may open.
const KVM_NOT_PERMITTED: &str =
    "mount -t tmpfs -o nodev none /mnt && cp -a /dev/kvm /mnt/ && mount --bind /mnt/kvm /dev/kvm";

/// Runs `capsid` where `mounts` were made, which nobody else sees: the host may be somebody's.
fn behind(mounts: &str, arguments: &[&str]) -> Output {
    let script = format!("{mounts} && exec capsid \"$@\"");
    let mut shell = Command::new("unshare");
    shell.args(["--mount", "sh", "-c", &script, "sh"]);
    shell.args(arguments).output().expect("unshare")
}

#[test]
fn kvm_absent_or_not_permitted_is_said() {
    let before = Ledger::now();
    let image = image();
    let image = image.to_str().expect("utf-8");
    let cases = [
        (KVM_ABSENT, "/dev/kvm does not exist"),
        (KVM_NOT_PERMITTED, "/dev/kvm may not be opened"),
    ];
    for (mounts, words) in cases {
        let run = behind(mounts, &["run", "--image", image, "--", "true"]);
        assert_eq!(run.status.code(), Some(REFUSED), "{mounts}");
        let said = String::from_utf8_lossy(&run.stderr);
        assert!(said.contains(words), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        let check = behind(mounts, &["check"]);
        assert!(!check.status.success(), "{mounts}");
        let said = String::from_utf8_lossy(&check.stdout);
        assert!(said.contains(words), "{said}");
    }
    before.balances();
}

#[test]
fn who_is_not_root_is_told_so() {
    let image = image();
    let readable = Scratch::new("nonroot");
    let copy = readable.join("image.tar");
    fs::copy(image, &copy).expect("copy");
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o644)).expect("chmod");
    let out = Command::new("setpriv")
        .args([
            "--reuid=65534",
            "--regid=65534",
            "--clear-groups",
            "capsid",
            "run",
            "--image",
            &copy,
            "--",
            "true",
        ])
        .output()
        .expect("setpriv");
    assert_eq!(out.status.code(), Some(REFUSED));
    let said = String::from_utf8_lossy(&out.stderr);
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(said.contains("root"), "{said}");
}

/// `capsid run` with `flags` and a closed standard input, which runs `command`.
#[track_caller]
fn without_stdin(flags: &str, command: &str) -> Output {
    let before = Ledger::now();
    let image = image();
    let image = image.display();
    let script = format!("exec capsid run {flags} --image {image} -- {command} <&-");
    let out = Command::new("sh").args(["-c", &script]).output();
    before.balances();
    out.expect("sh")
}

#[test]
fn a_closed_stdin_is_an_empty_one() {
    for flags in ["-i", ""] {
        let out = without_stdin(flags, "sh -c 'cat; echo end'");
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(0), "{flags}: {said}");
        assert_eq!(String::from_utf8_lossy(&out.stdout), "end\n", "{flags}");
        assert_eq!(said, "", "{flags}");
    }
}
