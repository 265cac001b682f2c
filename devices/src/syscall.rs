//! What plain system calls take and return, for the few that have no safe wrapper.

use rustix::io::Errno;
use vm_memory::VolatileSlice;

/// Most vectors of one call, which is what the kernel takes (`UIO_MAXIOV`).
pub(crate) const VECTORS_MAX: usize = 1024;

/// A slice of guest memory as the kernel takes it. It borrows nothing: whoever hands it to the kernel sees to it that the memory is
/// mapped as long as that has it.
pub(crate) fn vector(slice: &VolatileSlice<'_>) -> libc::iovec {
    libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    }
}

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
