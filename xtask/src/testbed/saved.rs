//! The saved testbed: a Debian host that has booted once, with containerd up and the door listening, kept in the cache.
//!
//! Three entries beside the emulator (`emulator`): the door (by its source), Debian's files (by the list of packages) and the saved
//! machine (by both, the emulator's files, its command line and the mode). A change makes just what depends on it anew.

use std::error::Error;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::cache::{Cache, CacheError, Key};
use crate::packages::{self, Package, any, ensure};
use crate::programs::{self, Profile};
use crate::progress::{Progress, Step};
use crate::testbed::emulator::{self, Emulator};
use crate::testbed::frame::{Decoder, Frame};
use crate::testbed::machine::{Files, Machine, Mode, Start, arguments};

/// What making the testbed needs on this machine.
const PACKAGES: [Package; 4] = [
    any("mmdebstrap"),
    any("e2fsprogs"),
    any("debian-archive-keyring"),
    any("tar"),
];
/// Of these what a run in a saved testbed needs as well: it makes a drive (`drive`).
const MKE2FS: &str = "/usr/sbin/mke2fs";
/// The Debian inside: 13, whose kernel's KVM runs on the emulated processor.
const SUITE: &str = "trixie";
/// What is on the emulated host.
const INSIDE: &str = "attr,busybox-static,bzip2,ca-certificates,conntrack,containerd,containernetworking-plugins,crun,curl,\
    dmsetup,e2fsprogs,ethtool,file,gdb,iproute2,iptables,iputils-ping,jq,kmod,less,libcap2-bin,linux-image-cloud-amd64,\
    lsof,netcat-openbsd,nftables,procps,psmisc,python3-minimal,qemu-system-x86,runc,socat,strace,tcpdump,util-linux,virtiofsd,xfsprogs,zstd";
/// Raise when the recipe below changes in a way that the keys do not see.
const RECIPE: &str = "1";

/// Size of the root disk inside. The file is sparse.
const ROOT_BYTES: u64 = 16 << 30;
/// Size of the drive with the programs under test: a saved machine does not expect it to change.
pub const PROGRAMS_BYTES: u64 = 4 << 30;
/// Room in the cache while it is being made: Debian's files twice, the disk, the memory.
const ROOM_MIB: u64 = 4096;
/// Booting takes 20 s on two idle cores, four times that when metered, and far longer on a busy machine.
const BOOT_TIMEOUT_MS: u64 = 900_000;

/// What every step works with.
#[derive(Debug)]
pub struct Context<'a> {
    /// What the person sees.
    pub progress: &'a Progress,
    /// Where things are kept.
    pub cache: &'a Cache,
    /// The checkout.
    pub workspace: &'a Path,
}

/// A saved machine in the cache.
#[derive(Debug, Clone)]
pub struct Saved {
    dir: PathBuf,
    emulator: Emulator,
}

impl Saved {
    /// Its files, with a drive of the caller's.
    pub fn files(&self, programs: &Path) -> Files {
        files(&self.emulator, &self.dir, programs)
    }

    /// The state to resume from.
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }
}

/// The saved machine, made where it is not there yet.
///
/// # Errors
/// A step of making it failed.
pub fn ensure_saved(context: &Context<'_>, mode: Mode) -> Result<Saved, Box<dyn Error>> {
    if !Path::new(MKE2FS).exists() {
        ensure(context.progress, "the testbed", &PACKAGES)?;
    }
    let (root_key, door_key) = (root_key(), door_key(context.workspace)?);
    if let Some(emulator) = emulator::get(context) {
        let key = saved_key(mode, &emulator, &root_key, &door_key)?;
        if let Some(dir) = context.cache.get("testbed-saved", &key) {
            return Ok(Saved { dir, emulator });
        }
    }
    if !rustix::process::geteuid().is_root() {
        // Files of the image belong to many users, which only root can make.
        return Err("the testbed is not made yet, and making it needs root: run `cargo xtask testbed exec -- true` as root once".into());
    }
    context.cache.require_room(ROOM_MIB)?;
    ensure(context.progress, "the testbed", &PACKAGES)?;
    let emulator = emulator::ensure(context)?;
    let root = ensure_root(context, &root_key)?;
    let door = ensure_door(context, &door_key)?;
    let key = saved_key(mode, &emulator, &root_key, &door_key)?;
    let dir = context.cache.get_or_build("testbed-saved", &key, |dir| {
        let build = |step: &Step| {
            make(
                step,
                mode,
                &emulator,
                &root.join("root.tar"),
                &door.join("testbed-door"),
                dir,
            )
        };
        context
            .progress
            .step(&format!("testbed ({})", name(mode)), build)
    })?;
    Ok(Saved { dir, emulator })
}

