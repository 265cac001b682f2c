//! Tests of MSI-X: routes, masks and pending bits, see `msix.rs`.

use super::*;
use crate::testing::FakeRoutes;
use proptest::prelude::*;

const MASK: u8 = CONTROL_HIGH_MASK;
const ENABLE: u8 = CONTROL_HIGH_ENABLE;

fn table() -> (Msix, Arc<FakeRoutes>) {
    let routes = Arc::new(FakeRoutes::default());
    (Msix::new(3, routes.clone()), routes)
}

fn set(msix: &mut Msix, vector: u64, data: u32, control: u32) {
    for (word, value) in [0xfee0_1000, 0, data, control].into_iter().enumerate() {
        msix.write_table(16 * vector + 4 * word as u64, &value.to_le_bytes());
    }
}

fn pending(msix: &Msix) -> u64 {
    let mut bytes = [0; 8];
    msix.read_pending(0, &mut bytes);
    u64::from_le_bytes(bytes)
}

const MESSAGE: MsiMessage = MsiMessage {
    address: 0xfee0_1000,
    data: 7,
};

#[test]
fn an_unmasked_vector_is_routed_and_delivered_at_once() {
    let (mut msix, routes) = table();
    msix.set_control(ENABLE);
    set(&mut msix, 1, 7, 0);
    assert_eq!(routes.updates(), [(1, Some(MESSAGE))]);
    msix.trigger(1);
    assert_eq!((routes.triggers(1), pending(&msix)), (1, 0));
}

#[test]
fn linux_sets_a_vector_up_with_one_change_of_route() {
    // msix_setup_interrupts and the unmasking at request_irq, drivers/pci/msi: enable with the function masked,
    // mask each entry, write the message, unmask the function, unmask the entry.
    let (mut msix, routes) = table();
    msix.set_control(ENABLE | MASK);
    set(&mut msix, 0, 7, 1);
    msix.set_control(ENABLE);
    assert!(routes.updates().is_empty());
    msix.write_table(12, &0u32.to_le_bytes());
    assert_eq!(routes.updates(), [(0, Some(MESSAGE))]);
}

#[test]
fn what_comes_while_masked_is_pending_and_delivered_once_on_unmask() {
    for function in [false, true] {
        let (mut msix, routes) = table();
        msix.set_control(ENABLE | if function { MASK } else { 0 });
        set(&mut msix, 2, 7, u32::from(!function));
        msix.trigger(2);
        msix.trigger(2);
        assert_eq!((routes.total(), pending(&msix)), (0, 0b100));
        if function {
            msix.set_control(ENABLE);
        } else {
            set(&mut msix, 2, 7, 0);
        }
        assert_eq!((routes.triggers(2), pending(&msix)), (1, 0));
    }
}

#[test]
fn a_changed_message_changes_the_route_before_the_next_interrupt() {
    let (mut msix, routes) = table();
    msix.set_control(ENABLE);
    set(&mut msix, 0, 7, 0);
    set(&mut msix, 0, 7, 1);
    msix.trigger(0);
    set(&mut msix, 0, 8, 1);
    assert_eq!(routes.updates().len(), 1);
    set(&mut msix, 0, 8, 0);
    let changed = MsiMessage { data: 8, ..MESSAGE };
    assert_eq!(routes.updates().last(), Some(&(0, Some(changed))));
    assert_eq!(routes.triggers(0), 1);
}

#[test]
fn a_disabled_function_gives_its_routes_back_and_is_silent() {
    let (mut msix, routes) = table();
    msix.set_control(ENABLE);
    set(&mut msix, 0, 7, 0);
    msix.set_control(0);
    assert_eq!(routes.updates(), [(0, Some(MESSAGE)), (0, None)]);
    msix.trigger(0);
    assert_eq!((routes.total(), pending(&msix)), (0, 0));
    msix.set_control(ENABLE);
    assert_eq!(routes.total(), 0);
    msix.trigger(0);
    assert_eq!(routes.triggers(0), 1);
}

