//! A bus: ranges of addresses, each with the device that answers there. One for port I/O, one for MMIO.
//!
//! Every access that a guest can make is defined: 1, 2, 4 or 8 bytes wide and wholly inside one range it
//! goes to the device; anything else reads as all ones and writes to nothing, as on a PC.

use std::collections::BTreeMap;
use std::sync::Arc;

/// The widest access of a CPU to a bus, in bytes.
pub const ACCESS_MAX_BYTES: usize = 8;

/// A device on a bus. Called from any vCPU thread, from several at once.
pub trait BusDevice: Send + Sync {
    /// A short fixed name for exit counters, for instance `serial`.
    fn name(&self) -> &'static str;
    /// Fills `data` with what is at `offset` of the device's range. `data` is 1, 2, 4 or 8 bytes long and
    /// already all ones, so that a device which has nothing there may leave it alone.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Takes `data`, 1, 2, 4 or 8 bytes, at `offset` of the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Two devices may not answer at one address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range is empty or goes beyond the address space.
    #[error("bus range {start:#x}+{length:#x} of {name} is empty or wraps")]
    Range {
        /// Device that was to be placed.
        name: &'static str,
        /// First address.
        start: u64,
        /// Length in bytes.
        length: u64,
    },
    /// Another device is there.
    #[error("bus range {start:#x}+{length:#x} of {name} overlaps {other}")]
    Overlap {
        /// Device that was to be placed.
        name: &'static str,
        /// First address.
        start: u64,
        /// Length in bytes.
        length: u64,
        /// Device that is there already.
        other: &'static str,
    },
}

struct Place {
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// The devices of one address space. Built before the guest runs and shared unchanged afterwards, so that
/// an access takes no lock.
#[derive(Default)]
pub struct Bus {
    places: BTreeMap<u64, Place>,
}

impl Bus {
    /// A bus with nothing on it.
    pub fn new() -> Bus {
        Bus::default()
    }

    /// Places `device` at `start..start + length`.
    ///
    /// # Errors
    /// The range is empty, wraps, or overlaps another device's.
    pub fn insert(
        &mut self,
        start: u64,
        length: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let name = device.name();
        let last = length
            .checked_sub(1)
            .and_then(|rest| start.checked_add(rest))
            .ok_or(BusError::Range {
                name,
                start,
                length,
            })?;
        // Ranges do not overlap, so of those that begin at or before `last` the highest ends last.
        if let Some((_, place)) = self.places.range(..=last).next_back() {
            if place.last >= start {
                return Err(BusError::Overlap {
                    name,
                    start,
                    length,
                    other: place.device.name(),
                });
            }
        }
        self.places.insert(start, Place { last, device });
        Ok(())
    }

    /// Reads `data.len()` bytes at `address`. Returns the name of the device that answered, for counting.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Option<&'static str> {
        data.fill(0xff);
        let (offset, device) = self.find(address, data.len())?;
        device.read(offset, data);
        Some(device.name())
    }

    /// Writes `data` at `address`. Returns the name of the device that took it, for counting.
    pub fn write(&self, address: u64, data: &[u8]) -> Option<&'static str> {
        let (offset, device) = self.find(address, data.len())?;
        device.write(offset, data);
        Some(device.name())
    }

    fn find(&self, address: u64, width: usize) -> Option<(u64, &dyn BusDevice)> {
        if !matches!(width, 1 | 2 | 4 | 8) {
            return None;
        }
        let last = address.checked_add(width as u64 - 1)?;
        let (start, place) = self.places.range(..=address).next_back()?;
        (last <= place.last).then(|| (address - start, &*place.device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    struct Recorder(&'static str, Mutex<Vec<(u64, Vec<u8>)>>);

    impl Recorder {
        fn new(name: &'static str) -> Arc<Recorder> {
            Arc::new(Recorder(name, Mutex::new(Vec::new())))
        }
    }

    impl BusDevice for Recorder {
        fn name(&self) -> &'static str {
            self.0
        }
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.1.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn an_access_inside_a_range_reaches_its_device_with_the_offset() {
        let mut bus = Bus::new();
        let device = Recorder::new("a");
        bus.insert(0x100, 0x10, device.clone()).unwrap();
        assert_eq!(bus.write(0x104, &[1, 2]), Some("a"));
        assert_eq!(*device.1.lock().unwrap(), [(4, vec![1, 2])]);
        let mut data = [0; 4];
        assert_eq!(bus.read(0x10c, &mut data), Some("a"));
        assert_eq!(data, [0xc; 4]);
    }

    #[test]
    fn nothing_reads_as_all_ones_and_swallows_writes() {
        let mut bus = Bus::new();
        bus.insert(0x100, 0x10, Recorder::new("a")).unwrap();
        for address in [0, 0xff, 0x110, u64::MAX] {
            let mut data = [0; 1];
            assert_eq!(bus.read(address, &mut data), None);
            assert_eq!(data, [0xff]);
            assert_eq!(bus.write(address, &data), None);
        }
    }

    #[test]
    fn an_access_across_the_end_or_of_odd_width_is_an_access_to_nothing() {
        let mut bus = Bus::new();
        let device = Recorder::new("a");
        bus.insert(0x100, 0x10, device.clone()).unwrap();
        bus.insert(u64::MAX - 3, 4, Recorder::new("top")).unwrap();
        for (address, width) in [(0x10e, 4), (0xff, 2), (0x100, 3), (0x100, 0), (0x100, 16)] {
            let mut data = vec![0; width];
            assert_eq!(bus.read(address, &mut data), None);
            assert!(data.iter().all(|byte| *byte == 0xff));
            assert_eq!(bus.write(address, &data), None);
        }
        assert_eq!(bus.write(u64::MAX - 3, &[0; 8]), None);
        assert_eq!(bus.write(u64::MAX - 3, &[0; 4]), Some("top"));
        assert!(device.1.lock().unwrap().is_empty());
    }

    #[test]
    fn overlapping_empty_and_wrapping_ranges_are_refused() {
        let mut bus = Bus::new();
        bus.insert(0x100, 0x10, Recorder::new("a")).unwrap();
        for (start, length) in [
            (0x100, 0x10),
            (0xf8, 9),
            (0x10f, 1),
            (0x0, 0x1000),
            (0x104, 2),
        ] {
            let refused = bus.insert(start, length, Recorder::new("b"));
            assert!(matches!(refused, Err(BusError::Overlap { other: "a", .. })));
        }
        for (start, length) in [(0x200, 0), (u64::MAX, 2)] {
            let refused = bus.insert(start, length, Recorder::new("b"));
            assert!(matches!(refused, Err(BusError::Range { .. })));
        }
        bus.insert(0xf8, 8, Recorder::new("b")).unwrap();
        bus.insert(0x110, 8, Recorder::new("c")).unwrap();
    }
}
