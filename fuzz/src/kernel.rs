//! The kernel loader: any file is refused, or lies in the guest's memory where a kernel may.

use crate::allocations::Bounds;
use arbitrary::Unstructured;
use capsid_devices::memory::slice_of;
use capsid_devices::testing::memory;
use capsid_protocol::machine::MemoryMib;
use capsid_vmm::boot::{Guest, Line, load};
use capsid_vmm::layout;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use std::fs::File;
use std::io::Write;

const MEMORY_MIB: u64 = 64;
/// Most zeroes behind the bytes of an input: what large segments are read from.
const ZEROES_MAX: u64 = 80 << 20;

pub(crate) const BOUNDS: Bounds = Bounds {
    growth: 8 << 20,
    largest: 2 << 20,
};

pub(crate) fn run(input: &[u8]) {
    let mut input = Unstructured::new(input);
    let Ok((zeroes, initramfs, serial)) = input.arbitrary::<(u32, u8, bool)>() else {
        return;
    };
    let kernel = file(input.take_rest(), u64::from(zeroes) % ZEROES_MAX);
    // One in four has none; the others have up to the whole of the guest's memory.
    let initramfs = (initramfs % 4 != 0).then(|| file(b"cpio", u64::from(initramfs) << 18));
    let size = MemoryMib::try_from(MEMORY_MIB).expect("a size");
    let memory = memory(&[(0, (MEMORY_MIB << 20) as usize)]);
    let guest = Guest {
        kernel: &kernel,
        initramfs: initramfs.as_ref(),
        line: Line {
            serial,
            extra: "quiet",
            ..Line::default()
        },
    };
    if let Ok(entry) = load(&memory, size, &guest) {
        let room = layout::KERNEL_MIN..layout::low_memory_end(size.bytes());
        assert!(room.contains(&entry.rip), "entered at {:#x}", entry.rip);
    }
    // Below the kernel is nothing but what it is told.
    let mut low = vec![0u8; layout::KERNEL_MIN as usize];
    let below = slice_of(&memory, 0, low.len()).expect("memory");
    below.copy_to(&mut low);
    let told = [
        (layout::START_INFO, layout::START_INFO_BYTES),
        (layout::BOOT_PARAMS, layout::BOOT_PARAMS_BYTES),
        (layout::CMDLINE, layout::CMDLINE_BYTES),
    ];
    for (start, bytes) in told {
        let place = low.get_mut(start as usize..(start + bytes) as usize);
        place.expect("below the kernel").fill(0);
    }
    assert!(low.iter().all(|byte| *byte == 0), "written below a kernel");
}

/// A file in memory.
fn file(bytes: &[u8], zeroes: u64) -> File {
    let mut file = File::from(memfd_create(c"fuzzed", MemfdFlags::CLOEXEC).expect("a file"));
    file.write_all(bytes).expect("room");
    ftruncate(&file, bytes.len() as u64 + zeroes).expect("room");
    file
}
