//! What each kind of thread may ask of the kernel. Nothing that opens a path, makes a process, changes who
//! we are or maps code.

use super::{Rule, Test, When};
use capsid_devices::net::TAP_SET_OFFLOAD;
use libc::{
    AF_UNIX, F_DUPFD_CLOEXEC, F_GETFL, F_SETFL, FIONBIO, FUTEX_CLOCK_REALTIME, FUTEX_PRIVATE_FLAG,
    FUTEX_WAIT, FUTEX_WAIT_BITSET, FUTEX_WAKE, PROT_EXEC, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET,
    SYS_brk, SYS_clock_gettime, SYS_close, SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_wait,
    SYS_eventfd2, SYS_exit, SYS_exit_group, SYS_fcntl, SYS_fstat, SYS_futex, SYS_getpid,
    SYS_getrandom, SYS_getsockopt, SYS_gettid, SYS_io_uring_enter, SYS_io_uring_register,
    SYS_ioctl, SYS_lseek, SYS_madvise, SYS_mmap, SYS_mprotect, SYS_mremap, SYS_munmap, SYS_ppoll,
    SYS_read, SYS_readv, SYS_recvfrom, SYS_recvmsg, SYS_restart_syscall, SYS_rt_sigprocmask,
    SYS_rt_sigreturn, SYS_sched_yield, SYS_sendmsg, SYS_sendto, SYS_shutdown, SYS_sigaltstack,
    SYS_socketpair, SYS_tgkill, SYS_timerfd_settime, SYS_write, SYS_writev,
};

/// `KVM_IOEVENTFD`.
const KVM_IOEVENTFD: u32 = 0x4040_ae79;
/// `IORING_REGISTER_FILES_UPDATE`.
const IORING_REGISTER_FILES_UPDATE: u32 = 6;
/// The block sizes of a block device.
const BLKSSZGET: u32 = 0x1268;
const BLKPBSZGET: u32 = 0x127b;
/// What a tap device is, and the size of its header.
const TUNGETIFF: u32 = 0x8004_54d2;
const TUNSETVNETHDRSZ: u32 = 0x4004_54d8;
/// `KVM_IRQ_LINE`.
const KVM_IRQ_LINE: u32 = 0x4008_ae61;
/// `KVM_RUN`.
const KVM_RUN: u32 = 0xae80;
/// `KVM_SIGNAL_MSI`.
const KVM_SIGNAL_MSI: u32 = 0x4020_aea5;

/// `KVM_SET_USER_MEMORY_REGION`.
const KVM_SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;

const fn always(call: i64) -> Rule {
    Rule { call, when: &[] }
}

macro_rules! when {
    ($call:expr, $($argument:literal, $test:expr),+) => {
        Rule {
            call: $call,
            when: &[$(When {
                argument: $argument,
                test: $test,
            }),+],
        }
    };
}

/// One operation of futex(2). Whether the word is shared, and by which clock a wait is timed, differs from one C library to
/// the next.
const fn futex(operation: i32) -> Test {
    let either = (FUTEX_PRIVATE_FLAG | FUTEX_CLOCK_REALTIME) as u32;
    Test::IsApartFrom(operation as u32, either)
}

/// What a thread of any kind may do only like this, and the end of the process, which a panic on any thread is.
pub(super) const EVERY_THREAD: &[Rule] = &[
    always(SYS_exit_group),
    // Locks, conditions and joins wait and wake. Requeueing and priority inheritance, where the kernel had most of its holes
    // in futexes, are nobody's.
    when!(SYS_futex, 1, futex(FUTEX_WAIT)),
    when!(SYS_futex, 1, futex(FUTEX_WAIT_BITSET)),
    when!(SYS_futex, 1, futex(FUTEX_WAKE)),
    // Memory is never code.
    when!(SYS_mmap, 2, Test::Lacks(PROT_EXEC as u32)),
    when!(SYS_mprotect, 2, Test::Lacks(PROT_EXEC as u32)),
    // Asked of each descriptor that is closed, in builds with debug assertions alone.
    #[cfg(debug_assertions)]
    when!(SYS_fcntl, 1, Test::Is(libc::F_GETFD as u32)),
];

