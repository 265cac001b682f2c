//! The share under Linux's own FUSE client: the test mounts `/dev/fuse`, hands each request of the kernel to
//! the device over the virtqueue, and the reply back. What programs then do in the mount must give what
//! it gives in a plain directory beside it.

use super::*;
use proptest::prelude::*;
use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::thread::UnshareFlags;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};

/// Room for the longest request of the kernel: 1 MiB of data and its headers.
const REQUEST_BYTES: usize = (1 << 20) + 4096;

/// Carries requests between the kernel and the device until the mount is gone.
fn bridge(mut fuse: File, mut guest: Guest) {
    let mut request = vec![0; REQUEST_BYTES];
    // ENODEV: unmounted.
    while let Ok(len) = fuse.read(&mut request) {
        let request = &request[..len];
        let room = match u32_at(request, 4) {
            opcode::READ | opcode::READDIR | opcode::READDIRPLUS => u32_at(request, 56),
            _ => 64 * 1024,
        };
        // As virtio-fs lays it out: the header in a buffer of its own.
        let (header, behind) = request.split_at(40);
        let mut buffers = vec![Buffer::Readable(header)];
        if !behind.is_empty() {
            buffers.push(Buffer::Readable(behind));
        }
        buffers.extend([Buffer::Writable(16), Buffer::Writable(room)]);
        let used = guest.send(REQUESTS, &buffers);
        if used.len > 0 {
            // The kernel refuses a reply to a request that was interrupted meanwhile.
            let _interrupted = fuse.write(&used.data);
        }
    }
    assert!(!guest.driver.needs_reset());
}

