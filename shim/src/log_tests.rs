use super::*;
use crate::testing::Scratch;
use proptest::prelude::*;
use std::fs::File;
use std::io::Read;

struct Bundle {
    scratch: Scratch,
}

impl Bundle {
    fn new() -> Bundle {
        let bundle = Bundle {
            scratch: Scratch::new("log"),
        };
        bundle.make_fifo();
        bundle
    }

    fn fifo(&self) -> PathBuf {
        self.scratch.path().join("log")
    }

    fn make_fifo(&self) {
        let mode = Mode::from_raw_mode(0o600);
        rustix::fs::mkfifoat(rustix::fs::CWD, self.fifo(), mode).expect("writable");
    }

    /// Waits until nobody has it open for reading: a child of another test has all our descriptors from its fork to its exec.
    fn without_reader(&self) {
        let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::NONBLOCK;
        let open = || rustix::fs::open(self.fifo(), flags, Mode::empty());
        while !matches!(open(), Err(rustix::io::Errno::NXIO)) {
            std::thread::yield_now();
        }
    }

    /// As containerd opens it (core/runtime/v2/shim_unix.go, `openShimLog`), but for reading alone: its end can be seen.
    fn reader(&self) -> File {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        File::from(rustix::fs::open(self.fifo(), flags, Mode::empty()).expect("a fifo"))
    }

    fn log(&self) -> Log {
        let fifo = Place::Fifo {
            path: self.fifo(),
            open: None,
        };
        Log::new(fifo, "k8s.io", "c1", LevelFilter::INFO)
    }
}

fn lines(reader: &mut File) -> Vec<String> {
    let mut bytes = vec![0; 1 << 17];
    let count = match reader.read(&mut bytes) {
        Ok(count) => count,
        Err(error) => {
            assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock);
            0
        }
    };
    let text = String::from_utf8(bytes[..count].to_vec()).expect("UTF-8");
    text.lines().map(str::to_owned).collect()
}

#[test]
fn a_line_is_logfmt_with_who_says_it() {
    let bundle = Bundle::new();
    let mut reader = bundle.reader();
    tracing::subscriber::with_default(bundle.log(), || {
        tracing::info!(boot_ms = 12, cause = "a \"b\"\n\u{1b}[2J", path = %"/run/x", "pod started");
        tracing::debug!("not shown");
        tracing::warn!(error = %Errno::NOENT, "");
    });
    let lines = lines(&mut reader);
    let [first, second] = lines.as_slice() else {
        panic!("two lines, got {lines:?}");
    };
    let (time, rest) = first.split_once(" level=").expect("a level");
    assert!(
        time.starts_with("time=\"2") && time.ends_with("Z\""),
        "{time}"
    );
    let who = "runtime=io.containerd.capsid.v2 namespace=k8s.io id=c1";
    let expected = r#"info msg="pod started" boot_ms=12 cause="a \"b\"\n\u001b[2J" path=/run/x"#;
    assert_eq!(rest, format!("{expected} {who}"));
    let expected =
        r#" level=warning msg="" error="No such file or directory (os error 2)" runtime="#;
    assert!(second.contains(expected), "{second}");
}

#[test]
fn a_long_line_is_cut_so_that_it_stays_one_write() {
    let bundle = Bundle::new();
    let mut reader = bundle.reader();
    let long = "\u{1}".repeat(100_000);
    tracing::subscriber::with_default(bundle.log(), || {
        tracing::error!(a = long, b = long, c = long, d = long, e = 1, "{long}");
    });
    let lines = lines(&mut reader);
    let [line] = lines.as_slice() else {
        panic!("one line, got {}", lines.len());
    };
    assert!(line.len() < LINE_MAX_BYTES, "{}", line.len());
    assert!(
        line.contains("…\"") && line.contains(" id=c1 cut=true"),
        "{line}"
    );
}

#[test]
fn without_a_reader_lines_are_dropped_and_counted() {
    let bundle = Bundle::new();
    tracing::subscriber::with_default(bundle.log(), || {
        tracing::info!("nobody");
        tracing::info!("nobody");
        let mut reader = bundle.reader();
        tracing::info!("here");
        tracing::info!("again");
        let lines = lines(&mut reader);
        let [first, second] = lines.as_slice() else {
            panic!("two lines, got {lines:?}");
        };
        assert!(
            first.contains("msg=here") && first.ends_with(" dropped=2"),
            "{first}"
        );
        assert!(
            second.contains("msg=again") && !second.contains("dropped"),
            "{second}"
        );
    });
}