/// The main thread and those of vCPUs: memory, time, the end of a thread; wake-ups and messages to KVM; output.
pub(super) const MAIN_AND_VCPU: &[Rule] = &[
    always(SYS_brk),
    always(SYS_clock_gettime),
    always(SYS_close),
    always(SYS_exit),
    always(SYS_getpid),
    always(SYS_getrandom),
    always(SYS_gettid),
    always(SYS_madvise),
    always(SYS_mremap),
    always(SYS_munmap),
    always(SYS_restart_syscall),
    always(SYS_rt_sigprocmask),
    always(SYS_rt_sigreturn),
    always(SYS_sched_yield),
    always(SYS_sigaltstack),
    // Eventfds, the serial port's fd, stderr.
    always(SYS_ppoll),
    always(SYS_read),
    always(SYS_write),
    // A device is activated on the thread of the vCPU that asked for it, and watches its queues from there.
    always(SYS_epoll_ctl),
    when!(SYS_ioctl, 1, Test::Is(KVM_SIGNAL_MSI)),
    // Memory that is plugged and unplugged: by the event loop, and what is left of a request by the vCPU that resets the device.
    when!(SYS_ioctl, 1, Test::Is(KVM_SET_USER_MEMORY_REGION)),
];

/// A vCPU's thread.
pub(super) const VCPU: &[Rule] = &[
    when!(SYS_ioctl, 1, Test::Is(KVM_RUN)),
    // The serial port's interrupt.
    when!(SYS_ioctl, 1, Test::Is(KVM_IRQ_LINE)),
    // A network card is activated here, and then told what the driver takes.
    when!(SYS_ioctl, 1, Test::Is(TAP_SET_OFFLOAD)),
];

/// A share's thread, beside [`capsid_devices::fs::FS_SYSCALLS`].
pub(super) const FILE_SYSTEM: &[Rule] = &[
    // Its interrupts.
    when!(SYS_ioctl, 1, Test::Is(KVM_SIGNAL_MSI)),
];

/// The main thread.
pub(super) const MAIN: &[Rule] = &[
    always(SYS_epoll_pwait),
    always(SYS_epoll_wait),
    // Connections of the guest: both ends are made here, one goes to the owner.
    when!(
        SYS_socketpair,
        0,
        Test::Is(AF_UNIX as u32),
        1,
        Test::Is((SOCK_STREAM | SOCK_CLOEXEC) as u32)
    ),
    // The kind of a socket that the owner sent; only asked for once, when it comes.
    when!(SYS_getsockopt, 1, Test::Is(SOL_SOCKET as u32)),
    // The deadlines of half-open connections.
    always(SYS_timerfd_settime),
    // The calls of disks; the ring was made and restricted before (`capsid_devices::blk`).
    always(SYS_io_uring_enter),
    always(SYS_readv),
    always(SYS_recvfrom),
    always(SYS_recvmsg),
    always(SYS_sendmsg),
    always(SYS_sendto),
    always(SYS_shutdown),
    always(SYS_writev),
    when!(SYS_fcntl, 1, Test::Is(F_DUPFD_CLOEXEC as u32)),
    when!(SYS_fcntl, 1, Test::Is(F_GETFL as u32)),
    when!(SYS_fcntl, 1, Test::Is(F_SETFL as u32)),
    when!(SYS_ioctl, 1, Test::Is(FIONBIO as u32)),
    // Devices that come and go: their kicks, the file of a disk, the settings of a tap device.
    always(SYS_eventfd2),
    when!(SYS_ioctl, 1, Test::Is(KVM_IOEVENTFD)),
    when!(
        SYS_io_uring_register,
        1,
        Test::Is(IORING_REGISTER_FILES_UPDATE)
    ),
    always(SYS_fstat),
    always(SYS_lseek),
    when!(SYS_ioctl, 1, Test::Is(BLKSSZGET)),
    when!(SYS_ioctl, 1, Test::Is(BLKPBSZGET)),
    when!(SYS_ioctl, 1, Test::Is(TUNGETIFF)),
    when!(SYS_ioctl, 1, Test::Is(TUNSETVNETHDRSZ)),
    when!(SYS_ioctl, 1, Test::Is(TAP_SET_OFFLOAD)),
    // Stopping the vCPU threads, by that signal and no other.
    when!(SYS_tgkill, 0, Test::IsOwnPid, 2, Test::IsWakeUp),
];
