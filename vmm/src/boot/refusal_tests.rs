//! Files that are no kernel for this guest, one after the other: each refused by a sentence that names the field, before a tenth of a
//! second is spent on it.

use super::testing::{ElfFile, Load, bzimage};
use super::*;
use crate::memory;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::time::{ClockId, clock_gettime};
use std::io::Write;
use std::time::Duration;

/// Memory of the guest, in MiB.
const MEMORY_MIB: u64 = 64;
/// Most that a refusal may cost.
const REFUSAL_MAX: Duration = Duration::from_millis(100);

fn file(bytes: &[u8]) -> File {
    let mut file = File::from(memfd_create(c"image", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    file
}

/// A file of holes.
fn sparse(bytes: u64) -> File {
    let file = file(b"");
    ftruncate(&file, bytes).unwrap();
    file
}

/// What this thread has worked so far, whatever else the machine does.
fn worked() -> Duration {
    let now = clock_gettime(ClockId::ThreadCPUTime);
    now.try_into().unwrap()
}

fn tried(kernel: &File, initramfs: Option<&File>) -> Result<Entry, BootError> {
    let size = MemoryMib::try_from(MEMORY_MIB).unwrap();
    let memory = memory::map(size, None).unwrap();
    let guest = Guest {
        kernel,
        initramfs,
        line: Line::default(),
    };
    let before = worked();
    let loaded = load(&memory, size, &guest);
    let spent = worked() - before;
    assert!(spent < REFUSAL_MAX, "{spent:?}");
    loaded
}

/// One line with these words.
fn refused(kernel: &[u8], words: &str) {
    let error = tried(&file(kernel), None).expect_err(words).to_string();
    assert!(error.contains(words), "{words:?}: {error}");
    assert_eq!(error.lines().count(), 1, "{error}");
}

fn elf(change: impl FnOnce(&mut ElfFile)) -> Vec<u8> {
    let mut file = ElfFile::example();
    change(&mut file);
    file.bytes()
}

/// The example with a value at a place of its bytes.
fn patched(mut file: Vec<u8>, place: usize, bytes: &[u8]) -> Vec<u8> {
    file[place..place + bytes.len()].copy_from_slice(bytes);
    file
}

/// Where the fields of the example's first program header are (ELF-64 object file format, figure 6).
const FILE_BYTES: usize = 64 + 32;
const MEMORY_BYTES: usize = 64 + 40;
/// Where the alignment of its second is, that of the notes.
const NOTES_ALIGN: usize = 64 + 56 + 48;

#[test]
fn files_that_are_no_kernel_at_all_are_refused_by_their_first_bytes() {
    let neither = "neither an ELF vmlinux nor a bzImage";
    refused(b"", "the kernel is empty");
    refused(b"\x7f", neither);
    refused(&elf(|_| ())[..63], "cut short");
    refused(&b"root=/dev/vda quiet\n".repeat(100), neither);
    refused(
        &patched(vec![0; 4096], 0, &[0x1f, 0x8b, 8, 0]),
        "[1f, 8b, 08, 00]",
    );
    // A program of Windows, and a kernel for arm64, which begins like one.
    let windows = patched(vec![0; 4096], 0, b"MZ\x90\0");
    refused(&windows, "[4d, 5a, 90, 00]");
    let arm = patched(windows, 0x38, b"ARM\x64");
    refused(&arm, neither);
    refused(
        &elf(|file| file.machine = 183),
        "machine 183; one for x86-64 (62)",
    );
}

#[test]
fn elf_fields_that_make_no_sense_are_refused_by_name() {
    refused(
        &elf(|file| file.header_offset = Some(1 << 40)),
        "its program header",
    );
    refused(
        &elf(|file| file.header_count = Some(u16::MAX)),
        "65535 program headers",
    );
    let longer = u64::from(u32::MAX).to_le_bytes();
    let cut = patched(elf(|_| ()), FILE_BYTES, &longer);
    refused(&patched(cut, MEMORY_BYTES, &longer), "segment");
    refused(&patched(elf(|_| ()), MEMORY_BYTES, &[0xff; 8]), "segment 0");
    refused(&elf(|file| file.segments.clear()), "no segment to load");
    refused(
        &elf(|file| file.notes[0].desc = vec![0, 0, 0, 2]),
        "entry 0x2000000 is in none",
    );
    // Where the zero page, the command line and the devices are.
    for place in [
        layout::BOOT_PARAMS,
        layout::CMDLINE,
        layout::HOLE_START,
        layout::LOCAL_APIC,
    ] {
        let words = format!(
            "{place:#x}..{:#x}, guest memory for it is 0x100000..",
            place + 0x2000
        );
        refused(&elf(|file| file.segments[0].physical = place), &words);
    }
}

#[test]
fn notes_of_any_length_and_alignment_end() {
    for lengths in [
        (u32::MAX, 4),
        (4, u32::MAX),
        (u32::MAX, u32::MAX),
        (u32::MAX - 3, u32::MAX - 3),
    ] {
        refused(
            &elf(|file| file.notes[0].lengths = Some(lengths)),
            "ELF notes make no sense",
        );
    }
    // Notes have four bytes' alignment, whatever the header says of it.
    for align in [0, 1, 3, 1 << 63, u64::MAX] {
        let kernel = patched(elf(|_| ()), NOTES_ALIGN, &u64::to_le_bytes(align));
        tried(&file(&kernel), None).unwrap();
    }
}

#[test]
fn fields_of_a_bzimage_that_make_no_sense_are_refused_by_name() {
    tried(&file(&bzimage()), None).unwrap();
    refused(
        &patched(bzimage(), 0x1f1, &[255]),
        "protected-mode part ends at byte",
    );
    refused(
        &patched(bzimage(), 0x1f1, &[0]),
        "protected-mode part ends at byte",
    );
    refused(
        &patched(bzimage(), 0x202, b"HdrX"),
        "neither an ELF vmlinux nor a bzImage",
    );
    refused(
        &patched(bzimage(), 0x206, &[5, 2]),
        "boot protocol 2.05; 2.12 or newer",
    );
    refused(&patched(bzimage(), 0x236, &[0, 0]), "32-bit kernel");
    refused(
        &patched(bzimage(), 0x260, &[0xff; 4]),
        "the guest has 64 MiB below its hole",
    );
    refused(&patched(bzimage(), 0x1f4, &[0; 4]), "syssize");
}

#[test]
fn what_is_larger_than_memory_is_refused_with_both_sizes() {
    let large = |bytes| {
        elf(|file| {
            file.segments = vec![Load {
                physical: 0x10_0000,
                memory_bytes: bytes,
                bytes: vec![0xf4; 16],
            }];
        })
    };
    let all = (MEMORY_MIB << 20) - layout::KERNEL_MIN;
    refused(&large(all + 1), "give the VM more memory");
    tried(&file(&large(all)), None).unwrap();
    // Nothing is left beside such a kernel, and nothing of an initramfs may lie in it.
    let error = tried(&file(&large(all)), Some(&sparse(1)))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("1 bytes does not fit") && error.contains("(0 bytes are left)"),
        "{error}"
    );
    let error = tried(&file(&elf(|_| ())), Some(&sparse(1 << 40)))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("1099511627776 bytes does not fit"),
        "{error}"
    );
}

#[test]
fn a_kernel_file_of_holes_without_end_is_refused_by_its_length() {
    let error = tried(&sparse(1 << 40), None).unwrap_err().to_string();
    let words = "the kernel is 1099511627776 bytes long, at most 536870912 are taken";
    assert_eq!(error, words);
    let zeroes = tried(&sparse(512 << 20), None).unwrap_err().to_string();
    assert!(
        zeroes.contains("neither an ELF vmlinux nor a bzImage"),
        "{zeroes}"
    );
}

#[test]
fn a_file_that_is_cut_short_while_it_is_read_is_one_that_cannot_be_read() {
    // Its length was taken before; then somebody truncated it.
    let size = MemoryMib::try_from(MEMORY_MIB).unwrap();
    let memory = memory::map(size, None).unwrap();
    let shorter = file(&[7; 4096]);
    let error = copy(&memory, &shorter, "initramfs", 0, 4097, 0x10_0000).unwrap_err();
    assert!(matches!(error, BootError::Read("initramfs", _)), "{error}");
    let error = copy(&memory, &shorter, "kernel", 8192, 1, 0x10_0000).unwrap_err();
    assert_eq!(error.to_string(), "cannot read the kernel");
}
