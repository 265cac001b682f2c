//! An ELF vmlinux with a PVH note (`Documentation/arch/x86/pvh`, `include/xen/interface/elfnote.h`).
//!
//! Takes the file for hostile: every header is checked against the length of the file and against guest
//! memory before a byte is used, and the work is bounded by the constants below.

use super::error::BootError;
use super::image::{Image, field};
use std::ops::Range;

/// The most program headers that are read.
const PROGRAM_HEADERS_MAX: u16 = 64;
/// The longest note segment that is read, in bytes.
const NOTES_MAX_BYTES: u64 = 64 * 1024;
const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const EM_X86_64: u16 = 62;
const ET_EXEC: u16 = 2;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// The segment is written to.
const PF_W: u32 = 2;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: its descriptor is the 32-bit entry point.
const PHYS32_ENTRY: u32 = 18;

/// A part of the file and where it goes in guest memory; behind its bytes, zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Number of its program header.
    pub index: usize,
    /// Where its bytes begin in the file.
    pub file_offset: u64,
    /// How many there are.
    pub file_bytes: u64,
    /// Guest-physical range that it takes.
    pub guest: Range<u64>,
    /// Whether the kernel says that it writes to it (`PF_W`).
    pub writable: bool,
}

/// A kernel that can be loaded and entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PvhKernel {
    /// Guest-physical address at which the guest starts.
    pub entry: u64,
    /// What to load, disjoint, inside the memory that was allowed.
    pub segments: Vec<Segment>,
    /// End of the highest segment.
    pub end: u64,
}

struct ProgramHeader {
    kind: u32,
    flags: u32,
    offset: u64,
    physical: u64,
    file_bytes: u64,
    memory_bytes: u64,
    align: u64,
}

/// Whether a file that begins with `magic` says that it is ELF.
pub(super) fn is_elf(magic: &[u8]) -> bool {
    magic.starts_with(b"\x7fELF")
}

/// Reads the headers; `room` is the guest memory that the kernel may use.
///
/// # Errors
/// The first thing that is wrong.
pub(super) fn parse(image: &impl Image, room: &Range<u64>) -> Result<PvhKernel, BootError> {
    let headers = program_headers(image)?;
    let mut segments = Vec::new();
    let mut entry = None;
    for (index, header) in headers.iter().enumerate() {
        match header.kind {
            PT_LOAD => segments.extend(segment(image, index, header, room)?),
            PT_NOTE if entry.is_none() => entry = pvh_entry(image, header)?,
            _ => {}
        }
    }
    let entry = entry.ok_or(BootError::NoPvhNote)?;
    refuse_overlaps(&segments)?;
    let end = segments.iter().map(|segment| segment.guest.end).max();
    let end = end.ok_or(BootError::NoSegment)?;
    if !segments
        .iter()
        .any(|segment| segment.guest.contains(&entry))
    {
        return Err(BootError::EntryOutside(entry));
    }
    Ok(PvhKernel {
        entry,
        segments,
        end,
    })
}

fn program_headers(image: &impl Image) -> Result<Vec<ProgramHeader>, BootError> {
    let mut header = [0; HEADER_BYTES];
    read(image, "ELF header", 0, &mut header)?;
    match header[4] {
        2 => {}
        1 => return Err(BootError::Elf32),
        _ => return Err(BootError::ElfData),
    }
    if header[5] != 1 || header[6] != 1 {
        return Err(BootError::ElfData);
    }
    match u16::from_le_bytes(field(&header, 18)) {
        EM_X86_64 => {}
        machine => return Err(BootError::ElfMachine(machine)),
    }
    match u16::from_le_bytes(field(&header, 16)) {
        ET_EXEC => {}
        kind => return Err(BootError::ElfType(kind)),
    }
    let offset = u64::from_le_bytes(field(&header, 32));
    let bytes = u16::from_le_bytes(field(&header, 54));
    let count = u16::from_le_bytes(field(&header, 56));
    let max = PROGRAM_HEADERS_MAX;
    if usize::from(bytes) != PROGRAM_HEADER_BYTES || !(1..=max).contains(&count) {
        return Err(BootError::ProgramHeaders { count, bytes, max });
    }
    let mut table = vec![0; usize::from(count) * PROGRAM_HEADER_BYTES];
    read(image, "program header table", offset, &mut table)?;
    let headers = table.chunks_exact(PROGRAM_HEADER_BYTES);
    Ok(headers.map(program_header).collect())
}

fn program_header(bytes: &[u8]) -> ProgramHeader {
    ProgramHeader {
        kind: u32::from_le_bytes(field(bytes, 0)),
        flags: u32::from_le_bytes(field(bytes, 4)),
        offset: u64::from_le_bytes(field(bytes, 8)),
        physical: u64::from_le_bytes(field(bytes, 24)),
        file_bytes: u64::from_le_bytes(field(bytes, 32)),
        memory_bytes: u64::from_le_bytes(field(bytes, 40)),
        align: u64::from_le_bytes(field(bytes, 48)),
    }
}

