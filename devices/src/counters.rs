//! What a device counts, from its first day on and always: numbers that only grow, read by anybody at any time.
//!
//! Adding is one instruction and takes no lock, so that nothing is gained by not counting.

use std::sync::atomic::{AtomicU64, Ordering};

/// One number.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// So many more; beyond 2^64 it begins again, after some centuries of bytes.
    pub fn add(&self, more: u64) {
        // Nobody concludes from one number on another, so their order does not matter.
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// The number so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counters of one device, kept over its resets.
pub trait Counters: Send + Sync {
    /// Each with its name.
    fn read(&self) -> Vec<(&'static str, u64)>;
}

/// Of a device that counts nothing.
impl Counters for () {
    fn read(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// Declares the counters of a device: a struct of [`Counter`]s, which are read by the names of their fields.
macro_rules! counters {
    ($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Default)]
        pub(super) struct $name {
            $($(#[$field_doc])* pub(super) $field: $crate::counters::Counter,)*
        }

        impl $crate::counters::Counters for $name {
            fn read(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($field), self.$field.get()),)*]
            }
        }
    };
}

pub(crate) use counters;

#[cfg(test)]
mod tests {
    use super::Counters;

    counters! {
        /// For the test.
        Two {
            /// The first.
            first,
            /// The second.
            second,
        }
    }

    #[test]
    fn counters_are_read_by_the_names_of_their_fields() {
        let two = Two::default();
        two.second.add(3);
        two.second.add(4);
        assert_eq!(two.read(), [("first", 0), ("second", 7)]);
    }
}
