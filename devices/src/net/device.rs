//! The network card (virtio 1.2 section 5.1).

use super::features::{feature, offered, takes_large, tap_offload};
use super::link::{Link, Live};
use super::receive::PACKET_MAX_BYTES;
use super::server::{NetCounters, Parts, Server};
use super::tap::{HEADER_BYTES, Tap, TapError};
use crate::counters::Counters;
use crate::event::EventLoop;
use crate::state::Foreign;
use crate::virtio::device::{
    Activation, Busy, DeviceData, DeviceError, RestoreError, VirtioDevice,
};
use crate::virtio::queue::Positions;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, PoisonError};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::eventfd::EventFd;

/// Device type 1: network card.
const DEVICE_TYPE: u16 = 1;
/// Most pairs of queues.
pub const PAIRS_MAX: usize = 16;
/// The largest size of a receive or transmit queue, and of the control queue.
const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 16;
/// Least MTU of a card (section 5.1.4.1).
pub const MTU_MIN: u16 = 68;
/// Bytes of an Ethernet header with a VLAN tag.
const ETHERNET_BYTES: usize = 18;

/// Everything that a card is made of.
#[derive(Debug)]
pub struct NetSetup {
    /// The queues of a tap device made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, 1 to [`PAIRS_MAX`]; more than one with
    /// IFF_MULTI_QUEUE. The card has as many pairs of queues.
    pub taps: Vec<OwnedFd>,
    /// Hardware address, that of one station.
    pub mac: [u8; 6],
    /// Largest packet of the link without its Ethernet header, bytes.
    pub mtu: u16,
}

/// What a card knows: plain data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    /// Pairs of queues that the driver uses.
    pairs: u16,
    /// The cable is plugged.
    up: bool,
}

/// Why a card cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Not a number of queues.
    #[error("a card has 1 to {PAIRS_MAX} queues of a tap device, not {0}")]
    Pairs(usize),
    /// Not an address of one station.
    #[error("hardware address {0:02x?} is that of a group or of nobody")]
    Mac([u8; 6]),
    /// Not an MTU.
    #[error("an MTU of {0} is less than {MTU_MIN}")]
    Mtu(u16),
    /// A tap.
    #[error("fd {fd} cannot be a card's tap device")]
    Tap {
        /// Which.
        fd: RawFd,
        /// Why.
        #[source]
        cause: TapError,
    },
}

/// A network card.
pub struct Net {
    taps: Vec<Arc<Tap>>,
    /// The taps can cut UDP packets.
    uso: bool,
    /// What the tap device was told last.
    offload: u32,
    mac: [u8; 6],
    mtu: u16,
    queue_sizes: Vec<u16>,
    event_loop: Arc<dyn EventLoop>,
    link: Link,
    counters: Arc<NetCounters>,
    /// Pairs that the driver used when the card was suspended; 1 after a reset.
    used: u16,
    active: Option<Active>,
}

/// A card between activation and reset.
struct Active {
    server: Arc<Mutex<Server>>,
    watched: Vec<RawFd>,
    event_loop: Arc<dyn EventLoop>,
    link: Link,
}

impl Net {
    /// A card that works on `event_loop`.
    ///
    /// # Errors
    /// See [`NetError`].
    pub fn new(setup: NetSetup, event_loop: Arc<dyn EventLoop>) -> Result<Net, NetError> {
        Net::on(setup, event_loop, Tap::new)
    }

    /// A card on sockets in place of taps, each one end of a pair of SOCK_DGRAM that does not block: for tests that make no
    /// network device.
    ///
    /// # Errors
    /// See [`NetError`].
    #[cfg(any(test, feature = "testing"))]
    pub fn on_sockets(setup: NetSetup, event_loop: Arc<dyn EventLoop>) -> Result<Net, NetError> {
        Net::on(setup, event_loop, |socket| Ok(Tap::in_place_of_one(socket)))
    }

    fn on(
        setup: NetSetup,
        event_loop: Arc<dyn EventLoop>,
        open: impl Fn(OwnedFd) -> Result<Tap, TapError>,
    ) -> Result<Net, NetError> {
        let pairs = setup.taps.len();
        if !(1..=PAIRS_MAX).contains(&pairs) {
            return Err(NetError::Pairs(pairs));
        }
        let [first, ..] = setup.mac;
        if first & 1 != 0 || setup.mac == [0; 6] {
            return Err(NetError::Mac(setup.mac));
        }
        if setup.mtu < MTU_MIN {
            return Err(NetError::Mtu(setup.mtu));
        }
        let mut taps = Vec::with_capacity(pairs);
        let mut uso = false;
        for tap in setup.taps {
            let fd = tap.as_raw_fd();
            let refused = |cause| NetError::Tap { fd, cause };
            let tap = open(tap).map_err(refused)?;
            if taps.is_empty() {
                uso = tap.leave_nothing().map_err(refused)?;
            }
            taps.push(Arc::new(tap));
        }
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * pairs];
        if pairs > 1 {
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        Ok(Net {
            taps,
            uso,
            offload: 0,
            mac: setup.mac,
            mtu: setup.mtu,
            queue_sizes,
            event_loop,
            link: Link::new(),
            counters: Arc::default(),
            used: 1,
            active: None,
        })
    }

    /// Its cable.
    pub fn link(&self) -> Link {
        self.link.clone()
    }

