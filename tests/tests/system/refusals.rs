//! Bad input gets one clear line and leaves nothing.

use capsid_tests::bundle::{Scratch, privileged_spec, unpack_busybox, write};
use capsid_tests::capsid::{Run, capsid, image, kernel, run, sh};
use capsid_tests::ledger::Ledger;
use serde_json::json;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// The code of `capsid` for what it refuses itself, as docker's.
const REFUSED: i32 = 125;

#[track_caller]
fn refused(run: Run, words: &[&str]) {
    let before = Ledger::now();
    run.wait().refuses(REFUSED, words);
    before.balances();
}

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

#[test]
fn memory_and_cpus_out_of_range_are_refused_with_the_range() {
    for memory in ["0", "1M", "12Q", "-5", "", "999999G"] {
        let flag = format!("--memory={memory}");
        let ended = run(&[&flag], &["true"]).wait();
        assert!(
            ended.code == REFUSED || ended.code == 2,
            "{memory}: {}",
            ended.code
        );
        assert!(!ended.stderr.is_empty());
    }
    for cpus in ["0", "-1", "1000", "many"] {
        let flag = format!("--cpus={cpus}");
        let ended = run(&[&flag], &["true"]).wait();
        assert!(
            ended.code == REFUSED || ended.code == 2,
            "{cpus}: {}",
            ended.code
        );
        assert!(ended.stderr.contains("cpus"), "{}", ended.stderr);
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
fn a_kernel_that_is_none_is_refused() {
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
    for (path, words) in [
        (write("text", b"this is not a kernel\n"), &["kernel"][..]),
        (write("empty", b""), &["kernel"]),
        (write("cut", &good[..good.len() / 2]), &["kernel"]),
        (write("elf32", &elf32), &["64"]),
        (write("no-note", &no_note), &["PVH"]),
    ] {
        refused(run(&[], &["true"]).env("CAPSID_KERNEL", &path), words);
    }
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

/// A docker-archive with these layers, as bytes.
fn archive(layers: &[Vec<u8>]) -> Vec<u8> {
    let names: Vec<String> = (0..layers.len())
        .map(|index| format!("layer{index}.tar"))
        .collect();
    let config = json!({"architecture": "amd64", "os": "linux", "config": {"Cmd": ["sh"]},
                        "rootfs": {"type": "layers", "diff_ids": layers.iter().map(|_| "sha256:00").collect::<Vec<_>>()}});
    let manifest = json!([{"Config": "config.json", "RepoTags": ["t:1"], "Layers": names}]);
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |name: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        builder
            .append_data(&mut header, name, bytes)
            .expect("in memory");
    };
    add("config.json", config.to_string().as_bytes());
    add("manifest.json", manifest.to_string().as_bytes());
    for (name, layer) in names.iter().zip(layers) {
        add(name, layer);
    }
    builder.into_inner().expect("in memory")
}

/// One entry of a layer with a name that `tar` itself would refuse to write.
fn raw_entry(name: &str, kind: tar::EntryType, link: &str, bytes: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_entry_type(kind);
    header.set_size(bytes.len() as u64);
    header.set_mode(0o644);
    header.set_cksum();
    let mut entry = header.as_bytes().to_vec();
    entry.extend_from_slice(bytes);
    entry.resize(entry.len().next_multiple_of(512), 0);
    entry
}

#[test]
fn a_hostile_or_broken_image_is_refused_and_touches_nothing_outside() {
    let scratch = Scratch::new("image");
    let outside = Path::new("/var/tmp/capsid-escaped");
    let up = raw_entry(
        "../../../../../../../../var/tmp/capsid-escaped",
        tar::EntryType::Regular,
        "",
        b"x",
    );
    let through = [
        raw_entry("out", tar::EntryType::Symlink, "/var/tmp", b""),
        raw_entry("out/capsid-escaped", tar::EntryType::Regular, "", b"x"),
    ]
    .concat();
    let looped = [
        raw_entry("a", tar::EntryType::Symlink, "b", b""),
        raw_entry("b", tar::EntryType::Symlink, "a", b""),
        raw_entry("a/file", tar::EntryType::Regular, "", b"x"),
    ]
    .concat();
    let cut = raw_entry("file", tar::EntryType::Regular, "", &[7; 4096])[..2048].to_vec();
    let unknown = b"\xfd7zXZ\0 an xz stream is no layer of ours".to_vec();
    for (name, layers) in [
        ("escape", vec![up]),
        ("through", vec![through]),
        ("loop", vec![looped]),
        ("cut", vec![cut]),
        ("compression", vec![unknown]),
        ("none", vec![]),
    ] {
        let path = scratch.join(name);
        fs::write(&path, archive(&layers)).expect("write");
        refused(capsid(["run", "--image", &path, "--", "true"]), &[]);
        assert!(!outside.exists(), "{name} escaped");
    }
    let text = scratch.join("text");
    fs::write(&text, "no archive at all").expect("write");
    refused(capsid(["run", "--image", &text, "--", "true"]), &["image"]);
}

#[test]
fn kvm_absent_or_not_permitted_is_said() {
    let before = Ledger::now();
    let node = "/dev/kvm";
    let away = "/dev/kvm.away";
    fs::rename(node, away).expect("root on a devtmpfs");
    let run_ended = run(&[], &["true"]).wait();
    let check_ended = capsid(["check"]).wait();
    fs::rename(away, node).expect("put back");
    run_ended.refuses(REFUSED, &["/dev/kvm"]);
    assert_ne!(check_ended.code, 0);
    assert!(
        check_ended.text().contains("/dev/kvm"),
        "{}",
        check_ended.text()
    );
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

#[test]
fn a_closed_stdin_is_an_empty_one() {
    let image = image();
    let script = format!("exec capsid run -i --image {} -- cat <&-", image.display());
    let out = Command::new("sh")
        .args(["-c", &script])
        .output()
        .expect("sh");
    assert_eq!(
        out.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(out.stdout.is_empty());
}

#[test]
fn a_full_cache_disk_is_said_and_leaves_nothing() {
    let scratch = Scratch::new("full");
    let status = Command::new("mount")
        .args([
            "-t",
            "tmpfs",
            "-o",
            "size=128k",
            "capsid-test",
            scratch.path().to_str().expect("utf-8"),
        ])
        .status();
    assert!(status.expect("mount").success());
    let before = Ledger::now();
    let ended = sh(&[], "true").env("CAPSID_CACHE", scratch.path()).wait();
    let left: Vec<_> = walk(scratch.path());
    let status = Command::new("umount").arg(scratch.path()).status();
    assert!(status.expect("umount").success());
    ended.refuses(REFUSED, &["space"]);
    assert!(
        left.iter().all(|path| !path.contains("bin/busybox")),
        "left behind: {left:?}"
    );
    drop(before);
}

fn walk(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        found.push(entry.path().display().to_string());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(walk(&entry.path()));
        }
    }
    found
}
