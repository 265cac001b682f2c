//! What goes wrong on the host's side of a disk. The guest is told by IOERR; here is what whoever runs the host wants to know.
//!
//! A request that makes no sense is no fault: no guest can make one happen, but by using a disk whose file fails, as often as it likes.

use rustix::io::Errno;
use std::fmt;

/// A request that the host could not do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskFault<'d> {
    /// Which disk.
    pub id: &'d str,
    /// What the host said; `None` if the file ended before the disk does, because somebody cut it short.
    pub errno: Option<Errno>,
}

impl fmt::Display for DiskFault<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "disk {:?}: ", self.id)?;
        match self.errno {
            None => write!(f, "its file ends before the disk does"),
            Some(errno) => write!(f, "{}", std::io::Error::from(errno)),
        }
    }
}

/// Who is told of each fault, on the event loop's thread. It must not wait.
pub type OnFault = Box<dyn Fn(&DiskFault<'_>) + Send + Sync>;
