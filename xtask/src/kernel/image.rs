//! What a vmlinux must be for the VMM: a 64-bit x86 ELF executable with the PVH entry note, every loadable segment on a page
//! boundary in memory and in the file, so that it can be mapped instead of copied, and no symbols to carry along.
//!
//! Trusts nothing: every offset is checked, though the file comes from our own build.

const PAGE_BYTES: u64 = 4096;
const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const SECTION_HEADER_BYTES: usize = 64;
const TYPE_EXECUTABLE: u16 = 2;
const MACHINE_X86_64: u16 = 62;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;
const SECTION_SYMBOLS: u32 = 2;
/// `XEN_ELFNOTE_PHYS32_ENTRY` of include/xen/interface/elfnote.h: the 32-bit entry of a PVH guest.
const NOTE_PHYS32_ENTRY: u32 = 18;
const NOTE_OWNER: &[u8; 4] = b"Xen\0";
const NOTE_HEADER_BYTES: usize = 12;

/// Why a file is not a kernel that the VMM takes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// Not a 64-bit little-endian ELF executable for x86-64.
    #[error("not a 64-bit x86 ELF executable")]
    NotElf,
    /// Something reaches past the end.
    #[error("cut short: {0} is past the end of the file")]
    Short(&'static str),
    /// Nothing to load.
    #[error("no loadable segment")]
    Empty,
    /// A segment that cannot be mapped.
    #[error("the segment at {address:#x} (file offset {offset:#x}) does not begin on a page")]
    Unaligned {
        /// Its physical address.
        address: u64,
        /// Its place in the file.
        offset: u64,
    },
    /// Two segments in one page.
    #[error("the segments at {0:#x} and {1:#x} share a page")]
    Overlap(u64, u64),
    /// No PVH entry, or one outside every segment.
    #[error("no PVH entry note (CONFIG_PVH) that points into a segment")]
    NoEntry,
    /// A symbol table.
    #[error("not stripped")]
    Symbols,
}

/// What the VMM will find in a vmlinux.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The PVH entry's physical address.
    pub entry: u64,
    /// What is loaded, in the order of the file.
    pub segments: Vec<Segment>,
}

/// One loadable segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Physical address.
    pub address: u64,
    /// Bytes in memory; those that the file does not have are zero.
    pub memory_bytes: u64,
}

impl Segment {
    /// First page, and the page after the last.
    fn pages(&self) -> (u64, u64) {
        let end = self.address.saturating_add(self.memory_bytes);
        (self.address / PAGE_BYTES, end.div_ceil(PAGE_BYTES))
    }

    fn shares_a_page_with(&self, other: &Segment) -> bool {
        let (first, end) = self.pages();
        let (other_first, other_end) = other.pages();
        first < other_end && other_first < end
    }

    fn holds(&self, address: u64) -> bool {
        address >= self.address && address - self.address < self.memory_bytes
    }
}

/// Checks a vmlinux.
///
/// # Errors
/// The first thing that makes it unfit.
pub fn check(elf: &[u8]) -> Result<Image, ImageError> {
    let header = Record(elf.get(..HEADER_BYTES).ok_or(ImageError::NotElf)?);
    let is_kernel = header.0.starts_with(b"\x7fELF\x02\x01")
        && header.u16(16) == TYPE_EXECUTABLE
        && header.u16(18) == MACHINE_X86_64;
    if !is_kernel {
        return Err(ImageError::NotElf);
    }
    let sections = table(elf, header.u64(40), header.u16(60), SECTION_HEADER_BYTES)
        .ok_or(ImageError::Short("a section header"))?;
    if sections
        .iter()
        .any(|section| section.u32(4) == SECTION_SYMBOLS)
    {
        return Err(ImageError::Symbols);
    }
    let mut segments: Vec<Segment> = Vec::new();
    let mut entry = None;
    let programs = table(elf, header.u64(32), header.u16(56), PROGRAM_HEADER_BYTES)
        .ok_or(ImageError::Short("a program header"))?;
    for program in programs {
        let contents =
            piece(elf, program.u64(8), program.u64(32)).ok_or(ImageError::Short("a segment"))?;
        match program.u32(0) {
            SEGMENT_LOAD => segments.push(loadable(&program, &segments)?),
            SEGMENT_NOTE => entry = entry.or_else(|| pvh_entry(contents)),
            _ => {}
        }
    }
    if segments.is_empty() {
        return Err(ImageError::Empty);
    }
    let entry = entry
        .filter(|entry| segments.iter().any(|segment| segment.holds(*entry)))
        .ok_or(ImageError::NoEntry)?;
    Ok(Image { entry, segments })
}

