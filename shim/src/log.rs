//! The server's log: lines in logfmt, as containerd's own, into the bundle's fifo `log`, which containerd copies into its log. `delete`, whose
//! standard error containerd logs as a warning, writes there what is one.
//!
//! The reader may be slow, gone or not there yet: a line that cannot be written at once is dropped and counted, and the next one that gets
//! through says how many are missing. Lines hold text of strangers: it is quoted, and cut where it is too long.

use crate::info::RUNTIME;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use std::fmt::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Metadata, Subscriber, span};

/// The longest line in bytes: what a pipe takes whole or not at all (PIPE_BUF, pipe(7)).
const LINE_MAX_BYTES: usize = 4096;
/// The longest message in bytes, as it is written.
const MESSAGE_MAX_BYTES: usize = 2048;
/// The longest value of a field in bytes, as it is written.
const VALUE_MAX_BYTES: usize = 1024;
/// The longest of what every line says, in bytes: ids and namespaces have 76 (containerd's identifiers).
const WHO_VALUE_MAX_BYTES: usize = 128;
/// What a field takes beside its name and value: ` `, `=`, two quotes and the sign that it was cut.
const FIELD_EXTRA_BYTES: usize = 4 + CUT.len_utf8();
/// What the end of a line takes: ` cut=true dropped=18446744073709551615` and a newline.
const END_MAX_BYTES: usize = 40;
/// What ends a text that was cut.
const CUT: char = '…';

/// Takes all that is logged in this process from now on, panics too, to the fifo in `bundle`. To be called once.
pub fn start(bundle: &Path, namespace: &str, id: &str, debug: bool) {
    let level = if debug {
        LevelFilter::DEBUG
    } else {
        LevelFilter::INFO
    };
    let fifo = Place::Fifo {
        path: bundle.join("log"),
        open: None,
    };
    set(Log::new(fifo, namespace, id, level));
    std::panic::set_hook(Box::new(|panic| {
        let payload = panic.payload();
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
        let place = panic.location().map(ToString::to_string);
        tracing::error!(place, "panic: {}", text.unwrap_or("no text"));
    }));
}

/// Takes warnings and errors to standard error. To be called once.
pub fn start_on_standard_error(namespace: &str, id: &str) {
    set(Log::new(
        Place::StandardError,
        namespace,
        id,
        LevelFilter::WARN,
    ));
}

fn set(log: Log) {
    // A second call, which nobody makes, would leave the first log in place.
    let _first = tracing::subscriber::set_global_default(log);
}

/// A subscriber that knows events and no spans.
#[derive(Debug)]
struct Log {
    level: LevelFilter,
    /// The fields of every line.
    who: String,
    sink: Mutex<Sink>,
}

impl Log {
    fn new(place: Place, namespace: &str, id: &str, level: LevelFilter) -> Log {
        let mut who = String::new();
        for (name, value) in [("runtime", RUNTIME), ("namespace", namespace), ("id", id)] {
            push_field(&mut who, name, &value, WHO_VALUE_MAX_BYTES);
        }
        let sink = Mutex::new(Sink { place, dropped: 0 });
        Log { level, who, sink }
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level)
    }

    fn event(&self, event: &Event<'_>) {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let mut line = Line::new(now, level_name(*event.metadata().level()), &self.who);
        event.record(&mut line);
        let text = line.end();
        let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        sink.write(text);
    }

    // Spans are not enabled, so no span is ever handed out: the number is for the trait alone.
    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// As containerd's log writes them (github.com/sirupsen/logrus).
fn level_name(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        Level::INFO => "info",
        Level::DEBUG => "debug",
        Level::TRACE => "trace",
    }
}

/// A line in the making. The message comes first among what an event records.
struct Line<'a> {
    text: String,
    who: &'a str,
    cut: bool,
}

