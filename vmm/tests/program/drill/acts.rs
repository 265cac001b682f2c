//! What no thread may do: the list. None of it would harm the host if it were done, but for what it says.

use super::neighbour::Neighbour;
use libc::*;
use rustix::io::Errno;
use std::ffi::CStr;

/// An argument of a call.
pub(super) enum Argument<'a> {
    Number(i64),
    /// The address of a text.
    Text(&'a CStr),
    /// The address of some bytes.
    Bytes(&'a [u8]),
    /// The address of a page that is shared with the tester.
    Page,
    /// The descriptor of the share's root.
    ShareRoot,
    /// The descriptor of a file of the host, by its number in the process's table.
    HostFile,
    /// Its name in `/proc/thread-self/fd`, where threads of shares are.
    HostFileName,
}

use Argument::{Bytes, HostFile, HostFileName, Number, Page, ShareRoot, Text};

/// One thing that no thread may do.
pub(super) struct Act<'a> {
    pub what: &'static str,
    pub call: i64,
    pub arguments: Vec<Argument<'a>>,
    /// What a thread of a share is told, where its filter lets the call through. Everyone else, and it everywhere else,
    /// ends by SIGSYS.
    pub share: Option<Errno>,
}

fn number(number: impl Into<i64>) -> Argument<'static> {
    Number(number.into())
}

/// An act that the filters of all threads refuse.
fn act<'a>(
    what: &'static str,
    call: i64,
    arguments: impl IntoIterator<Item = Argument<'a>>,
) -> Act<'a> {
    Act {
        what,
        call,
        arguments: arguments.into_iter().collect(),
        share: None,
    }
}

impl<'a> Act<'a> {
    fn but_a_share_is_told(self, errno: Errno) -> Act<'a> {
        let share = Some(errno);
        Act { share, ..self }
    }
}

/// All of them.
pub(super) fn acts(neighbour: &Neighbour) -> Vec<Act<'_>> {
    let mut acts = files(neighbour);
    acts.extend(mounts_and_roots());
    acts.extend(sockets());
    acts.extend(processes(neighbour));
    acts.extend(programs_and_code());
    acts.extend(identity());
    acts.extend(the_rest_of_the_kernel());
    acts
}

/// Files that are not in the share.
#[rustfmt::skip] // One act a line.
fn files(neighbour: &Neighbour) -> Vec<Act<'_>> {
    let [directory, file] = &neighbour.names;
    let here = || number(AT_FDCWD);
    let flags = |flags: i32| number(flags);
    let open = |what, path, how| {
        let opened = act(what, SYS_openat, [here(), Text(path), flags(how)]);
        opened.but_a_share_is_told(Errno::NOENT)
    };
    let passwd = c"/etc/passwd";
    let above = c"../../../../../etc/passwd";
    vec![
        open("read a file of the host", passwd, O_RDONLY),
        open("read its own program", c"/proc/self/exe", O_RDONLY),
        open("read another process's memory", c"/proc/1/mem", O_RDWR),
        open("open KVM", c"/dev/kvm", O_RDWR),
        open("open the host's memory", c"/dev/mem", O_RDWR),
        open("make a tap device", c"/dev/net/tun", O_RDWR),
        open("list another VM's directory", directory, O_RDONLY | O_DIRECTORY),
        open("read another VM's file", file, O_RDONLY),
        open("write another VM's file", file, O_WRONLY | O_TRUNC),
        open("move to another cgroup", c"/sys/fs/cgroup/cgroup.procs", O_WRONLY),
        open("climb out of its directory", above, O_RDONLY),
        open("see its own process in /proc", c"../status", O_RDONLY),
        act("open by the oldest call", SYS_open, [Text(passwd), flags(O_RDONLY)]),
        act("make by an old call", SYS_creat, [Text(passwd), number(0o600)]),
        act("open by the newest call", SYS_openat2, [here(), Text(passwd), Bytes(&[0; 24]), number(24)]).but_a_share_is_told(Errno::NOENT),
        act("climb out of a directory that it holds", SYS_openat, [ShareRoot, Text(above), flags(O_RDONLY)]).but_a_share_is_told(Errno::NOENT),
        act("remove another VM's file", SYS_unlinkat, [here(), Text(file), number(0)]).but_a_share_is_told(Errno::NOENT),
        act("take a file of the host into the share", SYS_linkat, [here(), HostFileName, ShareRoot, Text(c"taken"), number(AT_SYMLINK_FOLLOW)]).but_a_share_is_told(Errno::NOENT),
        act("cut a file that the VMM holds", SYS_ftruncate, [HostFile, number(0)]).but_a_share_is_told(Errno::BADF),
        act("open a file anew that the VMM holds", SYS_openat, [here(), HostFileName, flags(O_RDWR)]).but_a_share_is_told(Errno::NOENT),
        act("change the mode of a file that the VMM holds", SYS_fchmodat, [here(), HostFileName, number(0o777)]).but_a_share_is_told(Errno::NOENT),
        act("make a device in the share", SYS_mknodat, [ShareRoot, Text(c"mem"), number(S_IFCHR | 0o600), Number(0x101)]).but_a_share_is_told(Errno::PERM),
        act("open by a handle", SYS_open_by_handle_at, [here(), Bytes(&[0; 32]), flags(O_RDONLY)]),
        act("ask for a handle", SYS_name_to_handle_at, [here(), Text(c"/"), Bytes(&[0; 32]), Page, number(0)]),
        act("watch files", SYS_inotify_init1, [number(0)]),
        act("watch a file system", SYS_fanotify_init, [number(0), number(0)]),
    ]
}

