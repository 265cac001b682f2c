//! How long the rest of an output is waited for. The clock is tokio's own here and jumps whenever nothing else happens.

use super::*;
use crate::stdio::Outputs;
use tokio::time::{Instant, sleep};

/// A fifo's reader, who does not wait.
fn impatient(path: &str) -> File {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .expect("a fifo")
}

/// Writes as much as there is room for.
fn fill(to: &mut UnixStream) {
    to.set_nonblocking(true).expect("a socket");
    while to.write(&[7; 4096]).is_ok() {}
}

#[tokio::test(start_paused = true)]
async fn an_output_that_nobody_takes_is_given_up_after_5_s() {
    let place = Place::new();
    let stdout = place.fifo("1");
    drop(reader(&stdout));
    let _detached = impatient(&stdout);
    let (pumps, mut guest) = joined(stdout_to(&stdout)).await.expect("a fifo");
    fill(&mut guest.stdout());
    let called = Instant::now();
    assert_eq!(pumps.outputs_done().await, Outputs::NobodyReads);
    assert_eq!(called.elapsed().as_secs(), 5);
}

#[tokio::test(start_paused = true)]
async fn what_the_pipe_can_hold_is_written_and_kept_while_nobody_reads() {
    let place = Place::new();
    let stdout = place.fifo("1");
    let reader = impatient(&stdout);
    let (pumps, mut guest) = joined(stdout_to(&stdout)).await.expect("a fifo");
    drop(reader);
    let mut guest_out = guest.stdout();
    guest_out.write_all(b"last words").expect("room");
    pumps_turn().await;
    let back = impatient(&stdout);
    drop(guest_out);
    let called = Instant::now();
    assert_eq!(pumps.outputs_done().await, Outputs::Written);
    assert!(called.elapsed() < Duration::from_secs(1));
    assert_eq!(read_all(back), b"last words");
}

#[tokio::test(start_paused = true)]
async fn a_slow_reader_is_waited_for_as_long_as_he_takes_something() {
    let place = Place::new();
    let stdout = place.fifo("1");
    let mut slow = impatient(&stdout);
    let (pumps, mut guest) = joined(stdout_to(&stdout)).await.expect("a fifo");
    let mut guest_out = guest.stdout();
    fill(&mut guest_out);
    drop(guest_out);
    let called = Instant::now();
    let reading = tokio::spawn(async move {
        loop {
            sleep(Duration::from_secs(4)).await;
            match slow.read(&mut [0; 32 * 1024]) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
            }
        }
    });
    assert_eq!(pumps.outputs_done().await, Outputs::Written);
    assert!(
        called.elapsed() >= Duration::from_secs(8),
        "{:?}",
        called.elapsed()
    );
    reading.await.expect("to the end");
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_neither_sends_nor_ends_is_given_up_after_30_s() {
    let place = Place::new();
    let (stdout, stderr) = (place.fifo("1"), place.fifo("2"));
    let _readers = [impatient(&stdout), impatient(&stderr)];
    let urls = Urls {
        stdout: &stdout,
        stderr: &stderr,
        ..NONE
    };
    let (pumps, mut guest) = joined(urls).await.expect("fifos");
    drop(guest.stdout());
    let _held_open = guest.stderr();
    // Silence before the exit is nobody's fault.
    sleep(Duration::from_secs(1000)).await;
    let called = Instant::now();
    assert_eq!(pumps.outputs_done().await, Outputs::GuestSilent);
    assert_eq!(called.elapsed().as_secs(), 30);
}

#[tokio::test(start_paused = true)]
async fn without_outputs_nothing_is_waited_for() {
    let (pumps, _guest) = joined(NONE).await.expect("nothing to open");
    assert_eq!(pumps.outputs_done().await, Outputs::Written);
}
