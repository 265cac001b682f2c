//! What an x86-64 guest finds when it starts: CPUID, registers, MSRs, the local APIC's pins, the MP table.
//! Pure functions; [`crate::kvm`] hands their results to KVM.

pub mod cpuid;
pub mod lapic;
pub mod mptable;
pub mod msr;
pub mod registers;