#[test]
fn a_reader_that_comes_back_is_found_on_the_same_fifo_and_on_a_new_one() {
    let bundle = Bundle::new();
    tracing::subscriber::with_default(bundle.log(), || {
        let reader = bundle.reader();
        tracing::info!("one");
        drop(reader);
        bundle.without_reader();
        tracing::info!("two");
        let mut reader = bundle.reader();
        tracing::info!("three");
        assert!(lines(&mut reader)[0].ends_with("dropped=1"));
        drop(reader);
        bundle.without_reader();
        std::fs::remove_file(bundle.fifo()).expect("ours");
        bundle.make_fifo();
        let mut reader = bundle.reader();
        tracing::info!("four");
        let lines = lines(&mut reader);
        assert!(
            lines.len() == 1 && lines[0].contains("msg=four"),
            "{lines:?}"
        );
    });
}

#[test]
fn a_reader_that_does_not_read_holds_nobody() {
    let bundle = Bundle::new();
    let mut reader = bundle.reader();
    tracing::subscriber::with_default(bundle.log(), || {
        for _ in 0..2000 {
            tracing::info!("{}", "x".repeat(1000));
        }
        let taken = lines(&mut reader).len();
        tracing::info!("room again");
        let next = lines(&mut reader);
        let dropped = format!(" dropped={}", 2000 - taken);
        assert!(
            taken > 10 && next[0].ends_with(&dropped),
            "{taken}, {next:?}"
        );
    });
}

#[test]
fn a_file_in_the_fifo_s_place_is_not_written() {
    let bundle = Bundle::new();
    std::fs::remove_file(bundle.fifo()).expect("ours");
    std::fs::write(bundle.fifo(), "").expect("writable");
    tracing::subscriber::with_default(bundle.log(), || tracing::info!("a line"));
    assert_eq!(std::fs::read(bundle.fifo()).expect("there"), b"");
}

/// Names the bundle to the process that is to panic: this test again.
const PANICS: &str = "CAPSID_TEST_PANICS";

#[test]
fn a_panic_is_logged_and_not_shown() {
    if let Some(bundle) = std::env::var_os(PANICS) {
        start(Path::new(&bundle), "k8s.io", "c1", false);
        panic!("on purpose");
    }
    let bundle = Bundle::new();
    let mut reader = bundle.reader();
    let mut this = std::process::Command::new(std::env::current_exe().expect("this program"));
    this.args(["--exact", "log::tests::a_panic_is_logged_and_not_shown"]);
    let output = this
        .arg("--nocapture")
        .env(PANICS, bundle.scratch.path())
        .output();
    let output = output.expect("this program");
    assert!(!output.status.success());
    let shown = [output.stdout, output.stderr].concat();
    assert!(!String::from_utf8_lossy(&shown).contains("on purpose"));
    let lines = lines(&mut reader);
    let [line] = lines.as_slice() else {
        panic!("one line, got {lines:?}");
    };
    assert!(
        line.contains(" level=error msg=\"panic: on purpose\" place=")
            && line.contains("log_tests.rs:"),
        "{line}"
    );
}

#[test]
fn times_are_utc() {
    let shown = |seconds| utc(Duration::new(seconds, 7));
    assert_eq!(shown(0), "1970-01-01T00:00:00.000000007Z");
    assert_eq!(shown(951_782_399), "2000-02-28T23:59:59.000000007Z");
    assert_eq!(shown(951_782_400), "2000-02-29T00:00:00.000000007Z");
    assert_eq!(shown(1_709_251_200), "2024-03-01T00:00:00.000000007Z");
    assert_eq!(shown(4_107_542_400), "2100-03-01T00:00:00.000000007Z");
}

proptest! {
    #[test]
    fn days_follow_one_another(day in 0_u64..200_000) {
        let leap = |y: u64| y % 4 == 0 && (y % 100 != 0 || y % 400 == 0);
        let (year, month, of_month) = date(day);
        let length = match month {
            2 => 28 + u64::from(leap(year)),
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        let next = match (month, of_month == length) {
            (_, false) => (year, month, of_month + 1),
            (12, true) => (year + 1, 1, 1),
            (_, true) => (year, month + 1, 1),
        };
        prop_assert_eq!(date(day + 1), next);
    }

    #[test]
    fn any_text_is_one_field_of_printable_text(value: String, longest in 0_usize..200) {
        let mut line = String::new();
        push_field(&mut line, "k", &value, longest);
        prop_assert!(!line.chars().any(char::is_control));
        prop_assert!(line.len() <= " k=".len() + 2 + longest + CUT.len_utf8());
        let text = line.strip_prefix(" k=").expect("the name");
        if let Some(quoted) = text.strip_prefix('"') {
            let mut inside = quoted.strip_suffix('"').expect("a closing quote").chars();
            while let Some(c) = inside.next() {
                prop_assert!(c != '"');
                if c == '\\' {
                    prop_assert!(matches!(inside.next(), Some('"' | '\\' | 'n' | 't' | 'u')));
                }
            }
        } else {
            prop_assert_eq!(text, value);
        }
    }
}
