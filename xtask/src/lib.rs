//! The developer's door, as a library of small parts: what it runs (`command`), what it keeps (`cache`), what it shows
//! (`progress`), what it needs from Debian (`packages`), and one module per subcommand.
//!
//! Depends on no room of the workspace: it builds and runs their programs.

pub mod cache;
pub mod command;
pub mod deps;
pub mod interrupt;
pub mod kernel;
pub mod packages;
pub mod programs;
pub mod progress;
pub mod testbed;
