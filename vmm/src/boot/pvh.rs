//! The start info of the PVH boot protocol (`include/xen/interface/hvm/start_info.h`, version 1).

use crate::layout::{self, MapKind};
use std::ops::Range;

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
/// Size of `struct hvm_start_info`, in bytes.
const START_INFO_BYTES: usize = 56;
/// Size of `struct hvm_modlist_entry`, in bytes.
const MODULE_BYTES: usize = 32;
/// Size of `struct hvm_memmap_table_entry`, in bytes.
const MAP_ENTRY_BYTES: usize = 24;

const _: () = assert!(START_INFO_BYTES + MODULE_BYTES <= layout::START_INFO_BYTES as usize);

/// The bytes at [`layout::START_INFO`]: the start info and behind it the module, if there is one.
pub(super) fn start_info(
    cmdline: u64,
    initramfs: Option<&Range<u64>>,
    map: &[(Range<u64>, MapKind)],
) -> Vec<u8> {
    let module = layout::START_INFO + START_INFO_BYTES as u64;
    let mut bytes = Vec::with_capacity(START_INFO_BYTES + MODULE_BYTES);
    let word = |bytes: &mut Vec<u8>, value: u32| bytes.extend(value.to_le_bytes());
    word(&mut bytes, MAGIC);
    word(&mut bytes, VERSION);
    word(&mut bytes, 0); // flags
    word(&mut bytes, u32::from(initramfs.is_some())); // nr_modules
    bytes.extend(initramfs.map_or(0, |_| module).to_le_bytes()); // modlist_paddr
    bytes.extend(cmdline.to_le_bytes()); // cmdline_paddr
    bytes.extend(0u64.to_le_bytes()); // rsdp_paddr: no ACPI
    bytes.extend(layout::BOOT_PARAMS.to_le_bytes()); // memmap_paddr
    word(&mut bytes, map.len() as u32); // memmap_entries
    word(&mut bytes, 0); // reserved
    if let Some(range) = initramfs {
        bytes.extend(range.start.to_le_bytes());
        bytes.extend((range.end - range.start).to_le_bytes());
        bytes.extend([0; 16]); // no command line of its own, reserved
    }
    bytes
}

/// The bytes at [`layout::BOOT_PARAMS`]: the memory map.
///
/// # Panics
/// If the map does not fit there, which would be a defect of the layout.
pub(super) fn memory_map(map: &[(Range<u64>, MapKind)]) -> Vec<u8> {
    assert!(map.len() * MAP_ENTRY_BYTES <= layout::BOOT_PARAMS_BYTES as usize);
    let mut bytes = Vec::with_capacity(map.len() * MAP_ENTRY_BYTES);
    for (range, kind) in map {
        bytes.extend(range.start.to_le_bytes());
        bytes.extend((range.end - range.start).to_le_bytes());
        bytes.extend((*kind as u32).to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::image::field;

    #[test]
    fn the_start_info_has_every_field_where_the_header_says() {
        let map = layout::memory_map(128 << 20);
        let info = start_info(0x2_0000, Some(&(0x700_0000..0x700_1234)), &map);
        assert_eq!(u32::from_le_bytes(field(&info, 0)), 0x336e_c578);
        assert_eq!(u32::from_le_bytes(field(&info, 4)), 1);
        assert_eq!(u32::from_le_bytes(field(&info, 12)), 1);
        assert_eq!(
            u64::from_le_bytes(field(&info, 16)),
            layout::START_INFO + 56
        );
        assert_eq!(u64::from_le_bytes(field(&info, 24)), 0x2_0000);
        assert_eq!(u64::from_le_bytes(field(&info, 40)), layout::BOOT_PARAMS);
        assert_eq!(u32::from_le_bytes(field(&info, 48)), 3);
        assert_eq!(u64::from_le_bytes(field(&info, 56)), 0x700_0000);
        assert_eq!(u64::from_le_bytes(field(&info, 64)), 0x1234);
        assert_eq!(info.len(), 56 + 32);
    }

    #[test]
    fn without_an_initramfs_there_is_no_module() {
        let info = start_info(0, None, &[]);
        assert_eq!(u32::from_le_bytes(field(&info, 12)), 0);
        assert_eq!(u64::from_le_bytes(field(&info, 16)), 0);
        assert_eq!(info.len(), 56);
    }

    #[test]
    fn the_memory_map_has_24_bytes_for_each_range() {
        let bytes = memory_map(&[(0x10_0000..0x800_0000, MapKind::Ram)]);
        assert_eq!(bytes.len(), 24);
        assert_eq!(u64::from_le_bytes(field(&bytes, 0)), 0x10_0000);
        assert_eq!(u64::from_le_bytes(field(&bytes, 8)), 0x7f0_0000);
        assert_eq!(u32::from_le_bytes(field(&bytes, 16)), 1);
    }
}
