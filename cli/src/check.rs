//! `capsid check`: what this machine has and lacks, and what to do. The last line is not an opinion: a VM is booted.
//! Nothing here waits without a deadline, a signal ends each wait of the boot at once; software KVM is told by the CPU's flags and not tried.

use crate::abort::{Abort, Aborted};
use crate::args::{CheckArgs, MachineArgs};
use crate::host;
use crate::image::cache::{Cache, DEFAULT_DIRECTORY};
use crate::share::{self, Plan, Root};
use crate::vm::agent::{Agent, AgentError};
use crate::vm::{Machine, News};
use crate::{chain, quantity};
use capsid_owner::end::{Ended, How};
use capsid_owner::files::Part;
use capsid_owner::host::{KVM_DEVICE, KvmError, KvmKind, kvm, memory};
use capsid_owner::machine::Parts;
use capsid_protocol::agent::StartSandboxResponse;
use capsid_protocol::exit::VmmExit;
use serde::Serialize;
use std::io::Write;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// How long it may take to power off, in ms.
const POWER_OFF_TIMEOUT_MS: u64 = 30_000;
/// The first kernel with all of the mount API that is used.
const KERNEL_MIN: (u32, u32) = (5, 12);
/// Memory of the VM that is booted.
const BOOT_MEMORY: &str = "128m";

/// How a thing stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// As it must be.
    Ok,
    /// `run` does not work.
    Missing,
}

/// One line of the answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Item {
    name: &'static str,
    state: State,
    text: String,
}

impl Item {
    fn ok(name: &'static str, text: impl Into<String>) -> Item {
        Item {
            name,
            state: State::Ok,
            text: text.into(),
        }
    }

    fn from_result(name: &'static str, result: Result<String, impl std::error::Error>) -> Item {
        match result {
            Ok(text) => Item::ok(name, text),
            Err(error) => Item {
                name,
                state: State::Missing,
                text: chain(&error),
            },
        }
    }
}

/// The whole answer.
#[derive(Debug, Serialize)]
struct Answer {
    usable: bool,
    version: &'static str,
    items: Vec<Item>,
}

/// What happens while the VM boots.
#[derive(Debug)]
pub(crate) enum Event {
    /// A signal came; the abort says which.
    Signal,
    /// News of the machine.
    Machine(News),
    /// The agent's first answer.
    Guest(Result<StartSandboxResponse, AgentError>),
    /// Its answer to PowerOff.
    PowerOff(Result<(), AgentError>),
}

/// Both ends of the way that events take.
pub(crate) type Events = (mpsc::Sender<Event>, mpsc::Receiver<Event>);

/// Checks and prints; whether `run` would work.
///
/// # Errors
/// A signal asked to stop: nothing is known, and nothing printed.
pub(crate) fn check(args: &CheckArgs, abort: &Abort, events: &Events) -> Result<bool, Aborted> {
    let mut items = machine_items();
    items.extend(file_items(&args.machine));
    items.push(mount_item());
    let is_ready = items.iter().all(|item| item.state != State::Missing);
    items.push(match is_ready {
        true => boot_item(&args.machine, abort, events),
        false => Item {
            name: "boot",
            state: State::Missing,
            text: "not tried, since something above is missing".to_owned(),
        },
    });
    abort.check()?;
    let answer = Answer {
        usable: items.iter().all(|item| item.state != State::Missing),
        version: env!("CARGO_PKG_VERSION"),
        items,
    };
    let text = match args.json {
        true => serde_json::to_string_pretty(&answer).unwrap_or_default() + "\n",
        false => table(&answer),
    };
    // A reader that is gone has had enough; the exit code says it too.
    let _closed = std::io::stdout().write_all(text.as_bytes());
    Ok(answer.usable)
}

fn table(answer: &Answer) -> String {
    let mut text = format!("{:<7} {:<12} {}\n", "ok", "capsid", answer.version);
    for item in &answer.items {
        let mark = match item.state {
            State::Ok => "ok",
            State::Missing => "MISSING",
        };
        text.push_str(&format!("{mark:<7} {:<12} {}\n", item.name, item.text));
    }
    text.push_str(match answer.usable {
        true => "capsid run works on this machine\n",
        false => "capsid run does not work on this machine\n",
    });
    text
}

