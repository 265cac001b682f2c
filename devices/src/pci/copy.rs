//! A copy of configuration space in guest memory, for a guest's kernel that knows of it: it reads there what would be two exits
//! for each register by the ports, some 600 times for four functions.
//!
//! The VMM writes the copy and never reads it, so that a guest that writes there misleads itself alone. It says what the functions say by
//! the time that the access which changed them is over. What a read would do beside (the window of a virtio function, virtio 1.2 section
//! 4.1.4.9) needs the ports. The kernel's side: `guest-kernel/objects/direct.h`.

use super::config::CONFIG_BYTES;
use super::root::{FUNCTIONS, SLOTS};
use crate::memory::{self, GuestMemory, NotMemory};

/// Guest-physical address of the mark that says that there is a copy.
pub const COPY_MARK: u64 = 0xd_fff8;
/// Guest-physical address of the copy, in a PC's hole below 1 MiB: no memory map has it, and Linux maps it.
pub const COPY: u64 = 0xe_0000;
/// Size of the copy, in bytes: all functions of the bus.
pub const COPY_BYTES: usize = SLOTS * FUNCTIONS * CONFIG_BYTES;

const MARK: [u8; 8] = *b"PCI copy";

/// The copy.
pub(super) struct ConfigCopy(GuestMemory);

impl ConfigCopy {
    /// A bus without any function.
    ///
    /// # Errors
    /// Its place is not in guest memory.
    pub(super) fn new(memory: GuestMemory) -> Result<ConfigCopy, NotMemory> {
        memory::write(&memory, COPY, &[0xff; COPY_BYTES])?;
        memory::write(&memory, COPY_MARK, &MARK)?;
        Ok(ConfigCopy(memory))
    }

    /// Writes what function number `index` of the bus says.
    pub(super) fn put(&self, index: usize, space: &[u8; CONFIG_BYTES]) {
        let at = COPY + (index * CONFIG_BYTES) as u64;
        // All of the copy was guest memory when it was made, and stays.
        let _ = memory::write(&self.0, at, space);
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::{ConfigSpace, Identity};
    use super::super::{PciFunction, PciRoot, Place};
    use super::*;
    use crate::bus::BusDevice;
    use crate::testing::memory;
    use proptest::prelude::*;
    use std::sync::{Arc, Mutex};

    struct Function(Mutex<ConfigSpace>);

    impl PciFunction for Function {
        fn config_read(&self, offset: u8, data: &mut [u8]) {
            self.0.lock().unwrap().read(offset, data);
        }

        fn config_space(&self) -> [u8; CONFIG_BYTES] {
            self.0.lock().unwrap().bytes()
        }

        fn config_write(&self, offset: u8, data: &[u8]) {
            self.0.lock().unwrap().write(offset, data);
        }
    }

    fn function() -> Arc<Function> {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1044,
            revision: 1,
            class: 0x00ff_0102,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        });
        space.add_bar(0, 0xc000_8000, 0x8000).unwrap();
        space.add_capability(9, &[7; 14], &[0xff]).unwrap();
        Arc::new(Function(Mutex::new(space)))
    }

    fn select(root: &PciRoot, index: usize, register: u8) {
        let address = 1 << 31 | (index as u32) << 8 | u32::from(register & 0xfc);
        root.write(0, &address.to_le_bytes());
    }

    /// The copy as it is in memory, and what the ports say.
    fn both(root: &PciRoot, memory: &GuestMemory) -> [Vec<[u8; 4]>; 2] {
        let places = (0..SLOTS * FUNCTIONS)
            .flat_map(|index| (0..=u8::MAX).step_by(4).map(move |at| (index, at)));
        let [mut copy, mut ports] = [Vec::new(), Vec::new()];
        for (index, register) in places {
            let at = COPY + (index * CONFIG_BYTES) as u64 + u64::from(register);
            copy.push(memory::read(memory, at).unwrap());
            select(root, index, register);
            let mut data = [0; 4];
            root.read(4, &mut data);
            ports.push(data);
        }
        [copy, ports]
    }

    #[derive(Clone, Debug)]
    enum Step {
        Insert(Place),
        Remove(Place),
        Write(usize, u8, Vec<u8>),
    }

    fn step() -> impl Strategy<Value = Step> {
        let place = (0..4u8, 0..3u8).prop_map(|(slot, function)| Place { slot, function });
        prop_oneof![
            place.clone().prop_map(Step::Insert),
            place.clone().prop_map(Step::Remove),
            (
                place,
                any::<u8>(),
                proptest::collection::vec(any::<u8>(), 1..5)
            )
                .prop_map(|(place, register, data)| Step::Write(
                    place.index(),
                    register,
                    data
                )),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn the_copy_says_what_the_ports_say(
            before in proptest::collection::vec(step(), 0..4),
            after in proptest::collection::vec(step(), 0..12),
        ) {
            let memory = memory(&[(0, 2 << 20)]);
            let root = PciRoot::new();
            let take = |step: &Step| match step {
                // Refused where there is one already, or no function 0.
                Step::Insert(place) => drop(root.insert(*place, function())),
                Step::Remove(place) => drop(root.remove(*place)),
                Step::Write(index, register, data) => {
                    select(&root, *index, *register);
                    root.write(4 + u64::from(register & 3), data);
                }
            };
            before.iter().for_each(take);
            root.keep_for_later(3);
            root.keep_copy(memory.clone()).unwrap();
            for step in &after {
                take(step);
                let [copy, ports] = both(&root, &memory);
                prop_assert_eq!(copy, ports);
            }
        }
    }

    #[test]
    fn a_copy_is_marked_and_its_place_must_be_memory() {
        let (whole, half) = (memory(&[(0, 1 << 20)]), memory(&[(0, COPY as usize + 1)]));
        assert!(PciRoot::new().keep_copy(half.clone()).is_err());
        assert_eq!(memory::read::<[u8; 8]>(&half, COPY_MARK), Ok([0; 8]));
        PciRoot::new().keep_copy(whole.clone()).unwrap();
        // What guest-kernel/objects/direct.h looks for.
        let mark = memory::read::<u64>(&whole, COPY_MARK);
        assert_eq!(mark, Ok(0x7970_6f63_2049_4350));
    }
}