#[test]
fn a_vector_without_a_route_stays_pending_until_there_is_one() {
    let (mut msix, routes) = table();
    routes.refuse(true);
    msix.set_control(ENABLE);
    set(&mut msix, 0, 7, 0);
    msix.trigger(0);
    assert_eq!(pending(&msix), 1);
    routes.refuse(false);
    set(&mut msix, 0, 7, 0);
    assert_eq!((routes.triggers(0), pending(&msix)), (1, 0));
}

#[test]
fn a_vector_that_is_not_there_does_nothing() {
    // B2.7, V12.
    let (mut msix, routes) = table();
    msix.set_control(ENABLE);
    for vector in [3u16, 255, 0xfffe, 0xffff] {
        msix.trigger(vector);
    }
    set(&mut msix, 3, 7, 0);
    assert_eq!((routes.total(), routes.updates().len()), (0, 0));
    let mut data = [0xaa; 8];
    msix.read_table(48, &mut data);
    assert_eq!(data, [0; 8]);
    msix.read_table(u64::MAX - 7, &mut data);
    assert_eq!(data, [0; 8]);
}

#[test]
fn the_table_takes_aligned_dwords_and_qwords_and_reads_in_any_width() {
    // B2.8, V12: a write of size 3.
    let (mut msix, _) = table();
    let before = msix.state().clone();
    for (offset, width) in [(0, 1), (0, 2), (0, 3), (2, 4), (4, 8), (1, 1), (0, 0)] {
        msix.write_table(offset, &vec![0xff; width]);
    }
    assert_eq!(msix.state(), &before);
    msix.write_table(16, &0x1122_3344_5566_7788u64.to_le_bytes());
    let mut data = [0; 8];
    msix.read_table(16, &mut data);
    assert_eq!(u64::from_le_bytes(data), 0x1122_3344_5566_7788);
    let mut data = [0; 2];
    msix.read_table(19, &mut data);
    assert_eq!(data, [0x55, 0x44]);
}

#[test]
fn only_the_mask_bit_of_vector_control_exists() {
    let (mut msix, _) = table();
    msix.write_table(12, &[0xff; 4]);
    let mut data = [0; 4];
    msix.read_table(12, &mut data);
    assert_eq!(data, [1, 0, 0, 0]);
}

#[test]
fn the_capability_names_size_and_places() {
    let (msix, _) = table();
    let body = msix.capability(0, 0x4000, 0x5000);
    assert_eq!(body, [2, 0, 0, 0x40, 0, 0, 0, 0x50, 0, 0]);
}

proptest! {
    #[test]
    fn no_history_loses_an_interrupt_or_sends_one_while_masked(
        steps in proptest::collection::vec((0u8..5, 0u64..60, any::<u64>()), 0..200)
    ) {
        let (mut msix, routes) = table();
        for (step, offset, value) in steps {
            let sent = routes.total();
            let open = |msix: &Msix, vector: usize| {
                msix.state.enabled
                    && !msix.state.function_masked
                    && !msix.state.entries[vector].masked()
            };
            match step {
                0 => msix.write_table(offset & !3, &(value as u32).to_le_bytes()),
                1 => msix.write_table(offset & !7, &value.to_le_bytes()),
                2 => msix.set_control(value as u8 & CONTROL_HIGH_WRITABLE),
                _ => {
                    let vector = (value % 3) as usize;
                    let (was_open, enabled) = (open(&msix, vector), msix.state.enabled);
                    msix.trigger(vector as u16);
                    prop_assert_eq!(routes.total() - sent, usize::from(was_open));
                    prop_assert_eq!(msix.state.entries[vector].pending, enabled && !was_open);
                }
            }
            for vector in 0..3 {
                // Nothing that may go out stays.
                prop_assert!(!(open(&msix, vector) && msix.state.entries[vector].pending));
            }
        }
    }
}
