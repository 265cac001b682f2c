//! What a VMM with a running guest still may do, read back from /proc.

use crate::harness::{Code, GID, UID, Vmm, can_run};
use rustix::process::Signal;
use std::fs::{read_dir, read_link, read_to_string};
use std::path::PathBuf;

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .unwrap_or_else(|| panic!("no {name} in status"))
        .trim()
}

#[test]
fn every_thread_of_a_running_vmm_is_jailed() {
    if !can_run("every_thread_of_a_running_vmm_is_jailed") {
        return;
    }
    let mut vmm = Vmm::of(&Code::default().print("up").spin());
    vmm.cpus = 2;
    let mut running = vmm.start();
    running.printed("up");
    let process = PathBuf::from(format!("/proc/{}", running.child.id()));

    let mut names = Vec::new();
    for thread in read_dir(process.join("task")).unwrap() {
        let thread = thread.unwrap().path();
        let status = read_to_string(thread.join("status")).unwrap();
        let ids = |id: u32| vec![id.to_string(); 4].join("\t");
        assert_eq!(field(&status, "Uid"), ids(UID));
        assert_eq!(field(&status, "Gid"), ids(GID));
        assert_eq!(field(&status, "Groups"), "");
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(field(&status, set), "0000000000000000", "{set}");
        }
        let pids = field(&status, "NSpid").split('\t').next_back();
        let is_main = field(&status, "Name") == "capsid-vmm";
        assert_eq!(pids == Some("1"), is_main, "{pids:?}");
        assert_eq!(field(&status, "NoNewPrivs"), "1");
        assert_eq!(field(&status, "Seccomp"), "2");
        for name in ["mnt", "net", "ipc", "uts", "pid"] {
            let own = read_link(thread.join("ns").join(name)).unwrap();
            let ours = read_link(PathBuf::from("/proc/self/ns").join(name)).unwrap();
            assert_ne!(own, ours, "{name} namespace");
        }
        names.push(field(&status, "Name").to_owned());
    }
    // Newer hosts add a worker of KVM's own, which was held against the same list.
    for name in ["capsid-vmm", "vcpu0", "vcpu1"] {
        assert!(
            names.iter().any(|thread| thread == name),
            "{name} in {names:?}"
        );
    }

    let mounts = read_to_string(process.join("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    assert!(
        mounts.contains(" - tmpfs ") && mounts.contains(" / ro,"),
        "{mounts}"
    );
    assert_eq!(read_dir(process.join("root")).unwrap().count(), 0);
    let limits = read_to_string(process.join("limits")).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core file size"));
    assert!(
        core.is_some_and(|line| line.split_whitespace().nth(4) == Some("0")),
        "{limits}"
    );
    running.signal(Signal::KILL);
    assert_eq!(running.wait().code, None);
}

#[test]
fn a_running_vmm_holds_only_the_fds_that_it_needs_and_no_environment() {
    if !can_run("a_running_vmm_holds_only_the_fds_that_it_needs_and_no_environment") {
        return;
    }
    // An fd that came along by mistake.
    let stray = crate::harness::inherited(b"stray");
    let mut running = Vmm::of(&Code::default().print("up").spin()).start();
    running.printed("up");
    drop(stray);
    let process = PathBuf::from(format!("/proc/{}", running.child.id()));
    let known = ["/dev/null", "/memfd:test", "anon_inode:", "pipe:"];
    for fd in read_dir(process.join("fd")).unwrap() {
        let target = read_link(fd.unwrap().path()).unwrap();
        let target = target.to_string_lossy().into_owned();
        let expected = known.iter().any(|known| target.starts_with(known));
        assert!(expected, "{target}");
    }
    let memfds = read_dir(process.join("fd")).unwrap();
    let memfds = memfds.filter(|fd| {
        let target = read_link(fd.as_ref().unwrap().path()).unwrap();
        target.to_string_lossy().contains("memfd:test")
    });
    assert_eq!(
        memfds.count(),
        2,
        "serial and report; kernel and config are closed, others never kept"
    );
    let environment = read_to_string(process.join("environ")).unwrap_or_default();
    assert!(!environment.contains("not for a guest"));
}
