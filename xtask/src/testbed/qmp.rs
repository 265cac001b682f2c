//! The few words of QEMU's machine protocol that the testbed needs, over an inherited socket.
//!
//! Trusts QEMU, which we started; still every answer has a deadline.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::{Value, json};

/// QEMU answers a command at once; loading or saving the machine's state takes a second or two on a busy machine.
const ANSWER_TIMEOUT_MS: u64 = 120_000;
/// A line longer than this is no answer of QEMU's.
const LINE_MAX_BYTES: u64 = 1 << 20;

/// Why QEMU did not do it.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// The socket failed; mostly because QEMU ended.
    #[error("talking to QEMU about `{doing}`")]
    Io {
        /// The command.
        doing: String,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
    /// QEMU ended.
    #[error("QEMU ended during `{doing}`")]
    Ended {
        /// The command.
        doing: String,
    },
    /// The line is not JSON.
    #[error("reading QEMU's answer to `{doing}`")]
    Parse {
        /// The command.
        doing: String,
        /// Where it is not.
        #[source]
        cause: serde_json::Error,
    },
    /// QEMU said no.
    #[error("QEMU refused `{doing}`: {why}")]
    Refused {
        /// The command.
        doing: String,
        /// QEMU's words.
        why: String,
    },
}

/// A conversation with one QEMU.
#[derive(Debug)]
pub struct Qmp {
    reader: BufReader<UnixStream>,
}

impl Qmp {
    /// Greets QEMU and gets it to take commands.
    ///
    /// # Errors
    /// It did not answer in time, or ended.
    pub fn start(socket: UnixStream) -> Result<Self, QmpError> {
        let timeout = Some(Duration::from_millis(ANSWER_TIMEOUT_MS));
        socket
            .set_read_timeout(timeout)
            .map_err(|cause| QmpError::Io {
                doing: "start".to_owned(),
                cause,
            })?;
        let mut qmp = Self {
            reader: BufReader::new(socket),
        };
        qmp.line("greeting")?;
        qmp.command("qmp_capabilities", &json!({}))?;
        // The memory is a file of its own, so it is no part of the state; events tell when the state is complete.
        let on = |name: &str| json!({ "capability": name, "state": true });
        let capabilities = json!({ "capabilities": [on("x-ignore-shared"), on("events")] });
        qmp.command("migrate-set-capabilities", &capabilities)?;
        Ok(qmp)
    }

    /// Writes the machine's state, memory excepted, to a file and waits until it is complete. The machine stands still then.
    ///
    /// # Errors
    /// QEMU could not.
    pub fn save(&mut self, uri: &str) -> Result<(), QmpError> {
        self.command("migrate", &json!({ "uri": uri }))?;
        self.migrated("migrate")
    }

    /// Loads the state from a file into a machine started with `-incoming defer`, which runs on from there.
    ///
    /// # Errors
    /// QEMU could not.
    pub fn load(&mut self, uri: &str) -> Result<(), QmpError> {
        self.command("migrate-incoming", &json!({ "uri": uri }))?;
        self.migrated("migrate-incoming")
    }

    /// Ends QEMU, after it has written back what it holds of its drives.
    ///
    /// # Errors
    /// QEMU could not.
    pub fn quit(&mut self) -> Result<(), QmpError> {
        self.command("quit", &json!({}))
    }

    fn command(&mut self, name: &str, arguments: &Value) -> Result<(), QmpError> {
        let io = |cause| QmpError::Io {
            doing: name.to_owned(),
            cause,
        };
        let text = json!({ "execute": name, "arguments": arguments }).to_string();
        self.reader
            .get_mut()
            .write_all(text.as_bytes())
            .map_err(io)?;
        loop {
            match outcome(&self.line(name)?) {
                Some(Ok(())) => return Ok(()),
                Some(Err(why)) => {
                    return Err(QmpError::Refused {
                        doing: name.to_owned(),
                        why,
                    });
                }
                None => {}
            }
        }
    }

    fn migrated(&mut self, doing: &str) -> Result<(), QmpError> {
        loop {
            match migration(&self.line(doing)?) {
                Some("completed") => return Ok(()),
                Some("failed") => {
                    let why = "the state could not be carried over".to_owned();
                    return Err(QmpError::Refused {
                        doing: doing.to_owned(),
                        why,
                    });
                }
                _ => {}
            }
        }
    }

    fn line(&mut self, doing: &str) -> Result<Value, QmpError> {
        let mut line = String::new();
        let read = io::Read::take(&mut self.reader, LINE_MAX_BYTES).read_line(&mut line);
        match read {
            Ok(0) => Err(QmpError::Ended {
                doing: doing.to_owned(),
            }),
            Ok(_) => serde_json::from_str(&line).map_err(|cause| QmpError::Parse {
                doing: doing.to_owned(),
                cause,
            }),
            Err(cause) => Err(QmpError::Io {
                doing: doing.to_owned(),
                cause,
            }),
        }
    }
}

/// What an answer says; `None` for an event.
fn outcome(line: &Value) -> Option<Result<(), String>> {
    if line.get("return").is_some() {
        return Some(Ok(()));
    }
    let error = line.get("error")?;
    Some(Err(error
        .get("desc")
        .and_then(Value::as_str)
        .unwrap_or("no reason given")
        .to_owned()))
}

/// The status that a migration event tells.
fn migration(line: &Value) -> Option<&str> {
    if line.get("event")?.as_str()? != "MIGRATION" {
        return None;
    }
    line.get("data")?.get("status")?.as_str()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_and_events_are_told_apart() {
        assert_eq!(outcome(&json!({"return": {}})), Some(Ok(())));
        assert_eq!(
            outcome(&json!({"error": {"class": "G", "desc": "no"}})),
            Some(Err("no".to_owned()))
        );
        assert_eq!(outcome(&json!({"event": "STOP"})), None);
    }

    #[test]
    fn only_a_migration_event_tells_a_status() {
        assert_eq!(
            migration(&json!({"event": "MIGRATION", "data": {"status": "completed"}})),
            Some("completed")
        );
        assert_eq!(
            migration(&json!({"event": "MIGRATION_PASS", "data": {"pass": 1}})),
            None
        );
        assert_eq!(migration(&json!({"return": {}})), None);
    }

    #[test]
    fn a_qemu_that_ends_is_told() {
        let (ours, theirs) = UnixStream::pair().expect("pair");
        drop(theirs);
        assert!(matches!(Qmp::start(ours), Err(QmpError::Ended { .. })));
    }

    #[test]
    fn a_refusal_carries_qemus_words() {
        let (ours, mut theirs) = UnixStream::pair().expect("pair");
        theirs
            .write_all(b"{\"QMP\": {}}\r\n{\"error\": {\"desc\": \"not today\"}}\r\n")
            .expect("write");
        let error = Qmp::start(ours).expect_err("refused");
        assert_eq!(
            error.to_string(),
            "QEMU refused `qmp_capabilities`: not today"
        );
    }
}
