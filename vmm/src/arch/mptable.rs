//! The MP table (MultiProcessor Specification 1.4, section 4): how a guest without ACPI finds its CPUs.
//!
//! One bus (ISA) and the two pins of the local APICs. PCI devices interrupt by MSI-X alone and appear in no table. No IOAPIC,
//! though KVM has one: a guest that were told of it would set up its 24 pins, which is 870 exits and a tenth of the time to the
//! agent's first sign. The one line in use, the serial port's, comes by the 8259 through the first CPU's LINT0, as at power-on.

use crate::layout;

const FLOATING_BYTES: usize = 16;
const HEADER_BYTES: usize = 44;
const REVISION_1_4: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const CPU_ENABLED: u8 = 1;
const CPU_BOOTS: u8 = 2;
const BUS_ISA: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;
/// "All local APICs".
const EVERY_APIC: u8 = 0xff;

/// What the CPU entries repeat from CPUID leaf 1.
#[derive(Clone, Copy, Debug)]
pub struct CpuSignature {
    /// EAX: family, model, stepping.
    pub signature: u32,
    /// EDX: features.
    pub features: u32,
}

/// The table for `cpus` CPUs (1 to 32) with APIC ids from 0, to be placed at [`layout::MP_TABLE`].
///
/// # Panics
/// If the table does not fit its place, which the test below excludes.
pub fn table(cpus: u8, cpu: CpuSignature) -> Vec<u8> {
    let mut entries = Vec::new();
    for id in 0..cpus {
        processor(&mut entries, id, cpu);
    }
    entries.extend([1, BUS_ISA]);
    entries.extend(b"ISA   ");
    local_interrupt(&mut entries, INTERRUPT_EXTINT, (0, 0));
    local_interrupt(&mut entries, INTERRUPT_NMI, (EVERY_APIC, 1));
    let count = u16::from(cpus) + 3;

    let mut table = floating_pointer();
    table.extend(header(&entries, count));
    table.extend(entries);
    assert!(table.len() <= layout::MP_TABLE_BYTES as usize);
    table
}

fn processor(to: &mut Vec<u8>, id: u8, cpu: CpuSignature) {
    let boots = if id == 0 { CPU_BOOTS } else { 0 };
    to.extend([0, id, APIC_VERSION, CPU_ENABLED | boots]);
    to.extend(cpu.signature.to_le_bytes());
    to.extend(cpu.features.to_le_bytes());
    to.extend([0; 8]);
}

/// A local interrupt entry with polarity and trigger of its bus.
fn local_interrupt(to: &mut Vec<u8>, kind: u8, (apic, pin): (u8, u8)) {
    to.extend([4, kind, 0, 0, BUS_ISA, 0, apic, pin]);
}

fn floating_pointer() -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend((layout::MP_TABLE as u32 + FLOATING_BYTES as u32).to_le_bytes());
    // Length in paragraphs, revision, checksum to come, a configuration table is present, no IMCR.
    bytes.extend([1, REVISION_1_4, 0, 0, 0, 0, 0, 0]);
    bytes[10] = checksum(&bytes);
    bytes
}

fn header(entries: &[u8], count: u16) -> Vec<u8> {
    let mut bytes = b"PCMP".to_vec();
    bytes.extend(((HEADER_BYTES + entries.len()) as u16).to_le_bytes());
    bytes.extend([REVISION_1_4, 0]);
    bytes.extend(b"CAPSID  MICROVM     ");
    bytes.extend([0; 6]); // no OEM table
    bytes.extend(count.to_le_bytes());
    bytes.extend((layout::LOCAL_APIC as u32).to_le_bytes());
    bytes.extend([0; 4]); // no extended table
    let sum = checksum(&bytes).wrapping_add(checksum(entries));
    bytes[7] = sum;
    bytes
}

/// The byte that makes the sum of all bytes 0.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CPU: CpuSignature = CpuSignature {
        signature: 0x0080_0f12,
        features: 0x178b_fbff,
    };

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn both_structures_add_up_to_zero_and_fit_for_every_number_of_cpus() {
        for cpus in 1..=32 {
            let table = table(cpus, CPU);
            assert_eq!(sum(&table[..16]), 0, "{cpus} cpus");
            assert_eq!(sum(&table[16..]), 0, "{cpus} cpus");
            assert!(table.len() <= 1024, "{cpus} cpus: {} bytes", table.len());
        }
    }

    #[test]
    fn the_length_and_the_count_are_those_of_the_entries() {
        let table = table(32, CPU);
        let length = u16::from_le_bytes([table[20], table[21]]);
        assert_eq!(usize::from(length), table.len() - 16);
        let count = u16::from_le_bytes([table[16 + 34], table[16 + 35]]);
        let mut entries = &table[60..];
        let mut seen = 0;
        while let Some(kind) = entries.first() {
            entries = &entries[if *kind == 0 { 20 } else { 8 }..];
            seen += 1;
        }
        assert_eq!(seen, count);
    }

    #[test]
    fn only_the_first_cpu_boots_and_takes_the_interrupts_of_the_8259() {
        let table = table(3, CPU);
        let cpus: Vec<(u8, u8)> = table[60..]
            .chunks(20)
            .take(3)
            .map(|cpu| (cpu[1], cpu[3]))
            .collect();
        assert_eq!(cpus, [(0, 3), (1, 1), (2, 1)]);
        let pins = &table[60 + 3 * 20 + 8..];
        assert_eq!(pins, [4, 3, 0, 0, 0, 0, 0, 0, 4, 1, 0, 0, 0, 0, 0xff, 1]);
    }

    #[test]
    fn the_pointer_points_behind_itself() {
        let table = table(1, CPU);
        assert_eq!(&table[..4], b"_MP_");
        assert_eq!(
            u32::from_le_bytes([table[4], table[5], table[6], table[7]]),
            0x9_fc10
        );
        assert_eq!(&table[16..20], b"PCMP");
    }
}
