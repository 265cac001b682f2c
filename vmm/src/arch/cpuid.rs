//! The CPU that the guest sees: what KVM supports on this host, less what a pod must not have, plus its place
//! among the VM's vCPUs and the clock frequencies that spare it a calibration.
//!
//! Topology: one socket, one thread per core; APIC ids are vCPU numbers.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// The local APIC timer of KVM counts at 1 GHz (`APIC_BUS_CYCLE_NS` of Linux's kvm).
const APIC_BUS_KHZ: u32 = 1_000_000;
/// Hypervisor leaf with TSC and APIC frequency (first of VMware, read by FreeBSD and others).
const HYPERVISOR_TIMING: u32 = 0x4000_0010;

const HYPERVISOR_BASE: u32 = 0x4000_0000;
const FEATURES: u32 = 0x1;
const CACHES_INTEL: u32 = 0x4;
const PERFORMANCE_MONITORING: u32 = 0xa;
const TOPOLOGY: u32 = 0xb;
const TSC_FREQUENCY: u32 = 0x15;
const CPU_FREQUENCY: u32 = 0x16;
const TOPOLOGY_V2: u32 = 0x1f;
const EXTENDED_FEATURES: u32 = 0x8000_0001;
const SIZES: u32 = 0x8000_0008;
const NESTED_SVM: u32 = 0x8000_000a;
const CACHES_AMD: u32 = 0x8000_001d;
const TOPOLOGY_AMD: u32 = 0x8000_001e;
const PERFORMANCE_AMD: u32 = 0x8000_0022;
const TOPOLOGY_AMD_V2: u32 = 0x8000_0026;

// Leaf 1.
const ECX_MONITOR: u32 = 1 << 3;
const ECX_VMX: u32 = 1 << 5;
const ECX_PDCM: u32 = 1 << 15;
const ECX_X2APIC: u32 = 1 << 21;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
// Leaf 0x8000_0001.
const ECX_CMP_LEGACY: u32 = 1 << 1;
const ECX_SVM: u32 = 1 << 2;
const ECX_PERF_CORE: u32 = 1 << 23;
const ECX_PERF_NB: u32 = 1 << 24;

/// What CPUID depends on beside the host.
#[derive(Clone, Copy, Debug)]
pub struct Cpu {
    /// Number of this vCPU, which is its APIC id.
    pub index: u8,
    /// How many there are, 1 to 32, those that come up later too.
    pub count: u8,
    /// Frequency of the guest's TSC, in kHz; 0 if KVM does not say.
    pub tsc_khz: u32,
    /// Whether KVM's local APIC has the TSC deadline timer.
    pub tsc_deadline: bool,
}

impl Cpu {
    /// Bits of an APIC id that number the cores.
    fn core_bits(self) -> u32 {
        u32::from(self.count).next_power_of_two().trailing_zeros()
    }
}

/// The leaves of one vCPU, from those that KVM supports.
pub fn for_cpu(supported: &[kvm_cpuid_entry2], cpu: Cpu) -> Vec<kvm_cpuid_entry2> {
    let intel = supported
        .iter()
        .find(|leaf| leaf.function == 0)
        .is_some_and(|leaf| leaf.ebx == u32::from_le_bytes(*b"Genu"));
    let replaced = [
        TOPOLOGY,
        TOPOLOGY_V2,
        TOPOLOGY_AMD_V2,
        TSC_FREQUENCY,
        CPU_FREQUENCY,
        HYPERVISOR_TIMING,
    ];
    let mut leaves: Vec<kvm_cpuid_entry2> = supported
        .iter()
        .filter(|leaf| !replaced.contains(&leaf.function))
        .map(|leaf| change(*leaf, cpu))
        .collect();
    leaves.extend(topology(cpu));
    raise_maximum(&mut leaves, 0, TOPOLOGY);
    if cpu.tsc_khz != 0 {
        if intel {
            leaves.extend(frequencies(cpu.tsc_khz));
            raise_maximum(&mut leaves, 0, CPU_FREQUENCY);
        }
        leaves.push(kvm_cpuid_entry2 {
            function: HYPERVISOR_TIMING,
            eax: cpu.tsc_khz,
            ebx: APIC_BUS_KHZ,
            ..kvm_cpuid_entry2::default()
        });
        raise_maximum(&mut leaves, HYPERVISOR_BASE, HYPERVISOR_TIMING);
    }
    leaves
}

/// Physical address bits of the guest's CPU.
pub fn physical_address_bits(leaves: &[kvm_cpuid_entry2]) -> u32 {
    leaves
        .iter()
        .find(|leaf| leaf.function == SIZES)
        .map_or(36, |leaf| leaf.eax & 0xff)
}

/// Family and features of leaf 1.
pub fn signature(leaves: &[kvm_cpuid_entry2]) -> super::mptable::CpuSignature {
    let leaf = leaves
        .iter()
        .find(|leaf| leaf.function == FEATURES)
        .copied()
        .unwrap_or_default();
    super::mptable::CpuSignature {
        signature: leaf.eax,
        features: leaf.edx,
    }
}

