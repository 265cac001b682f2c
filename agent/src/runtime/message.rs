//! What the agent and its runtime process say to each other over a `SOCK_SEQPACKET` pair, and what the process
//! made by the runtime process says on its report pipe. JSON records, bounded, descriptors by `SCM_RIGHTS`.

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

/// Longest record in bytes.
const RECORD_MAX_BYTES: usize = 16 * 1024;
/// Longest text of an error in bytes.
pub const TEXT_MAX_BYTES: usize = 1024;
/// Most descriptors with one record: a process's four, and the three that an exec needs besides.
const FDS_MAX_COUNT: usize = 7;

/// What the runtime process shall do. Descriptors 0, 1, 2 of the new process and its report pipe come with it.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// Make a container from a bundle.
    Create {
        /// Its id.
        container_id: String,
        /// Directory with the checked `config.json`.
        bundle: PathBuf,
        /// Directory in which libcontainer keeps its state.
        state_root: PathBuf,
        /// Listen here for the terminal's master, if the process has a terminal.
        console_socket: Option<PathBuf>,
        /// The container has a network namespace of its own: bring `lo` up in it.
        loopback: bool,
    },
    /// Start one more process in a container; its init's pidfd, its cgroup's directory and that of its init's cgroup
    /// come, too.
    Exec {
        /// Directory with the container's `config.json`.
        bundle: PathBuf,
        /// The checked OCI process, a JSON file.
        process: PathBuf,
    },
    /// Make the pause process; its cgroup's directory comes, too.
    Pause,
}

/// What the runtime process answers, in this order.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// The terminal's master comes with this.
    Terminal,
    /// The process exists. The runtime process stays its parent until this is acknowledged by any record.
    Pid(i32),
    /// There is no process.
    Failed(String),
}

/// What the new process writes to its report pipe, which closes when its program is executed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// No such program.
    NotFound(String),
    /// The program may not be executed.
    NotExecutable(String),
    /// Something before the execution failed.
    Failed(String),
    /// execve(2) comes next; end of file after this is success.
    Executing,
}

/// Sends one record.
///
/// # Errors
/// It is too long, or the other side is gone.
pub fn send<T: Serialize>(socket: &OwnedFd, record: &T, fds: &[RawFd]) -> io::Result<()> {
    let bytes = serde_json::to_vec(record)?;
    if bytes.len() > RECORD_MAX_BYTES || fds.len() > FDS_MAX_COUNT {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let rights = [ControlMessage::ScmRights(fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights };
    let iov = [IoSlice::new(&bytes)];
    sendmsg::<UnixAddr>(
        socket.as_raw_fd(),
        &iov,
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// Receives one record and its descriptors (close-on-exec); `UnexpectedEof` if the other side is gone.
///
/// # Errors
/// Timeout of the socket, end of file, or a record that is not a `T`.
pub fn receive<T: DeserializeOwned>(socket: &OwnedFd) -> io::Result<(T, Vec<OwnedFd>)> {
    let mut bytes = vec![0; RECORD_MAX_BYTES];
    let mut space = cmsg_space!([RawFd; FDS_MAX_COUNT]);
    let mut iov = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let (length, fds) = loop {
        match recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut iov, Some(&mut space), flags) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
            Ok(message) => {
                let mut fds = Vec::new();
                for control in message.cmsgs()? {
                    if let ControlMessageOwned::ScmRights(raw) = control {
                        fds.extend(raw.into_iter().map(own));
                    }
                }
                break (message.bytes, fds);
            }
        }
    };
    if length == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let record = serde_json::from_slice(bytes.get(..length).unwrap_or_default())?;
    Ok((record, fds))
}

#[allow(unsafe_code)] // SCM_RIGHTS hands out raw descriptors
pub(super) fn own(raw: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just installed this descriptor for us; nobody else knows its number.
    unsafe { OwnedFd::from_raw_fd(raw) }
}

/// The start of `text`, bounded, on one line.
pub fn bounded(text: &str) -> String {
    let mut short = String::new();
    for c in text.chars() {
        if short.len() + c.len_utf8() > TEXT_MAX_BYTES {
            break;
        }
        short.push(if c.is_control() { ' ' } else { c });
    }
    short
}

/// Reads the records of a report pipe; lines that are none are skipped.
pub fn reports(bytes: &[u8]) -> Vec<Report> {
    bytes
        .split(|b| *b == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn a_record_and_its_descriptor_arrive() {
        let (a, b) = UnixDatagram::pair().expect("a pair");
        let (a, b) = (OwnedFd::from(a), OwnedFd::from(b));
        send(&a, &Answer::Pid(7), &[a.as_raw_fd()]).expect("sent");
        let (answer, fds) = receive::<Answer>(&b).expect("received");
        assert!(matches!(answer, Answer::Pid(7)));
        assert_eq!(fds.len(), 1);
    }

    #[test]
    fn reports_are_read_line_by_line() {
        let bytes = b"\"Executing\"\n{\"NotFound\":\"sh\"}\n";
        let read = vec![Report::Executing, Report::NotFound("sh".into())];
        assert_eq!(reports(bytes), read);
    }

    #[test]
    fn a_line_that_is_no_report_is_skipped() {
        assert_eq!(reports(b"{\"Sudden"), vec![]);
    }

    #[test]
    fn a_text_is_cut_and_kept_on_one_line() {
        assert_eq!(bounded("a\nb"), "a b");
        assert_eq!(bounded(&"x".repeat(5000)).len(), TEXT_MAX_BYTES);
    }
}
