//! The last step of a container process: find the program as a shell would, say what went wrong in a
//! form the host can act on, execute. Runs inside the container with its user, capabilities and seccomp
//! filter, so every path seen here is the image's.

use super::message::{Report, bounded};
use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use oci_spec::runtime::{Process, Spec};
use rustix::fs::Access;
use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Where programs are sought when the environment says nothing.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Executes the user's program and reports on a pipe that the execution closes.
#[derive(Clone, Debug)]
pub(super) struct ReportingExecutor {
    report: Arc<OwnedFd>,
}

impl ReportingExecutor {
    pub(super) fn new(report: OwnedFd) -> ReportingExecutor {
        ReportingExecutor {
            report: Arc::new(report),
        }
    }

    /// Writes a record; the reader bounds what it takes.
    pub(super) fn say(&self, report: &Report) {
        if let Ok(mut line) = serde_json::to_vec(report) {
            line.push(b'\n');
            // Nobody is left to hear it: the exit status will have to do.
            let _ = rustix::io::write(&*self.report, &line);
        }
    }

    /// Replaces this process by the program; returns only to say why it could not.
    pub(super) fn execute(&self, process: &Process) -> Report {
        let program = match find(process) {
            Ok(program) => program,
            Err(report) => return report,
        };
        let text = |s: &String| CString::new(s.as_bytes());
        let args: Result<Vec<CString>, _> = process.args().iter().flatten().map(text).collect();
        let env: Result<Vec<CString>, _> = process.env().iter().flatten().map(text).collect();
        let path = CString::new(program.as_os_str().as_encoded_bytes());
        let (Ok(path), Ok(args), Ok(env)) = (path, args, env) else {
            return Report::Failed(
                "a NUL byte in the program's path, arguments or environment".into(),
            );
        };
        self.say(&Report::Executing);
        let Err(errno) = nix::unistd::execve(&path, &args, &env);
        let what = bounded(&format!("{}: {}", program.display(), errno.desc()));
        match errno {
            // The file is there: ENOENT means the interpreter that it names (execve(2)).
            nix::errno::Errno::ENOENT | nix::errno::Errno::ENOTDIR => Report::NotFound(what),
            nix::errno::Errno::EACCES
            | nix::errno::Errno::EPERM
            | nix::errno::Errno::EISDIR
            | nix::errno::Errno::ENOEXEC
            | nix::errno::Errno::ELIBBAD => Report::NotExecutable(what),
            _ => Report::Failed(what),
        }
    }
}

impl Executor for ReportingExecutor {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let process = spec.process().as_ref().ok_or(ExecutorError::InvalidArg)?;
        let report = self.execute(process);
        self.say(&report);
        Err(ExecutorError::Other(format!("{report:?}")))
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let missing = || ExecutorValidationError::ArgValidationError("no process".into());
        let process = spec.process().as_ref().ok_or_else(missing)?;
        find(process).map(|_| ()).map_err(|report| {
            self.say(&report);
            ExecutorValidationError::ArgValidationError(format!("{report:?}"))
        })
    }

    /// The environment is passed to execve(2) in the order of the spec; this process needs none.
    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        Ok(())
    }
}

/// The program's path: as given if it has a slash, else the first executable file along `PATH`.
fn find(process: &Process) -> Result<PathBuf, Report> {
    let name = process.args().as_ref().and_then(|args| args.first());
    let name = name.map_or("", String::as_str);
    if name.contains('/') {
        return match kind(Path::new(name)) {
            Kind::Executable => Ok(name.into()),
            Kind::Denied => Err(Report::NotExecutable(bounded(name))),
            Kind::Absent => Err(Report::NotFound(bounded(name))),
        };
    }
    let mut denied = None;
    for directory in search_path(process).split(':') {
        // A relative entry would mean the working directory; nobody wants that of a container.
        if !directory.starts_with('/') || name.is_empty() {
            continue;
        }
        let candidate = Path::new(directory).join(name);
        match kind(&candidate) {
            Kind::Executable => return Ok(candidate),
            Kind::Denied if !candidate.is_dir() => denied = Some(candidate),
            Kind::Denied | Kind::Absent => {}
        }
    }
    match denied {
        Some(path) => Err(Report::NotExecutable(bounded(&path.to_string_lossy()))),
        None => Err(Report::NotFound(bounded(&format!("{name:?} in PATH")))),
    }
}

fn search_path(process: &Process) -> &str {
    let mut env = process.env().iter().flatten();
    env.find_map(|entry| entry.strip_prefix("PATH="))
        .unwrap_or(DEFAULT_PATH)
}

enum Kind {
    Executable,
    Denied,
    Absent,
}

fn kind(path: &Path) -> Kind {
    match path.metadata() {
        Ok(found) if !found.is_file() => Kind::Denied,
        Ok(_) => match rustix::fs::access(path, Access::EXEC_OK) {
            Err(rustix::io::Errno::ACCESS) => Kind::Denied,
            // Anything else (a seccomp filter may forbid the question) is for execve to say.
            _ => Kind::Executable,
        },
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => Kind::Denied,
        Err(_) => Kind::Absent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::ProcessBuilder;

    fn process(name: &str, path: &str) -> Process {
        let builder = ProcessBuilder::default().args(vec![name.to_owned()]);
        let built = builder.env(vec![format!("PATH={path}")]).build();
        built.expect("a process")
    }

    #[test]
    fn a_name_is_found_along_the_path() {
        let found = find(&process("sh", "/nowhere:/bin"));
        assert_eq!(found, Ok(PathBuf::from("/bin/sh")));
    }

    #[test]
    fn a_missing_name_is_not_found() {
        assert!(matches!(
            find(&process("no-such", "/bin")),
            Err(Report::NotFound(_))
        ));
    }

    #[test]
    fn a_missing_path_is_not_found() {
        assert!(matches!(
            find(&process("/no/such", "")),
            Err(Report::NotFound(_))
        ));
    }

    #[test]
    fn a_directory_is_not_executable() {
        assert!(matches!(
            find(&process("/etc", "")),
            Err(Report::NotExecutable(_))
        ));
    }

    #[test]
    fn a_file_without_x_is_not_executable() {
        let found = find(&process("passwd", "/etc"));
        assert!(matches!(found, Err(Report::NotExecutable(_))));
    }

    #[test]
    fn a_relative_path_entry_is_never_searched() {
        assert!(matches!(
            find(&process("Cargo.toml", ".")),
            Err(Report::NotFound(_))
        ));
    }

    #[test]
    fn an_empty_name_is_not_found() {
        assert!(matches!(
            find(&process("", "/bin")),
            Err(Report::NotFound(_))
        ));
    }
}
