//! Disks, as Linux in the guest sees them and as the host finds them afterwards.

use capsid_tests::bundle::Scratch;
use capsid_tests::ledger::Ledger;
use capsid_tests::vmm::{Disk, Ended, Guest, run_script};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

/// The guest powered itself off.
const POWERED_OFF: i32 = 0;
const MIB: usize = 1 << 20;

/// A new file to be a disk.
fn file(scratch: &Scratch, name: &str, bytes: usize) -> File {
    new_file(&scratch.join(name), bytes)
}

pub(crate) fn new_file(path: &str, bytes: usize) -> File {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true);
    let file = file.open(path).expect("a file");
    file.set_len(bytes as u64).expect("its size");
    file
}

pub(crate) fn disk<'a>(id: &'a str, file: &'a File) -> Disk<'a> {
    Disk {
        id,
        file,
        read_only: false,
        queues: 1,
    }
}

#[track_caller]
fn said(ended: &Ended) -> Vec<&str> {
    assert_eq!(ended.code, POWERED_OFF, "{ended:?}");
    ended.said.iter().map(String::as_str).collect()
}

#[track_caller]
pub(crate) fn on_host(program: &str, args: &[&str]) -> String {
    let output = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
    text
}

#[test]
fn a_file_system_on_a_disk_is_the_same_in_the_guest_and_on_the_host() {
    let scratch = Scratch::new("disk");
    let data = file(&scratch, "data", 32 * MIB);
    let at = scratch.join("data");
    on_host("mke2fs", &["-q", "-F", "-t", "ext4", &at]);
    let ended = run_script(
        "mount -t ext4 -o discard /dev/vda /mnt && head -c 3000000 /dev/urandom > /mnt/big && \
         say $(md5sum < /mnt/big) && cp /mnt/big /mnt/gone && sync && rm /mnt/gone && fstrim /mnt && \
         echo hello > /mnt/greeting && umount /mnt && say unmounted\n\
         mount -t ext4 -o ro /dev/vda /mnt && say $(md5sum < /mnt/big) && umount /mnt\n\
         say $(cat /sys/block/vda/serial) $(cat /sys/block/vda/ro) $(cat /sys/block/vda/queue/logical_block_size) \
             $(cat /sys/block/vda/queue/write_cache) $(ls /sys/block/vda/mq | wc -w)",
        2,
        &[Disk {
            queues: 2,
            ..disk("data-1", &data)
        }],
        &[],
    );
    let said = said(&ended);
    assert_eq!(said.len(), 4, "{ended:?}");
    assert_eq!((said[1], said[0]), ("unmounted", said[2]));
    assert_eq!(said[3], "data-1 0 512 write back 2");
    on_host("e2fsck", &["-f", "-n", &at]);
    let greeting = on_host("debugfs", &["-R", "cat /greeting", &at]);
    assert_eq!(greeting, "hello\n");
}

/// Where a host says whether there is io_uring: 2 is for nobody.
const IO_URING_DISABLED: &str = "/proc/sys/kernel/io_uring_disabled";

/// No io_uring for anybody, until this is dropped.
pub(crate) struct NoRing(String);

impl NoRing {
    pub(crate) fn new() -> std::io::Result<NoRing> {
        let before = std::fs::read_to_string(IO_URING_DISABLED)?;
        std::fs::write(IO_URING_DISABLED, "2")?;
        Ok(NoRing(before))
    }
}

impl Drop for NoRing {
    fn drop(&mut self) {
        std::fs::write(IO_URING_DISABLED, &self.0).expect("as it was");
    }
}

#[test]
fn a_host_without_io_uring_has_disks_as_well() {
    let _no_ring = match NoRing::new() {
        Ok(no_ring) => no_ring,
        Err(error) => {
            eprintln!("SKIPPED a_host_without_io_uring: {IO_URING_DISABLED}: {error}");
            return;
        }
    };
    let scratch = Scratch::new("disk-threads");
    let data = file(&scratch, "data", 8 * MIB);
    let ended = run_script(
        "dd if=/dev/urandom of=/tmp.bin bs=1M count=6 2>/dev/null; dd if=/tmp.bin of=/dev/vda bs=256k oflag=direct conv=fsync 2>/dev/null\n\
         say $(dd if=/dev/vda bs=1M count=6 iflag=direct 2>/dev/null | cmp - /tmp.bin && echo same)",
        2,
        &[disk("data", &data)],
        &[],
    );
    assert_eq!(said(&ended), ["same"]);
}

