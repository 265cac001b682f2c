//! A 16550A UART that only sends: enough for Linux's 8250 driver and earlycon, and for a bare `outb`.
//!
//! Each byte goes into a bounded [`ring`], whose last lines explain a failure, and to the [`output`] fd where
//! there is one. There is no input: nothing of the host is ever buffered for the guest (B2.13).
//!
//! The transmitter is always empty, whatever becomes of the output, so the guest's driver never waits. The
//! interrupt line (ISA line 4, edge-triggered) is up while "transmitter empty" is pending and
//! enabled and OUT2 is set, as on a PC: Linux's console polls, but a tty is driven by this interrupt
//! (drivers/tty/serial/8250/8250_port.c; without it serial8250_do_startup finds UART_BUG_THRE and sends 16
//! bytes a timer tick). The line has moved when the access is over, or a guest that powers off after its last
//! words would not have sent them. Registers are those of the PC16550D; only accesses of one byte mean something.

mod output;
mod ring;

pub use output::OUTPUT_QUEUE_BYTES;
pub use ring::{CONSOLE_LINE_MAX_CHARS, CONSOLE_RING_BYTES};

use crate::bus::BusDevice;
use crate::event::{EventLoop, Readiness, Subscriber};
use crate::state::{Foreign, Version};
use output::Output;
use ring::Ring;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// First port of the first serial port of a PC.
pub const SERIAL_PORT: u64 = 0x3f8;
/// Ports of a UART.
pub const SERIAL_PORT_BYTES: u64 = 8;
/// The ISA interrupt line of the first serial port.
pub const SERIAL_IRQ: u32 = 4;

/// Bytes of a 16550A's receive FIFO, which only the loopback test fills.
const FIFO_BYTES: usize = 16;

const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const INTERRUPT_ID: u64 = 2; // reading; FIFO control when written
const LINE_CONTROL: u64 = 3;
const MODEM_CONTROL: u64 = 4;
const LINE_STATUS: u64 = 5;
const MODEM_STATUS: u64 = 6;
const SCRATCH: u64 = 7;

/// Interrupts that exist: received data, transmitter empty, line status, modem status.
const ENABLE_BITS: u8 = 0x0f;
const ENABLE_EMPTY: u8 = 0x02;
const ID_NONE: u8 = 0x01;
const ID_EMPTY: u8 = 0x02;
const ID_FIFO: u8 = 0xc0;
const FIFO_ENABLE: u8 = 0x01;
const FIFO_CLEAR_RECEIVER: u8 = 0x02;
const LATCH_ACCESS: u8 = 0x80;
const CONTROL_BITS: u8 = 0x1f;
const CONTROL_OUT2: u8 = 0x08;
const CONTROL_LOOP: u8 = 0x10;
const STATUS_EMPTY: u8 = 0x60; // holding register and shift register
const STATUS_DATA: u8 = 0x01;
/// Carrier, data set ready, clear to send.
const MODEM_READY: u8 = 0xb0;

/// The registers. Plain data. What was written and sent is no part of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    version: Version<1>,
    interrupt_enable: u8,
    fifo_enabled: bool,
    line_control: u8,
    modem_control: u8,
    scratch: u8,
    latch: [u8; 2],
    /// "Transmitter empty" is to be told.
    empty_pending: bool,
    /// What the loopback test sent to itself.
    looped: VecDeque<u8>,
}

struct Inner {
    registers: SerialState,
    ring: Ring,
    output: Option<Output>,
}

/// An input of an interrupt controller.
pub trait InterruptLine: Send + Sync {
    /// Moves it. The controller knows when this returns.
    fn set(&self, up: bool);
}

/// The UART, on the port bus at [`SERIAL_PORT`].
pub struct Serial {
    inner: Arc<Mutex<Inner>>,
    interrupt: Option<Arc<dyn InterruptLine>>,
}

impl Serial {
    /// A UART whose bytes go into the ring alone.
    pub fn new(interrupt: Option<Arc<dyn InterruptLine>>) -> Serial {
        Serial {
            inner: Arc::new(Mutex::new(Inner {
                registers: SerialState::default(),
                ring: Ring::default(),
                output: None,
            })),
            interrupt,
        }
    }

    /// The same that also writes to `fd`: see [`output`] for what happens when it is slow or gone.
    pub fn with_output(
        interrupt: Option<Arc<dyn InterruptLine>>,
        fd: OwnedFd,
        event_loop: Arc<dyn EventLoop>,
    ) -> Serial {
        let serial = Serial::new(interrupt);
        let weak = Arc::downgrade(&serial.inner);
        let drain: Arc<Mutex<dyn Subscriber>> = Arc::new(Mutex::new(Drain(weak)));
        serial.lock().output = Some(Output::new(fd, event_loop, drain));
        serial
    }

    /// The registers, as plain data.
    pub fn state(&self) -> SerialState {
        self.lock().registers.clone()
    }

    /// Takes the state of another one. Its line is the interrupt controller's to know.
    ///
    /// # Errors
    /// It is none.
    pub fn restore(&self, state: &SerialState) -> Result<(), Foreign> {
        let possible = state.interrupt_enable & !ENABLE_BITS == 0
            && state.modem_control & !CONTROL_BITS == 0
            && state.looped.len() <= FIFO_BYTES;
        if !possible {
            return Err(Foreign("registers"));
        }
        self.lock().registers.clone_from(state);
        Ok(())
    }

