//! Many files with few descriptors, and requests that the host holds up.

use super::*;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::UnshareFlags;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// How the names begin in the test that counts its descriptors. Other tests run in this process at the same time, and none may use it.
const HUNDRED_THOUSAND: &str = "hundred-thousand-";

/// Descriptors of the share's threads for files of this name. Each task of this process has a table, many of them the same one.
fn open_named(part: &str) -> usize {
    let below = |entry: std::io::Result<std::fs::DirEntry>| {
        let target = std::fs::read_link(entry.ok()?.path()).ok()?;
        // Inside the share's mount namespace the paths begin at its root, so there the name must do.
        let text = target.to_str()?;
        text.contains(part).then_some(())
    };
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let tables = tasks.filter_map(|task| std::fs::read_dir(task.ok()?.path().join("fd")).ok());
    let open = tables.map(|table| table.filter_map(below).count());
    open.max().unwrap()
}

#[test]
fn a_hundred_thousand_files_are_listed_and_read_within_the_budget() {
    needs_root!();
    const DIRS: usize = 400;
    const FILES: usize = 250;
    let dir = Dir::in_memory();
    for number in 0..DIRS {
        let sub = dir.path(&format!("{HUNDRED_THOUSAND}{number}"));
        std::fs::create_dir(&sub).unwrap();
        for file in 0..FILES {
            std::fs::File::create(sub.join(format!("{HUNDRED_THOUSAND}{file}"))).unwrap();
        }
    }
    let mut guest = Guest::mounted(&dir);
    let subs = guest.list(1, true, 65_536).unwrap();
    let mut files = 0;
    for (name, node) in subs.iter().filter(|(name, _)| !name.starts_with('.')) {
        let listed = guest.list(*node, true, 65_536).unwrap();
        files += listed.len() - 2;
        // Open one of each, by its node alone, after its directory's descriptor was evicted.
        let (_, file) = listed
            .iter()
            .find(|(name, _)| !name.starts_with('.'))
            .unwrap();
        let fh = guest
            .open(*file, libc::O_RDONLY)
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        guest.release(opcode::RELEASE, *file, fh).unwrap();
    }
    assert_eq!(files, DIRS * FILES);
    let session = guest.pool.facts().session().unwrap();
    assert_eq!(session.table().len(), 1 + DIRS + DIRS * FILES);
    let kept = session.table().open_count();
    assert!(kept <= FD_BUDGET_MIN / 4, "{kept} descriptors kept");
    let open = open_named(HUNDRED_THOUSAND);
    assert!((1..=FD_BUDGET_MIN).contains(&open), "{open}");
    // The first ones are still there, though nothing has held them open for long.
    let first = subs
        .iter()
        .find(|(name, _)| *name == format!("{HUNDRED_THOUSAND}0"))
        .unwrap()
        .1;
    assert!(guest.getattr(first).is_ok());
    drop(session);
    guest.driver.reset();
    assert_eq!(open_named(HUNDRED_THOUSAND), 0);
}

#[test]
fn open_files_have_a_budget_and_come_back_to_it() {
    needs_root!();
    let dir = Dir::new();
    dir.write("many-file", b"x");
    let mut guest = Guest::mounted(&dir);
    let node = guest.lookup(1, "many-file").unwrap().node;
    let budget = FD_BUDGET_MIN - FD_BUDGET_MIN / 4;
    let open: Vec<u64> = (0..budget)
        .map(|_| guest.open(node, libc::O_RDONLY).unwrap())
        .collect();
    assert_eq!(guest.open(node, libc::O_RDONLY), Err(libc::ENFILE));
    assert_eq!(guest.opendir(1), Err(libc::ENFILE));
    assert_eq!(guest.create(1, "new", 0o600).unwrap_err(), libc::ENFILE);
    assert!(!dir.path("new").exists());
    for fh in open {
        guest.release(opcode::RELEASE, node, fh).unwrap();
    }
    assert!(guest.open(node, libc::O_RDONLY).is_ok());
}

#[test]
fn removed_files_cannot_take_the_whole_budget() {
    needs_root!();
    let dir = Dir::new();
    let mut guest = Guest::mounted(&dir);
    let mut nodes = Vec::new();
    for number in 0..FD_BUDGET_MIN {
        let file = format!("many-{number}");
        let (made, fh) = guest.create(1, &file, 0o600).unwrap();
        guest.release(opcode::RELEASE, made.node, fh).unwrap();
        guest.ask(opcode::UNLINK, 1, &name(&file), 0).unwrap();
        nodes.push(made.node);
    }
    let session = guest.pool.facts().session().unwrap();
    assert!(session.table().open_count() <= FD_BUDGET_MIN / 4);
    assert!(guest.getattr(nodes[0]).is_ok(), "the first ones are kept");
    let gone = nodes
        .iter()
        .filter(|node| guest.getattr(**node) == Err(libc::ESTALE))
        .count();
    assert!(gone >= FD_BUDGET_MIN - FD_BUDGET_MIN / 4, "{gone} gone");
    for node in nodes {
        guest.forget(node, 1);
    }
    assert_eq!(session.table().len(), 1);
    assert_eq!(session.table().open_count(), 1);
}

