//! A bzImage, entered by the 32-bit boot protocol (`Documentation/arch/x86/boot.rst`).
//!
//! Slower to boot than a vmlinux, because it unpacks itself; taken because it is what distributions
//! install. Its headers are checked against the file and against guest memory before they are used.

use super::error::BootError;
use super::image::{Image, field};
use crate::layout::MapKind;
use std::ops::Range;

/// Bytes of the file that hold the setup header.
const SETUP_BYTES: usize = 0x268;
/// Where the setup header begins, in the file and in the zero page.
const HEADER_START: usize = 0x1f1;
/// Oldest protocol taken: 2.12 has `xloadflags`, and with it the word whether the kernel is 64-bit.
const PROTOCOL_MIN: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// "Another boot loader", `type_of_loader` without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const E820_MAX: usize = 128;
const E820_ENTRY_BYTES: usize = 20;
/// Size of `struct boot_params`, in bytes.
const ZERO_PAGE_BYTES: usize = 4096;

/// A bzImage that can be loaded and entered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BzImage {
    /// Where the protected-mode part begins in the file.
    pub file_offset: u64,
    /// Its length.
    pub file_bytes: u64,
    /// Guest-physical range that it needs until it has unpacked itself; it is loaded and entered at the start.
    pub guest: Range<u64>,
    /// Highest address that the initramfs may take.
    pub initramfs_end_max: u64,
    /// Longest command line that it takes, without the NUL.
    pub cmdline_max_bytes: usize,
    setup: Vec<u8>,
}

/// Whether a file that begins with `start` has the setup header of a bzImage.
pub(super) fn is_bzimage(start: &[u8]) -> bool {
    start.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) && start.get(0x202..0x206) == Some(b"HdrS")
}

/// Bytes of the file that [`is_bzimage`] wants to see.
pub(super) const PROBE_BYTES: usize = 0x206;

/// Reads the setup header; `room` is the guest memory that the kernel may use.
///
/// # Errors
/// The first thing that is wrong.
pub(super) fn parse(image: &impl Image, room: &Range<u64>) -> Result<BzImage, BootError> {
    let mut setup = vec![0; SETUP_BYTES];
    if image.length() < SETUP_BYTES as u64 {
        return Err(BootError::Truncated {
            what: "setup header",
            needs: SETUP_BYTES as u64,
            has: image.length(),
        });
    }
    image
        .read_at(0, &mut setup)
        .map_err(|cause| BootError::Read("kernel", cause))?;
    let version = u16::from_le_bytes(field(&setup, 0x206));
    if version < PROTOCOL_MIN {
        let [minor, major] = version.to_le_bytes();
        return Err(BootError::TooOld { major, minor });
    }
    if u16::from_le_bytes(field(&setup, 0x236)) & XLF_KERNEL_64 == 0 {
        return Err(BootError::BzImage32);
    }
    if setup[0x211] & LOADED_HIGH == 0 {
        return Err(BootError::BzImageField("loadflags (not loaded high)"));
    }
    let (file_offset, file_bytes) = protected_part(image, &setup)?;
    let guest = unpacking_range(&setup, file_bytes, room)?;
    Ok(BzImage {
        file_offset,
        file_bytes,
        guest,
        initramfs_end_max: u64::from(u32::from_le_bytes(field(&setup, 0x22c))) + 1,
        cmdline_max_bytes: u32::from_le_bytes(field(&setup, 0x238)) as usize,
        setup,
    })
}

fn protected_part(image: &impl Image, setup: &[u8]) -> Result<(u64, u64), BootError> {
    // "If the setup_sects field contains 0, the real value is 4."
    let sectors = match setup[HEADER_START] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let file_offset = (sectors + 1) * 512;
    let file_bytes = u64::from(u32::from_le_bytes(field(setup, 0x1f4))) * 16;
    if file_bytes == 0 {
        return Err(BootError::BzImageField("syssize (0)"));
    }
    if file_offset + file_bytes > image.length() {
        return Err(BootError::Truncated {
            what: "protected-mode part",
            needs: file_offset + file_bytes,
            has: image.length(),
        });
    }
    Ok((file_offset, file_bytes))
}

fn unpacking_range(
    setup: &[u8],
    file_bytes: u64,
    room: &Range<u64>,
) -> Result<Range<u64>, BootError> {
    let start = u64::from_le_bytes(field(setup, 0x258));
    let init_bytes = u64::from(u32::from_le_bytes(field(setup, 0x260)));
    let end = start.checked_add(init_bytes.max(file_bytes));
    let end = end.ok_or(BootError::BzImageField("pref_address"))?;
    if start < room.start {
        return Err(BootError::BzImageField("pref_address (below 1 MiB)"));
    }
    if end > room.end {
        return Err(BootError::BzImageMemory {
            needs_mib: end.div_ceil(1 << 20),
            has_mib: room.end >> 20,
        });
    }
    Ok(start..end)
}

/// Where the VMM put what the kernel wants to find.
pub(super) struct Placed<'a> {
    /// Address of the command line.
    pub cmdline: u32,
    /// Address and length of the initramfs.
    pub initramfs: Option<(u32, u32)>,
    /// Memory map.
    pub map: &'a [(Range<u64>, MapKind)],
}

