//! Packages and sources of another Debian release than the machine's: apt with lists of its own in a directory of the caller's,
//! so that the machine's configuration stays as it is.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::KEYRING;
use crate::progress::Step;

/// apt's lists of one release.
#[derive(Debug)]
pub struct Lists {
    work: PathBuf,
}

impl Lists {
    /// Fetches them into `work`, which is made where it is not there. `kind` is `deb` or `deb-src`.
    ///
    /// # Errors
    /// The mirror does not have that release, or its signature is not Debian's.
    pub fn update(
        step: &Step,
        kind: &str,
        mirror: &str,
        release: &str,
        work: &Path,
    ) -> Result<Self, Box<dyn Error>> {
        let lists = Self {
            work: work.to_owned(),
        };
        std::fs::create_dir_all(work.join("lists/partial"))?;
        std::fs::write(lists.sources(), line(kind, mirror, release))?;
        step.run(&mut lists.apt(&["update"]))?;
        Ok(lists)
    }

    /// `apt-get` with these lists; what it downloads goes into their directory.
    pub fn apt(&self, words: &[&str]) -> Command {
        let mut command = Command::new("apt-get");
        for (option, value) in [
            ("Dir::Etc::SourceList", self.sources().as_path()),
            ("Dir::Etc::SourceParts", Path::new("-")),
            ("Dir::State::Lists", &self.work.join("lists")),
            ("Dir::Cache", &self.work.join("cache")),
            // Its own user may not write below the cache.
            ("APT::Sandbox::User", Path::new("root")),
        ] {
            command
                .arg("-o")
                .arg(format!("{option}={}", value.display()));
        }
        command.args(words).current_dir(&self.work);
        command
    }

    /// The one file in their directory whose name ends so, behind a dot; none if there are none or many.
    pub fn only(&self, ending: &str) -> Option<PathBuf> {
        let entries = std::fs::read_dir(&self.work).ok()?;
        let mut found = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|found| found == ending));
        let first = found.next()?;
        found.next().is_none().then_some(first)
    }

    fn sources(&self) -> PathBuf {
        self.work.join("sources.list")
    }
}

fn line(kind: &str, mirror: &str, release: &str) -> String {
    format!("{kind} [signed-by={KEYRING}] {mirror} {release} main\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_from_the_mirror_is_checked_against_debian_s_keys() {
        assert_eq!(
            line("deb-src", "http://b/debian/", "trixie"),
            format!("deb-src [signed-by={KEYRING}] http://b/debian/ trixie main\n")
        );
    }
}
