//! What a VMM with a running guest still is and holds, read back from `/proc`, thread by thread and descriptor by descriptor.

#[path = "../../../tests/src/tap.rs"]
#[allow(unreachable_pub, dead_code)] // It is public in the other package, which uses more of it.
pub(crate) mod tap;

use crate::control::channel::Control;
use crate::control::new_disk;
use crate::harness::{Call, Code, GID, Running, UID, Vmm, can_run, inherited, named, refused};
use crate::owner;
use capsid_protocol::control::{NewNic, Request};
use capsid_protocol::machine::Mac;
use rustix::fs::{Mode, OFlags, PROC_SUPER_MAGIC, ftruncate, openat, statfs};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CStr;
use std::fs::{File, metadata, read_dir, read_link, read_to_string};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tap::taps;

/// The namespaces that every VM has for itself.
const NAMESPACES: [&str; 5] = ["mnt", "net", "ipc", "uts", "pid"];
/// What newer hosts add to a process that runs VMs; held against the same list as our threads.
const THREAD_OF_KVM: &str = "kvm-nx-lpage-re";
/// The capabilities of a share's threads, as bits (capability.h): CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, SETFCAP.
const SHARE_CAPABILITIES: &str = "00000000800000db";
const NO_CAPABILITIES: &str = "0000000000000000";
const DISK_BYTES: u64 = 1 << 20;
pub(crate) const IN_THE_SHARE: &CStr = c"/a file of the share";

/// A VM with two vCPUs, a disk, a share and an owner.
struct Full {
    process: PathBuf,
    identity: (u32, u32),
    _running: Running,
    _owner: OwnedFd,
}

impl Full {
    fn start() -> Full {
        Full::start_with((UID, GID), "")
    }

    /// With another identity; `more` is added to its configuration.
    fn start_with(identity: (u32, u32), more: &str) -> Full {
        let mut vmm = Vmm::of(&Code::default().print("up").spin());
        vmm.cpus = 2;
        vmm.identity = identity;
        let disk = named(c"disk", b"");
        ftruncate(&disk, DISK_BYTES).unwrap();
        let share = share();
        vmm.more = format!(
            r#","disks":[{{"fd":{},"id":"disk"}}],"shares":[{{"tag":"share","tree_fd":{}}}]{more}"#,
            disk.as_raw_fd(),
            share.as_raw_fd(),
        );
        let (mut running, owner) = owner::start(vmm);
        running.printed("up");
        Full {
            process: PathBuf::from(format!("/proc/{}", running.child.id())),
            identity,
            _running: running,
            _owner: owner,
        }
    }

    fn threads(&self) -> Vec<Thread> {
        let tasks = read_dir(self.process.join("task")).unwrap();
        tasks.map(|task| Thread::at(task.unwrap().path())).collect()
    }

    /// How many descriptors of each kind the process holds.
    fn fds(&self) -> BTreeMap<String, usize> {
        fds(&self.process)
    }

    /// Every thread of the share has these descriptors.
    fn share_holds(&self, expected: &BTreeMap<String, usize>) {
        let threads = self.threads();
        let of_share = threads.iter().filter(|thread| thread.serves_a_share());
        let tables: Vec<_> = of_share.map(|thread| fds(&thread.place)).collect();
        assert_eq!(tables, vec![expected.clone(); 4]);
    }

    fn has_ring(&self) -> bool {
        self.fds().contains_key("io_uring")
    }

    /// Every thread is whom the VM was told to become, and sees nothing. `filters` as in [`Thread::is_nobody`].
    fn is_jailed(&self, filters: usize) {
        let threads = self.threads();
        assert_eq!(names(&threads), expected_names(self.has_ring()));
        for thread in &threads {
            thread.is_nobody(self.identity, filters);
            thread.sees_nothing_of_the_host();
        }
    }
}

/// A file system that is mounted nowhere and has one file, for a child to inherit.
pub(crate) fn share() -> OwnedFd {
    let tmpfs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    fsconfig_create(&tmpfs).unwrap();
    let mount = fsmount(&tmpfs, FsMountFlags::empty(), MountAttrFlags::empty()).unwrap();
    let flags = OFlags::CREATE | OFlags::CLOEXEC;
    openat(&mount, in_the_share(), flags, Mode::RUSR).unwrap();
    mount
}

/// Its name in the share's root.
fn in_the_share() -> &'static str {
    IN_THE_SHARE.to_str().unwrap().trim_start_matches('/')
}

