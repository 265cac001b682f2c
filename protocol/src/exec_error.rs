//! How the agent says that a program could not be executed, so that a host can tell it from every other
//! refusal: CreateContainer, StartContainer or Exec answer INVALID_ARGUMENT and a text that opens with
//! one of the prefixes here. The prefixes are part of the protocol: they never change within a version.

/// Why the kernel did not execute the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExecError {
    /// No such file, neither at the path nor in `PATH`; or the interpreter that a script names is missing.
    NotFound,
    /// The file is there, but may not be executed: permission, a directory, or an unknown format.
    NotExecutable,
}

impl ExecError {
    /// What the text of the refusal opens with.
    pub const fn prefix(self) -> &'static str {
        match self {
            ExecError::NotFound => "executable not found: ",
            ExecError::NotExecutable => "permission denied: not executable: ",
        }
    }

    /// The exit code that a shell, and docker, give for it.
    pub const fn exit_code(self) -> u8 {
        match self {
            ExecError::NotFound => 127,
            ExecError::NotExecutable => 126,
        }
    }

    /// Reads the text of a refusal: the kind, and what follows its prefix. `None`: another refusal.
    pub fn parse(text: &str) -> Option<(ExecError, &str)> {
        [ExecError::NotFound, ExecError::NotExecutable]
            .into_iter()
            .find_map(|kind| text.strip_prefix(kind.prefix()).map(|rest| (kind, rest)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_executable_is_127() {
        let text = format!("{}nope", ExecError::NotFound.prefix());
        assert_eq!(ExecError::parse(&text), Some((ExecError::NotFound, "nope")));
        assert_eq!(ExecError::NotFound.exit_code(), 127);
    }

    #[test]
    fn a_directory_is_126() {
        let text = format!("{}/etc", ExecError::NotExecutable.prefix());
        assert_eq!(
            ExecError::parse(&text),
            Some((ExecError::NotExecutable, "/etc"))
        );
        assert_eq!(ExecError::NotExecutable.exit_code(), 126);
    }

    #[test]
    fn another_refusal_is_not_an_exec_error() {
        assert_eq!(ExecError::parse("process.cwd: must be absolute"), None);
    }
}