    /// The last lines that the guest wrote, at most `lines`, oldest first, safe to print: control
    /// characters and what is not UTF-8 are escaped, long lines cut to [`CONSOLE_LINE_MAX_CHARS`].
    pub fn last_lines(&self, lines: usize) -> Vec<String> {
        self.lock().ring.last_lines(lines)
    }

    /// Writes what is queued for the fd, for at most `patience`: for the end of the machine. Returns how
    /// many bytes were lost over its whole life.
    pub fn flush(&self, patience: Duration) -> u64 {
        match &mut self.lock().output {
            Some(output) => output.flush(patience),
            None => 0,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An access, and what becomes of the line by it: under one lock, so that it never stays behind the registers.
    fn access<T>(&self, access: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.lock();
        let before = inner.registers.line();
        let result = access(&mut inner);
        let now = inner.registers.line();
        if let Some(interrupt) = self.interrupt.as_ref().filter(|_| now != before) {
            interrupt.set(now);
        }
        result
    }
}

/// Writes on when the fd can take more. Weak, so that the loop does not keep the UART.
struct Drain(std::sync::Weak<Mutex<Inner>>);

impl Subscriber for Drain {
    fn ready(&mut self, _token: u64, _readiness: Readiness) {
        if let Some(inner) = self.0.upgrade() {
            let mut inner = inner.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(output) = &mut inner.output {
                output.drain();
            }
        }
    }
}

impl Inner {
    fn send(&mut self, byte: u8) {
        if self.registers.modem_control & CONTROL_LOOP != 0 {
            if self.registers.looped.len() < FIFO_BYTES {
                self.registers.looped.push_back(byte);
            }
            return;
        }
        self.ring.push(byte);
        if let Some(output) = &mut self.output {
            output.send(byte);
        }
    }
}

impl SerialState {
    fn latch_open(&self) -> bool {
        self.line_control & LATCH_ACCESS != 0
    }

    /// Whether the interrupt line is up.
    fn line(&self) -> bool {
        self.empty_pending
            && self.interrupt_enable & ENABLE_EMPTY != 0
            && self.modem_control & CONTROL_OUT2 != 0
    }

    fn read(&mut self, offset: u64) -> u8 {
        let [low, high] = self.latch;
        match offset {
            DATA if self.latch_open() => low,
            DATA => self.looped.pop_front().unwrap_or(0),
            INTERRUPT_ENABLE if self.latch_open() => high,
            INTERRUPT_ENABLE => self.interrupt_enable,
            INTERRUPT_ID => self.identify(),
            LINE_CONTROL => self.line_control,
            MODEM_CONTROL => self.modem_control,
            LINE_STATUS if self.looped.is_empty() => STATUS_EMPTY,
            LINE_STATUS => STATUS_EMPTY | STATUS_DATA,
            MODEM_STATUS => self.modem_status(),
            SCRATCH => self.scratch,
            _ => 0xff,
        }
    }

    /// Reading the identification takes "transmitter empty" away.
    fn identify(&mut self) -> u8 {
        let pending = self.empty_pending && self.interrupt_enable & ENABLE_EMPTY != 0;
        let id = if pending { ID_EMPTY } else { ID_NONE };
        if pending {
            self.empty_pending = false;
        }
        if self.fifo_enabled { ID_FIFO | id } else { id }
    }

    /// In loopback the outputs come back as inputs: DTR as DSR, RTS as CTS, OUT1 as RI, OUT2 as DCD.
    fn modem_status(&self) -> u8 {
        let out = self.modem_control;
        if out & CONTROL_LOOP == 0 {
            return MODEM_READY;
        }
        (out & 0x02) << 3 | (out & 0x01) << 5 | (out & 0x0c) << 4
    }

    /// Takes a register write; a byte to send is returned.
    fn write(&mut self, offset: u64, value: u8) -> Option<u8> {
        match offset {
            DATA if self.latch_open() => self.latch = [value, self.latch[1]],
            DATA => {
                // Sent at once, so it is empty again at once.
                self.empty_pending = true;
                return Some(value);
            }
            INTERRUPT_ENABLE if self.latch_open() => self.latch = [self.latch[0], value],
            INTERRUPT_ENABLE => {
                let enabled = value & ENABLE_BITS;
                if enabled & !self.interrupt_enable & ENABLE_EMPTY != 0 {
                    // A 16550 tells again that it is empty when this is enabled.
                    self.empty_pending = true;
                }
                self.interrupt_enable = enabled;
            }
            INTERRUPT_ID => {
                self.fifo_enabled = value & FIFO_ENABLE != 0;
                if value & FIFO_CLEAR_RECEIVER != 0 {
                    self.looped.clear();
                }
            }
            LINE_CONTROL => self.line_control = value,
            MODEM_CONTROL => self.modem_control = value & CONTROL_BITS,
            SCRATCH => self.scratch = value,
            _ => {}
        }
        None
    }
}

impl BusDevice for Serial {
    fn name(&self) -> &'static str {
        "serial"
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let [byte] = data {
            *byte = self.access(|inner| inner.registers.read(offset));
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [value] = data else {
            return;
        };
        self.access(|inner| {
            if let Some(byte) = inner.registers.write(offset, *value) {
                inner.send(byte);
            }
        });
    }
}

#[cfg(test)]
mod tests;
