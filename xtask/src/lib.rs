//! The developer's door, as a library of small parts: what it runs (`command`), what it keeps (`cache`), what it shows
//! (`progress`), what it needs from Debian (`packages`), and one module per subcommand.
//!
//! Depends on no room of the workspace: it builds and runs their programs.

pub mod artifacts;
pub mod bench;
pub mod cache;
pub mod command;
pub mod containerd;
pub mod deps;
pub mod image;
pub mod initramfs;
pub mod interrupt;
pub mod kernel;
pub mod packages;
pub mod place;
pub mod programs;
pub mod progress;
pub mod run;
pub mod test;
pub mod testbed;
pub mod toolchain;

use std::error::Error;

/// The error and its causes, once each.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_names_every_cause() {
        let cause = std::io::Error::from(std::io::ErrorKind::NotFound);
        let error = cache::CacheError::Io {
            doing: "opening",
            path: "/x".into(),
            cause,
        };
        assert_eq!(chain(&error), "opening /x: entity not found");
    }
}