fn change(mut leaf: kvm_cpuid_entry2, cpu: Cpu) -> kvm_cpuid_entry2 {
    let (index, count) = (u32::from(cpu.index), u32::from(cpu.count));
    let several = |bit: u32| if count > 1 { bit } else { 0 };
    match leaf.function {
        FEATURES => {
            leaf.ebx = (leaf.ebx & 0xffff) | count << 16 | index << 24;
            leaf.ecx &= !(ECX_MONITOR | ECX_VMX | ECX_PDCM | ECX_TSC_DEADLINE);
            leaf.ecx |= ECX_HYPERVISOR | ECX_X2APIC;
            if cpu.tsc_deadline {
                leaf.ecx |= ECX_TSC_DEADLINE;
            }
            leaf.edx = (leaf.edx & !EDX_HTT) | several(EDX_HTT);
        }
        CACHES_INTEL if leaf.eax & 0x1f != 0 => {
            leaf.eax = (leaf.eax & !0xffff_c000)
                | cores_sharing(leaf.eax >> 5 & 7, count) << 14
                | ((1 << cpu.core_bits()) - 1) << 26;
        }
        // No performance counters: nothing of the host's to measure, and a template must not depend on them.
        PERFORMANCE_MONITORING | PERFORMANCE_AMD | NESTED_SVM => {
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (0, 0, 0, 0);
        }
        EXTENDED_FEATURES => {
            leaf.ecx &= !(ECX_SVM | ECX_PERF_CORE | ECX_PERF_NB | ECX_CMP_LEGACY);
            leaf.ecx |= several(ECX_CMP_LEGACY);
        }
        SIZES => leaf.ecx = cpu.core_bits() << 12 | (count - 1),
        CACHES_AMD if leaf.eax & 0x1f != 0 => {
            leaf.eax = (leaf.eax & !(0xfff << 14)) | cores_sharing(leaf.eax >> 5 & 7, count) << 14;
        }
        TOPOLOGY_AMD => (leaf.eax, leaf.ebx, leaf.ecx) = (index, index & 0xff, 0),
        _ => {}
    }
    leaf
}

/// Cores that share a cache of this level, less one: all share the last level, none the others.
fn cores_sharing(level: u32, count: u32) -> u32 {
    if level >= 3 {
        count.next_power_of_two() - 1
    } else {
        0
    }
}

fn topology(cpu: Cpu) -> [kvm_cpuid_entry2; 3] {
    let index = u32::from(cpu.index);
    let level = |number: u32, kind: u32, shift: u32, count: u32| kvm_cpuid_entry2 {
        function: TOPOLOGY,
        index: number,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: number | kind << 8,
        edx: index,
        ..kvm_cpuid_entry2::default()
    };
    [
        level(0, 1, 0, 1),
        level(1, 2, cpu.core_bits(), u32::from(cpu.count)),
        level(2, 0, 0, 0),
    ]
}

/// Leaves 0x15 and 0x16, so that the TSC is 1 GHz (the crystal, which also drives the APIC timer) times
/// `tsc_khz` / 1,000,000.
fn frequencies(tsc_khz: u32) -> [kvm_cpuid_entry2; 2] {
    [
        kvm_cpuid_entry2 {
            function: TSC_FREQUENCY,
            eax: APIC_BUS_KHZ,
            ebx: tsc_khz,
            ecx: APIC_BUS_KHZ * 1000,
            ..kvm_cpuid_entry2::default()
        },
        kvm_cpuid_entry2 {
            function: CPU_FREQUENCY,
            eax: tsc_khz / 1000,
            ebx: tsc_khz / 1000,
            ecx: 100,
            ..kvm_cpuid_entry2::default()
        },
    ]
}

