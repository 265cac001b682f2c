//! Model-specific registers that a firmware would have set; all others are as KVM resets them.

use crate::layout;
use kvm_bindings::kvm_msr_entry;

/// Address and mode of the local APIC (SDM volume 3, 12.4.4 and 12.12.1).
const APIC_BASE: u32 = 0x1b;
const APIC_BOOT_PROCESSOR: u64 = 1 << 8;
const APIC_X2APIC: u64 = 1 << 10;
const APIC_ENABLED: u64 = 1 << 11;
const MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, default type write-back: all memory is cached without a single range register.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// The MSRs of every vCPU; `first` is the one that starts the others. The local APIC is in x2APIC mode already: Linux leaves the mode as
/// it finds it where there is no I/O APIC (`enable_IR_x2apic`), and in xAPIC mode each end of interrupt is a page fault and an instruction
/// to emulate, where KVM has no hardware that does it.
pub fn boot(first: bool) -> [kvm_msr_entry; 3] {
    let mode = APIC_ENABLED | APIC_X2APIC | if first { APIC_BOOT_PROCESSOR } else { 0 };
    [
        entry(APIC_BASE, layout::LOCAL_APIC | mode),
        entry(MISC_ENABLE, MISC_ENABLE_FAST_STRINGS),
        entry(MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
    ]
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_apic_is_in_x2apic_mode_and_one_is_the_boot_processor_s() {
        assert_eq!(
            [boot(true)[0], boot(false)[0]].map(|entry| (entry.index, entry.data)),
            [(0x1b, 0xfee0_0d00), (0x1b, 0xfee0_0c00)]
        );
    }
}
