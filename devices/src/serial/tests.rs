//! Tests of the UART: what Linux's drivers do, and what a hostile guest and a slow owner do.

use super::*;
use crate::event::Poller;
use proptest::prelude::*;
use std::fs::File;
use std::io::Read;

/// Where a line was moved to, each time.
#[derive(Default)]
struct Moves(Mutex<Vec<bool>>);

impl InterruptLine for Moves {
    fn set(&self, up: bool) {
        let mut moves = self.0.lock().unwrap();
        assert_ne!(moves.last(), Some(&up), "it moves, or it is left alone");
        moves.push(up);
    }
}

impl Moves {
    fn edges(&self) -> usize {
        self.0.lock().unwrap().iter().filter(|up| **up).count()
    }

    fn is_up(&self) -> bool {
        self.0.lock().unwrap().last() == Some(&true)
    }
}

fn serial() -> (Serial, Arc<Moves>) {
    let line = Arc::new(Moves::default());
    (Serial::new(Some(line.clone())), line)
}

fn inb(serial: &Serial, register: u64) -> u8 {
    let mut data = [0];
    serial.read(register, &mut data);
    data[0]
}

fn print(serial: &Serial, text: &[u8]) {
    for byte in text {
        serial.write(DATA, &[*byte]);
    }
}

#[test]
fn a_bare_outb_reaches_the_ring() {
    let (serial, _) = serial();
    print(&serial, b"hello\nworld");
    assert_eq!(serial.last_lines(5), ["hello", "world"]);
}

#[test]
fn the_transmitter_is_always_empty() {
    let (serial, _) = serial();
    assert_eq!(inb(&serial, LINE_STATUS), 0x60);
    print(&serial, &[b'x'; 1000]);
    assert_eq!(inb(&serial, LINE_STATUS), 0x60);
}

#[test]
fn linux_takes_it_for_a_16550a() {
    // The tests of autoconfig and autoconfig_16550a in drivers/tty/serial/8250/8250_port.c.
    let (serial, _) = serial();
    serial.write(INTERRUPT_ENABLE, &[0]);
    assert_eq!(inb(&serial, INTERRUPT_ENABLE), 0);
    serial.write(INTERRUPT_ENABLE, &[0xff]);
    assert_eq!(
        inb(&serial, INTERRUPT_ENABLE),
        0x0f,
        "bit 6 would make it an XScale"
    );
    serial.write(INTERRUPT_ENABLE, &[0]);
    serial.write(MODEM_CONTROL, &[0x10 | 0x08 | 0x02]);
    assert_eq!(inb(&serial, MODEM_STATUS) & 0xf0, 0x80 | 0x10);
    serial.write(MODEM_CONTROL, &[0]);
    serial.write(LINE_CONTROL, &[0]);
    serial.write(INTERRUPT_ID, &[0x21]);
    assert_eq!(
        inb(&serial, INTERRUPT_ID) >> 5,
        6,
        "7 would make it a 16750"
    );
}

#[test]
fn linux_finds_no_bug_in_the_transmitter_interrupt() {
    // The two tests of serial8250_do_startup: UART_BUG_THRE and UART_BUG_TXEN.
    let (serial, _) = serial();
    serial.write(INTERRUPT_ENABLE, &[2]);
    let first = inb(&serial, INTERRUPT_ID);
    serial.write(INTERRUPT_ENABLE, &[0]);
    serial.write(INTERRUPT_ENABLE, &[2]);
    let second = inb(&serial, INTERRUPT_ID);
    serial.write(INTERRUPT_ENABLE, &[0]);
    assert_eq!((first & 0x0f, second & 0x0f), (2, 2));
    serial.write(INTERRUPT_ENABLE, &[2]);
    assert_eq!(inb(&serial, LINE_STATUS) & 0x40, 0x40);
    assert_eq!(inb(&serial, INTERRUPT_ID) & 1, 0);
}

#[test]
fn an_interrupt_comes_with_each_new_reason_and_only_if_wanted() {
    let (serial, line) = serial();
    print(&serial, b"a");
    serial.write(INTERRUPT_ENABLE, &[2]);
    assert_eq!(line.edges(), 0, "OUT2 is not set");
    serial.write(MODEM_CONTROL, &[0x08]);
    assert!(line.is_up());
    print(&serial, b"bcd");
    assert_eq!(line.edges(), 1, "the line is still up");
    assert_eq!(inb(&serial, INTERRUPT_ID) & 0x0f, 2);
    assert!(!line.is_up());
    assert_eq!(inb(&serial, INTERRUPT_ID) & 0x0f, 1);
    print(&serial, b"efg");
    assert_eq!(line.edges(), 2);
    serial.write(INTERRUPT_ENABLE, &[0]);
    assert!(!line.is_up());
    print(&serial, b"h");
    assert_eq!(line.edges(), 2);
}

#[test]
fn the_loopback_test_prints_nothing_and_finds_16_bytes() {
    // size_fifo of 8250_port.c.
    let (serial, _) = serial();
    serial.write(INTERRUPT_ID, &[0x07]);
    serial.write(MODEM_CONTROL, &[0x10]);
    print(&serial, &[b'x'; 256]);
    let mut count = 0;
    while inb(&serial, LINE_STATUS) & 1 != 0 {
        assert_eq!(inb(&serial, DATA), b'x');
        count += 1;
    }
    assert_eq!(count, 16);
    assert!(serial.last_lines(1).is_empty());
}

