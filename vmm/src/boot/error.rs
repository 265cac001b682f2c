//! Why a kernel or an initramfs was refused. The texts follow "kernel: ": each names the field and what
//! would be right.

use capsid_devices::memory::NotMemory;
use std::io;

/// What is wrong with a kernel, an initramfs or a command line.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file could not be read.
    #[error("cannot read the {0}")]
    Read(&'static str, #[source] io::Error),
    /// Nothing in it.
    #[error("the {0} is empty")]
    Empty(&'static str),
    /// Larger than any kernel.
    #[error("the kernel is {bytes} bytes long, at most {max} are taken")]
    TooLong {
        /// Length of the file.
        bytes: u64,
        /// The most that is taken.
        max: u64,
    },
    /// Neither of the two formats.
    #[error(
        "the kernel is neither an ELF vmlinux nor a bzImage: it begins with {0:02x?}; give an uncompressed vmlinux"
    )]
    Unknown([u8; 4]),
    /// Shorter than its own headers say.
    #[error("the kernel is cut short: its {what} ends at byte {needs}, the file at byte {has}")]
    Truncated {
        /// Which part.
        what: &'static str,
        /// Where that part ends.
        needs: u64,
        /// Length of the file.
        has: u64,
    },
    /// An ELF file, but not a 64-bit one.
    #[error("the kernel is a 32-bit ELF file; a 64-bit x86 kernel is needed")]
    Elf32,
    /// Big-endian or of an unknown version.
    #[error("the kernel is not a little-endian ELF file of version 1")]
    ElfData,
    /// For another machine.
    #[error("the kernel is an ELF file for machine {0}; one for x86-64 (62) is needed")]
    ElfMachine(u16),
    /// A library or an object file.
    #[error("the kernel is an ELF file of type {0}, not an executable (2)")]
    ElfType(u16),
    /// Program headers of another size or too many.
    #[error(
        "the kernel has {count} program headers of {bytes} bytes; 1 to {max} of 56 bytes are taken"
    )]
    ProgramHeaders {
        /// `e_phnum`.
        count: u16,
        /// `e_phentsize`.
        bytes: u16,
        /// The most that is taken.
        max: u16,
    },
    /// A segment with more bytes in the file than in memory, or one that wraps.
    #[error("segment {0} of the kernel has sizes or addresses that make no sense")]
    Segment(usize),
    /// Nothing to load.
    #[error("the kernel has no segment to load")]
    NoSegment,
    /// A segment where the VMM puts its own tables, or beyond memory.
    #[error(
        "segment {index} of the kernel is for {start:#x}..{end:#x}, guest memory for it is {min:#x}..{max:#x}; give the VM more memory"
    )]
    SegmentOutside {
        /// Number of the program header.
        index: usize,
        /// First address.
        start: u64,
        /// End.
        end: u64,
        /// First usable address.
        min: u64,
        /// End of usable memory.
        max: u64,
    },
    /// Two segments in one place.
    #[error("segments {0} and {1} of the kernel overlap")]
    SegmentsOverlap(usize, usize),
    /// No PVH note.
    #[error("the kernel has no PVH entry note; build it with CONFIG_PVH=y or give its bzImage")]
    NoPvhNote,
    /// Notes that are no notes.
    #[error("the kernel's ELF notes make no sense")]
    Notes,
    /// The entry point lies in no segment.
    #[error("the kernel's PVH entry {0:#x} is in none of its segments")]
    EntryOutside(u64),
    /// Older boot protocol.
    #[error(
        "the bzImage speaks boot protocol {major}.{minor:02}; 2.12 or newer is needed (Linux 3.8)"
    )]
    TooOld {
        /// Major number.
        major: u8,
        /// Minor number.
        minor: u8,
    },
    /// A 32-bit kernel.
    #[error("the bzImage is a 32-bit kernel; a 64-bit x86 kernel is needed")]
    BzImage32,
    /// A zImage, or a header whose sizes contradict each other.
    #[error("the bzImage's {0} makes no sense")]
    BzImageField(&'static str),
    /// Needs more memory than there is.
    #[error(
        "the kernel needs memory up to {needs_mib} MiB to unpack itself, the guest has {has_mib} MiB below its hole; give the VM more memory"
    )]
    BzImageMemory {
        /// End of what it needs.
        needs_mib: u64,
        /// Usable low memory.
        has_mib: u64,
    },
    /// The initramfs does not fit.
    #[error(
        "the initramfs of {bytes} bytes does not fit into guest memory beside the kernel ({room} bytes are left); give the VM more memory"
    )]
    InitramfsMemory {
        /// Its length.
        bytes: u64,
        /// What is left.
        room: u64,
    },
    /// Parameters too long for the kernel.
    #[error("the kernel command line is {bytes} bytes long, at most {max} fit")]
    Cmdline {
        /// With its NUL.
        bytes: usize,
        /// The kernel's limit.
        max: usize,
    },
    /// A write below the end of guest memory failed: a defect.
    #[error("cannot write the {0} into guest memory")]
    Write(&'static str, #[source] NotMemory),
}
