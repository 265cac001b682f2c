//! A VMM with one device and a guest that loads it.

use super::inside::files::TAG;
use super::inside::link::VSOCK_PORT;
use super::inside::{CMDLINE as LOAD_CMDLINE, LOAD, ROUNDS};
use super::launch::{plain_machine, vsock};
use super::load::{Device, Load, Work};
use super::peer::{Ends, Peer};
use super::systems::{CMDLINE, MEMORY_MIB, QEMU_OPTIONS};
use crate::tap::taps;
use crate::vmm::{command, inherited, spawn};
use capsid_protocol::machine::{DiskConfig, Mac, NicConfig, SerialConfig, ShareConfig};
use capsid_protocol::vsock::GUEST_CID;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use rustix::mount::{OpenTreeFlags, open_tree};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

const MAC: &str = "02:00:00:00:00:2a";
const MTU: u16 = 1500;
/// Where Debian keeps it.
const VIRTIOFSD: &str = "/usr/libexec/virtiofsd";

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vmm {
    /// `capsid-vmm`, jailed as ever.
    Capsid,
    /// QEMU's machine `pc`, because the guest kernel finds virtio by PCI alone, which `microvm` has not without ACPI.
    Qemu,
    /// The same with the device in the host's kernel.
    QemuVhost,
}

impl Vmm {
    /// Its name in the results.
    pub fn name(self) -> &'static str {
        match self {
            Vmm::Capsid => "capsid-vmm",
            Vmm::Qemu => "qemu",
            Vmm::QemuVhost => "qemu-vhost",
        }
    }

    /// The one of this name.
    pub fn named(name: &str) -> Option<Vmm> {
        let all = [Vmm::Capsid, Vmm::Qemu, Vmm::QemuVhost];
        all.into_iter().find(|vmm| vmm.name() == name)
    }

    /// Those that have the device.
    pub fn with(device: Device) -> &'static [Vmm] {
        match device {
            // A daemon of its own serves a share, whatever QEMU calls it.
            Device::Blk | Device::Fs => &[Vmm::Capsid, Vmm::Qemu],
            Device::Net => &[Vmm::Capsid, Vmm::Qemu, Vmm::QemuVhost],
            // QEMU has no other.
            Device::Vsock => &[Vmm::Capsid, Vmm::QemuVhost],
        }
    }
}

/// The files of a run.
#[derive(Clone, Debug)]
pub struct Files {
    /// ELF kernel that every VMM boots.
    pub kernel: PathBuf,
    /// Initramfs whose /init is `load-init`.
    pub initramfs: PathBuf,
    /// What a disk holds.
    pub disk: PathBuf,
    /// What is shared.
    pub share: PathBuf,
}

/// A machine that was started.
pub struct Machine {
    /// The VMM.
    pub vmm: Child,
    /// What it needs besides.
    pub daemon: Option<Child>,
    /// What the guest says on its serial port.
    pub serial: File,
    /// Who answers the guest.
    pub peer: Option<JoinHandle<io::Result<Ends>>>,
}

/// Starts `vmm` with a guest that does `rounds` rounds of `load`. For a network card the calling thread gets a network namespace of
/// its own.
///
/// # Errors
/// Something that it needs cannot be had.
pub fn start(vmm: Vmm, load: Load, rounds: usize, files: &Files) -> io::Result<Machine> {
    let mut devices = Devices::default();
    let mut peer = None;
    match load.work {
        Work::Disk(_) => devices.disk = Some(&files.disk),
        Work::File(_) | Work::Untar | Work::Find => devices.share = Some(&files.share),
        Work::Ping { .. } => devices.tap = Some(tap()?),
        Work::Exchange(exchange) if exchange.tcp => {
            devices.tap = Some(tap()?);
            peer = Some((Peer::tcp()?, exchange));
        }
        Work::Exchange(exchange) => {
            let end = match vmm {
                Vmm::Capsid => {
                    let (owner, end) = socketpair(
                        AddressFamily::Unix,
                        SockType::SeqPacket,
                        None,
                        SockFlag::SOCK_CLOEXEC,
                    )?;
                    devices.owner_end = Some(end);
                    Peer::Owner(owner)
                }
                Vmm::Qemu | Vmm::QemuVhost => Peer::vsock()?,
            };
            devices.vsock = true;
            peer = Some((end, exchange));
        }
    }
    let words = [CMDLINE, LOAD_CMDLINE].join(" ");
    let cmdline = format!("{words} {LOAD}={} {ROUNDS}={rounds}", load.name);
    let (child, daemon, serial) = match vmm {
        Vmm::Capsid => capsid(&devices, &cmdline, files)?,
        Vmm::Qemu | Vmm::QemuVhost => qemu(vmm, &devices, &cmdline, files)?,
    };
    let serve =
        |(peer, exchange): (Peer, _)| std::thread::spawn(move || peer.serve(exchange, rounds));
    Ok(Machine {
        vmm: child,
        daemon,
        serial,
        peer: peer.map(serve),
    })
}