impl<'a> Line<'a> {
    fn new(now: Duration, level: &str, who: &'a str) -> Line<'a> {
        let text = format!("time=\"{}\" level={level}", utc(now));
        let cut = false;
        Line { text, who, cut }
    }

    fn field(&mut self, name: &str, value: &dyn fmt::Display) {
        let (name, longest) = match name {
            "message" => ("msg", MESSAGE_MAX_BYTES),
            name => (name, VALUE_MAX_BYTES),
        };
        let taken =
            self.text.len() + self.who.len() + END_MAX_BYTES + name.len() + FIELD_EXTRA_BYTES;
        match LINE_MAX_BYTES.checked_sub(taken) {
            Some(room) => push_field(&mut self.text, name, value, room.min(longest)),
            None => self.cut = true,
        }
    }

    /// The line, without what comes last.
    fn end(mut self) -> String {
        self.text.push_str(self.who);
        if self.cut {
            self.text.push_str(" cut=true");
        }
        self.text
    }
}

impl Visit for Line<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.field(field.name(), &format_args!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.field(field.name(), &value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.field(field.name(), &value);
    }
}

/// Adds ` name=value`, in quotes where it needs them, with at most `longest` bytes of value.
fn push_field(line: &mut String, name: &str, value: &dyn fmt::Display, longest: usize) {
    let mut quoted = Quoted {
        text: String::new(),
        longest,
    };
    let whole = write!(quoted, "{value}").is_ok();
    let mut text = quoted.text;
    if !whole {
        text.push(CUT);
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || "-._/@^+:".contains(c);
    line.extend([" ", name, "="]);
    match !text.is_empty() && text.chars().all(plain) {
        true => line.push_str(&text),
        false => line.extend(["\"", &text, "\""]),
    }
}

/// Text as between quotes of logfmt (those of Go's `strconv.Quote`); it takes what fits, and refuses the rest.
struct Quoted {
    text: String,
    longest: usize,
}

impl fmt::Write for Quoted {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            let mut escaped = String::new();
            match c {
                '"' | '\\' => escaped.extend(['\\', c]),
                '\n' => escaped.push_str("\\n"),
                '\t' => escaped.push_str("\\t"),
                // Control characters, and those that make a text read as another: all have four digits.
                c if c.is_control()
                    || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') =>
                {
                    write!(escaped, "\\u{:04x}", u32::from(c))?;
                }
                c => escaped.push(c),
            }
            if self.text.len() + escaped.len() > self.longest {
                return Err(fmt::Error);
            }
            self.text.push_str(&escaped);
        }
        Ok(())
    }
}

/// Where lines go.
#[derive(Debug)]
enum Place {
    Fifo {
        path: PathBuf,
        open: Option<OwnedFd>,
    },
    StandardError,
}

#[derive(Debug)]
struct Sink {
    place: Place,
    dropped: u64,
}

impl Sink {
    fn write(&mut self, mut line: String) {
        if self.dropped > 0 {
            let _written = write!(line, " dropped={}", self.dropped);
        }
        line.push('\n');
        self.dropped = match self.put(line.as_bytes()) {
            Ok(()) => 0,
            Err(_nobody_takes_it) => self.dropped.saturating_add(1),
        };
    }

    fn put(&mut self, line: &[u8]) -> rustix::io::Result<()> {
        let (path, fifo) = match &mut self.place {
            Place::Fifo { path, open } => (path, open),
            Place::StandardError => return write_whole(std::io::stderr(), line),
        };
        if let Some(open) = fifo {
            match write_whole(&*open, line) {
                // The reader left. Another may have come, perhaps to another fifo.
                Err(Errno::PIPE) => *fifo = None,
                other => return other,
            }
        }
        write_whole(fifo.insert(open(path)?), line)
    }
}

/// Opens the fifo if somebody reads it: otherwise ENXIO (fifo(7)).
fn open(path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let fifo = rustix::fs::open(path, flags, Mode::empty())?;
    match FileType::from_raw_mode(rustix::fs::fstat(&fifo)?.st_mode) {
        FileType::Fifo => Ok(fifo),
        _ => Err(Errno::NXIO),
    }
}

/// No longer than a pipe takes at once, so it is all or nothing.
fn write_whole(pipe: impl AsFd, line: &[u8]) -> rustix::io::Result<()> {
    rustix::io::retry_on_intr(|| rustix::io::write(&pipe, line)).map(drop)
}

/// A time since 1970 as RFC 3339 has it, in UTC.
fn utc(since_epoch: Duration) -> String {
    let seconds = since_epoch.as_secs();
    let (year, month, day) = date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let nanos = since_epoch.subsec_nanos();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
}

/// The date of a day since 1970-01-01. Years begin in March here, so that the day that may be missing is the last one.
fn date(day: u64) -> (u64, u64, u64) {
    const ERA_DAYS: u64 = 146_097; // 400 years
    let since_march = day + 719_468; // from 0000-03-01
    let (era, in_era) = (since_march / ERA_DAYS, since_march % ERA_DAYS);
    let year_of_era = (in_era - in_era / 1460 + in_era / 36_524 - in_era / 146_096) / 365;
    let in_year = in_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Months of 31, 30, 31, 30, 31 days, over and over.
    let since_march = (5 * in_year + 2) / 153;
    let day = in_year - (153 * since_march + 2) / 5 + 1;
    let month = if since_march < 10 {
        since_march + 3
    } else {
        since_march - 9
    };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