fn name(mode: Mode) -> &'static str {
    match mode {
        Mode::Plain => "plain",
        Mode::Metered => "metered",
    }
}

fn root_key() -> Key {
    Key::builder()
        .bytes(RECIPE)
        .bytes(SUITE)
        .bytes(INSIDE)
        .finish()
}

fn door_key(workspace: &Path) -> Result<Key, CacheError> {
    Ok(Key::builder()
        .bytes(RECIPE)
        .dir(&workspace.join("tests/door"))?
        .finish())
}

fn saved_key(mode: Mode, emulator: &Emulator, root: &Key, door: &Key) -> Result<Key, CacheError> {
    // The paths differ from run to run; the machine that they belong to does not.
    let nowhere = files(&Emulator::at(PathBuf::new()), Path::new(""), Path::new(""));
    let line = arguments(
        mode,
        Start::Boot,
        &nowhere,
        Path::new(""),
        &[String::new(), String::new()],
    );
    let parts = Key::builder()
        .bytes(RECIPE)
        .bytes(root.as_str())
        .bytes(door.as_str())
        .bytes(line.join("\n"));
    Ok(parts
        .bytes(ROOT_BYTES.to_le_bytes())
        .bytes(PROGRAMS_BYTES.to_le_bytes())
        .dir(emulator.dir())?
        .finish())
}

fn files(emulator: &Emulator, dir: &Path, programs: &Path) -> Files {
    Files {
        emulator: emulator.clone(),
        kernel: dir.join("vmlinuz"),
        initrd: dir.join("initrd"),
        root: dir.join("root.img"),
        memory: dir.join("memory"),
        programs: programs.to_owned(),
    }
}

fn ensure_root(context: &Context<'_>, key: &Key) -> Result<PathBuf, Box<dyn Error>> {
    Ok(context.cache.get_or_build("testbed-root", key, |dir| {
        let mirror = packages::mirror()?;
        context.progress.step("testbed image", |step| {
            let mut command = Command::new("mmdebstrap");
            command.args(["--variant=minbase", "--include", INSIDE, SUITE]);
            // Its chroot is made below the entry, so that it goes with it when we are killed.
            command
                .arg(dir.join("root.tar"))
                .arg(mirror)
                .env("TMPDIR", dir);
            Ok(step.run(&mut command)?)
        })
    })?)
}

fn ensure_door(context: &Context<'_>, key: &Key) -> Result<PathBuf, Box<dyn Error>> {
    Ok(context.cache.get_or_build("testbed-door", key, |dir| {
        let built = programs::build(
            context.progress,
            context.workspace,
            Profile::Release,
            &[programs::DOOR],
        )?;
        for program in built {
            std::fs::copy(program, dir.join(programs::DOOR.name))?;
        }
        Ok(())
    })?)
}