fn segment(
    image: &impl Image,
    index: usize,
    header: &ProgramHeader,
    room: &Range<u64>,
) -> Result<Option<Segment>, BootError> {
    let wrong = || BootError::Segment(index);
    let file_end = header.offset.checked_add(header.file_bytes);
    let file_end = file_end.ok_or_else(wrong)?;
    let end = header.physical.checked_add(header.memory_bytes);
    let end = end.ok_or_else(wrong)?;
    if header.file_bytes > header.memory_bytes {
        return Err(wrong());
    }
    if file_end > image.length() {
        return Err(BootError::Truncated {
            what: "segment",
            needs: file_end,
            has: image.length(),
        });
    }
    if header.memory_bytes == 0 {
        return Ok(None);
    }
    if header.physical < room.start || end > room.end {
        return Err(BootError::SegmentOutside {
            index,
            start: header.physical,
            end,
            min: room.start,
            max: room.end,
        });
    }
    Ok(Some(Segment {
        index,
        file_offset: header.offset,
        file_bytes: header.file_bytes,
        guest: header.physical..end,
        writable: header.flags & PF_W != 0,
    }))
}

fn refuse_overlaps(segments: &[Segment]) -> Result<(), BootError> {
    let mut by_start: Vec<&Segment> = segments.iter().collect();
    by_start.sort_by_key(|segment| segment.guest.start);
    for pair in by_start.windows(2) {
        if let [low, high] = pair {
            if low.guest.end > high.guest.start {
                return Err(BootError::SegmentsOverlap(low.index, high.index));
            }
        }
    }
    Ok(())
}

/// Looks through one note segment. Each step goes forward by at least a note's header, so that no
/// length in it can hold the search up (as in GHSA-52h2-m2cf-9jh6).
fn pvh_entry(image: &impl Image, header: &ProgramHeader) -> Result<Option<u64>, BootError> {
    if header.file_bytes > NOTES_MAX_BYTES {
        return Err(BootError::Notes);
    }
    let length = usize::try_from(header.file_bytes).map_err(|_| BootError::Notes)?;
    let mut notes = vec![0; length];
    read(image, "notes", header.offset, &mut notes)?;
    // 4 in practice; 8 for GNU properties. Anything else does not exist.
    let align = if header.align == 8 { 8 } else { 4 };
    let mut rest = notes.as_slice();
    while let Some((fixed, behind)) = rest.split_at_checked(12) {
        let name_bytes = u32::from_le_bytes(field(fixed, 0));
        let desc_bytes = u32::from_le_bytes(field(fixed, 4));
        let kind = u32::from_le_bytes(field(fixed, 8));
        let (name, behind) = padded(behind, name_bytes, align).ok_or(BootError::Notes)?;
        let (desc, behind) = padded(behind, desc_bytes, align).ok_or(BootError::Notes)?;
        if kind == PHYS32_ENTRY && name == b"Xen\0" {
            return match *desc {
                [a, b, c, d] | [a, b, c, d, 0, 0, 0, 0] => {
                    Ok(Some(u64::from(u32::from_le_bytes([a, b, c, d]))))
                }
                _ => Err(BootError::Notes),
            };
        }
        rest = behind;
    }
    Ok(None)
}

/// Splits off `bytes` and their padding; the padding of the very last field may be missing.
fn padded(from: &[u8], bytes: u32, align: usize) -> Option<(&[u8], &[u8])> {
    let bytes = usize::try_from(bytes).ok()?;
    let (taken, _) = from.split_at_checked(bytes)?;
    let behind = from.get(bytes.checked_next_multiple_of(align)?..);
    Some((taken, behind.unwrap_or_default()))
}

