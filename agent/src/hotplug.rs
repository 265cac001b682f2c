//! Devices that come and go while the guest runs. The host puts a function on the PCI bus, the agent looks for it and answers
//! when the guest can use the device; and the agent lets go of a device before the host takes it away.
//!
//! Writing `rescan` returns when the kernel has read the bus and probed the drivers of what it found; what a driver does later
//! is told by a uevent (Documentation/ABI/testing/sysfs-bus-pci, lib/kobject_uevent.c). Nothing here polls. The host is trusted,
//! but its words are parsed once all the same; a container can make uevents, which costs one more look each.

use crate::error::Result;
use crate::sandbox::blocking;
use crate::stream::polled;
use capsid_protocol::control::PciAddress;
use capsid_protocol::machine::Mac;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Mutex;

/// How long a device may take from the look at the bus until it can be used, in ms.
const ATTACH_TIMEOUT_MS: u64 = 10_000;
/// How long it may take to write a disk's cache out and to let go of the device, in ms.
const DETACH_TIMEOUT_MS: u64 = 30_000;
/// The multicast group of the kernel's own uevents.
const KERNEL_EVENTS: u32 = 1;
/// Uevents that are taken for one look at most.
const EVENTS_PER_LOOK: usize = 256;

/// Why a device did not come or go.
#[derive(Debug, thiserror::Error)]
pub enum HotplugError {
    /// Nothing answers there.
    #[error("there is no device at {0}")]
    NotOnBus(PciAddress),
    /// It is there, and no driver made what was waited for.
    #[error("the device at {at} did not become {what} within {limit_ms} ms")]
    NotUsable {
        /// Where.
        at: PciAddress,
        /// "a disk", "a network card".
        what: &'static str,
        /// For how long was waited, in ms.
        limit_ms: u64,
    },
    /// Another device than the host means.
    #[error("the device at {at} is {found:?}, not {wanted:?}")]
    Another {
        /// Where.
        at: PciAddress,
        /// Its serial number or hardware address.
        found: String,
        /// What the host said.
        wanted: String,
    },
    /// Mounted, swapped to, or a part of another device (open(2), O_EXCL of a block device).
    #[error("disk {0} is in use")]
    InUse(String),
    /// It did not go.
    #[error("the device at {at} was not let go of within {limit_ms} ms")]
    NotGone {
        /// Where.
        at: PciAddress,
        /// For how long was waited, in ms.
        limit_ms: u64,
    },
    /// A file of the kernel.
    #[error("{doing} {path}")]
    File {
        /// "reading", "writing", ...
        doing: &'static str,
        /// Which.
        path: PathBuf,
        /// errno.
        #[source]
        cause: io::Error,
    },
    /// The socket that tells of devices.
    #[error("listening for uevents")]
    Events(#[source] io::Error),
}

type Found<T> = std::result::Result<Option<T>, HotplugError>;

/// A disk as the guest has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its name: `/dev/NAME` is its node.
    pub name: String,
    /// Device number.
    pub major: u32,
    /// Device number.
    pub minor: u32,
}

/// The guest's PCI bus.
#[derive(Debug)]
pub struct PciBus {
    /// `/sys/bus/pci`.
    sysfs: PathBuf,
    /// Who comes or goes; one at a time, so that an answer is about one device.
    turn: Arc<Mutex<()>>,
}

impl PciBus {
    /// The bus that the kernel shows at `sysfs`.
    pub fn at(sysfs: &Path) -> PciBus {
        PciBus {
            sysfs: sysfs.into(),
            turn: Arc::default(),
        }
    }

    /// Waits until the disk with this id at this place can be used. One that is there already is answered at once.
    ///
    /// # Errors
    /// Nothing is there, it is another disk, or no disk comes of it.
    pub async fn attach_disk(&self, at: PciAddress, id: &str) -> Result<Disk> {
        let (function, id) = (self.function(at), id.to_owned());
        let look = move || disk(&function, at, &id);
        self.attach(at, "a disk", look).await
    }

    /// Waits until the network card with this hardware address at this place can be used; the name of its interface.
    ///
    /// # Errors
    /// Nothing is there, it is another card, or no interface comes of it.
    pub async fn attach_nic(&self, at: PciAddress, mac: Mac) -> Result<String> {
        let function = self.function(at);
        let look = move || interface(&function, at, mac);
        self.attach(at, "a network card", look).await
    }