/// Makes leaf `base` say that leaves up to `last` exist.
fn raise_maximum(leaves: &mut [kvm_cpuid_entry2], base: u32, last: u32) {
    if let Some(leaf) = leaves.iter_mut().find(|leaf| leaf.function == base) {
        leaf.eax = leaf.eax.max(last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: Cpu = Cpu {
        index: 2,
        count: 3,
        tsc_khz: 2_450_000,
        tsc_deadline: true,
    };

    fn leaf(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax,
            ebx,
            ecx,
            edx,
            ..kvm_cpuid_entry2::default()
        }
    }

    fn host(vendor: &[u8; 4]) -> Vec<kvm_cpuid_entry2> {
        vec![
            leaf(0, [0xd, u32::from_le_bytes(*vendor), 0, 0]),
            leaf(1, [0x80_0f12, 0x0702_0800, u32::MAX, u32::MAX]),
            leaf(4, [0xfc00_4121, 0, 0, 0]),
            leaf(0xa, [7, 7, 7, 7]),
            leaf(0xb, [0, 0, 0, 9]),
            leaf(0x4000_0000, [0x4000_0001, 0, 0, 0]),
            leaf(0x8000_0001, [0, 0, u32::MAX, 0]),
            leaf(0x8000_0008, [0x3030, 0, 0x703f, 0]),
            leaf(0x8000_000a, [1, 1, 1, 1]),
            leaf(0x8000_001d, [0x1c163, 0, 0, 0]),
            leaf(0x8000_001e, [9, 9, 9, 9]),
        ]
    }

    fn get(leaves: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let found: Vec<_> = leaves
            .iter()
            .filter(|leaf| leaf.function == function && leaf.index == index)
            .collect();
        assert_eq!(found.len(), 1, "leaf {function:#x}.{index}");
        *found[0]
    }

    #[test]
    fn leaf_1_has_the_apic_id_the_count_and_says_hypervisor() {
        let leaf = get(&for_cpu(&host(b"Auth"), CPU), 1, 0);
        assert_eq!(leaf.ebx, 0x0203_0800);
        assert_ne!(leaf.ecx & ECX_HYPERVISOR, 0);
        assert_ne!(leaf.ecx & ECX_TSC_DEADLINE, 0);
        assert_ne!(leaf.edx & EDX_HTT, 0);
        let no_deadline = Cpu {
            tsc_deadline: false,
            count: 1,
            index: 0,
            ..CPU
        };
        let leaf = get(&for_cpu(&host(b"Auth"), no_deadline), 1, 0);
        assert_eq!(leaf.ecx & ECX_TSC_DEADLINE, 0);
        assert_eq!(leaf.edx & EDX_HTT, 0);
    }

    #[test]
    fn neither_virtualization_nor_performance_counters_are_passed_on() {
        let leaves = for_cpu(&host(b"Auth"), CPU);
        assert_eq!(get(&leaves, 1, 0).ecx & ECX_VMX, 0);
        assert_eq!(
            get(&leaves, 0x8000_0001, 0).ecx & (ECX_SVM | ECX_PERF_CORE),
            0
        );
        assert_eq!(get(&leaves, 0x8000_000a, 0).eax, 0);
        assert_eq!(get(&leaves, 0xa, 0).eax, 0);
    }

    #[test]
    fn the_topology_is_one_socket_of_single_threaded_cores() {
        let leaves = for_cpu(&host(b"Auth"), CPU);
        let threads = get(&leaves, 0xb, 0);
        assert_eq!(
            (threads.eax, threads.ebx, threads.ecx, threads.edx),
            (0, 1, 0x100, 2)
        );
        let cores = get(&leaves, 0xb, 1);
        assert_eq!(
            (cores.eax, cores.ebx, cores.ecx, cores.edx),
            (2, 3, 0x201, 2)
        );
        assert_eq!(get(&leaves, 0xb, 2).ebx, 0);
        assert_eq!(get(&leaves, 0x8000_0008, 0).ecx, 0x2002);
        let amd = get(&leaves, 0x8000_001e, 0);
        assert_eq!((amd.eax, amd.ebx, amd.ecx), (2, 2, 0));
        assert_eq!(
            get(&leaves, 0x8000_001d, 0).eax >> 14 & 0xfff,
            3,
            "L3 is shared by all"
        );
    }

    #[test]
    fn intel_gets_the_crystal_leaves_and_amd_does_not() {
        let intel = for_cpu(&host(b"Genu"), CPU);
        let tsc = get(&intel, 0x15, 0);
        let hz = u64::from(tsc.ecx) * u64::from(tsc.ebx) / u64::from(tsc.eax);
        assert_eq!(hz, 2_450_000_000);
        assert_eq!(get(&intel, 0x16, 0).eax, 2450);
        assert_eq!(get(&intel, 0, 0).eax, 0x16);
        let amd = for_cpu(&host(b"Auth"), CPU);
        assert!(amd.iter().all(|leaf| leaf.function != 0x15));
        assert_eq!(get(&amd, 0, 0).eax, 0xd);
    }

    #[test]
    fn every_guest_reads_both_frequencies_from_the_hypervisor_leaf() {
        let leaves = for_cpu(&host(b"Auth"), CPU);
        let timing = get(&leaves, 0x4000_0010, 0);
        assert_eq!((timing.eax, timing.ebx), (2_450_000, 1_000_000));
        assert_eq!(get(&leaves, 0x4000_0000, 0).eax, 0x4000_0010);
        let unknown = Cpu { tsc_khz: 0, ..CPU };
        let leaves = for_cpu(&host(b"Auth"), unknown);
        assert_eq!(get(&leaves, 0x4000_0000, 0).eax, 0x4000_0001);
    }

    #[test]
    fn address_bits_and_signature_are_read_back() {
        assert_eq!(physical_address_bits(&host(b"Auth")), 48);
        assert_eq!(physical_address_bits(&[]), 36);
        assert_eq!(signature(&host(b"Auth")).signature, 0x80_0f12);
    }
}
