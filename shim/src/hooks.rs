//! Hooks that run on the host (runtime-spec, `config.md`, "POSIX-platform Hooks"): prestart, createRuntime, poststart and poststop. createContainer and
//! startContainer run in the guest; the agent does that.
//!
//! They are programs of whoever wrote the spec, and are trusted with the host as with runc; not trusted is that they end. One runs at a time, in
//! the bundle, with exactly its own environment and the state of the container on its standard input, a file, so that it blocks nobody whether
//! it reads or not. It ends in time or is killed with its process group, and is reaped in each case, also when the caller gives up.

use crate::spec::Refusal;
use capsid_owner::escape::Line;
use oci_spec::runtime::{Hook as SpecHook, Hooks, Spec};
use rustix::fs::{MemfdFlags, SeekFrom};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Signal};
use serde::Serialize;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::net::unix::pipe::Receiver;
use tokio::process::{Child, Command};

/// Most hooks of one kind.
const HOOKS_MAX: usize = 64;
/// How long a hook may take that names no time itself, in seconds: longer than any network takes to be set up, shorter than the patience of a
/// kubelet (two minutes).
const TIMEOUT_S: u64 = 100;
/// Longest time that a hook may name itself, in seconds.
const TIMEOUT_MAX_S: u64 = 3600;
/// How much of the end of what a hook says is kept for the error, in bytes.
const LAST_WORDS_MAX_BYTES: usize = 4096;
/// How much is read at once, in bytes.
const READ_BYTES: usize = 4096;
/// Most reads in one turn of the event loop: more than a pipe holds (64 KiB, pipe(7)), so what a hook said before it ended is read in one.
const TURN_MAX_READS: usize = 32;
/// Most lines of it in the error.
const LAST_LINES_MAX: usize = 5;
/// How long a hook that was killed may take to be gone.
const REAP_TIMEOUT: Duration = Duration::from_secs(5);

/// One hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    path: PathBuf,
    args: Vec<String>,
    env: Vec<(String, String)>,
    timeout: Duration,
}

/// A container's hooks on the host, in the order in which they run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostHooks {
    /// prestart, then createRuntime: when namespaces and mounts are there, before the container is. A failure fails Create.
    pub create: Vec<Hook>,
    /// poststart: after the user's program was started. A failure stops the container, as with runc.
    pub started: Vec<Hook>,
    /// poststop: after the container was deleted. Failures are said and nothing more, and the next one runs.
    pub stopped: Vec<Hook>,
}

/// The container's state as a hook reads it (runtime-spec, `runtime.md`, "State").
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct State<'a> {
    /// `ociVersion` of the spec.
    pub oci_version: &'a str,
    /// The container's id.
    pub id: &'a str,
    /// What it is doing.
    pub status: Status,
    /// Its task pid: the thread in its namespaces. None once it is stopped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Its bundle; hooks run there.
    pub bundle: &'a Path,
    /// The annotations of the spec.
    pub annotations: &'a HashMap<String, String>,
}

/// `status` of a [`State`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// For prestart and createRuntime.
    Creating,
    /// For poststart.
    Running,
    /// For poststop.
    Stopped,
}

