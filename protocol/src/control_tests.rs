use super::*;
use proptest::prelude::*;

fn read(json: &str, fds: usize) -> Result<Request, String> {
    Request::from_json(json.as_bytes(), fds).map_err(|error| {
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error}: {}", cause.unwrap_or_default())
    })
}

fn mac(text: &str) -> Mac {
    Mac::try_from(text.to_owned()).unwrap()
}

#[test]
fn every_request_reads_back() {
    let requests = [
        (Request::State, 0),
        (Request::Counters, 0),
        (
            Request::AttachDisk(NewDisk {
                id: "data".to_owned(),
                read_only: true,
                queues: 16,
            }),
            1,
        ),
        (
            Request::DetachDisk {
                id: "data".to_owned(),
            },
            0,
        ),
        (
            Request::AttachNic(NewNic {
                mac: mac("02:00:00:00:00:01"),
                mtu: 1500,
            }),
            16,
        ),
        (
            Request::DetachNic {
                mac: mac("02:00:00:00:00:01"),
            },
            0,
        ),
        (
            Request::SetLink {
                mac: mac("02:00:00:00:00:01"),
                up: false,
            },
            0,
        ),
        (
            Request::Resize {
                memory_mib: MemoryMib::try_from(512).unwrap(),
            },
            0,
        ),
        (Request::Pause, 0),
        (Request::Resume, 0),
        (Request::Stop, 0),
    ];
    for (request, fds) in requests {
        let frame = request.to_frame().unwrap();
        let (length, json) = frame.split_first_chunk().unwrap();
        let length = FrameLength::decode(*length, REQUEST_MAX_BYTES).unwrap();
        assert_eq!(length.get(), json.len());
        assert_eq!(Request::from_json(json, fds).unwrap(), request);
    }
}

#[test]
fn a_request_needs_its_fds_and_no_others() {
    let disk = r#"{"attach_disk":{"id":"data"}}"#;
    assert!(read(disk, 1).is_ok());
    assert!(read(disk, 0).unwrap_err().contains("0 fds, expected 1"));
    assert!(read(disk, 2).unwrap_err().contains("2 fds, expected 1"));
    let nic = r#"{"attach_nic":{"mac":"02:00:00:00:00:01","mtu":1500}}"#;
    assert!(read(nic, 0).unwrap_err().contains("1 to 16"));
    assert!(read(nic, 17).unwrap_err().contains("1 to 16"));
    assert!(read(r#""stop""#, 1).unwrap_err().contains("expected none"));
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    for (json, named) in [
        (r#"{"attach_disk":{"id":"a/b"}}"#, "a/b"),
        (r#"{"attach_disk":{"id":"a","queues":17}}"#, "17 queues"),
        (r#"{"attach_disk":{"id":"a","path":"/etc"}}"#, "path"),
        (r#"{"detach_disk":{"id":""}}"#, "disk id"),
        (
            r#"{"attach_nic":{"mac":"02:00:00:00:00:01","mtu":67}}"#,
            "67",
        ),
        (
            r#"{"set_link":{"mac":"01:00:00:00:00:01","up":true}}"#,
            "01:00",
        ),
        (r#"{"resize":{"memory_mib":63}}"#, "63 MiB"),
        (r#""reboot""#, "reboot"),
        ("", "not valid"),
        (r#""stop" "stop""#, "trailing"),
    ] {
        let refused = read(json, usize::from(json.contains("attach"))).unwrap_err();
        assert!(refused.contains(named), "{json}: {refused}");
    }
}

#[test]
fn a_frame_has_a_length_from_1_to_its_limit() {
    let length = |length: u32| FrameLength::decode(length.to_le_bytes(), 4096);
    assert_eq!(length(1).unwrap().get(), 1);
    assert_eq!(length(4096).unwrap().get(), 4096);
    for none in [0, 4097, u32::MAX] {
        assert_eq!(length(none).unwrap_err().length, none);
    }
    assert!(frame(&[], 4096).is_err());
    assert!(frame(&[0; 4097], 4096).is_err());
}

#[test]
fn a_pci_address_is_its_name_in_sysfs() {
    let text = |slot, function| PciAddress::new(slot, function).map(|place| place.to_string());
    assert_eq!(text(31, 7).unwrap(), "0000:00:1f.7");
    assert!(text(0, 0).is_err() && text(32, 0).is_err() && text(1, 8).is_err());
    for none in [
        "0000:00:1F.7",
        "0000:00:5.0",
        "0000:01:05.0",
        "0000:00:05.8",
        "00:05.0",
        "0000:00:+5.0",
        "",
    ] {
        assert!(PciAddress::try_from(none.to_owned()).is_err(), "{none}");
    }
}

#[test]
fn the_largest_counters_fit_into_a_reply() {
    let counts: BTreeMap<String, u64> = (0..16)
        .map(|number| (format!("a_counter_with_a_name_{number}"), u64::MAX))
        .collect();
    let devices = machine::DISKS_MAX + machine::NICS_MAX + machine::SHARES_MAX + 8;
    let counters = MachineCounters {
        vcpus: vec![counts.clone(); usize::from(Cpus::MAX)],
        devices: (0..devices)
            .map(|number| (format!("virtio-blk/{number:020}"), counts.clone()))
            .collect(),
    };
    assert!(Reply::Counters(counters).to_frame().is_ok());
}

proptest! {
    #[test]
    fn any_bytes_are_a_request_or_refused(json: Vec<u8>, fds in 0usize..20) {
        if let Ok(request) = Request::from_json(&json, fds) {
            prop_assert!(request.to_frame().is_ok());
        }
    }

    #[test]
    fn pci_addresses_read_back(slot in 1u8..32, function in 0u8..8) {
        let address = PciAddress::new(slot, function).unwrap();
        prop_assert_eq!(PciAddress::try_from(address.to_string()), Ok(address));
    }

    #[test]
    fn any_text_is_an_address_or_refused(text: String) {
        if let Ok(address) = PciAddress::try_from(text.clone()) {
            prop_assert_eq!(address.to_string(), text);
        }
    }
}
