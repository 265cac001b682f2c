//! The person's door to Capsid: run, check.
mod abort;
pub mod args;
mod escape;
mod image;
mod quantity;
mod share;
#[cfg(test)]
mod testing;
mod users;
mod volume;
