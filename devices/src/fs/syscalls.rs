//! The system calls that a file-system thread makes after it was sealed, for the VMM's seccomp filter.
//!
//! Derived from the code and checked by the tests of this module, which serve every operation under a filter
//! of exactly this list. A call that is missing kills the thread at the first guest that needs it
//! (kata-containers#13510: LISTXATTR).

/// See the module text. Each may be made with any argument except where the comment says otherwise; whatever
/// is not here the threads do not need, above all `setresuid` and its like, `open_by_handle_at`, `mount` and
/// its like, `ptrace`, `kill`, `clone`, `execve`, `socket`.
pub const FS_SYSCALLS: &[libc::c_long] = &[
    // Waiting for the guest, and telling it.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_write,
    libc::SYS_futex,
    // Names.
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_statx,
    libc::SYS_symlinkat,
    libc::SYS_mknodat,
    libc::SYS_mkdirat,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_readlinkat,
    // Open files.
    libc::SYS_close,
    // Builds with debug assertions ask F_GETFD of each descriptor that they close.
    #[cfg(debug_assertions)]
    libc::SYS_fcntl,
    libc::SYS_dup,
    libc::SYS_preadv,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_getdents64,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_syncfs,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_copy_file_range,
    // Attributes.
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_fstatfs,
    libc::SYS_setxattr,
    libc::SYS_getxattr,
    libc::SYS_listxattr,
    libc::SYS_removexattr,
    // Whose file it is.
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_capget,
    libc::SYS_capset,
    // The keys of a thread's first hash map.
    libc::SYS_getrandom,
    // Memory (glibc's allocator), time, and the end of a thread. mmap and mprotect never with PROT_EXEC.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_clock_gettime,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    libc::SYS_exit,
];
