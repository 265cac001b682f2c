//! Tests of the state machine; see `state.rs`.

use super::*;
use proptest::prelude::*;

const OFFERED: u64 = 1 << 32 | 1 << 28 | 1 << 29 | 1 << 3;

fn device() -> DeviceState {
    DeviceState::new(OFFERED, &[256, 64], 3)
}

fn write(state: &mut DeviceState, offset: u64, width: usize, value: u64) -> Effect {
    state.write_common(offset, &value.to_le_bytes()[..width])
}

fn read(state: &DeviceState, offset: u64, width: usize) -> u64 {
    let mut data = [0; 8];
    state.read_common(offset, &mut data[..width]);
    u64::from_le_bytes(data)
}

fn set_features(state: &mut DeviceState, features: u64) {
    for select in 0..2 {
        write(state, DRIVER_FEATURE_SELECT, 4, select);
        write(
            state,
            DRIVER_FEATURE,
            4,
            features >> (32 * select) & 0xffff_ffff,
        );
    }
}

/// A device whose features are agreed.
fn agreed() -> DeviceState {
    let mut state = device();
    write(&mut state, STATUS, 1, 1);
    write(&mut state, STATUS, 1, 3);
    set_features(&mut state, 1 << 32);
    write(&mut state, STATUS, 1, 0x0b);
    assert_eq!(state.status(), 0x0b);
    state
}

fn live() -> DeviceState {
    let mut state = agreed();
    write(&mut state, QUEUE_SIZE, 2, 16);
    write(&mut state, QUEUE_DESC, 8, 0x1000);
    write(&mut state, QUEUE_ENABLE, 2, 1);
    assert_eq!(write(&mut state, STATUS, 1, 0x0f), Effect::Activate);
    state
}

#[test]
fn a_driver_that_follows_the_order_gets_to_driver_ok() {
    let state = live();
    assert_eq!(state.status(), 0x0f);
    assert_eq!(state.refused(), 0);
    assert!(state.live());
    assert_eq!(state.queues()[0].size, 16);
}

#[test]
fn status_bits_come_one_by_one_and_are_never_taken_back() {
    // Every status against every write: what is not listed leaves the status as it was.
    let legal = [(0u8, 1u8), (1, 3), (3, 0x0b), (0x0b, 0x0f)];
    for old in [0u8, 1, 3, 0x0b, 0x0f] {
        for value in 1..=0xffu8 {
            let mut state = device();
            state.driver_features = 1 << 32;
            state.status = old;
            write(&mut state, STATUS, 1, u64::from(value));
            let new = value & !0x40;
            let expected = if legal.contains(&(old, new)) || new == old | 0x80 {
                new
            } else {
                old
            };
            assert_eq!(state.status(), expected, "{old:#x} <- {value:#x}");
        }
    }
}

#[test]
fn features_are_a_subset_with_version_1_or_features_ok_is_not_set() {
    for (features, ok) in [
        (1u64 << 32, true),
        (OFFERED, true),
        (0, false),
        (1 << 3, false),
        (1 << 32 | 1 << 5, false),
        (u64::MAX, false),
    ] {
        let mut state = device();
        write(&mut state, STATUS, 1, 1);
        write(&mut state, STATUS, 1, 3);
        set_features(&mut state, features);
        write(&mut state, STATUS, 1, 0x0b);
        assert_eq!(state.status() == 0x0b, ok, "{features:#x}");
    }
}

#[test]
fn a_feature_beyond_bit_63_is_refused() {
    let mut state = device();
    write(&mut state, STATUS, 1, 1);
    write(&mut state, STATUS, 1, 3);
    set_features(&mut state, 1 << 32);
    write(&mut state, DRIVER_FEATURE_SELECT, 4, 2);
    write(&mut state, DRIVER_FEATURE, 4, 1);
    write(&mut state, STATUS, 1, 0x0b);
    assert_eq!(state.status(), 3);
}

#[test]
fn features_are_frozen_outside_the_negotiation() {
    for mut state in [device(), agreed(), live()] {
        let before = state.features();
        set_features(&mut state, 1 << 3);
        assert_eq!(state.features(), before);
        assert!(state.refused() > 0);
    }
}

