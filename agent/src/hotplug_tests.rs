//! A bus of ordinary files, see `hotplug.rs`.

use super::*;
use crate::error::SandboxError;
use std::sync::atomic::{AtomicU32, Ordering};

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A directory that looks like /sys/bus/pci, with a file where the kernel has an attribute.
struct Sysfs(PathBuf);

impl Sysfs {
    fn new() -> Sysfs {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("capsid-hotplug-{}-{number}", std::process::id());
        let root = std::env::temp_dir().join(name);
        fs::create_dir_all(root.join("devices")).expect("made");
        Sysfs(root)
    }

    fn put(&self, path: &str, text: &str) {
        let file = self.0.join("devices/0000:00:05.0").join(path);
        fs::create_dir_all(file.parent().expect("a parent")).expect("made");
        fs::write(file, text).expect("written");
    }

    fn with_disk() -> Sysfs {
        let sysfs = Sysfs::new();
        sysfs.put("virtio3/block/vdb/serial", "data-1");
        sysfs.put("virtio3/block/vdb/dev", "254:16\n");
        sysfs
    }

    fn bus(&self) -> PciBus {
        PciBus::at(&self.0)
    }
}

impl Drop for Sysfs {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).expect("removed");
    }
}

fn at() -> PciAddress {
    PciAddress::new(5, 0).expect("an address")
}

fn mac() -> Mac {
    Mac::try_from("02:00:00:00:00:01".to_owned()).expect("an address")
}

#[track_caller]
fn why<T: std::fmt::Debug>(result: Result<T>) -> HotplugError {
    match result {
        Err(SandboxError::Hotplug(why)) => why,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[tokio::test]
async fn a_disk_that_is_there_is_answered_with_its_name_and_number() {
    let sysfs = Sysfs::with_disk();
    let disk = sysfs.bus().attach_disk(at(), "data-1").await;
    let expected = Disk {
        name: "vdb".into(),
        major: 254,
        minor: 16,
    };
    assert_eq!(disk.expect("there"), expected);
    let asked = fs::read(sysfs.0.join("rescan")).expect("written");
    assert_eq!(asked, b"1", "the bus was looked at");
}

#[tokio::test]
async fn a_disk_with_another_id_is_refused_with_both() {
    let sysfs = Sysfs::with_disk();
    let why = why(sysfs.bus().attach_disk(at(), "data-2").await).to_string();
    assert_eq!(
        why,
        r#"the device at 0000:00:05.0 is "data-1", not "data-2""#
    );
}

#[tokio::test]
async fn where_nothing_is_nothing_is_waited_for() {
    let sysfs = Sysfs::new();
    let why = why(sysfs.bus().attach_nic(at(), mac()).await);
    assert!(matches!(why, HotplugError::NotOnBus(_)), "{why}");
}

#[tokio::test(start_paused = true)]
async fn a_device_without_a_driver_is_waited_for_and_then_refused() {
    let sysfs = Sysfs::new();
    sysfs.put("virtio3/features", "");
    let why = why(sysfs.bus().attach_disk(at(), "data-1").await).to_string();
    assert_eq!(
        why,
        "the device at 0000:00:05.0 did not become a disk within 10000 ms"
    );
}

#[tokio::test]
async fn a_network_card_is_answered_with_the_name_of_its_interface() {
    let sysfs = Sysfs::new();
    sysfs.put("virtio0/net/eth0/address", "02:00:00:00:00:01\n");
    let name = sysfs.bus().attach_nic(at(), mac()).await;
    assert_eq!(name.expect("there"), "eth0");
}

#[tokio::test]
async fn a_network_card_is_let_go_of_by_its_function() {
    let sysfs = Sysfs::new();
    sysfs.put("virtio0/net/eth0/address", "02:00:00:00:00:01\n");
    sysfs.bus().detach_nic(at(), mac()).await.expect("gone");
    let removed = fs::read(sysfs.0.join("devices/0000:00:05.0/remove"));
    assert_eq!(removed.expect("written"), b"1");
}

#[tokio::test]
async fn the_wrong_disk_is_not_let_go_of() {
    let sysfs = Sysfs::with_disk();
    let why = why(sysfs.bus().detach_disk(at(), "data-2").await);
    assert!(matches!(why, HotplugError::Another { .. }), "{why}");
    assert!(!sysfs.0.join("devices/0000:00:05.0/remove").exists());
}

#[test]
fn a_device_number_that_is_none_is_an_error() {
    let sysfs = Sysfs::with_disk();
    sysfs.put("virtio3/block/vdb/dev", "254\n");
    let function = sysfs.0.join("devices/0000:00:05.0");
    assert!(disk(&function, at(), "data-1").is_err());
}
