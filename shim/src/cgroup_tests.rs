//! Places of cgroups, limits above them, and real cgroups where this machine has version 2 and we may make some.

use super::*;
use proptest::prelude::*;
use rustix::mount::{MountFlags, MountPropagationFlags, mount_bind, mount_change, mount_remount};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command};
use std::sync::atomic::{AtomicU32, Ordering};

fn place(text: &str) -> Option<String> {
    let parsed = CgroupPath::parse(Path::new(text)).ok()?;
    Some(parsed.0.to_str().expect("UTF-8").to_owned())
}

#[test]
fn both_forms_are_places() {
    let table = [
        ("/kubepods/burstable/pod1/c1", "kubepods/burstable/pod1/c1"),
        ("default/c1", "default/c1"),
        ("//a/./b/", "a/b"),
        (
            "kubepods-burstable-pod1.slice:cri-containerd:c1",
            "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-c1.scope",
        ),
        ("system.slice:docker:c1", "system.slice/docker-c1.scope"),
        (":nerdctl:c1", "system.slice/nerdctl-c1.scope"),
        ("-.slice:x:c1", "x-c1.scope"),
        ("user.slice::c1", "user.slice/c1.scope"),
        ("user.slice:x:c1.slice", "user.slice/c1.slice"),
    ];
    for (text, expected) in table {
        assert_eq!(place(text).as_deref(), Some(expected), "{text}");
    }
}

#[test]
fn what_is_no_place_is_refused() {
    let table = [
        "",
        "/",
        "..",
        "/a/../b",
        "a.slice:b",
        "a.slice:b:c:d",
        "a.slice:b:",
        "a:b:c",
        "a--b.slice:x:c",
        "-a.slice:x:c",
        "a/b.slice:x:c",
        "a.slice:x/y:c",
        "a.slice:x:../c",
        ".slice:x:c",
        "/a\nb",
    ];
    for text in table {
        assert_eq!(place(text), None, "{text:?}");
    }
    let long = format!("/{}", "x".repeat(256));
    let refused = CgroupPath::parse(Path::new(&long))
        .expect_err("refused")
        .to_string();
    assert!(refused.ends_with("nor SLICE:PREFIX:NAME"), "{refused}");
}

proptest! {
    #[test]
    fn any_text_is_a_place_below_the_root_or_refused(text in "[a-c./:\\-\\PC]{0,40}(\\.slice)?(:[a-c./]{0,5}){0,3}") {
        if let Ok(CgroupPath(place)) = CgroupPath::parse(Path::new(&text)) {
            prop_assert!(place.components().next().is_some());
            prop_assert!(place.components().all(|part| matches!(part, Component::Normal(_))));
        }
    }

    #[test]
    fn any_limit_is_read_or_none(text: String) {
        let _either = (memory_max(&text), cpu_max(&text));
    }
}

/// A directory that stands in for a hierarchy, as far as files are read.
struct Files(PathBuf);

impl Files {
    fn new(name: &str, files: &[(&str, &str)]) -> Files {
        let root = std::env::temp_dir().join(format!("capsid-room-{name}-{}", std::process::id()));
        for (name, text) in files {
            let path = root.join(name);
            fs::create_dir_all(path.parent().expect("a directory")).expect("made");
            fs::write(path, text).expect("written");
        }
        Files(root)
    }

    fn room(&self, place: &str) -> Result<Room, CgroupError> {
        let hierarchy = Hierarchy {
            root: self.0.clone(),
        };
        hierarchy.room(&CgroupPath::parse(Path::new(place)).expect("a place"))
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).expect("removed");
    }
}

#[test]
fn the_room_is_the_pod_s_and_the_tightest_above() {
    let files = Files::new(
        "tight",
        &[
            ("memory.max", "1\n"),
            ("kubepods/memory.max", "1000\n"),
            ("kubepods/cpu.max", "max 100000\n"),
            ("kubepods/pod1/memory.max", "2000\n"),
            ("kubepods/pod1/cpu.max", "150000 100000\n"),
            ("kubepods/pod1/c1/memory.max", "1\n"),
            ("kubepods/pod2/memory.max", "max\n"),
            ("kubepods/pod2/cpu.max", "max 100000\n"),
        ],
    );
    let limited = Room {
        memory_pod: Some(2000),
        memory: Some(1000),
        cpu_pod: Some((150_000, 100_000)),
    };
    assert_eq!(files.room("/kubepods/pod1/c1").expect("read"), limited);
    let unlimited = Room {
        memory: Some(1000),
        ..Room::default()
    };
    assert_eq!(files.room("/kubepods/pod2/c1").expect("read"), unlimited);
    assert_eq!(
        files.room("/kubepods/pod3/c1").expect("not there yet"),
        unlimited
    );
    assert_eq!(files.room("/c1").expect("below the root"), Room::default());
}

