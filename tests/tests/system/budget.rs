//! What a VM costs, against the budget in `tests/budget.json`, which only goes down: a cost above it fails, and so does a budget
//! that is far above the cost.

use crate::hotplug::disk;
use capsid_protocol::agent::NicRequest;
use capsid_protocol::control::{NewDisk, NewNic, Reply, Request};
use capsid_protocol::machine::Mac;
use capsid_tests::bundle::Scratch;
use capsid_tests::cost::{self, SystemCalls};
use capsid_tests::guest::{Guest, context};
use capsid_tests::tap::taps;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;

/// What each is allowed to cost.
const BUDGET: &str = include_str!("../../budget.json");
/// A budget more than so many times the cost is to be lowered. Costs differ by some per cent from boot to boot, and between hosts.
const SLACK: f64 = 1.5;
/// Below this a cost is too small for such a rule.
const SMALL: u64 = 20;

fn budget(name: &str) -> Map<String, Value> {
    let budget: Value = serde_json::from_str(BUDGET).expect("tests/budget.json");
    budget[name]
        .as_object()
        .expect("a part of the budget")
        .clone()
}

/// Compares all costs with the budget of this name, and says all that is wrong at once.
fn hold(name: &str, costs: &BTreeMap<String, u64>) {
    let budget = budget(name);
    let mut wrong = Vec::new();
    for (what, cost) in costs {
        let allowed = budget.get(what).and_then(Value::as_u64);
        println!("{name}: {what}: {cost} of {allowed:?}");
        match allowed {
            None => wrong.push(format!("{what}: {cost}, and nobody allowed it")),
            Some(allowed) if *cost > allowed => {
                wrong.push(format!("{what}: {cost}, more than {allowed}"));
            }
            Some(allowed) if *cost >= SMALL && allowed as f64 > SLACK * *cost as f64 => {
                wrong.push(format!(
                    "{what}: only {cost}, so lower the budget of {allowed}"
                ));
            }
            _ => {}
        }
    }
    for what in budget.keys().filter(|what| !costs.contains_key(*what)) {
        wrong.push(format!(
            "{what}: not there any more, so take it out of the budget"
        ));
    }
    assert!(wrong.is_empty(), "{name}: {}", wrong.join("; "));
}

/// Exits to userspace of all vCPUs by reason.
fn exits(guest: &mut Guest) -> BTreeMap<String, u64> {
    let Reply::Counters(counters) = guest.control.ask(&Request::Counters, &[]) else {
        panic!("no counters");
    };
    let mut exits = BTreeMap::new();
    for (reason, count) in counters.vcpus.into_iter().flatten() {
        *exits.entry(format!("exit {reason}")).or_default() += count;
    }
    exits
}

#[test]
fn a_boot_until_the_agent_answers_costs_no_more_than_its_budget() {
    let calls = SystemCalls::count().expect("a host that traces system calls");
    let mut guest = Guest::start(1, 1, &[]);
    let pid = guest.vmm();
    let threads = cost::threads(pid).expect("its threads");
    let calls = calls.of(&threads).expect("its system calls");
    println!("system calls by number: {calls:?}");
    let mut costs = BTreeMap::from([
        ("system calls".to_owned(), calls.values().sum()),
        ("threads".to_owned(), threads.len() as u64),
        (
            "minor faults".to_owned(),
            cost::minor_faults(pid).expect("its faults"),
        ),
        (
            "KiB read".to_owned(),
            cost::bytes_read(pid).expect("its reads") >> 10,
        ),
    ]);
    costs.extend(exits(&mut guest));
    hold("boot", &costs);
}

#[test]
fn a_cpu_that_has_not_come_up_costs_a_thread_and_little_memory() {
    let mut costs = BTreeMap::new();
    for cpus_max in [8, 32] {
        let mut guest = Guest::start(1, cpus_max, &[]);
        let pid = guest.vmm();
        let mut cost = |what: &str, cost| {
            costs.insert(format!("{cpus_max} CPUs, {what}"), cost);
        };
        cost("KiB", cost::own_pss_kib(pid).expect("its mappings"));
        let threads = cost::threads(pid).expect("its threads");
        cost("threads", threads.len() as u64);
        cost("exits", exits(&mut guest).values().sum());
    }
    hold("cpus_max", &costs);
}

#[test]
fn an_idle_vmm_is_small_and_so_is_one_with_64_disks_and_4_cards() {
    let scratch = Scratch::new("budget");
    let file = File::create_new(scratch.join("disk")).expect("a file");
    file.set_len(1 << 20).expect("its size");
    // A network namespace of its own, with the tap devices in it.
    let test = move || {
        let mut guest = Guest::start(1, 1, &[]);
        let pid = guest.vmm();
        let pss = || cost::own_pss_kib(pid).expect("its mappings");
        let mut costs = BTreeMap::from([("idle, KiB".to_owned(), pss())]);
        for number in 0..64 {
            let id = format!("disk-{number}");
            let new = Request::AttachDisk(NewDisk {
                id: id.clone(),
                read_only: true,
                queues: 1,
            });
            let pci = guest.control.attach(&new, &[&file]).to_string();
            let found = guest.agent.attach_disk(context(), &disk(&pci, &id));
            found.unwrap_or_else(|error| panic!("{id}: {error}"));
        }
        for number in 0..4 {
            let taps: Vec<OwnedFd> = taps(1, 1500).expect("a tap device");
            let mac = format!("02:00:00:00:00:{number:02x}");
            let new = Request::AttachNic(NewNic {
                mac: Mac::try_from(mac.clone()).expect("an address"),
                mtu: 1500,
            });
            let pci_address = guest.control.attach(&new, &taps).to_string();
            let card = NicRequest {
                pci_address,
                mac,
                ..Default::default()
            };
            guest.agent.attach_nic(context(), &card).expect("a card");
        }
        costs.insert("with 64 disks and 4 cards, KiB".to_owned(), pss());
        costs
    };
    let costs = std::thread::spawn(test).join().expect("the test");
    hold("memory", &costs);
}
