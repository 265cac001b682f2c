//! The local APIC's interrupt pins as a firmware leaves them (SDM volume 3, 12.5.1; MultiProcessor
//! Specification 1.4, 3.6.2.2): LINT0 takes the PIC's interrupts, LINT1 is NMI.

use kvm_bindings::kvm_lapic_state;

const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVERY_EXTINT: u32 = 0x700;
const DELIVERY_NMI: u32 = 0x400;
/// The vector, delivery mode and mask bits; the rest of the entry is kept.
const ENTRY_MASK: u32 = 0x1_07ff;

/// Wires both pins of `state`.
pub fn wire_pins(state: &mut kvm_lapic_state) {
    change(state, LVT_LINT0, DELIVERY_EXTINT);
    change(state, LVT_LINT1, DELIVERY_NMI);
}

fn change(state: &mut kvm_lapic_state, register: usize, value: u32) {
    let mut bytes = [0; 4];
    for (to, from) in bytes.iter_mut().zip(&state.regs[register..register + 4]) {
        *to = *from as u8;
    }
    let kept = u32::from_le_bytes(bytes) & !ENTRY_MASK;
    for (to, from) in state.regs[register..register + 4]
        .iter_mut()
        .zip((kept | value).to_le_bytes())
    {
        *to = from as _;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lint0_becomes_extint_and_lint1_nmi_unmasked() {
        let mut state = kvm_lapic_state::default();
        state.regs[0x352] = 1; // masked, as after reset
        wire_pins(&mut state);
        assert_eq!(
            state.regs[0x350..0x354]
                .iter()
                .map(|b| *b as u8)
                .collect::<Vec<_>>(),
            [0, 7, 0, 0]
        );
        assert_eq!(
            state.regs[0x360..0x364]
                .iter()
                .map(|b| *b as u8)
                .collect::<Vec<_>>(),
            [0, 4, 0, 0]
        );
    }
}