#[test]
fn queue_settings_are_frozen_from_driver_ok_until_a_completed_reset() {
    // B2.2, CVE-2026-5747.
    let mut state = live();
    let before = state.queues().to_vec();
    for queue in 0..2 {
        write(&mut state, QUEUE_SELECT, 2, queue);
        for offset in [QUEUE_SIZE, QUEUE_ENABLE] {
            write(&mut state, offset, 2, 32);
            write(&mut state, offset, 2, 1);
        }
        for offset in (QUEUE_DESC..QUEUE_DEVICE + 8).step_by(4) {
            write(&mut state, offset, 4, 0x2000);
        }
        for offset in (QUEUE_DESC..QUEUE_DEVICE + 8).step_by(8) {
            write(&mut state, offset, 8, 0x2000);
        }
    }
    assert_eq!(state.queues(), before);
    assert_eq!(
        write(&mut state, STATUS, 1, 0),
        Effect::Reset { active: true }
    );
    assert_eq!(state.queues(), before);
    assert_eq!(state.status(), 0x0f);
    state.finish_reset(true);
    assert_eq!(state.status(), 0);
    assert_eq!(state.queues(), device().queues());
}

#[test]
fn an_enabled_queue_is_frozen_and_stays_enabled() {
    let mut state = agreed();
    write(&mut state, QUEUE_ENABLE, 2, 1);
    let before = state.queues().to_vec();
    write(&mut state, QUEUE_ENABLE, 2, 0);
    write(&mut state, QUEUE_SIZE, 2, 8);
    write(&mut state, QUEUE_DESC, 8, 0x4000);
    assert_eq!(state.queues(), before);
}

#[test]
fn a_size_that_is_no_power_of_two_or_too_large_is_dropped() {
    let mut state = agreed();
    for size in [0u64, 3, 257, 512, 0x8000, 0x8001, 0xffff] {
        write(&mut state, QUEUE_SIZE, 2, size);
        assert_eq!(read(&state, QUEUE_SIZE, 2), 256);
    }
    write(&mut state, QUEUE_SIZE, 2, 1);
    assert_eq!(read(&state, QUEUE_SIZE, 2), 1);
}

#[test]
fn a_reset_that_failed_is_failed_for_ever() {
    // B2.3, FC dcdcd800d.
    let mut state = live();
    write(&mut state, STATUS, 1, 0);
    state.finish_reset(false);
    for value in 0..=0xff {
        assert_eq!(write(&mut state, STATUS, 1, value), Effect::None);
        assert_eq!(state.status(), status::FAILED);
    }
}

#[test]
fn a_driver_that_failed_may_only_reset() {
    let mut state = live();
    write(&mut state, STATUS, 1, 0x8f);
    assert_eq!(state.status(), 0x8f);
    assert_eq!(write(&mut state, STATUS, 1, 0x0f), Effect::None);
    assert_eq!(state.status(), 0x8f);
    assert_eq!(
        write(&mut state, STATUS, 1, 0),
        Effect::Reset { active: true }
    );
}

#[test]
fn needs_reset_is_said_once_and_only_a_reset_mends_it() {
    let mut state = live();
    write(&mut state, CONFIG_VECTOR, 2, 1);
    assert_eq!(state.needs_reset(), Some(1));
    assert_eq!(state.needs_reset(), None);
    assert_eq!(state.status(), 0x4f);
    assert_eq!(state.take_isr(), ISR_CONFIG);
    write(&mut state, STATUS, 1, 0x0f);
    assert_eq!(state.status(), 0x4f);
    write(&mut state, STATUS, 1, 0);
    state.finish_reset(true);
    assert_eq!(state.status(), 0);
}

#[test]
fn a_queue_that_is_not_there_has_size_0_and_no_vector() {
    // B2.7, CH#7917.
    let mut state = agreed();
    for select in [2u64, 3, 0x7fff, 0xffff] {
        write(&mut state, QUEUE_SELECT, 2, select);
        assert_eq!(read(&state, QUEUE_SIZE, 2), 0);
        assert_eq!(read(&state, QUEUE_VECTOR, 2), 0xffff);
        for offset in 0..COMMON_BYTES as u64 {
            if offset != STATUS && offset != QUEUE_SELECT {
                for width in [1, 2, 4, 8] {
                    write(&mut state, offset, width, 0);
                }
            }
        }
    }
}

#[test]
fn a_vector_beyond_the_table_is_no_vector() {
    let mut state = device();
    for (vector, kept) in [(0u64, 0u64), (2, 2), (3, 0xffff), (0xfffe, 0xffff)] {
        write(&mut state, CONFIG_VECTOR, 2, vector);
        write(&mut state, QUEUE_VECTOR, 2, vector);
        assert_eq!(read(&state, CONFIG_VECTOR, 2), kept);
        assert_eq!(read(&state, QUEUE_VECTOR, 2), kept);
    }
}

