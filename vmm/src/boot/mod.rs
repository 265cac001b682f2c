//! From a kernel file to a guest that can be entered: which format it is, where its parts go, what it is told.
//!
//! The kernel, the initramfs and every length in them are taken for hostile. They come from the owner, who is
//! trusted, but from a file that anybody may have made; what a parser lets through lies inside guest memory.

mod bzimage;
mod cmdline;
mod elf;
mod error;
mod image;
mod pvh;
#[cfg(test)]
pub(crate) mod testing;

pub use cmdline::Line;
pub use error::BootError;

use crate::layout;
use crate::memory::{self, HUGE_PAGE_BYTES, PAGE_BYTES};
use capsid_devices::memory::{self as guest, GuestMemory};
use capsid_protocol::machine::MemoryMib;
use image::{FileImage, Image};
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use vm_memory::ReadVolatile;

/// The longest kernel file taken, in bytes. Ours has about 20 MiB; an unstripped one of a distribution 400.
const KERNEL_MAX_BYTES: u64 = 512 << 20;

/// What the first vCPU starts with, in 32-bit protected mode (both boot protocols ask for the same mode).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First instruction.
    pub rip: u64,
    /// PVH: address of the start info.
    pub rbx: u64,
    /// bzImage: address of the zero page.
    pub rsi: u64,
}

/// The guest's software: what [`load`] puts into memory.
pub struct Guest<'a> {
    /// ELF with a PVH note, or bzImage.
    pub kernel: &'a File,
    /// Taken as it is.
    pub initramfs: Option<&'a File>,
    /// What the kernel is told.
    pub line: Line<'a>,
}

/// Loads kernel, initramfs and what the kernel is told into guest memory.
///
/// # Errors
/// One of them was refused, or does not fit.
pub fn load(memory: &GuestMemory, size: MemoryMib, guest: &Guest<'_>) -> Result<Entry, BootError> {
    let image = FileImage::new(guest.kernel).map_err(|cause| BootError::Read("kernel", cause))?;
    if image.length() > KERNEL_MAX_BYTES {
        return Err(BootError::TooLong {
            bytes: image.length(),
            max: KERNEL_MAX_BYTES,
        });
    }
    let start = first_bytes(&image)?;
    if elf::is_elf(&start) {
        load_pvh(memory, size, guest, &image)
    } else if bzimage::is_bzimage(&start) {
        load_bzimage(memory, size, guest, &image)
    } else {
        let mut magic = [0; 4];
        for (to, from) in magic.iter_mut().zip(&start) {
            *to = *from;
        }
        Err(BootError::Unknown(magic))
    }
}

fn first_bytes(image: &impl Image) -> Result<Vec<u8>, BootError> {
    if image.length() == 0 {
        return Err(BootError::Empty("kernel"));
    }
    let length = image.length().min(bzimage::PROBE_BYTES as u64) as usize;
    let mut start = vec![0; length];
    image
        .read_at(0, &mut start)
        .map_err(|cause| BootError::Read("kernel", cause))?;
    Ok(start)
}

fn load_pvh(
    memory: &GuestMemory,
    size: MemoryMib,
    guest: &Guest<'_>,
    image: &impl Image,
) -> Result<Entry, BootError> {
    let room = room(size);
    let kernel = elf::parse(image, &room)?;
    let line = cmdline::assemble(&guest.line, layout::CMDLINE_BYTES as usize)?;
    for segment in &kernel.segments {
        load_segment(memory, guest.kernel, segment, kernel.entry)?;
    }
    let initramfs = load_initramfs(memory, guest.initramfs, kernel.end..room.end)?;
    let map = layout::memory_map(size.bytes());
    let info = pvh::start_info(layout::CMDLINE, initramfs.as_ref(), &map);
    write(memory, "start info", layout::START_INFO, &info)?;
    write(
        memory,
        "memory map",
        layout::BOOT_PARAMS,
        &pvh::memory_map(&map),
    )?;
    write(
        memory,
        "command line",
        layout::CMDLINE,
        line.as_bytes_with_nul(),
    )?;
    Ok(Entry {
        rip: kernel.entry,
        rbx: layout::START_INFO,
        rsi: 0,
    })
}