/// Mounts a share of `dir/host` at `dir/guest` by the kernel and runs `body` where it is mounted.
fn with_kernel(dir: &Dir, body: impl FnOnce() + Send) {
    for sub in ["host", "guest", "plain"] {
        std::fs::create_dir(dir.path(sub)).unwrap();
    }
    let guest = Guest::new(setup(tree_of(&dir.path("host"))));
    let fuse = File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .unwrap();
    std::thread::scope(|scope| {
        let other = fuse.try_clone().unwrap();
        let (mounted, is_mounted) = std::sync::mpsc::channel();
        let bridge = scope.spawn(move || {
            // Before the mount a read would only say that there is none.
            if is_mounted.recv().is_ok() {
                bridge(other, guest);
            }
        });
        let body = scope.spawn(move || {
            // The namespace, and with it the mount, ends with this thread.
            unshare(UnshareFlags::FS | UnshareFlags::NEWNS).unwrap();
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change("/", private).unwrap();
            let options = format!(
                "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
                fuse.as_raw_fd()
            );
            let options = std::ffi::CString::new(options).unwrap();
            let flags = MountFlags::empty();
            mount("share", dir.path("guest"), "fuse", flags, &*options).unwrap();
            drop(fuse);
            mounted.send(()).unwrap();
            body();
        });
        body.join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        bridge
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

#[derive(Clone, Debug)]
enum Act {
    Write(usize, usize, u64, usize),
    Append(usize, usize),
    Read(usize),
    Truncate(usize, u64),
    Rename(usize, usize),
    Link(usize, usize),
    Symlink(usize, usize),
    Unlink(usize),
    Mkdir(usize),
    Rmdir(usize),
    Chmod(usize, u32),
    Stat(usize),
    List(usize),
    Copy(usize, usize),
    Open(usize),
    WriteOpen(usize, u64, usize),
    StatOpen(usize),
    Close(usize),
}

const PATHS: [&str; 10] = ["a", "b", "c", "d", "d/a", "d/b", "d/e", "d/e/a", "f", "f/a"];

fn act() -> impl Strategy<Value = Act> {
    let path = || 0..PATHS.len();
    let size = || prop_oneof![0..10usize, 4000..9000usize];
    let offset = || prop_oneof![0..20u64, 4000..9000u64];
    prop_oneof![
        (path(), size(), offset(), 0..3usize).prop_map(|(p, s, o, t)| Act::Write(p, s, o, t)),
        (path(), size()).prop_map(|(p, s)| Act::Append(p, s)),
        path().prop_map(Act::Read),
        (path(), offset()).prop_map(|(p, o)| Act::Truncate(p, o)),
        (path(), path()).prop_map(|(a, b)| Act::Rename(a, b)),
        (path(), path()).prop_map(|(a, b)| Act::Link(a, b)),
        (path(), path()).prop_map(|(a, b)| Act::Symlink(a, b)),
        path().prop_map(Act::Unlink),
        path().prop_map(Act::Mkdir),
        path().prop_map(Act::Rmdir),
        (path(), 0..0o7777u32).prop_map(|(p, m)| Act::Chmod(p, m)),
        path().prop_map(Act::Stat),
        path().prop_map(Act::List),
        (path(), path()).prop_map(|(a, b)| Act::Copy(a, b)),
        path().prop_map(Act::Open),
        (0..4usize, offset(), size()).prop_map(|(h, o, s)| Act::WriteOpen(h, o, s)),
        (0..4usize).prop_map(Act::StatOpen),
        (0..4usize).prop_map(Act::Close),
    ]
}

/// One side of the comparison.
struct Side {
    root: PathBuf,
    open: Vec<File>,
}

impl Side {
    /// Does it; what came of it as text.
    fn act(&mut self, act: &Act) -> String {
        match self.try_act(act) {
            Ok(text) => text,
            Err(error) => format!("errno {:?}", error.raw_os_error()),
        }
    }

    fn try_act(&mut self, act: &Act) -> std::io::Result<String> {
        let at = |path: usize| self.root.join(PATHS[path]);
        let done = |()| String::from("done");
        match *act {
            Act::Write(path, size, offset, how) => {
                let mut options = File::options();
                options
                    .write(true)
                    .create(how > 0)
                    .truncate(how > 1)
                    .mode(0o640);
                let file = options.open(at(path))?;
                file.write_all_at(&vec![size as u8; size], offset).map(done)
            }
            Act::Append(path, size) => {
                let mut file = File::options().append(true).create(true).open(at(path))?;
                file.write_all(&vec![1; size]).map(done)
            }
            Act::Read(path) => Ok(format!("{:?}", std::fs::read(at(path))?)),
            Act::Truncate(path, size) => File::options()
                .write(true)
                .open(at(path))?
                .set_len(size)
                .map(done),
            Act::Rename(from, to) => std::fs::rename(at(from), at(to)).map(done),
            Act::Link(from, to) => std::fs::hard_link(at(from), at(to)).map(done),
            Act::Symlink(to, link) => std::os::unix::fs::symlink(PATHS[to], at(link)).map(done),
            Act::Unlink(path) => std::fs::remove_file(at(path)).map(done),
            Act::Mkdir(path) => std::fs::create_dir(at(path)).map(done),
            Act::Rmdir(path) => std::fs::remove_dir(at(path)).map(done),
            Act::Chmod(path, mode) => {
                std::fs::set_permissions(at(path), PermissionsExt::from_mode(mode)).map(done)
            }
            Act::Stat(path) => std::fs::symlink_metadata(at(path)).map(|st| describe(&st)),
            Act::List(path) => {
                let mut names = Vec::new();
                for entry in std::fs::read_dir(at(path))? {
                    let entry = entry?;
                    names.push(format!("{:?} {:?}", entry.file_name(), entry.file_type()?));
                }
                names.sort();
                Ok(names.join(","))
            }
            Act::Copy(from, to) => std::fs::copy(at(from), at(to)).map(|size| size.to_string()),
            Act::Open(path) => {
                let file = File::options().read(true).write(true).open(at(path))?;
                self.open.push(file);
                Ok("opened".into())
            }
            Act::WriteOpen(index, offset, size) => match self.open.get(index) {
                Some(file) => file.write_all_at(&vec![9; size], offset).map(done),
                None => Ok("none".into()),
            },
            Act::StatOpen(index) => match self.open.get(index) {
                Some(file) => {
                    let mut content = vec![0; 20_000];
                    let len = file.read_at(&mut content, 0)?;
                    Ok(format!(
                        "{} {:?}",
                        describe(&file.metadata()?),
                        &content[..len]
                    ))
                }
                None => Ok("none".into()),
            },
            Act::Close(index) => {
                if index < self.open.len() {
                    drop(self.open.remove(index));
                }
                Ok("closed".into())
            }
        }
    }
}

fn describe(st: &std::fs::Metadata) -> String {
    // The size of a directory is the file system's affair.
    let size = if st.is_dir() { 0 } else { st.size() };
    format!(
        "{:o} {size} {} {} {}",
        st.mode(),
        st.nlink(),
        st.uid(),
        st.gid()
    )
}

#[test]
fn linux_sees_in_a_share_what_it_sees_in_a_directory() {
    needs_root!();
    if !Path::new("/dev/fuse").exists() {
        eprintln!(
            "SKIPPED: {}: no /dev/fuse to mount the share by",
            module_path!()
        );
        return;
    }
    let dir = Dir::new();
    let case = AtomicU32::new(0);
    with_kernel(&dir, || {
        let side = |base: &str, case: u32| {
            let root = dir.path(base).join(case.to_string());
            std::fs::create_dir(&root).unwrap();
            let open = Vec::new();
            Side { root, open }
        };
        let acts = prop::collection::vec(act(), 1..80);
        proptest!(ProptestConfig::with_cases(60), |(acts in acts)| {
            let case = case.fetch_add(1, Ordering::Relaxed);
            let (mut share, mut plain) = (side("guest", case), side("plain", case));
            for act in &acts {
                prop_assert_eq!(share.act(act), plain.act(act), "{:?}", act);
            }
        });
    });
}

#[test]
fn a_tree_copied_through_the_share_is_the_same_on_the_host() {
    needs_root!();
    if !Path::new("/dev/fuse").exists() {
        eprintln!(
            "SKIPPED: {}: no /dev/fuse to mount the share by",
            module_path!()
        );
        return;
    }
    let dir = Dir::new();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    with_kernel(&dir, || {
        let run = |program: &str, args: &[&Path]| {
            let status = std::process::Command::new(program)
                .args(args)
                .status()
                .unwrap_or_else(|error| panic!("{program}: {error}"));
            assert!(status.success(), "{program}: {status}");
        };
        run("cp", &[Path::new("-a"), &source, &dir.path("guest/src")]);
        run("diff", &[Path::new("-r"), &source, &dir.path("guest/src")]);
        run("diff", &[Path::new("-r"), &source, &dir.path("host/src")]);
        run("rm", &[Path::new("-r"), &dir.path("guest/src")]);
        assert_eq!(std::fs::read_dir(dir.path("host")).unwrap().count(), 0);
    });
}