#[test]
fn the_divisor_is_kept_apart_from_data_and_interrupts() {
    let (serial, _) = serial();
    serial.write(LINE_CONTROL, &[0x83]);
    serial.write(DATA, &[0x01]);
    serial.write(INTERRUPT_ENABLE, &[0x02]);
    assert_eq!((inb(&serial, DATA), inb(&serial, INTERRUPT_ENABLE)), (1, 2));
    serial.write(LINE_CONTROL, &[0x03]);
    assert_eq!(inb(&serial, INTERRUPT_ENABLE), 0);
    assert!(serial.last_lines(1).is_empty());
}

#[test]
fn a_wide_access_is_an_access_to_nothing() {
    let (serial, _) = serial();
    serial.write(DATA, b"ab");
    serial.write(DATA, b"abcd");
    assert!(serial.last_lines(1).is_empty());
    let mut data = [0; 2];
    serial.read(LINE_STATUS, &mut data);
    assert_eq!(data, [0xff; 2]);
}

fn piped() -> (Serial, Arc<Poller>, File) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    let poller = Arc::new(Poller::new().unwrap());
    let serial = Serial::with_output(None, writer, poller.clone());
    (serial, poller, File::from(reader))
}

#[test]
fn each_byte_reaches_the_fd_at_once() {
    let (serial, poller, mut reader) = piped();
    print(&serial, b"x");
    let mut byte = [0];
    reader.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"x");
    assert_eq!(poller.watched(), 0);
}

#[test]
fn a_slow_reader_does_not_stop_the_guest_and_misses_nothing_that_fits() {
    let (serial, poller, mut reader) = piped();
    // A pipe takes 64 KiB, the queue as much again.
    let sent: Vec<u8> = (0..100_000u32).map(|at| (at % 251) as u8).collect();
    print(&serial, &sent);
    assert_eq!(poller.watched(), 1);
    let mut read = Vec::new();
    while read.len() < sent.len() {
        let mut chunk = [0; 4096];
        let count = reader.read(&mut chunk).unwrap();
        read.extend_from_slice(&chunk[..count]);
        poller.turn(Some(Duration::ZERO)).unwrap();
    }
    assert_eq!(read, sent);
    assert_eq!(poller.watched(), 0);
    assert_eq!(serial.flush(Duration::ZERO), 0);
}

#[test]
fn a_reader_that_never_reads_costs_64_kib_and_is_told_what_it_missed() {
    // B2.12.
    let (serial, poller, mut reader) = piped();
    print(&serial, &[b'x'; 400_000]);
    assert!(
        serial
            .lock()
            .output
            .as_ref()
            .is_some_and(|output| output.queued() <= OUTPUT_QUEUE_BYTES)
    );
    let mut read = Vec::new();
    loop {
        let mut chunk = [0; 65536];
        let count = reader.read(&mut chunk).unwrap();
        read.extend_from_slice(&chunk[..count]);
        poller.turn(Some(Duration::ZERO)).unwrap();
        if poller.watched() == 0 {
            break;
        }
    }
    drop(serial);
    reader.read_to_end(&mut read).unwrap();
    let text = String::from_utf8(read).unwrap();
    let kept = text.bytes().filter(|byte| *byte == b'x').count();
    let notice = format!("[{} bytes of console output lost]", 400_000 - kept);
    assert!(text.contains(&notice), "no {notice:?}");
}

#[test]
fn a_closed_reader_is_given_up_and_the_ring_goes_on() {
    let (serial, poller, reader) = piped();
    print(&serial, b"before\n");
    drop(reader);
    print(&serial, b"after\n");
    assert_eq!(serial.last_lines(2), ["before", "after"]);
    assert_eq!(poller.watched(), 0);
    assert_eq!(serial.flush(Duration::from_secs(5)), 6);
}

#[test]
fn a_regular_file_takes_everything() {
    let file = rustix::fs::memfd_create("console", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let copy = File::from(file.try_clone().unwrap());
    let serial = Serial::with_output(None, file, Arc::new(Poller::new().unwrap()));
    print(&serial, &[b'y'; 200_000]);
    assert_eq!(serial.flush(Duration::ZERO), 0);
    assert_eq!(copy.metadata().unwrap().len(), 200_000);
}

#[test]
fn a_flush_waits_no_longer_than_it_may() {
    let (serial, _poller, _reader) = piped();
    print(&serial, &[b'x'; 70_000]);
    let begin = std::time::Instant::now();
    assert!(serial.flush(Duration::from_millis(50)) > 0);
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn registers_that_cannot_be_are_refused() {
    let (serial, _) = serial();
    let registers = SerialState::default();
    for impossible in [
        SerialState {
            interrupt_enable: 0x10,
            ..registers.clone()
        },
        SerialState {
            modem_control: 0x20,
            ..registers.clone()
        },
        SerialState {
            looped: vec![0; FIFO_BYTES + 1].into(),
            ..registers.clone()
        },
    ] {
        assert!(serial.restore(&impossible).is_err());
        assert_eq!(serial.state(), registers);
    }
}

proptest! {
    #[test]
    fn no_access_panics_or_grows_and_the_registers_can_be_written_down(
        accesses in proptest::collection::vec((0u64..10, any::<u8>(), any::<bool>()), 0..500)
    ) {
        let (serial, _) = serial();
        for (register, value, write) in accesses {
            if write {
                serial.write(register, &[value]);
            } else {
                inb(&serial, register);
            }
        }
        let state = serial.state();
        prop_assert!(state.looped.len() <= FIFO_BYTES);
        let json = serde_json::to_string(&state).unwrap();
        let (new, _) = self::serial();
        new.restore(&serde_json::from_str(&json).unwrap()).unwrap();
        prop_assert_eq!(new.state(), state);
        for register in 0..8 {
            prop_assert_eq!(inb(&new, register), inb(&serial, register));
        }
    }
}