    /// Writes out what of a disk is cached and lets go of it; the host may take it away then. Who has it open without a claim
    /// (a container that was given its node) gets errors from now on.
    ///
    /// # Errors
    /// Nothing is there, it is another disk, or it is in use; then nothing has changed.
    pub async fn detach_disk(&self, at: PciAddress, id: &str) -> Result<()> {
        let (function, id) = (self.function(at), id.to_owned());
        self.detach(at, move || {
            let found = disk(&function, at, &id)?;
            let name = found.ok_or(HotplugError::NotOnBus(at))?.name;
            // Held until the disk is gone: nobody mounts it in between.
            let claim = claim(&name)?;
            flush(&claim, &name)?;
            remove(&function)
        })
        .await
    }

    /// Lets go of a network card; the host may take it away then.
    ///
    /// # Errors
    /// Nothing is there, or it is another card.
    pub async fn detach_nic(&self, at: PciAddress, mac: Mac) -> Result<()> {
        let function = self.function(at);
        self.detach(at, move || {
            interface(&function, at, mac)?.ok_or(HotplugError::NotOnBus(at))?;
            remove(&function)
        })
        .await
    }

    fn function(&self, at: PciAddress) -> PathBuf {
        self.sysfs.join("devices").join(at.to_string())
    }

    async fn attach<T: Send + 'static>(
        &self,
        at: PciAddress,
        what: &'static str,
        look: impl Fn() -> Found<T> + Clone + Send + 'static,
    ) -> Result<T> {
        let _turn = self.turn.lock().await;
        // Before the look at the bus, so that nothing is missed.
        let events = Uevents::listen()?;
        let (rescan, function) = (self.sysfs.join("rescan"), self.function(at));
        let found = async {
            blocking(move || {
                write_one(&rescan)?;
                // Functions are found before the write returns, if ever.
                let there = function.try_exists().unwrap_or(false);
                Ok(there.then_some(()).ok_or(HotplugError::NotOnBus(at))?)
            })
            .await?;
            loop {
                let look = look.clone();
                if let Some(found) = blocking(move || Ok(look()?)).await? {
                    return Ok(found);
                }
                events.more().await.map_err(HotplugError::Events)?;
            }
        };
        let limit = Duration::from_millis(ATTACH_TIMEOUT_MS);
        tokio::time::timeout(limit, found)
            .await
            .unwrap_or_else(|_| {
                let limit_ms = ATTACH_TIMEOUT_MS;
                Err(HotplugError::NotUsable { at, what, limit_ms }.into())
            })
    }

    async fn detach(
        &self,
        at: PciAddress,
        work: impl FnOnce() -> std::result::Result<(), HotplugError> + Send + 'static,
    ) -> Result<()> {
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let work = blocking(move || {
            // Its turn lasts as long as the work, even if nobody waits for it any more.
            let _turn = turn;
            Ok(work()?)
        });
        let limit = Duration::from_millis(DETACH_TIMEOUT_MS);
        tokio::time::timeout(limit, work).await.unwrap_or_else(|_| {
            let limit_ms = DETACH_TIMEOUT_MS;
            Err(HotplugError::NotGone { at, limit_ms }.into())
        })
    }
}

/// The disk of a PCI function; `None` if no driver has made one (yet).
fn disk(function: &Path, at: PciAddress, id: &str) -> Found<Disk> {
    let Some((name, path)) = device_of(function, "block")? else {
        return Ok(None);
    };
    is_the_one(at, read(&path.join("serial"))?, id)?;
    let number = read(&path.join("dev"))?;
    let parts = number.split_once(':');
    let parts = parts.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    let (major, minor) = parts.ok_or_else(|| HotplugError::File {
        doing: "reading",
        path: path.join("dev"),
        cause: io::ErrorKind::InvalidData.into(),
    })?;
    Ok(Some(Disk { name, major, minor }))
}

/// The interface of a PCI function; `None` if no driver has made one (yet).
fn interface(function: &Path, at: PciAddress, mac: Mac) -> Found<String> {
    let Some((name, path)) = device_of(function, "net")? else {
        return Ok(None);
    };
    is_the_one(at, read(&path.join("address"))?, &String::from(mac))?;
    Ok(Some(name))
}

