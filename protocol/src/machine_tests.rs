//! What a configuration may and may not say, see `machine.rs`.

use super::*;
use proptest::prelude::*;

fn example() -> MachineConfig {
    MachineConfig::from_json(
        br#"{"version":1,"id":"pod-1","cpus":2,"memory_mib":128,"kernel_fd":3,"initramfs_fd":4,
            "vsock":{"owner_fd":5,"guest_may_dial":[{"port":1024,"connections":1}]},
            "shares":[{"tag":"capsid","tree_fd":6}],"jail":{"uid":1000,"gid":1000}}"#,
    )
    .expect("the example is valid")
}

fn refused(change: impl FnOnce(&mut MachineConfig)) -> String {
    let mut config = example();
    change(&mut config);
    config.to_json().expect_err("must be refused").to_string()
}

#[test]
fn the_example_reads_back() {
    let json = example().to_json().expect("valid");
    assert_eq!(MachineConfig::from_json(&json).expect("valid"), example());
}

#[test]
fn an_unknown_field_is_refused_by_name() {
    let json = br#"{"version":1,"id":"a","cpus":1,"memory_mib":64,"kernel_fd":3,
        "jail":{"uid":1,"gid":1},"kernel_path":"/boot"}"#;
    let error = MachineConfig::from_json(json).expect_err("unknown field");
    let source = std::error::Error::source(&error)
        .expect("has a cause")
        .to_string();
    assert!(source.contains("kernel_path"), "{source}");
}

#[test]
fn numbers_out_of_range_are_refused() {
    for (field, value) in [
        ("cpus", "0"),
        ("cpus", "33"),
        ("memory_mib", "63"),
        ("memory_mib", "524289"),
        ("kernel_fd", "2"),
    ] {
        let json = format!(
            r#"{{"version":1,"id":"a","cpus":{},"memory_mib":{},"kernel_fd":{},"jail":{{"uid":1,"gid":1}}}}"#,
            if field == "cpus" { value } else { "1" },
            if field == "memory_mib" { value } else { "64" },
            if field == "kernel_fd" { value } else { "3" },
        );
        assert!(
            MachineConfig::from_json(json.as_bytes()).is_err(),
            "{field} {value}"
        );
    }
}

#[test]
fn a_machine_has_as_many_cpus_as_come_up_unless_it_says_more() {
    let cpus = |count| Cpus::try_from(count).expect("cpus");
    let mut config = example();
    assert_eq!(config.cpus_present(), cpus(2));
    config.cpus_max = Some(cpus(32));
    assert_eq!(config.cpus_present(), cpus(32));
    let json = config.to_json().expect("valid");
    assert_eq!(MachineConfig::from_json(&json).expect("valid"), config);
}

#[test]
fn fewer_cpus_than_come_up_are_refused() {
    assert_eq!(
        refused(|c| c.cpus_max = Some(Cpus::try_from(1).expect("cpus"))),
        "cpus_max is 1, and 2 cpus come up at boot"
    );
}

#[test]
fn one_fd_for_two_things_is_refused() {
    assert_eq!(
        refused(|c| c.initramfs_fd = Some(c.kernel_fd)),
        "fd 3 is named twice"
    );
}

#[test]
fn a_jail_that_keeps_root_is_refused() {
    assert_eq!(
        refused(|c| c.jail.uid = 0),
        "jail uid and gid must not be 0"
    );
}

#[test]
fn an_id_that_is_a_path_is_refused() {
    assert!(refused(|c| c.id = "../x".into()).contains("is not 1 to 64"));
    assert!(refused(|c| c.id = "..".into()).contains("is not 1 to 64"));
}

#[test]
fn a_command_line_with_a_newline_is_refused() {
    assert!(refused(|c| c.cmdline = "quiet\ninit=/bin/sh".into()).contains("command line"));
}

#[test]
fn a_tag_used_twice_is_refused() {
    assert!(
        refused(|c| c.shares.push(ShareConfig {
            tag: "capsid".into(),
            tree_fd: FdNumber(9)
        }))
        .contains("used twice")
    );
}

