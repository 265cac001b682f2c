//! The ttrpc service: requests in the protocol's words to verbs of the sandbox, refusals to codes.

use crate::cpus::{CPUS, Cpus, CpusError};
use crate::hotplug::{HotplugError, PciBus};
use crate::last_words::chain;
use crate::power::Power;
use crate::sandbox::{Sandbox, SandboxError, StreamIds, Wish};
use crate::state::Refusal;
use crate::system;
use async_trait::async_trait;
use capsid_protocol::agent as api;
use capsid_protocol::control::PciAddress;
use capsid_protocol::machine::{Mac, is_disk_id};
use std::path::Path;
use std::sync::Arc;
use ttrpc::Code;
use ttrpc::r#async::TtrpcContext;

/// Longest text of an answered error, in bytes.
const ERROR_MAX_BYTES: usize = 4096;

/// Where the kernel shows the PCI bus.
const PCI_BUS: &str = "/sys/bus/pci";

/// The service of one guest.
#[derive(Debug)]
pub struct Service {
    sandbox: Arc<Sandbox>,
    power: Arc<Power>,
    bus: PciBus,
    cpus: Cpus,
    started_ns: u64,
}

impl Service {
    /// Serves `sandbox`; `started_ns` is when the agent's main began (CLOCK_BOOTTIME).
    pub fn new(sandbox: Arc<Sandbox>, power: Arc<Power>, started_ns: u64) -> Service {
        Service {
            sandbox,
            power,
            bus: PciBus::at(Path::new(PCI_BUS)),
            cpus: Cpus::at(Path::new(CPUS)),
            started_ns,
        }
    }
}

/// The one table from refusals to codes.
fn code(error: &SandboxError) -> Code {
    match error {
        SandboxError::NoContainer(_)
        | SandboxError::NoExec { .. }
        | SandboxError::Hotplug(HotplugError::NotOnBus(_))
        | SandboxError::Refused(Refusal::Gone) => Code::NOT_FOUND,
        SandboxError::Exists(_) => Code::ALREADY_EXISTS,
        SandboxError::BadId(_)
        | SandboxError::BadSpec(_)
        | SandboxError::BadRequest(_)
        | SandboxError::NotExecuted { .. }
        | SandboxError::Cpus(CpusError::Count { .. })
        | SandboxError::NoStream(_) => Code::INVALID_ARGUMENT,
        SandboxError::Refused(Refusal::Wrong { .. })
        | SandboxError::Wrong(_)
        | SandboxError::Hotplug(HotplugError::Another { .. } | HotplugError::InUse(_))
        | SandboxError::Share(_) => Code::FAILED_PRECONDITION,
        SandboxError::Full(_) => Code::RESOURCE_EXHAUSTED,
        SandboxError::NotStarted(_)
        | SandboxError::Cgroup(_)
        | SandboxError::Launch(_)
        | SandboxError::Shm(_)
        | SandboxError::Hotplug(_)
        | SandboxError::Cpus(_)
        | SandboxError::Io { .. } => Code::INTERNAL,
    }
}

impl From<SandboxError> for ttrpc::Error {
    fn from(error: SandboxError) -> ttrpc::Error {
        let mut text = String::new();
        for c in chain(&error).chars() {
            if text.len() + c.len_utf8() > ERROR_MAX_BYTES {
                break;
            }
            text.push(if c.is_control() { ' ' } else { c });
        }
        ttrpc::Error::RpcStatus(ttrpc::get_status(code(&error), text))
    }
}

fn invalid(what: impl std::fmt::Display) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(Code::INVALID_ARGUMENT, what.to_string()))
}

fn pci_address(text: &str) -> Result<PciAddress, SandboxError> {
    let address = PciAddress::try_from(text.to_owned());
    address.map_err(|why| SandboxError::BadRequest(why.to_string()))
}

fn mac(text: &str) -> Result<Mac, SandboxError> {
    let mac = Mac::try_from(text.to_owned());
    mac.map_err(|why| SandboxError::BadRequest(why.to_string()))
}

fn disk_id(id: &str) -> Result<&str, SandboxError> {
    match is_disk_id(id) {
        true => Ok(id),
        false => Err(SandboxError::BadRequest(format!(
            "no disk has the id {id:?}"
        ))),
    }
}

fn streams(stdio: Option<&api::Stdio>) -> StreamIds {
    stdio.map_or_else(StreamIds::default, |ids| StreamIds {
        stdin: ids.stdin,
        stdout: ids.stdout,
        stderr: ids.stderr,
    })
}

fn end(end: crate::sandbox::End) -> api::WaitResponse {
    api::WaitResponse {
        exit_status: end.exit.status.into(),
        exited_at_ns: end.exit.at_ns,
        oom_kills: end.oom_kills,
        ..Default::default()
    }
}