/// The zero page (`struct boot_params`) for this kernel.
///
/// # Panics
/// If the memory map has more entries than fit, which would be a defect of the layout.
pub(super) fn zero_page(kernel: &BzImage, placed: &Placed<'_>) -> Vec<u8> {
    assert!(placed.map.len() <= E820_MAX, "memory map fits");
    let mut page = vec![0; ZERO_PAGE_BYTES];
    // The header ends at 0x202 plus the byte at 0x201; the kernel may have a longer one than we know.
    let header_end = (0x202 + usize::from(kernel.setup[0x201])).min(SETUP_BYTES);
    page[HEADER_START..header_end].copy_from_slice(&kernel.setup[HEADER_START..header_end]);
    let mut put = |offset: usize, bytes: &[u8]| {
        page[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0x210, &[LOADER_UNDEFINED]);
    put(0x228, &placed.cmdline.to_le_bytes());
    if let Some((start, bytes)) = placed.initramfs {
        put(0x218, &start.to_le_bytes());
        put(0x21c, &bytes.to_le_bytes());
    }
    put(0x1e8, &[placed.map.len() as u8]);
    for (index, (range, kind)) in placed.map.iter().enumerate() {
        let at = 0x2d0 + index * E820_ENTRY_BYTES;
        put(at, &range.start.to_le_bytes());
        put(at + 8, &(range.end - range.start).to_le_bytes());
        put(at + 16, &(*kind as u32).to_le_bytes());
    }
    page
}

#[cfg(test)]
mod tests {
    use super::super::testing::bzimage as example;
    use super::*;
    use proptest::prelude::*;

    const ROOM: Range<u64> = 0x10_0000..0x400_0000;

    fn refused(change: impl FnOnce(&mut Vec<u8>)) -> String {
        let mut file = example();
        change(&mut file);
        let error = parse(&file.as_slice(), &ROOM).expect_err("must be refused");
        error.to_string()
    }

    #[test]
    fn the_example_is_loaded_where_it_prefers() {
        let kernel = parse(&example().as_slice(), &ROOM).unwrap();
        assert!(is_bzimage(&example()));
        assert_eq!((kernel.file_offset, kernel.file_bytes), (0x400, 0x100));
        assert_eq!(kernel.guest, 0x100_0000..0x180_0000);
        assert_eq!(kernel.cmdline_max_bytes, 2047);
        assert_eq!(kernel.initramfs_end_max, 0x8000_0000);
    }

    #[test]
    fn no_setup_sectors_means_four() {
        let mut file = example();
        file[0x1f1] = 0;
        file.resize(5 * 512 + 0x100, 0);
        let kernel = parse(&file.as_slice(), &ROOM).unwrap();
        assert_eq!(kernel.file_offset, 5 * 512);
    }

    #[test]
    fn an_old_protocol_a_32_bit_kernel_and_a_zimage_are_told_apart() {
        assert!(refused(|file| file[0x206] = 0x0b).contains("2.11"));
        assert!(refused(|file| file[0x236] = 0).contains("32-bit"));
        assert!(refused(|file| file[0x211] = 0).contains("loadflags"));
    }

    #[test]
    fn a_file_cut_short_is_refused_with_both_lengths() {
        let error = refused(|file| file.truncate(0x450));
        assert!(
            error.contains("byte 1280") && error.contains("byte 1104"),
            "{error}"
        );
        assert!(refused(|file| file[0x1f1] = 255).contains("cut short"));
        assert!(refused(|file| file.truncate(0x220)).contains("setup header"));
    }

    #[test]
    fn a_kernel_that_unpacks_beyond_memory_is_refused_in_mib() {
        let error = refused(|file| file[0x263] = 0x10);
        assert!(
            error.contains("280 MiB") && error.contains("64 MiB"),
            "{error}"
        );
        assert!(refused(|file| file[0x25f] = 0xff).contains("unpack"));
        assert!(refused(|file| file[0x258..0x260].fill(0xff)).contains("pref_address"));
        assert!(refused(|file| file[0x258..0x260].fill(0)).contains("below 1 MiB"));
    }

    #[test]
    fn the_zero_page_tells_the_kernel_what_is_where() {
        let kernel = parse(&example().as_slice(), &ROOM).unwrap();
        let map = [
            (0..0x9_fc00, MapKind::Ram),
            (0x9_fc00..0xa_0000, MapKind::Reserved),
        ];
        let page = zero_page(
            &kernel,
            &Placed {
                cmdline: 0x2_0000,
                initramfs: Some((0x300_0000, 77)),
                map: &map,
            },
        );
        assert_eq!(page.len(), 4096);
        assert_eq!(&page[0x202..0x206], b"HdrS");
        assert_eq!(page[0x210], 0xff);
        assert_eq!(u32::from_le_bytes(field(&page, 0x228)), 0x2_0000);
        assert_eq!(u32::from_le_bytes(field(&page, 0x218)), 0x300_0000);
        assert_eq!(u32::from_le_bytes(field(&page, 0x21c)), 77);
        assert_eq!(page[0x1e8], 2);
        assert_eq!(u64::from_le_bytes(field(&page, 0x2d0 + 20)), 0x9_fc00);
        assert_eq!(u64::from_le_bytes(field(&page, 0x2d0 + 28)), 0x400);
        assert_eq!(u32::from_le_bytes(field(&page, 0x2d0 + 36)), 2);
    }

    proptest! {
        #[test]
        fn any_header_is_refused_or_loads_inside_its_room(
            changes in proptest::collection::vec((0usize..0x500, any::<u8>()), 0..40)
        ) {
            let mut file = example();
            for (at, byte) in changes {
                file[at] = byte;
            }
            if let Ok(kernel) = parse(&file.as_slice(), &ROOM) {
                prop_assert!(kernel.guest.start >= ROOM.start && kernel.guest.end <= ROOM.end);
                prop_assert!(kernel.file_bytes <= kernel.guest.end - kernel.guest.start);
                prop_assert!(kernel.file_offset + kernel.file_bytes <= file.len() as u64);
                let map = [(0..1, MapKind::Ram)];
                zero_page(&kernel, &Placed { cmdline: 0, initramfs: None, map: &map });
            }
        }
    }
}