#[test]
fn a_read_only_disk_cannot_be_written_and_is_unchanged() {
    let scratch = Scratch::new("disk-ro");
    drop(file(&scratch, "data", MIB));
    let data = File::open(scratch.join("data")).expect("for reading alone");
    let ended = run_script(
        "say $(cat /sys/block/vda/ro)\n\
         blockdev --setrw /dev/vda; echo spoilt > /dev/vda || say refused",
        1,
        &[Disk {
            read_only: true,
            ..disk("data", &data)
        }],
        &[],
    );
    assert_eq!(said(&ended), ["1", "refused"]);
    assert!(
        std::fs::read(scratch.join("data"))
            .expect("there")
            .iter()
            .all(|byte| *byte == 0)
    );
}

#[test]
fn what_begins_like_an_image_of_another_form_is_a_disk_of_these_bytes() {
    let scratch = Scratch::new("disk-magic");
    // qcow2 with a backing file (GHSA-jmr4-g2hv-mjj6), VMDK, VHD and VHDX.
    let mut qcow2 = b"QFI\xfb\0\0\0\x02\0\0\0\0\0\0\0\x48\0\0\0\x0b".to_vec();
    qcow2.resize(0x48, 0);
    qcow2.extend(b"/etc/shadow");
    let heads = [&qcow2[..], b"KDMV", b"conectix", b"vhdxfile"];
    let files = heads.map(|head| {
        let name = String::from_utf8_lossy(&head[..3]).into_owned();
        let file = file(&scratch, &name, MIB);
        file.write_all_at(head, 0).expect("written");
        file
    });
    let disks = files.each_ref().map(|file| disk("image", file));
    let disks = ["a", "b", "c", "d"].iter().zip(disks);
    let disks: Vec<_> = disks.map(|(id, disk)| Disk { id, ..disk }).collect();
    let ended = run_script(
        "for disk in vda vdb vdc vdd; do \
             say $(cat /sys/block/$disk/size) $(head -c 3 /dev/$disk) $(grep -c root: /dev/$disk); \
         done",
        1,
        &disks,
        &[],
    );
    let expected = ["2048 QFI 0", "2048 KDM 0", "2048 con 0", "2048 vhd 0"];
    assert_eq!(said(&ended), expected);
}

#[test]
fn a_broken_file_system_is_an_error_in_the_guest_and_nothing_to_the_vmm() {
    let scratch = Scratch::new("disk-broken");
    // The superblock is at 1 KiB; groups, inodes and the journal follow.
    let broken = [("head", 1024..2048), ("groups", 4096..2 * MIB)];
    let files = broken.map(|(name, range)| {
        let file = file(&scratch, name, 8 * MIB);
        on_host("mke2fs", &["-q", "-F", "-t", "ext4", &scratch.join(name)]);
        file.write_all_at(&vec![0x5a; range.len()], range.start as u64)
            .expect("written");
        file
    });
    let disks = [disk("head", &files[0]), disk("groups", &files[1])];
    let ended = run_script(
        "for disk in vda vdb; do mount -t ext4 /dev/$disk /mnt 2>/dev/null || say refused $disk; done; say on",
        1,
        &disks,
        &[],
    );
    assert_eq!(said(&ended), ["refused vda", "refused vdb", "on"]);
    assert_eq!(ended.stderr, "");
}

