//! What a driver and a tap device may leave to each other: checksums, and the cutting of large packets.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
};

/// What a tap device may send (include/uapi/linux/if_tun.h, TUN_F_…).
mod tun {
    pub(super) const CSUM: u32 = 1;
    pub(super) const TSO4: u32 = 1 << 1;
    pub(super) const TSO6: u32 = 1 << 2;
    pub(super) const TSO_ECN: u32 = 1 << 3;
    pub(super) const USO4: u32 = 1 << 5;
    pub(super) const USO6: u32 = 1 << 6;
}

/// Everything that every tap device can do.
pub(super) const TUN_ALWAYS: u32 = tun::CSUM | tun::TSO4 | tun::TSO6 | tun::TSO_ECN;
/// What came with Linux 6.2; both or neither.
pub(super) const TUN_USO: u32 = tun::USO4 | tun::USO6;

pub(super) const fn feature(bit: u32) -> u64 {
    1 << bit
}

/// What the guest takes, and what the tap has to be told for it.
const TAKES: [(u32, u32); 6] = [
    (VIRTIO_NET_F_GUEST_CSUM, tun::CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, tun::TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, tun::TSO6),
    (VIRTIO_NET_F_GUEST_ECN, tun::TSO_ECN),
    (VIRTIO_NET_F_GUEST_USO4, tun::USO4),
    (VIRTIO_NET_F_GUEST_USO6, tun::USO6),
];

/// What the guest may send.
const SENDS: u64 = feature(VIRTIO_NET_F_CSUM)
    | feature(VIRTIO_NET_F_HOST_TSO4)
    | feature(VIRTIO_NET_F_HOST_TSO6)
    | feature(VIRTIO_NET_F_HOST_ECN);

/// The features to offer, given whether the tap can cut UDP packets.
pub(super) fn offered(uso: bool) -> u64 {
    let can = if uso {
        TUN_ALWAYS | TUN_USO
    } else {
        TUN_ALWAYS
    };
    let takes = TAKES.iter().filter(|(_, flag)| can & flag != 0);
    let takes = takes.fold(0, |features, (bit, _)| features | feature(*bit));
    let uso = if uso {
        feature(VIRTIO_NET_F_HOST_USO)
    } else {
        0
    };
    takes | SENDS | uso
}

/// What to tell the tap for these features of the guest. Without checksums the rest means nothing, and the tap refuses it.
pub(super) fn tap_offload(features: u64) -> u32 {
    let agreed = TAKES
        .iter()
        .filter(|(bit, _)| features & feature(*bit) != 0);
    let flags = agreed.fold(0, |flags, (_, flag)| flags | flag);
    // ECN goes with a TSO, and USO is one thing to the tap (tun.c, set_offload).
    let flags = match flags & (tun::TSO4 | tun::TSO6) {
        0 => flags & !tun::TSO_ECN,
        _ => flags,
    };
    let flags = match flags & TUN_USO {
        TUN_USO => flags,
        _ => flags & !TUN_USO,
    };
    if flags & tun::CSUM == 0 { 0 } else { flags }
}

/// Whether packets may come that are larger than the link's.
pub(super) fn takes_large(features: u64) -> bool {
    tap_offload(features) & !(tun::CSUM | tun::TSO_ECN) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tap_is_told_what_the_guest_takes() {
        assert_eq!(tap_offload(offered(false)), TUN_ALWAYS);
        assert_eq!(tap_offload(offered(true)), TUN_ALWAYS | TUN_USO);
        assert_eq!(tap_offload(0), 0);
        assert_eq!(tap_offload(feature(VIRTIO_NET_F_GUEST_CSUM)), tun::CSUM);
    }

    #[test]
    fn what_makes_no_sense_to_a_tap_is_left_out() {
        // Without checksums; ECN alone; half of USO.
        let tso = feature(VIRTIO_NET_F_GUEST_TSO4);
        assert_eq!(tap_offload(tso), 0);
        let checksum = feature(VIRTIO_NET_F_GUEST_CSUM);
        assert_eq!(
            tap_offload(checksum | feature(VIRTIO_NET_F_GUEST_ECN)),
            tun::CSUM
        );
        assert_eq!(
            tap_offload(checksum | feature(VIRTIO_NET_F_GUEST_USO4)),
            tun::CSUM
        );
        assert_eq!(tap_offload(checksum | tso), tun::CSUM | tun::TSO4);
    }

    #[test]
    fn large_packets_come_only_to_who_takes_them() {
        let checksum = feature(VIRTIO_NET_F_GUEST_CSUM);
        assert!(!takes_large(checksum | feature(VIRTIO_NET_F_GUEST_ECN)));
        assert!(takes_large(checksum | feature(VIRTIO_NET_F_GUEST_TSO6)));
        assert!(!takes_large(SENDS));
    }
}