#[test]
fn a_limit_that_is_none_is_an_error() {
    let files = Files::new("odd", &[("pod/memory.max", "much\n")]);
    let error = files.room("/pod/c1").expect_err("odd").to_string();
    assert!(
        error.starts_with("reading ") && error.ends_with("pod/memory.max"),
        "{error}"
    );
}

#[test]
fn what_is_not_version_2_is_said() {
    let error = Hierarchy::at(&std::env::temp_dir())
        .expect_err("no cgroups")
        .to_string();
    assert!(
        error.contains("is not cgroup v2, which Capsid needs"),
        "{error}"
    );
    assert!(Hierarchy::at(Path::new("/nowhere")).is_err());
}

/// The real hierarchy and a place in it that is no other test's, gone with this.
struct Real {
    hierarchy: Hierarchy,
    parent: String,
}

impl Real {
    /// None where this machine has no cgroup v2 in which we may make cgroups.
    fn find(test: &str) -> Option<Real> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        // Some machines have it beside version 1.
        let roots = [HIERARCHY, "/sys/fs/cgroup/unified"];
        let mut found = roots
            .iter()
            .filter_map(|root| Hierarchy::at(Path::new(root)).ok());
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let parent = format!("capsid-test-{}-{number}", std::process::id());
        let usable = found.find(|hierarchy| fs::create_dir(hierarchy.root.join(&parent)).is_ok());
        let Some(hierarchy) = usable else {
            eprintln!("SKIPPED {test}: needs a cgroup v2 hierarchy that we may write to");
            return None;
        };
        Some(Real { hierarchy, parent })
    }

    fn place(&self) -> CgroupPath {
        let path = format!("/{}/c1", self.parent);
        CgroupPath::parse(Path::new(&path)).expect("a place")
    }

    fn directory(&self) -> PathBuf {
        self.hierarchy.root.join(&self.parent).join("c1")
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        fs::remove_dir(self.hierarchy.root.join(&self.parent)).expect("nothing is left in it");
    }
}

fn sleeper() -> Child {
    Command::new("sleep").arg("1000").spawn().expect("started")
}

fn enter(cgroup: &Path, child: &Child) {
    fs::write(cgroup.join("cgroup.procs"), child.id().to_string()).expect("moved");
}

#[test]
fn a_process_is_born_into_the_cgroup_and_dies_with_it() {
    let Some(real) = Real::find("a_process_is_born_into_the_cgroup_and_dies_with_it") else {
        return;
    };
    let cgroup = real.hierarchy.make(&real.place()).expect("made");
    let entrance = cgroup.entrance().expect("open");
    // The shell enters before it is `sleep`.
    let mut command = Command::new("sh");
    command.args(["-c", "echo 0 >&3; exec sleep 1000"]);
    let mut child = spawn_with_fd_3(&mut command, entrance);
    // Its first act fills the cgroup, which wakes us.
    let pids = until_populated(&cgroup);
    assert_eq!(pids, format!("{}\n", child.id()));
    cgroup.remove().expect("removed");
    let status = child.wait().expect("our child");
    assert_eq!(status.signal(), Some(9));
    assert!(!real.directory().exists());
}

/// Without `pre_exec`, which is unsafe: a shell that was given the descriptor as its standard input makes it 3.
fn spawn_with_fd_3(command: &mut Command, fd: OwnedFd) -> Child {
    let script = command
        .get_args()
        .nth(1)
        .and_then(OsStr::to_str)
        .expect("a script");
    let script = format!("exec 3<&0 0</dev/null; {script}");
    let mut shell = Command::new("sh");
    shell.args(["-c", &script]).stdin(fd).process_group(0);
    shell.spawn().expect("started")
}

fn until_populated(cgroup: &Cgroup) -> String {
    let mut events = File::open(cgroup.path.join("cgroup.events")).expect("open");
    while !read_populated(&mut events).expect("read") {
        let limit = Timespec {
            tv_sec: 60,
            tv_nsec: 0,
        };
        let changed = poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&limit));
        assert_ne!(changed.expect("polled"), 0, "populated in time");
    }
    fs::read_to_string(cgroup.path.join("cgroup.procs")).expect("read")
}

#[test]
fn dropping_a_cgroup_ends_what_is_in_it() {
    let Some(real) = Real::find("dropping_a_cgroup_ends_what_is_in_it") else {
        return;
    };
    let cgroup = real.hierarchy.make(&real.place()).expect("made");
    let mut child = sleeper();
    enter(&real.directory(), &child);
    drop(cgroup);
    assert_eq!(child.wait().expect("our child").signal(), Some(9));
    assert!(!real.directory().exists());
}

