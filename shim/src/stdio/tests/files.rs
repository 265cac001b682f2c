//! What can be opened as a stream, and what cannot.

use super::*;
use crate::stdio::{BadUrl, OpenError, Outputs, Stream};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use std::os::fd::AsRawFd;
use std::sync::mpsc;
use std::thread;

fn open_error(error: StdioError) -> (Stream, OpenError) {
    match error {
        StdioError::Open { stream, cause, .. } => (stream, cause),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_file_is_made_with_its_directories_and_appended_to() {
    let place = Place::new();
    let log = place.name("a/b/log");
    let url = format!("file://{log}");
    for word in [b"one ", b"two "] {
        let (pumps, mut guest) = joined(Urls {
            stdout: &url,
            stderr: &url,
            ..NONE
        })
        .await
        .expect("a file");
        for mut output in [guest.stdout(), guest.stderr()] {
            output.write_all(word).expect("room");
        }
        assert_eq!(pumps.outputs_done().await, Outputs::Written);
    }
    assert_eq!(std::fs::read(&log).expect("made"), b"one one two two ");
}

#[tokio::test]
async fn a_path_alone_may_be_a_file_but_is_never_made() {
    let place = Place::new();
    let log = place.name("log");
    let error = Stdio::open(Urls {
        stderr: &log,
        ..NONE
    })
    .await
    .expect_err("not there");
    assert!(matches!(
        open_error(error),
        (Stream::Stderr, OpenError::Failed(_))
    ));
    std::fs::write(&log, "kept ").expect("a file");
    let (pumps, mut guest) = joined(Urls {
        stderr: &log,
        ..NONE
    })
    .await
    .expect("a file");
    let mut guest_err = guest.stderr();
    beside(move || guest_err.write_all(&bytes(300_000)).expect("it is read")).await;
    assert_eq!(pumps.outputs_done().await, Outputs::Written);
    let read = std::fs::read(&log).expect("there");
    assert!(read.starts_with(b"kept ") && read.ends_with(&bytes(300_000)));
}

/// A file of `/proc` may only have so many bytes: what a full disk is.
#[tokio::test]
async fn a_full_disk_loses_what_does_not_fit_and_blocks_nobody() {
    let disk = memfd_create("disk", MemfdFlags::ALLOW_SEALING).expect("a file");
    ftruncate(&disk, 4096).expect("room");
    fcntl_add_seals(&disk, SealFlags::GROW).expect("full");
    let log = format!("file:///proc/self/fd/{}", disk.as_raw_fd());
    let (pumps, mut guest) = joined(stdout_to(&log)).await.expect("a file");
    let mut guest_out = guest.stdout();
    beside(move || guest_out.write_all(&bytes(4_000_000)).expect("it is read")).await;
    assert_eq!(pumps.outputs_done().await, Outputs::Written);
}

#[tokio::test]
async fn what_is_no_stream_is_refused_by_its_name() {
    let place = Place::new();
    let socket = place.name("socket");
    let _listening = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
    let error = Stdio::open(stdout_to(&socket)).await.expect_err("a socket");
    assert!(matches!(
        open_error(error),
        (Stream::Stdout, OpenError::Failed(_))
    ));
    let error = Stdio::open(stdout_to("/dev/zero"))
        .await
        .expect_err("a device");
    assert!(matches!(
        open_error(error),
        (Stream::Stdout, OpenError::Kind)
    ));
    let file = place.name("file");
    std::fs::write(&file, "x").expect("a file");
    let error = Stdio::open(Urls {
        stdin: &file,
        ..NONE
    })
    .await
    .expect_err("a file");
    assert!(matches!(
        open_error(error),
        (Stream::Stdin, OpenError::Kind)
    ));
    let streaming = "ttrpc+unix:///run/x.sock?streaming_id=1";
    let error = Stdio::open(Urls {
        stdin: streaming,
        ..NONE
    })
    .await
    .expect_err("streaming");
    match error {
        StdioError::Name {
            stream: Stream::Stdin,
            cause: BadUrl::Streaming(_),
            ..
        } => {}
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn a_fifo_is_opened_once_somebody_reads_it() {
    let place = Place::new();
    let stdout = place.fifo("1");
    let path = stdout.clone();
    let (is_opening, opening) = mpsc::channel();
    let reading = thread::spawn(move || {
        opening.recv().expect("the other thread");
        // Blocks as well: each waits for the other.
        read_all(File::open(path).expect("a fifo"))
    });
    let open = tokio::spawn(async move {
        let (pumps, mut guest) = joined(stdout_to(&stdout)).await.expect("a fifo");
        guest.stdout().write_all(b"heard").expect("room");
        drop(guest);
        assert_eq!(pumps.outputs_done().await, Outputs::Written);
    });
    tokio::task::yield_now().await;
    is_opening.send(()).expect("the other thread");
    open.await.expect("read");
    assert_eq!(
        beside(move || reading.join().expect("the reader")).await,
        b"heard"
    );
}

#[tokio::test(start_paused = true)]
async fn a_fifo_that_nobody_reads_is_given_up_after_30_s() {
    let place = Place::new();
    let stdout = place.fifo("1");
    let begun = tokio::time::Instant::now();
    let error = Stdio::open(stdout_to(&stdout))
        .await
        .expect_err("nobody reads");
    assert!(matches!(
        open_error(error),
        (Stream::Stdout, OpenError::NoReader)
    ));
    assert_eq!(begun.elapsed().as_secs(), 30);
}