#[rustfmt::skip] // One act a line.
fn mounts_and_roots() -> Vec<Act<'static>> {
    let root = || Text(c"/");
    vec![
        act("mount", SYS_mount, [Text(c"none"), root(), Text(c"tmpfs"), number(0), number(0)]),
        act("unmount", SYS_umount2, [root(), number(MNT_DETACH)]),
        act("take a tree of mounts", SYS_open_tree, [number(AT_FDCWD), root(), number(1)]),
        act("move a mount", SYS_move_mount, [ShareRoot, Text(c""), number(AT_FDCWD), root(), number(4)]),
        act("open a file system", SYS_fsopen, [Text(c"proc"), number(0)]),
        act("lift what a mount forbids", SYS_mount_setattr, [number(AT_FDCWD), root(), number(0), Bytes(&[0; 32]), number(32)]),
        act("change the root", SYS_chroot, [root()]),
        act("change the root for good", SYS_pivot_root, [Text(c"."), Text(c".")]),
        act("change the directory", SYS_chdir, [root()]),
        act("change to a directory that it holds", SYS_fchdir, [ShareRoot]),
        act("leave for other namespaces", SYS_unshare, [number(CLONE_NEWUSER | CLONE_NEWNS)]),
        act("enter a namespace", SYS_setns, [ShareRoot, number(0)]),
    ]
}

#[rustfmt::skip] // One act a line.
fn sockets() -> Vec<Act<'static>> {
    let socket =
        |what, family, kind| act(what, SYS_socket, [number(family), number(kind), number(0)]);
    vec![
        socket("open a socket of IPv4", AF_INET, SOCK_STREAM),
        socket("open a socket of IPv6", AF_INET6, SOCK_DGRAM),
        socket("open a raw socket", AF_PACKET, SOCK_RAW),
        socket("open a socket of the host", AF_UNIX, SOCK_STREAM),
        socket("talk to the kernel's network", AF_NETLINK, SOCK_RAW),
        socket("talk to the kernel's ciphers", AF_ALG, SOCK_SEQPACKET),
        socket("talk past the VMM", AF_VSOCK, SOCK_STREAM),
        act("make a pair of datagram sockets", SYS_socketpair, [number(AF_UNIX), number(SOCK_DGRAM), number(0), Page]),
        act("connect", SYS_connect, [number(2), Bytes(&[1, 0, 0, b'x']), number(4)]),
        act("bind", SYS_bind, [number(2), Bytes(&[1, 0, 0, b'x']), number(4)]),
        act("listen", SYS_listen, [number(2), number(1)]),
        act("accept", SYS_accept4, [number(2), number(0), number(0), number(0)]),
    ]
}

