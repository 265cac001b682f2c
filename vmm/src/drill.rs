//! The drill: threads that make whatever system call they are told to, as they would if a guest had taken them over.
//!
//! Only in builds with the feature `drill`, which are made for the tests of the program (`vmm/tests/program/drill`) and for
//! nothing else; a release build with it does not compile.
//!
//! What is forbidden is the test's to say. Here is only how a thread hears of it: on standard input the owner left a page, in
//! which it writes one call at a time; by a signal it tells one thread to make it; that thread writes what came of it to
//! standard output, if it still can.
#![allow(unsafe_code)] // Calls with any arguments, on a thread that is doing something else.

use rustix::mm::{MapFlags, ProtFlags, mmap};
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

#[cfg(not(debug_assertions))]
compile_error!("the feature `drill` is for tests of the program: no release build may have it");

/// Bytes of the page on standard input.
const PAGE_BYTES: usize = 4096;

/// Added to a number, it is one of the table of i386, whose calls any thread of this machine can make; without arguments.
const I386: i64 = 1 << 32;

/// What the page begins with; the rest is for what arguments point to.
#[repr(C)]
struct Order {
    /// Where the page is in this process; the one thing that the owner reads.
    address: u64,
    number: i64,
    arguments: [u64; 6],
}

/// Where the page is; null until there is one.
static ORDER: AtomicPtr<Order> = AtomicPtr::new(std::ptr::null_mut());

/// Has the calling thread obey from now on. Each calls it before it puts on its filter.
///
/// # Panics
/// This is not the process that the drill starts.
pub(crate) fn stand_by() {
    static PREPARED: OnceLock<()> = OnceLock::new();
    PREPARED.get_or_init(|| {
        prepare().expect("a page on standard input and a free signal");
    });
    unblock_signal(signal()).expect("a signal");
}

/// The one behind that which stops vCPUs.
fn signal() -> libc::c_int {
    SIGRTMIN() + 1
}

fn prepare() -> io::Result<()> {
    let stdin = rustix::stdio::stdin();
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping, of which nobody knows yet and which is never taken away.
    let page = unsafe {
        mmap(
            std::ptr::null_mut(),
            PAGE_BYTES,
            access,
            MapFlags::SHARED,
            stdin,
            0,
        )
    }?;
    let order = page.cast::<Order>();
    // SAFETY: the page is larger than an order, aligned and ours to write.
    unsafe { (&raw mut (*order).address).write_volatile(page as u64) };
    ORDER.store(order, Ordering::Release);
    register_signal_handler(signal(), obey)
        .map_err(|cause| io::Error::from_raw_os_error(cause.errno()))
}

/// Makes the call and writes 8 bytes: what it returned, or its error number below 0.
extern "C" fn obey(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let order = ORDER.load(Ordering::Acquire);
    // SAFETY: the page was there before the handler and stays; the owner has written the order before it sent the signal.
    let Order {
        number,
        arguments: [a, b, c, d, e, f],
        ..
    } = unsafe { order.read_volatile() };
    // SAFETY: this thread's error number, which the code that was interrupted may be about to look at.
    let error = unsafe { libc::__errno_location() };
    // SAFETY: the same.
    let before = unsafe { *error };
    // SAFETY: none is meant: this is what a thread does that is no longer ours. The owner chooses calls that a filter refuses, or
    // that leave this process's memory alone.
    let result = unsafe {
        match number.checked_sub(I386) {
            Some(number @ 0..) => call_i386(number),
            _ => match libc::syscall(number, a, b, c, d, e, f) {
                -1 => -i64::from(*error),
                result => result,
            },
        }
    };
    // SAFETY: as above.
    unsafe { *error = before };
    // SAFETY: 8 bytes of the stack, which are only read.
    unsafe { libc::write(libc::STDOUT_FILENO, (&raw const result).cast(), 8) };
}

/// # Safety
/// The call takes no arguments.
unsafe fn call_i386(number: i64) -> i64 {
    let result;
    // SAFETY: the kernel looks at no more than the number, keeps the stack and gives back all registers but these (entry_64_compat.S).
    unsafe {
        std::arch::asm!(
            "int 0x80",
            inlateout("rax") number => result,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    result
}
