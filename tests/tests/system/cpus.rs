//! CPUs that are present and come up when the owner says so, as containers see them.

use capsid_protocol::agent::OnlineCpusRequest;
use capsid_tests::guest::{Guest, context};
use capsid_tests::ledger::Ledger;
use std::fs;

fn online(guest: &Guest, count: u32) -> ttrpc::Result<u32> {
    let request = OnlineCpusRequest {
        count,
        ..Default::default()
    };
    let answer = guest.agent.online_cpus(context(), &request);
    answer.map(|answer| answer.online_cpus)
}

/// CPU time of the thread of a vCPU on the host, in clock ticks (proc(5), /proc/PID/stat, utime and stime).
fn ticks(guest: &Guest, vcpu: u32) -> u64 {
    let tasks = fs::read_dir(format!("/proc/{}/task", guest.vmm())).expect("the VMM runs");
    let stat = tasks
        .map(|task| task.expect("a thread").path().join("stat"))
        .filter_map(|stat| fs::read_to_string(stat).ok())
        .find(|stat| stat.contains(&format!("(vcpu{vcpu})")))
        .expect("a thread of that name");
    let (_, fields) = stat.rsplit_once(") ").expect("a name");
    let fields: Vec<&str> = fields.split(' ').collect();
    // The state, the first of these, is the third field; utime is the 14th.
    let field = |number: usize| fields[number - 3].parse::<u64>().expect("a number");
    field(14) + field(15)
}

/// What a CPU that waits may be charged with by the host's clock, in ticks: the bring-up of the others takes hundreds.
const TICKS_MAX: u64 = 5;

#[test]
fn cpus_come_up_and_go_down_when_the_owner_says_so_and_containers_have_them() {
    let before = Ledger::now();
    let mut guest = Guest::start(1, 4, &[]);
    assert_eq!(guest.hello.online_cpus, 1);
    guest.sleeper("c1");
    assert_eq!(guest.exec("c1", "nproc"), "1");
    let waiting: Vec<u64> = (1..4).map(|vcpu| ticks(&guest, vcpu)).collect();

    assert_eq!(online(&guest, 3).expect("two come up"), 3);
    assert_eq!(guest.exec("c1", "nproc"), "3");
    let init = "grep -h Cpus_allowed_list /proc/1/status; cat /sys/devices/system/cpu/online";
    let seen = guest.exec("c1", init);
    assert!(seen.ends_with("\n0-2"), "{seen}");
    let spent = ticks(&guest, 3) - waiting[2];
    assert!(spent <= TICKS_MAX, "a CPU that waits cost {spent} ticks");

    assert_eq!(online(&guest, 1).expect("two go down"), 1);
    assert_eq!(guest.exec("c1", "nproc"), "1");
    assert_eq!(online(&guest, 4).expect("all come up"), 4);
    assert_eq!(guest.exec("c1", "nproc"), "4");

    for count in [0, 5] {
        match online(&guest, count) {
            Err(ttrpc::Error::RpcStatus(status)) => {
                assert_eq!(status.code(), ttrpc::Code::INVALID_ARGUMENT);
                assert!(status.message.contains("1 to 4 can be"), "{status:?}");
            }
            other => panic!("{count} CPUs: {other:?}"),
        }
    }
    drop(guest);
    before.balances();
}
