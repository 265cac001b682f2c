//! What a request does to the machine.

use crate::machine::Machine;
use crate::record;
use crate::slots::{Label, Slot};
use capsid_devices::blk::{Disk, DiskIo, DiskSetup};
use capsid_devices::event::Poller;
use capsid_devices::net::{Net, NetSetup};
use capsid_devices::pci::Place;
use capsid_protocol::control::{
    DeviceState, MachineCounters, MachineState, MemoryState, NewDisk, NewNic, PciAddress, Reply,
    Request, RunState,
};
use capsid_protocol::machine::{self, Cpus, Mac, MemoryMib};
use std::collections::BTreeMap;
use std::error::Error;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// What new devices are made with, and what the VM was made as.
pub struct Attachments {
    /// Id of the VM.
    pub id: String,
    /// vCPUs.
    pub cpus: Cpus,
    /// Memory at the start.
    pub memory_mib: MemoryMib,
    /// Where the calls of disks are made.
    pub disks: Arc<DiskIo>,
    /// Where devices live.
    pub poller: Arc<Poller>,
    /// The VM was told to end, and the guest is asked to power off.
    pub ends: bool,
}

/// What is to be done about a request.
pub(super) enum Answer {
    /// It is done.
    Reply(Reply),
    /// It is done when the vCPUs and the devices have paused.
    Pausing,
    /// The VM ends.
    Stop,
}

impl Attachments {
    /// Does what a request asks, as far as it can be done at once.
    pub(super) fn serve(
        &self,
        machine: &mut Machine,
        request: Result<Request, String>,
        fds: Vec<OwnedFd>,
    ) -> Answer {
        let request = match request {
            Ok(request) => request,
            Err(why) => return Answer::Reply(Reply::Refused { why }),
        };
        let served = match request {
            Request::State => Ok(Reply::State(self.state(machine))),
            Request::Counters => Ok(Reply::Counters(counters(machine))),
            Request::AttachDisk(disk) => self.attach_disk(machine, disk, fds),
            Request::DetachDisk { id } => detach(machine, "virtio-blk", &id),
            Request::AttachNic(nic) => self.attach_nic(machine, &nic, fds),
            Request::DetachNic { mac } => detach(machine, "virtio-net", &String::from(mac)),
            Request::SetLink { mac, up } => set_link(machine, mac, up),
            Request::Resize { memory_mib } => self.resize(machine, memory_mib),
            Request::Pause if self.ends => Err("the VM is to end".to_owned()),
            Request::Pause if machine.vcpus.is_quiet() => Ok(Reply::Done),
            Request::Pause => {
                machine.vcpus.pause();
                return Answer::Pausing;
            }
            Request::Resume => {
                machine.resume();
                Ok(Reply::Done)
            }
            Request::Stop => return Answer::Stop,
        };
        Answer::Reply(served.unwrap_or_else(|why| Reply::Refused { why }))
    }

    fn state(&self, machine: &Machine) -> MachineState {
        let mib = |bytes: u64| bytes >> 20;
        let mut devices: Vec<_> = machine.slots.all().iter().filter_map(device).collect();
        devices.sort_by_key(|device| device.pci);
        let plugged = machine.mem.as_ref().map_or(0, |mem| mem.plugged());
        MachineState {
            id: self.id.clone(),
            run: match machine.vcpus.is_quiet() {
                true => RunState::Paused,
                false => RunState::Running,
            },
            cpus: self.cpus,
            memory: MemoryState {
                boot_mib: self.memory_mib.get(),
                plugged_mib: mib(plugged),
                balloon_mib: mib(u64::from(machine.balloon.actual()) << 12),
            },
            devices,
        }
    }

    fn attach_disk(
        &self,
        machine: &mut Machine,
        disk: NewDisk,
        fds: Vec<OwnedFd>,
    ) -> Result<Reply, String> {
        let id = disk.id;
        check_new(machine, "virtio-blk", &id, machine::DISKS_MAX)?;
        let Some(fd) = fds.into_iter().next() else {
            return Err("no file came with the disk".to_owned());
        };
        let setup = DiskSetup {
            file: File::from(fd),
            read_only: disk.read_only,
            queues: disk.queues,
            id: id.clone(),
        };
        let device = Disk::new(setup, self.disks.clone(), self.poller.clone());
        let device = device.map_err(|error| said("disk", &id, &error))?;
        let label = Label {
            kind: "virtio-blk",
            id: id.clone(),
            link: None,
        };
        let place = machine.slots.attach(label, Box::new(device));
        attached(place.map_err(|error| said("disk", &id, &error))?)
    }