    /// Tells the tap device, which is one for all its queues, what it may leave to the guest. Only if that changes: it takes a lock
    /// that the whole host has but once.
    fn offload(&mut self, flags: u32) -> Result<(), DeviceError> {
        let Some(tap) = self.taps.first().filter(|_| flags != self.offload) else {
            return Ok(());
        };
        match tap.set_offload(flags) {
            // A device that is gone takes no packets, and that is all.
            Ok(()) | Err(Errno::BADFD) => {
                self.offload = flags;
                Ok(())
            }
            Err(errno) => Err(DeviceError::Io {
                what: "set the offloads of a tap device",
                cause: errno.into(),
            }),
        }
    }

    fn pairs(&self) -> u16 {
        // At most PAIRS_MAX.
        self.taps.len() as u16
    }

    /// Throws away what the taps have for the guest.
    fn discard(&self) {
        for tap in &self.taps {
            self.counters.rx_dropped.add(tap.discard());
        }
    }

    /// Works from now on.
    fn begin(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let features = activation.features;
        let has = |bit| features & feature(bit) != 0;
        // Section 5.1.2: without MQ there is one pair, and the control queue comes behind it.
        let pairs = if has(VIRTIO_NET_F_MQ) {
            self.pairs()
        } else {
            1
        };
        let mut queues = activation.queues;
        let control = 2 * usize::from(pairs);
        queues.truncate(control + usize::from(has(VIRTIO_NET_F_CTRL_VQ)));
        for index in [0, 1] {
            if queues.get(index).is_none_or(Option::is_none) {
                return Err(DeviceError::QueueMissing(index as u16));
            }
        }
        self.offload(tap_offload(features))?;
        let largest = match takes_large(features) {
            true => PACKET_MAX_BYTES,
            false => usize::from(self.mtu) + ETHERNET_BYTES + HEADER_BYTES,
        };
        let mut server = Server::new(Parts {
            memory: activation.memory,
            interrupt: activation.interrupt.clone(),
            event_loop: self.event_loop.clone(),
            taps: self.taps.clone(),
            queues,
            agreed: pairs,
            used: self.used,
            mergeable: has(VIRTIO_NET_F_MRG_RXBUF),
            largest,
            counters: self.counters.clone(),
        });
        let watched = server.watched();
        // From here on a reset has something to undo, also if this fails half-way.
        let active = self.active.insert(Active {
            server: Arc::new(Mutex::new(server)),
            watched: Vec::with_capacity(watched.len()),
            event_loop: self.event_loop.clone(),
            link: self.link.clone(),
        });
        self.link.attach(Live {
            server: active.server.clone(),
            interrupt: activation.interrupt,
            told: has(VIRTIO_NET_F_STATUS),
        });
        for (fd, interest, token) in watched {
            self.event_loop
                .watch(fd, interest, token, active.server.clone())
                .map_err(|cause| DeviceError::Io {
                    what: "watch the queues of a card",
                    cause,
                })?;
            active.watched.push(fd);
        }
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u16 {
        DEVICE_TYPE
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        let many = match self.pairs() {
            1 => 0,
            _ => feature(VIRTIO_NET_F_MQ) | feature(VIRTIO_NET_F_CTRL_VQ),
        };
        offered(self.uso)
            | many
            | feature(VIRTIO_NET_F_MAC)
            | feature(VIRTIO_NET_F_MTU)
            | feature(VIRTIO_NET_F_STATUS)
            | feature(VIRTIO_NET_F_MRG_RXBUF)
    }

    /// `struct virtio_net_config` (section 5.1.4) up to the MTU.
    fn config(&self) -> Vec<u8> {
        let mut config = self.mac.to_vec();
        let status = u16::from(self.link.is_up()) * VIRTIO_NET_S_LINK_UP as u16;
        config.extend_from_slice(&status.to_le_bytes());
        config.extend_from_slice(&self.pairs().to_le_bytes());
        config.extend_from_slice(&self.mtu.to_le_bytes());
        config
    }

    fn counters(&self) -> Arc<dyn Counters> {
        self.counters.clone()
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.discard();
        self.begin(activation)
    }

    fn suspend(&mut self, _: &Arc<EventFd>) -> Result<Positions, Busy> {
        let Some(active) = self.active.take() else {
            return Ok(Positions::new());
        };
        let server = active.server.lock().unwrap_or_else(PoisonError::into_inner);
        self.used = server.used();
        Ok(server.positions())
    }

    /// What came meanwhile is for this driver, unless the cable was pulled.
    fn resume(&mut self, activation: Activation) -> Result<(), DeviceError> {
        if self.link.was_pulled() {
            self.discard();
        }
        self.begin(activation)
    }

    fn data(&self) -> DeviceData {
        DeviceData::Net(NetState {
            pairs: self.used,
            up: self.link.is_up(),
        })
    }

    fn restore(&mut self, data: &DeviceData) -> Result<(), RestoreError> {
        match data {
            DeviceData::Net(state) if (1..=self.pairs()).contains(&state.pairs) => {
                self.used = state.pairs;
                self.link.set(state.up);
                Ok(())
            }
            _ => Err(Foreign("network card").into()),
        }
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.active = None;
        self.used = 1;
        Ok(())
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        self.link.detach();
        for fd in &self.watched {
            self.event_loop.forget(*fd);
        }
        // Waits for what is being served; after it nothing touches guest memory.
        let mut server = self.server.lock().unwrap_or_else(PoisonError::into_inner);
        server.stop();
    }
}
