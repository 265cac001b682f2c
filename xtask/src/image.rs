//! The test image: Debian's static busybox with all its names, as a docker-archive.
//!
//! Made once per Debian release and kept in the cache. The package is unpacked, not installed: it would take the place of a
//! busybox that the machine may need.

use std::error::Error;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::cache::{Key, KeyBuilder};
use crate::command::query;
use crate::packages;
use crate::progress::Step;
use crate::testbed::saved::Context;

/// Raise when the recipe below changes.
const RECIPE: &str = "2";
/// Empty directories of the image.
const DIRECTORIES: [&str; 8] = ["dev", "etc", "home", "proc", "root", "sys", "tmp", "var"];
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n";
const GROUP: &str = "root:x:0:\nnobody:x:65534:\n";

/// The image, from the cache or made.
///
/// # Errors
/// Debian's package could not be had.
pub fn ensure(context: &Context<'_>) -> Result<PathBuf, Box<dyn Error>> {
    let key = Key::builder()
        .bytes(RECIPE)
        .bytes(packages::codename()?)
        .finish();
    let dir = context.cache.get_or_build("image-busybox", &key, |dir| {
        context
            .progress
            .step("busybox image", |step| make(step, dir))
    })?;
    Ok(dir.join("busybox.tar"))
}

fn make(step: &Step, dir: &Path) -> Result<(), Box<dyn Error>> {
    let work = dir.join("work");
    let (package, root, archive) = (
        work.join("package"),
        work.join("root"),
        work.join("archive"),
    );
    for dir in [&package, &root, &archive] {
        std::fs::create_dir_all(dir)?;
    }
    packages::update(step)?;
    // apt's own user could not write here.
    let unpacked = work.join("unpacked");
    let mut download = Command::new("apt-get");
    step.run(
        download
            .args([
                "-o",
                "APT::Sandbox::User=root",
                "download",
                "busybox-static",
            ])
            .current_dir(&package),
    )?;
    step.run(
        Command::new("dpkg-deb")
            .arg("-x")
            .arg(only_file(&package)?)
            .arg(&unpacked),
    )?;
    furnish(&root, &unpacked)?;

    let layer = archive.join("layer.tar");
    step.run(&mut tar(&root, &layer)?)?;
    let diff_id = format!("sha256:{}", KeyBuilder::plain_sha256(&layer)?);
    let config = json!({
        "architecture": "amd64", "os": "linux", "created": "1970-01-01T00:00:00Z",
        "config": { "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "Cmd": ["sh"], "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
    });
    let manifest = json!([{ "Config": "config.json", "RepoTags": ["capsid/busybox:latest"], "Layers": ["layer.tar"] }]);
    std::fs::write(archive.join("config.json"), config.to_string())?;
    std::fs::write(archive.join("manifest.json"), manifest.to_string())?;
    step.run(&mut tar(&archive, &dir.join("busybox.tar"))?)?;
    std::fs::remove_dir_all(&work)?;
    Ok(())
}

/// The same tree gives the same bytes. Names are plain, as `docker save` writes them, without a `./` in front.
fn tar(root: &Path, to: &Path) -> Result<Command, Box<dyn Error>> {
    let mut names = std::fs::read_dir(root)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<Result<Vec<_>, _>>()?;
    names.sort();
    let mut command = Command::new("tar");
    command.args([
        "--sort=name",
        "--mtime=@0",
        "--owner=0",
        "--group=0",
        "--numeric-owner",
        "-C",
    ]);
    command.arg(root).arg("-cf").arg(to).arg("--").args(names);
    Ok(command)
}

fn furnish(root: &Path, unpacked: &Path) -> Result<(), Box<dyn Error>> {
    for dir in DIRECTORIES {
        std::fs::create_dir_all(root.join(dir))?;
    }
    std::fs::set_permissions(root.join("tmp"), std::fs::Permissions::from_mode(0o1777))?;
    std::fs::write(root.join("etc/passwd"), PASSWD)?;
    std::fs::write(root.join("etc/group"), GROUP)?;
    let places = ["bin/busybox", "usr/bin/busybox"].map(|place| unpacked.join(place));
    let busybox = places
        .iter()
        .find(|place| place.is_file())
        .ok_or("the package busybox-static holds no busybox")?;
    std::fs::create_dir_all(root.join("bin"))?;
    std::fs::copy(busybox, root.join("bin/busybox"))?;
    let (_, names) = query(Command::new(busybox).arg("--list-full"))?;
    for name in applets(&String::from_utf8_lossy(&names)) {
        let link = root.join(name);
        if let Some(parent) = link.parent() {
            std::fs::create_dir_all(parent)?;
        }
        symlink("/bin/busybox", link)?;
    }
    Ok(())
}

/// busybox's own list of names, less itself and what would leave the image.
fn applets(list: &str) -> Vec<&str> {
    let sound = |name: &&str| {
        !name.is_empty() && *name != "bin/busybox" && !name.starts_with('/') && !name.contains("..")
    };
    list.lines().map(str::trim).filter(sound).collect()
}

fn only_file(dir: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let mut files = std::fs::read_dir(dir)?.map(|entry| entry.map(|entry| entry.path()));
    match (files.next(), files.next()) {
        (Some(file), None) => Ok(file?),
        _ => Err(format!("{} should hold one file", dir.display()).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn applets_stay_inside_the_image() {
        assert_eq!(
            applets("bin/ash\nbin/busybox\n\nusr/bin/awk\n/etc/x\n../y\n"),
            ["bin/ash", "usr/bin/awk"]
        );
    }

    #[test]
    fn names_in_the_archive_are_plain_and_sorted() {
        let dir = std::env::temp_dir().join(format!("xtask-image-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("b")).expect("dir");
        std::fs::write(dir.join("a"), "1").expect("file");
        let line = crate::command::shown(&tar(&dir, Path::new("/t")).expect("read"));
        std::fs::remove_dir_all(&dir).expect("remove");
        assert!(line.ends_with(" -cf /t -- a b"), "{line}");
    }
}