    fn attach_nic(
        &self,
        machine: &mut Machine,
        nic: &NewNic,
        taps: Vec<OwnedFd>,
    ) -> Result<Reply, String> {
        let id = String::from(nic.mac);
        check_new(machine, "virtio-net", &id, machine::NICS_MAX)?;
        let setup = NetSetup {
            taps,
            mac: nic.mac.bytes(),
            mtu: nic.mtu,
        };
        let device = Net::new(setup, self.poller.clone());
        let device = device.map_err(|error| said("network card", &id, &error))?;
        let label = Label {
            kind: "virtio-net",
            id: id.clone(),
            link: Some(device.link()),
        };
        let place = machine.slots.attach(label, Box::new(device));
        attached(place.map_err(|error| said("network card", &id, &error))?)
    }

    /// Asks the guest to have so much memory: what is beyond the start is plugged, what is below goes into the balloon.
    fn resize(&self, machine: &Machine, memory_mib: MemoryMib) -> Result<Reply, String> {
        let (wanted, boot) = (memory_mib.bytes(), self.memory_mib.bytes());
        let beyond = wanted.saturating_sub(boot);
        match &machine.mem {
            Some(mem) => mem
                .request(beyond)
                .map_err(|error| crate::end::in_full(&error))?,
            None if beyond == 0 => {}
            None => {
                return Err(format!(
                    "{} MiB of memory: the VM was started with {} MiB and no memory_max_mib to grow to",
                    memory_mib.get(),
                    self.memory_mib.get()
                ));
            }
        }
        let pages = boot.saturating_sub(wanted) >> 12;
        // At most 512 GiB, so it fits.
        let set = machine.balloon.set_target(pages as u32);
        set.map_err(|error| crate::end::in_full(&error))?;
        Ok(Reply::Done)
    }
}

fn said(what: &str, id: &str, error: &(dyn Error + 'static)) -> String {
    format!(
        "{what} {id:?} cannot be attached: {}",
        crate::end::in_full(error)
    )
}

fn check_new(machine: &Machine, kind: &str, id: &str, max: usize) -> Result<(), String> {
    if machine.slots.find(kind, id).is_some() {
        return Err(format!("there is a {kind} {id:?} already"));
    }
    let of_kind = machine
        .slots
        .all()
        .iter()
        .filter(|slot| slot.label.kind == kind);
    match of_kind.count() {
        count if count < max => Ok(()),
        _ => Err(format!("a VM has at most {max} devices of {kind}")),
    }
}

fn address(place: Place) -> Option<PciAddress> {
    PciAddress::new(place.slot, place.function).ok()
}

fn attached(place: Place) -> Result<Reply, String> {
    match address(place) {
        Some(pci) => Ok(Reply::Attached { pci }),
        None => Err(format!("{place} is no place of a device")),
    }
}

fn detach(machine: &mut Machine, kind: &'static str, id: &str) -> Result<Reply, String> {
    match machine.slots.detach(kind, id) {
        Ok(()) => Ok(Reply::Done),
        Err(error) => Err(crate::end::in_full(&error)),
    }
}

fn set_link(machine: &Machine, mac: Mac, up: bool) -> Result<Reply, String> {
    let mac = String::from(mac);
    let slot = machine.slots.find("virtio-net", &mac);
    let link = slot.and_then(|slot| slot.label.link.as_ref());
    let link = link.ok_or_else(|| format!("there is no virtio-net {mac:?}"))?;
    link.set(up);
    Ok(Reply::Done)
}

fn device(slot: &Slot) -> Option<DeviceState> {
    Some(DeviceState {
        kind: slot.label.kind.to_owned(),
        id: slot.label.id.clone(),
        // Every place on the bus has an address.
        pci: address(slot.place)?,
        in_use: slot.transport.in_use(),
        broken: slot.transport.broken(),
    })
}

fn counters(machine: &Machine) -> MachineCounters {
    let name = |slot: &Slot| match slot.label.id.as_str() {
        "" => slot.label.kind.to_owned(),
        id => format!("{}/{id}", slot.label.kind),
    };
    let count = |slot: &Slot| -> BTreeMap<String, u64> {
        let read = slot.transport.counters().read().into_iter();
        read.map(|(name, count)| (name.to_owned(), count)).collect()
    };
    let slots = machine.slots.all().iter();
    MachineCounters {
        vcpus: machine
            .vcpus
            .counts()
            .iter()
            .map(record::by_reason)
            .collect(),
        devices: slots.map(|slot| (name(slot), count(slot))).collect(),
    }
}