#[test]
fn a_directory_tree_deeper_than_a_path_is_served() {
    needs_root!();
    let dir = Dir::new();
    let mut guest = Guest::mounted(&dir);
    let part = "d".repeat(200);
    let mut node = 1;
    for _ in 0..60 {
        node = guest.mkdir(node, &part, 0o700).unwrap().node;
    }
    let (file, _) = guest.create(node, "deep", 0o600).unwrap();
    // Push every descriptor on the way out of the cache.
    for number in 0..FD_BUDGET_MIN {
        let other = guest.mkdir(1, &format!("many-{number}"), 0o700).unwrap();
        assert!(guest.lookup(other.node, "none").is_err());
    }
    let fh = guest.open(file.node, libc::O_WRONLY).unwrap();
    assert_eq!(guest.write(file.node, fh, 0, b"x"), Ok(1));
    assert_eq!(guest.getattr(file.node).unwrap().size, 1);
}

/// A tree in which `hung` is a file system whose server never answers, and the server's end of it.
fn tree_with_hung_mount(dir: &Dir) -> (OwnedFd, std::fs::File) {
    std::fs::create_dir_all(dir.path("hung")).unwrap();
    let server = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .unwrap();
    let path = dir.0.clone();
    std::thread::spawn(move || {
        unshare(UnshareFlags::FS | UnshareFlags::NEWNS).unwrap();
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).unwrap();
        let fd = server.as_raw_fd();
        let options = format!("fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other");
        let options = std::ffi::CString::new(options).unwrap();
        let flags = MountFlags::empty();
        mount("none", path.join("hung"), "fuse", flags, &*options).unwrap();
        (tree_of(&path), server)
    })
    .join()
    .unwrap()
}

/// A guest of whose requests the host holds one up until the file is closed: the head of its chain. `None`, loudly, where no mount can
/// hang.
fn held_up(dir: &Dir) -> Option<(Guest, std::fs::File, u16)> {
    if !Path::new("/dev/fuse").exists() {
        eprintln!(
            "SKIPPED: {}: no /dev/fuse to hang a mount on",
            module_path!()
        );
        return None;
    }
    let (tree, server) = tree_with_hung_mount(dir);
    let mut guest = Guest::new(setup(tree));
    guest.init();
    let header = guest.header(opcode::LOOKUP, 1, 5);
    let buffers = [
        Buffer::Readable(&header),
        Buffer::Readable(b"hung\0"),
        Buffer::Writable(144),
    ];
    let hung = guest.driver.add_indirect(REQUESTS, &buffers);
    guest.driver.kick(REQUESTS);
    Some((guest, server, hung))
}

#[test]
fn a_request_that_the_host_holds_up_blocks_neither_the_others_nor_a_reset() {
    needs_root!();
    let dir = Dir::new();
    let Some((mut guest, server, hung)) = held_up(&dir) else {
        return;
    };
    for _ in 0..1000 {
        assert!(guest.getattr(1).is_ok());
    }
    let before = guest.driver.used_index(REQUESTS);
    let start = Instant::now();
    guest.driver.set_status(0);
    let took = start.elapsed();
    assert!(
        took >= Duration::from_secs(1),
        "nothing was held up: {took:?}"
    );
    assert!(took < Duration::from_secs(10), "{took:?}");
    // It may still write the guest's memory, so nothing stands still.
    assert_eq!(guest.driver.suspend(), Err(Busy));
    // What comes back now must not reach the rings, nor does the device work again.
    drop(server);
    assert!(guest.pool.wait_until_idle(Duration::from_secs(10)));
    assert_eq!(
        guest.driver.used_index(REQUESTS),
        before,
        "chain {hung} came back after a reset"
    );
    assert_ne!(
        guest.driver.status(),
        0,
        "a device that cannot be reset stays failed"
    );
}

#[test]
fn a_share_that_goes_gives_back_all_that_its_activations_held() {
    needs_root!();
    let dir = Dir::new();
    let mut guest = Guest::mounted(&dir);
    guest.driver.stand_still();
    guest.driver.transport.resume();
    assert!(guest.getattr(1).is_ok());
    let routes = guest.driver.routes.clone();
    drop(guest);
    assert_eq!(Arc::strong_count(&routes), 1);
}

#[test]
fn a_thread_that_outlives_its_share_closes_nothing_of_the_process() {
    needs_root!();
    let dir = Dir::new();
    let Some((mut guest, server, _)) = held_up(&dir) else {
        return;
    };
    for _ in 0..1000 {
        assert!(guest.getattr(1).is_ok());
    }
    let (routes, pool) = (guest.driver.routes.clone(), guest.pool.clone());
    drop(guest);
    drop(server);
    assert!(pool.abandon(Duration::from_secs(10)), "it ended");
    // What interrupts go by is still there.
    assert!(Arc::strong_count(&routes) > 1);
}

#[test]
fn a_share_whose_request_the_host_holds_up_does_not_stand_still_and_loses_nothing() {
    needs_root!();
    let dir = Dir::new();
    let Some((mut guest, server, hung)) = held_up(&dir) else {
        return;
    };
    for _ in 0..1000 {
        assert!(guest.getattr(1).is_ok());
    }
    assert_eq!(guest.driver.suspend(), Err(Busy));
    assert_eq!(guest.driver.suspend(), Err(Busy));
    guest.driver.transport.resume();
    // It works on, and answers the one request when the host lets go of it.
    assert!(guest.getattr(1).is_ok());
    assert_eq!(guest.driver.suspend(), Err(Busy));
    drop(server);
    let used = guest.driver.wait_used(REQUESTS, None);
    assert_eq!(used.head, hung);
    guest.driver.stand_still();
    guest.driver.transport.resume();
    assert!(guest.getattr(1).is_ok());
}
