//! How a machine is put together, in the order in which it happens: the configuration, the process's own
//! namespaces, memory, KVM, devices, the guest's software, vCPUs, the jail, the threads.
//!
//! Everything that opens a path happens before [`jail::enter`]; the guest runs only after the last filter.

use crate::arch::cpuid::{self, Cpu};
use crate::arch::{mptable, registers};
use crate::board::{Board, BoardError};
use crate::boot::{self, BootError, Entry, Guest, Line};
use crate::control::{Attachments, Control, ControlError};
use crate::end::{End, Ends};
use crate::faults::FaultLines;
use crate::inherit::Inherited;
use crate::jail::{self, JailError};
use crate::kvm::vcpu::Vcpu;
use crate::kvm::vm::Vm;
use crate::kvm::{self, KvmError};
use crate::layout::{self, Pluggable};
use crate::machine::{Machine, PowerOff, StopSignals};
use crate::memory::{self, MemoryError};
use crate::owner_channel::{ChannelError, OwnerChannel};
use crate::record::Phases;
use crate::seccomp::{self, Filter, FilterError, ThreadKind};
use crate::slots::Label;
use crate::vcpus::{Vcpus, VcpusError};
use capsid_devices::GuestMemory;
use capsid_devices::balloon::{Balloon, BalloonHandle, TargetTooLarge};
use capsid_devices::blk::{self, Disk, DiskError, DiskIo, DiskSetup, EngineKind};
use capsid_devices::event::Poller;
use capsid_devices::fs::{FD_BUDGET_MIN, ShareError, ShareSetup, spawn_share_threads};
use capsid_devices::mem::{Mem, MemHandle, NoPluggableRegion, RequestTooLarge};
use capsid_devices::memory::{NotMemory, write};
use capsid_devices::net::{self, Net, NetError, NetSetup};
use capsid_devices::rng::Rng;
use capsid_protocol::exit::VmmExit;
use capsid_protocol::machine::{self, MachineConfig};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{Cap, Kvm};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

/// Descriptors for the files that the guest has open, over all shares. Each share has a table of its own, of [`jail::OPEN_FILES_MAX`];
/// this bounds what the kernel keeps for all of them.
const SHARE_FDS_MAX: usize = 12 * 1024;

/// PCI functions besides memory that is plugged, disks, network cards and shares: pvpanic, rng, vsock, balloon.
const ALWAYS_FUNCTIONS: usize = 4;

const _: () = assert!(SHARE_FDS_MAX < jail::OPEN_FILES_MAX as usize);
// The configuration admits what the devices take.
const _: () = {
    assert!(machine::DISKS_MAX == blk::DISKS_MAX);
    assert!(machine::DISK_QUEUES_MAX == blk::DISK_QUEUES_MAX);
    assert!(machine::DISK_ID_MAX_BYTES == blk::DISK_ID_BYTES);
    assert!(machine::NIC_PAIRS_MAX == net::PAIRS_MAX && machine::MTU_MIN == net::MTU_MIN);
};