#[test]
fn an_empty_cgroup_that_was_left_is_taken_over() {
    let Some(real) = Real::find("an_empty_cgroup_that_was_left_is_taken_over") else {
        return;
    };
    fs::create_dir(real.directory()).expect("made");
    let cgroup = real.hierarchy.make(&real.place()).expect("taken over");
    cgroup.remove().expect("removed");
    assert!(!real.directory().exists());
}

#[test]
fn a_cgroup_in_use_is_refused_and_left_alone() {
    let Some(real) = Real::find("a_cgroup_in_use_is_refused_and_left_alone") else {
        return;
    };
    fs::create_dir(real.directory()).expect("made");
    let mut child = sleeper();
    enter(&real.directory(), &child);
    let refused = real.hierarchy.make(&real.place());
    assert!(
        matches!(refused, Err(CgroupError::InUse { .. })),
        "{refused:?}"
    );
    let left = real.hierarchy.left(&real.place()).expect("looked");
    assert!(left.is_none(), "nor is it what we have left");
    assert!(
        child.try_wait().expect("our child").is_none(),
        "it still runs"
    );
    child.kill().expect("killed");
    child.wait().expect("our child");
    fs::remove_dir(real.directory()).expect("removed");
}

#[test]
fn what_a_killed_shim_left_is_found_and_removed() {
    let Some(real) = Real::find("what_a_killed_shim_left_is_found_and_removed") else {
        return;
    };
    let left = || real.hierarchy.left(&real.place()).expect("looked");
    assert!(left().is_none());
    let mut cgroup = real.hierarchy.make(&real.place()).expect("made");
    let mut child = sleeper();
    enter(&real.directory(), &child);
    // As good as killed.
    cgroup.gone = true;
    drop(cgroup);
    left().expect("found").remove().expect("removed");
    assert_eq!(child.wait().expect("our child").signal(), Some(9));
    assert!(left().is_none());
    // Killed before the cgroup had its mark.
    fs::create_dir(real.directory()).expect("made");
    left().expect("found").remove().expect("removed");
    assert!(left().is_none());
}

#[test]
fn a_process_is_moved_into_a_cgroup_that_is_there() {
    let Some(real) = Real::find("a_process_is_moved_into_a_cgroup_that_is_there") else {
        return;
    };
    let mut child = sleeper();
    let nowhere = real.hierarchy.enter(&real.place(), child.id());
    assert!(
        matches!(nowhere, Err(CgroupError::File { .. })),
        "{nowhere:?}"
    );
    let cgroup = real.hierarchy.make(&real.place()).expect("made");
    real.hierarchy
        .enter(&real.place(), child.id())
        .expect("moved");
    cgroup.remove().expect("removed");
    assert_eq!(child.wait().expect("our child").signal(), Some(9));
}

#[test]
fn a_cgroup_that_is_gone_is_removed() {
    let Some(real) = Real::find("a_cgroup_that_is_gone_is_removed") else {
        return;
    };
    let cgroup = real.hierarchy.make(&real.place()).expect("made");
    fs::remove_dir(real.directory()).expect("removed by somebody else");
    cgroup.remove().expect("done");
}

#[test]
fn a_cgroup_below_that_is_not_ours_is_said() {
    let Some(real) = Real::find("a_cgroup_below_that_is_not_ours_is_said") else {
        return;
    };
    let cgroup = real.hierarchy.make(&real.place()).expect("made");
    let below = real.directory().join("below");
    fs::create_dir(&below).expect("made");
    let error = cgroup.remove().expect_err("not empty").to_string();
    assert!(error.starts_with("removing "), "{error}");
    fs::remove_dir(&below).expect("removed");
    fs::remove_dir(real.directory()).expect("removed");
}

#[test]
fn a_read_only_hierarchy_is_said_in_one_sentence() {
    let Some(real) = Real::find("a_read_only_hierarchy_is_said_in_one_sentence") else {
        return;
    };
    let (hierarchy, place) = (real.hierarchy.clone(), real.place());
    let refused = std::thread::spawn(move || {
        // For this thread alone.
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("a mount namespace");
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).expect("private");
        mount_bind(&hierarchy.root, &hierarchy.root).expect("a mount of its own");
        let flags = MountFlags::BIND | MountFlags::RDONLY;
        mount_remount(&hierarchy.root, flags, "").expect("read-only");
        hierarchy.make(&place).expect_err("read-only").to_string()
    });
    let refused = refused.join().expect("a thread");
    assert!(
        refused.contains("is read-only: containerd must run where it may make cgroups"),
        "{refused}"
    );
}