fn machine_items() -> Vec<Item> {
    vec![
        user_item(rustix::process::geteuid().is_root()),
        kernel_item(&host::kernel_release()),
        kvm_item(kvm()),
        memory_item(memory(), host::cgroup_memory_limit()),
        Item::ok(
            "cgroups",
            format!("{} (capsid run does not need them)", host::cgroups()),
        ),
    ]
}

fn user_item(is_root: bool) -> Item {
    match is_root {
        true => Item::ok("user", "root"),
        false => Item {
            name: "user",
            state: State::Missing,
            text: "not root: run as root, for mounts and the VMM's jail".to_owned(),
        },
    }
}

fn kernel_item(release: &str) -> Item {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let (major, minor) = KERNEL_MIN;
    match version >= KERNEL_MIN {
        true => Item::ok("kernel", format!("Linux {release}")),
        false => Item {
            name: "kernel",
            state: State::Missing,
            text: format!("Linux {release}: {major}.{minor} or newer is needed"),
        },
    }
}

fn kvm_item(kvm: Result<KvmKind, KvmError>) -> Item {
    let result = kvm.and_then(|kind| match kind {
        KvmKind::Hardware(name) => Ok(format!("{}: hardware ({name})", KVM_DEVICE)),
        KvmKind::Software(modules) => Err(KvmError::Software {
            modules: modules.join(", "),
            otherwise: host::WITH_SOFTWARE_KVM,
        }),
    });
    Item::from_result("kvm", result)
}

fn memory_item((total, available): (u64, u64), cgroup_limit: Option<u64>) -> Item {
    let mib = |bytes: u64| bytes >> 20;
    let usable = available.min(cgroup_limit.unwrap_or(u64::MAX));
    let mut text = format!("{} MiB, {} MiB available", mib(total), mib(available));
    if let Some(limit) = cgroup_limit {
        text.push_str(&format!(", cgroup limit {} MiB", mib(limit)));
    }
    let is_enough = quantity::memory(BOOT_MEMORY, usable).is_ok();
    if !is_enough {
        let remedy = match cgroup_limit.is_some_and(|limit| limit < available) {
            true => "raise the limit of this cgroup, or run outside it",
            false => "end other programs, or add memory",
        };
        text.push_str(&format!(": too little for a VM of {BOOT_MEMORY}: {remedy}"));
    }
    Item {
        name: "memory",
        state: if is_enough { State::Ok } else { State::Missing },
        text,
    }
}

fn file_items(args: &MachineArgs) -> Vec<Item> {
    let parts = [
        ("vmm", Part::Vmm),
        ("guest kernel", Part::Kernel),
        ("initramfs", Part::Initramfs),
    ];
    let mut items: Vec<Item> = parts
        .into_iter()
        .map(|(name, part)| {
            let found = args.find(part).and_then(|path| {
                let file = part.open(&path)?;
                let length = file.metadata().map(|kind| kind.len()).unwrap_or(0);
                Ok(format!("{}, {} KiB", path.display(), length >> 10))
            });
            Item::from_result(name, found)
        })
        .collect();
    let directory = std::env::var_os("CAPSID_CACHE").filter(|path| !path.is_empty());
    let directory = directory.map_or_else(|| PathBuf::from(DEFAULT_DIRECTORY), PathBuf::from);
    let opened = Cache::open(&directory).map(|_| directory.display().to_string());
    items.push(Item::from_result("image cache", opened));
    items
}

/// Makes what `run` would mount, of a directory that every host has, and lets it go.
fn mount_item() -> Item {
    let made = share::make(&Plan {
        id: "check".to_owned(),
        root: Root::Directory {
            path: PathBuf::from("/etc"),
            read_only: true,
        },
        volumes: Vec::new(),
        files: Vec::new(),
        host_memory_bytes: memory().0,
    });
    let text = "overlay, tmpfs and detached mount trees work";
    Item::from_result("mounts", made.map(|_| text.to_owned()))
}

