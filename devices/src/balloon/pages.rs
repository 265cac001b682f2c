//! Page frame numbers, as the driver names pages, to ranges of memory.

use std::ops::Range;

/// Size of a page of the balloon, whatever the guest's are (section 5.5.6), in bytes.
pub(super) const PAGE_BYTES: u64 = 4096;

/// The guest-physical ranges of these pages, in ascending order, neighbours together and each page once: giving pages back costs a call
/// for each range.
pub(super) fn ranges(mut frames: Vec<u32>) -> Vec<Range<u64>> {
    frames.sort_unstable();
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for frame in frames {
        let start = u64::from(frame) * PAGE_BYTES;
        let end = start + PAGE_BYTES;
        match ranges.last_mut() {
            Some(last) if start <= last.end => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn neighbours_in_any_order_are_one_range() {
        let one = ranges(vec![5, 3, 4]);
        assert_eq!((one.len(), &one[0]), (1, &(0x3000..0x6000)));
        assert_eq!(ranges(vec![7, 7, 1]), [0x1000..0x2000, 0x7000..0x8000]);
        assert_eq!(ranges(Vec::new()), []);
    }

    #[test]
    fn the_last_frame_there_can_be_is_no_overflow() {
        let start = u64::from(u32::MAX) << 12;
        let last = ranges(vec![u32::MAX]);
        assert_eq!((last.len(), &last[0]), (1, &(start..start + 4096)));
    }

    proptest! {
        #[test]
        fn ranges_are_exactly_the_pages_named(frames in proptest::collection::vec(0u32..200, 0..100)) {
            let ranges = ranges(frames.clone());
            let named: BTreeSet<u64> = frames.iter().map(|frame| u64::from(*frame) << 12).collect();
            let covered: Vec<u64> = ranges.iter().flat_map(|range| range.clone().step_by(4096)).collect();
            prop_assert_eq!(covered, named.into_iter().collect::<Vec<_>>());
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
        }
    }
}