#[test]
fn an_address_is_six_bytes_of_one_station() {
    let mac = |text: &str| Mac::try_from(text.to_owned());
    let own = mac("02:0a:FF:00:00:01").expect("an address");
    assert_eq!(own.bytes(), [2, 10, 255, 0, 0, 1]);
    assert_eq!(String::from(own), "02:0a:ff:00:00:01");
    for bad in [
        "",
        "02:00:00:00:00",
        "02:00:00:00:00:01:02",
        "02:00:00:00:00:1",
        "02:00:00:00:00:+1",
        "02-00-00-00-00-01",
        "01:00:5e:00:00:01",
        "ff:ff:ff:ff:ff:ff",
        "00:00:00:00:00:00",
    ] {
        assert!(mac(bad).is_err(), "{bad}");
    }
}

#[test]
fn network_cards_that_a_vm_cannot_have_are_refused() {
    let nic = |last: u8, fds: std::ops::Range<i64>| NicConfig {
        tap_fds: fds
            .map(|fd| FdNumber::try_from(fd).expect("a number"))
            .collect(),
        mac: Mac([2, 0, 0, 0, 0, last]),
        mtu: 1500,
    };
    assert!(refused(|c| c.nics.push(nic(1, 9..9))).contains("not 0"));
    assert!(refused(|c| c.nics.push(nic(1, 9..26))).contains("not 17"));
    assert_eq!(
        refused(|c| c.nics.push(nic(1, 3..4))),
        "fd 3 is named twice"
    );
    let twice = refused(|c| c.nics.extend([nic(1, 9..10), nic(1, 10..11)]));
    assert!(twice.contains("02:00:00:00:00:01"), "{twice}");
    let small = NicConfig {
        mtu: 67,
        ..nic(1, 9..10)
    };
    assert!(refused(|c| c.nics.push(small)).contains("at least 68"));
    let all = || (0..=NICS_MAX as u8).map(|n| nic(n, 9 + i64::from(n)..10 + i64::from(n)));
    assert!(refused(|c| c.nics.extend(all())).contains("at most 16"));
    let mut config = example();
    config.nics.extend(all().take(NICS_MAX));
    let json = config.to_json().expect("valid");
    assert_eq!(MachineConfig::from_json(&json).expect("valid"), config);
}

#[test]
fn disks_that_a_vm_cannot_have_are_refused() {
    let disk = |id: &str, fd: i64| DiskConfig {
        fd: FdNumber::try_from(fd).expect("a number"),
        id: id.into(),
        read_only: false,
        queues: 1,
    };
    for id in ["", "a/b", "123456789012345678901"] {
        assert!(refused(|c| c.disks.push(disk(id, 9))).contains("disk id"));
    }
    let twice = refused(|c| c.disks.extend([disk("data", 9), disk("data", 10)]));
    assert!(twice.contains("used twice"), "{twice}");
    assert_eq!(
        refused(|c| c.disks.push(disk("data", 3))),
        "fd 3 is named twice"
    );
    for queues in [0, 17] {
        let many = DiskConfig {
            queues,
            ..disk("data", 9)
        };
        assert!(refused(|c| c.disks.push(many)).contains("a disk has 1 to 16"));
    }
    let all = || (0..=DISKS_MAX).map(|n| disk(&format!("disk-{n}"), 9 + n as i64));
    assert!(refused(|c| c.disks.extend(all())).contains("at most 64"));
    let mut config = example();
    config.disks.extend(all().take(DISKS_MAX));
    let json = config.to_json().expect("valid");
    assert_eq!(MachineConfig::from_json(&json).expect("valid"), config);
}

proptest! {
    #[test]
    fn any_bytes_are_parsed_or_refused(json: Vec<u8>) {
        let _either = MachineConfig::from_json(&json);
    }
}

#[test]
fn a_balloon_leaves_the_guest_what_it_runs_with() {
    let error = refused(|config| config.balloon_mib = 65);
    assert_eq!(
        error,
        "a balloon of 65 MiB leaves less than 64 of 128 MiB of memory"
    );
    let mut config = example();
    config.balloon_mib = 64;
    config.to_json().expect("valid");
}

#[test]
fn the_most_memory_is_no_less_than_that_at_the_start_and_what_is_plugged() {
    let max = |mib| MemoryMib::try_from(mib).ok();
    for (most, plug) in [(Some(127), 0), (None, 1), (Some(192), 65), (None, u64::MAX)] {
        let error = refused(|config| {
            config.memory_max_mib = most.and_then(max);
            config.plug_mib = plug;
        });
        assert!(error.starts_with("128 MiB of memory and"), "{error}");
    }
    let mut config = example();
    config.memory_max_mib = max(192);
    config.plug_mib = 64;
    let json = config.to_json().expect("valid");
    assert_eq!(MachineConfig::from_json(&json).expect("valid"), config);
}
