//! Everything a microVM needs, built or found: programs, guest kernel, initramfs, test image; and where each of them is on
//! this host and inside the testbed.

use std::error::Error;
use std::path::{Path, PathBuf};

use crate::programs::{self, AGENT, CAPSID, Profile, Program, SHIM, VMM};
use crate::testbed::PROGRAMS_DIR;
use crate::testbed::drive::Item;
use crate::testbed::saved::Context;
use crate::{image, initramfs, kernel};

/// The guest kernel; set by the person, it is used as it is and none is built.
const KERNEL_VARIABLE: &str = "CAPSID_KERNEL";

/// One file or directory, and the variable that tells the programs where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    /// The variable's name; a program found by `PATH` has none.
    pub variable: Option<&'static str>,
    /// Where it is on this host.
    pub here: PathBuf,
    /// Its path on the testbed's programs drive.
    pub inside: PathBuf,
}

/// All of them.
#[derive(Debug, Clone, Default)]
pub struct Artifacts {
    all: Vec<Artifact>,
}

/// Builds or finds everything that `capsid run` needs, and the test image.
///
/// # Errors
/// A part could not be made.
pub fn ensure(context: &Context<'_>, profile: Profile) -> Result<Artifacts, Box<dyn Error>> {
    let mut artifacts = Artifacts::default();
    let vmlinux = match std::env::var_os(KERNEL_VARIABLE).filter(|value| !value.is_empty()) {
        Some(path) => PathBuf::from(path),
        None => {
            let kernel = kernel::ensure(context.progress, context.cache, context.workspace, None)?;
            // The tests look for it beside the other.
            artifacts.add(None, kernel.bzimage(), "share/bzImage");
            kernel.vmlinux()
        }
    };
    let image = image::ensure(context)?;
    artifacts.add(Some(KERNEL_VARIABLE), vmlinux, "share/vmlinux");
    artifacts.add(Some("CAPSID_TEST_IMAGE"), image, "share/busybox.tar");
    let built = programs::build(
        context.progress,
        context.workspace,
        profile,
        &[CAPSID, VMM, AGENT],
    )?;
    for (program, here) in [CAPSID, VMM, AGENT].iter().zip(built) {
        artifacts.add_program(program, here)?;
    }
    Ok(artifacts)
}

impl Artifacts {
    /// Builds containerd's shim and adds it; containerd finds it on its path.
    ///
    /// # Errors
    /// It does not build.
    pub fn add_shim(
        &mut self,
        context: &Context<'_>,
        profile: Profile,
    ) -> Result<(), Box<dyn Error>> {
        for here in programs::build(context.progress, context.workspace, profile, &[SHIM])? {
            self.add_program(&SHIM, here)?;
        }
        Ok(())
    }

    /// Adds a file or a directory; `inside` is its path below the programs drive.
    pub fn add(&mut self, variable: Option<&'static str>, here: PathBuf, inside: &str) {
        self.all.push(Artifact {
            variable,
            here,
            inside: inside.into(),
        });
    }

    fn add_program(&mut self, program: &Program, here: PathBuf) -> Result<(), Box<dyn Error>> {
        if *program == AGENT {
            let file = here.with_file_name("capsid-initramfs.cpio");
            initramfs::write(&here, &file)?;
            self.add(Some("CAPSID_INITRAMFS"), file, "share/initramfs.cpio");
            // For the agent's own tests, which start it as a plain process.
            self.add(None, here, &format!("bin/{}", program.name));
        } else {
            let variable = (*program == VMM).then_some("CAPSID_VMM");
            self.add(variable, here, &format!("bin/{}", program.name));
        }
        Ok(())
    }

    /// Where a program or file of this name is on this host.
    pub fn here(&self, name: &str) -> Option<&Path> {
        self.all
            .iter()
            .map(|one| one.here.as_path())
            .find(|path| path.file_name() == Some(name.as_ref()))
    }

    /// For the testbed's drive.
    pub fn items(&self) -> Vec<Item> {
        self.all
            .iter()
            .map(|one| Item {
                from: one.here.clone(),
                to: one.inside.clone(),
            })
            .collect()
    }

    /// The variables for a command on this host.
    pub fn variables_here(&self) -> Vec<(&'static str, PathBuf)> {
        self.all
            .iter()
            .filter_map(|one| Some((one.variable?, one.here.clone())))
            .collect()
    }

    /// The variables for a command inside the testbed.
    pub fn variables_inside(&self) -> Vec<(&'static str, PathBuf)> {
        let place =
            |one: &Artifact| Some((one.variable?, Path::new(PROGRAMS_DIR).join(&one.inside)));
        self.all.iter().filter_map(place).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_name_the_place_where_the_command_runs() {
        let mut artifacts = Artifacts::default();
        artifacts.add(
            Some("CAPSID_KERNEL"),
            "/cache/k/vmlinux".into(),
            "share/vmlinux",
        );
        artifacts.add(None, "/target/capsid".into(), "bin/capsid");
        assert_eq!(
            artifacts.variables_here(),
            [("CAPSID_KERNEL", PathBuf::from("/cache/k/vmlinux"))]
        );
        assert_eq!(
            artifacts.variables_inside(),
            [("CAPSID_KERNEL", PathBuf::from("/capsid/share/vmlinux"))]
        );
        assert_eq!(artifacts.items().len(), 2);
        assert_eq!(artifacts.here("capsid"), Some(Path::new("/target/capsid")));
    }
}