fn read(
    image: &impl Image,
    what: &'static str,
    offset: u64,
    bytes: &mut [u8],
) -> Result<(), BootError> {
    let needs = offset.saturating_add(bytes.len() as u64);
    let has = image.length();
    if needs > has {
        return Err(BootError::Truncated { what, needs, has });
    }
    image
        .read_at(offset, bytes)
        .map_err(|cause| BootError::Read("kernel", cause))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::testing::{ElfFile, Note};
    use proptest::prelude::*;

    const ROOM: Range<u64> = 0x10_0000..0x400_0000;

    fn parsed(file: &ElfFile) -> Result<PvhKernel, BootError> {
        parse(&file.bytes().as_slice(), &ROOM)
    }

    fn refused(change: impl FnOnce(&mut ElfFile)) -> String {
        let mut file = ElfFile::example();
        change(&mut file);
        parsed(&file).expect_err("must be refused").to_string()
    }

    #[test]
    fn the_example_has_its_segment_and_its_entry() {
        let kernel = parsed(&ElfFile::example()).unwrap();
        assert_eq!(kernel.entry, 0x10_0000);
        assert_eq!(kernel.segments.len(), 1);
        assert_eq!(kernel.segments[0].guest, 0x10_0000..0x10_2000);
        assert_eq!(kernel.end, 0x10_2000);
    }

    #[test]
    fn a_32_bit_file_another_machine_and_an_object_are_told_apart() {
        assert!(refused(|file| file.class = 1).contains("32-bit"));
        assert!(refused(|file| file.machine = 183).contains("machine 183"));
        assert!(refused(|file| file.kind = 3).contains("type 3"));
        assert!(refused(|file| file.data = 2).contains("little-endian"));
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let whole = ElfFile::example().bytes();
        for length in 0..whole.len() {
            let cut = &whole[..length];
            assert!(parse(&cut, &ROOM).is_err(), "{length} bytes");
        }
        parse(&whole.as_slice(), &ROOM).unwrap();
    }

    #[test]
    fn without_a_pvh_note_the_error_says_what_to_do() {
        assert!(refused(|file| file.notes.clear()).contains("CONFIG_PVH"));
        assert!(refused(|file| file.notes[0].kind = 17).contains("no PVH entry note"));
        assert!(refused(|file| file.notes[0].name = b"Abc\0".to_vec()).contains("no PVH"));
    }

    #[test]
    fn the_pvh_note_is_found_behind_others_and_with_a_64_bit_descriptor() {
        let mut file = ElfFile::example();
        file.notes.insert(0, Note::new(b"GNU\0", 3, &[1; 20]));
        file.notes[1].desc = 0x10_0010u64.to_le_bytes().to_vec();
        assert_eq!(parsed(&file).unwrap().entry, 0x10_0010);
    }

    #[test]
    fn notes_with_impossible_lengths_are_refused_at_once() {
        for lengths in [(u32::MAX, 4), (4, u32::MAX), (u32::MAX, u32::MAX)] {
            let error = refused(|file| file.notes[0].lengths = Some(lengths));
            assert_eq!(error, "the kernel's ELF notes make no sense");
        }
        assert!(refused(|file| file.notes[0].desc = vec![1; 3]).contains("notes make no sense"));
    }

    #[test]
    fn a_segment_outside_guest_memory_is_refused_with_both_ranges() {
        let error = refused(|file| file.segments[0].physical = 0x9_0000);
        assert!(error.contains("0x90000..0x92000") && error.contains("0x100000..0x4000000"));
        assert!(refused(|file| file.segments[0].physical = 0x3ff_f000).contains("more memory"));
        assert!(refused(|file| file.segments[0].physical = u64::MAX - 8).contains("no sense"));
    }

    #[test]
    fn a_segment_larger_in_the_file_than_in_memory_is_refused() {
        assert!(refused(|file| file.segments[0].memory_bytes = 1).contains("segment 0"));
    }

    #[test]
    fn overlapping_segments_are_refused_by_number() {
        let error = refused(|file| {
            let mut second = file.segments[0].clone();
            second.physical += 0x1fff;
            file.segments.push(second);
        });
        assert_eq!(error, "segments 0 and 1 of the kernel overlap");
    }

    #[test]
    fn an_entry_outside_every_segment_and_a_kernel_without_segments_are_refused() {
        assert!(refused(|file| file.notes[0].desc = vec![0, 0, 0, 1]).contains("0x1000000"));
        assert!(refused(|file| file.segments.clear()).contains("no segment"));
    }

    #[test]
    fn too_many_program_headers_are_refused() {
        assert!(refused(|file| file.header_count = Some(u16::MAX)).contains("65535"));
        assert!(refused(|file| file.header_count = Some(0)).contains("has 0 program headers"));
        assert!(refused(|file| file.header_offset = Some(u64::MAX)).contains("cut short"));
    }

    proptest! {
        #[test]
        fn any_bytes_behind_the_magic_are_parsed_or_refused(mut bytes: Vec<u8>) {
            let mut file = b"\x7fELF\x02\x01\x01".to_vec();
            file.append(&mut bytes);
            let _either = parse(&file.as_slice(), &ROOM);
        }

        #[test]
        fn a_kernel_with_any_bytes_changed_is_refused_or_loads_inside_its_room(
            changes in proptest::collection::vec((0usize..400, any::<u8>()), 1..12)
        ) {
            let mut file = ElfFile::example().bytes();
            for (at, byte) in changes {
                if let Some(place) = file.get_mut(at) {
                    *place = byte;
                }
            }
            if let Ok(kernel) = parse(&file.as_slice(), &ROOM) {
                for segment in kernel.segments {
                    prop_assert!(segment.guest.start >= ROOM.start && segment.guest.end <= ROOM.end);
                    prop_assert!(segment.file_offset + segment.file_bytes <= file.len() as u64);
                    prop_assert!(segment.file_bytes <= segment.guest.end - segment.guest.start);
                }
            }
        }
    }
}