/// How many descriptors of each kind a process or a thread holds.
fn fds(place: &Path) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for fd in read_dir(place.join("fd")).unwrap() {
        *kinds.entry(kind(&fd.unwrap().path())).or_default() += 1;
    }
    kinds
}

/// What a descriptor of a process is, without what differs from run to run.
pub(crate) fn kind(fd: &Path) -> String {
    let target = read_link(fd).unwrap().to_str().unwrap().to_owned();
    match target.as_str() {
        "/" if statfs(fd).unwrap().f_type == PROC_SUPER_MAGIC => "/proc/thread-self/fd".to_owned(),
        "/" => "root of a share".to_owned(),
        _ => {
            let what = target.trim_start_matches("anon_inode:");
            let what = what.split(":[").next().unwrap();
            what.trim_matches(['[', ']']).to_owned()
        }
    }
}

/// A thread of a VMM, in `/proc`.
struct Thread {
    place: PathBuf,
    status: String,
}

impl Thread {
    fn at(place: PathBuf) -> Thread {
        let status = read_to_string(place.join("status")).unwrap();
        Thread { place, status }
    }

    fn field(&self, name: &str) -> &str {
        self.status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
            .unwrap_or_else(|| panic!("no {name} in status"))
            .trim()
    }

    fn name(&self) -> &str {
        self.field("Name")
    }

    fn serves_a_share(&self) -> bool {
        self.name().starts_with("fs")
    }

    fn namespace(&self, name: &str) -> PathBuf {
        read_link(self.place.join("ns").join(name)).unwrap()
    }

    /// The names in its root or its working directory.
    fn names_in(&self, directory: &str) -> BTreeSet<String> {
        let entries = read_dir(self.place.join(directory)).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect()
    }

    /// Who it is and what it may do, whatever kind it is of. `filters` are those of its own and of whoever started the VMM.
    fn is_nobody(&self, (user, group): (u32, u32), filters: usize) {
        let name = self.name();
        let (file_user, file_group, capabilities) = match self.serves_a_share() {
            true => (0, 0, SHARE_CAPABILITIES),
            false => (user, group, NO_CAPABILITIES),
        };
        let uids = format!("{user}\t{user}\t{user}\t{file_user}");
        assert_eq!(self.field("Uid"), uids, "{name}");
        let gids = format!("{group}\t{group}\t{group}\t{file_group}");
        assert_eq!(self.field("Gid"), gids, "{name}");
        assert_eq!(self.field("Groups"), "", "{name}");
        for set in ["CapEff", "CapPrm"] {
            assert_eq!(self.field(set), capabilities, "{set} of {name}");
        }
        for set in ["CapInh", "CapBnd", "CapAmb"] {
            assert_eq!(self.field(set), NO_CAPABILITIES, "{set} of {name}");
        }
        assert_eq!(self.field("NoNewPrivs"), "1", "{name}");
        assert_eq!(self.field("Seccomp"), "2", "{name}");
        let found = self.field("Seccomp_filters");
        assert_eq!(found, filters.to_string(), "{name}");
        // What a process that can be dumped is, its files in /proc belong to.
        assert_eq!(metadata(self.place.join("status")).unwrap().uid(), 0);
        let innermost = self.field("NSpid").split('\t').next_back();
        assert_eq!(innermost == Some("1"), name == "capsid-vmm");
    }

    /// It sees one mount: nothing at all, or the share.
    fn sees_nothing_of_the_host(&self) {
        let name = self.name();
        let mounts = read_to_string(self.place.join("mountinfo")).unwrap();
        assert_eq!(mounts.lines().count(), 1, "{name}: {mounts}");
        assert!(mounts.contains(" - tmpfs "), "{name}: {mounts}");
        let cwd = self.place.join("cwd");
        if self.serves_a_share() {
            let restricted = " / rw,nosuid,nodev,noexec,relatime,nosymfollow - ";
            assert!(mounts.contains(restricted), "{name}: {mounts}");
            assert_eq!(self.names_in("root"), [in_the_share().to_owned()].into());
            let fds = |name: &String| name.parse::<u32>().is_ok();
            assert!(self.names_in("cwd").iter().all(fds), "{name}");
            assert_eq!(statfs(&cwd).unwrap().f_type, PROC_SUPER_MAGIC, "{name}");
        } else {
            assert!(mounts.contains(" / ro,nosuid,nodev,noexec,"), "{mounts}");
            assert_eq!(self.names_in("root"), BTreeSet::new(), "{name}");
            assert_eq!(self.names_in("cwd"), BTreeSet::new(), "{name}");
            assert_eq!(read_link(&cwd).unwrap(), Path::new("/"), "{name}");
        }
    }
}

