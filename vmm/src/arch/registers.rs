//! The first vCPU's registers: 32-bit protected mode, flat, without paging, as both boot protocols want it
//! (`include/xen/interface/hvm/start_info.h`, `Documentation/arch/x86/boot.rst`).
//!
//! KVM on Intel refuses to enter a guest whose state breaks the rules of the SDM, volume 3, section 27.3.1
//! "Checks on the Guest State Area"; KVM on AMD lets most of it pass. So every segment, TR, LDTR and both
//! descriptor tables are set here, and a test holds them against those rules.

use crate::boot::Entry;
use crate::layout;
use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

/// Selectors of Linux's boot protocol: `__BOOT_CS`, `__BOOT_DS`; behind them the task state segment.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;
/// Segment types (SDM volume 3, 3.4.5.1 and 3.5): all "accessed", or busy, as VMX wants them.
const CODE_READ: u8 = 0xb;
const DATA_WRITE: u8 = 0x3;
const TASK_32_BUSY: u8 = 0xb;
const CR0_PROTECTED: u64 = 1;
/// The extension type bit, always 1 on every CPU that runs this.
const CR0_EXTENSION_TYPE: u64 = 1 << 4;
const RFLAGS_RESERVED_ONE: u64 = 2;

fn flat(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: 1,
        s: 1,
        l: 0,
        g: 1,
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

fn task() -> kvm_segment {
    kvm_segment {
        limit: 0x67,
        selector: TASK_SELECTOR,
        type_: TASK_32_BUSY,
        present: 1,
        ..kvm_segment::default()
    }
}

/// Descriptor table entry of a segment (SDM volume 3, figure 3-8).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 {
        segment.limit >> 12
    } else {
        segment.limit
    });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    (limit & 0xffff) | access << 40 | (limit >> 16 & 0xf) << 48 | flags << 52
}

/// The GDT for [`layout::GDT_START`]: what the segment registers hold, by selector.
pub fn gdt() -> [u64; 5] {
    [
        0,
        0,
        descriptor(&flat(CODE_SELECTOR, CODE_READ)),
        descriptor(&flat(DATA_SELECTOR, DATA_WRITE)),
        descriptor(&task()),
    ]
}

/// Segments and control registers of the first vCPU; `fresh` is what KVM gave it (its APIC base is kept).
pub fn system(fresh: &kvm_sregs) -> kvm_sregs {
    let data = flat(DATA_SELECTOR, DATA_WRITE);
    kvm_sregs {
        cs: flat(CODE_SELECTOR, CODE_READ),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: task(),
        ldt: kvm_segment {
            unusable: 1,
            ..kvm_segment::default()
        },
        gdt: kvm_dtable {
            base: layout::GDT_START,
            limit: (size_of_val(&gdt()) - 1) as u16,
            ..kvm_dtable::default()
        },
        idt: kvm_dtable::default(),
        cr0: CR0_PROTECTED | CR0_EXTENSION_TYPE,
        cr2: 0,
        cr3: 0,
        cr4: 0,
        cr8: 0,
        efer: 0,
        apic_base: fresh.apic_base,
        interrupt_bitmap: [0; 4],
    }
}