/// Why the VM did not boot.
#[derive(Debug, thiserror::Error)]
enum BootError {
    #[error(transparent)]
    File(#[from] capsid_owner::files::FileError),
    #[error(transparent)]
    Quantity(#[from] quantity::QuantityError),
    #[error(transparent)]
    Start(#[from] capsid_owner::machine::StartError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error(transparent)]
    Aborted(#[from] Aborted),
    #[error("the VM ended: {0}")]
    Ended(String),
    #[error("{}", crate::run::unreached(*.0))]
    Unreached(Duration),
    #[error("the guest did not power off within {POWER_OFF_TIMEOUT_MS} ms")]
    Stays,
}

impl BootError {
    fn ended(ended: &Ended) -> BootError {
        BootError::Ended(crate::run::machine_ended(ended))
    }
}

fn boot_item(args: &MachineArgs, abort: &Abort, events: &Events) -> Item {
    let booted = boot(args, abort, events).map(|(guest, took)| {
        format!(
            "a VM booted in {} ms: Linux {}, agent {}",
            took.as_millis(),
            crate::escape::Line(guest.kernel_release.as_bytes()),
            crate::escape::Line(guest.agent_version.as_bytes()),
        )
    });
    Item::from_result("boot", booted)
}

/// Boots a VM, talks to its agent and powers it off. The machine's guard kills what does not end by itself.
fn boot(
    args: &MachineArgs,
    abort: &Abort,
    (sender, events): &Events,
) -> Result<(StartSandboxResponse, Duration), BootError> {
    let boot_timeout = quantity::boot_timeout(&args.boot_timeout)?;
    let parts = Parts {
        id: "check".to_owned(),
        vmm: args.find(Part::Vmm)?,
        kernel: Part::Kernel.open(&args.find(Part::Kernel)?)?,
        initramfs: Part::Initramfs.open(&args.find(Part::Initramfs)?)?,
        share: None,
        cpus: quantity::cpus("1")?,
        memory: quantity::memory(BOOT_MEMORY, memory().0)?,
        console: false,
        cgroup: None,
    };
    let started = Instant::now();
    let deadline = started + boot_timeout;
    let unreached = || BootError::Unreached(boot_timeout);
    let tell = sender.clone();
    let _machine = Machine::start(parts, move |news| {
        // The check may be over.
        let _nobody_listens = tell.send(Event::Machine(news));
    })?;
    let stream = loop {
        match next(events, abort, deadline)?.ok_or_else(unreached)? {
            Event::Machine(News::AgentDialled(stream)) => break stream,
            Event::Machine(News::Ended(ended)) => return Err(BootError::ended(&ended)),
            _ => {}
        }
    };
    let (agent, tell) = (Agent::new(stream)?, sender.clone());
    thread::spawn(move || call(agent, &tell));
    let guest = loop {
        match next(events, abort, deadline)?.ok_or_else(unreached)? {
            Event::Guest(guest) => break guest?,
            Event::Machine(News::Ended(ended)) => return Err(BootError::ended(&ended)),
            _ => {}
        }
    };
    let took = started.elapsed();
    let deadline = Instant::now() + Duration::from_millis(POWER_OFF_TIMEOUT_MS);
    loop {
        match next(events, abort, deadline)?.ok_or(BootError::Stays)? {
            Event::PowerOff(answer) => answer?,
            Event::Machine(News::Ended(ended)) => match ended.how {
                How::Exit(VmmExit::PowerOff) => return Ok((guest, took)),
                _ => return Err(BootError::ended(&ended)),
            },
            _ => {}
        }
    }
}

/// The next event, `None` at the deadline.
fn next(
    events: &mpsc::Receiver<Event>,
    abort: &Abort,
    deadline: Instant,
) -> Result<Option<Event>, Aborted> {
    abort.check()?;
    let left = deadline.saturating_duration_since(Instant::now());
    let event = events.recv_timeout(left).ok();
    abort.check()?;
    Ok(event)
}

/// The calls of a check. Each blocks, so they have a thread, which ends with the machine at the latest.
fn call(agent: Agent, tell: &mpsc::Sender<Event>) {
    // The check may be over.
    let guest = agent.start_sandbox("check");
    let is_up = guest.is_ok();
    let _nobody_listens = tell.send(Event::Guest(guest));
    if is_up {
        let off = agent.power_off();
        drop(agent); // the agent waits with the end until its host has hung up
        let _nobody_listens = tell.send(Event::PowerOff(off));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::Mode;
    use std::fs::File;
    use std::io::Read;

    #[test]
    fn software_kvm_is_missing_and_says_what_to_do() {
        let item = kvm_item(Ok(KvmKind::Software(vec!["kvm_pvm".into()])));
        assert_eq!(item.state, State::Missing);
        assert!(
            item.text.contains("kvm_pvm") && item.text.contains("testbed"),
            "{}",
            item.text
        );
    }

    #[test]
    fn an_absent_kvm_is_missing_and_named() {
        let item = kvm_item(Err(KvmError::Absent));
        assert_eq!(item.state, State::Missing);
        assert!(item.text.contains("/dev/kvm does not exist"));
    }

    #[test]
    fn an_old_kernel_is_missing() {
        assert_eq!(kernel_item("5.10.0-8-amd64").state, State::Missing);
        assert_eq!(kernel_item("5.12.0").state, State::Ok);
        assert_eq!(kernel_item("6.1.0-18-amd64").state, State::Ok);
        assert_eq!(kernel_item("not a version").state, State::Missing);
    }

    #[test]
    fn a_cgroup_that_leaves_too_little_is_missing() {
        let gib = 1 << 30;
        assert_eq!(memory_item((4 * gib, 2 * gib), None).state, State::Ok);
        assert_eq!(
            memory_item((4 * gib, 2 * gib), Some(64 << 20)).state,
            State::Missing
        );
        let host = memory_item((4 * gib, 64 << 20), None);
        assert_eq!(host.state, State::Missing);
        assert!(host.text.contains("end other programs"), "{}", host.text);
        let cgroup = memory_item((4 * gib, 2 * gib), Some(64 << 20));
        assert!(cgroup.text.contains("raise the limit"), "{}", cgroup.text);
    }

    #[test]
    fn the_table_ends_with_the_answer() {
        let answer = Answer {
            usable: false,
            version: "0",
            items: vec![user_item(false)],
        };
        let table = table(&answer);
        assert!(table.starts_with("ok      capsid       0\n"), "{table}");
        assert!(table.ends_with("does not work on this machine\n"));
    }

    #[test]
    fn a_signal_ends_the_wait_for_an_agent_that_does_not_answer() {
        let scratch = crate::testing::Scratch::new("check");
        let (script, asked) = (scratch.path().join("script"), scratch.path().join("asked"));
        rustix::fs::mkfifoat(rustix::fs::CWD, &asked, Mode::from_raw_mode(0o600)).expect("a pipe");
        std::fs::write(&script, format!("mute {}", asked.display())).expect("writable");
        let tests = std::env::current_exe().expect("this program");
        let built = tests.ancestors().nth(2).expect("in its directory");
        let args = MachineArgs {
            vmm: Some(built.join("examples/fake-vmm")),
            kernel: Some(script.clone()),
            initramfs: Some(script),
            boot_timeout: "300".to_owned(),
            ..MachineArgs::default()
        };
        let (abort, events) = (Abort::default(), mpsc::channel());
        // Opened for both, so that neither open waits.
        let both = || File::options().read(true).write(true).open(&asked);
        let (mut pipe, mut ours) = (both().expect("a pipe"), both().expect("a pipe"));
        let (raise, tell) = (abort.clone(), events.0.clone());
        let signal = thread::spawn(move || {
            pipe.read_exact(&mut [0]).expect("the agent was asked");
            raise.raise(2);
            tell.send(Event::Signal).expect("the check listens");
            Instant::now()
        });
        let booted = boot(&args, &abort, &events);
        // Should the agent never have been asked.
        ours.write_all(b"x").expect("a pipe");
        let raised = signal.join().expect("the signal");
        assert!(matches!(booted, Err(BootError::Aborted(_))), "{booted:?}");
        assert!(raised.elapsed() < Duration::from_secs(2));
    }
}