#[rustfmt::skip] // One act a line.
fn processes(neighbour: &Neighbour) -> Vec<Act<'_>> {
    let owner = || number(std::process::id());
    let other = || Number(neighbour.pid);
    let kill = || number(SIGKILL);
    vec![
        act("kill its owner", SYS_kill, [owner(), kill()]),
        act("kill another VM", SYS_kill, [other(), kill()]),
        act("kill everybody", SYS_kill, [Number(-1), kill()]),
        act("kill its group", SYS_kill, [number(0), kill()]),
        act("kill a thread of its owner", SYS_tgkill, [owner(), owner(), kill()]),
        // Its own number in its namespace.
        act("kill itself", SYS_tgkill, [number(1), number(1), kill()]),
        act("kill a thread", SYS_tkill, [owner(), kill()]),
        act("queue a signal", SYS_rt_sigqueueinfo, [owner(), kill(), Bytes(&[0; 128])]),
        act("signal by a descriptor", SYS_pidfd_send_signal, [number(0), kill(), number(0), number(0)]),
        act("have a descriptor of a process", SYS_pidfd_open, [number(1), number(0)]),
        act("take a descriptor of another process", SYS_pidfd_getfd, [number(0), number(0), number(0)]),
        act("trace its owner", SYS_ptrace, [number(PTRACE_SEIZE as i32), owner(), number(0), number(0)]),
        act("be traced", SYS_ptrace, [number(PTRACE_TRACEME as i32), number(0), number(0), number(0)]),
        act("read another VM's memory", SYS_process_vm_readv, [other(), Page, number(1), Page, number(1), number(0)]),
        act("write another VM's memory", SYS_process_vm_writev, [other(), Page, number(1), Page, number(1), number(0)]),
        act("advise another VM's memory", SYS_process_madvise, [number(0), Page, number(1), number(4), number(0)]),
        act("compare itself with another process", SYS_kcmp, [number(1), owner(), number(0), number(0), number(0)]),
        act("start a process", SYS_fork, []),
        act("start a process in its memory", SYS_vfork, []),
        act("start a process by clone", SYS_clone, [number(SIGCHLD), number(0), number(0), number(0), number(0)]),
        act("start a process by clone3", SYS_clone3, [Bytes(&[0; 88]), number(88)]),
        act("change another's priority", SYS_setpriority, [number(0), owner(), Number(-20)]),
        act("change another's limits", SYS_prlimit64, [owner(), number(RLIMIT_NOFILE as i32), Page, number(0)]),
        act("run in real time", SYS_sched_setscheduler, [number(0), number(SCHED_FIFO), Bytes(&[1, 0, 0, 0])]),
    ]
}

#[rustfmt::skip] // One act a line.
fn programs_and_code() -> Vec<Act<'static>> {
    let program = || Text(c"/bin/sh");
    let code = || number(PROT_READ | PROT_EXEC);
    vec![
        act("execute a program", SYS_execve, [program(), number(0), number(0)]),
        act("execute a file that it holds", SYS_execveat, [number(0), Text(c""), number(0), number(0), number(AT_EMPTY_PATH)]),
        act("map code", SYS_mmap, [number(0), number(4096), code(), number(MAP_PRIVATE | MAP_ANONYMOUS), Number(-1), number(0)]),
        act("map a file as code", SYS_mmap, [number(0), number(4096), code(), number(MAP_PRIVATE), number(0), number(0)]),
        act("make memory code", SYS_mprotect, [Page, number(4096), code()]),
        act("make memory code with a key", SYS_pkey_mprotect, [Page, number(4096), code(), Number(-1)]),
        act("attach a segment as code", SYS_shmat, [number(0), number(0), number(SHM_EXEC)]),
        act("make a file of code", SYS_memfd_create, [Text(c"code"), number(0x10)]),
        act("load a library of the oldest kind", SYS_uselib, [program()]),
        act("run as another kind of system", SYS_personality, [number(0x0040_0000)]),
        act("change the table of segments", SYS_modify_ldt, [number(1), Page, number(16)]),
        act("use ports", SYS_iopl, [number(3)]),
        act("use some ports", SYS_ioperm, [number(0), number(1024), number(1)]),
        act("handle a signal", SYS_rt_sigaction, [number(SIGSYS), Bytes(&[0; 32]), number(0), number(8)]),
    ]
}