#[test]
fn a_field_is_written_in_its_own_width_and_read_in_any() {
    // B2.8.
    let mut state = agreed();
    write(&mut state, QUEUE_DESC, 8, 0x1122_3344_5566_7788);
    let before = state.queues().to_vec();
    for (offset, width) in [
        (QUEUE_DESC, 1),
        (QUEUE_DESC, 2),
        (QUEUE_DESC + 1, 4),
        (QUEUE_DESC + 4, 8),
        (QUEUE_SIZE, 1),
        (QUEUE_SIZE, 4),
        (QUEUE_SIZE + 1, 2),
        (STATUS, 2),
        (STATUS - 1, 2),
    ] {
        write(&mut state, offset, width, 0x0202_0202_0202_0202);
    }
    assert_eq!(state.queues(), before);
    assert_eq!(state.status(), 0x0b);
    assert_eq!(state.refused(), 9);
    assert_eq!(read(&state, QUEUE_DESC, 4), 0x5566_7788);
    assert_eq!(read(&state, QUEUE_DESC + 3, 2), 0x4455);
    assert_eq!(read(&state, COMMON_BYTES as u64 - 1, 8), 0);
    assert_eq!(read(&state, u64::MAX, 8), 0);
    write(&mut state, QUEUE_DESC + 4, 4, 1);
    assert_eq!(read(&state, QUEUE_DESC, 8), 0x1_5566_7788);
}

#[test]
fn a_configuration_change_counts_the_generation() {
    let mut state = live();
    assert_eq!(read(&state, GENERATION, 1), 0);
    state.config_changed();
    assert_eq!(read(&state, GENERATION, 1), 1);
    assert_eq!(state.take_isr(), ISR_CONFIG);
    assert_eq!(state.take_isr(), 0);
}

/// What must hold after any history.
fn invariants(state: &DeviceState, before: &DeviceState) -> Result<(), TestCaseError> {
    let bits = state.status & !status::NEEDS_RESET & !status::FAILED;
    prop_assert!([0, 1, 3, 0x0b, 0x0f].contains(&bits));
    prop_assert!(!state.active || state.dead || bits == 0x0f);
    if bits >= 0x0b {
        prop_assert_eq!(state.driver_features & !state.offered, 0);
        prop_assert!(state.driver_features >> 32 & 1 == 1);
    }
    for (queue, old) in state.queues.iter().zip(&before.queues) {
        prop_assert!(queue.size.is_power_of_two() && queue.size <= queue.max_size);
        prop_assert!(queue.vector == NO_VECTOR || queue.vector < state.vectors);
        if before.active && state.active {
            let unvectored = QueueSettings {
                vector: old.vector,
                ..queue.clone()
            };
            prop_assert_eq!(&unvectored, old);
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn no_sequence_of_status_writes_breaks_an_invariant(
        writes in proptest::collection::vec(prop_oneof![
            Just(0u8), Just(1), Just(3), Just(0x0b), Just(0x0f), Just(0x4f), Just(0x80), any::<u8>()
        ], 0..7),
        resets_work in any::<bool>(),
    ) {
        let mut state = device();
        for value in writes {
            if state.status == 3 {
                set_features(&mut state, 1 << 32);
            }
            let before = state.clone();
            if let Effect::Reset { .. } = write(&mut state, STATUS, 1, u64::from(value)) {
                state.finish_reset(resets_work);
            }
            invariants(&state, &before)?;
            // Bits are only added but by a reset that worked.
            prop_assert!(value == 0 || before.status & !state.status == 0);
        }
    }

    #[test]
    fn no_access_of_any_width_and_offset_panics_or_breaks_an_invariant(
        accesses in proptest::collection::vec(
            (prop_oneof![0u64..0x48, any::<u64>()], 0usize..9, prop_oneof![0u64..0x100, any::<u64>()]), 0..200),
    ) {
        let mut state = agreed();
        for (offset, width, value) in accesses {
            let before = state.clone();
            if let Effect::Reset { .. } = write(&mut state, offset, width, value) {
                state.finish_reset(true);
            }
            read(&state, offset, width);
            invariants(&state, &before)?;
        }
    }
}
