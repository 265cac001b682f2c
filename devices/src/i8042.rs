//! The keyboard controller's ports, for the one thing that a guest without a keyboard needs: the pulse of
//! the reset line (command 0xFE), which Linux sends where there is no ACPI (arch/x86/kernel/reboot.c, BOOT_KBD).
//!
//! The status always says "input buffer empty", for which Linux waits before it sends the command, and
//! "output buffer full", so that Linux's keyboard driver, where it is built in, cannot drain the controller
//! and gives up after 17 reads ("No controller found", drivers/input/serio/i8042.c, i8042_flush). A status
//! of "empty" would cost it two timeouts of half a second each. Everything else is dropped.

use crate::bus::BusDevice;
use crate::machine::{MachineEvent, MachineEvents};

/// First port; the data port.
pub const I8042_PORT: u64 = 0x60;
/// Ports from the data port to the command port. Port 0x61 (timer 2 gate and speaker) is KVM's own, if the
/// VMM has it make a PIT; what reaches this device reads as all ones.
pub const I8042_PORT_BYTES: u64 = 5;

const COMMAND: u64 = 4;
const RESET: u8 = 0xfe;
/// Output buffer full (bit 0), self-test passed (bit 2), keyboard not locked (bit 4).
const STATUS: u8 = 0x15;

/// The controller.
pub struct I8042 {
    events: MachineEvents,
}

impl I8042 {
    /// A controller that puts [`MachineEvent::Reset`] into `events`.
    pub fn new(events: MachineEvents) -> I8042 {
        I8042 { events }
    }
}

impl BusDevice for I8042 {
    fn name(&self) -> &'static str {
        "i8042"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (COMMAND, [status]) = (offset, data) {
            *status = STATUS;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (COMMAND, [RESET]) = (offset, data) {
            (self.events)(MachineEvent::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    fn controller() -> (I8042, Arc<Mutex<Vec<MachineEvent>>>) {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = seen.clone();
        let events: MachineEvents = Arc::new(move |event| log.lock().unwrap().push(event));
        (I8042::new(events), seen)
    }

    #[test]
    fn the_reset_command_asks_for_a_reset() {
        let (controller, seen) = controller();
        controller.write(4, &[0xfe]);
        assert_eq!(*seen.lock().unwrap(), [MachineEvent::Reset]);
    }

    #[test]
    fn nothing_else_does_anything() {
        let (controller, seen) = controller();
        for offset in 0..8 {
            for value in 0..=0xff {
                if (offset, value) != (4, 0xfe) {
                    controller.write(offset, &[value]);
                }
            }
            controller.write(offset, &[0xfe, 0xfe]);
            controller.write(offset, &[0xfe; 4]);
        }
        assert!(seen.lock().unwrap().is_empty());
    }

    #[test]
    fn linux_may_send_its_command_at_once_and_finds_no_keyboard() {
        let (controller, _) = controller();
        let mut status = [0];
        controller.read(4, &mut status);
        assert_eq!(status[0] & 0x02, 0);
        assert_eq!(status[0] & 0x01, 1);
        let mut wide = [0; 2];
        controller.read(4, &mut wide);
        assert_eq!(wide, [0xff; 2]);
    }
}