/// Why a hook did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// The state cannot be handed over.
    #[error("cannot prepare hook {path}")]
    Prepare {
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// It cannot be executed.
    #[error("cannot execute hook {path}")]
    Execute {
        /// The program.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// It did not end by itself.
    #[error("hook {path} did not end within {limit_s} s and was killed{}", said(.last_words))]
    Timeout {
        /// The program.
        path: PathBuf,
        /// Its limit.
        limit_s: u64,
        /// The end of its standard error.
        last_words: String,
    },
    /// It failed.
    #[error("hook {path} {}{}", ended(*.status), said(.last_words))]
    Failed {
        /// The program.
        path: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// The end of its standard error.
        last_words: String,
    },
}

fn ended(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("ended with {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "ended in no known way".to_owned(),
    }
}

fn said(last_words: &str) -> String {
    match last_words {
        "" => String::new(),
        words => format!("; its last words: {words}"),
    }
}

impl HostHooks {
    /// Takes the host's hooks out of a spec; those of the guest stay.
    ///
    /// # Errors
    /// A hook that cannot be run.
    #[allow(deprecated)] // docker and nerdctl still write prestart hooks
    pub fn take(spec: &mut Spec) -> Result<HostHooks, Refusal> {
        let Some(mut all) = spec.hooks().clone() else {
            return Ok(HostHooks::default());
        };
        let mut create = parse("hooks.prestart", all.prestart())?;
        create.extend(parse("hooks.createRuntime", all.create_runtime())?);
        let hooks = HostHooks {
            create,
            started: parse("hooks.poststart", all.poststart())?,
            stopped: parse("hooks.poststop", all.poststop())?,
        };
        all.set_prestart(None);
        all.set_create_runtime(None);
        all.set_poststart(None);
        all.set_poststop(None);
        spec.set_hooks(Some(all).filter(|left| *left != Hooks::default()));
        Ok(hooks)
    }
}

fn parse(kind: &str, hooks: &Option<Vec<SpecHook>>) -> Result<Vec<Hook>, Refusal> {
    let hooks = hooks.as_deref().unwrap_or_default();
    let refuse = |field: String, problem: String| Err(Refusal { field, problem });
    if hooks.len() > HOOKS_MAX {
        return refuse(kind.to_owned(), format!("at most {HOOKS_MAX} hooks"));
    }
    let mut parsed = Vec::with_capacity(hooks.len());
    for (index, hook) in hooks.iter().enumerate() {
        let field = |name| format!("{kind}[{index}].{name}");
        if !hook.path().is_absolute() {
            return refuse(field("path"), "must be an absolute path".to_owned());
        }
        let timeout = match hook.timeout() {
            None => TIMEOUT_S,
            Some(seconds) => match u64::try_from(seconds) {
                Ok(seconds @ 1..=TIMEOUT_MAX_S) => seconds,
                _ => {
                    return refuse(
                        field("timeout"),
                        format!("must be 1 to {TIMEOUT_MAX_S} seconds"),
                    );
                }
            },
        };
        let mut env = Vec::new();
        for entry in hook.env().iter().flatten() {
            match entry.split_once('=') {
                Some((name, value)) if !name.is_empty() => {
                    env.push((name.to_owned(), value.to_owned()));
                }
                _ => {
                    return refuse(
                        field("env"),
                        "has an entry that is not NAME=VALUE".to_owned(),
                    );
                }
            }
        }
        parsed.push(Hook {
            path: hook.path().clone(),
            args: hook.args().clone().unwrap_or_default(),
            env,
            timeout: Duration::from_secs(timeout),
        });
    }
    Ok(parsed)
}

/// Runs hooks one after the other, up to the first that fails.
///
/// # Errors
/// That one.
pub async fn run(hooks: &[Hook], state: &State<'_>) -> Result<(), HookError> {
    for hook in hooks {
        hook.run(state).await?;
    }
    Ok(())
}

/// Runs every hook, one after the other, and hands back what failed.
pub async fn run_each(hooks: &[Hook], state: &State<'_>) -> Vec<HookError> {
    let mut failures = Vec::new();
    for hook in hooks {
        failures.extend(hook.run(state).await.err());
    }
    failures
}

impl Hook {
    async fn run(&self, state: &State<'_>) -> Result<(), HookError> {
        let prepare = |cause| HookError::Prepare {
            path: self.path.clone(),
            cause,
        };
        let stdin = state_file(state).map_err(prepare)?;
        let (stderr, their_stderr) = stderr_pipe().map_err(prepare)?;
        let mut child = self.spawn(state.bundle, stdin, their_stderr)?;
        let mut group = Group::of(&child);
        let mut last_words = LastWords::default();
        let ended =
            tokio::time::timeout(self.timeout, watch(&mut child, &stderr, &mut last_words)).await;
        match ended {
            Ok(Ok(status)) => {
                // It was reaped, so its number may soon be another's.
                group.0 = None;
                if status.success() {
                    return Ok(());
                }
                Err(HookError::Failed {
                    path: self.path.clone(),
                    status,
                    last_words: last_words.text(),
                })
            }
            Ok(Err(cause)) => Err(prepare(cause)),
            Err(_late) => {
                group.kill();
                // What is left to do when it cannot even be killed in this time, the runtime does: it reaps whom we drop.
                if tokio::time::timeout(REAP_TIMEOUT, child.wait())
                    .await
                    .is_ok()
                {
                    group.0 = None;
                }
                Err(HookError::Timeout {
                    path: self.path.clone(),
                    limit_s: self.timeout.as_secs(),
                    last_words: last_words.text(),
                })
            }
        }
    }

    fn spawn(&self, bundle: &Path, stdin: File, stderr: OwnedFd) -> Result<Child, HookError> {
        let mut command = Command::new(&self.path);
        if let Some((name, rest)) = self.args.split_first() {
            command.arg0(name).args(rest);
        }
        command
            .env_clear()
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .current_dir(bundle)
            .stdin(stdin)
            .stdout(Stdio::null())
            .stderr(stderr)
            .process_group(0)
            .kill_on_drop(true);
        command.spawn().map_err(|cause| HookError::Execute {
            path: self.path.clone(),
            cause,
        })
    }
}

/// Reads what the hook says until it ends. Its standard error may stay open in a process that it left behind: nobody waits for that.
async fn watch(
    child: &mut Child,
    stderr: &Receiver,
    words: &mut LastWords,
) -> io::Result<ExitStatus> {
    let mut open = true;
    loop {
        tokio::select! {
            status = child.wait() => {
                // Past the event loop, which may not have heard yet of what came last.
                words.read(|bytes| Ok(rustix::io::read(stderr, bytes)?))?;
                return status;
            }
            ready = stderr.readable(), if open => {
                ready?;
                match words.read(|bytes| stderr.try_read(bytes))? {
                    Left::Nothing => {}
                    Left::More => tokio::task::yield_now().await,
                    Left::End => open = false,
                }
            }
        }
    }
}

/// A process group that is killed when this is dropped.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Group {
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        Group(pid.and_then(Pid::from_raw))
    }

    fn kill(&self) {
        if let Some(pid) = self.0 {
            // Fails only where nobody is left in it.
            let _gone = rustix::process::kill_process_group(pid, Signal::KILL);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What is left in a pipe after a turn of reading.
enum Left {
    Nothing,
    More,
    End,
}

/// The end of what a hook said.
#[derive(Default)]
struct LastWords(Vec<u8>);

impl LastWords {
    /// Reads what is there, for one turn.
    fn read(&mut self, mut pipe: impl FnMut(&mut [u8]) -> io::Result<usize>) -> io::Result<Left> {
        let mut bytes = [0; READ_BYTES];
        for _ in 0..TURN_MAX_READS {
            match pipe(&mut bytes) {
                Ok(0) => return Ok(Left::End),
                Ok(count) => {
                    self.0
                        .extend_from_slice(bytes.get(..count).unwrap_or_default());
                    let surplus = self.0.len().saturating_sub(LAST_WORDS_MAX_BYTES);
                    self.0.drain(..surplus);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Left::Nothing),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(Left::More)
    }

    /// On one line, the lines parted by a bar.
    fn text(&self) -> String {
        let text = String::from_utf8_lossy(&self.0);
        let lines = text
            .lines()
            .map(str::trim_end)
            .filter(|line| !line.is_empty());
        let lines: Vec<String> = lines
            .map(|line| Line(line.as_bytes()).to_string())
            .collect();
        let first = lines.len().saturating_sub(LAST_LINES_MAX);
        lines.get(first..).unwrap_or_default().join(" | ")
    }
}

/// An unnamed file with the state, to be read from its beginning.
fn state_file(state: &State<'_>) -> io::Result<File> {
    let mut file = File::from(rustix::fs::memfd_create("oci-state", MemfdFlags::CLOEXEC)?);
    file.write_all(&serde_json::to_vec(state)?)?;
    rustix::fs::seek(&file, SeekFrom::Start(0))?;
    Ok(file)
}

/// Our end does not block; theirs is as programs expect it.
fn stderr_pipe() -> io::Result<(Receiver, OwnedFd)> {
    let (ours, theirs) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    Ok((Receiver::from_owned_fd(ours)?, theirs))
}

#[cfg(test)]
#[path = "hooks_tests.rs"]
mod tests;