fn load_bzimage(
    memory: &GuestMemory,
    size: MemoryMib,
    guest: &Guest<'_>,
    image: &impl Image,
) -> Result<Entry, BootError> {
    let room = room(size);
    let kernel = bzimage::parse(image, &room)?;
    let cmdline_max =
        (kernel.cmdline_max_bytes.saturating_add(1)).min(layout::CMDLINE_BYTES as usize);
    let line = cmdline::assemble(&guest.line, cmdline_max)?;
    copy(
        memory,
        guest.kernel,
        "kernel",
        kernel.file_offset,
        kernel.file_bytes,
        kernel.guest.start,
    )?;
    let end = room.end.min(kernel.initramfs_end_max);
    let initramfs = load_initramfs(memory, guest.initramfs, kernel.guest.end..end)?;
    let map = layout::memory_map(size.bytes());
    let page = bzimage::zero_page(
        &kernel,
        &bzimage::Placed {
            cmdline: layout::CMDLINE as u32,
            // Below the hole, so it fits.
            initramfs: initramfs.map(|at| (at.start as u32, (at.end - at.start) as u32)),
            map: &map,
        },
    );
    write(memory, "zero page", layout::BOOT_PARAMS, &page)?;
    write(
        memory,
        "command line",
        layout::CMDLINE,
        line.as_bytes_with_nul(),
    )?;
    Ok(Entry {
        rip: kernel.guest.start,
        rbx: 0,
        rsi: layout::BOOT_PARAMS,
    })
}

/// The guest memory that a kernel and an initramfs may take.
fn room(size: MemoryMib) -> Range<u64> {
    layout::KERNEL_MIN..layout::low_memory_end(size.bytes())
}

/// Copies the initramfs to the end of `room`, at a page of its own.
fn load_initramfs(
    memory: &GuestMemory,
    initramfs: Option<&File>,
    room: Range<u64>,
) -> Result<Option<Range<u64>>, BootError> {
    let Some(file) = initramfs else {
        return Ok(None);
    };
    let image = FileImage::new(file).map_err(|cause| BootError::Read("initramfs", cause))?;
    let bytes = image.length();
    if bytes == 0 {
        return Err(BootError::Empty("initramfs"));
    }
    let Some(start) = layout::initramfs_start(&room, bytes) else {
        let lowest = room.start.next_multiple_of(PAGE_BYTES);
        return Err(BootError::InitramfsMemory {
            bytes,
            room: room.end.saturating_sub(lowest),
        });
    };
    copy(memory, file, "initramfs", 0, bytes, start)?;
    Ok(Some(start..start + bytes))
}

/// Maps the whole pages of a segment and reads the rest. Reading all of a kernel costs the copy and a page of
/// memory for each page of it, needed or not: a third of the time to the guest's first instruction. Read all the same is what the
/// kernel writes to, since nearly each page of it becomes the guest's own by two exits for each that is mapped, and [`read_first`].
fn load_segment(
    memory: &GuestMemory,
    kernel: &File,
    segment: &elf::Segment,
    entry: u64,
) -> Result<(), BootError> {
    let (offset, place) = (segment.file_offset, segment.guest.start);
    let on_pages = offset % PAGE_BYTES == 0 && place % PAGE_BYTES == 0;
    let first = if on_pages && !segment.writable {
        read_first(segment, entry)
    } else {
        segment.file_bytes
    };
    let mapped = (segment.file_bytes - first) & !(PAGE_BYTES - 1);
    if mapped > 0 {
        memory::map_file(memory, place + first, kernel, offset + first, mapped)
            .map_err(|cause| BootError::Read("kernel", cause.into()))?;
    }
    let behind = first + mapped;
    for part in [0..first, behind..segment.file_bytes] {
        let bytes = part.end - part.start;
        let (offset, place) = (offset + part.start, place + part.start);
        copy(memory, kernel, "kernel", offset, bytes, place)?;
    }
    Ok(())
}