type Answer<T> = ttrpc::Result<T>;

#[async_trait]
impl api::Agent for Service {
    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: api::StartSandboxRequest,
    ) -> Answer<api::StartSandboxResponse> {
        let called_ns = system::boottime_ns();
        system::set_hostname(&request.hostname).map_err(|e| invalid(chain(&e)))?;
        system::set_realtime(request.realtime_ns).map_err(|e| invalid(chain(&e)))?;
        system::set_sysctls(&request.sysctls).map_err(|e| invalid(chain(&e)))?;
        let sandbox = Arc::clone(&self.sandbox);
        tokio::spawn(async move { sandbox.share.mount_early().await });
        Ok(api::StartSandboxResponse {
            agent_version: env!("CARGO_PKG_VERSION").into(),
            kernel_release: system::kernel_release(),
            online_cpus: system::online_cpus(),
            memory_total_bytes: system::memory_total_bytes(),
            agent_started_ns: self.started_ns,
            called_ns,
            ..Default::default()
        })
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: api::CreateContainerRequest,
    ) -> Answer<api::CreateContainerResponse> {
        let ids = streams(request.stdio.as_ref());
        let of = Some(request.pid_namespace_of.as_str());
        let wish = match request.pause {
            true => Wish::Pause,
            false => Wish::Program {
                spec: &request.spec_json,
                pid_namespace_of: of.filter(|of| !of.is_empty()),
            },
        };
        let guest_pid = self
            .sandbox
            .create(&request.container_id, wish, ids)
            .await?;
        Ok(api::CreateContainerResponse {
            guest_pid,
            ..Default::default()
        })
    }

    async fn start_container(
        &self,
        _: &TtrpcContext,
        request: api::StartContainerRequest,
    ) -> Answer<api::Empty> {
        self.sandbox.start(&request.container_id).await?;
        Ok(api::Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: api::ExecRequest) -> Answer<api::ExecResponse> {
        let ids = streams(request.stdio.as_ref());
        let (id, exec_id) = (&request.container_id, &request.exec_id);
        let json = &request.process_json;
        let guest_pid = self.sandbox.exec(id, exec_id, json, ids).await?;
        Ok(api::ExecResponse {
            guest_pid,
            ..Default::default()
        })
    }

    async fn wait(
        &self,
        _: &TtrpcContext,
        request: api::ProcessRequest,
    ) -> Answer<api::WaitResponse> {
        let (id, exec_id) = (&request.container_id, &request.exec_id);
        Ok(end(self.sandbox.wait(id, exec_id).await?))
    }

    async fn signal(&self, _: &TtrpcContext, request: api::SignalRequest) -> Answer<api::Empty> {
        let (id, exec_id) = (&request.container_id, &request.exec_id);
        let (signal, all) = (request.signal, request.all);
        self.sandbox.signal(id, exec_id, signal, all).await?;
        Ok(api::Empty::default())
    }

    async fn pids(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> Answer<api::PidsResponse> {
        Ok(api::PidsResponse {
            guest_pids: self.sandbox.pids(&request.container_id).await?,
            ..Default::default()
        })
    }

    async fn stats(
        &self,
        _: &TtrpcContext,
        request: api::ContainerRequest,
    ) -> Answer<api::StatsResponse> {
        Ok(self.sandbox.figures(&request.container_id).await?)
    }

    async fn update(&self, _: &TtrpcContext, request: api::UpdateRequest) -> Answer<api::Empty> {
        let (id, json) = (&request.container_id, &request.resources_json);
        self.sandbox.update(id, json).await?;
        Ok(api::Empty::default())
    }

    async fn pause(&self, _: &TtrpcContext, request: api::ContainerRequest) -> Answer<api::Empty> {
        self.sandbox.pause(&request.container_id).await?;
        Ok(api::Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ContainerRequest) -> Answer<api::Empty> {
        self.sandbox.resume(&request.container_id).await?;
        Ok(api::Empty::default())
    }

    async fn resize_tty(
        &self,
        _: &TtrpcContext,
        request: api::ResizeTtyRequest,
    ) -> Answer<api::Empty> {
        let columns = u16::try_from(request.width_columns).ok().filter(|n| *n > 0);
        let rows = u16::try_from(request.height_rows).ok().filter(|n| *n > 0);
        let (Some(columns), Some(rows)) = (columns, rows) else {
            return Err(invalid("a terminal has 1 to 65535 columns and rows"));
        };
        let (id, exec_id) = (&request.container_id, &request.exec_id);
        let resize = |process: &crate::process::Process| process.resize(columns, rows);
        match self.sandbox.with_process(id, exec_id, resize)? {
            Ok(true) => Ok(api::Empty::default()),
            Ok(false) => Err(SandboxError::Wrong("the process has no terminal".into()).into()),
            Err(cause) => Err(SandboxError::Io {
                what: "resizing the terminal",
                cause,
            }
            .into()),
        }
    }

    async fn close_stdin(
        &self,
        _: &TtrpcContext,
        request: api::ProcessRequest,
    ) -> Answer<api::Empty> {
        let (id, exec_id) = (&request.container_id, &request.exec_id);
        let close = crate::process::Process::close_stdin;
        self.sandbox.with_process(id, exec_id, close)?;
        Ok(api::Empty::default())
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: api::ProcessRequest,
    ) -> Answer<api::WaitResponse> {
        let (id, exec_id) = (&request.container_id, &request.exec_id);
        Ok(end(self.sandbox.delete(id, exec_id).await?))
    }

    async fn next_event(&self, _: &TtrpcContext, _: api::Empty) -> Answer<api::Event> {
        let Some(oom) = self.sandbox.events.next_oom().await else {
            return Err(SandboxError::Wrong("another NextEvent is pending".into()).into());
        };
        let mut event = api::Event::default();
        event.set_oom_kill(api::OomKill {
            container_id: oom.container_id,
            oom_kills: oom.kills,
            ..Default::default()
        });
        Ok(event)
    }

    async fn attach_disk(
        &self,
        _: &TtrpcContext,
        request: api::DiskRequest,
    ) -> Answer<api::AttachDiskResponse> {
        let (at, id) = (pci_address(&request.pci_address)?, disk_id(&request.id)?);
        let disk = self.bus.attach_disk(at, id).await?;
        Ok(api::AttachDiskResponse {
            device_name: disk.name,
            major: disk.major,
            minor: disk.minor,
            ..Default::default()
        })
    }

    async fn attach_nic(
        &self,
        _: &TtrpcContext,
        request: api::NicRequest,
    ) -> Answer<api::AttachNicResponse> {
        let (at, mac) = (pci_address(&request.pci_address)?, mac(&request.mac)?);
        Ok(api::AttachNicResponse {
            interface_name: self.bus.attach_nic(at, mac).await?,
            ..Default::default()
        })
    }

    async fn detach_disk(&self, _: &TtrpcContext, request: api::DiskRequest) -> Answer<api::Empty> {
        let (at, id) = (pci_address(&request.pci_address)?, disk_id(&request.id)?);
        self.bus.detach_disk(at, id).await?;
        Ok(api::Empty::default())
    }

    async fn detach_nic(&self, _: &TtrpcContext, request: api::NicRequest) -> Answer<api::Empty> {
        let (at, mac) = (pci_address(&request.pci_address)?, mac(&request.mac)?);
        self.bus.detach_nic(at, mac).await?;
        Ok(api::Empty::default())
    }

    async fn online_cpus(
        &self,
        _: &TtrpcContext,
        request: api::OnlineCpusRequest,
    ) -> Answer<api::OnlineCpusResponse> {
        Ok(api::OnlineCpusResponse {
            online_cpus: self.cpus.online(request.count).await?,
            ..Default::default()
        })
    }

    async fn power_off(&self, _: &TtrpcContext, _: api::Empty) -> Answer<api::Empty> {
        self.power.orderly(&self.sandbox).await;
        self.power.answered();
        Ok(api::Empty::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{State, Verb};
    use capsid_protocol::exec_error::ExecError;

    #[test]
    fn a_signal_to_an_ended_process_is_not_found() {
        assert_eq!(code(&Refusal::Gone.into()), Code::NOT_FOUND);
    }

    #[test]
    fn a_verb_in_the_wrong_state_is_a_failed_precondition() {
        let refusal = Refusal::Wrong {
            at: State::Running,
            verb: Verb::Start,
        };
        assert_eq!(code(&refusal.into()), Code::FAILED_PRECONDITION);
    }

    #[test]
    fn an_executable_not_found_says_so_first() {
        let error = SandboxError::NotExecuted {
            kind: ExecError::NotFound,
            what: "nope".into(),
        };
        assert_eq!(code(&error), Code::INVALID_ARGUMENT);
        let text = chain(&error);
        assert_eq!(ExecError::parse(&text), Some((ExecError::NotFound, "nope")));
    }

    #[test]
    fn an_error_is_bounded_and_has_no_control_characters() {
        let error = SandboxError::BadRequest("\u{1b}[2J".to_owned() + &"x".repeat(1 << 20));
        let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(error) else {
            panic!("a status");
        };
        assert!(status.message.len() <= ERROR_MAX_BYTES);
        assert!(!status.message.contains('\u{1b}'));
    }
}