/// The names of all threads but KVM's, sorted.
fn names(threads: &[Thread]) -> Vec<&str> {
    let names = threads.iter().map(Thread::name);
    let mut names: Vec<&str> = names.filter(|name| *name != THREAD_OF_KVM).collect();
    names.sort_unstable();
    names
}

/// What the names of all threads are to be, sorted.
fn expected_names(ring: bool) -> Vec<&'static str> {
    let disks: &[&str] = &["disk0", "disk1", "disk2", "disk3"];
    let mut names = vec!["capsid-vmm"];
    names.extend(disks.iter().filter(|_| !ring));
    names.extend(["fs0", "fs1", "fs2", "fs3", "vcpu0", "vcpu1"]);
    names
}

#[test]
fn every_thread_of_a_running_vmm_is_nobody_and_sees_nothing() {
    if !can_run("every_thread_of_a_running_vmm_is_nobody_and_sees_nothing") {
        return;
    }
    Full::start().is_jailed(1);
}

#[test]
fn on_a_host_without_io_uring_the_threads_of_the_disks_are_jailed_as_well() {
    if !can_run("on_a_host_without_io_uring_the_threads_of_the_disks_are_jailed_as_well") {
        return;
    }
    refused(Call::any(libc::SYS_io_uring_setup), Errno::PERM, || {
        let vm = Full::start();
        assert!(!vm.has_ring());
        vm.is_jailed(2);
    });
}

#[test]
fn two_vms_at_once_share_no_user_no_group_and_no_namespace() {
    if !can_run("two_vms_at_once_share_no_user_no_group_and_no_namespace") {
        return;
    }
    let first = Full::start();
    let second = Full::start_with((UID + 10, GID + 10), "");
    first.is_jailed(1);
    second.is_jailed(1);
    let of = |vm: &Full, name: &str| -> BTreeSet<PathBuf> {
        let threads = vm.threads();
        threads
            .iter()
            .map(|thread| thread.namespace(name))
            .collect()
    };
    for name in NAMESPACES {
        let ours = read_link(Path::new("/proc/thread-self/ns").join(name)).unwrap();
        let (first, second) = (of(&first, name), of(&second, name));
        assert!(first.is_disjoint(&second), "{name}: {first:?} {second:?}");
        for all in [first, second] {
            assert!(!all.contains(&ours), "{name}");
            // The threads of a share have one more set of mounts.
            assert_eq!(all.len(), if name == "mnt" { 2 } else { 1 }, "{name}");
        }
    }
}

#[test]
fn a_running_vmm_has_limits_and_leaves_no_dump() {
    if !can_run("a_running_vmm_has_limits_and_leaves_no_dump") {
        return;
    }
    let vm = Full::start();
    let limits = read_to_string(vm.process.join("limits")).unwrap();
    for (name, most) in [
        ("Max core file size", "0"),
        ("Max open files", "16384"),
        ("Max locked memory", "0"),
        ("Max msgqueue size", "0"),
        ("Max file size", "unlimited"),
    ] {
        let line = limits.lines().find_map(|line| line.strip_prefix(name));
        let values: Vec<&str> = line.unwrap().split_whitespace().take(2).collect();
        assert_eq!(values, [most, most], "{name}");
    }
    // The guest's memory is the one mapping of its size.
    let maps = read_to_string(vm.process.join("smaps")).unwrap();
    let (mut size, mut guest) = ("", 0);
    for line in maps.lines() {
        match line.split_once(':') {
            Some(("Size", kib)) => size = kib.trim(),
            Some(("VmFlags", flags)) if size == "65536 kB" => {
                assert!(flags.contains(" dd"), "{flags}");
                guest += 1;
            }
            _ => {}
        }
    }
    assert_eq!(guest, 1, "{maps}");
}

/// What every [`Full`] holds.
fn base_fds(ring: bool) -> BTreeMap<String, usize> {
    let expected = [
        // Standard input and output; errors.
        ("/dev/null", 2),
        ("pipe", 1),
        // Serial port and report.
        ("/memfd:test (deleted)", 2),
        // The disk, which a ring has for itself.
        ("/memfd:disk (deleted)", usize::from(!ring)),
        // The owner channel.
        ("socket", 1),
        ("kvm-vm", 1),
        ("kvm-vcpu:0", 1),
        ("kvm-vcpu:1", 1),
        // Event loop, signals to stop, deadlines of connections.
        ("eventpoll", 1),
        ("signalfd", 1),
        ("timerfd", 1),
        // The end of the VM, vsock that has room again, completions of the disks, a pause that is reached; the share's threads that
        // have to stop, and that have; and one for each queue: 1 of rng, 3 of vsock, 5 of the balloon, 1 of the disk, 2 of the share.
        ("eventfd", 6 + 12),
        ("io_uring", usize::from(ring)),
    ];
    with_more(BTreeMap::new(), &expected)
}