/// How many bytes at the start of a segment that could be mapped are read all the same, into a huge page: those up to the end of the
/// entry's. There Linux has its entry code, interrupts, memory management and scheduler; before its first process it touches half of
/// these pages and patches a quarter, which is 562 exits (docs/decisions/0020).
fn read_first(segment: &elf::Segment, entry: u64) -> u64 {
    let start = segment.guest.start;
    if !segment.guest.contains(&entry) {
        return 0;
    }
    let end = (entry | (HUGE_PAGE_BYTES - 1)).saturating_add(1);
    (end - start).min(segment.file_bytes)
}

/// Reads a part of a file straight into guest memory.
fn copy(
    memory: &GuestMemory,
    mut file: &File,
    what: &'static str,
    offset: u64,
    bytes: u64,
    place: u64,
) -> Result<(), BootError> {
    if bytes == 0 {
        return Ok(());
    }
    file.seek(SeekFrom::Start(offset))
        .map_err(|cause| BootError::Read(what, cause))?;
    // Bounded by the length of a file and by guest memory, both below 2^63.
    let mut slice = guest::slice_of(memory, place, bytes as usize)
        .map_err(|cause| BootError::Write(what, cause))?;
    file.read_exact_volatile(&mut slice)
        .map_err(|cause| BootError::Read(what, io::Error::other(cause)))
}

fn write(
    memory: &GuestMemory,
    what: &'static str,
    place: u64,
    bytes: &[u8],
) -> Result<(), BootError> {
    guest::write(memory, place, bytes).map_err(|cause| BootError::Write(what, cause))
}

#[cfg(test)]
#[path = "refusal_tests.rs"]
mod refusals;

