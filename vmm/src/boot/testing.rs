//! Kernel files made by hand, for the tests of the parsers.

/// One ELF note.
#[derive(Clone)]
pub(crate) struct Note {
    pub name: Vec<u8>,
    pub kind: u32,
    pub desc: Vec<u8>,
    /// Lengths to claim instead of the true ones.
    pub lengths: Option<(u32, u32)>,
}

impl Note {
    pub(crate) fn new(name: &[u8], kind: u32, desc: &[u8]) -> Note {
        Note {
            name: name.to_vec(),
            kind,
            desc: desc.to_vec(),
            lengths: None,
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let (name, desc) = self
            .lengths
            .unwrap_or((self.name.len() as u32, self.desc.len() as u32));
        let mut bytes = Vec::new();
        for word in [name, desc, self.kind] {
            bytes.extend(word.to_le_bytes());
        }
        for part in [&self.name, &self.desc] {
            bytes.extend(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }
}

/// One PT_LOAD segment.
#[derive(Clone)]
pub(crate) struct Load {
    pub physical: u64,
    pub memory_bytes: u64,
    pub bytes: Vec<u8>,
}

/// An ELF file with segments and notes.
#[derive(Clone)]
pub(crate) struct ElfFile {
    pub class: u8,
    pub data: u8,
    pub kind: u16,
    pub machine: u16,
    pub header_offset: Option<u64>,
    pub header_count: Option<u16>,
    pub segments: Vec<Load>,
    pub notes: Vec<Note>,
}

impl ElfFile {
    /// One segment of two pages at 1 MiB, entered at its first byte.
    pub(crate) fn example() -> ElfFile {
        ElfFile {
            class: 2,
            data: 1,
            kind: 2,
            machine: 62,
            header_offset: None,
            header_count: None,
            segments: vec![Load {
                physical: 0x10_0000,
                memory_bytes: 0x2000,
                bytes: vec![0xf4; 16],
            }],
            notes: vec![Note::new(b"Xen\0", 18, &0x10_0000u32.to_le_bytes())],
        }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let notes: Vec<u8> = self.notes.iter().flat_map(Note::bytes).collect();
        let count = self.segments.len() + 1;
        let mut offset = 64 + 56 * count as u64;
        let mut headers = Vec::new();
        let mut body = Vec::new();
        for segment in &self.segments {
            let length = segment.bytes.len() as u64;
            headers.push((1u32, offset, segment.physical, length, segment.memory_bytes));
            body.extend(&segment.bytes);
            offset += length;
        }
        headers.push((4, offset, 0, notes.len() as u64, 0));
        body.extend(notes);

        let mut file = vec![0x7f, b'E', b'L', b'F', self.class, self.data, 1];
        file.resize(16, 0);
        file.extend(self.kind.to_le_bytes());
        file.extend(self.machine.to_le_bytes());
        file.extend(1u32.to_le_bytes());
        file.extend(0u64.to_le_bytes());
        file.extend(self.header_offset.unwrap_or(64).to_le_bytes());
        file.extend(0u64.to_le_bytes());
        file.extend(0u32.to_le_bytes());
        file.extend(64u16.to_le_bytes());
        file.extend(56u16.to_le_bytes());
        file.extend(self.header_count.unwrap_or(count as u16).to_le_bytes());
        file.extend([0; 6]);
        for (kind, offset, physical, file_bytes, memory_bytes) in headers {
            file.extend(kind.to_le_bytes());
            file.extend(5u32.to_le_bytes());
            for word in [offset, physical, physical, file_bytes, memory_bytes, 4] {
                file.extend(u64::to_le_bytes(word));
            }
        }
        file.extend(body);
        file
    }
}

/// A bzImage with 0x100 bytes behind one sector of set-up, that wants 8 MiB at 16 MiB.
pub(crate) fn bzimage() -> Vec<u8> {
    let mut file = vec![0; 0x400 + 0x100];
    let mut put = |offset: usize, bytes: &[u8]| {
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0x1f1, &[1]);
    put(0x1f4, &0x10u32.to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x66]);
    put(0x202, b"HdrS");
    put(0x206, &0x020fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x80_0000u32.to_le_bytes());
    file
}