/// Who it is and what it may do.
#[rustfmt::skip] // One act a line.
fn identity() -> Vec<Act<'static>> {
    let root = || number(0);
    // struct __user_cap_header_struct of version 3, for the calling thread, and sets of everything.
    const HEADER: &[u8] = &[0x22, 0x05, 0x08, 0x20, 0, 0, 0, 0];
    vec![
        act("become root", SYS_setuid, [root()]),
        act("become root again", SYS_setresuid, [root(), root(), root()]),
        act("become root in effect", SYS_setreuid, [root(), root()]),
        act("become root's group", SYS_setgid, [root()]),
        act("become root's group again", SYS_setresgid, [root(), root(), root()]),
        act("take groups", SYS_setgroups, [number(1), Bytes(&[0; 4])]),
        act("take capabilities", SYS_capset, [Bytes(HEADER), Bytes(&[0xff; 24])]).but_a_share_is_told(Errno::PERM),
        act("keep capabilities", SYS_prctl, [number(PR_SET_KEEPCAPS), number(1)]),
        act("raise a capability", SYS_prctl, [number(PR_CAP_AMBIENT), number(PR_CAP_AMBIENT_RAISE), number(21)]),
        act("undo secure bits", SYS_prctl, [number(PR_SET_SECUREBITS), number(0)]),
        act("become dumpable", SYS_prctl, [number(PR_SET_DUMPABLE), number(1)]),
        act("outlive its parent", SYS_prctl, [number(PR_SET_PDEATHSIG), number(0)]),
        act("leave its filter", SYS_prctl, [number(PR_SET_SECCOMP), number(0)]),
        act("add a filter", SYS_seccomp, [number(1), number(0), Page]),
        act("enter another Landlock domain", SYS_landlock_restrict_self, [number(0), number(0)]),
        act("raise its limits", SYS_setrlimit, [number(RLIMIT_CORE as i32), Bytes(&[0xff; 16])]),
    ]
}

#[rustfmt::skip] // One act a line.
fn the_rest_of_the_kernel() -> Vec<Act<'static>> {
    // KVM_CREATE_VM and TUNSETIFF.
    let (create_vm, set_interface) = (Number(0xae01), Number(0x4004_54ca));
    let control = |what, request| act(what, SYS_ioctl, [number(0), request, Page]);
    vec![
        control("type into a terminal", Number(TIOCSTI as i64)),
        control("make another VM", create_vm),
        control("change a tap device", set_interface),
        act("load a program into the kernel", SYS_bpf, [number(5), Page, number(128)]),
        act("make a ring", SYS_io_uring_setup, [number(8), Bytes(&[0; 120])]),
        act("handle page faults", SYS_userfaultfd, [number(0)]),
        act("count events", SYS_perf_event_open, [Page, number(0), Number(-1), Number(-1), number(0)]),
        act("use keys", SYS_keyctl, [number(0), number(0)]),
        act("add a key", SYS_add_key, [Text(c"user"), Text(c"x"), Page, number(1), Number(-2)]),
        act("ask for a key", SYS_request_key, [Text(c"user"), Text(c"x"), number(0), Number(-2)]),
        act("load a module", SYS_init_module, [Page, number(4096), Text(c"")]),
        act("load a module from a file", SYS_finit_module, [number(0), Text(c""), number(0)]),
        act("load a kernel", SYS_kexec_load, [number(0), number(0), number(0), number(0)]),
        act("restart the host", SYS_reboot, [number(0xfee1_dead_u32), number(0x2812_1969), number(0)]),
        act("name the host", SYS_sethostname, [Text(c"taken"), number(5)]),
        act("set the clock", SYS_clock_settime, [number(0), Page]),
        act("read the kernel's log", SYS_syslog, [number(3), Page, number(1)]),
        act("swap", SYS_swapon, [Text(c"/swap"), number(0)]),
        act("keep accounts", SYS_acct, [number(0)]),
        act("share memory", SYS_shmget, [number(0), number(4096), number(0o600)]),
        act("make a message queue", SYS_msgget, [number(0), number(0o600)]),
        act("open a message queue", SYS_mq_open, [Text(c"x"), number(O_RDWR | O_CREAT), number(0o600), number(0)]),
        act("move pages", SYS_splice, [number(0), number(0), number(1), number(0), number(1), number(0)]),
        // The second table of calls of this machine: __X32_SYSCALL_BIT.
        act("open by the table of x32", 0x4000_0000 | SYS_openat, [number(AT_FDCWD), Text(c"/etc/passwd"), number(O_RDONLY)]),
    ]
}