fn loadable(program: &Record<'_>, others: &[Segment]) -> Result<Segment, ImageError> {
    let offset = program.u64(8);
    let segment = Segment {
        address: program.u64(24),
        memory_bytes: program.u64(40),
    };
    if offset % PAGE_BYTES != 0 || segment.address % PAGE_BYTES != 0 {
        return Err(ImageError::Unaligned {
            address: segment.address,
            offset,
        });
    }
    match others
        .iter()
        .find(|other| other.shares_a_page_with(&segment))
    {
        Some(other) => Err(ImageError::Overlap(other.address, segment.address)),
        None => Ok(segment),
    }
}

/// The entry that a note segment names.
fn pvh_entry(mut notes: &[u8]) -> Option<u64> {
    while let Some(header) = notes.get(..NOTE_HEADER_BYTES) {
        let header = Record(header);
        let name_bytes = usize::try_from(header.u32(0)).ok()?;
        let value_bytes = usize::try_from(header.u32(4)).ok()?;
        let name = notes.get(NOTE_HEADER_BYTES..)?.get(..name_bytes)?;
        let value_at = NOTE_HEADER_BYTES.checked_add(name_bytes.checked_next_multiple_of(4)?)?;
        let value = notes.get(value_at..)?.get(..value_bytes)?;
        if header.u32(8) == NOTE_PHYS32_ENTRY && name == NOTE_OWNER {
            return match value.len() {
                4 => Some(u64::from(Record(value).u32(0))),
                8 => Some(Record(value).u64(0)),
                _ => None,
            };
        }
        notes = notes.get(value_at.checked_add(value_bytes.checked_next_multiple_of(4)?)?..)?;
    }
    None
}

fn piece(bytes: &[u8], offset: u64, length: u64) -> Option<&[u8]> {
    let offset = usize::try_from(offset).ok()?;
    bytes.get(offset..)?.get(..usize::try_from(length).ok()?)
}

fn table(elf: &[u8], offset: u64, count: u16, record_bytes: usize) -> Option<Vec<Record<'_>>> {
    let bytes = usize::from(count).checked_mul(record_bytes)?;
    let table = piece(elf, offset, u64::try_from(bytes).ok()?)?;
    Some(table.chunks_exact(record_bytes).map(Record).collect())
}

/// A header of known size; a field outside it reads as 0, which no check accepts.
struct Record<'a>(&'a [u8]);