/// Why a machine could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Kernel, initramfs, command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The MP table does not fit; a defect.
    #[error("cannot write the tables of the machine into guest memory")]
    Tables(#[source] NotMemory),
    /// The event loop or an eventfd.
    #[error("cannot {what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        cause: io::Error,
    },
    /// A device.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// The balloon.
    #[error(transparent)]
    Balloon(#[from] TargetTooLarge),
    /// The device for memory that is plugged.
    #[error(transparent)]
    Mem(#[from] NoPluggableRegion),
    /// More to plug than there may be.
    #[error(transparent)]
    Plug(#[from] RequestTooLarge),
    /// A share.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// A disk.
    #[error("disk {id:?} cannot be used")]
    Disk {
        /// Its id.
        id: String,
        /// Why.
        #[source]
        cause: DiskError,
    },
    /// A network card.
    #[error("network card {mac} cannot be used")]
    Nic {
        /// Its hardware address.
        mac: String,
        /// Why.
        #[source]
        cause: NetError,
    },
    /// The owner channel and its vsock device.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The control channel.
    #[error(transparent)]
    Control(#[from] ControlError),
    /// The jail.
    #[error(transparent)]
    Jail(#[from] JailError),
    /// A filter.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The vCPU threads.
    #[error(transparent)]
    Vcpus(#[from] VcpusError),
}

impl AssembleError {
    /// The exit code that goes with it.
    pub fn exit(&self) -> VmmExit {
        match self {
            AssembleError::Memory(_) | AssembleError::Tables(_) => VmmExit::Memory,
            AssembleError::Kvm(_) => VmmExit::KvmUnavailable,
            AssembleError::Boot(_) => VmmExit::BadKernel,
            AssembleError::Channel(error) => error.exit(),
            AssembleError::Control(ControlError::NotStream) => VmmExit::BadConfig,
            AssembleError::Jail(_)
            | AssembleError::Filter(_)
            | AssembleError::Share(ShareError::Confine { .. })
            | AssembleError::Vcpus(VcpusError::Filter(_)) => VmmExit::Jail,
            // A thread of a device that could not put its filter on.
            AssembleError::Share(ShareError::Thread { cause, .. })
            | AssembleError::Host { cause, .. }
                if cause
                    .get_ref()
                    .is_some_and(|cause| cause.is::<FilterError>()) =>
            {
                VmmExit::Jail
            }
            AssembleError::Host { .. }
            | AssembleError::Control(_)
            | AssembleError::Board(_)
            | AssembleError::Balloon(_)
            | AssembleError::Mem(_)
            | AssembleError::Plug(_)
            | AssembleError::Share(_)
            | AssembleError::Disk { .. }
            | AssembleError::Nic { .. } => VmmExit::Device,
            AssembleError::Vcpus(_) => VmmExit::VcpuLost,
        }
    }

    /// The end that goes with it.
    pub fn end(&self) -> End {
        End::from_error(self.exit(), self)
    }
}

fn host(what: &'static str) -> impl Fn(io::Error) -> AssembleError {
    move |cause| AssembleError::Host { what, cause }
}

/// Puts the machine together. When this returns, the calling thread is jailed and filtered, all vCPUs wait,
/// and nothing is left to do but [`Machine::run`].
///
/// # Errors
/// The first part that could not be had.
pub fn assemble(inherited: Inherited, phases: &Phases) -> Result<Machine, AssembleError> {
    let config = &inherited.config;
    let signals = StopSignals::new().map_err(host("take over SIGTERM"))?;
    let parent = jail::isolate(config.vsock.is_none())?;
    phases.ended("config");

    let pluggable = pluggable(config);
    let memory = memory::map(config.memory_mib, pluggable.as_ref())?;
    phases.ended("memory");

    let kvm = kvm::open()?;
    let vm = Vm::new(&kvm, Arc::clone(&memory))?;
    let vcpus = make_vcpus(&kvm, &vm, config)?;
    memory::refuse_wider_than(vcpus.address_bits, config.memory_mib, pluggable.as_ref())?;
    phases.ended("kvm");

    let ends = Ends::new().map_err(host("make the eventfd of the end"))?;
    let poller = Arc::new(Poller::new().map_err(host("make the event loop"))?);
    let functions = functions(config, pluggable.is_some());
    let mut board = Board::new(&vm, &memory, functions, config.control_fd.is_some());
    let serial = board.add_legacy(inherited.serial, &ends, &poller)?;
    board.add_pvpanic(&ends)?;
    board.add_virtio(
        Label::only("virtio-rng"),
        Box::new(Rng::new(poller.clone())),
    )?;
    let channel = add_vsock(
        &mut board,
        config,
        inherited.owner,
        &poller,
        (&ends, phases),
    )?;
    let mem = pluggable.map(|pluggable| add_mem(&mut board, config, &memory, &pluggable, &poller));
    let mem = mem.transpose()?;
    let balloon = add_balloon(&mut board, config, &memory, &poller)?;
    let disks = add_disks(&mut board, config, inherited.disks, &poller)?;
    add_nics(&mut board, config, inherited.nics, &poller)?;
    add_shares(&mut board, config, inherited.shares, &poller)?;
    let (buses, slots) = board.finish()?;
    phases.ended("devices");

    let (kernel, initramfs) = (&inherited.kernel, inherited.initramfs.as_ref());
    let entry = load(&memory, config, kernel, initramfs)?;
    let vcpus = configure_vcpus(&memory, vcpus, config, &entry)?;
    phases.ended("load");

    let filter = Arc::new(seccomp::compile(ThreadKind::Vcpu)?);
    let own_filter = seccomp::compile(ThreadKind::Main)?;
    jail::enter(config.jail, parent)?;
    if let Some(disks) = &disks {
        start_disks(disks)?;
    }
    let vcpus = Vcpus::start(vcpus, &buses, &ends, phases, &filter)?;
    let control = open_control(inherited.control, config, disks.as_ref(), &poller, &vcpus)?;
    confine_main(&own_filter)?;
    phases.ended("jail");

    Ok(Machine {
        poller,
        ends,
        vcpus,
        serial,
        slots,
        balloon,
        mem,
        disks,
        control,
        signals,
        power_off: channel.map(|channel| Box::new(channel) as Box<dyn PowerOff>),
        phases: phases.clone(),
    })
}

/// Opens the owner channel and puts its device on the board, if there is an owner.
fn add_vsock(
    board: &mut Board<'_>,
    config: &MachineConfig,
    owner: Option<OwnedFd>,
    poller: &Arc<Poller>,
    (ends, phases): (&Ends, &Phases),
) -> Result<Option<OwnerChannel>, AssembleError> {
    let (Some(owner), Some(vsock)) = (owner, &config.vsock) else {
        return Ok(None);
    };
    let dials = &vsock.guest_may_dial;
    let (channel, device) =
        OwnerChannel::open(owner, dials, poller.clone(), ends.clone(), phases.clone())?;
    board.add_virtio(Label::only("virtio-vsock"), Box::new(device))?;
    Ok(Some(channel))
}

/// Puts the balloon on the board.
fn add_balloon(
    board: &mut Board<'_>,
    config: &MachineConfig,
    memory: &GuestMemory,
    poller: &Arc<Poller>,
) -> Result<BalloonHandle, AssembleError> {
    let balloon = Balloon::new(memory, poller.clone());
    let handle = balloon.handle();
    // At most 512 GiB, so it fits.
    handle.set_target((config.balloon_mib << 8) as u32)?;
    board.add_virtio(Label::only("virtio-balloon"), Box::new(balloon))?;
    Ok(handle)
}

/// Loads the guest's software.
fn load(
    memory: &GuestMemory,
    config: &MachineConfig,
    kernel: &File,
    initramfs: Option<&File>,
) -> Result<Entry, BootError> {
    let guest = Guest {
        kernel,
        initramfs,
        line: Line {
            serial: config.serial.is_some(),
            pluggable: config.memory_max_mib.is_some(),
            high: layout::memory_ranges(config.memory_mib.bytes()).len() > 1,
            maxcpus: (config.cpus < config.cpus_present()).then(|| config.cpus.get()),
            extra: &config.cmdline,
        },
    };
    boot::load(memory, config.memory_mib, &guest)
}

/// How many PCI functions there are.
fn functions(config: &MachineConfig, pluggable: bool) -> usize {
    let given = config.disks.len() + config.nics.len() + config.shares.len();
    ALWAYS_FUNCTIONS + usize::from(pluggable) + given
}

/// What may be plugged beyond the memory at the start, if anything may.
fn pluggable(config: &MachineConfig) -> Option<Pluggable> {
    let pluggable = layout::pluggable(config.memory_mib.bytes(), config.memory_max_mib?.bytes());
    (!pluggable.range.is_empty()).then_some(pluggable)
}

/// Puts the device for memory that is plugged on the board.
fn add_mem(
    board: &mut Board<'_>,
    config: &MachineConfig,
    memory: &GuestMemory,
    pluggable: &Pluggable,
    poller: &Arc<Poller>,
) -> Result<MemHandle, AssembleError> {
    let backing = Arc::new(board.vm().clone());
    let mem = Mem::new(memory, pluggable.max_bytes, backing, poller.clone())?;
    let handle = mem.handle();
    handle.request(config.plug_mib << 20)?;
    board.add_virtio(Label::only("virtio-mem"), Box::new(mem))?;
    Ok(handle)
}

/// Puts a device for each disk on the board.
fn add_disks(
    board: &mut Board<'_>,
    config: &MachineConfig,
    files: Vec<File>,
    poller: &Arc<Poller>,
) -> Result<Option<Arc<DiskIo>>, AssembleError> {
    if files.is_empty() && config.control_fd.is_none() {
        return Ok(None);
    }
    let io = DiskIo::new(EngineKind::Best, poller.as_ref())
        .map_err(host("make the event of the disks"))?;
    let lines = FaultLines::default();
    io.on_fault(Box::new(move |fault| lines.note(fault)));
    for (disk, file) in config.disks.iter().zip(files) {
        let setup = DiskSetup {
            file,
            read_only: disk.read_only,
            queues: disk.queues,
            id: disk.id.clone(),
        };
        let device = Disk::new(setup, io.clone(), poller.clone()).map_err(|cause| {
            let id = disk.id.clone();
            AssembleError::Disk { id, cause }
        })?;
        let label = Label {
            id: disk.id.clone(),
            ..Label::only("virtio-blk")
        };
        board.add_virtio(label, Box::new(device))?;
    }
    Ok(Some(io))
}

/// Listens to what the owner will ask, if it may ask anything.
fn open_control(
    socket: Option<OwnedFd>,
    config: &MachineConfig,
    disks: Option<&Arc<DiskIo>>,
    poller: &Arc<Poller>,
    vcpus: &Vcpus,
) -> Result<Option<Control>, AssembleError> {
    let (Some(socket), Some(disks)) = (socket, disks) else {
        return Ok(None);
    };
    let attachments = Attachments {
        id: config.id.clone(),
        cpus: config.cpus_present(),
        memory_mib: config.memory_mib,
        disks: Arc::clone(disks),
        poller: Arc::clone(poller),
        ends: false,
    };
    Ok(Some(Control::open(socket, vcpus, attachments)?))
}

/// Starts the threads of the disks, where the host has no ring; inside the jail, which they inherit.
fn start_disks(io: &DiskIo) -> Result<(), AssembleError> {
    let filter = seccomp::compile(ThreadKind::Disk)?;
    let seal: blk::Seal = Arc::new(move || seccomp::confine(&filter).map_err(io::Error::other));
    io.start(&seal)
        .map_err(host("start the threads of the disks"))
}

/// Puts a device for each network card on the board.
fn add_nics(
    board: &mut Board<'_>,
    config: &MachineConfig,
    taps: Vec<Vec<OwnedFd>>,
    poller: &Arc<Poller>,
) -> Result<(), AssembleError> {
    for (nic, taps) in config.nics.iter().zip(taps) {
        let setup = NetSetup {
            taps,
            mac: nic.mac.bytes(),
            mtu: nic.mtu,
        };
        let device = Net::new(setup, poller.clone()).map_err(|cause| {
            let mac = nic.mac.into();
            AssembleError::Nic { mac, cause }
        })?;
        let label = Label {
            kind: "virtio-net",
            id: nic.mac.into(),
            link: Some(device.link()),
        };
        board.add_virtio(label, Box::new(device))?;
    }
    Ok(())
}

/// Starts the threads of each share, which confine themselves here and now, and puts its device on the board.
fn add_shares(
    board: &mut Board<'_>,
    config: &MachineConfig,
    trees: Vec<OwnedFd>,
    poller: &Arc<Poller>,
) -> Result<(), AssembleError> {
    if trees.is_empty() {
        return Ok(());
    }
    let filter = Arc::new(seccomp::compile(ThreadKind::FileSystem)?);
    let each = (SHARE_FDS_MAX / trees.len()).max(FD_BUDGET_MIN);
    let vm = board.vm().clone();
    let kept = [
        vm.as_fd(),
        // Where a thread hears of what to do, and tells what came of it.
        #[cfg(feature = "drill")]
        rustix::stdio::stdin(),
        #[cfg(feature = "drill")]
        rustix::stdio::stdout(),
    ];
    for (share, tree) in config.shares.iter().zip(trees) {
        let tag = share.tag.clone();
        let filter = Arc::clone(&filter);
        let share = spawn_share_threads(ShareSetup {
            tag: share.tag.clone(),
            tree,
            uid: config.jail.uid,
            gid: config.jail.gid,
            fd_budget: each,
            kept: &kept,
            seal: Arc::new(move || seccomp::confine(&filter).map_err(io::Error::other)),
            event_loop: poller.clone(),
        })?;
        let label = Label {
            id: tag,
            ..Label::only("virtio-fs")
        };
        board.add_virtio(label, Box::new(share))?;
    }
    Ok(())
}

fn confine_main(filter: &Filter) -> Result<(), AssembleError> {
    Ok(seccomp::confine(filter)?)
}

/// vCPUs with the CPUID leaves of each.
struct Prepared {
    vcpus: Vec<Vcpu>,
    leaves: Vec<Vec<kvm_bindings::kvm_cpuid_entry2>>,
    /// Physical address bits of each.
    address_bits: u32,
}

fn make_vcpus(kvm: &Kvm, vm: &Vm, config: &MachineConfig) -> Result<Prepared, AssembleError> {
    let count = config.cpus_present().get();
    let max = kvm.get_max_vcpus();
    if usize::from(count) > max {
        return Err(KvmError::TooManyCpus { max, asked: count }.into());
    }
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm::failed("KVM_GET_SUPPORTED_CPUID"))?;
    let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    let mut prepared = Prepared {
        vcpus: Vec::with_capacity(usize::from(count)),
        leaves: Vec::with_capacity(usize::from(count)),
        address_bits: cpuid::physical_address_bits(supported.as_slice()),
    };
    for index in 0..count {
        let vcpu = Vcpu::new(vm, index)?;
        let cpu = Cpu {
            index,
            count,
            // Without an answer the guest measures for itself.
            tsc_khz: vcpu.tsc_khz().unwrap_or(0),
            tsc_deadline,
        };
        prepared.vcpus.push(vcpu);
        prepared
            .leaves
            .push(cpuid::for_cpu(supported.as_slice(), cpu));
    }
    Ok(prepared)
}

fn configure_vcpus(
    memory: &GuestMemory,
    prepared: Prepared,
    config: &MachineConfig,
    entry: &Entry,
) -> Result<Vec<Vcpu>, AssembleError> {
    for (index, (vcpu, leaves)) in prepared.vcpus.iter().zip(&prepared.leaves).enumerate() {
        vcpu.configure(leaves, (index == 0).then_some(entry))?;
        if index == 0 {
            let cpu = cpuid::signature(leaves);
            let table = mptable::table(config.cpus_present().get(), cpu);
            let gdt: Vec<u8> = registers::gdt()
                .iter()
                .flat_map(|entry| entry.to_le_bytes())
                .collect();
            write(memory, layout::MP_TABLE, &table)
                .and_then(|()| write(memory, layout::GDT_START, &gdt))
                .map_err(AssembleError::Tables)?;
        }
    }
    Ok(prepared.vcpus)
}