#[test]
fn sixty_four_disks_are_there_in_their_order() {
    let scratch = Scratch::new("disks");
    let files: Vec<(String, File)> = (0..64)
        .map(|number| {
            let name = format!("disk-{number:02}");
            let file = file(&scratch, &name, MIB);
            file.write_all_at(name.as_bytes(), 4096).expect("written");
            (name, file)
        })
        .collect();
    let disks: Vec<_> = files.iter().map(|(name, file)| disk(name, file)).collect();
    let before = Ledger::now();
    let ended = run_script(
        "for disk in $(cd /sys/block && echo vd? vd??); do \
             say $(cat /sys/block/$disk/serial) $(dd if=/dev/$disk bs=4096 skip=1 count=1 2>/dev/null | head -c 7); \
         done",
        1,
        &disks,
        &[],
    );
    let expected: Vec<String> = files
        .iter()
        .map(|(name, _)| format!("{name} {name}"))
        .collect();
    assert_eq!(said(&ended), expected);
    before.balances();
}

/// A file system in memory with room for 4 MiB, until this is dropped.
struct Full(String);

impl Full {
    fn new(scratch: &Scratch) -> Full {
        let at = scratch.join("full");
        std::fs::create_dir(&at).expect("a directory");
        on_host("mount", &["-t", "tmpfs", "-o", "size=4m", "full", &at]);
        Full(at)
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        on_host("umount", &[&self.0]);
    }
}

/// What the VMM said of its disks.
fn faults(ended: &Ended) -> Vec<&str> {
    let lines = ended.stderr.lines();
    lines.filter(|line| line.contains("disk \"")).collect()
}

#[test]
fn a_host_without_room_is_an_error_in_the_guest_and_one_line() {
    let scratch = Scratch::new("disk-full");
    let full = Full::new(&scratch);
    let options = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .clone();
    let data = options.open(format!("{}/data", full.0)).expect("a file");
    data.set_len(16 << 20).expect("its size");
    let ended = run_script(
        "for n in 1 2 3 4 5 6 7 8; do dd if=/bin/busybox of=/dev/vda bs=1M seek=$n count=1 oflag=direct 2>/dev/null || echo; done | wc -l > /failed\n\
         say $(test $(cat /failed) -ge 3 && echo refused)\n\
         say $(dd if=/dev/vda bs=1M count=1 iflag=direct 2>/dev/null | wc -c)",
        1,
        &[disk("data", &data)],
        &[],
    );
    drop((data, full));
    assert_eq!(said(&ended), ["refused", "1048576"]);
    let faults = faults(&ended);
    assert!(!faults.is_empty() && faults.len() <= 3, "{faults:?}");
    assert!(
        faults[0].contains("disk \"data\": No space left"),
        "{faults:?}"
    );
}

#[test]
fn a_file_that_is_cut_short_or_taken_away_meanwhile_is_no_end_of_the_vm() {
    let scratch = Scratch::new("disk-cut");
    let (cut, gone) = (file(&scratch, "cut", 4 * MIB), file(&scratch, "gone", MIB));
    let disks = [disk("cut", &cut), disk("gone", &gone)];
    let guest = Guest {
        script: "say up; until [ \"$(dd if=/dev/vdb bs=512 count=1 iflag=direct 2>/dev/null | head -c 2)\" = go ]; do usleep 20000; done\n\
                 dd if=/dev/vda bs=1M skip=2 count=1 iflag=direct 2>/dev/null | wc -c > /read; say $(cat /read)\n\
                 dd if=/dev/vda of=/dev/null bs=1M count=1 iflag=direct 2>/dev/null && say still there\n\
                 dd if=/bin/busybox of=/dev/vdb bs=512 seek=1 count=1 oflag=direct 2>/dev/null && say written",
        disks: &disks,
        ..Guest::default()
    };
    let mut running = guest.start();
    running.until_it_says("up");
    cut.set_len(MIB as u64).expect("cut");
    std::fs::remove_file(scratch.join("gone")).expect("taken away");
    gone.write_all_at(b"go", 0).expect("written");
    let ended = running.end();
    assert_eq!(said(&ended), ["up", "0", "still there", "written"]);
    let faults = faults(&ended);
    assert_eq!(faults.len(), 1, "{}", ended.stderr);
    assert!(
        faults[0].contains("disk \"cut\": its file ends before the disk does"),
        "{faults:?}"
    );
}