#[cfg(test)]
mod tests {
    use super::testing::ElfFile;
    use super::*;
    use crate::memory;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress};

    fn mib(mib: u64) -> MemoryMib {
        MemoryMib::try_from(mib).unwrap()
    }

    fn file(bytes: &[u8]) -> File {
        let fd = rustix::fs::memfd_create(c"image", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let mut file = File::from(fd);
        file.write_all(bytes).unwrap();
        file
    }

    fn loaded(kernel: &[u8], initramfs: Option<&[u8]>) -> Result<(GuestMemory, Entry), BootError> {
        let memory = memory::map(mib(64), None).unwrap();
        let (kernel, initramfs) = (file(kernel), initramfs.map(file));
        let guest = Guest {
            kernel: &kernel,
            initramfs: initramfs.as_ref(),
            line: Line {
                extra: "panic=7",
                ..Line::default()
            },
        };
        load(&memory, mib(64), &guest).map(|entry| (memory, entry))
    }

    fn refused(kernel: &[u8], initramfs: Option<&[u8]>) -> String {
        match loaded(kernel, initramfs) {
            Ok(_) => panic!("must be refused"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_pvh_kernel_is_in_memory_with_all_that_it_is_told() {
        let (memory, entry) = loaded(&ElfFile::example().bytes(), Some(b"cpio")).unwrap();
        assert_eq!(entry.rip, 0x10_0000);
        assert_eq!(entry.rbx, layout::START_INFO);
        let mut code = [0; 16];
        memory
            .read_slice(&mut code, GuestAddress(0x10_0000))
            .unwrap();
        assert_eq!(code, [0xf4; 16]);
        let module: u64 = memory
            .read_obj(GuestAddress(layout::START_INFO + 56))
            .unwrap();
        assert_eq!(module, (64 << 20) - 4096);
        let mut cpio = [0; 4];
        memory.read_slice(&mut cpio, GuestAddress(module)).unwrap();
        assert_eq!(&cpio, b"cpio");
        let mut line = vec![0; 2048];
        memory
            .read_slice(&mut line, GuestAddress(layout::CMDLINE))
            .unwrap();
        let end = line.iter().position(|byte| *byte == 0).unwrap();
        assert!(line[..end].ends_with(b" panic=7"));
    }

    #[test]
    fn the_huge_page_of_the_entry_is_read_and_what_is_behind_it_mapped() {
        let segment = |guest: Range<u64>| elf::Segment {
            index: 0,
            file_offset: 4096,
            file_bytes: guest.end - guest.start,
            guest,
            writable: false,
        };
        const MIB: u64 = 1 << 20;
        let text = segment(16 * MIB..28 * MIB);
        assert_eq!(read_first(&text, 16 * MIB + 0x123), 2 * MIB);
        assert_eq!(read_first(&text, 21 * MIB), 6 * MIB);
        assert_eq!(read_first(&text, 28 * MIB), 0, "in another segment");
        assert_eq!(read_first(&segment(17 * MIB..40 * MIB), 17 * MIB), MIB);
        assert_eq!(read_first(&segment(16 * MIB..17 * MIB), 16 * MIB), MIB);
    }

    #[test]
    fn a_segment_is_in_memory_whole_whatever_of_it_is_mapped() {
        let bytes: Vec<u8> = (0..5 << 20).map(|at| (at / 4096 + at) as u8).collect();
        let kernel = file(&bytes);
        let (start, offset) = (15 << 20, 4096);
        for (writable, entry) in [(false, start), (false, 0), (true, start)] {
            let memory = memory::map(mib(64), None).unwrap();
            let file_bytes = bytes.len() as u64 - offset - 7;
            let segment = elf::Segment {
                index: 0,
                file_offset: offset,
                file_bytes,
                guest: start..start + file_bytes,
                writable,
            };
            load_segment(&memory, &kernel, &segment, entry).unwrap();
            let mut found = vec![0; file_bytes as usize];
            memory.read_slice(&mut found, GuestAddress(start)).unwrap();
            let offset = offset as usize;
            assert!(
                found == bytes[offset..bytes.len() - 7],
                "{writable} {entry}"
            );
        }
    }

    #[test]
    fn what_is_no_kernel_is_named_by_its_first_bytes() {
        assert_eq!(refused(b"", None), "the kernel is empty");
        let error = refused(b"#!/bin/sh\n", None);
        assert!(error.contains("neither an ELF vmlinux nor a bzImage"));
        assert!(error.contains("[23, 21, 2f, 62]"), "{error}");
        assert!(refused(&[0x1f, 0x8b], None).contains("[1f, 8b, 00, 00]"));
        assert!(refused(b"\x7fELF", None).contains("cut short"));
    }

    #[test]
    fn a_kernel_that_is_a_directory_or_a_pipe_is_refused() {
        let directory = File::open("/").unwrap();
        let memory = memory::map(mib(64), None).unwrap();
        let guest = Guest {
            kernel: &directory,
            initramfs: None,
            line: Line::default(),
        };
        let error = load(&memory, mib(64), &guest).unwrap_err();
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert_eq!(cause, "it is not a regular file");
    }

    #[test]
    fn an_initramfs_that_is_empty_or_does_not_fit_is_refused() {
        let kernel = ElfFile::example().bytes();
        assert_eq!(refused(&kernel, Some(b"")), "the initramfs is empty");
        let mut large = ElfFile::example();
        large.segments[0].memory_bytes = (63 << 20) - 4096;
        let error = refused(&large.bytes(), Some(&[0; 4097]));
        assert!(
            error.contains("4097 bytes") && error.contains("4096 bytes are left"),
            "{error}"
        );
        loaded(&large.bytes(), Some(&[0; 4096])).unwrap();
    }
}
