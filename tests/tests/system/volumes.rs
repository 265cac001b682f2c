//! Files through the share: true in both directions, and read-only means it.

use capsid_tests::bundle::Scratch;
use capsid_tests::capsid::{run, sh};
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Files that are listed and read.
const MANY_FILES: usize = 100_000;
/// Files in each directory. They are listed and then read within the second for which a guest believes what it was told of names.
const FILES_PER_DIRECTORY: usize = 100;
/// What is in each.
const CONTENT: &str = "0123456789";
/// How long that may take: each file is three or four requests, and each of these costs an emulated host one to three milliseconds.
const MANY_FILES_LIMIT: Duration = Duration::from_secs(30 * 60);

#[test]
fn a_volume_is_written_through_with_owner_and_mode() {
    let scratch = Scratch::new("rw");
    fs::write(scratch.path().join("from-host"), "hello").expect("write");
    let volume = format!("{}:/data", scratch.path().display());
    let ended = sh(
        &["-v", &volume],
        "cat /data/from-host && echo there > /data/from-guest && chown 1234:567 /data/from-guest && \
         chmod 4750 /data/from-guest && mkdir /data/dir && ln -s from-host /data/link && mv /data/link /data/dir/",
    )
    .wait();
    ended.exits(0);
    assert_eq!(ended.text(), "hello");
    let made = fs::metadata(scratch.path().join("from-guest")).expect("made by the guest");
    assert_eq!(
        (made.uid(), made.gid(), made.permissions().mode() & 0o7777),
        (1234, 567, 0o4750)
    );
    assert_eq!(
        fs::read_link(scratch.path().join("dir/link"))
            .expect("a link")
            .to_str(),
        Some("from-host")
    );
}

#[test]
fn owners_of_the_host_s_files_are_seen_and_obeyed() {
    let scratch = Scratch::new("owner");
    let file = scratch.path().join("private");
    fs::write(&file, "secret").expect("write");
    chown(&file, Some(4321), Some(4321)).expect("root");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).expect("chmod");
    let volume = format!("{}:/data", scratch.path().display());
    let ended = run(
        &["-v", &volume],
        &["stat", "-c", "%u:%g %a", "/data/private"],
    )
    .wait();
    ended.exits(0);
    assert_eq!(ended.text(), "4321:4321 600\n");
    run(
        &["-v", &volume, "-u", "1000:1000"],
        &["cat", "/data/private"],
    )
    .wait()
    .exits(1);
    run(
        &["-v", &volume, "-u", "4321:4321"],
        &["cat", "/data/private"],
    )
    .wait()
    .exits(0);
}

#[test]
fn a_read_only_volume_cannot_be_written_and_is_unchanged() {
    let scratch = Scratch::new("ro");
    fs::write(scratch.path().join("kept"), "as it was").expect("write");
    let volume = format!("{}:/data:ro", scratch.path().display());
    let ended = sh(
        &["-v", &volume],
        "cat /data/kept; echo x > /data/kept; echo x > /data/new; rm /data/kept; chmod 777 /data/kept; mkdir /data/d; false",
    )
    .wait();
    ended.exits(1);
    assert_eq!(ended.text(), "as it was");
    assert_eq!(
        ended.stderr.matches("Read-only file system").count(),
        5,
        "{}",
        ended.stderr
    );
    assert_eq!(
        fs::read_to_string(scratch.path().join("kept")).expect("kept"),
        "as it was"
    );
    assert_eq!(fs::read_dir(scratch.path()).expect("dir").count(), 1);
}

#[test]
fn a_single_file_is_a_volume_too() {
    let scratch = Scratch::new("file");
    let file = scratch.path().join("one");
    fs::write(&file, "one file\n").expect("write");
    let volume = format!("{}:/etc/one.conf", file.display());
    let ended = sh(
        &["-v", &volume],
        "cat /etc/one.conf; echo two >> /etc/one.conf",
    )
    .wait();
    ended.exits(0);
    assert_eq!(ended.text(), "one file\n");
    assert_eq!(fs::read_to_string(&file).expect("there"), "one file\ntwo\n");
}

/// What `getfattr` says of an attribute of `path` on the host.
fn attribute(path: &Path, name: &str) -> String {
    let get = Command::new("getfattr")
        .args(["--absolute-names", "--only-values", "-n", name])
        .arg(path)
        .output()
        .expect("getfattr (Debian package attr) is on this host");
    let said = String::from_utf8_lossy(&get.stderr);
    assert!(get.status.success(), "{}: {said}", path.display());
    String::from_utf8_lossy(&get.stdout).into_owned()
}

