//! Every byte arrives, once and in its order, and so does the end.

use super::*;
use crate::stdio::{Outputs, Wanted};
use sha2::{Digest, Sha256};
use std::thread;

/// Each way.
const MANY_BYTES: usize = 64 << 20;
const CHUNK_BYTES: usize = 1 << 20;

/// Writes [`MANY_BYTES`] in chunks of [`CHUNK_BYTES`] and gives their hash.
fn send_many(mut to: impl Write, seed: u8) -> Vec<u8> {
    let mut hash = Sha256::new();
    let mut chunk: Vec<u8> = bytes(CHUNK_BYTES as u32)
        .iter()
        .map(|byte| byte ^ seed)
        .collect();
    for _ in 0..MANY_BYTES / CHUNK_BYTES {
        chunk.rotate_left(13);
        hash.update(&chunk);
        to.write_all(&chunk).expect("somebody reads");
    }
    hash.finalize().to_vec()
}

/// Reads to the end and gives the hash.
fn take_many(mut from: impl Read) -> Vec<u8> {
    let mut hash = Sha256::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match from.read(&mut chunk).expect("a stream") {
            0 => return hash.finalize().to_vec(),
            count => hash.update(&chunk[..count]),
        }
    }
}

#[tokio::test]
async fn every_byte_of_three_streams_arrives_and_then_their_end() {
    let place = Place::new();
    let (stdin, stdout, stderr) = (place.fifo("0"), place.fifo("1"), place.fifo("2"));
    let (out, err) = (reader(&stdout), reader(&stderr));
    let urls = Urls {
        stdin: &stdin,
        stdout: &stdout,
        stderr: &stderr,
        ..NONE
    };
    let (pumps, mut guest) = joined(urls).await.expect("fifos");
    let input = writer(&stdin);
    let (guest_in, guest_out, guest_err) = (guest.stdin(), guest.stdout(), guest.stderr());
    let [sent_out, sent_err, sent_in] = [
        thread::spawn(move || send_many(guest_out, 1)),
        thread::spawn(move || send_many(guest_err, 2)),
        thread::spawn(move || send_many(input, 3)),
    ];
    let [got_out, got_err] = [out, err].map(|from| thread::spawn(move || take_many(from)));
    let got_in = thread::spawn(move || take_many(guest_in));
    pumps.close_stdin();
    assert_eq!(pumps.outputs_done().await, Outputs::Written);
    beside(move || {
        for (sent, got) in [(sent_out, got_out), (sent_err, got_err), (sent_in, got_in)] {
            assert_eq!(sent.join().expect("sent"), got.join().expect("taken"));
        }
    })
    .await;
    pumps.close().await;
}

#[tokio::test]
async fn a_terminal_s_one_stream_goes_both_ways_and_only_its_output_ends() {
    let place = Place::new();
    let (stdin, stdout) = (place.fifo("0"), place.fifo("1"));
    let out = reader(&stdout);
    let urls = Urls {
        stdin: &stdin,
        stdout: &stdout,
        stderr: "/not/there",
        terminal: true,
        ..NONE
    };
    let (pumps, mut guest) = joined(urls).await.expect("fifos");
    let (input, mut terminal) = (writer(&stdin), guest.stdin());
    let (sent_in, sent_out) = (bytes(1_000_003), bytes(2_000_003));
    let mut writing = terminal.try_clone().expect("a socket");
    let (to_send, to_type) = (sent_out.clone(), sent_in.clone());
    thread::spawn(move || writing.write_all(&to_send).expect("somebody reads"));
    thread::spawn(move || (&input).write_all(&to_type).expect("somebody reads"));
    pumps.close_stdin();
    let typed = beside(move || {
        let mut typed = vec![0; 1_000_003];
        terminal.read_exact(&mut typed).expect("what was typed");
        // There is no end of a terminal's input behind it.
        terminal.set_nonblocking(true).expect("a socket");
        let end = terminal
            .read(&mut [0])
            .expect_err("nothing more, and no end");
        assert_eq!(end.kind(), std::io::ErrorKind::WouldBlock);
        typed
    })
    .await;
    assert!(typed == sent_in);
    // The guest's last handle is gone, so the output has ended.
    let printed = beside(move || read_all(out)).await;
    assert!(printed == sent_out);
    assert_eq!(pumps.outputs_done().await, Outputs::Written);
}

#[tokio::test]
async fn a_terminal_that_is_only_typed_on_is_read_all_the_same() {
    let place = Place::new();
    let stdin = place.fifo("0");
    let urls = Urls {
        stdin: &stdin,
        terminal: true,
        ..NONE
    };
    let (pumps, mut guest) = joined(urls).await.expect("a fifo");
    let mut terminal = guest.stdin();
    beside(move || terminal.write_all(&bytes(4_000_000)).expect("it is read")).await;
    assert_eq!(pumps.outputs_done().await, Outputs::Written);
}