/// What the machine has besides; our ends of it go with this, when the VMM has its own.
#[derive(Default)]
struct Devices<'a> {
    disk: Option<&'a Path>,
    share: Option<&'a Path>,
    tap: Option<OwnedFd>,
    vsock: bool,
    /// The VMM's end of its owner channel, where it has one.
    owner_end: Option<OwnedFd>,
}

fn tap() -> io::Result<OwnedFd> {
    let tap = taps(1, MTU)?.pop();
    tap.ok_or_else(|| io::ErrorKind::NotFound.into())
}

/// A VMM, its daemon, and what its guest says.
type Started = (Child, Option<Child>, File);

fn capsid(devices: &Devices<'_>, cmdline: &str, files: &Files) -> io::Result<Started> {
    let kernel = File::open(&files.kernel)?;
    let initramfs = File::open(&files.initramfs)?;
    let (serial, serial_end) = nix::unistd::pipe()?;
    let mut config = plain_machine(&kernel, &initramfs)?;
    config.cmdline = cmdline.to_owned();
    config.serial = Some(SerialConfig {
        fd: inherited(&serial_end)?,
    });
    let disk = devices.disk.map(writable).transpose()?;
    if let Some(disk) = &disk {
        config.disks.push(DiskConfig {
            fd: inherited(disk)?,
            id: "load".to_owned(),
            read_only: false,
            queues: 1,
        });
    }
    if let Some(tap) = &devices.tap {
        config.nics.push(NicConfig {
            tap_fds: vec![inherited(tap)?],
            mac: Mac::try_from(MAC.to_owned()).map_err(io::Error::other)?,
            mtu: MTU,
        });
    }
    if let Some(end) = &devices.owner_end {
        config.vsock = Some(vsock(end, VSOCK_PORT)?);
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = devices
        .share
        .map(|path| open_tree(rustix::fs::CWD, path, flags));
    let tree = tree.transpose()?;
    if let Some(tree) = &tree {
        config.shares.push(ShareConfig {
            tag: TAG.to_owned(),
            tree_fd: inherited(tree)?,
        });
    }
    let (mut command, _config) = command(&config)?;
    Ok((spawn(&mut command)?, None, File::from(serial)))
}

fn writable(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

fn qemu(vmm: Vmm, devices: &Devices<'_>, cmdline: &str, files: &Files) -> io::Result<Started> {
    let mut words: Vec<String> = QEMU_OPTIONS.map(str::to_owned).into();
    let mut say = |option: &str, value: String| words.extend([option.to_owned(), value]);
    say("-M", "pc".to_owned());
    say("-bios", "qboot.rom".to_owned());
    say("-m", format!("{MEMORY_MIB}M"));
    say("-kernel", files.kernel.display().to_string());
    say("-initrd", files.initramfs.display().to_string());
    say("-append", cmdline.to_owned());
    if let Some(disk) = devices.disk {
        // As ours: through the host's page cache, by a ring. Its threads, the default, are slower.
        let drive = "if=none,id=disk,format=raw,cache=writeback,aio=io_uring";
        say("-drive", format!("{drive},file={}", disk.display()));
        say(
            "-device",
            "virtio-blk-pci,drive=disk,disable-legacy=on".to_owned(),
        );
    }
    if let Some(tap) = &devices.tap {
        let vhost = if vmm == Vmm::QemuVhost { "on" } else { "off" };
        let tap = inherited(tap)?;
        say("-netdev", format!("tap,id=net,fd={tap},vhost={vhost}"));
        let card = "virtio-net-pci,netdev=net,disable-legacy=on,romfile=";
        say("-device", format!("{card},mac={MAC},host_mtu={MTU}"));
    }
    if devices.vsock {
        let device = "vhost-vsock-pci,disable-legacy=on";
        say("-device", format!("{device},guest-cid={GUEST_CID}"));
    }
    let mut daemon = None;
    if let Some(share) = devices.share {
        let socket = files.share.with_extension("socket");
        daemon = Some(virtiofsd(share, &socket)?);
        // The daemon maps the guest's memory.
        let memory = format!("memory-backend-memfd,id=memory,share=on,size={MEMORY_MIB}M");
        say("-object", memory);
        say("-machine", "memory-backend=memory".to_owned());
        say(
            "-chardev",
            format!("socket,id=fs,path={}", socket.display()),
        );
        say("-device", format!("vhost-user-fs-pci,chardev=fs,tag={TAG}"));
    }
    let mut child = Command::new("qemu-system-x86_64")
        .args(&words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let serial = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
    Ok((child, daemon, File::from(OwnedFd::from(serial))))
}

/// The daemon, with a socket that listens already; it ends with its one connection.
fn virtiofsd(share: &Path, socket: &Path) -> io::Result<Child> {
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    Command::new(VIRTIOFSD)
        .arg(format!("--fd={}", inherited(&listener.as_fd())?))
        .arg(format!("--shared-dir={}", share.display()))
        .stdin(Stdio::null())
        .spawn()
}