/// A line for the guest's shell that runs the host's own program there, by the host's loader: busybox has none for
/// extended attributes.
fn of_host(program: &str) -> String {
    let libraries = "/host/lib/x86_64-linux-gnu";
    format!("{libraries}/ld-linux-x86-64.so.2 --library-path {libraries} /host/bin/{program}")
}

#[test]
fn extended_attributes_and_owners_go_both_ways() {
    let scratch = Scratch::new("xattr");
    let file = scratch.path().join("of-host");
    fs::write(&file, "x").expect("write");
    chown(&file, Some(4321), Some(8765)).expect("root");
    let set = Command::new("setfattr")
        .args(["-n", "user.colour", "-v", "blue"])
        .arg(&file)
        .status()
        .expect("setfattr (Debian package attr) is on this host");
    assert!(set.success());
    let volume = format!("{}:/data", scratch.path().display());
    let (get, set) = (of_host("getfattr"), of_host("setfattr"));
    // The host's file is read and then moved; the guest's own gets an attribute and an owner.
    let script = format!(
        "cd /data && {get} --only-values -n user.colour of-host && stat -c ' %u:%g' of-host && mv of-host moved && \
         echo x > of-guest && {set} -n user.taste -v sweet of-guest && chown 1234:567 of-guest"
    );
    let ended = sh(&["-v", &volume, "-v", "/usr:/host:ro"], &script).wait();
    ended.exits(0);
    assert_eq!(ended.text(), "blue 4321:8765\n");
    let owner = |name: &str| {
        let made = fs::metadata(scratch.path().join(name)).expect("there");
        (made.uid(), made.gid())
    };
    let of = |name: &str, of: &str| attribute(&scratch.path().join(name), of);
    assert_eq!(of("moved", "user.colour"), "blue");
    assert_eq!(of("of-guest", "user.taste"), "sweet");
    assert_eq!(
        (owner("moved"), owner("of-guest")),
        ((4321, 8765), (1234, 567))
    );
}

/// Where the kernel keeps its scheduler's features.
const SCHEDULER_FEATURES: &str = "/sys/kernel/debug/sched/features";

/// In the testbed, whose only processor the file system's thread would take from the guest for each request, a task that wakes waits
/// for its turn (`docs/decisions/0008-testbed-of-one-processor.md`). Nowhere else: it is the whole host's scheduler.
struct LongTurns(bool);

impl LongTurns {
    fn take() -> LongTurns {
        let host = fs::read_to_string("/proc/sys/kernel/hostname").expect("the host's name");
        let testbed = host.trim() == "testbed";
        if testbed {
            fs::write(SCHEDULER_FEATURES, "NO_WAKEUP_PREEMPTION").expect("no preemption by waking");
        }
        LongTurns(testbed)
    }
}

impl Drop for LongTurns {
    fn drop(&mut self) {
        if self.0 {
            fs::write(SCHEDULER_FEATURES, "WAKEUP_PREEMPTION").expect("preemption by waking");
        }
    }
}

#[test]
fn a_hundred_thousand_files_are_listed_and_read() {
    // In memory: it is the share that is tried, not the host's disk.
    let scratch = Scratch::in_memory("many");
    for index in 0..MANY_FILES {
        let directory = scratch
            .path()
            .join((index / FILES_PER_DIRECTORY).to_string());
        if index % FILES_PER_DIRECTORY == 0 {
            fs::create_dir(&directory).expect("mkdir");
        }
        fs::write(directory.join(index.to_string()), CONTENT).expect("write");
    }
    let volume = format!("{}:/data:ro", scratch.path().display());
    let reader = concat!(env!("CARGO_BIN_EXE_read-files"), ":/read-files:ro");
    let script = format!("find /data -type f | wc -l; /read-files /data {CONTENT}");
    let _turns = LongTurns::take();
    // So much memory that the guest forgets none of them, and the share has to know them all at once.
    let ended = sh(&["--memory", "1G", "-v", &volume, "-v", reader], &script)
        .within(MANY_FILES_LIMIT)
        .wait();
    ended.exits(0);
    assert_eq!(ended.text(), format!("{MANY_FILES}\n{MANY_FILES}\n"));
    println!("{MANY_FILES} files listed and read in {:?}", ended.took);
}
