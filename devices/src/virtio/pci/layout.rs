//! What is where in a function's configuration space: its identity, its BAR and the capabilities that say where the structures of section
//! 4.1.4 are.

use super::{
    BAR, BAR_BYTES, BarAddress, COMMON_PAGE, CONFIG_PAGE, ISR_PAGE, NOTIFY_OFF_MULTIPLIER,
    NOTIFY_PAGE, PAGE, PENDING_PAGE, TABLE_PAGE,
};
use crate::pci::msix::{self, Msix};
use crate::pci::{ConfigSpace, Identity, LayoutError};
use crate::virtio::device::VirtioDevice;
use crate::virtio::state::COMMON_BYTES;

const VENDOR_VIRTIO: u16 = 0x1af4;
const DEVICE_MODERN: u16 = 0x1040;
/// A device that is of no other class.
const CLASS_OTHER: u32 = 0xff_00_00;
/// Section 4.1.2.1: at least 1; the subsystem id at least 0x40, so that no legacy driver binds.
const REVISION_MODERN: u8 = 1;

const CAPABILITY_VENDOR: u8 = 0x09;
// Types of section 4.1.4.
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

pub(super) struct Layout {
    pub(super) config: ConfigSpace,
    /// Offset of message control's high byte.
    pub(super) msix_control: u8,
    /// Offset of the PCI configuration access capability.
    pub(super) window: u8,
}

pub(super) fn lay_out(
    device: &dyn VirtioDevice,
    msix: &Msix,
    bar: BarAddress,
) -> Result<Layout, LayoutError> {
    let kind = device.device_type();
    let mut config = ConfigSpace::new(Identity {
        vendor: VENDOR_VIRTIO,
        device: DEVICE_MODERN + kind,
        revision: REVISION_MODERN,
        class: CLASS_OTHER,
        subsystem_vendor: VENDOR_VIRTIO,
        subsystem: DEVICE_MODERN + kind,
    });
    match bar {
        BarAddress::InRegister(address) => config.add_bar(usize::from(BAR), address, BAR_BYTES)?,
        BarAddress::Fixed(address) => config.add_fixed(usize::from(BAR), address, BAR_BYTES)?,
    }
    let capability = msix.capability(
        BAR,
        (TABLE_PAGE * PAGE) as u32,
        (PENDING_PAGE * PAGE) as u32,
    );
    let at = config.add_capability(
        msix::CAPABILITY_ID,
        &capability,
        &[0, msix::CONTROL_HIGH_WRITABLE],
    )?;
    let notify = NOTIFY_OFF_MULTIPLIER.to_le_bytes();
    let queues = device.queue_sizes().len() as u32;
    let device_bytes = (device.config().len() as u32).next_multiple_of(4);
    let mut add = |kind: u8, page: u64, length: u32, more: &[u8], writable: &[u8]| {
        let body = body(kind, (page * PAGE) as u32, length, more);
        config.add_capability(CAPABILITY_VENDOR, &body, writable)
    };
    add(CFG_COMMON, COMMON_PAGE, COMMON_BYTES as u32, &[], &[])?;
    let notify_bytes = (queues * NOTIFY_OFF_MULTIPLIER).max(NOTIFY_OFF_MULTIPLIER);
    add(CFG_NOTIFY, NOTIFY_PAGE, notify_bytes, &notify, &[])?;
    add(CFG_ISR, ISR_PAGE, 4, &[], &[])?;
    if device_bytes > 0 {
        add(CFG_DEVICE, CONFIG_PAGE, device_bytes, &[], &[])?;
    }
    // BAR, offset, length and data are the driver's to write (section 4.1.4.9).
    let writable = [
        0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
    ];
    let window = add(CFG_PCI, COMMON_PAGE, 0, &[0; 4], &writable)?;
    Ok(Layout {
        config,
        msix_control: at + 3,
        window,
    })
}

/// struct virtio_pci_cap behind its id and next pointer, and what follows it.
fn body(kind: u8, offset: u32, length: u32, more: &[u8]) -> Vec<u8> {
    let bytes = (16 + more.len()) as u8;
    let mut body = vec![bytes, kind, BAR, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(length.to_le_bytes());
    body.extend(more);
    body
}
