//! The ways to guest memory that `clippy.toml` forbids, each of them gone: they work, so only the lint keeps them out.
//!
//! An expectation that clippy finds unfulfilled is an error in the lint suite. So no line falls out of `clippy.toml` unseen, and none
//! stays there that names nothing.

use super::*;
use crate::testing::memory;
use std::fs::File;
use vm_memory::{GuestMemory as AnyMemory, VolatileMemory};

/// Each expression, with the lint that has to find it.
macro_rules! breaches {
    ($lint:path: $($breach:expr;)*) => {
        $({
            #[expect($lint)]
            let done = $breach;
            let _ = done;
        })*
    };
}

#[test]
fn every_other_way_to_guest_memory_is_forbidden() -> Result<(), GuestMemoryError> {
    let memory = memory(&[(0, 4096)]);
    let Some(region) = memory.iter().next() else {
        return Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(0)));
    };
    let slice = slice_of(&memory, 0, 8).unwrap();
    let mut file = File::open("/dev/zero").unwrap();
    let (mut bytes, mut sink) = ([0; 8], Vec::new());
    let (at, offset) = (GuestAddress(0), MemoryRegionAddress(0));
    breaches! { clippy::disallowed_types:
        size_of::<vm_memory::GuestAddress>();
        size_of::<vm_memory::MemoryRegionAddress>();
        size_of::<virtio_queue::DescriptorChain<GuestMemory>>();
        size_of::<virtio_queue::Queue>();
        size_of::<virtio_queue::QueueSync>();
        size_of::<virtio_queue::Reader<'_>>();
        size_of::<virtio_queue::Writer<'_>>();
    }
    breaches! { clippy::disallowed_methods:
        vm_memory::GuestAddress(0);
        vm_memory::MemoryRegionAddress(0);
        memory.get_host_address(at).is_err(); // not of our regions, but of what is in them
        AnyMemory::get_slice(&*memory, at, 8)?;
        memory.get_slices(at, 8).count();
        region.as_volatile_slice()?;
        region.mapping.get_host_address(offset)?;
        region.get_slice(offset, 8)?;
        region.mapping.as_ptr();
        VolatileMemory::as_volatile_slice(&slice);
        slice.get_array_ref::<u8>(0, 8)?;
        slice.get_atomic_ref::<AtomicU64>(0)?;
        slice.get_ref::<u64>(0)?;
        VolatileMemory::get_slice(&slice, 0, 8)?;
        memory.load::<u16>(at, Ordering::Relaxed)?;
        memory.read(&mut bytes, at)?;
        memory.read_exact_volatile_from(at, &mut file, 8)?;
        memory.read_obj::<u16>(at)?;
        memory.read_slice(&mut bytes, at)?;
        memory.read_volatile_from(at, &mut file, 8)?;
        memory.store(1u16, at, Ordering::Relaxed)?;
        memory.write(&bytes, at)?;
        memory.write_all_volatile_to(at, &mut sink, 8)?;
        memory.write_obj(1u16, at)?;
        memory.write_slice(&bytes, at)?;
        memory.write_volatile_to(at, &mut sink, 8)?;
    }
    Ok(())
}