/// General registers of the first vCPU: interrupts off, the direction flag clear, no stack (both protocols).
pub fn general(entry: &Entry) -> kvm_regs {
    kvm_regs {
        rip: entry.rip,
        rbx: entry.rbx,
        rsi: entry.rsi,
        rflags: RFLAGS_RESERVED_ONE,
        ..kvm_regs::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> kvm_sregs {
        system(&kvm_sregs {
            apic_base: 0xfee0_0900,
            cr3: 77,
            ..kvm_sregs::default()
        })
    }

    /// SDM volume 3, 27.3.1.2, for a usable segment outside virtual-8086 mode.
    fn limit_and_granularity_agree(segment: &kvm_segment) -> bool {
        let low_clear = segment.limit & 0xfff != 0xfff;
        let high_set = segment.limit & 0xfff0_0000 != 0;
        !(low_clear && segment.g == 1 || high_set && segment.g == 0)
    }

    #[test]
    fn control_registers_say_protected_mode_without_paging() {
        let state = state();
        assert_eq!(state.cr0 & 1, 1, "PE");
        assert_eq!(state.cr0 >> 31, 0, "PG");
        assert_eq!(
            (state.cr4, state.efer),
            (0, 0),
            "no PAE, no long mode (27.3.1.1)"
        );
        assert_eq!(state.apic_base, 0xfee0_0900, "KVM's own APIC base is kept");
    }

    #[test]
    fn the_code_segment_passes_the_checks_of_vmx() {
        let cs = state().cs;
        assert!(matches!(cs.type_, 9 | 11 | 13 | 15), "accessed code");
        assert_eq!((cs.s, cs.present, cs.dpl, cs.unusable), (1, 1, 0, 0));
        assert_eq!((cs.l, cs.db), (0, 1), "32-bit");
        assert!(limit_and_granularity_agree(&cs));
    }

    #[test]
    fn the_data_segments_pass_the_checks_of_vmx() {
        let state = state();
        for segment in [state.ss, state.ds, state.es, state.fs, state.gs] {
            assert!(matches!(segment.type_, 3 | 7), "accessed, writable data");
            assert_eq!((segment.s, segment.present, segment.unusable), (1, 1, 0));
            assert_eq!(
                segment.selector & 3,
                state.cs.selector & 3,
                "RPL of SS is that of CS"
            );
            assert_eq!(
                segment.dpl,
                (segment.selector & 3) as u8,
                "DPL of SS is its RPL"
            );
            assert!(limit_and_granularity_agree(&segment));
        }
    }

    #[test]
    fn tr_is_a_busy_32_bit_task_in_the_gdt_and_ldtr_is_unusable() {
        let state = state();
        assert_eq!(
            (state.tr.type_, state.tr.s, state.tr.present),
            (11, 0, 1),
            "27.3.1.2, TR"
        );
        assert_eq!(state.tr.unusable, 0);
        assert_eq!(state.tr.selector & 4, 0, "TI clear");
        assert!(limit_and_granularity_agree(&state.tr));
        assert_eq!(state.ldt.unusable, 1);
    }

    #[test]
    fn descriptor_tables_have_canonical_bases_and_16_bit_limits() {
        let state = state();
        assert!(state.gdt.base < 1 << 47 && state.idt.base < 1 << 47);
        assert_eq!(usize::from(state.gdt.limit) + 1, 5 * 8);
        assert!(u64::from(state.gdt.limit) < layout::GDT_BYTES);
        assert!(
            usize::from(state.tr.selector) + 7 <= usize::from(state.gdt.limit),
            "TR's descriptor is inside the GDT"
        );
    }

    #[test]
    fn the_gdt_holds_what_the_boot_protocol_wants_at_its_selectors() {
        let gdt = gdt();
        assert_eq!(
            gdt[2], 0x00cf_9b00_0000_ffff,
            "__BOOT_CS: flat, execute, read"
        );
        assert_eq!(
            gdt[3], 0x00cf_9300_0000_ffff,
            "__BOOT_DS: flat, read, write"
        );
        assert_eq!(gdt[4], 0x0000_8b00_0000_0067, "TSS");
    }

    #[test]
    fn rflags_pass_the_checks_of_vmx() {
        let regs = general(&Entry {
            rip: 0x10_0000,
            rbx: 1,
            rsi: 2,
        });
        assert_eq!(
            regs.rflags, 2,
            "bit 1 set, IF, VM and reserved bits clear (27.3.1.4)"
        );
        assert!(
            regs.rip <= u64::from(u32::MAX),
            "a 32-bit guest has a 32-bit RIP"
        );
        assert_eq!((regs.rbx, regs.rsi), (1, 2));
    }
}
