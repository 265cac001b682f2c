//! The testbed's emulator: QEMU from Debian's source, with one line of ours (`docs/decisions/0022-the-testbed-builds-its-emulator.md`).
//!
//! The cache entry holds the program, linked statically, and the firmware that it loads: it runs wherever the cache is. It knows
//! the processor and the devices of `machine::arguments` and nothing else. Trusts apt for the source, whose hash Debian's signed index names, and
//! the source, whose own build it runs. Refuses a source in which the place of our line is not found exactly once.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::available_parallelism;

use crate::cache::Key;
use crate::packages::release::Lists;
use crate::packages::{self, Package, any, at_least};
use crate::progress::Step;
use crate::testbed::saved::Context;

/// What a person who waits for it is told; measured in decision 0022.
const NOTICE: &str = "the testbed's emulator is built once, in some 220 CPU-seconds";
const KIND: &str = "testbed-emulator";
/// The program's name, in the entry and in QEMU's build.
const PROGRAM: &str = "qemu-system-x86_64";
/// Raise when the recipe below changes in a way that its key does not see.
const RECIPE: &str = "1";
/// What building it needs. Of these, meson and pycotap are too old in Debian 12, or missing.
const PACKAGES: [Package; 17] = [
    any("debian-archive-keyring"),
    any("tar"),
    any("xz-utils"),
    any("gcc"),
    any("libc6-dev"),
    any("make"),
    any("ninja-build"),
    any("pkg-config"),
    any("python3"),
    any("python3-venv"),
    at_least("meson", "1.5"),
    at_least("python3-pycotap", "1.1"),
    any("libglib2.0-dev"),
    any("libfdt-dev"),
    any("zlib1g-dev"),
    any("qemu-system-data"),
    any("seabios"),
];
/// Debian's source package, and the release it is taken from, whatever the host's: every testbed has the same emulator. A QEMU
/// before 9 crashes Linux 6.12 (its cmpxchg16b) and cannot save to a file.
const SOURCE: (&str, &str) = ("qemu", "trixie");
/// Room in the cache while it is being built: the source and its objects.
const ROOM_MIB: u64 = 1024;
/// What it loads for a machine with its kernel on the command line, and the packages' files.
const FIRMWARE: [&str; 3] = [
    "/usr/share/seabios/bios-256k.bin",
    "/usr/share/qemu/kvmvapic.bin",
    "/usr/share/qemu/linuxboot_dma.bin",
];

/// The file with the mistake.
const MENDED: &str = "target/i386/tcg/system/svm_helper.c";
/// Where VMRUN has delivered the interrupt that the host injects: once in the file.
const PLACE: &str = "do_interrupt_x86_hardirq(env, vector, 1);";
/// The number of the interrupt does not stay behind to be delivered once more when the execution loop is left next.
const LINE: &str = "cs->exception_index = -1;";

/// Debian's source comes without the firmware whose installation this file describes; a test that is not built asks for the variable.
const NO_BLOBS: (&str, &str) = ("pc-bios/meson.build", "roms = []\n");
/// The devices, by QEMU's own symbols; those of the machine follow from it.
const DEVICES: (&str, &str) = (
    "configs/devices/x86_64-softmmu/testbed.mak",
    "CONFIG_Q35=y\nCONFIG_VIRTIO_PCI=y\nCONFIG_VIRTIO_BLK=y\nCONFIG_VIRTIO_RNG=y\nCONFIG_VIRTIO_SERIAL=y\n",
);
/// Debian's Python, because its modules are that one's; nothing is downloaded.
const CONFIGURE: [&str; 12] = [
    "--python=/usr/bin/python3",
    "--static",
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--without-default-devices",
    "--with-devices-x86_64=testbed",
    "--enable-system",
    "--enable-tcg",
    "--enable-trace-backends=nop",
    "--disable-download",
    "--disable-debug-info",
    "--disable-install-blobs",
];

/// Why the source is not the one we know.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SourceError {
    /// Ours would go to the wrong place, or nowhere.
    #[error(
        "{MENDED} has `{PLACE}` {found} times instead of once: QEMU has changed there, see docs/decisions/0022-the-testbed-builds-its-emulator.md"
    )]
    Place {
        /// How often the place was found.
        found: usize,
    },
    /// apt brought something else.
    #[error("apt brought {found} tarballs of {} instead of one", SOURCE.0)]
    Tarballs {
        /// How many.
        found: usize,
    },
}

/// An emulator in the cache.
#[derive(Debug, Clone)]
pub struct Emulator {
    dir: PathBuf,
}

