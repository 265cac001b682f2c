//! Guests of a few bytes of code, run by the real program on this machine's KVM: how each of them ends.

use crate::harness::{CODE, Code, Vmm, can_run};
use capsid_protocol::exit::VmmExit;
use rustix::process::Signal;

#[test]
fn a_guest_that_powers_off_is_success_and_says_nothing() {
    if !can_run("a_guest_that_powers_off_is_success_and_says_nothing") {
        return;
    }
    let ended = Vmm::of(&Code::default().print("hello\n").power_off()).run();
    assert_eq!(ended.exit, Some(VmmExit::PowerOff), "{}", ended.stderr);
    assert_eq!(ended.serial, "hello\n");
    assert_eq!(ended.stderr, "");
}

#[test]
fn memory_of_every_size_around_the_hole_boots() {
    if !can_run("memory_of_every_size_around_the_hole_boots") {
        return;
    }
    // What fills the memory below the hole, one less, one more, and what would reach its end without one.
    for mib in [3071, 3072, 3073, 4095, 4096, 4097] {
        let mut vmm = Vmm::of(&Code::default().print("up").power_off());
        vmm.memory_mib = mib;
        let ended = vmm.run();
        if ended.exit == Some(VmmExit::Memory) {
            eprintln!(
                "SKIPPED memory_of_every_size_around_the_hole_boots: {}",
                ended.stderr.trim()
            );
            return;
        }
        assert_eq!(ended.exit, Some(VmmExit::PowerOff), "{}", ended.stderr);
        assert_eq!(ended.serial, "up", "{mib} MiB");
    }
}

#[test]
fn the_report_has_the_phases_in_order_and_every_exit() {
    if !can_run("the_report_has_the_phases_in_order_and_every_exit") {
        return;
    }
    let report = Vmm::of(&Code::default().print("four").power_off())
        .run()
        .report;
    let report = report.expect("a report");
    let names: Vec<&str> = report
        .phases
        .iter()
        .map(|phase| phase.name.as_str())
        .collect();
    assert_eq!(
        names,
        [
            "exec", "config", "memory", "kvm", "devices", "load", "jail", "run", "end"
        ]
    );
    assert!(report.phases.is_sorted_by_key(|phase| phase.monotonic_ns));
    assert_eq!(report.userspace_exits.get("io:serial"), Some(&4));
    // The write to the address register is collected by KVM and comes with the access to the data register.
    assert_eq!(report.userspace_exits.get("io:pci"), Some(&1));
    assert!(
        report
            .userspace_exits
            .keys()
            .any(|name| name.starts_with("mmio:"))
    );
}

#[test]
fn a_kernel_panic_is_told_with_the_last_lines_of_the_console() {
    if !can_run("a_kernel_panic_is_told_with_the_last_lines_of_the_console") {
        return;
    }
    let code = Code::default().print("Kernel panic - not syncing: \x1b[31mtest\n");
    let ended = Vmm::of(&code.pvpanic(1).halt()).run();
    assert_eq!(ended.exit, Some(VmmExit::GuestPanic), "{}", ended.stderr);
    assert!(
        ended.stderr.contains("console: Kernel panic - not syncing"),
        "{}",
        ended.stderr
    );
    assert!(
        !ended.stderr.contains('\x1b'),
        "control characters reach no terminal"
    );
}

#[test]
fn a_reset_and_a_triple_fault_are_told_apart_and_are_no_success() {
    if !can_run("a_reset_and_a_triple_fault_are_told_apart_and_are_no_success") {
        return;
    }
    let reset = Vmm::of(&Code::default().outb(0x64, 0xfe).halt()).run();
    assert_eq!(reset.exit, Some(VmmExit::Reset), "{}", reset.stderr);
    let fault = Vmm::of(&Code::default().triple_fault()).run();
    assert_eq!(fault.exit, Some(VmmExit::TripleFault), "{}", fault.stderr);
    assert!(fault.stderr.contains("vCPU 0"), "{}", fault.stderr);
}

#[test]
fn ports_of_nobody_read_as_all_ones_and_string_output_keeps_its_order() {
    if !can_run("ports_of_nobody_read_as_all_ones_and_string_output_keeps_its_order") {
        return;
    }
    let mut code = Code::default()
        .echo_port(0x1234)
        .outsb(CODE + 0x80, 5)
        .power_off();
    code.0.resize(0x80, 0);
    code.0.extend(b"abcde");
    let ended = Vmm::of(&code).run();
    assert_eq!(ended.exit, Some(VmmExit::PowerOff), "{}", ended.stderr);
    assert_eq!(ended.serial, "\u{fffd}abcde", "0xff and the string");
    let report = ended.report.expect("a report");
    assert_eq!(report.userspace_exits.get("io:none"), Some(&1));
    assert_eq!(report.userspace_exits.get("io:serial"), Some(&6));
}

#[test]
fn sigterm_ends_a_guest_that_spins_and_one_that_sleeps() {
    if !can_run("sigterm_ends_a_guest_that_spins_and_one_that_sleeps") {
        return;
    }
    for code in [
        Code::default().print("up").spin(),
        Code::default().print("up").halt(),
    ] {
        let mut running = Vmm::of(&code).start();
        running.printed("up");
        running.signal(Signal::TERM);
        let ended = running.wait();
        assert_eq!(ended.exit, Some(VmmExit::Stopped), "{}", ended.stderr);
        assert!(ended.stderr.contains("SIGTERM"), "{}", ended.stderr);
    }
}

#[test]
fn more_vcpus_start_on_the_start_up_interrupt() {
    if !can_run("more_vcpus_start_on_the_start_up_interrupt") {
        return;
    }
    // Real-mode code at 0x8000 for the others: mov dx, 0x3f8; mov al, 'A'; out dx, al; hlt; jmp.
    let code = Code::default()
        .store32(0x8000, 0xb003_f8ba)
        .store32(0x8004, 0xebf4_ee41)
        .store32(0x8008, 0x0000_00fd)
        // The local APIC in x2APIC mode: spurious-interrupt vector, then INIT and start-up at 0x8000 for all others.
        .wrmsr(0x80f, 0x1ff)
        .wrmsr(0x830, 0x000c_4500)
        .wrmsr(0x830, 0x000c_4608)
        .halt();
    let mut vmm = Vmm::of(&code);
    vmm.cpus = 3;
    let mut running = vmm.start();
    running.printed("AA");
    running.signal(Signal::TERM);
    assert_eq!(running.wait().exit, Some(VmmExit::Stopped));
}