/// What the threads of its share hold, in a table of their own.
fn share_fds() -> BTreeMap<String, usize> {
    let expected = [
        // Where a panic is told.
        ("pipe", 1),
        // Interrupts.
        ("kvm-vm", 1),
        // One for each queue, a stop, and that they have stopped.
        ("eventfd", 2 + 2),
        // Where the share begins, and where its threads find their own descriptors.
        ("root of a share", 1),
        ("/proc/thread-self/fd", 1),
    ];
    with_more(BTreeMap::new(), &expected)
}

/// The same and some more.
fn with_more(mut fds: BTreeMap<String, usize>, more: &[(&str, usize)]) -> BTreeMap<String, usize> {
    for (kind, count) in more.iter().filter(|(_, count)| *count > 0) {
        *fds.entry((*kind).to_owned()).or_default() += count;
    }
    fds
}

#[test]
fn a_running_vmm_holds_exactly_these_fds_and_no_environment() {
    if !can_run("a_running_vmm_holds_exactly_these_fds_and_no_environment") {
        return;
    }
    // An fd that came along by mistake.
    let stray = inherited(b"stray");
    let vm = Full::start();
    // Kernel and configuration are closed, and so is /dev/kvm.
    assert_eq!(vm.fds(), base_fds(vm.has_ring()));
    vm.share_holds(&share_fds());
    drop(stray);
    let environment = File::open(vm.process.join("environ")).unwrap();
    let environment = std::io::read_to_string(environment).unwrap();
    assert!(!environment.contains("not for a guest"), "{environment:?}");
}

#[test]
fn cards_and_what_came_by_the_control_channel_hold_exactly_these_fds() {
    let test = "cards_and_what_came_by_the_control_channel_hold_exactly_these_fds";
    if !can_run(test) || !has_taps(test) {
        return;
    }
    // On a thread of its own, whose network goes with it.
    let run = || {
        let (mut control, theirs) = Control::pair();
        let pair = taps(2, 1500).unwrap();
        let inherited: Vec<i32> = pair
            .iter()
            .map(|tap| {
                fcntl_setfd(tap, FdFlags::empty()).unwrap();
                tap.as_raw_fd()
            })
            .collect();
        let more = format!(
            r#","control_fd":{},"nics":[{{"tap_fds":{inherited:?},"mac":"02:00:00:00:00:01","mtu":1500}}]"#,
            theirs.as_raw_fd()
        );
        let vm = Full::start_with((UID, GID), &more);
        drop(theirs);
        let start = with_more(
            base_fds(vm.has_ring()),
            // The control channel; both queues of the tap device; a card's queues: two pairs and one for control.
            &[("socket", 1), ("/dev/net/tun", 2), ("eventfd", 5)],
        );
        assert_eq!(vm.fds(), start);

        let file = named(c"later", &[7; 4096]);
        control.attach(&new_disk("later"), &[&file]);
        let tap = taps(1, 1500).unwrap();
        let mac = Mac::try_from("02:00:00:00:00:02".to_owned()).unwrap();
        control.attach(&Request::AttachNic(NewNic { mac, mtu: 1500 }), &tap);
        let later = with_more(
            start.clone(),
            // A disk of one queue, and a card of one pair.
            &[
                ("/memfd:later (deleted)", usize::from(!vm.has_ring())),
                ("/dev/net/tun", 1),
                ("eventfd", 1 + 2),
            ],
        );
        assert_eq!(vm.fds(), later);
        vm.share_holds(&share_fds());
        vm.is_jailed(1);

        let id = "later".to_owned();
        control.done(&Request::DetachDisk { id });
        control.done(&Request::DetachNic { mac });
        assert_eq!(vm.fds(), start);
    };
    std::thread::spawn(run).join().unwrap();
}

/// Whether there are tap devices here; says so loudly if not.
fn has_taps(test: &str) -> bool {
    let tun = File::options().read(true).write(true).open("/dev/net/tun");
    if tun.is_err() {
        eprintln!("SKIPPED {test}: needs /dev/net/tun");
    }
    tun.is_ok()
}