impl Emulator {
    /// That of an entry.
    pub fn at(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The program.
    pub fn program(&self) -> PathBuf {
        self.dir.join(PROGRAM)
    }

    /// The directory of its firmware, and of itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

/// The emulator, if it is in the cache.
pub fn get(context: &Context<'_>) -> Option<Emulator> {
    context.cache.get(KIND, &key()).map(Emulator::at)
}

/// The emulator, built where it is not there yet.
///
/// # Errors
/// A step of building it failed.
pub fn ensure(context: &Context<'_>) -> Result<Emulator, Box<dyn Error>> {
    if let Some(emulator) = get(context) {
        return Ok(emulator);
    }
    context.cache.require_room(ROOM_MIB)?;
    packages::ensure(context.progress, "the testbed's emulator", &PACKAGES)?;
    let dir = context.cache.get_or_build(KIND, &key(), |dir| {
        let mirror = packages::mirror()?;
        context.progress.say(NOTICE);
        let build = |step: &Step| build(step, &mirror, dir);
        context.progress.step("testbed emulator", build)
    })?;
    Ok(Emulator::at(dir))
}

fn key() -> Key {
    let pairs = [SOURCE, NO_BLOBS, DEVICES, (PLACE, LINE)];
    let parts = pairs.into_iter().flat_map(|(one, other)| [one, other]);
    parts
        .chain([RECIPE, MENDED])
        .chain(CONFIGURE)
        .chain(FIRMWARE)
        .fold(Key::builder(), |key, part| key.bytes(part))
        .finish()
}

/// Fetch, mend, compile; the work is done below the entry, so that it goes with it when we are killed.
fn build(step: &Step, mirror: &str, dir: &Path) -> Result<(), Box<dyn Error>> {
    let work = dir.join("work");
    let source = work.join("source");
    std::fs::create_dir_all(&source)?;
    let tarball = fetch(step, mirror, &work)?;
    let mut tar = Command::new("tar");
    tar.args(["--extract", "--strip-components=1", "--no-same-owner"]);
    step.run(
        tar.arg("--file")
            .arg(tarball)
            .arg("--directory")
            .arg(&source),
    )?;
    let path = source.join(MENDED);
    std::fs::write(&path, mended(&std::fs::read_to_string(&path)?)?)?;
    for (path, text) in [NO_BLOBS, DEVICES] {
        std::fs::write(source.join(path), text)?;
    }

    let built = work.join("built");
    std::fs::create_dir(&built)?;
    let mut configure = Command::new(source.join("configure"));
    step.run(clean(&mut configure).args(CONFIGURE).current_dir(&built))?;
    let jobs = available_parallelism().map_or(1, usize::from);
    let mut ninja = Command::new("ninja");
    ninja
        .arg(format!("-j{jobs}"))
        .arg("-C")
        .arg(&built)
        .arg(PROGRAM);
    step.run(clean(&mut ninja))?;

    std::fs::copy(built.join(PROGRAM), dir.join(PROGRAM))?;
    for path in FIRMWARE.map(Path::new) {
        let name = path.file_name().unwrap_or_default();
        std::fs::copy(path, dir.join(name))?;
    }
    std::fs::remove_dir_all(work)?;
    Ok(())
}

/// The source as Debian has it from QEMU.
fn fetch(step: &Step, mirror: &str, work: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let (name, suite) = SOURCE;
    let lists = Lists::update(step, "deb-src", mirror, suite, work)?;
    step.run(&mut lists.apt(&["source", "--download-only", "--tar-only", name]))?;
    let mut tarballs = Vec::new();
    for entry in std::fs::read_dir(work)? {
        let path = entry?.path();
        if path.to_string_lossy().contains(".orig.tar.") {
            tarballs.push(path);
        }
    }
    let found = tarballs.len();
    let only = tarballs.pop().filter(|_| found == 1);
    Ok(only.ok_or(SourceError::Tarballs { found })?)
}

/// Flags that the caller has for other programs are not for this one.
fn clean(command: &mut Command) -> &mut Command {
    let path = std::env::var_os("PATH").unwrap_or_default();
    command
        .env_clear()
        .env("PATH", path)
        .env("LC_ALL", "C.UTF-8")
}

/// The file with our line behind the place.
fn mended(text: &str) -> Result<String, SourceError> {
    let found = text.matches(PLACE).count();
    if found != 1 {
        return Err(SourceError::Place { found });
    }
    Ok(text.replacen(PLACE, &format!("{PLACE} {LINE}"), 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(places: usize) -> String {
        let place = format!("            {PLACE}\n            break;\n");
        format!("switch {{\n{}}}\n", place.repeat(places))
    }

    #[test]
    fn our_line_follows_the_place_and_nothing_else_changes() {
        let text = mended(&file(1)).expect("mended");
        assert!(
            text.contains(&format!("{PLACE} {LINE}\n            break;")),
            "{text}"
        );
        assert_eq!(text.replace(&format!(" {LINE}"), ""), file(1));
    }

    #[test]
    fn a_place_that_is_not_there_once_is_refused() {
        for found in [0, 2] {
            assert_eq!(mended(&file(found)), Err(SourceError::Place { found }));
        }
    }

    #[test]
    fn a_call_with_other_arguments_is_not_the_place() {
        let text = file(1).replace("vector, 1", "vector, 0");
        assert_eq!(mended(&text), Err(SourceError::Place { found: 0 }));
    }

    #[test]
    fn the_firmware_is_beside_the_program() {
        let emulator = Emulator::at("/e".into());
        assert_eq!(emulator.program().parent(), Some(emulator.dir()));
    }
}
