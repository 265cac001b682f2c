//! What the program refuses: one line on stderr, the exit code of the reason, and no guest that ran.

use crate::harness::{Code, Ended, Vmm, can_run};
use capsid_protocol::exit::VmmExit;
use std::process::Command;

fn refused(ended: &Ended, exit: VmmExit, words: &str) {
    assert_eq!(ended.exit, Some(exit), "{}", ended.stderr);
    assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
    assert!(ended.stderr.contains(words), "{}", ended.stderr);
    assert_eq!(ended.serial, "", "no guest ran");
}

fn kernel_refused(test: &str, kernel: &[u8], words: &str) {
    if can_run(test) {
        refused(&Vmm::new(kernel).run(), VmmExit::BadKernel, words);
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
    refused(&vmm.run(), VmmExit::Memory, "this host has only");
}

#[test]
fn a_resource_that_is_not_open_is_named() {
    if !can_run("a_resource_that_is_not_open_is_named") {
        return;
    }
    let mut vmm = Vmm::of(&code());
    vmm.more = r#","initramfs_fd":999"#.to_owned();
    refused(
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
    refused(&vmm.run(), VmmExit::BadConfig, "kernel_path");
    let mut vmm = Vmm::of(&code());
    vmm.cpus = 33;
    refused(&vmm.run(), VmmExit::BadConfig, "33 cpus");
}

#[test]
fn a_vmm_that_is_not_the_first_of_a_pid_namespace_starts_no_guest() {
    if !can_run("a_vmm_that_is_not_the_first_of_a_pid_namespace_starts_no_guest") {
        return;
    }
    let running = Vmm::of(&code()).start_by(|command| command.spawn().unwrap());
    let words = "must be started as the first process of a PID namespace";
    refused(&running.wait(), VmmExit::Jail, words);
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
