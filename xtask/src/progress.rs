//! What a person sees while xtask works: one line when a step starts, one when it ends with the time it took, and the plain
//! commands in between. Everything goes to stderr, so that stdout belongs to the command being run.
//!
//! A step's commands write into one log file; `command` shows its tail when one of them fails.

use std::fmt::Display;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

/// Runs of the same step at the same time write to different logs; more than this many are refused.
const LOGS_PER_STEP_MAX: u32 = 64;

/// A step that is over sooner than this is not worth a line where somebody else's output counts.
const ANNOUNCE_AFTER_MS: u64 = 1000;

/// The clock of one xtask call and the place for its logs.
#[derive(Debug)]
pub struct Progress {
    started: Instant,
    logs: PathBuf,
    patience: Duration,
}

/// One step being worked on.
#[derive(Debug)]
pub struct Step {
    log: File,
    log_path: PathBuf,
    lines: Arc<Lines>,
}

/// What a step has to say, held back while it may still be over soon.
#[derive(Debug, Default)]
struct Lines {
    held: Mutex<Held>,
    over: Condvar,
}

#[derive(Debug, Default)]
struct Held {
    lines: Vec<String>,
    shown: bool,
    over: bool,
}

/// A step's log could not be made.
#[derive(Debug, thiserror::Error)]
#[error("making the log {}", path.display())]
pub struct LogError {
    path: PathBuf,
    #[source]
    cause: io::Error,
}

impl Progress {
    /// Starts the clock; `logs` is the directory for the steps' logs.
    pub fn new(logs: PathBuf) -> Self {
        Self {
            started: Instant::now(),
            logs,
            patience: Duration::ZERO,
        }
    }

    /// As `new`, but silent about steps that are over at once.
    pub fn quiet(logs: PathBuf) -> Self {
        Self {
            patience: Duration::from_millis(ANNOUNCE_AFTER_MS),
            ..Self::new(logs)
        }
    }

    /// Runs `work` as a step with a name a person understands.
    ///
    /// # Errors
    /// What `work` returns, or that the log could not be made.
    pub fn step<T, E: From<LogError>>(
        &self,
        name: &str,
        work: impl FnOnce(&Step) -> Result<T, E>,
    ) -> Result<T, E> {
        let step = Step::open(&self.logs, name)?;
        step.lines
            .say(format!("{} {name} ...", stamp(self.started.elapsed())));
        let announcer = self.announce(&step);
        let began = Instant::now();
        let result = work(&step);
        let shown = step.lines.finish(result.is_err());
        if let Some(announcer) = announcer {
            // It prints and cannot fail.
            let _ = announcer.join();
        }
        if shown {
            self.say(&format!(
                "{name} ... {}",
                outcome(result.is_ok(), began.elapsed())
            ));
        }
        result
    }

    /// Shows what the step says, from now on or when it has taken a while.
    fn announce(&self, step: &Step) -> Option<JoinHandle<()>> {
        if self.patience.is_zero() {
            step.lines.show();
            return None;
        }
        let (lines, patience) = (Arc::clone(&step.lines), self.patience);
        Some(std::thread::spawn(move || lines.show_after(patience)))
    }

    /// One line with the time since the start in front.
    pub fn say(&self, text: &(impl Display + ?Sized)) {
        eprintln!("{} {text}", stamp(self.started.elapsed()));
    }
}

impl Step {
    fn open(logs: &Path, name: &str) -> Result<Self, LogError> {
        let stem: String = name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .collect();
        let failed = |path: &Path, cause| LogError {
            path: path.to_owned(),
            cause,
        };
        std::fs::create_dir_all(logs).map_err(|cause| failed(logs, cause))?;
        for number in 0..LOGS_PER_STEP_MAX {
            let log_path = logs.join(if number == 0 {
                format!("{stem}.log")
            } else {
                format!("{stem}.{number}.log")
            });
            let log = OpenOptions::new()
                .create(true)
                .append(true)
                .open(&log_path)
                .map_err(|cause| failed(&log_path, cause))?;
            if flock(&log, FlockOperation::NonBlockingLockExclusive).is_ok() {
                log.set_len(0).map_err(|cause| failed(&log_path, cause))?;
                return Ok(Self {
                    log,
                    log_path,
                    lines: Arc::default(),
                });
            }
        }
        Err(failed(
            &logs.join(stem),
            io::Error::from(io::ErrorKind::ResourceBusy),
        ))
    }

    /// A line for the person.
    pub fn say(&self, line: String) {
        self.lines.say(line);
    }

    /// The open log, in append mode.
    pub fn log(&self) -> &File {
        &self.log
    }

    /// Where the log is, for messages.
    pub fn log_path(&self) -> &Path {
        &self.log_path
    }
}

impl Lines {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn say(&self, line: String) {
        let mut held = self.held();
        if held.shown {
            eprintln!("{line}");
        } else {
            held.lines.push(line);
        }
    }

    fn show(&self) {
        self.held().show();
    }

    fn show_after(&self, patience: Duration) {
        let held = self.held();
        let waited = self
            .over
            .wait_timeout_while(held, patience, |held| !held.over);
        let (mut held, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if !held.over {
            held.show();
        }
    }

    /// The step is over; says whether it was shown. One that failed always is.
    fn finish(&self, failed: bool) -> bool {
        let mut held = self.held();
        held.over = true;
        if failed {
            held.show();
        }
        self.over.notify_all();
        held.shown
    }
}

impl Held {
    fn show(&mut self) {
        self.shown = true;
        for line in self.lines.drain(..) {
            eprintln!("{line}");
        }
    }
}

fn stamp(since: Duration) -> String {
    format!("[{:6.1} s]", since.as_secs_f64())
}

fn outcome(ok: bool, took: Duration) -> String {
    if ok {
        format!("done in {:.1} s", took.as_secs_f64())
    } else {
        format!("FAILED after {:.1} s", took.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stamps_line_up() {
        assert_eq!(stamp(Duration::from_millis(12_340)), "[  12.3 s]");
        assert_eq!(stamp(Duration::from_millis(1_012_340)), "[1012.3 s]");
    }

    #[test]
    fn a_short_step_is_held_back_and_a_failed_one_shown() {
        let short = Lines::default();
        short.say("line".to_owned());
        assert!(!short.finish(false));
        assert!(Lines::default().finish(true));
    }

    #[test]
    fn a_long_step_is_shown_while_it_lasts() {
        let long = Lines::default();
        long.show_after(Duration::ZERO);
        assert!(long.finish(false));
    }

    #[test]
    fn two_steps_of_one_name_at_once_have_two_logs() {
        let dir = std::env::temp_dir().join(format!("xtask-progress-{}", std::process::id()));
        let first = Step::open(&dir, "a step").expect("first log");
        let second = Step::open(&dir, "a step").expect("second log");
        assert_ne!(first.log_path(), second.log_path());
        std::fs::remove_dir_all(&dir).expect("remove");
    }
}
