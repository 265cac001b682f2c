//! What a pod that execs for weeks must not do: leak a descriptor or grow. Alone in its program, so that the descriptors are its own.

use capsid_shim::stdio::{GuestEnds, Outputs, Stdio, Urls};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use tokio::time::timeout;

const EXECS: u32 = 10_000;
/// After so many the memory is what it will be, but for this: some hundred bytes for each exec would be more.
const WARM_UP: u32 = 1000;
const GROWTH_MAX_KIB: u64 = 1024;

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("proc");
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = kib.and_then(|kib| kib.trim().strip_suffix(" kB"));
    kib.and_then(|kib| kib.parse().ok()).expect("a number")
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("proc").count()
}

/// Threads that wait for a fifo's reader; those of tokio's pool come and go by themselves.
fn waiting_threads() -> usize {
    let threads = std::fs::read_dir("/proc/self/task")
        .expect("proc")
        .flatten();
    let names = threads.map(|thread| std::fs::read_to_string(thread.path().join("comm")));
    names
        .flatten()
        .filter(|name| name == "fifo-reader\n")
        .count()
}

/// One exec with all three streams, both sides played: the guest answers with what it was told.
async fn exec(place: &Path, count: u32) {
    let paths: Vec<String> = ["0", "1", "2"]
        .iter()
        .map(|name| {
            let path = place.join(name);
            mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a fifo");
            path.to_str().expect("a plain path").to_owned()
        })
        .collect();
    let reader = |path: &String| -> File {
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .expect("a fifo")
    };
    let (mut out, mut err) = (reader(&paths[1]), reader(&paths[2]));
    let urls = Urls {
        stdin: &paths[0],
        stdout: &paths[1],
        stderr: &paths[2],
        terminal: false,
        id: "exec",
        namespace: "default",
    };
    let stdio = Stdio::open(urls).await.expect("fifos");
    let (mut guest_in, stdin) = UnixStream::pair().expect("sockets");
    let (mut guest_out, stdout) = UnixStream::pair().expect("sockets");
    let (guest_err, stderr) = UnixStream::pair().expect("sockets");
    let ends = GuestEnds {
        stdin: Some(stdin),
        stdout: Some(stdout),
        stderr: Some(stderr),
    };
    let pumps = stdio.join(ends).expect("polled");
    let word = count.to_le_bytes();
    OpenOptions::new()
        .write(true)
        .open(&paths[0])
        .expect("a fifo")
        .write_all(&word)
        .expect("room");
    pumps.close_stdin();
    let answered = tokio::task::spawn_blocking(move || {
        let mut heard = Vec::new();
        guest_in.read_to_end(&mut heard).expect("a stream");
        guest_out.write_all(&heard).expect("room");
        guest_err.shutdown(Shutdown::Both).expect("a stream");
    });
    answered.await.expect("no panic");
    assert_eq!(pumps.outputs_done().await, Outputs::Written);
    let mut heard = Vec::new();
    out.read_to_end(&mut heard).expect("all there");
    assert_eq!(heard, word);
    assert_eq!(err.read(&mut [0]).expect("at its end"), 0);
    pumps.close().await;
    for path in paths {
        std::fs::remove_file(path).expect("ours");
    }
}

/// What fails or is given up half-way.
async fn failures(place: &Path) {
    let unread = place.join("unread");
    mknodat(CWD, &unread, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a fifo");
    let unread = unread.to_str().expect("a plain path");
    let urls = |stdout| Urls {
        stdin: "",
        stdout,
        stderr: unread,
        terminal: false,
        id: "exec",
        namespace: "default",
    };
    let opening = Stdio::open(urls(
        "binary:///bin/sh?-c=exec%205%3E%26-%3Bread%20line%20%3C%263",
    ));
    assert!(
        timeout(Duration::from_millis(20), opening).await.is_err(),
        "nobody reads"
    );
    // Its client cleans up, and that must not matter.
    std::fs::remove_file(unread).expect("ours");
    assert!(Stdio::open(urls("/dev/null")).await.is_err(), "not there");
    assert!(
        Stdio::open(urls("binary:///not/there")).await.is_err(),
        "not there"
    );
    assert!(
        Stdio::open(urls("binary-v2:///bin/true")).await.is_err(),
        "not ready"
    );
}

/// Descriptors, waiting threads and tasks. The ends of what was given up are waited for.
async fn settled_at(expected: (usize, usize, usize)) {
    let tasks = || {
        tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks()
    };
    let now = || (descriptors(), waiting_threads(), tasks());
    let late = Instant::now() + Duration::from_secs(60);
    while now() != expected && Instant::now() < late {
        tokio::task::yield_now().await;
    }
    assert_eq!(now(), expected);
}

#[tokio::test]
async fn ten_thousand_execs_and_a_hundred_failures_leave_nothing() {
    let place = std::env::temp_dir().join(format!("shim-descriptors-{}", std::process::id()));
    std::fs::create_dir(&place).expect("a directory");
    exec(&place, 0).await;
    let (before, mut warm_kib) = ((descriptors(), 0, 0), 0);
    for count in 0..EXECS {
        exec(&place, count).await;
        if count == WARM_UP {
            warm_kib = resident_kib();
        }
        if count % 100 == 0 {
            failures(&place).await;
        }
    }
    settled_at(before).await;
    let grown_kib = resident_kib().saturating_sub(warm_kib);
    assert!(grown_kib < GROWTH_MAX_KIB, "{grown_kib} KiB");
    std::fs::remove_dir(&place).expect("empty");
}