#[tokio::test]
async fn only_what_is_named_is_dialled() {
    let place = Place::new();
    let stdin = place.fifo("0");
    let none = Wanted {
        stdin: false,
        stdout: false,
        stderr: false,
    };
    let stdio = Stdio::open(NONE).await.expect("nothing to open");
    assert_eq!(stdio.wanted(), none);
    let stdio = Stdio::open(Urls {
        stdin: &stdin,
        stdout: "/dev/null",
        ..NONE
    })
    .await;
    assert_eq!(
        stdio.expect("a fifo").wanted(),
        Wanted {
            stdin: true,
            ..none
        }
    );
    let log = format!("file://{}", place.name("log"));
    let stdio = Stdio::open(Urls {
        stdout: &log,
        terminal: true,
        ..NONE
    })
    .await;
    assert_eq!(
        stdio.expect("a file").wanted(),
        Wanted {
            stdin: true,
            ..none
        }
    );
}

#[tokio::test]
async fn a_writer_of_the_input_that_goes_and_another_that_comes_are_one_stream() {
    let place = Place::new();
    let stdin = place.fifo("0");
    let (pumps, mut guest) = joined(Urls {
        stdin: &stdin,
        ..NONE
    })
    .await
    .expect("a fifo");
    let mut got = guest.stdin();
    got.set_read_timeout(Some(LONG)).expect("a socket");
    for word in [b"first", b"again"] {
        writer(&stdin).write_all(word).expect("room");
        got = beside(move || {
            let mut heard = [0; 5];
            got.read_exact(&mut heard).expect("no end in between");
            assert_eq!(&heard, word);
            got
        })
        .await;
    }
    writer(&stdin).write_all(b"last").expect("room");
    pumps.close_stdin();
    assert_eq!(beside(move || read_all(got)).await, b"last");
}

#[tokio::test]
async fn an_input_that_is_still_written_does_not_end_by_close_io_alone() {
    let place = Place::new();
    let stdin = place.fifo("0");
    let (pumps, mut guest) = joined(Urls {
        stdin: &stdin,
        ..NONE
    })
    .await
    .expect("a fifo");
    let (mut late, got) = (writer(&stdin), guest.stdin());
    pumps.close_stdin();
    pumps.close_stdin();
    pumps_turn().await;
    late.write_all(b"said after CloseIO")
        .expect("it is still read");
    drop(late);
    assert_eq!(beside(move || read_all(got)).await, b"said after CloseIO");
}

#[tokio::test]
async fn who_writes_to_a_process_that_reads_no_more_is_told() {
    let place = Place::new();
    let stdin = place.fifo("0");
    let (_pumps, mut guest) = joined(Urls {
        stdin: &stdin,
        ..NONE
    })
    .await
    .expect("a fifo");
    let mut input = writer(&stdin);
    drop(guest.stdin());
    let error = beside(move || {
        loop {
            if let Err(error) = input.write_all(&[0; CHUNK_BYTES]) {
                return error;
            }
        }
    })
    .await;
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn a_reader_that_goes_away_and_comes_back_loses_nothing() {
    let place = Place::new();
    let stdout = place.fifo("1");
    let mut first = reader(&stdout);
    let (pumps, mut guest) = joined(stdout_to(&stdout)).await.expect("a fifo");
    let (mut guest_out, sent) = (guest.stdout(), bytes(3_000_000));
    let to_send = sent.clone();
    thread::spawn(move || guest_out.write_all(&to_send).expect("no SIGPIPE"));
    let mut got = beside(move || {
        let mut got = vec![0; 100_000];
        first.read_exact(&mut got).expect("the beginning");
        got
    })
    .await;
    // Nobody reads now, and the guest's writer waits.
    pumps_turn().await;
    let rest = reader(&stdout);
    got.extend(beside(move || read_all(rest)).await);
    assert!(got == sent);
    assert_eq!(pumps.outputs_done().await, Outputs::Written);
}

#[tokio::test]
async fn what_a_guest_can_have_under_way_is_bounded() {
    let place = Place::new();
    let stdout = place.fifo("1");
    let _reads_nothing = reader(&stdout);
    let (_pumps, mut guest) = joined(stdout_to(&stdout)).await.expect("a fifo");
    let mut guest_out = guest.stdout();
    guest_out.set_nonblocking(true).expect("a socket");
    let buffered = rustix::net::sockopt::socket_send_buffer_size(&guest_out).expect("a socket");
    let mut sent = 0;
    // As long as the pump takes any of it.
    for _ in 0..1000 {
        while let Ok(count) = guest_out.write(&[0; 4096]) {
            sent += count;
        }
        tokio::task::yield_now().await;
    }
    let ours = 2 * 64 * 1024; // the fifo, and the pump
    assert!(sent >= ours && sent <= ours + buffered, "{sent} bytes");
}

#[tokio::test]
async fn pumps_that_are_dropped_close_everything() {
    let place = Place::new();
    let (stdin, stdout) = (place.fifo("0"), place.fifo("1"));
    let out = reader(&stdout);
    let urls = Urls {
        stdin: &stdin,
        stdout: &stdout,
        ..NONE
    };
    let (pumps, mut guest) = joined(urls).await.expect("fifos");
    let (guest_in, guest_out) = (guest.stdin(), guest.stdout());
    let (mut input, done) = (writer(&stdin), pumps.outputs_done());
    drop(pumps);
    assert_eq!(done.await, Outputs::NobodyReads);
    beside(move || {
        assert!(
            read_all(out).is_empty()
                && read_all(guest_in).is_empty()
                && read_all(guest_out).is_empty()
        );
        let error = input.write(b"x").expect_err("nobody reads");
        assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    })
    .await;
}