/// Disk, boot, save.
fn make(
    step: &Step,
    mode: Mode,
    emulator: &Emulator,
    root_tar: &Path,
    door: &Path,
    dir: &Path,
) -> Result<(), Box<dyn Error>> {
    let root = dir.join("root");
    std::fs::create_dir(&root)?;
    step.run(
        Command::new("tar")
            .arg("-C")
            .arg(&root)
            .arg("-xf")
            .arg(root_tar),
    )?;
    furnish(&root, door)?;
    for (stem, name) in [("vmlinuz-", "vmlinuz"), ("initrd.img-", "initrd")] {
        std::fs::copy(boot_file(&root, stem)?, dir.join(name))?;
    }
    let programs = dir.join("programs.img");
    File::create(&programs)?.set_len(PROGRAMS_BYTES)?;
    let files = files(emulator, dir, &programs);
    // Without a journal: nothing that a power cut could spoil is kept.
    let mut mke2fs = Command::new("mke2fs");
    mke2fs.args([
        "-q",
        "-F",
        "-t",
        "ext4",
        "-O",
        "^has_journal",
        "-E",
        "lazy_itable_init=1",
        "-m",
        "0",
        "-d",
    ]);
    step.run(
        mke2fs
            .arg(&root)
            .arg(&files.root)
            .arg(format!("{}K", ROOT_BYTES >> 10)),
    )?;
    std::fs::remove_dir_all(&root)?;

    let machine = Machine::start(mode, Start::Boot, &files, dir)?;
    wait_for_ready(&machine)?;
    machine.save_and_quit(&dir.join("state"))?;
    std::fs::remove_file(&programs)?;
    Ok(())
}

/// What Debian's packages do not bring.
fn furnish(root: &Path, door: &Path) -> Result<(), std::io::Error> {
    let inside = root.join("usr/sbin/testbed-door");
    std::fs::copy(door, &inside)?;
    std::fs::set_permissions(&inside, std::fs::Permissions::from_mode(0o755))?;
    let texts = [
        ("etc/hostname", "testbed\n"),
        ("etc/hosts", "127.0.0.1 localhost testbed\n::1 localhost\n"),
        // Any fixed one will do; programs look for its presence.
        ("etc/machine-id", "ca51d000ca51d000ca51d000ca51d000\n"),
        // The emulated processor is slow: 2 s, crictl's own limit, are not enough.
        (
            "etc/crictl.yaml",
            "runtime-endpoint: unix:///run/containerd/containerd.sock\ntimeout: 600\n",
        ),
    ];
    for (path, text) in texts {
        std::fs::write(root.join(path), text)?;
    }
    Ok(())
}

fn boot_file(root: &Path, stem: &str) -> Result<PathBuf, std::io::Error> {
    for entry in std::fs::read_dir(root.join("boot"))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(stem) {
            return Ok(entry.path());
        }
    }
    Err(std::io::Error::other(format!(
        "the image has no /boot/{stem}*"
    )))
}

fn wait_for_ready(machine: &Machine) -> Result<(), Box<dyn Error>> {
    let mut door = machine.door.try_clone()?;
    door.set_read_timeout(Some(Duration::from_millis(BOOT_TIMEOUT_MS)))?;
    let mut decoder = Decoder::default();
    let mut bytes = [0; 64];
    loop {
        let what = match door.read(&mut bytes) {
            Ok(0) => "the testbed went down while it booted".to_owned(),
            Ok(length) => {
                decoder.push(bytes.get(..length).unwrap_or_default());
                match decoder.next_frame() {
                    Ok(None) => continue,
                    Ok(Some(Frame::Ready)) => return Ok(()),
                    Ok(Some(_)) => "the door spoke before it was asked".to_owned(),
                    Err(error) => error.to_string(),
                }
            }
            Err(error) => format!("the testbed did not boot within {BOOT_TIMEOUT_MS} ms: {error}"),
        };
        return Err(machine.died(&what).into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mode_and_each_emulator_has_a_state_of_its_own() {
        let part = Key::builder().finish();
        let dir = std::env::temp_dir().join(format!("xtask-saved-{}", std::process::id()));
        std::fs::create_dir(&dir).expect("a new directory");
        let emulator = Emulator::at(dir.clone());
        let of = |mode| saved_key(mode, &emulator, &part, &part).expect("key");
        std::fs::write(emulator.program(), "one").expect("written");
        let plain = of(Mode::Plain);
        assert_ne!(plain, of(Mode::Metered));
        assert_eq!(plain, of(Mode::Plain));
        std::fs::write(emulator.program(), "another").expect("written");
        assert_ne!(plain, of(Mode::Plain));
        std::fs::remove_dir_all(dir).expect("removed");
    }

    #[test]
    fn the_list_of_packages_is_one_word() {
        assert!(!INSIDE.contains(' '), "{INSIDE}");
    }
}
