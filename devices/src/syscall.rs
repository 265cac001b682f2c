//! What plain system calls return, for the few that have no safe wrapper.

use rustix::io::Errno;

/// The count that a call of libc returned, or its error.
///
/// # Errors
/// `errno`, if the count is negative.
pub(crate) fn count(done: isize) -> Result<usize, Errno> {
    usize::try_from(done).map_err(|_| {
        let code = std::io::Error::last_os_error().raw_os_error();
        Errno::from_raw_os_error(code.unwrap_or(libc::EIO))
    })
}
