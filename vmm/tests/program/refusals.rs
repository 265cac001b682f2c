//! What the program refuses: one line on stderr, the exit code of the reason, and no guest that ran.

use crate::harness::{Call, Code, Ended, GID, UID, Vmm, can_run, inherited, refused, spawn};
use crate::jail::share;
use capsid_protocol::exit::VmmExit;
use libc::*;
use rustix::io::Errno;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

fn no_guest(ended: &Ended, exit: VmmExit, words: &str) {
    assert_eq!(ended.exit, Some(exit), "{}", ended.stderr);
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    assert!(ended.stderr.contains(words), "{}", ended.stderr);
    assert_eq!(ended.serial, "", "no guest ran");
}

fn kernel_refused(test: &str, kernel: &[u8], words: &str) {
    if can_run(test) {
        no_guest(&Vmm::new(kernel).run(), VmmExit::BadKernel, words);
    }
}

fn code() -> Code {
    Code::default().print("ran").power_off()
}

#[test]
fn a_text_file_is_no_kernel() {
    let words = "neither an ELF vmlinux nor a bzImage";
    kernel_refused("a_text_file_is_no_kernel", b"#!/bin/sh\nexit 0\n", words);
}

#[test]
fn an_empty_file_is_no_kernel() {
    kernel_refused("an_empty_file_is_no_kernel", b"", "the kernel is empty");
}

#[test]
fn a_kernel_cut_short_is_refused() {
    let whole = code().kernel();
    let cut = &whole[..whole.len() - 30];
    kernel_refused("a_kernel_cut_short_is_refused", cut, "cut short");
}

#[test]
fn a_32_bit_kernel_is_refused() {
    let mut kernel = code().kernel();
    kernel[4] = 1;
    kernel_refused("a_32_bit_kernel_is_refused", &kernel, "32-bit ELF");
}

#[test]
fn a_kernel_without_a_pvh_note_is_refused_with_the_remedy() {
    let mut kernel = code().kernel();
    let note = kernel.len() - 12;
    kernel[note] = 17;
    let words = "CONFIG_PVH=y";
    kernel_refused(
        "a_kernel_without_a_pvh_note_is_refused_with_the_remedy",
        &kernel,
        words,
    );
}

#[test]
fn more_memory_than_the_host_has_is_refused_with_both_sizes() {
    if !can_run("more_memory_than_the_host_has_is_refused_with_both_sizes") {
        return;
    }
    let mut vmm = Vmm::of(&code());
    vmm.memory_mib = 512 * 1024;
    no_guest(&vmm.run(), VmmExit::Memory, "this host has only");
}

#[test]
fn files_that_only_begin_like_a_kernel_are_refused_before_they_are_read() {
    if !can_run("files_that_only_begin_like_a_kernel_are_refused_before_they_are_read") {
        return;
    }
    let gzip = [&[0x1f, 0x8b, 8, 0], &[0; 4092][..]].concat();
    // The PVH note that ends the file says that its name has 2^32 - 1 bytes.
    let mut notes = code().kernel();
    let note = notes.len() - 20;
    notes[note..note + 4].fill(0xff);
    for (kernel, words) in [
        (&gzip, "it begins with [1f, 8b, 08, 00]"),
        (&notes, "ELF notes make no sense"),
    ] {
        no_guest(&Vmm::new(kernel).run(), VmmExit::BadKernel, words);
    }
    // A tebibyte of holes behind a kernel.
    let vmm = Vmm::of(&code());
    vmm.kernel.set_len(1 << 40).unwrap();
    let words = "1099511627776 bytes long, at most 536870912 are taken";
    no_guest(&vmm.run(), VmmExit::BadKernel, words);
}

