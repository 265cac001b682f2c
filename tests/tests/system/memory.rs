//! Memory that a guest does not use goes back to the host, by itself or because it was asked for.

use capsid_tests::vmm::{Guest, Running};
use std::time::{Duration, Instant};

/// The guest powered itself off.
const POWERED_OFF: i32 = 0;
/// How long the host waits for memory, in s. Linux reports what is free 2 s after it was freed (PAGE_REPORTING_DELAY).
const GIVEN_BACK_S: u64 = 30;
/// Between two looks at the memory of the VMM, in ms.
const LOOK_MS: u64 = 50;

/// Waits until the VMM holds at most `most` MiB.
#[track_caller]
fn shrinks_to(running: &Running, most: u64) {
    let deadline = Instant::now() + Duration::from_secs(GIVEN_BACK_S);
    let mut held = running.resident_mib();
    while held > most {
        assert!(Instant::now() < deadline, "{held} MiB, not {most}");
        std::thread::sleep(Duration::from_millis(LOOK_MS));
        held = running.resident_mib();
    }
}

#[test]
fn what_the_guest_frees_is_soon_the_hosts_again() {
    let guest = Guest {
        script: "dd if=/dev/zero of=/big bs=1M count=200 2>/dev/null; say used\n\
                 rm /big; say freed\n\
                 sleep 1000",
        memory_mib: 512,
        ..Guest::default()
    };
    let mut running = guest.start();
    running.until_it_says("used");
    let used = running.resident_mib();
    assert!(used > 200, "{used} MiB");
    running.until_it_says("freed");
    shrinks_to(&running, used - 180);
}

#[test]
fn a_balloon_takes_memory_and_gives_it_back_before_the_guest_kills_for_it() {
    let guest = Guest {
        script: "free() { sed -n 's/^MemFree: *\\([0-9]*\\) kB$/\\1/p' /proc/meminfo; }\n\
                 until [ $(free) -lt 204800 ]; do usleep 10000; done; say taken\n\
                 mount -t tmpfs -o size=400m big /mnt\n\
                 dd if=/dev/zero of=/mnt/big bs=1M count=360 2>/dev/null; say $(wc -c < /mnt/big)",
        memory_mib: 512,
        balloon_mib: 300,
        ..Guest::default()
    };
    let ended = guest.start().end();
    assert_eq!(ended.code, POWERED_OFF, "{ended:?}");
    assert_eq!(ended.said, ["taken", "377487360"], "{ended:?}");
}

#[test]
fn memory_is_plugged_as_it_was_asked_for_and_used() {
    let guest = Guest {
        script: "total() { sed -n 's/^MemTotal: *\\([0-9]*\\) kB$/\\1/p' /proc/meminfo; }\n\
                 until [ $(total) -gt 716800 ]; do usleep 10000; done; say plugged\n\
                 mount -t tmpfs -o size=500m big /mnt\n\
                 dd if=/dev/zero of=/mnt/big bs=1M count=450 2>/dev/null; say $(wc -c < /mnt/big)\n\
                 sleep 1000",
        memory_mib: 256,
        plug_mib: 512,
        ..Guest::default()
    };
    let mut running = guest.start();
    running.until_it_says("plugged");
    running.until_it_says("471859200");
    let held = running.resident_mib();
    assert!((450..768).contains(&held), "{held} MiB");
}
