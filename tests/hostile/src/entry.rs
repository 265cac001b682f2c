//! From the PVH entry (32-bit protected mode, no paging) to Rust: long mode with the first 4 GiB mapped where they are, SSE, a
//! stack. No interrupts and no table of them: a fault is a triple fault, which the VMM tells. And what the compiler expects of a C library.
#![allow(unsafe_code)] // The entry is assembly, and these functions take pointers.

use core::arch::{asm, global_asm};

global_asm!(
    r#"
    .section .note.entry, "a", @note
    .align 4
    .long 4, 4, 18              # XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long hostile_entry

    .section .text.entry, "ax"
    .code32
    .global hostile_entry
hostile_entry:
    movl $entry_stack_end, %esp
    # 2,048 pages of 2 MiB: present, writable, large.
    movl $entry_directories, %edi
    movl $0x83, %eax
    movl $2048, %ecx
1:  movl %eax, (%edi)
    addl $0x200000, %eax
    addl $8, %edi
    decl %ecx
    jnz 1b
    movl $(entry_directories + 0x0003), entry_pointers
    movl $(entry_directories + 0x1003), entry_pointers + 8
    movl $(entry_directories + 0x2003), entry_pointers + 16
    movl $(entry_directories + 0x3003), entry_pointers + 24
    movl $(entry_pointers + 3), entry_root
    movl $0x620, %eax           # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $entry_root, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx      # EFER.LME
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl $0x80000013, %eax      # PG, ET, MP, PE
    movl %eax, %cr0
    lgdt entry_gdt_pointer
    ljmp $8, $2f
    .code64
2:  movl $16, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $entry_stack_end, %esp
    movl %ebx, %edi
    call hostile_main

    .section .data.entry, "aw"
    .align 8
entry_gdt:
    .quad 0, 0x00209b0000000000, 0x00cf93000000ffff
entry_gdt_pointer:
    .word 23
    .quad entry_gdt

    .section .bss.entry, "aw", @nobits
    .align 4096
entry_root: .skip 0x1000
entry_pointers: .skip 0x1000
entry_directories: .skip 0x4000
    .skip 0x8000
entry_stack_end:
"#,
    options(att_syntax)
);

#[unsafe(no_mangle)]
extern "C" fn hostile_main(start_info: u64) -> ! {
    capsid_hostile_guest::run(start_info)
}

#[panic_handler]
fn panic(panic: &core::panic::PanicInfo<'_>) -> ! {
    capsid_hostile_guest::give_up(panic)
}

// The names by which the compiler copies, fills and compares.

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller's promise: both are there and apart.
    unsafe {
        asm!("rep movsb", inout("rcx") bytes => _, inout("rdi") to => _, inout("rsi") from => _,
             options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, bytes: usize) -> *mut u8 {
    // SAFETY: the caller's promise: it is there.
    unsafe {
        asm!("rep stosb", inout("rcx") bytes => _, inout("rdi") to => _, in("al") byte as u8,
             options(nostack, preserves_flags));
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, bytes: usize) -> i32 {
    for at in 0..bytes {
        // SAFETY: the caller's promise: both have so many bytes.
        let (a, b) = unsafe { (a.add(at).read_volatile(), b.add(at).read_volatile()) };
        if a != b {
            return i32::from(a) - i32::from(b);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, bytes: usize) -> i32 {
    // SAFETY: the caller's promise, which is the same.
    unsafe { memcmp(a, b, bytes) }
}