impl Record<'_> {
    fn u16(&self, at: usize) -> u16 {
        u16::from_le_bytes(self.array(at))
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_le_bytes(self.array(at))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_le_bytes(self.array(at))
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        let field = self.0.get(at..).and_then(|rest| rest.first_chunk::<N>());
        field.copied().unwrap_or([0; N])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ENTRY: u64 = 0x100_0010;

    /// A vmlinux of two segments of a page each and a PVH note.
    struct Vmlinux(Vec<u8>);

    impl Vmlinux {
        fn new() -> Self {
            let mut elf = vec![0; 4096];
            elf[..6].copy_from_slice(b"\x7fELF\x02\x01");
            let mut vmlinux = Self(elf);
            vmlinux.put(16, &TYPE_EXECUTABLE.to_le_bytes());
            vmlinux.put(18, &MACHINE_X86_64.to_le_bytes());
            vmlinux.put(32, &64u64.to_le_bytes());
            vmlinux.put(56, &3u16.to_le_bytes());
            vmlinux.put(40, &512u64.to_le_bytes());
            vmlinux.put(60, &1u16.to_le_bytes());
            vmlinux.program(0, SEGMENT_LOAD, 0x1000, 0x100_0000, 0x1000);
            vmlinux.program(1, SEGMENT_LOAD, 0x2000, 0x100_1000, 0x1000);
            vmlinux.program(2, SEGMENT_NOTE, 0x1100, 0x100_0100, 40);
            vmlinux.0.resize(0x3000, 0);
            // A note of somebody else comes first.
            vmlinux.note(0x1100, b"GNU\0", 18, &1u32.to_le_bytes());
            vmlinux.note(
                0x1114,
                NOTE_OWNER,
                NOTE_PHYS32_ENTRY,
                &ENTRY.to_le_bytes()[..4],
            );
            vmlinux
        }

        fn put(&mut self, at: usize, bytes: &[u8]) {
            self.0[at..at + bytes.len()].copy_from_slice(bytes);
        }

        fn program(&mut self, index: usize, kind: u32, offset: u64, address: u64, bytes: u64) {
            let at = 64 + index * PROGRAM_HEADER_BYTES;
            self.put(at, &kind.to_le_bytes());
            for (field, value) in [(8, offset), (24, address), (32, bytes), (40, bytes)] {
                self.put(at + field, &value.to_le_bytes());
            }
        }

        fn note(&mut self, at: usize, owner: &[u8; 4], kind: u32, value: &[u8]) {
            let length = u32::try_from(value.len()).expect("short");
            self.put(at, &4u32.to_le_bytes());
            self.put(at + 4, &length.to_le_bytes());
            self.put(at + 8, &kind.to_le_bytes());
            self.put(at + 12, owner);
            self.put(at + 16, value);
        }

        fn refused(change: impl FnOnce(&mut Self)) -> ImageError {
            let mut vmlinux = Self::new();
            change(&mut vmlinux);
            check(&vmlinux.0).expect_err("must be refused")
        }
    }

    #[test]
    fn a_sound_kernel_is_described() {
        let image = check(&Vmlinux::new().0).expect("sound");
        assert_eq!(image.entry, ENTRY);
        assert_eq!(
            image
                .segments
                .iter()
                .map(|segment| segment.address)
                .collect::<Vec<_>>(),
            [0x100_0000, 0x100_1000]
        );
    }

    #[test]
    fn other_files_are_refused() {
        assert_eq!(check(b"").unwrap_err(), ImageError::NotElf);
        assert_eq!(check(&[b'#'; 4096]).unwrap_err(), ImageError::NotElf);
        // 32-bit, another machine, not an executable.
        assert_eq!(Vmlinux::refused(|v| v.put(4, &[1])), ImageError::NotElf);
        assert_eq!(
            Vmlinux::refused(|v| v.put(18, &[183, 0])),
            ImageError::NotElf
        );
        assert_eq!(Vmlinux::refused(|v| v.put(16, &[3, 0])), ImageError::NotElf);
    }

    #[test]
    fn a_kernel_cut_short_is_refused() {
        assert_eq!(
            Vmlinux::refused(|v| v.0.truncate(0x2fff)),
            ImageError::Short("a segment")
        );
        assert_eq!(
            Vmlinux::refused(|v| v.0.truncate(100)),
            ImageError::Short("a section header")
        );
        assert_eq!(
            Vmlinux::refused(|v| v.put(32, &u64::MAX.to_le_bytes())),
            ImageError::Short("a program header")
        );
    }

    #[test]
    fn a_segment_off_its_page_is_refused() {
        assert_eq!(
            Vmlinux::refused(|v| v.program(1, SEGMENT_LOAD, 0x2000, 0x100_1010, 0x10)),
            ImageError::Unaligned {
                address: 0x100_1010,
                offset: 0x2000
            }
        );
        assert_eq!(
            Vmlinux::refused(|v| v.program(1, SEGMENT_LOAD, 0x2010, 0x100_1000, 0x10)),
            ImageError::Unaligned {
                address: 0x100_1000,
                offset: 0x2010
            }
        );
    }

    #[test]
    fn segments_that_share_a_page_are_refused() {
        assert_eq!(
            Vmlinux::refused(|v| v.program(0, SEGMENT_LOAD, 0x1000, 0x100_0000, 0x1001)),
            ImageError::Overlap(0x100_0000, 0x100_1000)
        );
    }

    #[test]
    fn a_kernel_without_pvh_entry_is_refused() {
        assert_eq!(
            Vmlinux::refused(|v| v.program(2, SEGMENT_NOTE, 0x1100, 0, 20)),
            ImageError::NoEntry
        );
        assert_eq!(
            Vmlinux::refused(|v| v.put(0x1114 + 16, &0x200_0000u32.to_le_bytes())),
            ImageError::NoEntry
        );
    }

    #[test]
    fn a_kernel_with_symbols_is_refused() {
        assert_eq!(
            Vmlinux::refused(|v| v.put(512 + 4, &SECTION_SYMBOLS.to_le_bytes())),
            ImageError::Symbols
        );
    }

    #[test]
    fn a_kernel_with_nothing_to_load_is_refused() {
        assert_eq!(Vmlinux::refused(|v| v.put(56, &[0, 0])), ImageError::Empty);
    }

    proptest! {
        #[test]
        fn any_bytes_are_checked_or_refused(at in 0usize..0x3000, bytes in proptest::collection::vec(any::<u8>(), 1..64)) {
            let mut vmlinux = Vmlinux::new();
            for (index, byte) in bytes.iter().enumerate() {
                if let Some(place) = vmlinux.0.get_mut(at + index) {
                    *place = *byte;
                }
            }
            let _either = check(&vmlinux.0);
        }
    }
}