#[test]
fn an_initramfs_that_is_empty_or_larger_than_memory_is_refused_with_its_size() {
    if !can_run("an_initramfs_that_is_empty_or_larger_than_memory_is_refused_with_its_size") {
        return;
    }
    for (bytes, words) in [
        (0, "the initramfs is empty"),
        (
            1 << 40,
            "1099511627776 bytes does not fit into guest memory",
        ),
    ] {
        let initramfs = inherited(b"");
        initramfs.set_len(bytes).unwrap();
        let mut vmm = Vmm::of(&code());
        vmm.more = format!(r#","initramfs_fd":{}"#, initramfs.as_raw_fd());
        no_guest(&vmm.run(), VmmExit::BadKernel, words);
    }
}

#[test]
fn memory_of_no_size_that_a_guest_can_have_is_refused_with_the_bounds() {
    if !can_run("memory_of_no_size_that_a_guest_can_have_is_refused_with_the_bounds") {
        return;
    }
    for mib in [0, 63, 524_289, u64::MAX] {
        let mut vmm = Vmm::of(&code());
        vmm.memory_mib = mib;
        let words = format!("{mib} MiB of memory");
        no_guest(&vmm.run(), VmmExit::BadConfig, &words);
    }
    // At most as much as at the start is no room for more; less than that is a contradiction.
    let mut vmm = Vmm::of(&code());
    vmm.memory_mib = 128;
    vmm.more = r#","memory_max_mib":127"#.to_owned();
    no_guest(
        &vmm.run(),
        VmmExit::BadConfig,
        "this VM has 127 MiB at most",
    );
}

#[test]
fn a_resource_that_is_not_open_is_named() {
    if !can_run("a_resource_that_is_not_open_is_named") {
        return;
    }
    let mut vmm = Vmm::of(&code());
    vmm.more = r#","initramfs_fd":999"#.to_owned();
    no_guest(
        &vmm.run(),
        VmmExit::BadConfig,
        "initramfs_fd is fd 999, which is not open",
    );
}

#[test]
fn an_unknown_field_and_a_bad_number_are_refused_by_name() {
    if !can_run("an_unknown_field_and_a_bad_number_are_refused_by_name") {
        return;
    }
    let mut vmm = Vmm::of(&code());
    vmm.more = r#","kernel_path":"/boot/vmlinuz""#.to_owned();
    no_guest(&vmm.run(), VmmExit::BadConfig, "kernel_path");
    let mut vmm = Vmm::of(&code());
    vmm.cpus = 33;
    no_guest(&vmm.run(), VmmExit::BadConfig, "33 cpus");
}

#[test]
fn a_vmm_that_is_not_the_first_of_a_pid_namespace_starts_no_guest() {
    if !can_run("a_vmm_that_is_not_the_first_of_a_pid_namespace_starts_no_guest") {
        return;
    }
    let running = Vmm::of(&code()).start_by(|command| command.spawn().unwrap());
    let words = "must be started as the first process of a PID namespace";
    no_guest(&running.wait(), VmmExit::Jail, words);
}

/// Each part of the jail with a call that takes it, and what the VMM says when the kernel refuses that call.
#[rustfmt::skip] // One part a line.
fn parts() -> Vec<(Call, &'static str)> {
    let prctl = |what| Call::with(SYS_prctl, 0, what);
    let limit = |which: u32| Call::with(SYS_prlimit64, 1, which);
    let unshare = |namespaces| Call::with_flag(SYS_unshare, namespaces);
    vec![
        (limit(RLIMIT_CORE), "forbid core dumps"),
        (limit(RLIMIT_MEMLOCK), "forbid locked memory"),
        (unshare(CLONE_NEWNET), "enter network, IPC and UTS namespaces of its own"),
        (unshare(CLONE_NEWNS), "enter a mount namespace of its own"),
        (Call::any(SYS_mount), "cut its mounts off from the host's"),
        (Call::any(SYS_fsopen), "move into an empty root"),
        (Call::any(SYS_fsmount), "move into an empty root"),
        (Call::any(SYS_move_mount), "move into an empty root"),
        (Call::any(SYS_pivot_root), "move into an empty root"),
        (Call::any(SYS_umount2), "move into an empty root"),
        (prctl(PR_CAP_AMBIENT), "clear ambient capabilities"),
        (prctl(PR_CAPBSET_DROP), "empty the capability bounding set"),
        (Call::any(SYS_setgroups), "drop supplementary groups"),
        (Call::any(SYS_setresgid), "change its group"),
        (Call::any(SYS_setresuid), "change its user"),
        (Call::any(SYS_capset), "drop its capabilities"),
        (prctl(PR_SET_NO_NEW_PRIVS), "refuse new privileges"),
        (Call::any(SYS_landlock_create_ruleset), "ask for the version of Landlock"),
        (Call::any(SYS_landlock_restrict_self), "enter a Landlock domain"),
        (prctl(PR_SET_DUMPABLE), "become undumpable"),
        (prctl(PR_SET_PDEATHSIG), "ask for a signal at the death of its parent"),
        (Call::any(SYS_seccomp), "put on a system call filter"),
    ]
}

/// What a share's threads give up besides.
#[rustfmt::skip] // One part a line.
fn parts_of_a_share() -> Vec<(Call, &'static str)> {
    vec![
        (Call::with_flag(SYS_unshare, CLONE_FILES), "unshare the descriptors"),
        // The process itself begins behind the standard streams.
        (Call::with(SYS_close_range, 0, 0), "close the VMM's descriptors"),
        (Call::with_flag(SYS_unshare, CLONE_NEWNS), "unshare the mount namespace"),
        (Call::any(SYS_mount), "make the mounts private"),
        (Call::any(SYS_open_tree), "open /proc/thread-self/fd"),
        (Call::any(SYS_mount_setattr), "restrict the share's mounts"),
        (Call::any(SYS_move_mount), "attach the share's tree"),
        (Call::any(SYS_pivot_root), "pivot into the share"),
        (Call::any(SYS_umount2), "let go of the host's mounts"),
        (Call::with(SYS_prctl, 0, PR_CAPBSET_DROP), "empty the bounding set"),
        (Call::with(SYS_prctl, 0, PR_SET_SECUREBITS), "lock the secure bits"),
        (Call::any(SYS_setgroups), "drop the supplementary groups"),
        (Call::any(SYS_setresuid), "change the user"),
        (Call::any(SYS_capset), "drop capabilities"),
        (Call::any(SYS_seccomp), "seal a file-system thread"),
    ]
}

#[test]
fn without_any_one_part_of_the_jail_no_guest_runs() {
    if !can_run("without_any_one_part_of_the_jail_no_guest_runs") {
        return;
    }
    for (call, words) in parts() {
        let ended = refused(call, Errno::PERM, || Vmm::of(&code()).run());
        no_guest(&ended, VmmExit::Jail, words);
    }
}

#[test]
fn without_any_one_part_of_the_jail_of_a_shares_threads_no_guest_runs() {
    if !can_run("without_any_one_part_of_the_jail_of_a_shares_threads_no_guest_runs") {
        return;
    }
    for (call, words) in parts_of_a_share() {
        let ended = refused(call, Errno::PERM, || {
            let share = share();
            let mut vmm = Vmm::of(&code());
            let fd = share.as_raw_fd();
            vmm.more = format!(r#","shares":[{{"tag":"share","tree_fd":{fd}}}]"#);
            vmm.run()
        });
        no_guest(&ended, VmmExit::Jail, words);
    }
}

#[test]
fn without_the_filter_of_a_disks_threads_no_guest_runs() {
    if !can_run("without_the_filter_of_a_disks_threads_no_guest_runs") {
        return;
    }
    let without = Call::any(SYS_seccomp);
    // There are such threads where no ring can be had.
    let ended = refused(Call::any(SYS_io_uring_setup), Errno::PERM, || {
        refused(without, Errno::PERM, || {
            let disk = inherited(&[7; 4096]);
            let mut vmm = Vmm::of(&code());
            vmm.more = format!(r#","disks":[{{"fd":{},"id":"disk"}}]"#, disk.as_raw_fd());
            vmm.run()
        })
    });
    no_guest(&ended, VmmExit::Jail, "start the threads of the disks");
}

#[test]
fn a_vmm_that_is_not_root_starts_no_guest() {
    if !can_run("a_vmm_that_is_not_root_starts_no_guest") {
        return;
    }
    let running = Vmm::of(&code()).start_by(|command| spawn(command.uid(UID).gid(GID)));
    let words = "must start as root with CAP_SYS_ADMIN";
    no_guest(&running.wait(), VmmExit::Jail, words);
}

#[test]
fn on_a_kernel_without_landlock_the_guest_runs() {
    if !can_run("on_a_kernel_without_landlock_the_guest_runs") {
        return;
    }
    for errno in [Errno::NOSYS, Errno::OPNOTSUPP] {
        let without = Call::any(SYS_landlock_create_ruleset);
        let ended = refused(without, errno, || Vmm::of(&code()).run());
        assert_eq!(ended.exit, Some(VmmExit::PowerOff), "{}", ended.stderr);
        assert_eq!((ended.serial.as_str(), ended.stderr.as_str()), ("ran", ""));
    }
}

#[test]
fn without_a_config_fd_the_error_says_so() {
    for arguments in [
        &[] as &[&str],
        &["--config-fd", "777"],
        &["--config-fd", "1"],
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_capsid-vmm"))
            .args(arguments)
            .output()
            .unwrap();
        assert_eq!(
            output.status.code(),
            Some(i32::from(VmmExit::BadConfig.code()))
        );
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}