fn is_the_one(
    at: PciAddress,
    found: String,
    wanted: &str,
) -> std::result::Result<(), HotplugError> {
    if found == wanted {
        return Ok(());
    }
    let wanted = wanted.to_owned();
    Err(HotplugError::Another { at, found, wanted })
}

/// The one device of `class` that hangs on the virtio device of a function: FUNCTION/virtioN/CLASS/NAME.
fn device_of(function: &Path, class: &str) -> Found<(String, PathBuf)> {
    let Some(virtio) = first_entry(function, |name| name.starts_with("virtio"))? else {
        return Ok(None);
    };
    let of_class = function.join(virtio).join(class);
    let name = first_entry(&of_class, |_| true)?;
    Ok(name.map(|name| (name.clone(), of_class.join(name))))
}

/// A directory that is not there has no entries.
fn first_entry(directory: &Path, fits: impl Fn(&str) -> bool) -> Found<String> {
    let failed = |cause| HotplugError::File {
        doing: "listing",
        path: directory.into(),
        cause,
    };
    let entries = match fs::read_dir(directory) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        result => result.map_err(failed)?,
    };
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        if let Some(name) = name.to_str().filter(|name| fits(name)) {
            return Ok(Some(name.to_owned()));
        }
    }
    Ok(None)
}

/// A claim on a whole disk, which fails while it or one of its partitions has another.
fn claim(name: &str) -> std::result::Result<OwnedFd, HotplugError> {
    let node = Path::new("/dev").join(name);
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NONBLOCK;
    rustix::fs::open(&node, flags, Mode::empty()).map_err(|errno| match errno {
        Errno::BUSY => HotplugError::InUse(name.to_owned()),
        cause => HotplugError::File {
            doing: "claiming",
            path: node,
            cause: cause.into(),
        },
    })
}

fn flush(disk: &OwnedFd, name: &str) -> std::result::Result<(), HotplugError> {
    rustix::fs::fsync(disk).map_err(|cause| HotplugError::File {
        doing: "flushing",
        path: Path::new("/dev").join(name),
        cause: cause.into(),
    })
}

fn remove(function: &Path) -> std::result::Result<(), HotplugError> {
    write_one(&function.join("remove"))
}

fn write_one(file: &Path) -> std::result::Result<(), HotplugError> {
    fs::write(file, "1").map_err(|cause| HotplugError::File {
        doing: "writing",
        path: file.into(),
        cause,
    })
}

/// A file of sysfs, which is a page long at most, without its line's end.
fn read(file: &Path) -> std::result::Result<String, HotplugError> {
    let text = fs::read_to_string(file).map_err(|cause| HotplugError::File {
        doing: "reading",
        path: file.into(),
        cause,
    })?;
    Ok(text.trim_end_matches('\n').to_owned())
}

/// The kernel's news of devices; only that there is some matters, what it is sysfs says.
struct Uevents(AsyncFd<OwnedFd>);

impl Uevents {
    fn listen() -> std::result::Result<Uevents, HotplugError> {
        let open = || -> io::Result<Uevents> {
            let socket = socket(
                AddressFamily::Netlink,
                SockType::Datagram,
                SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
                SockProtocol::NetlinkKObjectUEvent,
            )?;
            bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_EVENTS))?;
            Ok(Uevents(polled(socket, Interest::READABLE)?))
        };
        open().map_err(HotplugError::Events)
    }

    /// Waits for news.
    async fn more(&self) -> io::Result<()> {
        let mut came = false;
        while !came {
            let mut guard = self.0.readable().await?;
            for _ in 0..EVENTS_PER_LOOK {
                let taken = guard.try_io(|socket| {
                    let mut head = [0; 16];
                    match recv(socket.as_raw_fd(), &mut head, MsgFlags::MSG_TRUNC) {
                        // More came than the socket holds: news all the same.
                        Ok(_) | Err(nix::Error::ENOBUFS | nix::Error::EINTR) => Ok(()),
                        Err(errno) => Err(errno.into()),
                    }
                });
                match taken {
                    Ok(taken) => taken?,
                    Err(_would_block) => break,
                }
                came = true;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "hotplug_tests.rs"]
mod tests;
