//! Model-specific registers that a firmware would have set; all others are as KVM resets them.

use kvm_bindings::kvm_msr_entry;

const MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, default type write-back: all memory is cached without a single range register.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// The MSRs of every vCPU.
pub fn boot() -> [kvm_msr_entry; 2] {
    [
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
